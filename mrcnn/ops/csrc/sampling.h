// Where the RoI operators read, along one axis of one RoI. Shared by the CPU and the CUDA kernels.
//
// A bilinear sample is the product of a vertical and a horizontal interpolation, and the samples of a bin form a
// grid, so the mean over a bin is
//     out[p, q] = sum_y sum_x  Wy[p, y] * Wx[q, x] * feature[y, x]
// and everything about sampling can be said for one axis at a time. The integral of precise RoI pooling and the grid
// of pixels of RoIPool are such products too. The arithmetic follows torchvision's, operation by operation and in the
// RoI's own precision, so that both agree on which side of an edge a sample falls.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MRCNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRCNN_HOST_DEVICE inline
#endif

namespace mrcnn {

// How an operator lays a RoI over the feature map. The numbers are those of Rule in mrcnn/ops/_library.py.
enum class Rule : int64_t {
  kAlign = 0,          // RoIAlign, pixel centres at half-integer coordinates
  kAlignLegacy = 1,    // RoIAlign half a pixel off, a RoI at least one feature pixel long
  kWarpInclusive = 2,  // RoIWarp: corners rounded, then bilinear samples; both corners' pixels count
  kWarpExclusive = 3,  // RoIWarp: a RoI ends where its second corner begins
  kWarpMnc = 4,        // RoIWarp as MNC has it: one sample, at the beginning of each bin
  kPool = 5,           // RoIPool: corners rounded, bins of whole pixels
  kPrecise = 6,        // precise RoI pooling: the integral of the interpolated map
};
constexpr int64_t kRules = 7;

struct Sampling {
  Rule rule;
  int64_t ratio;  // samples in a bin; <= 0: as many as the bin is long, rounded up
};

inline Sampling align_sampling(bool aligned, int64_t ratio) {
  return {aligned ? Rule::kAlign : Rule::kAlignLegacy, ratio};
}

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
MRCNN_HOST_DEVICE T clamp_to(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

template <typename T>
struct Axis {
  T start;       // where the RoI begins, in pixels of the feature map
  T bin;         // length of a bin, in pixels of the feature map; negative for a RoI that kAlign finds reversed
  int64_t grid;  // samples in a bin; 0: the RoI reads nothing
  int64_t size;  // length of the feature map
  Rule rule;
};

// One interpolation: low_weight * f[low] + high_weight * f[high].
template <typename T>
struct Sample {
  int64_t low;
  int64_t high;
  T low_weight;
  T high_weight;
};

template <typename T>
struct Extent {
  T start;
  T length;
};

// The RoI in pixels of the feature map.
template <typename T>
MRCNN_HOST_DEVICE Extent<T> extent_of(T from, T to, T scale, Rule rule) {
  const T start = times(from, scale), end = times(to, scale);
  T length = end - start;
  switch (rule) {
    case Rule::kAlign:
      return {start - T(0.5), (end - T(0.5)) - (start - T(0.5))};
    case Rule::kAlignLegacy:
      return {start, length < T(1) ? T(1) : length};
    case Rule::kPrecise:
      return {start, length < T(0) ? T(0) : length};
    default: {
      const T extra = rule == Rule::kWarpInclusive || rule == Rule::kPool ? T(1) : T(0);
      const T first = std::round(start);  // halves away from zero
      length = std::round(end) - first + extra;
      return {first, length < extra ? extra : length};
    }
  }
}

template <typename T>
MRCNN_HOST_DEVICE int64_t samples_in_bin(T bin, const Sampling& sampling) {
  if (sampling.rule == Rule::kPrecise) {
    return bin > T(0) ? 1 : 0;
  }
  if (sampling.rule == Rule::kPool || sampling.rule == Rule::kWarpMnc) {
    return 1;
  }
  if (sampling.ratio > 0) {
    return sampling.ratio;
  }
  const bool align = sampling.rule == Rule::kAlign || sampling.rule == Rule::kAlignLegacy;
  return static_cast<int64_t>(clamp_to(std::ceil(bin), align ? T(0) : T(1), T(1 << 30)));
}

// from, to: the RoI's two coordinates in image pixels.
template <typename T>
MRCNN_HOST_DEVICE Axis<T> make_axis(
    T from, T to, T scale, int64_t bins, const Sampling& sampling, int64_t size) {
  const Extent<T> roi = extent_of(from, to, scale, sampling.rule);
  const T bin = roi.length / static_cast<T>(bins);
  if (!std::isfinite(bin) || !std::isfinite(roi.start) || size < 1) {
    return {T(0), T(0), 0, size, sampling.rule};  // NaN or infinite coordinates, or an empty map: reads as 0
  }
  return {roi.start, bin, samples_in_bin(bin, sampling), size, sampling.rule};
}

// Sample i of bin p. False where it is more than a pixel (MNC: half a pixel) outside the map and so contributes 0.
template <typename T>
MRCNN_HOST_DEVICE bool sample_at(const Axis<T>& axis, int64_t p, int64_t i, Sample<T>& sample) {
  const bool mnc = axis.rule == Rule::kWarpMnc;
  const T phase = mnc ? T(0) : T(0.5);
  T at = axis.start + times(static_cast<T>(p), axis.bin) +
      times(static_cast<T>(i) + phase, axis.bin) / static_cast<T>(axis.grid);
  if (!(at >= (mnc ? T(-0.5) : T(-1)) && at <= static_cast<T>(axis.size) - (mnc ? T(0.5) : T(0)))) {
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

// RoIPool: the pixels [first, last) of bin p, none where first >= last.
template <typename T>
MRCNN_HOST_DEVICE void pixels_of_bin(const Axis<T>& axis, int64_t p, int64_t& first, int64_t& last) {
  const T end = axis.grid > 0 ? static_cast<T>(axis.size) : T(0);
  first = static_cast<int64_t>(clamp_to(std::floor(times(static_cast<T>(p), axis.bin)) + axis.start, T(0), end));
  last = static_cast<int64_t>(clamp_to(std::ceil(times(static_cast<T>(p + 1), axis.bin)) + axis.start, T(0), end));
}

// What a maximum over bin p chooses from: RoIPool's pixels, or the samples of the others.
template <typename T>
MRCNN_HOST_DEVICE void candidate_range(const Axis<T>& axis, int64_t p, int64_t& first, int64_t& last) {
  if (axis.rule == Rule::kPool) {
    pixels_of_bin(axis, p, first, last);
  } else {
    sample_range(axis, p, first, last);
  }
}

template <typename T>
MRCNN_HOST_DEVICE bool candidate_at(const Axis<T>& axis, int64_t p, int64_t i, Sample<T>& sample) {
  if (axis.rule == Rule::kPool) {
    sample = {i, i, T(1), T(0)};
    return true;
  }
  return sample_at(axis, p, i, sample);
}

// Whether a maximum changes: the first of equal values stays, and the first NaN, so that it is seen.
template <typename T>
MRCNN_HOST_DEVICE bool exceeds(T value, T best) {
  return (value > best) | ((value != value) & (best == best));
}

}  // namespace mrcnn
