// RoI operators that take maxima, with CUDA: RoIPool, and RoIAlign and RoIWarp with their samples' maximum.
//
// Forward: a thread for each output element, which also remembers which of the bin's samples it was. Backward: a block
// owns kPlanes planes (level, image, channel) and visits the RoIs that read them one after another; a thread owns a
// pixel of the RoI and asks each bin near it whether its maximum lay there. No two threads write the same pixel: no
// atomics, the same bits in every run, and sums in float32 (float64) whatever the features' dtype is.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pyramid.h"

namespace mrcnn {
namespace {

constexpr int kPlanes = 4;  // that a block of the backward pass owns

template <typename T>
struct Maximum {
  T value;
  int32_t index;  // among the bin's samples, row by row; -1: there are none
};

template <typename T, typename Element>
__device__ T interpolate(const Sample<T>& y, const Sample<T>& x, int64_t width, const Element* plane) {
  const Element *low = plane + y.low * width, *high = plane + y.high * width;
  const T upper = x.low_weight * static_cast<T>(low[x.low]) + x.high_weight * static_cast<T>(low[x.high]);
  const T lower = x.low_weight * static_cast<T>(high[x.low]) + x.high_weight * static_cast<T>(high[x.high]);
  return y.low_weight * upper + y.high_weight * lower;
}

// A sample off the map counts as 0.
template <typename T, typename Element>
__device__ Maximum<T> max_of_bin(const RoiAxes<T>& axes, int64_t p, int64_t q, const Element* plane) {
  int64_t y_first, y_last, x_first, x_last;
  candidate_range(axes.y, p, y_first, y_last);
  candidate_range(axes.x, q, x_first, x_last);
  Maximum<T> best{T(0), -1};
  int32_t index = 0;
  for (int64_t i = y_first; i < y_last; ++i) {
    Sample<T> y, x;
    const bool on_y = candidate_at(axes.y, p, i, y);
    for (int64_t j = x_first; j < x_last; ++j, ++index) {
      T value = T(0);
      if (on_y && candidate_at(axes.x, q, j, x)) {
        value = axes.y.rule == Rule::kPool ? static_cast<T>(plane[i * axes.x.size + j])
                                           : interpolate(y, x, axes.x.size, plane);
      }
      if (best.index < 0 || exceeds(value, best.value)) {
        best = {value, index};
      }
    }
  }
  return best;
}

template <typename T, typename Element>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    Pyramid<const Element> features, const T* rois, const int64_t* levels, Pooling pooling, Element* output,
    int32_t* argmax) {
  const int64_t count = pooling.rois * features.channels * pooling.height * pooling.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
    const Place place = place_of(at, features.channels, pooling);
    const T* roi = rois + 5 * place.r;
    const int64_t level = levels[place.r];
    Maximum<T> best{T(0), -1};
    if (in_range(roi[0], level, features)) {
      const RoiAxes<T> axes = roi_axes(roi, features, level, pooling);
      const int64_t plane = static_cast<int64_t>(roi[0]) * features.channels + place.channel;
      best = max_of_bin(axes, place.p, place.q, features.data[level] + plane * axes.y.size * axes.x.size);
    }
    output[at] = static_cast<Element>(best.value);
    argmax[at] = best.index;
  }
}

// The bins [first, last) that may read a pixel along one axis: those within a pixel of it, and one more at either end
// for rounding.
template <typename T>
__device__ void bins_near(const Axis<T>& axis, int64_t bins, int64_t pixel, int64_t& first, int64_t& last) {
  first = 0;
  last = bins;
  if (axis.bin == T(0)) {
    return;
  }
  const T a = (static_cast<T>(pixel - 1) - axis.start) / axis.bin;
  const T b = (static_cast<T>(pixel + 1) - axis.start) / axis.bin;
  const T end = static_cast<T>(bins);
  first = static_cast<int64_t>(clamp_to(std::floor(std::fmin(a, b)) - T(2), T(0), end));
  last = static_cast<int64_t>(clamp_to(std::ceil(std::fmax(a, b)) + T(2), T(0), end));
}

// What sample i of bin p gives a pixel along one axis.
template <typename T>
__device__ T weight_at(const Axis<T>& axis, int64_t p, int64_t i, int64_t pixel) {
  Sample<T> sample;
  if (!candidate_at(axis, p, i, sample)) {
    return T(0);
  }
  return (sample.low == pixel ? sample.low_weight : T(0)) + (sample.high == pixel ? sample.high_weight : T(0));
}

// How much of bin (p, q)'s gradient goes to pixel (y, x): nothing unless its maximum lay there.
template <typename T>
__device__ T max_weight(const RoiAxes<T>& axes, int64_t p, int64_t q, int32_t index, int64_t y, int64_t x) {
  int64_t y_first, y_last, x_first, x_last;
  candidate_range(axes.x, q, x_first, x_last);
  if (index < 0 || x_first >= x_last) {
    return T(0);
  }
  candidate_range(axes.y, p, y_first, y_last);
  const int64_t i = y_first + index / (x_last - x_first), j = x_first + index % (x_last - x_first);
  if (axes.y.rule == Rule::kPool) {
    return i == y && j == x ? T(1) : T(0);
  }
  const T row = weight_at(axes.y, p, i, y);
  return row == T(0) ? T(0) : row * weight_at(axes.x, q, j, x);
}

