// RoI operators that take maxima, on the CPU: RoIPool, and RoIAlign and RoIWarp with their samples' maximum.
//
// RoIPool takes the maximum over a bin's rows first (vectorised along x), then over columns. The others interpolate a
// row of samples vertically (vectorised along x), then horizontally. All remember which sample it was, counted row by
// row within the bin, and give their gradient to that one alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../check.h"
#include "plan.h"
#include "samples.h"
#include "simd.h"

namespace mrcnn {
namespace {

template <typename T>
struct MaxPlan : Plan<T, Samples> {
  std::vector<Lanes<T>> lanes;  // of each RoI's columns

  MaxPlan(
      const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
      const std::vector<double>& scales, const Pooling& pooling)
      : Plan<T, Samples>(features, rois, levels, scales, pooling) {
    lanes.reserve(pooling.rois);
    for (const RoiSamples& roi : this->columns.rois) {
      lanes.emplace_back(this->columns, roi, kLanes);
    }
  }
};

// Room for one row of a RoI's window with a zero beyond its end, and for the maxima of one row of bins.
template <typename T>
struct Scratch {
  std::vector<T> strip;
  std::vector<int32_t> row;  // RoIPool: where in the bin a column has its maximum
  std::vector<T> best;
  std::vector<int32_t> best_row, best_sample;

