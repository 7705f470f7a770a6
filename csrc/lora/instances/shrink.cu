// shrink and finish_z for every element type: which kernel, on which grid.
#include "lora/launch.h"
#include "lora/shrink.cuh"

namespace mote {
namespace {

template <typename Scalar, int kTileRows>
void start_shrink(const ShrinkTask& task, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(task.num_tokens, kTileRows)), task.num_splits);
  if constexpr (sizeof(Scalar) == 2) {
    if (shrink_uses_mma(task)) {
      launch(shrink_mma<Scalar, kTileRows>, grid, kThreads, shrink_mma_shared_bytes(task, kTileRows), stream, task);
      return;
    }
  }
  launch(shrink_plain<Scalar, kTileRows>, grid, kThreads, shrink_plain_shared_bytes(kTileRows), stream, task);
}

template <typename Scalar>
void start_finish_z(const ShrinkTask& task, Stream stream) {
  const int64_t elements = task.num_tokens * task.z_width();
  launch(finish_z<Scalar>, dim3(static_cast<unsigned>(ceil_div<int64_t>(elements, kThreads))), kThreads, 0, stream,
         task);
}

}  // namespace

void launch_shrink(const ShrinkTask& task, Stream stream) {
  with_scalar(task.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    tile_rows(task.num_tokens) == 16 ? start_shrink<Scalar, 16>(task, stream) : start_shrink<Scalar, 64>(task, stream);
  });
}

void launch_finish_z(const ShrinkTask& task, Stream stream) {
  with_scalar(task.dtype, [&](auto scalar) { start_finish_z<decltype(scalar)>(task, stream); });
}

}  // namespace mote
