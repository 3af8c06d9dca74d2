// The gradient of precise RoI pooling in the RoIs' coordinates, with CUDA: a block for each RoI sums over its outputs,
// every thread over some of them in order, then all threads in a tree: the same bits in every run.

#include <torch/csrc/stable/library.h>

#include "../precise.h"
#include "pyramid.h"

namespace mrcnn {
namespace {

template <typename T, typename Element>
__global__ void __launch_bounds__(kThreads) kernel(
    const Element* grad, Pyramid<const Element> features, const T* rois, const int64_t* levels, Pooling pooling,
    T* output) {
  __shared__ T sums[4][kThreads];
  const int64_t r = blockIdx.x, level = levels[r];
  const T* roi = rois + 5 * r;
  T x1 = T(0), y1 = T(0), x2 = T(0), y2 = T(0);
  const bool valid = in_range(roi[0], level, features);
  if (valid) {
    const RoiAxes<T> axes = roi_axes(roi, features, level, pooling);
    const int64_t count = axes.y.grid * axes.x.grid * features.channels * pooling.height * pooling.width;
    const int64_t image = static_cast<int64_t>(roi[0]) * features.channels;
    for (int64_t at = threadIdx.x; at < count; at += kThreads) {
      const Place place = place_of(at, features.channels, pooling);
      const int64_t p = place.p, q = place.q;
      const Element* plane = features.data[level] + (image + place.channel) * axes.y.size * axes.x.size;
      const BinGrad<T> bin = bin_grad(
          axes.y, axes.x, p, q, plane, [&](int64_t y) { return hat_weights(axes.y, p, y); },
          [&](int64_t x) { return hat_weights(axes.x, q, x); });
      const T g = static_cast<T>(grad[r * features.channels * pooling.height * pooling.width + at]);
      const RoiGrad<T> corners = corner_grad(bin, p, q, pooling.height, pooling.width);
      x1 += g * corners.x1;
      y1 += g * corners.y1;
      x2 += g * corners.x2;
      y2 += g * corners.y2;
    }
  }
  sums[0][threadIdx.x] = x1;
  sums[1][threadIdx.x] = y1;
  sums[2][threadIdx.x] = x2;
  sums[3][threadIdx.x] = y2;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < 4 * half; i += kThreads) {
      sums[i / half][i % half] += sums[i / half][i % half + half];
    }
  }
  __syncthreads();
  if (threadIdx.x < 5) {
    const T scale = valid ? static_cast<T>(features.scale[level]) : T(0);
    output[5 * r + threadIdx.x] = threadIdx.x == 0 ? T(0) : scale * sums[threadIdx.x - 1][0];
  }
}

Tensor precise_roi_grad_cuda(
    Tensor grad,
    std::vector<Tensor> features,
    Tensor rois,
    Tensor levels,
    std::vector<double> spatial_scales) {
  const Pooling pooling = check_pooling_backward(
      grad, features, rois, levels, spatial_scales, static_cast<int64_t>(Rule::kPrecise), 0);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  make_contiguous(features);
  for (Tensor* tensor : {&grad, &rois, &levels}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  Tensor output = torch::stable::new_zeros(rois, rois.sizes());
  if (grad.numel() == 0) {
    return output;
  }
  with_element(grad.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    using T = Coordinate<Element>;
    kernel<T, Element><<<static_cast<unsigned>(pooling.rois), kThreads, 0, current_stream(grad)>>>(
        static_cast<const Element*>(grad.data_ptr()), make_pyramid<const Element>(features, spatial_scales),
        static_cast<const T*>(rois.data_ptr()), static_cast<const int64_t*>(levels.data_ptr()), pooling,
        static_cast<T*>(output.data_ptr()));
  });
  check_launch("precise_roi_grad");
  return output;
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CUDA, m) {
  m.impl("precise_roi_grad", TORCH_BOX(&mrcnn::precise_roi_grad_cuda));
}
