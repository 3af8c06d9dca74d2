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
  m.def(
      "roi_align(Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales, int output_height, "
      "int output_width, int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales, "
      "int sampling_ratio, bool aligned) -> Tensor[]");
  m.def(
      "rle_roi_align(Tensor ends, Tensor offsets, Tensor rois, Tensor instances, Tensor sizes, int output_size, "
      "int sampling_ratio, bool aligned) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}
