// Multi-level RoIAlign with CUDA.
//
// Forward: a thread for each output element. Backward: a block owns kChannels planes (level, image, channel) and adds
// the RoIs that read them one after another, so no two blocks write the same pixel: no atomics, the same bits in every
// run, and sums in float32 (float64) whatever the features' dtype is.
//
// RoIs whose batch index or level is out of range give 0 and receive nothing: checking them on the host would wait for
// the GPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "../sampling.h"
#include "launch.h"

namespace mrcnn {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kChannels = 4;     // planes that a block of the backward pass owns
constexpr int kTileHeight = 16;  // the RoI's pixels are visited in tiles
constexpr int kTileWidth = 32;   // a warp, so that a warp's pixels are of one row
constexpr int kMaxBins = 64;     // weights of a tile in shared memory: (16 + 32) * 64 doubles are 24 KiB

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

struct Pooling {
  int64_t rois;
  int64_t height;
  int64_t width;
  int64_t sampling_ratio;
  bool aligned;
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
      make_axis(roi[2], roi[4], scale, pooling.aligned, pooling.height, pooling.sampling_ratio, features.height[level]),
      make_axis(roi[1], roi[3], scale, pooling.aligned, pooling.width, pooling.sampling_ratio, features.width[level])};
}

template <typename T, typename Element>
__device__ bool in_range(T image, int64_t level, const Pyramid<Element>& features) {
  return image >= T(0) && image < static_cast<T>(features.images) && level >= 0 && level < features.levels;
}

// The sum of bin (p, q)'s samples of one plane.
template <typename T, typename Element>
__device__ T sum_of_samples(const RoiAxes<T>& axes, int64_t p, int64_t q, const Element* plane) {
  int64_t y_first, y_last, x_first, x_last;
  sample_range(axes.y, p, y_first, y_last);
  sample_range(axes.x, q, x_first, x_last);
  Sample<T> y, x;
  T sum = T(0);
  for (int64_t i = y_first; i < y_last; ++i) {
    if (!sample_at(axes.y, p, i, y)) {
      continue;
    }
    const Element* low = plane + y.low * axes.x.size;
    const Element* high = plane + y.high * axes.x.size;
    for (int64_t j = x_first; j < x_last; ++j) {
      if (sample_at(axes.x, q, j, x)) {
        sum += y.low_weight *
                (x.low_weight * static_cast<T>(low[x.low]) + x.high_weight * static_cast<T>(low[x.high])) +
            y.high_weight *
                (x.low_weight * static_cast<T>(high[x.low]) + x.high_weight * static_cast<T>(high[x.high]));
      }
    }
  }
  return sum;
}

template <typename T, typename Element>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    Pyramid<const Element> features, const T* rois, const int64_t* levels, Pooling pooling, Element* output) {
  const int64_t count = pooling.rois * features.channels * pooling.height * pooling.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
    const int64_t q = at % pooling.width;
    const int64_t p = at / pooling.width % pooling.height;
    const int64_t channel = at / (pooling.width * pooling.height) % features.channels;
    const int64_t r = at / (pooling.width * pooling.height * features.channels);
    const T* roi = rois + 5 * r;
    const int64_t level = levels[r];
    if (!in_range(roi[0], level, features)) {
      output[at] = static_cast<Element>(T(0));
      continue;
    }
    const RoiAxes<T> axes = roi_axes(roi, features, level, pooling);
    const int64_t plane = static_cast<int64_t>(roi[0]) * features.channels + channel;
    const T sum = sum_of_samples(axes, p, q, features.data[level] + plane * axes.y.size * axes.x.size);
    const T samples = static_cast<T>(axes.y.grid) * static_cast<T>(axes.x.grid);
    output[at] = static_cast<Element>(samples > T(0) ? sum / samples : T(0));
  }
}

