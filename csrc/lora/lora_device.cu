// The device backend: chooses the tiles of a problem, then starts its kernels. Enqueues only; never looks at a value.
#include <type_traits>

#include "lora/intrinsics.cuh"
#include "lora/launch.h"

namespace mote {
namespace {

bool has_tokens(const ShrinkParams& p) { return p.num_tokens > 0; }

int64_t shrink_workspace_floats(const ShrinkParams& p) {
  return has_tokens(p) ? shrink_workspace(choose_shrink(p)) : 0;
}

void shrink(const ShrinkParams& p, Stream stream) {
  if (!has_tokens(p)) return;
  const ShrinkTask task = choose_shrink(p);
  launch_shrink(task, stream);
  if (task.num_splits > 1) launch_finish_z(task, stream);
}

void expand(const ExpandParams& p, Stream stream) {
  if (p.num_tokens > 0) launch_expand(choose_expand(p), stream);
}

void delta(const ShrinkParams& shrink_params, const ExpandParams& expand_params, Stream stream) {
  if (!has_tokens(shrink_params)) return;
  const ShrinkTask task = choose_shrink(shrink_params);
  ExpandTask expand_task = choose_expand(expand_params);
  launch_shrink(task, stream);
  if (expand_finishes(task)) {
    expand_task.planes = task.workspace;
    expand_task.num_splits = task.num_splits;
    expand_task.scales = task.scales;
    expand_task.finished_z = task.z;
  } else if (task.num_splits > 1) {
    launch_finish_z(task, stream);
  }
  launch_expand(expand_task, stream);
}

int64_t wgrad_workspace_floats(const WgradParams& p) { return wgrad_workspace(choose_wgrad(p)); }

void wgrad(const WgradParams& p, Stream stream) {
  const WgradTask task = choose_wgrad(p);
  if (task.num_experts() > 0) launch_wgrad(task, stream);
}

void backward(const BackwardParams& p, Stream stream) {
  if (p.dz) shrink(*p.dz, stream);
  if (p.dx) expand(*p.dx, stream);
  if (p.dA) wgrad(*p.dA, stream);
  if (p.dB) wgrad(*p.dB, stream);
}

// An id keeps its value when it is legal in its own type; comparing before the cast is what makes 2^32 illegal, not 0.
template <typename Id>
__global__ void __launch_bounds__(128) narrow_kernel(NarrowParams p) {
  const int64_t i = int64_t{blockIdx.x} * 128 + threadIdx.x;
  if (i >= p.num_tokens) return;
  const Id id = static_cast<const Id*>(p.ids)[i];
  // A negative id becomes a huge unsigned one here, so that one comparison serves every type.
  const bool is_stage = static_cast<uint64_t>(id) < static_cast<uint64_t>(p.num_stages);
  const bool is_special =
      std::is_signed_v<Id> && (id == static_cast<Id>(kSharedOnly) || id == static_cast<Id>(kBaseOnly));
  p.narrowed[i] = is_stage || is_special ? static_cast<int32_t>(id) : kIllegalId;
}

template <typename Signed, typename Unsigned>
void start_narrow(const NarrowParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, 128)));
  launch(p.is_signed ? narrow_kernel<Signed> : narrow_kernel<Unsigned>, grid, 128, 0, stream, p);
}

void narrow_ids(const NarrowParams& p, Stream stream) {
  if (p.num_tokens == 0) return;
  switch (p.id_bytes) {
    case 1: return start_narrow<int8_t, uint8_t>(p, stream);
    case 2: return start_narrow<int16_t, uint16_t>(p, stream);
    case 4: return start_narrow<int32_t, uint32_t>(p, stream);
    default: return start_narrow<int64_t, uint64_t>(p, stream);
  }
}

}  // namespace

const Backend& device_backend() {
  static const Backend backend = {
      false, shrink_workspace_floats, shrink, expand, delta, wgrad_workspace_floats, wgrad, backward, narrow_ids,
  };
  return backend;
}

}  // namespace mote
