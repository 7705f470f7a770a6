// The op of torch for products of few rows on the CPU: checks, then csrc/linear. No gradient: it serves, it does not
// train.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "binding/checks.h"
#include "binding/gradients.h"
#include "binding/rows.h"
#include "linear/skinny.h"

namespace mote {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kCall = "skinny_linear";

void check_operands(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, kCall,
                   ": x must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 1 && weight.size(1) > 0 && x.size(-1) == weight.size(1), kCall,
                    ": x [..., K] and weight [N, K] with K >= 1 expected, got ", x.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), kCall,
                    ": bias must be [N] = ", weight.size(0), ", got ", bias->sizes());
  for (const auto& [name, tensor] : {std::pair("weight", &weight), std::pair("bias", bias ? &*bias : &weight)}) {
    TORCH_CHECK_VALUE(tensor->is_cpu() && x.is_cpu(), kCall, ": x and ", name, " must be on the CPU, got ", x.device(),
                      " and ", tensor->device());
    TORCH_CHECK_TYPE(tensor->scalar_type() == type, kCall, ": ", name, " must be ", type, " like x, got ",
                     tensor->scalar_type());
  }
  refuse_gradients(kCall, {&x, &weight, bias ? &*bias : nullptr}, "torch.nn.functional.linear");
}

Tensor skinny_linear_op(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  check_operands(x, weight, bias);
  const Tensor y = empty_like_tokens(x, weight.size(0));
  const Tensor rows = as_rows(x), dense_weight = as_rows(weight);
  const MaybeTensor dense_bias = bias ? MaybeTensor(bias->contiguous()) : std::nullopt;
  SkinnyParams params = {};
  params.x = rows.const_data_ptr();
  params.x_row_stride = rows.stride(0);
  params.weight = dense_weight.const_data_ptr();
  params.weight_row_stride = dense_weight.stride(0);
  params.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.num_tokens = rows.size(0);
  params.num_in = weight.size(1);
  params.num_out = weight.size(0);
  params.dtype = dtype_of(x.scalar_type());
  if (y.numel() > 0) skinny_linear(params);
  return y;
}

}  // namespace
}  // namespace mote

TORCH_LIBRARY_FRAGMENT(mote_ext, m) { m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"); }

TORCH_LIBRARY_IMPL(mote_ext, CPU, m) { m.impl("skinny_linear", &mote::skinny_linear_op); }
