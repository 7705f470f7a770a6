#include "binding/checks.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <sstream>

#include "core/stage_ids.h"

namespace mote {
namespace {

// As Python writes it: bfloat16, not BFloat16.
std::string name_of(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

std::string describe(const at::Tensor& tensor) {
  std::ostringstream out;
  out << tensor.sizes() << ' ' << name_of(tensor.scalar_type()) << " on " << tensor.device();
  return out.str();
}

void check_dense(const char* call, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), call, ": ", name, " is required, got None");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_quantized(), call, ": ", name,
                   " must be a dense, unquantized tensor, got layout ", tensor.layout(), " ",
                   name_of(tensor.scalar_type()));
}

// The tensor of the tokens, which the others must be like.
struct Tokens {
  const char* name;
  const at::Tensor& tensor;
};

void check_device(const char* call, const char* name, const at::Tensor& tensor, const Tokens& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.tensor.device(), call, ": ", name, " must be on ", x.tensor.device(), " like ",
                    x.name, ", got ", tensor.device(), "; move it with .to(", x.name, ".device)");
}

void check_compute_type(const char* call, const char* name, const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  const bool is_double_on_cpu = type == at::kDouble && x.is_cpu();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || is_double_on_cpu, call, ": ",
                   name, " must be float32, float16 or bfloat16 (float64 on the CPU only), got ", name_of(type), " on ",
                   x.device());
}

void check_same_type(const char* call, const char* name, const at::Tensor& tensor, const Tokens& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.tensor.scalar_type(), call, ": ", name, " must be ",
                   name_of(x.tensor.scalar_type()), " like ", x.name, ", got ", name_of(tensor.scalar_type()));
}

void check_expert_type(const char* call, const char* name, const at::Tensor& tensor, const Tokens& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.tensor.scalar_type() || tensor.scalar_type() == at::kFloat, call, ": ",
                   name, " must be ", name_of(x.tensor.scalar_type()), " like ", x.name, ", or float32, got ",
                   name_of(tensor.scalar_type()));
}

void check_sizes(const char* call, const char* name, const at::Tensor& tensor, at::IntArrayRef expected,
                 const std::string& meaning, const Tokens& x) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, call, ": ", name, " must be ", meaning, " = ", expected, ", got ",
                    tensor.sizes(), " (", x.name, " is ", describe(x.tensor), ")");
}

// A tensor with as many tokens as x.
void check_tokens_of(const char* call, const char* name, const at::Tensor& tensor, const Tokens& x, int64_t num_columns,
                     const char* meaning) {
  check_dense(call, name, tensor);
  check_device(call, name, tensor, x);
  check_same_type(call, name, tensor, x);
  std::vector<int64_t> expected = x.tensor.sizes().vec();
  expected.back() = num_columns;
  check_sizes(call, name, tensor, expected, meaning, x);
}

void check_addend(const char* call, const at::Tensor& addend, const Tokens& x, int64_t num_out) {
  check_tokens_of(call, "addend", addend, x, num_out, "[..., N]");
}

void check_bias(const char* call, const at::Tensor& bias, const Tokens& x, int64_t num_out) {
  check_dense(call, "bias", bias);
  check_device(call, "bias", bias, x);
  check_same_type(call, "bias", bias, x);
  check_sizes(call, "bias", bias, {num_out}, "[N]", x);
}

void check_ids(const char* call, const at::Tensor& stage_ids, const Tokens& x) {
  check_dense(call, "stage_ids", stage_ids);
  check_ids_type(call, stage_ids);
  check_device(call, "stage_ids", stage_ids, x);
  TORCH_CHECK_VALUE(stage_ids.sizes() == x.tensor.sizes().slice(0, x.tensor.dim() - 1), call,
                    ": stage_ids must have one id a token, ", x.name,
                    ".shape[:-1] = ", x.tensor.sizes().slice(0, x.tensor.dim() - 1), ", got ", stage_ids.sizes());
}

