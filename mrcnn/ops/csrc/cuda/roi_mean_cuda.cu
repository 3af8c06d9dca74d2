// RoI operators that take means, with CUDA: RoIAlign, RoIWarp and precise RoI pooling.
//
// Forward: a thread for each output element. Backward: a block owns kChannels planes (level, image, channel) and adds
// the RoIs that read them one after another, so no two blocks write the same pixel: no atomics, the same bits in every
// run, and sums in float32 (float64) whatever the features' dtype is.

#include <torch/csrc/stable/library.h>

#include "../precise.h"
#include "pyramid.h"

namespace mrcnn {
namespace {

constexpr int kChannels = 4;     // planes that a block of the backward pass owns
constexpr int kTileHeight = 16;  // the RoI's pixels are visited in tiles
constexpr int kTileWidth = 32;   // a warp, so that a warp's pixels are of one row
constexpr int kMaxBins = 64;     // weights of a tile in shared memory: (16 + 32) * 64 doubles are 24 KiB

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

// The mean of the interpolated map of one plane over bin (p, q).
template <typename T, typename Element>
__device__ T mean_of_hats(const RoiAxes<T>& axes, int64_t p, int64_t q, const Element* plane) {
  int64_t top, bottom, left, right;
  hats_of_bin(axes.y, p, top, bottom);
  hats_of_bin(axes.x, q, left, right);
  T sum = T(0);
  for (int64_t y = top; y < bottom; ++y) {
    T along = T(0);
    for (int64_t x = left; x < right; ++x) {
      along += hat_weights(axes.x, q, x).mean * static_cast<T>(plane[y * axes.x.size + x]);
    }
    sum += hat_weights(axes.y, p, y).mean * along;
  }
  return sum;
}

template <typename T, typename Element>
__device__ T mean_of_bin(const RoiAxes<T>& axes, int64_t p, int64_t q, const Element* plane) {
  const T samples = static_cast<T>(axes.y.grid) * static_cast<T>(axes.x.grid);
  if (!(samples > T(0))) {
    return T(0);
  }
  return axes.y.rule == Rule::kPrecise ? mean_of_hats(axes, p, q, plane)
                                       : sum_of_samples(axes, p, q, plane) / samples;
}

template <typename T, typename Element>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    Pyramid<const Element> features, const T* rois, const int64_t* levels, Pooling pooling, Element* output) {
  const int64_t count = pooling.rois * features.channels * pooling.height * pooling.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
    const Place place = place_of(at, features.channels, pooling);
    const T* roi = rois + 5 * place.r;
    const int64_t level = levels[place.r];
    if (!in_range(roi[0], level, features)) {
      output[at] = static_cast<Element>(T(0));
      continue;
    }
    const RoiAxes<T> axes = roi_axes(roi, features, level, pooling);
    const int64_t plane = static_cast<int64_t>(roi[0]) * features.channels + place.channel;
    output[at] = static_cast<Element>(
        mean_of_bin(axes, place.p, place.q, features.data[level] + plane * axes.y.size * axes.x.size));
  }
}

// What bin p gives pixel `pixel` in its mean along one axis: an entry of Wy or Wx in sampling.h.
template <typename T>
__device__ T bin_weight(const Axis<T>& axis, int64_t p, int64_t pixel) {
  if (axis.rule == Rule::kPrecise) {
    return axis.grid > 0 ? hat_weights(axis, p, pixel).mean : T(0);
  }
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

Tensor roi_mean_cuda(
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
  check_mean(pooling);
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  make_contiguous(features);
  rois = torch::stable::contiguous(rois);
  levels = torch::stable::contiguous(levels);
  Tensor output =
      torch::stable::new_empty(features[0], {rois.size(0), features[0].size(1), output_height, output_width});
  if (output.numel() == 0) {
    return output;
  }
  with_element(output.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    forward_kernel<T, Element><<<blocks_for(output.numel()), kThreads, 0, current_stream(output)>>>(
        make_pyramid<const Element>(features, spatial_scales), static_cast<const T*>(rois.data_ptr()),
        static_cast<const int64_t*>(levels.data_ptr()), pooling, static_cast<Element*>(output.data_ptr()));
  });
  check_launch("roi_mean");
  return output;
}

std::vector<Tensor> roi_mean_backward_cuda(
    Tensor grad,
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales,
    int64_t rule,
    int64_t sampling_ratio) {
  const Pooling pooling = check_pooling_backward(grad, features, rois, levels, spatial_scales, rule, sampling_ratio);
  check_mean(pooling);
  check(pooling.height <= kMaxBins && pooling.width <= kMaxBins, "roi_mean_backward: CUDA takes outputs up to ",
        kMaxBins, "x", kMaxBins);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  grad = torch::stable::contiguous(grad);
  rois = torch::stable::contiguous(rois);
  levels = torch::stable::contiguous(levels);
  const ScalarType dtype = features[0].scalar_type();
  const std::vector<Tensor> sums = zero_sums(features);
  const int64_t images = features[0].size(0), channels = features[0].size(1);
  if (grad.numel() == 0 || images == 0) {
    return to_dtype(sums, dtype);
  }
  const dim3 blocks((channels + kChannels - 1) / kChannels, images, features.size());
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    const size_t shared = (grad.size(2) * kTileHeight + grad.size(3) * kTileWidth) * sizeof(T);
    backward_kernel<T, Element><<<blocks, kThreads, shared, current_stream(grad)>>>(
        static_cast<const Element*>(grad.data_ptr()), static_cast<const T*>(rois.data_ptr()),
        static_cast<const int64_t*>(levels.data_ptr()), pooling, make_pyramid<T>(sums, spatial_scales));
  });
  check_launch("roi_mean_backward");
  return to_dtype(sums, dtype);
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CUDA, m) {
  m.impl("roi_mean", TORCH_BOX(&mrcnn::roi_mean_cuda));
  m.impl("roi_mean_backward", TORCH_BOX(&mrcnn::roi_mean_backward_cuda));
}
