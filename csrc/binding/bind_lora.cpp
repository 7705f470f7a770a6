// The ops of torch: each checks what it was given, allocates, fills the params of csrc/lora/lora.h and calls the
// backend.
//
// Nothing is computed here but the base product, which the library does best, and copies of the small expert weights
// into the layout and dtype a kernel reads. Gradients and autocast are in autograd.cpp, fake kernels in
// mote_ext/ops.py.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "binding/checks.h"
#include "binding/library.h"
#include "binding/rows.h"
#include "lora/lora.h"
#ifndef MOTE_SIMT
#include "binding/stream.h"
#endif

namespace mote {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Which kernels work on tensors of this device, and on which stream.
#ifdef MOTE_SIMT

const Backend& backend_of(const char*, const Tensor&) { return device_backend(); }
Stream stream_of(const Tensor&) { return nullptr; }

#else

const Backend& backend_of([[maybe_unused]] const char* call, const Tensor& x) {
  if (x.is_cpu()) return cpu_backend();
#ifdef MOTE_NO_CUDA
  TORCH_CHECK(false, call, ": x is on ", x.device(),
              ", but this mote_ext was built without CUDA; `python -m mote_ext.env`",
              " says why; reinstall with MOTE_CUDA=1 pip install --no-build-isolation .");
#else
  return device_backend();
#endif
}

Stream stream_of(const Tensor& x) { return x.is_cpu() ? nullptr : current_stream(x.device()); }

// MOTE_DEBUG=1: illegal ids raise on a GPU too, at the price of waiting for it.
bool wants_checked_ids(const Tensor& stage_ids) {
  const char* debug = std::getenv("MOTE_DEBUG");
  return debug != nullptr && debug[0] == '1' && !stream_is_capturing(stage_ids.device());
}

#endif

// Ids as the kernels read them, contiguous int32. The CPU refuses an illegal one; a GPU makes its token's row NaN.
Tensor narrowed_ids(const char* call, const Backend& backend, const Tensor& stage_ids, int num_stages) {
  if (backend.narrow_ids == nullptr) return narrow_checked_ids(call, stage_ids, num_stages);
#ifndef MOTE_SIMT
  if (wants_checked_ids(stage_ids)) narrow_checked_ids(call, stage_ids.cpu(), num_stages);
#endif
  const Tensor ids = stage_ids.contiguous();
  if (ids.scalar_type() == at::kInt) return ids;
  Tensor narrowed = at::empty(ids.sizes(), ids.options().dtype(at::kInt));
  const NarrowParams params = {ids.const_data_ptr(),
                               static_cast<int>(ids.element_size()),
                               at::isSignedType(ids.scalar_type()),
                               narrowed.mutable_data_ptr<int32_t>(),
                               ids.numel(),
                               num_stages};
  backend.narrow_ids(params, stream_of(ids));
  return narrowed;
}

// In the wanted dtype and contiguous, by one copy at most.
Tensor packed(const Tensor& tensor, at::ScalarType type) {
  if (tensor.scalar_type() == type) return tensor.contiguous();
  return at::empty(tensor.sizes(), tensor.options().dtype(type)).copy_(tensor);
}

// Experts as a kernel reads them. The backward hands over transposed views, which some backends take as they are.
struct Weight {
  Tensor tensor;
  bool transposed;
};

Weight as_weight(const Backend& backend, const Tensor& experts, at::ScalarType type) {
  if (backend.reads_transposed_weights && !experts.is_contiguous() && experts.scalar_type() == type) {
    const Tensor swapped = experts.transpose(1, 2);
    if (swapped.is_contiguous()) return {swapped, true};
  }
  return {packed(experts, type), false};
}

// Holds what a kernel needs beside its operands; on the CPU that is nothing.
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t num_floats) {
    if (num_floats > 0) tensor_ = at::empty({num_floats}, x.options().dtype(at::kFloat));
  }
  float* data() const { return tensor_.defined() ? tensor_.mutable_data_ptr<float>() : nullptr; }

 private:
  Tensor tensor_;
};