void check_has_columns(const char* call, const char* name, const at::Tensor& x) {
  check_dense(call, name, x);
  check_compute_type(call, name, x);
  TORCH_CHECK_VALUE(x.dim() >= 1, call, ": ", name, " must be [..., columns], got ", x.sizes(),
                    ", which has no last dimension");
  TORCH_CHECK_VALUE(x.size(-1) >= 1, call, ": ", name, " must have at least one column, got ", x.sizes());
}

void check_scales(const char* call, const at::Tensor& scales, const Tokens& x, int64_t num_experts) {
  check_dense(call, "scales", scales);
  check_device(call, "scales", scales, x);
  TORCH_CHECK_TYPE(scales.scalar_type() == at::kFloat, call, ": scales must be float32 whatever the dtype of ", x.name,
                   ", got ", name_of(scales.scalar_type()));
  TORCH_CHECK_VALUE(!scales.requires_grad(), call,
                    ": scales are constants (mix * alpha / r) and must not require "
                    "grad, got scales.requires_grad = True; pass scales.detach()");
  check_sizes(call, "scales", scales, {num_experts}, "[E]", x);
}

int64_t checked_stages(const char* call, int64_t num_experts, bool shared) {
  TORCH_CHECK_VALUE(num_experts > 0 || !shared, call, ": shared=True needs at least one expert, got E = 0");
  const int64_t num_stages = num_experts - (shared ? 1 : 0);
  check_num_stages(call, num_stages);
  return num_stages;
}

void check_rank(const char* call, int64_t rank, const char* name) {
  TORCH_CHECK_VALUE(rank >= 1 && rank <= kMaxRank, call, ": the rank r of ", name, " must be in 1..", kMaxRank,
                    ", got ", rank);
}

// An experts' tensor of three dimensions whose last two are (r, columns) in either order.
void check_experts(const char* call, const char* name, const at::Tensor& experts, const char* meaning,
                   const Tokens& x) {
  check_dense(call, name, experts);
  check_device(call, name, experts, x);
  check_expert_type(call, name, experts, x);
  TORCH_CHECK_VALUE(experts.dim() == 3, call, ": ", name, " must be ", meaning, ", got ", experts.sizes());
}

Problem problem_of(const char* call, const at::Tensor& x, int64_t rank, int64_t num_stages, bool shared) {
  return {call, x.numel() / x.size(-1), static_cast<int>(rank), static_cast<int>(num_stages), shared};
}

// What shrink and linear have in common: the tokens, and the experts' A.
Problem check_tokens(const char* call, const at::Tensor& x, const at::Tensor& lora_A, const at::Tensor& stage_ids,
                     bool shared) {
  check_has_columns(call, "x", x);
  check_experts(call, "lora_A", lora_A, "[E, r, K]", {"x", x});
  const int64_t num_experts = lora_A.size(0), rank = lora_A.size(1);
  check_rank(call, rank, "lora_A [E, r, K]");
  check_sizes(call, "lora_A", lora_A, {num_experts, rank, x.size(-1)}, "[E, r, K]", {"x", x});
  const int64_t num_stages = checked_stages(call, num_experts, shared);
  check_ids(call, stage_ids, {"x", x});
  return problem_of(call, x, rank, num_stages, shared);
}

std::string position_of(const at::Tensor& ids, int64_t flat) {
  if (ids.dim() == 0) return "";
  std::string text;
  for (int64_t dim = ids.dim() - 1; dim >= 0; --dim) {
    text = std::to_string(flat % ids.size(dim)) + (text.empty() ? "" : ", ") + text;
    flat /= ids.size(dim);
  }
  return '[' + text + ']';
}

