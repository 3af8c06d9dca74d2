// Precise RoI pooling (Jiang et al., IoU-Net, 2018), along one axis of one RoI. Shared by the CPU and the CUDA kernels.
//
// The map is interpolated bilinearly, with zeros around it: pixel i contributes in proportion to its hat, which is 1 at
// i and falls to 0 at i - 1 and i + 1. An output is the mean of the interpolated map over its bin, so Wy and Wx of
// sampling.h are means of hats over bins.

#pragma once

#include "sampling.h"

namespace mrcnn {

template <typename T>
MRCNN_HOST_DEVICE T hat(T distance) {
  const T height = T(1) - std::fabs(distance);
  return height > T(0) ? height : T(0);
}

// The pixels [first, last) whose hats reach bin p.
template <typename T>
MRCNN_HOST_DEVICE void hats_of_bin(const Axis<T>& axis, int64_t p, int64_t& first, int64_t& last) {
  const T from = axis.start + static_cast<T>(p) * axis.bin;
  const T end = axis.grid > 0 ? static_cast<T>(axis.size) : T(0);
  first = static_cast<int64_t>(clamp_to(std::floor(from), T(0), end));
  last = static_cast<int64_t>(clamp_to(std::floor(from + axis.bin) + T(2), T(0), end));
}

// One slope of a hat over [from, to], the part that lies in [low, high], as a mean over [from, to]. Written in shares
// of the bin, so that nothing cancels where the bin is short.
template <typename T>
MRCNN_HOST_DEVICE T slope_mean(T from, T to, T low, T high) {
  const T begin = from > low ? from : low, end = to < high ? to : high;
  if (!(begin < end)) {
    return T(0);
  }
  const T before = from < low ? (low - from) / (to - from) : T(0);
  const T after = to > high ? (to - high) / (to - from) : T(0);
  return (T(1) - before - after) * (T(1) - std::fabs(begin + end) / T(2));
}

// What a pixel weighs in bin p: in its mean, and at its two ends, where the bin's limits move.
template <typename T>
struct HatWeights {
  T mean;
  T from;
  T to;
};

template <typename T>
MRCNN_HOST_DEVICE HatWeights<T> hat_weights(const Axis<T>& axis, int64_t p, int64_t pixel) {
  const T at = static_cast<T>(pixel);
  const T from = axis.start + static_cast<T>(p) * axis.bin - at;
  const T to = axis.start + static_cast<T>(p + 1) * axis.bin - at;
  if (!(from < to)) {  // too short for this precision: the mean is the value
    return {hat(from), hat(from), hat(to)};
  }
  return {slope_mean(from, to, T(-1), T(0)) + slope_mean(from, to, T(0), T(1)), hat(from), hat(to)};
}

template <typename T>
struct BinGrad {
  T x_from, x_to, y_from, y_to;
};

// The derivatives of output (p, q) of one plane in the four limits of its bin. weight_y(y) and weight_x(x) give
// hat_weights. The mean over [a, b] of a function f grows by (f(b) - mean) / (b - a) with b.
template <typename T, typename Element, typename WeightY, typename WeightX>
MRCNN_HOST_DEVICE BinGrad<T> bin_grad(
    const Axis<T>& axis_y, const Axis<T>& axis_x, int64_t p, int64_t q, const Element* plane, const WeightY& weight_y,
    const WeightX& weight_x) {
  int64_t top, bottom, left, right;
  hats_of_bin(axis_y, p, top, bottom);
  hats_of_bin(axis_x, q, left, right);
  T mean = T(0), x_from = T(0), x_to = T(0), y_from = T(0), y_to = T(0);
  for (int64_t y = top; y < bottom; ++y) {
    HatWeights<T> row = {T(0), T(0), T(0)};
    for (int64_t x = left; x < right; ++x) {
      const HatWeights<T> weight = weight_x(x);
      const T value = static_cast<T>(plane[y * axis_x.size + x]);
      row.mean += weight.mean * value;
      row.from += weight.from * value;
      row.to += weight.to * value;
    }
    const HatWeights<T> weight = weight_y(y);
    mean += weight.mean * row.mean;
    x_from += weight.mean * row.from;
    x_to += weight.mean * row.to;
    y_from += weight.from * row.mean;
    y_to += weight.to * row.mean;
  }
  return {(mean - x_from) / axis_x.bin, (x_to - mean) / axis_x.bin, (mean - y_from) / axis_y.bin,
          (y_to - mean) / axis_y.bin};
}

template <typename T>
struct RoiGrad {
  T x1, y1, x2, y2;
};

// The same in the RoI's corners, between which the limits of bin (p, q) lie. In feature pixels.
template <typename T>
MRCNN_HOST_DEVICE RoiGrad<T> corner_grad(const BinGrad<T>& bin, int64_t p, int64_t q, int64_t height, int64_t width) {
  const T left = static_cast<T>(q) / static_cast<T>(width), right = static_cast<T>(q + 1) / static_cast<T>(width);
  const T top = static_cast<T>(p) / static_cast<T>(height), bottom = static_cast<T>(p + 1) / static_cast<T>(height);
  return {bin.x_from * (T(1) - left) + bin.x_to * (T(1) - right),
          bin.y_from * (T(1) - top) + bin.y_to * (T(1) - bottom),
          bin.x_from * left + bin.x_to * right,
          bin.y_from * top + bin.y_to * bottom};
}

}  // namespace mrcnn