// What bin p gives pixel `pixel` in its mean along one axis: an entry of Wy or Wx in sampling.h.
template <typename T>
__device__ T bin_weight(const Axis<T>& axis, int64_t p, int64_t pixel) {
  int64_t first, last;
  sample_range(axis, p, first, last);
  T weight = T(0);
  Sample<T> sample;
  for (int64_t i = first; i < last; ++i) {
    if (sample_at(axis, p, i, sample)) {
      weight += (sample.low == pixel ? sample.low_weight : T(0)) + (sample.high == pixel ? sample.high_weight : T(0));
    }
  }
  return axis.grid > 0 ? weight / static_cast<T>(axis.grid) : T(0);
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

template <typename T>
struct TileWeights {
  T* y;  // [bin][kTileHeight]
  T* x;  // [bin][kTileWidth]
};

// All threads of the block together: the weights of the tile whose first pixel is (top, left).
template <typename T>
__device__ void fill_tile(
    const TileWeights<T>& tile, const RoiAxes<T>& axes, const Pooling& pooling, int64_t top, int64_t left) {
  const int rows = static_cast<int>(pooling.height) * kTileHeight;
  const int columns = static_cast<int>(pooling.width) * kTileWidth;
  for (int i = threadIdx.x; i < rows + columns; i += blockDim.x) {
    if (i < rows) {
      tile.y[i] = bin_weight(axes.y, i / kTileHeight, top + i % kTileHeight);
    } else {
      const int j = i - rows;
      tile.x[j] = bin_weight(axes.x, j / kTileWidth, left + j % kTileWidth);
    }
  }
}

// Gradient of pixel (y, x) of the tile from one channel of the RoI's output gradient.
template <typename T, typename Element>
__device__ T pixel_grad(const TileWeights<T>& tile, const Pooling& pooling, int y, int x, const Element* grad) {
  T sum = T(0);
  for (int64_t p = 0; p < pooling.height; ++p) {
    const T row = tile.y[p * kTileHeight + y];
    if (row == T(0)) {
      continue;
    }
    T along = T(0);
    for (int64_t q = 0; q < pooling.width; ++q) {
      const T column = tile.x[q * kTileWidth + x];
      if (column != T(0)) {
        along += column * static_cast<T>(grad[p * pooling.width + q]);
      }
    }
    sum += row * along;
  }
  return sum;
}

// Block (group of channels, image, level). The branches that skip a RoI or a tile depend on the block alone, so all
// its threads meet at every barrier.
template <typename T, typename Element>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const Element* grad, const T* rois, const int64_t* levels, Pooling pooling, Pyramid<T> features) {
  extern __shared__ __align__(16) unsigned char shared[];
  const TileWeights<T> tile{
      reinterpret_cast<T*>(shared), reinterpret_cast<T*>(shared) + pooling.height * kTileHeight};
  const int64_t level = blockIdx.z, image = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChannels;
  const int64_t channels = features.channels - first < kChannels ? features.channels - first : kChannels;
  const int64_t height = features.height[level], width = features.width[level];
  T* planes = features.data[level] + (image * features.channels + first) * height * width;
  const int x = threadIdx.x % kTileWidth;
  for (int64_t r = 0; r < pooling.rois; ++r) {
    const T* roi = rois + 5 * r;
    if (levels[r] != level || !in_range(roi[0], level, features) || static_cast<int64_t>(roi[0]) != image) {
      continue;
    }
    const RoiAxes<T> axes = roi_axes(roi, features, level, pooling);
    const Element* roi_grad = grad + (r * features.channels + first) * pooling.height * pooling.width;
    int64_t y_low, y_high, x_low, x_high;
    pixel_range(axes.y, pooling.height, y_low, y_high);
    pixel_range(axes.x, pooling.width, x_low, x_high);
    for (int64_t top = y_low; top < y_high; top += kTileHeight) {
      for (int64_t left = x_low; left < x_high; left += kTileWidth) {
        __syncthreads();  // the tile before has been read, and its sums are visible to this block
        fill_tile(tile, axes, pooling, top, left);
        __syncthreads();
        for (int row = threadIdx.x / kTileWidth; row < kTileHeight * channels; row += kThreads / kTileWidth) {
          const int y = row % kTileHeight, c = row / kTileHeight;
          if (top + y < y_high && left + x < x_high) {
            planes[(c * height + top + y) * width + left + x] +=
                pixel_grad(tile, pooling, y, x, roi_grad + c * pooling.height * pooling.width);
          }
        }
      }
    }
  }
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
        "roi_align: CUDA features must be float32, float64, float16 or bfloat16");
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

