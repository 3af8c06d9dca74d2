// One portable wheel, yet wide vectors where the processor has them: a kernel body is written once as a template that
// is always inlined, compiled for the baseline and for AVX2, and chosen at run time.

#pragma once

#define MRCNN_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define MRCNN_AVX2 __attribute__((target("avx2,fma")))
#define MRCNN_AVX2_EXACT __attribute__((target("avx2")))  // rounds as the baseline does: no fused multiply-add
namespace mrcnn {
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
}  // namespace mrcnn
#else
#define MRCNN_AVX2
#define MRCNN_AVX2_EXACT
namespace mrcnn {
inline bool has_avx2() {
  return false;
}
}  // namespace mrcnn
#endif