  explicit Scratch(const MaxPlan<T>& plan)
      : strip(plan.widest + 1),
        row(plan.widest + 1),
        best(plan.columns.bins + kLanes),
        best_row(best.size()),
        best_sample(best.size()) {}
};

// One RoI in one plane; corner is where its window begins.
template <typename T>
struct RoiPlane {
  const Samples<T>& rows;
  const RoiSamples& row;
  const Lanes<T>& lanes;
  const T* corner;
  int64_t width;    // of the map
  int64_t columns;  // of the window
};

// strip[x] = the maximum over `count` feature rows at x, row[x] = the first that has it.
template <typename T>
MRCNN_INLINE void max_of_rows(
    T* __restrict strip, int32_t* __restrict row, const T* rows, int64_t width, int64_t columns, int64_t count) {
  std::copy(rows, rows + columns, strip);
  std::fill(row, row + columns, 0);
  for (int64_t i = 1; i < count; ++i) {
    const T* __restrict at = rows + i * width;
    for (int64_t x = 0; x < columns; ++x) {
      const bool more = exceeds(at[x], strip[x]);
      strip[x] = more ? at[x] : strip[x];
      row[x] = more ? static_cast<int32_t>(i) : row[x];
    }
  }
}

// The maximum of each bin over the strip's columns. Of equal values the one in the upper row is the first.
template <typename T>
MRCNN_INLINE void max_of_columns(
    const Lanes<T>& lanes, const T* __restrict strip, const int32_t* __restrict row, T* __restrict best,
    int32_t* __restrict best_row, int32_t* __restrict best_sample) {
  const int32_t* __restrict at = lanes.low.data();
  for (int64_t q = 0; q < lanes.count; ++q) {
    best[q] = strip[at[q]];
    best_row[q] = row[at[q]];
    best_sample[q] = 0;
  }
  for (int64_t k = 1; k < lanes.samples; ++k) {
    at += lanes.count;
    for (int64_t q = 0; q < lanes.count; ++q) {
      const T value = strip[at[q]];
      const int32_t from = row[at[q]];
      const bool more = exceeds(value, best[q]) | ((value == best[q]) & (from < best_row[q]));
      best[q] = more ? value : best[q];
      best_row[q] = more ? from : best_row[q];
      best_sample[q] = more ? static_cast<int32_t>(k) : best_sample[q];
    }
  }
}

// Writes the maxima found for a row of bins.
template <typename T>
MRCNN_INLINE void store(const Lanes<T>& lanes, const Scratch<T>& found, int64_t bins, T* output, int32_t* argmax) {
  for (int64_t q = 0; q < bins; ++q) {
    const bool any = lanes.in_bin[q] > 0;
    output[q] = any ? found.best[q] : T(0);
    argmax[q] = any ? found.best_row[q] * lanes.in_bin[q] + found.best_sample[q] : -1;
  }
}

// RoIPool's bins of row p.
template <typename T>
MRCNN_INLINE void pool_pixels(const RoiPlane<T>& roi, const BinSamples<T>& rows, Scratch<T>& scratch) {
  T* strip = scratch.strip.data();
  const T* top = roi.corner + rows.sample[0].low * roi.width;
  max_of_rows(strip, scratch.row.data(), top, roi.width, roi.columns, rows.count);
  max_of_columns(
      roi.lanes, strip, scratch.row.data(), scratch.best.data(), scratch.best_row.data(), scratch.best_sample.data());
}

// strip = the feature rows interpolated at one sample; zeros where it is off the map.
template <typename T>
MRCNN_INLINE void interpolate_rows(const RoiPlane<T>& roi, const WindowSample<T>& sample, T* __restrict strip) {
  strip[roi.columns] = T(0);
  if (sample.low == roi.row.count) {
    std::fill(strip, strip + roi.columns, T(0));
    return;
  }
  const T *low = roi.corner + sample.low * roi.width, *high = roi.corner + sample.high * roi.width;
  for (int64_t x = 0; x < roi.columns; ++x) {
    strip[x] = sample.low_weight * low[x] + sample.high_weight * high[x];
  }
}

// Goes on with the maximum of each bin over sample row i; row 0 starts it.
template <typename T>
MRCNN_INLINE void max_of_samples(
    const Lanes<T>& lanes, int32_t i, const T* __restrict strip, T* __restrict best, int32_t* __restrict best_row,
    int32_t* __restrict best_sample) {
  const int64_t count = lanes.count;
  const int32_t* __restrict low = lanes.low.data();
  const int32_t* __restrict high = lanes.high.data();
  const T* __restrict low_weight = lanes.low_weight.data();
  const T* __restrict high_weight = lanes.high_weight.data();
  if (i == 0) {
    std::fill(best, best + count, -std::numeric_limits<T>::infinity());
    std::fill(best_row, best_row + count, 0);
    std::fill(best_sample, best_sample + count, 0);
  }
  for (int32_t k = 0; k < lanes.samples; ++k) {
    for (int64_t q = 0; q < count; ++q) {
      const T value = low_weight[q] * strip[low[q]] + high_weight[q] * strip[high[q]];
      const bool more = exceeds(value, best[q]);
      best[q] = more ? value : best[q];
      best_row[q] = more ? i : best_row[q];
      best_sample[q] = more ? k : best_sample[q];
    }
    low += count;
    high += count;
    low_weight += count;
    high_weight += count;
  }
}

// The bins of one row of the others.
template <typename T>
MRCNN_INLINE void pool_samples(const RoiPlane<T>& roi, const BinSamples<T>& rows, Scratch<T>& scratch) {
  for (int64_t i = 0; i < rows.count; ++i) {
    interpolate_rows(roi, rows.sample[i], scratch.strip.data());
    max_of_samples(
        roi.lanes, static_cast<int32_t>(i), scratch.strip.data(), scratch.best.data(), scratch.best_row.data(),
        scratch.best_sample.data());
  }
}

template <typename T>
MRCNN_INLINE void pool(
    const MaxPlan<T>& plan, bool pixels, int64_t r, const T* plane, int64_t width, Scratch<T>& scratch, T* output,
    int32_t* argmax) {
  const RoiSamples&row = plan.rows.rois[r], &column = plan.columns.rois[r];
  const RoiPlane<T> roi{
      plan.rows, row, plan.lanes[r], plane + row.low * width + column.low, width, column.count};
  for (int64_t p = 0; p < plan.rows.bins; ++p, output += plan.columns.bins, argmax += plan.columns.bins) {
    const BinSamples<T> rows = plan.rows.bin(row, p);
    if (rows.count == 0 || row.count == 0 || column.count == 0) {
      std::fill(output, output + plan.columns.bins, T(0));
      std::fill(argmax, argmax + plan.columns.bins, -1);
      continue;
    }
    if (pixels) {
      pool_pixels(roi, rows, scratch);
    } else {
      pool_samples(roi, rows, scratch);
    }
    store(roi.lanes, scratch, plan.columns.bins, output, argmax);
  }
}

// Gives a bin's gradient to the pixels of the sample that was its maximum.
template <typename T>
MRCNN_INLINE void unpool_sample(
    const WindowSample<T>& y, const WindowSample<T>& x, bool pixels, T grad, T* corner, int64_t width) {
  T *low = corner + y.low * width, *high = corner + y.high * width;
  if (pixels) {
    low[x.low] += grad;
    return;
  }
  low[x.low] += y.low_weight * x.low_weight * grad;
  low[x.high] += y.low_weight * x.high_weight * grad;
  high[x.low] += y.high_weight * x.low_weight * grad;
  high[x.high] += y.high_weight * x.high_weight * grad;
}

template <typename T>
void unpool(
    const MaxPlan<T>& plan, bool pixels, int64_t r, const T* grad, const int32_t* argmax, T* plane, int64_t width) {
  const RoiSamples&row = plan.rows.rois[r], &column = plan.columns.rois[r];
  T* corner = plane + row.low * width + column.low;
  for (int64_t p = 0; p < plan.rows.bins; ++p) {
    const BinSamples<T> rows = plan.rows.bin(row, p);
    for (int64_t q = 0; q < plan.columns.bins; ++q, ++grad, ++argmax) {
      const BinSamples<T> columns = plan.columns.bin(column, q);
      const uint32_t which = static_cast<uint32_t>(*argmax), count = static_cast<uint32_t>(columns.count);
      if (*argmax < 0 || count == 0 || which / count >= static_cast<uint64_t>(rows.count)) {
        continue;
      }
      const WindowSample<T>&y = rows.sample[which / count], &x = columns.sample[which % count];
      if (y.low < row.count && x.low < column.count) {  // on the map
        unpool_sample(y, x, pixels, *grad, corner, width);
      }
    }
  }
}

template <typename T>
MRCNN_INLINE void forward_planes(
    const MaxPlan<T>& plan, bool pixels, const T* const* features, T* output, int32_t* argmax, int64_t begin,
    int64_t end) {
  Scratch<T> scratch(plan);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / plan.channels, channel = at % plan.channels;
    for (size_t l = 0; l < plan.levels; ++l) {
      const T* plane = features[l] + at * plan.heights[l] * plan.widths[l];
      for (const int64_t r : plan.readers[image * plan.levels + l]) {
        const int64_t offset = (r * plan.channels + channel) * plan.bins;
        pool(plan, pixels, r, plane, plan.widths[l], scratch, output + offset, argmax + offset);
      }
    }
  }
}

template <typename T>
MRCNN_AVX2 void forward_avx2(
    const MaxPlan<T>& plan, bool pixels, const T* const* features, T* output, int32_t* argmax, int64_t begin,
    int64_t end) {
  forward_planes(plan, pixels, features, output, argmax, begin, end);
}

template <typename T>
void forward_baseline(
    const MaxPlan<T>& plan, bool pixels, const T* const* features, T* output, int32_t* argmax, int64_t begin,
    int64_t end) {
  forward_planes(plan, pixels, features, output, argmax, begin, end);
}

template <typename T>
void backward_planes(
    const MaxPlan<T>& plan, bool is_pool, const T* grad, const int32_t* argmax, T* const* features, int64_t begin,
    int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / plan.channels, channel = at % plan.channels;
    for (size_t l = 0; l < plan.levels; ++l) {
      const int64_t pixels = plan.heights[l] * plan.widths[l];
      T* plane = features[l] + at * pixels;
      std::fill(plane, plane + pixels, T(0));
      for (const int64_t r : plan.readers[image * plan.levels + l]) {
        const int64_t offset = (r * plan.channels + channel) * plan.bins;
        unpool(plan, is_pool, r, grad + offset, argmax + offset, plane, plan.widths[l]);
      }
    }
  }
}

