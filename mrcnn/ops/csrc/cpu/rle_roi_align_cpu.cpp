// RoIAlign of run-length masks on the CPU.
//
// With the weights of sampling.h, S[p] of a column x is the sum of Wy[p, y] over the column's mask pixels. A run of
// ones adds the difference of two prefix sums of Wy, so a column costs its runs, not its pixels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "../sampling.h"
#include "taps.h"

namespace mrcnn {
namespace {

// The runs of one mask over an image of `height` rows, column by column.
struct Runs {
  const int32_t* begin;
  const int32_t* end;
  int64_t height;
};

// One axis of one RoI.
struct AxisTaps {
  Taps<float> all;
  const RoiTaps& roi;
  const int32_t* index;
  const float* weight;

  AxisTaps(int64_t bins, const Axis<float>& axis)
      : all(only(bins, axis)), roi(all.rois[0]), index(all.index(roi)), weight(all.weight(roi)) {}
  AxisTaps(const AxisTaps&) = delete;

 private:
  static Taps<float> only(int64_t bins, const Axis<float>& axis) {
    Taps<float> taps(bins);
    taps.add_roi(axis);
    return taps;
  }
};

// cumulative[y * bins + p] = sum of Wy[p, y'] over y' < y, both counted from the RoI's low. In double: a run takes
// differences of it.
std::vector<double> prefix_sums(const AxisTaps& rows) {
  const int64_t bins = rows.all.bins, taps = rows.roi.taps;
  std::vector<double> cumulative((rows.roi.count + 1) * bins);
  for (int64_t i = 0; i < bins * taps; ++i) {
    cumulative[(rows.index[i] + 1) * bins + i / taps] += rows.weight[i];
  }
  for (int64_t i = bins; i < static_cast<int64_t>(cumulative.size()); ++i) {
    cumulative[i] += cumulative[i - bins];
  }
  return cumulative;
}

// Adds column x of the mask to sums[p]. `run` is where the search starts and comes back as where it ended, so that
// columns asked for from left to right search on from each other.
void add_column(
    const Runs& runs, int64_t x, int64_t low, int64_t high, const std::vector<double>& cumulative, int64_t bins,
    const int32_t*& run, double* sums) {
  const int64_t top = x * runs.height + low, bottom = x * runs.height + high;
  run = std::upper_bound(run, runs.end, top);
  int64_t from = top;
  for (const int32_t* at = run; from < bottom && at != runs.end; ++at) {
    const int64_t to = std::min<int64_t>(*at, bottom);
    if ((at - runs.begin) % 2 == 1) {
      const double* first = &cumulative[(from - top) * bins];
      const double* last = &cumulative[(to - top) * bins];
      for (int64_t p = 0; p < bins; ++p) {
        sums[p] += last[p] - first[p];
      }
    }
    from = to;
  }
}

// sums[x * bins + p] = S[p] of every column that some bin samples, x counted from the RoI's low.
std::vector<double> column_sums(const Runs& runs, const AxisTaps& rows, const AxisTaps& columns) {
  const int64_t bins = rows.all.bins, low = rows.roi.low;
  std::vector<bool> sampled(columns.roi.count);
  for (int64_t i = 0; i < bins * columns.roi.taps; ++i) {
    sampled[columns.index[i]] = true;
  }
  const std::vector<double> cumulative = prefix_sums(rows);
  std::vector<double> sums(sampled.size() * bins);
  const int32_t* run = runs.begin;
  for (int64_t x = 0; x < columns.roi.count; ++x) {
    if (sampled[x]) {
      add_column(runs, columns.roi.low + x, low, low + rows.roi.count, cumulative, bins, run, &sums[x * bins]);
    }
  }
  return sums;
}

void pool(const Runs& runs, const AxisTaps& rows, const AxisTaps& columns, float* output) {
  const int64_t bins = rows.all.bins, taps = columns.roi.taps;
  const std::vector<double> sums = column_sums(runs, rows, columns);
  std::vector<double> cell(bins);
  for (int64_t q = 0; q < bins; ++q) {
    std::fill(cell.begin(), cell.end(), 0.0);
    for (int64_t k = q * taps; k < (q + 1) * taps; ++k) {
      const double* column = &sums[columns.index[k] * bins];
      for (int64_t p = 0; p < bins; ++p) {
        cell[p] += columns.weight[k] * column[p];
      }
    }
    for (int64_t p = 0; p < bins; ++p) {
      output[p * bins + q] = static_cast<float>(cell[p]);
    }
  }
}

// Every RoI's instance exists and its runs fill its image: after this no index can leave its tensor.
void check_values(
    const int64_t* offsets, int64_t masks, const int32_t* ends, int64_t total, const int64_t* instances,
    const int64_t* sizes, int64_t rois) {
  for (int64_t r = 0; r < rois; ++r) {
    const int64_t i = instances[r], area = sizes[2 * r] * sizes[2 * r + 1];
    check(i >= 0 && i < masks, "rle_roi_align: instances[", r, "] is ", i, " but there are ", masks, " masks");
    check(offsets[i] >= 0 && offsets[i] <= offsets[i + 1] && offsets[i + 1] <= total,
          "rle_roi_align: offsets of mask ", i, " do not lie in its ", total, " runs");
    check(sizes[2 * r] >= 0 && sizes[2 * r + 1] >= 0, "rle_roi_align: sizes[", r, "] is negative");
    check(offsets[i] == offsets[i + 1] || ends[offsets[i + 1] - 1] == area, "rle_roi_align: the runs of mask ", i,
          " do not fill the ", sizes[2 * r], "x", sizes[2 * r + 1], " pixels of sizes[", r, "]");
  }
}

Tensor rle_roi_align_cpu(
    Tensor ends,
    Tensor offsets,
    Tensor rois,
    Tensor instances,
    Tensor sizes,
    int64_t output_size,
    int64_t sampling_ratio,
    bool aligned) {
  check_rle_roi_align_inputs(ends, offsets, rois, instances, sizes, output_size);
  for (Tensor* tensor : {&ends, &offsets, &rois, &instances, &sizes}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  const auto* end = static_cast<const int32_t*>(ends.data_ptr());
  const auto* offset = static_cast<const int64_t*>(offsets.data_ptr());
  const auto* instance = static_cast<const int64_t*>(instances.data_ptr());
  const auto* size = static_cast<const int64_t*>(sizes.data_ptr());
  const auto* roi = static_cast<const float*>(rois.data_ptr());
  check_values(offset, offsets.size(0) - 1, end, ends.size(0), instance, size, rois.size(0));

  const Sampling sampling = align_sampling(aligned, sampling_ratio);
  Tensor output = torch::stable::new_zeros(rois, {rois.size(0), output_size, output_size});
  auto* out = static_cast<float*>(output.data_ptr());
  torch::stable::parallel_for(0, rois.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* box = roi + 4 * r;
      const Runs runs{end + offset[instance[r]], end + offset[instance[r] + 1], size[2 * r]};
      if (runs.begin == runs.end) {
        continue;
      }
      const AxisTaps rows(
          output_size, make_axis(box[1], box[3], 1.0f, output_size, sampling, size[2 * r]));
      const AxisTaps columns(
          output_size, make_axis(box[0], box[2], 1.0f, output_size, sampling, size[2 * r + 1]));
      if (rows.roi.count > 0 && columns.roi.count > 0) {
        pool(runs, rows, columns, out + r * output_size * output_size);
      }
    }
  });
  return output;
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("rle_roi_align", TORCH_BOX(&mrcnn::rle_roi_align_cpu));
}
