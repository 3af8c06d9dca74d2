// Launching kernels on torch's current stream.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"

// Lives in libtorch_cuda. Weak, so that this library also loads with a CPU build of torch, where no kernel of this
// folder is ever called.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace mrcnn {

constexpr int kThreads = 256;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream != nullptr &&
            aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
        "mrcnn: torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

// Blocks for a grid-stride loop over `count` elements.
inline unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 65536 ? blocks : 65536);
}

}  // namespace mrcnn
