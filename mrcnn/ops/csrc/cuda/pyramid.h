// What the CUDA kernels of the RoI operators share: the feature pyramid by value, and which of it a RoI reads.
//
// RoIs whose batch index or level is out of range give 0 and receive nothing: checking them on the host would wait for
// the GPU.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "../sampling.h"
#include "launch.h"

namespace mrcnn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename Element>
struct Pyramid {
  Element* data[kMaxLevels];
  int64_t height[kMaxLevels];
  int64_t width[kMaxLevels];
  double scale[kMaxLevels];
  int64_t levels;
  int64_t images;
  int64_t channels;
};

// T is the type of RoIs and sums.
template <typename T>
struct RoiAxes {
  Axis<T> y;
  Axis<T> x;
};

template <typename T, typename Element>
__device__ RoiAxes<T> roi_axes(const T* roi, const Pyramid<Element>& features, int64_t level, const Pooling& pooling) {
  const T scale = static_cast<T>(features.scale[level]);
  return {
      make_axis(roi[2], roi[4], scale, pooling.height, pooling.sampling, features.height[level]),
      make_axis(roi[1], roi[3], scale, pooling.width, pooling.sampling, features.width[level])};
}

template <typename T, typename Element>
__device__ bool in_range(T image, int64_t level, const Pyramid<Element>& features) {
  return image >= T(0) && image < static_cast<T>(features.images) && level >= 0 && level < features.levels;
}

// Pixels [low, high) beyond which the RoI reads nothing along one axis.
template <typename T>
__device__ void pixel_range(const Axis<T>& axis, int64_t bins, int64_t& low, int64_t& high) {
  const T end = axis.start + static_cast<T>(bins) * axis.bin;
  const T last = static_cast<T>(axis.size);
  const T from = fmin(axis.start, end) - T(2), to = fmax(axis.start, end) + T(3);
  // A sample up to a pixel outside is clamped to the edge, hence the margins.
  low = static_cast<int64_t>(fmin(fmax(from, T(0)), last - T(1)));
  high = axis.grid > 0 ? static_cast<int64_t>(fmin(fmax(to, T(0)), last)) : low;
}

// Element (r, c, p, q) of the output.
struct Place {
  int64_t r, channel, p, q;
};

__device__ inline Place place_of(int64_t at, int64_t channels, const Pooling& pooling) {
  const int64_t bins = pooling.height * pooling.width;
  return {at / (bins * channels), at / bins % channels, at / pooling.width % pooling.height, at % pooling.width};
}

template <typename Element>
Pyramid<Element> make_pyramid(const std::vector<Tensor>& features, const std::vector<double>& scales) {
  Pyramid<Element> pyramid{};
  pyramid.levels = static_cast<int64_t>(features.size());
  pyramid.images = features[0].size(0);
  pyramid.channels = features[0].size(1);
  for (size_t l = 0; l < features.size(); ++l) {
    pyramid.data[l] = static_cast<Element*>(features[l].data_ptr());
    pyramid.height[l] = features[l].size(2);
    pyramid.width[l] = features[l].size(3);
    pyramid.scale[l] = scales[l];
  }
  return pyramid;
}

// Calls f(element), f of a value whose type is that of the features.
template <typename F>
auto with_element(ScalarType dtype, const F& f) {
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
            dtype == ScalarType::BFloat16,
        "roi pooling: CUDA features must be float32, float64, float16 or bfloat16");
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

template <typename Element>
using Coordinate = std::conditional_t<std::is_same_v<Element, double>, double, float>;

inline void make_contiguous(std::vector<Tensor>& tensors) {
  for (Tensor& tensor : tensors) {
    tensor = torch::stable::contiguous(tensor);
  }
}

// Zeros for the gradients of feature maps, in the type of sums.
inline std::vector<Tensor> zero_sums(const std::vector<Tensor>& features) {
  std::vector<Tensor> sums;
  for (const Tensor& level : features) {
    sums.push_back(torch::stable::new_zeros(level, level.sizes(), coordinate_type(level.scalar_type())));
  }
  return sums;
}

inline std::vector<Tensor> to_dtype(std::vector<Tensor> sums, ScalarType dtype) {
  for (Tensor& sum : sums) {
    sum = torch::stable::to(sum, dtype);
  }
  return sums;
}

}  // namespace mrcnn
