// Tensors of any leading sizes, seen as the rows that kernels compute on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace mote {

// [..., C] -> [T, C] with unit stride along C; a view where the strides allow it.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 2 && tensor.stride(1) == 1) return tensor;
  const at::Tensor rows = tensor.reshape({tensor.numel() / tensor.size(-1), tensor.size(-1)});
  return rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Uninitialised, with the leading sizes, dtype and device of x.
inline at::Tensor empty_like_tokens(const at::Tensor& x, int64_t num_columns) {
  at::DimVector sizes(x.sizes());
  sizes.back() = num_columns;
  return at::empty(sizes, x.options());
}

}  // namespace mote