Tensor roi_align_cuda(
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales,
    int64_t output_height,
    int64_t output_width,
    int64_t sampling_ratio,
    bool aligned) {
  check_roi_align_inputs(features, rois, levels, spatial_scales, output_height, output_width);
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  for (Tensor& level : features) {
    level = torch::stable::contiguous(level);
  }
  rois = torch::stable::contiguous(rois);
  levels = torch::stable::contiguous(levels);
  Tensor output =
      torch::stable::new_empty(features[0], {rois.size(0), features[0].size(1), output_height, output_width});
  if (output.numel() == 0) {
    return output;
  }
  const Pooling pooling{rois.size(0), output_height, output_width, sampling_ratio, aligned};
  with_element(output.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    forward_kernel<T, Element><<<blocks_for(output.numel()), kThreads, 0, current_stream(output)>>>(
        make_pyramid<const Element>(features, spatial_scales), static_cast<const T*>(rois.data_ptr()),
        static_cast<const int64_t*>(levels.data_ptr()), pooling, static_cast<Element*>(output.data_ptr()));
  });
  check_launch("roi_align");
  return output;
}

std::vector<Tensor> roi_align_backward_cuda(
    Tensor grad,
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales,
    int64_t sampling_ratio,
    bool aligned) {
  check(grad.dim() == 4, "roi_align_backward: grad must be (R, C, output_height, output_width)");
  check_roi_align_inputs(features, rois, levels, spatial_scales, grad.size(2), grad.size(3));
  check(grad.size(0) == rois.size(0) && grad.size(1) == features[0].size(1) &&
            grad.scalar_type() == features[0].scalar_type() && grad.device() == features[0].device(),
        "roi_align_backward: grad must have the forward output's shape, dtype and device");
  check(grad.size(2) <= kMaxBins && grad.size(3) <= kMaxBins, "roi_align_backward: CUDA takes outputs up to ",
        kMaxBins, "x", kMaxBins);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  grad = torch::stable::contiguous(grad);
  rois = torch::stable::contiguous(rois);
  levels = torch::stable::contiguous(levels);
  const ScalarType dtype = features[0].scalar_type();
  std::vector<Tensor> sums;
  for (const Tensor& level : features) {
    sums.push_back(torch::stable::new_zeros(level, level.sizes(), coordinate_type(dtype)));
  }
  const int64_t images = features[0].size(0), channels = features[0].size(1);
  if (grad.numel() == 0 || images == 0) {
    return sums;
  }
  const Pooling pooling{rois.size(0), grad.size(2), grad.size(3), sampling_ratio, aligned};
  const dim3 blocks((channels + kChannels - 1) / kChannels, images, features.size());
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    const size_t shared = (grad.size(2) * kTileHeight + grad.size(3) * kTileWidth) * sizeof(T);
    backward_kernel<T, Element><<<blocks, kThreads, shared, current_stream(grad)>>>(
        static_cast<const Element*>(grad.data_ptr()), static_cast<const T*>(rois.data_ptr()),
        static_cast<const int64_t*>(levels.data_ptr()), pooling, make_pyramid<T>(sums, spatial_scales));
  });
  check_launch("roi_align_backward");
  for (Tensor& sum : sums) {
    sum = torch::stable::to(sum, dtype);
  }
  return sums;
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&mrcnn::roi_align_cuda));
  m.impl("roi_align_backward", TORCH_BOX(&mrcnn::roi_align_backward_cuda));
}