// Checks each id, and writes it unless narrowed is null.
template <typename Id>
void narrow_into(const char* call, const at::Tensor& stage_ids, const at::Tensor& contiguous, int64_t num_stages,
                 int32_t* narrowed) {
  const Id* ids = contiguous.const_data_ptr<Id>();
  for (int64_t i = 0; i < contiguous.numel(); ++i) {
    // A negative id becomes a huge unsigned one here, so that one comparison serves every type.
    const bool is_stage = static_cast<uint64_t>(ids[i]) < static_cast<uint64_t>(num_stages);
    const bool is_special = std::is_signed_v<Id> && (ids[i] == static_cast<Id>(-1) || ids[i] == static_cast<Id>(-2));
    TORCH_CHECK_VALUE(is_stage || is_special, call, ": stage_ids", position_of(stage_ids, i), " is ", +ids[i],
                      ", expected a stage in [0, ", num_stages, "), -1 (SHARED_ONLY) or -2 (BASE_ONLY)");
    if (narrowed != nullptr) narrowed[i] = static_cast<int32_t>(ids[i]);
  }
}

}  // namespace

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kF32;
    case at::kHalf: return DType::kF16;
    case at::kBFloat16: return DType::kBF16;
    case at::kDouble: return DType::kF64;
    default: TORCH_INTERNAL_ASSERT(false, "dtype was checked before");
  }
}

void check_num_stages(const char* call, int64_t num_stages) {
  TORCH_CHECK_VALUE(num_stages >= 0 && num_stages <= kMaxStages, call, ": the number of stages must be in 0..",
                    kMaxStages, ", got ", num_stages);
}

void check_ids_type(const char* call, const at::Tensor& stage_ids) {
  const at::ScalarType type = stage_ids.scalar_type();
  TORCH_CHECK_TYPE(at::isIntegralType(type, /*includeBool=*/false), call,
                   ": stage_ids must be of an integer type, got ", name_of(type));
}

at::Tensor narrow_checked_ids(const char* call, const at::Tensor& stage_ids, int64_t num_stages) {
  const at::Tensor contiguous = stage_ids.contiguous();
  if (contiguous.scalar_type() == at::kInt) {
    narrow_into<int32_t>(call, stage_ids, contiguous, num_stages, nullptr);
    return contiguous;
  }
  at::Tensor narrowed = at::empty(stage_ids.sizes(), contiguous.options().dtype(at::kInt));
  AT_DISPATCH_V2(stage_ids.scalar_type(), "narrow_stage_ids", AT_WRAP([&] {
                   narrow_into<scalar_t>(call, stage_ids, contiguous, num_stages, narrowed.mutable_data_ptr<int32_t>());
                 }),
                 AT_EXPAND(AT_INTEGRAL_TYPES_V2));
  return narrowed;
}

Problem check_shrink(const char* call, const at::Tensor& x, const at::Tensor& lora_A, const at::Tensor& stage_ids,
                     const at::Tensor& scales, bool shared) {
  const Problem problem = check_tokens(call, x, lora_A, stage_ids, shared);
  check_scales(call, scales, {"x", x}, problem.num_experts());
  return problem;
}

Problem check_expand(const char* call, const at::Tensor& z, const at::Tensor& lora_B, const at::Tensor& stage_ids,
                     bool shared, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& addend) {
  check_has_columns(call, "z", z);
  check_experts(call, "lora_B", lora_B, "[E, N, r]", {"z", z});
  const int64_t num_experts = lora_B.size(0), num_out = lora_B.size(1), rank = lora_B.size(2);
  check_rank(call, rank, "lora_B [E, N, r]");
  TORCH_CHECK_VALUE(num_out >= 1, call, ": lora_B must be [E, N, r] with N >= 1, got ", lora_B.sizes());
  const int64_t num_stages = checked_stages(call, num_experts, shared);
  TORCH_CHECK_VALUE(z.size(-1) == (shared ? 2 : 1) * rank, call, ": z must have ",
                    shared ? "2 r = " : "r = ", (shared ? 2 : 1) * rank, " columns, got ", z.sizes());
  check_ids(call, stage_ids, {"z", z});
  if (bias) check_bias(call, *bias, {"z", z}, num_out);
  if (addend) check_addend(call, *addend, {"z", z}, num_out);
  return problem_of(call, z, rank, num_stages, shared);
}

