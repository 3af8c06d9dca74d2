// Schemas of the mrcnn operators. Kernels are registered beside their code, under cpu/ and cuda/.

#include <torch/csrc/stable/library.h>

namespace {

#ifndef MRCNN_CUDA_VERSION
#define MRCNN_CUDA_VERSION 0
#endif

// Version of the CUDA toolkit that compiled this library, as CUDART_VERSION writes it (13000), 0 for none.
int64_t cuda_version() {
  return MRCNN_CUDA_VERSION;
}

}  // namespace

STABLE_TORCH_LIBRARY(mrcnn, m) {
  m.def("cuda_version() -> int");
  // rule: enum Rule of sampling.h. argmax counts the samples of a bin row by row; -1, or a sample off the map: nothing
  // receives this output's gradient.
  m.def(
      "roi_mean(Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales, int output_height, "
      "int output_width, int rule, int sampling_ratio) -> Tensor");
  m.def(
      "roi_mean_backward(Tensor grad, Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales, "
      "int rule, int sampling_ratio) -> Tensor[]");
  m.def(
      "roi_max(Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales, int output_height, "
      "int output_width, int rule, int sampling_ratio) -> (Tensor output, Tensor argmax)");
  m.def(
      "roi_max_backward(Tensor grad, Tensor argmax, Tensor[] features, Tensor rois, Tensor levels, "
      "float[] spatial_scales, int rule, int sampling_ratio) -> Tensor[]");
  m.def(
      "precise_roi_grad(Tensor grad, Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales) "
      "-> Tensor");
  m.def(
      "rle_roi_align(Tensor ends, Tensor offsets, Tensor rois, Tensor instances, Tensor sizes, int output_size, "
      "int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "resize_masks(Tensor ends, Tensor offsets, int height, int width, int new_height, int new_width) "
      "-> (Tensor ends, Tensor offsets)");
  m.def("rle_encode(Tensor ends, Tensor offsets) -> (Tensor text, Tensor offsets)");
  m.def("rle_decode(Tensor text, Tensor offsets) -> (Tensor ends, Tensor offsets)");
  // polygons: offsets of P polygons into the points; masks: offsets of I masks into the polygons.
  m.def(
      "draw_polygons(Tensor points, Tensor polygons, Tensor masks, int height, int width) "
      "-> (Tensor ends, Tensor offsets)");
  m.def("enlarge_image(Tensor image, Tensor(a!) out) -> ()");
  // boxes come sorted, best first, counts of them in each image; returns positions, -1 after the last.
  m.def("nms(Tensor boxes, Tensor groups, Tensor counts, float iou_threshold, int top_n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}