const void* pointer_or_null(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// What the params of every problem have; the dtype is that of its tokens.
template <typename Params>
Params params_of(const Problem& problem, const Tensor& tokens) {
  Params params = {};
  params.num_tokens = problem.num_tokens;
  params.rank = problem.rank;
  params.num_stages = problem.num_stages;
  params.shared = problem.shared;
  params.dtype = dtype_of(tokens.scalar_type());
  return params;
}

ShrinkParams shrink_params(const Problem& problem, const Tensor& rows, const Weight& weight, const Tensor& ids,
                           const Tensor& scales, const Tensor& z) {
  auto params = params_of<ShrinkParams>(problem, rows);
  params.x = rows.const_data_ptr();
  params.x_row_stride = rows.stride(0);
  params.weight = weight.tensor.const_data_ptr();
  params.weight_transposed = weight.transposed;
  params.stage_ids = ids.const_data_ptr<int32_t>();
  params.scales = scales.const_data_ptr<float>();
  params.z = z.mutable_data_ptr();
  params.num_in = rows.size(1);
  return params;
}

ExpandParams expand_params(const Problem& problem, const Tensor& z, const Weight& weight, const Tensor& ids,
                           const MaybeTensor& bias, const MaybeTensor& addend, const Tensor& y) {
  auto params = params_of<ExpandParams>(problem, y);
  params.z = z.const_data_ptr();
  params.weight = weight.tensor.const_data_ptr();
  params.weight_transposed = weight.transposed;
  params.stage_ids = ids.const_data_ptr<int32_t>();
  params.bias = pointer_or_null(bias);
  params.addend = pointer_or_null(addend);
  params.addend_row_stride = addend ? addend->stride(0) : 0;
  params.y = y.mutable_data_ptr();
  params.y_row_stride = y.stride(0);
  params.num_out = y.size(1);
  return params;
}

// [E, r, D], or [E, D, r] when transposed; uninitialised.
Tensor empty_grad(const Problem& problem, const Tensor& wide, bool transposed, at::ScalarType type) {
  const int64_t rank = problem.rank, num_wide = wide.size(1);
  return at::empty({problem.num_experts(), transposed ? num_wide : rank, transposed ? rank : num_wide},
                   wide.options().dtype(type));
}

WgradParams wgrad_params(const Problem& problem, const Tensor& narrow, const Tensor& wide, const Tensor& ids,
                         bool transposed, const Tensor& grad) {
  auto params = params_of<WgradParams>(problem, wide);
  params.narrow = narrow.const_data_ptr();
  params.wide = wide.const_data_ptr();
  params.wide_row_stride = wide.stride(0);
  params.stage_ids = ids.const_data_ptr<int32_t>();
  params.grad = grad.mutable_data_ptr();
  params.transposed = transposed;
  params.num_wide = wide.size(1);
  params.grad_dtype = dtype_of(grad.scalar_type());
  return params;
}

// For one problem after the other.
int64_t workspace_floats(const Backend& backend, const BackwardParams& params) {
  return std::max({params.dz ? backend.shrink_workspace_floats(*params.dz) : 0,
                   params.dA ? backend.wgrad_workspace_floats(*params.dA) : 0,
                   params.dB ? backend.wgrad_workspace_floats(*params.dB) : 0});
}

MaybeTensor contiguous(const MaybeTensor& tensor) { return tensor ? MaybeTensor(tensor->contiguous()) : std::nullopt; }

MaybeTensor maybe_rows(const MaybeTensor& tensor) { return tensor ? MaybeTensor(as_rows(*tensor)) : std::nullopt; }

// y = bias + addend + delta, into the rows of y; z for the backward.
void compute_delta(const Problem& problem, const Tensor& x, const MaybeTensor& bias, const MaybeTensor& addend,
                   const Tensor& lora_A, const Tensor& lora_B, const Tensor& stage_ids, const Tensor& scales,
                   const Tensor& y, const Tensor& z) {
  const Backend& backend = backend_of(problem.call, x);
  const c10::DeviceGuard guard(x.device());
  const Tensor ids = narrowed_ids(problem.call, backend, stage_ids, problem.num_stages);
  const Weight a = as_weight(backend, lora_A, x.scalar_type()), b = as_weight(backend, lora_B, x.scalar_type());
  const Tensor rows = as_rows(x), dense_scales = scales.contiguous();
  ShrinkParams shrink = shrink_params(problem, rows, a, ids, dense_scales, z);
  const Workspace workspace(x, backend.shrink_workspace_floats(shrink));
  shrink.workspace = workspace.data();
  backend.delta(shrink, expand_params(problem, z, b, ids, bias, addend, y), stream_of(x));
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                  const MaybeTensor& addend, const Tensor& lora_A, const Tensor& lora_B,
                                  const Tensor& stage_ids, const Tensor& scales, bool shared) {
  const char* call = weight ? "mote_linear" : addend ? "lora_add" : "lora_delta";
  const Problem problem = check_linear(call, x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared);
  const Tensor y = empty_like_tokens(x, lora_B.size(1)), z = empty_like_tokens(x, problem.halves() * problem.rank);
  const Tensor y_rows = as_rows(y);
  compute_delta(problem, x, contiguous(bias), maybe_rows(addend), lora_A, lora_B, stage_ids, scales, y_rows, z);
  // The delta is in y already, so the library's product accumulates onto it: y is not read and written once more.
  if (weight) y_rows.addmm_(as_rows(x), weight->t());
  return {y, z};
}

void lora_add_(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& stage_ids,
               const Tensor& scales, bool shared) {
  const char* call = "lora_add_";
  const Problem problem = check_linear(call, x, {}, {}, y, lora_A, lora_B, stage_ids, scales, shared);
  at::assert_no_internal_overlap(y);
  for (const Tensor& other : {x, lora_A, lora_B, stage_ids, scales}) at::assert_no_overlap(y, other);
  const Tensor z = empty_like_tokens(x, problem.halves() * problem.rank);
  const Tensor rows = as_rows(y);
  compute_delta(problem, x, {}, rows, lora_A, lora_B, stage_ids, scales, rows, z);
  if (!rows.is_alias_of(y)) y.copy_(rows.view(y.sizes()));  // y's strides did not allow a view of its rows
}

Tensor lora_shrink(const Tensor& x, const Tensor& lora_A, const Tensor& stage_ids, const Tensor& scales, bool shared) {
  const char* call = "lora_shrink";
  const Problem problem = check_shrink(call, x, lora_A, stage_ids, scales, shared);
  const Backend& backend = backend_of(call, x);
  const c10::DeviceGuard guard(x.device());
  const Tensor ids = narrowed_ids(call, backend, stage_ids, problem.num_stages);
  const Tensor z = empty_like_tokens(x, problem.halves() * problem.rank);
  const Weight a = as_weight(backend, lora_A, x.scalar_type());
  const Tensor rows = as_rows(x), dense_scales = scales.contiguous();
  ShrinkParams params = shrink_params(problem, rows, a, ids, dense_scales, z);
  const Workspace workspace(x, backend.shrink_workspace_floats(params));
  params.workspace = workspace.data();
  backend.shrink(params, stream_of(x));
  return z;
}

Tensor lora_expand(const Tensor& z, const Tensor& lora_B, const Tensor& stage_ids, bool shared, const MaybeTensor& bias,
                   const MaybeTensor& addend) {
  const char* call = "lora_expand";
  const Problem problem = check_expand(call, z, lora_B, stage_ids, shared, bias, addend);
  const Backend& backend = backend_of(call, z);
  const c10::DeviceGuard guard(z.device());
  const Tensor ids = narrowed_ids(call, backend, stage_ids, problem.num_stages);
  const Tensor y = empty_like_tokens(z, lora_B.size(1));
  const Weight b = as_weight(backend, lora_B, z.scalar_type());
  const Tensor dense_z = z.contiguous();
  const MaybeTensor dense_bias = contiguous(bias), addend_rows = maybe_rows(addend);
  backend.expand(expand_params(problem, dense_z, b, ids, dense_bias, addend_rows, as_rows(y)), stream_of(z));
  return y;
}

Tensor lora_wgrad(const Tensor& narrow, const Tensor& wide, const Tensor& stage_ids, int64_t num_stages, bool shared,
                  bool transposed, at::ScalarType dtype) {
  const char* call = "lora_wgrad";
  const Problem problem = check_wgrad(call, narrow, wide, stage_ids, num_stages, shared, dtype);
  const Backend& backend = backend_of(call, wide);
  const c10::DeviceGuard guard(wide.device());
  const Tensor ids = narrowed_ids(call, backend, stage_ids, problem.num_stages);
  const Tensor rows = as_rows(wide), dense_narrow = narrow.contiguous();
  const Tensor grad = empty_grad(problem, rows, transposed, dtype);
  WgradParams params = wgrad_params(problem, dense_narrow, rows, ids, transposed, grad);
  const Workspace workspace(wide, backend.wgrad_workspace_floats(params));
  params.workspace = workspace.data();
  backend.wgrad(params, stream_of(wide));
  return grad;
}

// The wanted ones of dx, dA and dB, of the experts' part alone.
std::vector<Tensor> linear_backward(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& z, const Tensor& lora_A,
                                    const Tensor& lora_B, const Tensor& stage_ids, const Tensor& scales, bool shared,
                                    std::array<bool, 3> wanted) {
  const char* call = "linear_backward";
  const auto [wants_dx, wants_dA, wants_dB] = wanted;
  const Problem problem = check_linear_backward(call, dy, x, z, lora_A, lora_B, stage_ids, scales, shared);
  TORCH_CHECK_VALUE(x || !wants_dA, call, ": the gradient of lora_A needs x, got None");
  TORCH_CHECK_VALUE(z || !wants_dB, call, ": the gradient of lora_B needs z, got None");
  if (!(wants_dx || wants_dA || wants_dB)) return {};
  const Backend& backend = backend_of(call, dy);
  const c10::DeviceGuard guard(dy.device());
  const Tensor ids = narrowed_ids(call, backend, stage_ids, problem.num_stages);
  const Tensor dy_rows = as_rows(dy), dense_scales = scales.contiguous();
  std::vector<Tensor> gradients;
  BackwardParams params;
  // What params point to.
  const MaybeTensor x_rows = wants_dA ? maybe_rows(x) : std::nullopt, dense_z = wants_dB ? contiguous(z) : std::nullopt;
  Weight a, b;
  Tensor dz;
  if (wants_dx || wants_dA) {
    b = as_weight(backend, lora_B.transpose(1, 2), dy.scalar_type());
    dz = at::empty({problem.num_tokens, problem.halves() * problem.rank}, dy.options());
    params.dz = shrink_params(problem, dy_rows, b, ids, dense_scales, dz);
  }
  if (wants_dx) {
    a = as_weight(backend, lora_A.transpose(1, 2), dy.scalar_type());
    gradients.push_back(empty_like_tokens(dy, lora_A.size(2)));
    params.dx = expand_params(problem, dz, a, ids, {}, {}, as_rows(gradients.back()));
  }
  if (wants_dA) {
    gradients.push_back(empty_grad(problem, *x_rows, false, lora_A.scalar_type()));
    params.dA = wgrad_params(problem, dz, *x_rows, ids, false, gradients.back());
  }
  if (wants_dB) {
    gradients.push_back(empty_grad(problem, dy_rows, true, lora_B.scalar_type()));
    params.dB = wgrad_params(problem, *dense_z, dy_rows, ids, true, gradients.back());
  }
  const Workspace workspace(dy, workspace_floats(backend, params));
  if (params.dz) params.dz->workspace = workspace.data();
  if (params.dA) params.dA->workspace = workspace.data();
  if (params.dB) params.dB->workspace = workspace.data();
  backend.backward(params, stream_of(dy));
  return gradients;
}

Tensor narrow_stage_ids(const Tensor& stage_ids, int64_t num_stages) {
  const char* call = "narrow_stage_ids";
  check_ids_type(call, stage_ids);
  check_num_stages(call, num_stages);
  const c10::DeviceGuard guard(stage_ids.device());
  const Tensor narrowed = narrowed_ids(call, backend_of(call, stage_ids), stage_ids, static_cast<int>(num_stages));
  return narrowed.is_alias_of(stage_ids) ? stage_ids.clone() : narrowed;  // an op of torch may not return its input
}

void register_kernels(torch::Library& m) {
  m.impl("linear", &linear);
  m.impl("lora_add_", &lora_add_);
  m.impl("lora_shrink", &lora_shrink);
  m.impl("lora_expand", &lora_expand);
  m.impl("lora_wgrad", &lora_wgrad);
  m.impl("linear_backward", &linear_backward);
  m.impl("narrow_stage_ids", &narrow_stage_ids);
}

}  // namespace
}  // namespace mote

