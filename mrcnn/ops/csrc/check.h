// Argument checks of the kernels. The Python face names the remedy; these keep a direct torch.ops call safe.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "sampling.h"

namespace mrcnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kMaxLevels = 8;  // of a feature pyramid; bounds what is passed to a CUDA kernel by value

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline bool same_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  return same;
}

// The dtype of RoIs and of sums that goes with features of a dtype.
inline ScalarType coordinate_type(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What a call asks of every RoI.
struct Pooling {
  int64_t rois;
  int64_t height;  // of the output
  int64_t width;
  Sampling sampling;
};

inline void check_pyramid(const std::vector<Tensor>& features, const std::vector<double>& spatial_scales) {
  check(!features.empty() && features.size() <= kMaxLevels, "roi pooling: takes 1 to ", kMaxLevels,
        " feature levels, got ", features.size());
  check(spatial_scales.size() == features.size(), "roi pooling: ", features.size(), " feature levels but ",
        spatial_scales.size(), " spatial_scales");
  const Tensor& first = features.front();
  for (const Tensor& level : features) {
    check(level.dim() == 4 && level.size(0) == first.size(0) && level.size(1) == first.size(1),
          "roi pooling: features must be (B, C, H, W), the same B and C in every level");
    check(level.scalar_type() == first.scalar_type() && level.device() == first.device(),
          "roi pooling: features must be of one dtype on one device");
  }
}

// The call that the arguments of an operator describe.
inline Pooling check_pooling(
    const std::vector<Tensor>& features,
    const Tensor& rois,
    const Tensor& levels,
    const std::vector<double>& spatial_scales,
    int64_t output_height,
    int64_t output_width,
    int64_t rule,
    int64_t sampling_ratio) {
  check_pyramid(features, spatial_scales);
  const Tensor& first = features.front();
  check(rois.dim() == 2 && rois.size(1) == 5, "roi pooling: rois must be (R, 5)");
  check(rois.scalar_type() == coordinate_type(first.scalar_type()),
        "roi pooling: rois must be float32 (float64 with float64 features)");
  check(same_shape(levels, {rois.size(0)}) && levels.scalar_type() == ScalarType::Long,
        "roi pooling: levels must be (R,) int64");
  check(rois.device() == first.device() && levels.device() == first.device(),
        "roi pooling: features, rois and levels must be on one device");
  check(output_height > 0 && output_width > 0, "roi pooling: output must be at least 1x1, got ", output_height, "x",
        output_width);
  check(rule >= 0 && rule < kRules, "roi pooling: there is no rule ", rule);
  return {rois.size(0), output_height, output_width, {static_cast<Rule>(rule), sampling_ratio}};
}

// The call whose output has the shape of `grad`.
inline Pooling check_pooling_backward(
    const Tensor& grad,
    const std::vector<Tensor>& features,
    const Tensor& rois,
    const Tensor& levels,
    const std::vector<double>& spatial_scales,
    int64_t rule,
    int64_t sampling_ratio) {
  check(grad.dim() == 4, "roi pooling: grad must be (R, C, output_height, output_width)");
  const Pooling pooling = check_pooling(
      features, rois, levels, spatial_scales, grad.size(2), grad.size(3), rule, sampling_ratio);
  check(grad.size(0) == rois.size(0) && grad.size(1) == features[0].size(1) &&
            grad.scalar_type() == features[0].scalar_type() && grad.device() == features[0].device(),
        "roi pooling: grad must have the forward output's shape, dtype and device");
  return pooling;
}

// Where it can be looked at without waiting for a GPU: RoI r reads an image and a level that exist.
inline void check_roi(int64_t r, double image, int64_t images, int64_t level, size_t levels) {
  check(image >= 0 && image < static_cast<double>(images), "roi pooling: rois[", r, "] has batch index ", image,
        " but there are ", images, " images");
  check(level >= 0 && level < static_cast<int64_t>(levels), "roi pooling: levels[", r, "] is ", level,
        " but there are ", levels, " levels");
}

// RoIPool is a maximum and precise pooling a mean; the others can be either.
inline void check_mean(const Pooling& pooling) {
  check(pooling.sampling.rule != Rule::kPool, "roi pooling: rule kPool has no mean");
}

// Which of a bin's samples is its maximum is counted in 32 bits.
inline void check_max(const Pooling& pooling, const std::vector<Tensor>& features) {
  check(pooling.sampling.rule != Rule::kPrecise, "roi pooling: rule kPrecise has no maximum");
  for (const Tensor& level : features) {
    const int64_t ratio = pooling.sampling.ratio;
    const int64_t rows = ratio > 0 ? ratio : 2 * level.size(2) + 16;  // see sample_range
    const int64_t columns = ratio > 0 ? ratio : 2 * level.size(3) + 16;
    check(rows <= INT32_MAX / columns, "roi pooling: too many samples in a bin: sampling_ratio ", ratio, " on a ",
          level.size(2), "x", level.size(3), " map");
  }
}

inline void check_argmax(const Tensor& argmax, const Tensor& grad) {
  check(same_shape(argmax, {grad.size(0), grad.size(1), grad.size(2), grad.size(3)}) &&
            argmax.scalar_type() == ScalarType::Int && argmax.device() == grad.device(),
        "roi pooling: argmax must have grad's shape and device, int32");
}

inline void check_rle_roi_align_inputs(
    const Tensor& ends,
    const Tensor& offsets,
    const Tensor& rois,
    const Tensor& instances,
    const Tensor& sizes,
    int64_t output_size) {
  check(ends.dim() == 1 && ends.scalar_type() == ScalarType::Int, "rle_roi_align: ends must be (T,) int32");
  check(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.scalar_type() == ScalarType::Long,
        "rle_roi_align: offsets must be (I + 1,) int64");
  check(rois.dim() == 2 && rois.size(1) == 4 && rois.scalar_type() == ScalarType::Float,
        "rle_roi_align: rois must be (R, 4) float32");
  check(same_shape(instances, {rois.size(0)}) && instances.scalar_type() == ScalarType::Long,
        "rle_roi_align: instances must be (R,) int64");
  check(same_shape(sizes, {rois.size(0), 2}) && sizes.scalar_type() == ScalarType::Long,
        "rle_roi_align: sizes must be (R, 2) int64");
  for (const Tensor* tensor : {&offsets, &rois, &instances, &sizes}) {
    check(tensor->device() == ends.device(), "rle_roi_align: all tensors must be on one device");
  }
  check(output_size > 0, "rle_roi_align: output_size must be at least 1, got ", output_size);
}

inline void check_nms_inputs(const Tensor& boxes, const Tensor& groups, const Tensor& counts, int64_t top_n) {
  check(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.scalar_type() == ScalarType::Float,
        "nms: boxes must be (B, P, 4) float32");
  check(same_shape(groups, {boxes.size(0), boxes.size(1)}) && groups.scalar_type() == ScalarType::Long,
        "nms: groups must be (B, P) int64");
  check(same_shape(counts, {boxes.size(0)}) && counts.scalar_type() == ScalarType::Long,
        "nms: counts must be (B,) int64");
  check(groups.device() == boxes.device() && counts.device() == boxes.device(),
        "nms: all tensors must be on one device");
  check(top_n >= 0, "nms: top_n must be at least 0, got ", top_n);
}

}  // namespace mrcnn
