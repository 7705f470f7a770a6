// What an op does about gradients that its kernel would drop without a word.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace mote {

using TensorPointers = std::initializer_list<const at::Tensor*>;  // null where a tensor was not given

inline bool any_requires_grad(TensorPointers tensors) {
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->requires_grad()) return at::GradMode::is_enabled();
  }
  return false;
}

// Of forward-mode differentiation.
inline bool any_tangent(TensorPointers tensors) {
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->_fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

// For ops that serve and do not train; instead: torch's function that has gradients.
inline void refuse_gradients(const char* call, TensorPointers tensors, const char* instead) {
  TORCH_CHECK(!any_requires_grad(tensors), call, " has no gradient; call it under torch.no_grad(), or use ", instead);
  TORCH_CHECK(!any_tangent(tensors), call, " has no forward-mode gradient; use ", instead);
}

}  // namespace mote
