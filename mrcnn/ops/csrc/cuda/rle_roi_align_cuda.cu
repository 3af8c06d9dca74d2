// RoIAlign of run-length masks with CUDA: a thread for each output cell, which walks down the two mask columns of
// each of its sampled columns. A column costs one binary search; its samples come in order of y, so the runs after
// that are only stepped through.
//
// An instance or a run out of range reads as empty: checking them on the host would wait for the GPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../sampling.h"
#include "launch.h"

namespace mrcnn {
namespace {

struct Masks {
  const int32_t* ends;
  const int64_t* offsets;
  int64_t total;
  int64_t instances;
};

// A position in one mask's runs that moves forward, and back by a new search.
struct Cursor {
  const int32_t* ends;  // of this mask
  int64_t count;
  int64_t run;    // the first run that ends after `from`
  int64_t from;

  __device__ void seek(int64_t pixel) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] > pixel) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    run = low;
    from = pixel;
  }

  // 1 inside the mask, 0 outside.
  __device__ float read(int64_t pixel) {
    if (pixel < from) {  // of a reversed RoI
      seek(pixel);
    }
    while (run < count && ends[run] <= pixel) {
      ++run;
    }
    from = pixel;
    return run < count && run % 2 == 1 ? 1.0f : 0.0f;
  }
};

__device__ Cursor cursor_of(const Masks& masks, int64_t instance) {
  if (instance < 0 || instance >= masks.instances) {
    return {masks.ends, 0, 0, 0};
  }
  const int64_t begin = masks.offsets[instance], end = masks.offsets[instance + 1];
  const bool valid = begin >= 0 && begin <= end && end <= masks.total;
  return {masks.ends + (valid ? begin : 0), valid ? end - begin : 0, 0, 0};
}

// The sum over bin p's samples of mask column x, interpolated along y.
__device__ float column_sum(Cursor& cursor, const Axis<float>& rows, int64_t p, int64_t x) {
  int64_t first, last;
  sample_range(rows, p, first, last);
  Sample<float> sample;
  float sum = 0.0f;
  bool sought = false;
  for (int64_t i = first; i < last; ++i) {
    if (!sample_at(rows, p, i, sample)) {
      continue;
    }
    const int64_t low = x * rows.size + sample.low, high = x * rows.size + sample.high;
    if (!sought) {
      cursor.seek(low);
      sought = true;
    }
    sum += sample.low_weight * cursor.read(low);
    // Reading `high` here would move the cursor past the next sample's `low`.
    Cursor ahead = cursor;
    sum += sample.high_weight * ahead.read(high);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) kernel(
    Masks masks, const float* rois, const int64_t* instances, const int64_t* sizes, int64_t count, int64_t bins,
    Sampling sampling, float* output) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
    const int64_t q = at % bins, p = at / bins % bins, r = at / (bins * bins);
    const float* roi = rois + 4 * r;
    Cursor cursor = cursor_of(masks, instances[r]);
    const Axis<float> rows = make_axis(roi[1], roi[3], 1.0f, bins, sampling, sizes[2 * r]);
    const Axis<float> columns = make_axis(roi[0], roi[2], 1.0f, bins, sampling, sizes[2 * r + 1]);
    int64_t first, last;
    sample_range(columns, q, first, last);
    float sum = 0.0f;
    Sample<float> sample;
    for (int64_t j = first; cursor.count > 0 && j < last; ++j) {
      if (sample_at(columns, q, j, sample)) {
        sum += sample.low_weight * column_sum(cursor, rows, p, sample.low);
        sum += sample.high_weight * column_sum(cursor, rows, p, sample.high);
      }
    }
    const float samples = static_cast<float>(rows.grid) * static_cast<float>(columns.grid);
    output[at] = samples > 0.0f ? sum / samples : 0.0f;
  }
}

Tensor rle_roi_align_cuda(
    Tensor ends,
    Tensor offsets,
    Tensor rois,
    Tensor instances,
    Tensor sizes,
    int64_t output_size,
    int64_t sampling_ratio,
    bool aligned) {
  check_rle_roi_align_inputs(ends, offsets, rois, instances, sizes, output_size);
  const torch::stable::accelerator::DeviceGuard guard(rois.get_device_index());
  for (Tensor* tensor : {&ends, &offsets, &rois, &instances, &sizes}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  Tensor output = torch::stable::new_empty(rois, {rois.size(0), output_size, output_size});
  if (output.numel() == 0) {
    return output;
  }
  const Masks masks{static_cast<const int32_t*>(ends.data_ptr()), static_cast<const int64_t*>(offsets.data_ptr()),
                    ends.size(0), offsets.size(0) - 1};
  kernel<<<blocks_for(output.numel()), kThreads, 0, current_stream(rois)>>>(
      masks, static_cast<const float*>(rois.data_ptr()), static_cast<const int64_t*>(instances.data_ptr()),
      static_cast<const int64_t*>(sizes.data_ptr()), output.numel(), output_size,
      align_sampling(aligned, sampling_ratio), static_cast<float*>(output.data_ptr()));
  check_launch("rle_roi_align");
  return output;
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CUDA, m) {
  m.impl("rle_roi_align", TORCH_BOX(&mrcnn::rle_roi_align_cuda));
}
