// What the caller gave, checked: every refusal names the call, the tensor, what was expected and what came.
//
// ValueError for shapes and values, TypeError for dtypes and layouts; nothing is computed and no output exists yet.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "core/scalar.h"

namespace mote {

// The sizes of a checked problem.
struct Problem {
  const char* call;
  int64_t num_tokens;  // T, the product of x's leading sizes
  int rank;
  int num_stages;
  bool shared;

  int halves() const { return shared ? 2 : 1; }
  int num_experts() const { return num_stages + (shared ? 1 : 0); }
};

DType dtype_of(at::ScalarType type);

// x [..., K] and the experts' weights against each other: `weight` is [E, r, columns] or [E, columns, r].
Problem check_shrink(const char* call, const at::Tensor& x, const at::Tensor& lora_A, const at::Tensor& stage_ids,
                     const at::Tensor& scales, bool shared);
Problem check_expand(const char* call, const at::Tensor& z, const at::Tensor& lora_B, const at::Tensor& stage_ids,
                     bool shared, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& addend);
Problem check_wgrad(const char* call, const at::Tensor& narrow, const at::Tensor& wide, const at::Tensor& stage_ids,
                    int64_t num_stages, bool shared, at::ScalarType grad_type);
// The gradient dy [..., N] of a linear's result against what its forward was given and made.
Problem check_linear_backward(const char* call, const at::Tensor& dy, const std::optional<at::Tensor>& x,
                              const std::optional<at::Tensor>& z, const at::Tensor& lora_A, const at::Tensor& lora_B,
                              const at::Tensor& stage_ids, const at::Tensor& scales, bool shared);
Problem check_linear(const char* call, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& addend,
                     const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& stage_ids,
                     const at::Tensor& scales, bool shared);

// Ids as contiguous int32 on the CPU; ValueError for one outside [-2, S).
at::Tensor narrow_checked_ids(const char* call, const at::Tensor& stage_ids, int64_t num_stages);

// Any integer type but bool, on the device of x.
void check_ids_type(const char* call, const at::Tensor& stage_ids);
void check_num_stages(const char* call, int64_t num_stages);

}  // namespace mote