MOTE_LIBRARY(MOTE_OPS, m) {
  m.def(
      "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor? addend, Tensor lora_A, Tensor lora_B, Tensor stage_ids, "
      "Tensor scales, bool shared) -> (Tensor y, Tensor z)");
  m.def(
      "lora_add_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor stage_ids, Tensor scales, bool shared) "
      "-> ()");
  m.def("lora_shrink(Tensor x, Tensor lora_A, Tensor stage_ids, Tensor scales, bool shared) -> Tensor");
  m.def(
      "lora_expand(Tensor z, Tensor lora_B, Tensor stage_ids, bool shared, Tensor? bias=None, Tensor? addend=None) -> "
      "Tensor");
  m.def(
      "lora_wgrad(Tensor narrow, Tensor wide, Tensor stage_ids, int num_stages, bool shared, bool transposed, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "linear_backward(Tensor dy, Tensor? x, Tensor? z, Tensor lora_A, Tensor lora_B, Tensor stage_ids, Tensor scales, "
      "bool shared, bool[3] wanted) -> Tensor[]");
  m.def("narrow_stage_ids(Tensor stage_ids, int num_stages) -> Tensor");
}

MOTE_LIBRARY_IMPL(MOTE_OPS, CPU, m) { mote::register_kernels(m); }
#ifndef MOTE_SIMT
MOTE_LIBRARY_IMPL(MOTE_OPS, CUDA, m) { mote::register_kernels(m); }
#endif