// Gradient of pixel (y, x) from one channel of the RoI's output gradient.
template <typename T, typename Element>
__device__ T pixel_grad(
    const RoiAxes<T>& axes, const Pooling& pooling, int64_t y, int64_t x, const Element* grad, const int32_t* argmax) {
  int64_t p_first, p_last, q_first, q_last;
  bins_near(axes.y, pooling.height, y, p_first, p_last);
  bins_near(axes.x, pooling.width, x, q_first, q_last);
  T sum = T(0);
  for (int64_t p = p_first; p < p_last; ++p) {
    for (int64_t q = q_first; q < q_last; ++q) {
      const int64_t bin = p * pooling.width + q;
      const T weight = max_weight(axes, p, q, argmax[bin], y, x);
      if (weight != T(0)) {
        sum += weight * static_cast<T>(grad[bin]);
      }
    }
  }
  return sum;
}

// Block (group of planes, image, level). A pixel may have another thread from one RoI to the next, so all threads meet
// in between; the branches that skip a RoI depend on the block alone.
template <typename T, typename Element>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const Element* grad, const int32_t* argmax, const T* rois, const int64_t* levels, Pooling pooling,
    Pyramid<T> features) {
  const int64_t level = blockIdx.z, image = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPlanes;
  const int64_t channels = features.channels - first < kPlanes ? features.channels - first : kPlanes;
  const int64_t height = features.height[level], width = features.width[level];
  const int64_t bins = pooling.height * pooling.width;
  T* planes = features.data[level] + (image * features.channels + first) * height * width;
  for (int64_t r = 0; r < pooling.rois; ++r) {
    const T* roi = rois + 5 * r;
    if (levels[r] != level || !in_range(roi[0], level, features) || static_cast<int64_t>(roi[0]) != image) {
      continue;
    }
    const RoiAxes<T> axes = roi_axes(roi, features, level, pooling);
    int64_t top, bottom, left, right;
    pixel_range(axes.y, pooling.height, top, bottom);
    pixel_range(axes.x, pooling.width, left, right);
    const int64_t columns = right - left, pixels = (bottom - top) * columns;
    const int64_t offset = (r * features.channels + first) * bins;
    for (int64_t at = threadIdx.x; at < pixels * channels; at += blockDim.x) {
      const int64_t c = at / pixels, y = top + at % pixels / columns, x = left + at % pixels % columns;
      planes[(c * height + y) * width + x] +=
          pixel_grad(axes, pooling, y, x, grad + offset + c * bins, argmax + offset + c * bins);
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor> roi_max_cuda(
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales,
    int64_t output_height,
    int64_t output_width,
    int64_t rule,
    int64_t sampling_ratio) {
  const Pooling pooling = check_pooling(
      features, rois, levels, spatial_scales, output_height, output_width, rule, sampling_ratio);
  check_max(pooling, features);
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  make_contiguous(features);
  rois = torch::stable::contiguous(rois);
  levels = torch::stable::contiguous(levels);
  const std::vector<int64_t> shape{rois.size(0), features[0].size(1), output_height, output_width};
  Tensor output = torch::stable::new_empty(features[0], shape);
  Tensor argmax = torch::stable::new_empty(features[0], shape, ScalarType::Int);
  if (output.numel() == 0) {
    return {output, argmax};
  }
  with_element(output.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    forward_kernel<T, Element><<<blocks_for(output.numel()), kThreads, 0, current_stream(output)>>>(
        make_pyramid<const Element>(features, spatial_scales), static_cast<const T*>(rois.data_ptr()),
        static_cast<const int64_t*>(levels.data_ptr()), pooling, static_cast<Element*>(output.data_ptr()),
        static_cast<int32_t*>(argmax.data_ptr()));
  });
  check_launch("roi_max");
  return {output, argmax};
}

std::vector<Tensor> roi_max_backward_cuda(
    Tensor grad,
    Tensor argmax,
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales,
    int64_t rule,
    int64_t sampling_ratio) {
  const Pooling pooling = check_pooling_backward(grad, features, rois, levels, spatial_scales, rule, sampling_ratio);
  check_max(pooling, features);
  check_argmax(argmax, grad);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  for (Tensor* tensor : {&grad, &argmax, &rois, &levels}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  const ScalarType dtype = features[0].scalar_type();
  const std::vector<Tensor> sums = zero_sums(features);
  const int64_t images = features[0].size(0), channels = features[0].size(1);
  if (grad.numel() == 0 || images == 0) {
    return to_dtype(sums, dtype);
  }
  const dim3 blocks((channels + kPlanes - 1) / kPlanes, images, features.size());
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    backward_kernel<T, Element><<<blocks, kThreads, 0, current_stream(grad)>>>(
        static_cast<const Element*>(grad.data_ptr()), static_cast<const int32_t*>(argmax.data_ptr()),
        static_cast<const T*>(rois.data_ptr()), static_cast<const int64_t*>(levels.data_ptr()), pooling,
        make_pyramid<T>(sums, spatial_scales));
  });
  check_launch("roi_max_backward");
  return to_dtype(sums, dtype);
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CUDA, m) {
  m.impl("roi_max", TORCH_BOX(&mrcnn::roi_max_cuda));
  m.impl("roi_max_backward", TORCH_BOX(&mrcnn::roi_max_backward_cuda));
}
