// Problem -> kernel, tile and grid: the only place where sizes are chosen, on the host, from shapes and alignment
// alone.
//
// The number of splits never depends on the device, so that the same input gives the same bits on every card. 264
// blocks are two for each of the 132 multiprocessors of an H100; a smaller card runs them in more waves.
#pragma once

#include "core/math.h"
#include "lora/lora.h"

namespace mote {

inline constexpr int kWantedBlocks = 264;
inline constexpr int64_t kMaxGridY = 65535;
inline constexpr int kMmaDepth = 64;           // K of one pipeline stage: 128 bytes of a 16-bit type
inline constexpr int kMaxGroupColumns = 128;   // columns whose accumulators fit: 64 registers a thread
inline constexpr int kMaxMmaExpandRank = 128;  // z of 64 rows and the ring then fit the 99 KB of sm_86, sm_89, sm_120
inline constexpr int kExpandColumns = 64;      // columns a block computes in one step
inline constexpr int kMaxFinishTokens = 64;    // up to here the expand sums the planes of a split shrink itself
inline constexpr int kWgradColumns = 128;
inline constexpr int64_t kMaxWgradWorkspaceFloats = int64_t{64} << 20;

// What each kernel is given: the problem, and what was chosen for it.
struct ShrinkTask : ShrinkParams {
  int num_splits;
  int64_t in_per_split;  // a multiple of kMmaDepth
  int group_columns;     // columns computed at once, a multiple of 16

  MOTE_HOST_DEVICE int z_width() const { return (shared ? 2 : 1) * rank; }
};

struct ExpandTask : ExpandParams {
  int64_t out_per_block;  // a multiple of kExpandColumns
  // A shrink whose planes are summed here; planes is null when z is finished already.
  const float* planes;  // [num_splits, T, halves * r]
  int num_splits;
  const float* scales;
  void* finished_z;  // [T, halves * r], out; written by the first column of blocks

  MOTE_HOST_DEVICE int z_width() const { return (shared ? 2 : 1) * rank; }
};

struct WgradTask : WgradParams {
  int num_chunks;
  int64_t tokens_per_chunk;  // a multiple of 64

  MOTE_HOST_DEVICE int num_experts() const { return num_stages + (shared ? 1 : 0); }
  MOTE_HOST_DEVICE int narrow_width() const { return (shared ? 2 : 1) * rank; }
  // The workspace: for each chunk the stages it holds, then [chunks, E, r, D] sums.
  MOTE_HOST_DEVICE uint64_t* present() const { return reinterpret_cast<uint64_t*>(workspace); }
  MOTE_HOST_DEVICE float* sums() const { return workspace + 2 * num_chunks; }
};

inline bool is_16_bit(DType dtype) { return dtype == DType::kF16 || dtype == DType::kBF16; }

// Rows of 16-bit elements that can be read in pieces of 16 bytes.
inline bool aligned_rows(const void* pointer, int64_t row_stride, int64_t num_columns) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride % 8 == 0 && num_columns % 8 == 0;
}

inline int tile_rows(int64_t num_tokens) { return num_tokens <= 64 ? 16 : 64; }

inline bool shrink_uses_mma(const ShrinkParams& p) {
  return is_16_bit(p.dtype) && aligned_rows(p.x, p.x_row_stride, p.num_in) &&
         aligned_rows(p.weight, p.num_in, p.num_in);
}

