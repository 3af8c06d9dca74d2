// What the planes of all feature levels share when RoIs are pooled on the CPU.
//
// The work is split over the planes (image, channel) of the feature maps. A plane of the finest level fits the L2
// cache, all RoIs of an image read it one after another, and the backward pass has one writer for each plane, so it
// needs no atomics and gives the same bits in every run, whatever the number of threads.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "../sampling.h"

namespace mrcnn {

constexpr int64_t kLanes = 8;  // floats of a vector

// Table: what is known of all RoIs along one axis, Taps or Samples.
template <typename T, template <typename> class Table>
struct Plan {
  int64_t images, channels;
  size_t levels;
  int64_t bins;  // of a RoI
  std::vector<int64_t> heights, widths;
  Table<T> rows, columns;
  std::vector<std::vector<int32_t>> readers;  // [b * levels + l]: the RoIs that read image b at level l
  int64_t widest = 0;                         // columns of the widest RoI

  Plan(
      const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
      const std::vector<double>& scales, const Pooling& pooling)
      : images(features[0].size(0)),
        channels(features[0].size(1)),
        levels(features.size()),
        bins(pooling.height * pooling.width),
        rows(pooling.height),
        columns(pooling.width, kLanes),
        readers(static_cast<size_t>(images) * features.size()) {
    for (const Tensor& level : features) {
      heights.push_back(level.size(2));
      widths.push_back(level.size(3));
    }
    add_rois(rois, levels, scales, pooling);
  }

 private:
  void add_rois(
      const Tensor& rois, const Tensor& roi_levels, const std::vector<double>& scales, const Pooling& pooling) {
    const Tensor boxes = torch::stable::contiguous(rois);
    const Tensor level_of = torch::stable::contiguous(roi_levels);
    const T* roi = static_cast<const T*>(boxes.data_ptr());
    const int64_t* level = static_cast<const int64_t*>(level_of.data_ptr());
    for (int64_t r = 0; r < pooling.rois; ++r, roi += 5, ++level) {
      check_roi(r, static_cast<double>(roi[0]), images, *level, levels);
      const T scale = static_cast<T>(scales[*level]);
      rows.add_roi(make_axis(roi[2], roi[4], scale, pooling.height, pooling.sampling, heights[*level]));
      columns.add_roi(make_axis(roi[1], roi[3], scale, pooling.width, pooling.sampling, widths[*level]));
      widest = std::max(widest, columns.rois.back().count);
      readers[static_cast<size_t>(roi[0]) * levels + *level].push_back(static_cast<int32_t>(r));
    }
  }
};

// At least this many planes for a thread: 8192 output elements.
template <typename Plan>
int64_t grain(const Plan& plan, int64_t rois) {
  const int64_t per_plane = std::max<int64_t>(1, rois / std::max<int64_t>(1, plan.images) * plan.bins);
  return std::max<int64_t>(1, 8192 / per_plane);
}

// Calls run(begin, end) for parts of all planes, plane = image * channels + channel.
template <typename Plan, typename Run>
void parallel_planes(const Plan& plan, int64_t rois, const Run& run) {
  torch::stable::parallel_for(0, plan.images * plan.channels, grain(plan, rois), run);
}

// Contiguous feature maps and where they are.
template <typename T>
struct Maps {
  std::vector<Tensor> tensors;
  std::vector<const T*> data;

  explicit Maps(const std::vector<Tensor>& features) {
    for (const Tensor& level : features) {
      tensors.push_back(torch::stable::contiguous(level));
      data.push_back(static_cast<const T*>(tensors.back().data_ptr()));
    }
  }
};

// Uninitialised gradients of feature maps and where they are.
template <typename T>
struct GradMaps {
  std::vector<Tensor> tensors;
  std::vector<T*> data;

  explicit GradMaps(const std::vector<Tensor>& features) {
    for (const Tensor& level : features) {
      tensors.push_back(torch::stable::new_empty(level, level.sizes()));
      data.push_back(static_cast<T*>(tensors.back().data_ptr()));
    }
  }
};

// Calls f(zero), zero of the features' type.
template <typename F>
auto with_cpu_dtype(ScalarType dtype, const F& f) {
  check(dtype == ScalarType::Float || dtype == ScalarType::Double,
        "roi pooling: CPU features must be float32 or float64");
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace mrcnn