Problem check_wgrad(const char* call, const at::Tensor& narrow, const at::Tensor& wide, const at::Tensor& stage_ids,
                    int64_t num_stages, bool shared, at::ScalarType grad_type) {
  check_has_columns(call, "wide", wide);
  check_has_columns(call, "narrow", narrow);
  check_device(call, "narrow", narrow, {"wide", wide});
  check_same_type(call, "narrow", narrow, {"wide", wide});
  check_num_stages(call, num_stages);
  const int64_t halves = shared ? 2 : 1, rank = narrow.size(-1) / halves;
  TORCH_CHECK_VALUE(narrow.size(-1) % halves == 0, call, ": narrow must have 2 r columns, got ", narrow.sizes());
  check_rank(call, rank, "narrow");
  TORCH_CHECK_VALUE(narrow.sizes().slice(0, narrow.dim() - 1) == wide.sizes().slice(0, wide.dim() - 1), call,
                    ": narrow and wide must have the same tokens, got ", narrow.sizes(), " and ", wide.sizes());
  TORCH_CHECK_TYPE(grad_type == wide.scalar_type() || grad_type == at::kFloat, call, ": dtype must be ",
                   name_of(wide.scalar_type()), " like wide, or float32, got ", name_of(grad_type));
  check_ids(call, stage_ids, {"wide", wide});
  return problem_of(call, wide, rank, num_stages, shared);
}

Problem check_linear(const char* call, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& addend,
                     const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& stage_ids,
                     const at::Tensor& scales, bool shared) {
  const Problem problem = check_tokens(call, x, lora_A, stage_ids, shared);
  check_experts(call, "lora_B", lora_B, "[E, N, r]", {"x", x});
  const int64_t num_out = lora_B.size(1);
  TORCH_CHECK_VALUE(num_out >= 1, call, ": lora_B must be [E, N, r] with N >= 1, got ", lora_B.sizes());
  check_sizes(call, "lora_B", lora_B, {lora_A.size(0), num_out, problem.rank}, "[E, N, r]", {"x", x});
  check_scales(call, scales, {"x", x}, problem.num_experts());
  if (weight) {
    check_dense(call, "weight", *weight);
    check_device(call, "weight", *weight, {"x", x});
    check_same_type(call, "weight", *weight, {"x", x});
    check_sizes(call, "weight", *weight, {num_out, x.size(-1)}, "[N, K]", {"x", x});
  }
  if (bias) check_bias(call, *bias, {"x", x}, num_out);
  if (addend) check_addend(call, *addend, {"x", x}, num_out);
  return problem;
}

Problem check_linear_backward(const char* call, const at::Tensor& dy, const std::optional<at::Tensor>& x,
                              const std::optional<at::Tensor>& z, const at::Tensor& lora_A, const at::Tensor& lora_B,
                              const at::Tensor& stage_ids, const at::Tensor& scales, bool shared) {
  check_has_columns(call, "dy", dy);
  check_experts(call, "lora_A", lora_A, "[E, r, K]", {"dy", dy});
  check_experts(call, "lora_B", lora_B, "[E, N, r]", {"dy", dy});
  const int64_t num_experts = lora_A.size(0), rank = lora_A.size(1), num_in = lora_A.size(2);
  check_rank(call, rank, "lora_A [E, r, K]");
  TORCH_CHECK_VALUE(num_in >= 1, call, ": lora_A must be [E, r, K] with K >= 1, got ", lora_A.sizes());
  check_sizes(call, "lora_B", lora_B, {num_experts, dy.size(-1), rank}, "[E, N, r]", {"dy", dy});
  const int64_t num_stages = checked_stages(call, num_experts, shared);
  check_ids(call, stage_ids, {"dy", dy});
  check_scales(call, scales, {"dy", dy}, num_experts);
  if (x) check_tokens_of(call, "x", *x, {"dy", dy}, num_in, "[..., K]");
  if (z) check_tokens_of(call, "z", *z, {"dy", dy}, (shared ? 2 : 1) * rank, "[..., halves r]");
  return problem_of(call, dy, rank, num_stages, shared);
}

}  // namespace mote
