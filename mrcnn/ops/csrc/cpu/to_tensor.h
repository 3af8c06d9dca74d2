// From what an operator has collected to the tensor that it returns.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../check.h"

namespace mrcnn {

// A 1-D tensor, on the device of `like`, of the dtype that goes with T.
template <typename T>
Tensor to_tensor(const std::vector<T>& values, const Tensor& like, ScalarType type) {
  Tensor made = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())}, type);
  std::copy(values.begin(), values.end(), static_cast<T*>(made.data_ptr()));
  return made;
}

}  // namespace mrcnn
