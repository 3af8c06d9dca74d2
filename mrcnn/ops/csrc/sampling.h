// Where RoIAlign samples, along one axis of one RoI. Shared by the CPU and the CUDA kernels.
//
// A bilinear sample is the product of a vertical and a horizontal interpolation, and the samples of a bin form a
// grid, so the mean over a bin is
//     out[p, q] = sum_y sum_x  Wy[p, y] * Wx[q, x] * feature[y, x]
// and everything about sampling can be said for one axis at a time. The arithmetic follows torchvision's, operation
// by operation and in the RoI's own precision, so that both agree on which side of an edge a sample falls.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MRCNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRCNN_HOST_DEVICE inline
#endif

namespace mrcnn {

// A product that the CUDA compiler does not fuse with the sum it is part of: the rounding is torchvision's on the CPU.
template <typename T>
MRCNN_HOST_DEVICE T times(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

template <typename T>
struct Axis {
  T start;       // where the RoI begins, in pixels of the feature map
  T bin;         // length of a bin, in pixels of the feature map; negative for a reversed RoI
  int64_t grid;  // samples in a bin
  int64_t size;  // length of the feature map
};

// One interpolation: low_weight * f[low] + high_weight * f[high].
template <typename T>
struct Sample {
  int64_t low;
  int64_t high;
  T low_weight;
  T high_weight;
};

// from, to: the RoI's two coordinates in image pixels. aligned: pixel centres lie at half-integer coordinates, and
// the RoI may be smaller than a pixel. sampling_ratio <= 0: as many samples as a bin is long, rounded up.
template <typename T>
MRCNN_HOST_DEVICE Axis<T> make_axis(
    T from, T to, T scale, bool aligned, int64_t bins, int64_t sampling_ratio, int64_t size) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = times(from, scale) - offset;
  const T end = times(to, scale) - offset;
  T length = end - start;
  if (!aligned && length < T(1)) {
    length = T(1);
  }
  const T bin = length / static_cast<T>(bins);
  if (!std::isfinite(bin) || !std::isfinite(start) || size < 1) {
    return {T(0), T(0), 0, size};  // NaN or infinite coordinates, or an empty map: no samples, reads as 0
  }
  const T adaptive = std::ceil(bin);
  const int64_t grid = sampling_ratio > 0 ? sampling_ratio : (adaptive > T(0) ? static_cast<int64_t>(adaptive) : 0);
  return {start, bin, grid, size};
}

// Sample i of bin p. False where it is more than a pixel outside the map and so contributes 0.
template <typename T>
MRCNN_HOST_DEVICE bool sample_at(const Axis<T>& axis, int64_t p, int64_t i, Sample<T>& sample) {
  T at = axis.start + times(static_cast<T>(p), axis.bin) +
      times(static_cast<T>(i) + T(0.5), axis.bin) / static_cast<T>(axis.grid);
  if (!(at >= T(-1) && at <= static_cast<T>(axis.size))) {
    return false;
  }
  if (at < T(0)) {
    at = T(0);
  }
  sample.low = static_cast<int64_t>(at);
  if (sample.low >= axis.size - 1) {
    sample = {axis.size - 1, axis.size - 1, T(1), T(0)};
    return true;
  }
  sample.high = sample.low + 1;
  sample.high_weight = at - static_cast<T>(sample.low);
  sample.low_weight = T(1) - sample.high_weight;
  return true;
}

// The samples [first, last) of bin p beyond which none can lie on the map: bounds the work that a RoI far larger
// than the map asks for. Generous by a few samples at both ends; sample_at decides.
template <typename T>
MRCNN_HOST_DEVICE void sample_range(const Axis<T>& axis, int64_t p, int64_t& first, int64_t& last) {
  first = 0;
  last = axis.grid;
  if (axis.grid <= 8 || !(axis.bin > T(0))) {
    return;
  }
  const double step = static_cast<double>(axis.bin) / static_cast<double>(axis.grid);
  const double origin = static_cast<double>(axis.start) + static_cast<double>(p) * static_cast<double>(axis.bin);
  const double begin = (-1.0 - origin) / step - 2.0;
  const double end = (static_cast<double>(axis.size) - origin) / step + 2.0;
  if (begin > 0.0) {
    first = begin < static_cast<double>(axis.grid) ? static_cast<int64_t>(begin) : axis.grid;
  }
  if (end < static_cast<double>(axis.grid)) {
    last = end > static_cast<double>(first) ? static_cast<int64_t>(end) : first;
  }
}

}  // namespace mrcnn
