// RoI operators that take means, on the CPU: RoIAlign, RoIWarp and precise RoI pooling.
//
// In a plane a RoI is pooled in two steps: first rows (vectorised along x), then columns. With 2x2 samples in 7x7
// bins that is about a seventh of the multiplications of the direct form.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "plan.h"
#include "simd.h"
#include "taps.h"

namespace mrcnn {
namespace {

template <typename T>
using MeanPlan = Plan<T, Taps>;

// strip[x] (+)= the weighted sum of kTaps feature rows at x.
template <int kTaps, bool kAdd, typename T>
MRCNN_INLINE void sum_rows(
    T* __restrict strip, const T* plane, int64_t width, int64_t count, const int32_t* index, const T* weight) {
  const T* rows[kTaps];
  for (int k = 0; k < kTaps; ++k) {
    rows[k] = plane + index[k] * width;
  }
  for (int64_t x = 0; x < count; ++x) {
    T sum = kAdd ? strip[x] : T(0);
    for (int k = 0; k < kTaps; ++k) {
      sum += weight[k] * rows[k][x];
    }
    strip[x] = sum;
  }
}

// The first step for one bin: the weighted sum of the feature rows that it samples.
template <typename T>
MRCNN_INLINE void pool_rows(
    T* strip, const T* plane, int64_t width, int64_t count, const int32_t* index, const T* weight, int64_t taps) {
  switch (taps) {
    case 1:
      return sum_rows<1, false>(strip, plane, width, count, index, weight);
    case 2:
      return sum_rows<2, false>(strip, plane, width, count, index, weight);
    case 3:
      return sum_rows<3, false>(strip, plane, width, count, index, weight);
    default:
      sum_rows<4, false>(strip, plane, width, count, index, weight);
  }
  int64_t k = 4;
  for (; k + 4 <= taps; k += 4) {
    sum_rows<4, true>(strip, plane, width, count, index + k, weight + k);
  }
  for (; k < taps; ++k) {
    sum_rows<1, true>(strip, plane, width, count, index + k, weight + k);
  }
}

template <int kTaps, typename T>
MRCNN_INLINE void sum_columns(
    T* __restrict output, const T* strip, int64_t bins, const int32_t* index, const T* weight) {
  for (int64_t q = 0; q < bins; ++q, index += kTaps, weight += kTaps) {
    T sum = T(0);
    for (int k = 0; k < kTaps; ++k) {
      sum += weight[k] * strip[index[k]];
    }
    output[q] = sum;
  }
}

// The second step for one row of bins: the weighted sums of the strip's columns.
template <typename T>
MRCNN_INLINE void pool_columns(
    T* __restrict output, const T* strip, int64_t bins, const int32_t* index, const T* weight, int64_t taps) {
  switch (taps) {
    case 1:
      return sum_columns<1>(output, strip, bins, index, weight);
    case 2:
      return sum_columns<2>(output, strip, bins, index, weight);
    case 3:
      return sum_columns<3>(output, strip, bins, index, weight);
    case 4:
      return sum_columns<4>(output, strip, bins, index, weight);
  }
  for (int64_t q = 0; q < bins; ++q, index += taps, weight += taps) {
    T sum = T(0);
    for (int64_t k = 0; k < taps; ++k) {
      sum += weight[k] * strip[index[k]];
    }
    output[q] = sum;
  }
}

template <typename T>
MRCNN_INLINE void pool(const MeanPlan<T>& plan, int64_t r, const T* plane, int64_t width, T* strip, T* output) {
  const RoiTaps&rows = plan.rows.rois[r], &columns = plan.columns.rois[r];
  const int64_t height_bins = plan.rows.bins, width_bins = plan.columns.bins;
  if (rows.count == 0 || columns.count == 0) {
    std::fill(output, output + height_bins * width_bins, T(0));
    return;
  }
  const int32_t *row = plan.rows.index(rows), *column = plan.columns.index(columns);
  const T *row_weight = plan.rows.weight(rows), *column_weight = plan.columns.weight(columns);
  const T* corner = plane + rows.low * width + columns.low;
  for (int64_t p = 0; p < height_bins; ++p, row += rows.taps, row_weight += rows.taps, output += width_bins) {
    pool_rows(strip, corner, width, columns.count, row, row_weight, rows.taps);
    pool_columns(output, strip, width_bins, column, column_weight, columns.taps);
  }
}

// The transpose of pool: adds the gradient of one RoI's output to the gradient of the plane.
template <typename T>
MRCNN_INLINE void unpool(const MeanPlan<T>& plan, int64_t r, const T* grad, T* strip, T* plane, int64_t width) {
  const RoiTaps&rows = plan.rows.rois[r], &columns = plan.columns.rois[r];
  const int32_t *row = plan.rows.index(rows), *column = plan.columns.index(columns);
  const T *row_weight = plan.rows.weight(rows), *column_weight = plan.columns.weight(columns);
  T* corner = plane + rows.low * width + columns.low;
  for (int64_t p = 0; p < plan.rows.bins; ++p, grad += plan.columns.bins) {
    std::fill(strip, strip + columns.count, T(0));
    for (int64_t q = 0, i = 0; q < plan.columns.bins; ++q) {
      for (int64_t k = 0; k < columns.taps; ++k, ++i) {
        strip[column[i]] += column_weight[i] * grad[q];
      }
    }
    for (int64_t k = 0; k < rows.taps; ++k, ++row, ++row_weight) {
      T* __restrict at = corner + *row * width;
      for (int64_t x = 0; x < columns.count; ++x) {
        at[x] += *row_weight * strip[x];
      }
    }
  }
}

// Planes [begin, end) of all levels, plane = image * channels + channel.
template <typename T>
MRCNN_INLINE void forward_planes(
    const MeanPlan<T>& plan, const T* const* features, T* output, int64_t begin, int64_t end) {
  std::vector<T> strip(plan.widest);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / plan.channels, channel = at % plan.channels;
    for (size_t l = 0; l < plan.levels; ++l) {
      const T* plane = features[l] + at * plan.heights[l] * plan.widths[l];
      for (const int64_t r : plan.readers[image * plan.levels + l]) {
        pool(plan, r, plane, plan.widths[l], strip.data(), output + (r * plan.channels + channel) * plan.bins);
      }
    }
  }
}

template <typename T>
MRCNN_INLINE void backward_planes(
    const MeanPlan<T>& plan, const T* grad, T* const* features, int64_t begin, int64_t end) {
  std::vector<T> strip(plan.widest);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / plan.channels, channel = at % plan.channels;
    for (size_t l = 0; l < plan.levels; ++l) {
      const int64_t pixels = plan.heights[l] * plan.widths[l];
      T* plane = features[l] + at * pixels;
      std::fill(plane, plane + pixels, T(0));
      for (const int64_t r : plan.readers[image * plan.levels + l]) {
        unpool(plan, r, grad + (r * plan.channels + channel) * plan.bins, strip.data(), plane, plan.widths[l]);
      }
    }
  }
}

