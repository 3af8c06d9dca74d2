// Argument checks of the kernels. The Python face names the remedy; these keep a direct torch.ops call safe.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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

inline void check_roi_align_inputs(
    const std::vector<Tensor>& features,
    const Tensor& rois,
    const Tensor& levels,
    const std::vector<double>& spatial_scales,
    int64_t output_height,
    int64_t output_width) {
  check(!features.empty() && features.size() <= kMaxLevels, "roi_align: takes 1 to ", kMaxLevels,
        " feature levels, got ", features.size());
  check(spatial_scales.size() == features.size(), "roi_align: ", features.size(), " feature levels but ",
        spatial_scales.size(), " spatial_scales");
  const Tensor& first = features.front();
  for (const Tensor& level : features) {
    check(level.dim() == 4 && level.size(0) == first.size(0) && level.size(1) == first.size(1),
          "roi_align: features must be (B, C, H, W), the same B and C in every level");
    check(level.scalar_type() == first.scalar_type() && level.device() == first.device(),
          "roi_align: features must be of one dtype on one device");
  }
  check(rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be (R, 5)");
  check(rois.scalar_type() == coordinate_type(first.scalar_type()),
        "roi_align: rois must be float32 (float64 with float64 features)");
  check(same_shape(levels, {rois.size(0)}) && levels.scalar_type() == ScalarType::Long,
        "roi_align: levels must be (R,) int64");
  check(rois.device() == first.device() && levels.device() == first.device(),
        "roi_align: features, rois and levels must be on one device");
  check(output_height > 0 && output_width > 0, "roi_align: output must be at least 1x1, got ", output_height, "x",
        output_width);
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

}  // namespace mrcnn
