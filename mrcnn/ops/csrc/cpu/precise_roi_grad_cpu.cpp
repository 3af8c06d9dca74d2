// The gradient of precise RoI pooling in the RoIs' coordinates, on the CPU: a RoI sums over its own outputs, so RoIs
// are split over the threads and the bits are the same in every run.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../check.h"
#include "../precise.h"
#include "plan.h"

namespace mrcnn {
namespace {

// hat_weights of all bins along one axis.
template <typename T>
class HatTable {
 public:
  const Axis<T> axis;

  HatTable(const Axis<T>& axis, int64_t bins) : axis(axis) {
    for (int64_t p = 0; p < bins; ++p) {
      int64_t first, last;
      hats_of_bin(axis, p, first, last);
      begins_.push_back(static_cast<int64_t>(weights_.size()) - first);
      for (int64_t pixel = first; pixel < last; ++pixel) {
        weights_.push_back(hat_weights(axis, p, pixel));
      }
    }
  }

  // Of bin p; indexed by pixels that its hats reach.
  auto bin(int64_t p) const {
    return [this, begin = begins_[p]](int64_t pixel) { return weights_[begin + pixel]; };
  }

 private:
  std::vector<HatWeights<T>> weights_;
  std::vector<int64_t> begins_;
};

template <typename T>
void roi_grad(
    const HatTable<T>& rows, const HatTable<T>& columns, const Pooling& pooling, const T* planes, int64_t channels,
    const T* grad, double scale, T* output) {
  double sums[4] = {0, 0, 0, 0};
  if (rows.axis.grid > 0 && columns.axis.grid > 0) {
    for (int64_t c = 0; c < channels; ++c, planes += rows.axis.size * columns.axis.size) {
      for (int64_t p = 0; p < pooling.height; ++p) {
        for (int64_t q = 0; q < pooling.width; ++q, ++grad) {
          const BinGrad<T> bin = bin_grad(rows.axis, columns.axis, p, q, planes, rows.bin(p), columns.bin(q));
          const RoiGrad<T> roi = corner_grad(bin, p, q, pooling.height, pooling.width);
          const double g = static_cast<double>(*grad);
          sums[0] += g * static_cast<double>(roi.x1);
          sums[1] += g * static_cast<double>(roi.y1);
          sums[2] += g * static_cast<double>(roi.x2);
          sums[3] += g * static_cast<double>(roi.y2);
        }
      }
    }
  }
  output[0] = T(0);
  for (int i = 0; i < 4; ++i) {
    output[i + 1] = static_cast<T>(scale * sums[i]);
  }
}

template <typename T>
Tensor roi_grads(
    const Tensor& grad, const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
    const std::vector<double>& scales, const Pooling& pooling) {
  Tensor output = torch::stable::new_empty(rois, rois.sizes());
  const Maps<T> maps(features);
  const int64_t images = features[0].size(0), channels = features[0].size(1);
  const T *in = static_cast<const T*>(grad.data_ptr()), *boxes = static_cast<const T*>(rois.data_ptr());
  const int64_t* level_of = static_cast<const int64_t*>(levels.data_ptr());
  T* out = static_cast<T*>(output.data_ptr());
  for (int64_t r = 0; r < pooling.rois; ++r) {
    check_roi(r, static_cast<double>(boxes[5 * r]), images, level_of[r], features.size());
  }
  torch::stable::parallel_for(0, pooling.rois, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* roi = boxes + 5 * r;
      const int64_t l = level_of[r], height = features[l].size(2), width = features[l].size(3);
      const T scale = static_cast<T>(scales[l]);
      const HatTable<T> rows(
          make_axis(roi[2], roi[4], scale, pooling.height, pooling.sampling, height), pooling.height);
      const HatTable<T> columns(
          make_axis(roi[1], roi[3], scale, pooling.width, pooling.sampling, width), pooling.width);
      roi_grad(rows, columns, pooling, maps.data[l] + static_cast<int64_t>(roi[0]) * channels * height * width,
               channels, in + r * channels * pooling.height * pooling.width, scales[l], out + 5 * r);
    }
  });
  return output;
}

Tensor precise_roi_grad_cpu(
    Tensor grad,
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales) {
  const Pooling pooling = check_pooling_backward(
      grad, features, rois, levels, spatial_scales, static_cast<int64_t>(Rule::kPrecise), 0);
  for (Tensor* tensor : {&grad, &rois, &levels}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  return with_cpu_dtype(features[0].scalar_type(), [&](auto zero) {
    return roi_grads<decltype(zero)>(grad, features, rois, levels, spatial_scales, pooling);
  });
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("precise_roi_grad", TORCH_BOX(&mrcnn::precise_roi_grad_cpu));
}
