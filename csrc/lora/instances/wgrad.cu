// wgrad and sum_chunks for every element type: which kernel, on which grid.
#include "lora/launch.h"
#include "lora/wgrad.cuh"

namespace mote {
namespace {

template <typename Scalar, int kRankBlocks>
void start_wgrad_mma(const WgradTask& task, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(task.num_wide, kWgradColumns)), task.num_chunks,
                  ceil_div(task.rank, kRankBlocks * 16));
  launch(wgrad_mma<Scalar, kRankBlocks>, grid, kThreads, WgradShape<kRankBlocks>::kSharedBytes, stream, task);
}

template <typename Scalar>
void start_wgrad(const WgradTask& task, Stream stream) {
  if constexpr (sizeof(Scalar) == 2) {
    if (wgrad_uses_mma(task)) {
      switch (wgrad_ranks_per_block(task)) {
        case 16: return start_wgrad_mma<Scalar, 1>(task, stream);
        case 32: return start_wgrad_mma<Scalar, 2>(task, stream);
        default: return start_wgrad_mma<Scalar, 4>(task, stream);
      }
    }
  }
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(task.num_wide, kPlainWide)), task.num_chunks,
                  ceil_div(task.rank, kPlainRanks));
  launch(wgrad_plain<Scalar>, grid, kThreads, kWgradPlainSharedBytes, stream, task);
}

template <typename Scalar>
void start_sum_chunks(const WgradTask& task, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(task.num_wide, kSumTile)),
                  task.num_experts() * ceil_div(task.rank, kSumTile));
  launch(sum_chunks<Scalar>, grid, kThreads, kSumChunksSharedBytes, stream, task);
}

}  // namespace

void launch_wgrad(const WgradTask& task, Stream stream) {
  with_scalar(task.dtype, [&](auto scalar) { start_wgrad<decltype(scalar)>(task, stream); });
  with_scalar(task.grad_dtype, [&](auto scalar) { start_sum_chunks<decltype(scalar)>(task, stream); });
}

}  // namespace mote
