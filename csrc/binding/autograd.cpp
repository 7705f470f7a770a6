// What stands above the kernels of `linear`: its gradient, its behaviour under autocast, and the refusals.
//
// With dz = scale · (dY·B), which is a shrink of dY:   dx = dY·W + dz·A   dA = dzᵀ·x   dB = dYᵀ·z   dW = dYᵀ·x
// Each is computed only when it is wanted. The other ops are the pieces and have no gradient: asking for one is an
// error.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <vector>

#include "binding/gradients.h"
#include "binding/library.h"

namespace mote {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using LinearResult = std::tuple<Tensor, Tensor>;

LinearResult call_linear(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& addend,
                         const Tensor& lora_A, const Tensor& lora_B, const Tensor& stage_ids, const Tensor& scales,
                         bool shared) {
  static const auto op =
      find_op<LinearResult(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&,
                           const Tensor&, const Tensor&, const Tensor&, bool)>(MOTE_OPS_PREFIX "linear");
  return op.call(x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared);
}

// {dx, dA, dB}; undefined where not wanted.
std::array<Tensor, 3> call_linear_backward(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& z,
                                           const Tensor& lora_A, const Tensor& lora_B, const Tensor& stage_ids,
                                           const Tensor& scales, bool shared, std::array<bool, 3> wanted) {
  static const auto op =
      find_op<std::vector<Tensor>(const Tensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                                  const Tensor&, const Tensor&, bool, std::array<bool, 3>)>(MOTE_OPS_PREFIX
                                                                                            "linear_backward");
  const std::vector<Tensor> given = op.call(dy, x, z, lora_A, lora_B, stage_ids, scales, shared, wanted);
  std::array<Tensor, 3> gradients;
  for (size_t i = 0, next = 0; i < gradients.size(); ++i)
    if (wanted[i]) gradients[i] = given.at(next++);
  return gradients;
}

MaybeTensor maybe(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

// [T, columns]; symbolic sizes pass through.
Tensor as_rows(const Tensor& tensor) { return tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor.flatten(0, -2); }

// Ties a gradient to what it was computed from, so that differentiating it again fails instead of giving zero.
struct RefuseDoubleBackward : torch::autograd::Function<RefuseDoubleBackward> {
  static Tensor forward(AutogradContext*, const Tensor& gradient, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&) {
    return gradient.view_as(gradient);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "mote_linear: double backward is not supported; mote_ext.reference.mote_linear and "
                "mote_ext.reference.lora_delta can be differentiated twice");
  }
};

// Which gradients the engine asks for. Edges are numbered over the tensors that were given, in the order of the schema.
struct Wanted {
  bool x = false, weight = false, bias = false, addend = false, lora_A = false, lora_B = false;

  Wanted(const AutogradContext* ctx, bool has_weight, bool has_bias, bool has_addend) {
    size_t edge = 0;
    x = ctx->needs_input_grad(edge++);
    if (has_weight) weight = ctx->needs_input_grad(edge++);
    if (has_bias) bias = ctx->needs_input_grad(edge++);
    if (has_addend) addend = ctx->needs_input_grad(edge++);
    lora_A = ctx->needs_input_grad(edge++);
    lora_B = ctx->needs_input_grad(edge++);
  }
};

struct Linear : torch::autograd::Function<Linear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& addend, const Tensor& lora_A,
                               const Tensor& lora_B, const Tensor& stage_ids, const Tensor& scales, bool shared) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, z] = call_linear(x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared);
    const bool wants_dz = x.requires_grad() || lora_A.requires_grad();
    const bool weight_wants = weight && weight->requires_grad();
    ctx->save_for_backward({lora_A.requires_grad() || weight_wants ? x : Tensor(),
                            lora_B.requires_grad() ? z : Tensor(),
                            weight && (x.requires_grad() || weight_wants) ? *weight : Tensor(), lora_A,
                            wants_dz || lora_B.requires_grad() ? lora_B : Tensor(), stage_ids, scales});
    ctx->saved_data["shared"] = shared;
    ctx->saved_data["has_weight"] = weight.has_value();
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["has_addend"] = addend.has_value();
    ctx->mark_non_differentiable({z});
    return {y, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool is_recorded = at::GradMode::is_enabled();
    variable_list gradients(9);
    if (!grads[0].defined()) return gradients;
    const bool has_weight = ctx->saved_data["has_weight"].toBool();
    const Wanted wanted(ctx, has_weight, ctx->saved_data["has_bias"].toBool(), ctx->saved_data["has_addend"].toBool());
    const bool shared = ctx->saved_data["shared"].toBool();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &z = saved[1], &weight = saved[2], &lora_A = saved[3],
                 &lora_B = saved[4], &stage_ids = saved[5], &scales = saved[6];
    {
      at::AutoGradMode not_recorded(false);
      if (wanted.x || wanted.lora_A || wanted.lora_B) {
        auto [dx, dA, dB] = call_linear_backward(dy, maybe(x), maybe(z), lora_A, lora_B, stage_ids, scales, shared,
                                                 {wanted.x, wanted.lora_A, wanted.lora_B});
        if (wanted.x && has_weight) as_rows(dx).addmm_(as_rows(dy), weight);
        gradients[0] = dx, gradients[4] = dA, gradients[5] = dB;
      }
      if (wanted.weight) gradients[1] = as_rows(dy).t().mm(as_rows(x));
      if (wanted.bias) gradients[2] = as_rows(dy).sum(0);
      if (wanted.addend) gradients[3] = dy;
    }
    if (is_recorded) {
      for (Tensor& gradient : gradients) {
        if (gradient.defined()) gradient = RefuseDoubleBackward::apply(gradient, dy, x, lora_A, lora_B);
      }
    }
    return gradients;
  }
};

