// expand for every element type: which kernel, on which grid.
#include "lora/expand.cuh"
#include "lora/launch.h"

namespace mote {
namespace {

template <typename Scalar, int kTileRows>
void start_expand(const ExpandTask& task, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(task.num_tokens, kTileRows)),
                  static_cast<unsigned>(ceil_div(task.num_out, task.out_per_block)));
  if constexpr (sizeof(Scalar) == 2) {
    if (expand_uses_mma(task)) {
      launch(expand_mma<Scalar, kTileRows>, grid, kThreads, expand_mma_shared_bytes(task, kTileRows), stream, task);
      return;
    }
  }
  launch(expand_plain<Scalar, kTileRows>, grid, kThreads, expand_plain_shared_bytes(kTileRows), stream, task);
}

}  // namespace

void launch_expand(const ExpandTask& task, Stream stream) {
  with_scalar(task.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    tile_rows(task.num_tokens) == 16 ? start_expand<Scalar, 16>(task, stream) : start_expand<Scalar, 64>(task, stream);
  });
}

}  // namespace mote