inline ShrinkTask choose_shrink(const ShrinkParams& p) {
  ShrinkTask task{p};
  const int64_t row_tiles = ceil_div<int64_t>(p.num_tokens, tile_rows(p.num_tokens));
  const int64_t most_splits = p.num_tokens <= 16 ? 32 : 16;
  const int64_t depth_steps = ceil_div<int64_t>(p.num_in, kMmaDepth);
  const int64_t splits =
      smaller(smaller(most_splits, depth_steps), larger<int64_t>(1, kWantedBlocks / larger<int64_t>(1, row_tiles)));
  task.in_per_split = ceil_div(depth_steps, splits) * kMmaDepth;
  task.num_splits = static_cast<int>(ceil_div<int64_t>(p.num_in, task.in_per_split));
  const int most_slots = smaller(p.num_stages, tile_rows(p.num_tokens)) + (p.shared ? 1 : 0);
  task.group_columns = smaller(kMaxGroupColumns, larger(1, most_slots) * round_up(p.rank, 16));
  return task;
}

inline int64_t shrink_workspace(const ShrinkTask& task) {
  return task.num_splits == 1 ? 0 : task.num_splits * task.num_tokens * task.z_width();
}

inline bool expand_uses_mma(const ExpandParams& p) {
  return is_16_bit(p.dtype) && p.rank % 8 == 0 && p.rank <= kMaxMmaExpandRank && aligned_rows(p.z, 8, 8) &&
         aligned_rows(p.weight, p.rank, p.rank) && aligned_rows(p.y, p.y_row_stride, p.num_out) &&
         (p.bias == nullptr || aligned_rows(p.bias, 8, 8)) &&
         (p.addend == nullptr || aligned_rows(p.addend, p.addend_row_stride, p.num_out));
}

inline ExpandTask choose_expand(const ExpandParams& p) {
  ExpandTask task{p};
  const int64_t row_tiles = ceil_div<int64_t>(p.num_tokens, tile_rows(p.num_tokens));
  const int64_t steps = ceil_div<int64_t>(p.num_out, kExpandColumns);
  // Eight steps a block amortise the reading of z; fewer when there would be too few blocks to fill the card.
  const int64_t wanted = larger<int64_t>(1, smaller<int64_t>(8, steps * row_tiles / kWantedBlocks));
  const int64_t steps_per_block = larger(wanted, ceil_div<int64_t>(steps, kMaxGridY));
  task.out_per_block = steps_per_block * kExpandColumns;
  return task;
}

// Whether the expand that follows may sum the planes of this shrink; else finish_z does, in a launch of its own.
inline bool expand_finishes(const ShrinkTask& shrink) {
  return shrink.num_splits > 1 && shrink.num_tokens <= kMaxFinishTokens;
}

inline bool wgrad_uses_mma(const WgradParams& p) {
  return is_16_bit(p.dtype) && p.rank % 8 == 0 && aligned_rows(p.narrow, 8, 8) &&
         aligned_rows(p.wide, p.wide_row_stride, p.num_wide);
}

inline int wgrad_ranks_per_block(const WgradParams& p) { return p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : 64; }

inline WgradTask choose_wgrad(const WgradParams& p) {
  WgradTask task{p};
  const int64_t sum_floats = int64_t{task.num_experts()} * p.rank * p.num_wide;
  const int64_t blocks = ceil_div<int64_t>(p.num_wide, kWgradColumns) * ceil_div(p.rank, wgrad_ranks_per_block(p));
  int64_t chunks = smaller<int64_t>(16, ceil_div<int64_t>(kWantedBlocks, blocks));
  chunks = smaller(chunks, kMaxWgradWorkspaceFloats / larger<int64_t>(1, sum_floats));
  chunks = larger<int64_t>(1, smaller(chunks, ceil_div<int64_t>(p.num_tokens, 64)));
  task.tokens_per_chunk = round_up<int64_t>(ceil_div(p.num_tokens, chunks), 64);
  task.num_chunks =
      static_cast<int>(larger<int64_t>(1, ceil_div<int64_t>(p.num_tokens, larger<int64_t>(64, task.tokens_per_chunk))));
  return task;
}

inline int64_t wgrad_workspace(const WgradTask& task) {
  return int64_t{task.num_chunks} * (2 + int64_t{task.num_experts()} * task.rank * task.num_wide);
}

}  // namespace mote