void refuse_tangents(TensorPointers tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_tangent(tensors),
                              "mote_linear: forward-mode differentiation is not supported; "
                              "mote_ext.reference.mote_linear and mote_ext.reference.lora_delta have it");
}

const Tensor* pointer_or_null(const MaybeTensor& tensor) { return tensor ? &*tensor : nullptr; }

LinearResult linear_autograd(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                             const MaybeTensor& addend, const Tensor& lora_A, const Tensor& lora_B,
                             const Tensor& stage_ids, const Tensor& scales, bool shared) {
  const TensorPointers inputs = {
      &x, pointer_or_null(weight), pointer_or_null(bias), pointer_or_null(addend), &lora_A, &lora_B, &scales};
  refuse_tangents(inputs);
  if (!any_requires_grad(inputs)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_linear(x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared);
  }
  const variable_list outputs = Linear::apply(x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared);
  return {outputs[0], outputs[1]};
}

void lora_add_autograd(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                       const Tensor& stage_ids, const Tensor& scales, bool shared) {
  refuse_tangents({&y, &x, &lora_A, &lora_B});
  TORCH_CHECK(!any_requires_grad({&y, &x, &lora_A, &lora_B}),
              "lora_add_: writes y in place and has no gradient, but y, x, lora_A or lora_B requires grad; use "
              "mote_ext.ops.lora_add, or torch.no_grad()");
  static const auto op =
      find_op<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool)>(
          MOTE_OPS_PREFIX "lora_add_");
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.call(y, x, lora_A, lora_B, stage_ids, scales, shared);
  }
  y.unsafeGetTensorImpl()->bump_version();  // whoever saved the old y for a backward must notice
}

// Autocast by hand: the library's own would cast `scales` too. Experts may stay fp32 masters; the kernels round them.
LinearResult linear_autocast(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                             const MaybeTensor& addend, const Tensor& lora_A, const Tensor& lora_B,
                             const Tensor& stage_ids, const Tensor& scales, bool shared) {
  const c10::DeviceType device = x.device().type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(type, tensor, device); };
  const auto maybe_cast = [&](const MaybeTensor& tensor) { return tensor ? MaybeTensor(cast(*tensor)) : std::nullopt; };
  const auto cast_experts = [&](const Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat ? tensor : cast(tensor);
  };
  return call_linear(cast(x), maybe_cast(weight), maybe_cast(bias), maybe_cast(addend), cast_experts(lora_A),
                     cast_experts(lora_B), stage_ids, scales, shared);
}

}  // namespace
}  // namespace mote

MOTE_LIBRARY_IMPL(MOTE_OPS, Autograd, m) {
  m.impl("linear", &mote::linear_autograd);
  m.impl("lora_add_", &mote::lora_add_autograd);
  for (const char* piece : {"lora_shrink", "lora_expand", "lora_wgrad", "linear_backward", "narrow_stage_ids"}) {
    m.impl(piece, torch::autograd::autogradNotImplementedFallback());
  }
}

MOTE_LIBRARY_IMPL(MOTE_OPS, AutocastCPU, m) { m.impl("linear", &mote::linear_autocast); }
MOTE_LIBRARY_IMPL(MOTE_OPS, AutocastCUDA, m) { m.impl("linear", &mote::linear_autocast); }