std::tuple<Tensor, Tensor> roi_max_cpu(
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
  const std::vector<int64_t> shape{pooling.rois, features[0].size(1), output_height, output_width};
  Tensor output = torch::stable::new_empty(features[0], shape);
  Tensor argmax = torch::stable::new_empty(features[0], shape, ScalarType::Int);
  with_cpu_dtype(features[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const MaxPlan<T> plan(features, rois, levels, spatial_scales, pooling);
    const Maps<T> maps(features);
    T* out = static_cast<T*>(output.data_ptr());
    int32_t* which = static_cast<int32_t*>(argmax.data_ptr());
    const auto run = has_avx2() ? forward_avx2<T> : forward_baseline<T>;
    parallel_planes(plan, pooling.rois, [&](int64_t begin, int64_t end) {
      run(plan, pooling.sampling.rule == Rule::kPool, maps.data.data(), out, which, begin, end);
    });
  });
  return {output, argmax};
}

std::vector<Tensor> roi_max_backward_cpu(
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
  grad = torch::stable::contiguous(grad);
  argmax = torch::stable::contiguous(argmax);
  return with_cpu_dtype(features[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const MaxPlan<T> plan(features, rois, levels, spatial_scales, pooling);
    const GradMaps<T> grads(features);
    const T* in = static_cast<const T*>(grad.data_ptr());
    const int32_t* which = static_cast<const int32_t*>(argmax.data_ptr());
    parallel_planes(plan, pooling.rois, [&](int64_t begin, int64_t end) {
      backward_planes(plan, pooling.sampling.rule == Rule::kPool, in, which, grads.data.data(), begin, end);
    });
    return grads.tensors;
  });
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("roi_max", TORCH_BOX(&mrcnn::roi_max_cpu));
  m.impl("roi_max_backward", TORCH_BOX(&mrcnn::roi_max_backward_cpu));
}