template <typename T>
MRCNN_AVX2 void forward_avx2(
    const MeanPlan<T>& plan, const T* const* features, T* output, int64_t begin, int64_t end) {
  forward_planes(plan, features, output, begin, end);
}

template <typename T>
void forward_baseline(
    const MeanPlan<T>& plan, const T* const* features, T* output, int64_t begin, int64_t end) {
  forward_planes(plan, features, output, begin, end);
}

template <typename T>
MRCNN_AVX2 void backward_avx2(
    const MeanPlan<T>& plan, const T* grad, T* const* features, int64_t begin, int64_t end) {
  backward_planes(plan, grad, features, begin, end);
}

template <typename T>
void backward_baseline(const MeanPlan<T>& plan, const T* grad, T* const* features, int64_t begin, int64_t end) {
  backward_planes(plan, grad, features, begin, end);
}

Tensor roi_mean_cpu(
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
  Tensor output =
      torch::stable::new_empty(features[0], {pooling.rois, features[0].size(1), output_height, output_width});
  with_cpu_dtype(features[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const MeanPlan<T> plan(features, rois, levels, spatial_scales, pooling);
    const Maps<T> maps(features);
    T* out = static_cast<T*>(output.data_ptr());
    const auto run = has_avx2() ? forward_avx2<T> : forward_baseline<T>;
    parallel_planes(plan, pooling.rois, [&](int64_t begin, int64_t end) {
      run(plan, maps.data.data(), out, begin, end);
    });
  });
  return output;
}

std::vector<Tensor> roi_mean_backward_cpu(
    Tensor grad,
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales,
    int64_t rule,
    int64_t sampling_ratio) {
  const Pooling pooling = check_pooling_backward(grad, features, rois, levels, spatial_scales, rule, sampling_ratio);
  check_mean(pooling);
  grad = torch::stable::contiguous(grad);
  return with_cpu_dtype(features[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const MeanPlan<T> plan(features, rois, levels, spatial_scales, pooling);
    const GradMaps<T> grads(features);
    const T* in = static_cast<const T*>(grad.data_ptr());
    const auto run = has_avx2() ? backward_avx2<T> : backward_baseline<T>;
    parallel_planes(plan, pooling.rois, [&](int64_t begin, int64_t end) {
      run(plan, in, grads.data.data(), begin, end);
    });
    return grads.tensors;
  });
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("roi_mean", TORCH_BOX(&mrcnn::roi_mean_cpu));
  m.impl("roi_mean_backward", TORCH_BOX(&mrcnn::roi_mean_backward_cpu));
}
