// shrink: z[t] = scale[e] · x[t] · A[e]ᵀ for the experts e of token t; K -> r, so the time is that of reading x once.
//
// One block takes a tile of rows and one split of K, and computes the columns of all slots of its tile in groups that
// fit the accumulators: r columns a slot, the slots being the stages present and the shared expert. shrink_mma (16-bit
// types, aligned rows) streams x and A through a ring of cp.async stages into mma.sync; shrink_plain takes everything
// else, and fp32 always (plain FMA, never TF32). With one split the block writes z; with more it writes fp32 planes
// [splits, T, halves·r], which finished_z() sums in order: in finish_z, or in the expand that consumes them.
// Launched by instances/shrink.cu; the sizes are chosen in tiles.h.
#pragma once

#include "lora/stage_tile.cuh"
#include "lora/tiles.h"

namespace mote {

struct InRange {
  int64_t begin, end;
};

// The part of K that this block sums over.
__device__ __forceinline__ InRange in_range(const ShrinkTask& p) {
  const int64_t begin = blockIdx.y * p.in_per_split;
  return {begin, smaller(begin + p.in_per_split, p.num_in)};
}

// Takes the sum for one element: rounds it into z, or leaves it in this split's plane.
template <typename Scalar>
__device__ __forceinline__ void put_z(const ShrinkTask& p, int64_t token, int expert, int rank_index, float sum) {
  const int half = expert == p.num_stages ? 1 : 0;
  const int64_t column = half * p.rank + rank_index;
  if (p.num_splits == 1) {
    static_cast<Scalar*>(p.z)[token * p.z_width() + column] = round_to<Scalar>(p.scales[expert] * sum);
  } else {
    p.workspace[(blockIdx.y * p.num_tokens + token) * p.z_width() + column] = sum;
  }
}

// Writes zero, or NaN into the row of an illegal id; where an expert is active it is overwritten. Planes need neither.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void clear_z(const ShrinkTask& p, const TileHeader* header, int64_t first_row) {
  if (p.num_splits > 1) return;
  const int width = p.z_width();
  for (int i = threadIdx.x; i < kTileRows * width; i += kThreads) {
    const int64_t token = first_row + i / width;
    if (token < p.num_tokens) {
      const bool legal = is_legal(header->ids[i / width], p.num_stages);
      static_cast<Scalar*>(p.z)[token * width + i % width] = round_to<Scalar>(legal ? 0.f : quiet_nan());
    }
  }
}

// The scaled sum over the planes of a split shrink, in the order of the splits; zero or NaN where no expert is active.
__device__ __forceinline__ float finished_z(const float* planes, int num_splits, const float* scales, int32_t id,
                                            int64_t token, int column, int64_t num_tokens, int rank, int num_stages,
                                            int width) {
  const int expert = expert_of_half(id, column / rank, num_stages);
  if (expert < 0) return is_legal(id, num_stages) ? 0.f : quiet_nan();
  float sum = 0.f;
  for (int split = 0; split < num_splits; ++split) sum += planes[(split * num_tokens + token) * width + column];
  return scales[expert] * sum;
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) finish_z(ShrinkTask p) {
  const int width = p.z_width();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.num_tokens * width) return;
  const int64_t token = i / width;
  const int column = static_cast<int>(i % width);
  static_cast<Scalar*>(p.z)[i] = round_to<Scalar>(finished_z(p.workspace, p.num_splits, p.scales, p.stage_ids[token],
                                                             token, column, p.num_tokens, p.rank, p.num_stages, width));
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

inline constexpr int kShrinkRing = 4;

inline size_t shrink_mma_shared_bytes(const ShrinkTask& task, int rows) {
  return kHeaderBytes + size_t{kShrinkRing} * (rows + task.group_columns) * 128;
}

// One stage of the ring: a piece of x [kTileRows, 64] and of the group's weights [columns, 64], both swizzled.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void load_shrink_stage(const ShrinkTask& p, const TileHeader* header, unsigned char* stage,
                                                  int64_t first_row, int64_t depth, int64_t depth_end,
                                                  int first_column_block, int num_column_blocks) {
  const Scalar* x = static_cast<const Scalar*>(p.x);
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  for (int i = threadIdx.x; i < kTileRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int64_t token = first_row + row, in = depth + chunk * 8;
    const bool valid = token < p.num_tokens && in < depth_end;
    cp_async_16(swizzled(stage, row, chunk), valid ? x + token * p.x_row_stride + in : x, valid);
  }
  unsigned char* weight_stage = stage + kTileRows * 128;
  const int blocks_per_slot = ceil_div(p.rank, 16);
  for (int i = threadIdx.x; i < num_column_blocks * 16 * 8; i += kThreads) {
    const int column = i / 8, chunk = i % 8;
    const int block = first_column_block + column / 16;
    const int64_t expert = header->slot_expert[block / blocks_per_slot];
    const int rank_index = block % blocks_per_slot * 16 + column % 16;
    const int64_t in = depth + chunk * 8;
    const bool valid = rank_index < p.rank && in < depth_end;
    cp_async_16(swizzled(weight_stage, column, chunk),
                valid ? weight + (expert * p.rank + rank_index) * p.num_in + in : weight, valid);
  }
}

// Multiplies one stage of the ring. A warp takes 16 rows and every kInWarps-th slice of 16 of the depth.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void multiply_shrink_stage(unsigned char* stage, int num_column_blocks,
                                                      float (&sums)[kMaxGroupColumns / 16][2][4]) {
  constexpr int kRowWarps = kTileRows / 16, kInWarps = 4 / kRowWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % kRowWarps * 16;
  unsigned char* weight_stage = stage + kTileRows * 128;
#pragma unroll
  for (int slice = warp / kRowWarps; slice < kMmaDepth / 16; slice += kInWarps) {
    uint32_t a[4];
    ldmatrix_x4(a, swizzled(stage, warp_row + lane % 16, slice * 2 + lane / 16));
#pragma unroll
    for (int block = 0; block < kMaxGroupColumns / 16; ++block) {
      if (block < num_column_blocks) {
        uint32_t b[4];
        ldmatrix_x4(b, swizzled(weight_stage, block * 16 + lane / 16 * 8 + lane % 8, slice * 2 + lane / 8 % 2));
        mma_m16n8k16<Scalar>(sums[block][0], a, b[0], b[1]);
        mma_m16n8k16<Scalar>(sums[block][1], a, b[2], b[3]);
      }
    }
  }
}

// Takes a group's accumulators: through shared memory, where the warps that split the depth are added in order, to z.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void put_group(const ShrinkTask& p, const TileHeader* header, unsigned char* ring,
                                          int64_t first_row, int first_column_block, int num_column_blocks,
                                          const float (&sums)[kMaxGroupColumns / 16][2][4]) {
  constexpr int kRowWarps = kTileRows / 16, kInWarps = 4 / kRowWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_columns = num_column_blocks * 16;
  const int stride = p.group_columns + 4;  // off the banks of the row above
  float* staged = reinterpret_cast<float*>(ring);
  float* own = staged + (warp / kRowWarps * kTileRows + warp % kRowWarps * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
  for (int block = 0; block < kMaxGroupColumns / 16; ++block) {
    if (block < num_column_blocks) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        own[(i % 4 / 2) * 8 * stride + block * 16 + i / 4 * 8 + i % 2] = sums[block][i / 4][i % 4];
    }
  }
  __syncthreads();
  const int blocks_per_slot = ceil_div(p.rank, 16);
  for (int i = threadIdx.x; i < kTileRows * num_columns; i += kThreads) {
    const int row = i / num_columns, column = i % num_columns;
    const int block = first_column_block + column / 16;
    const int expert = header->slot_expert[block / blocks_per_slot];
    const int rank_index = block % blocks_per_slot * 16 + column % 16;
    if (rank_index < p.rank && uses_expert(header->ids[row], expert, p.num_stages)) {
      float sum = staged[row * stride + column];
      for (int part = 1; part < kInWarps; ++part) sum += staged[(part * kTileRows + row) * stride + column];
      put_z<Scalar>(p, first_row + row, expert, rank_index, sum);
    }
  }
}

template <typename Scalar, int kTileRows>
__global__ void __launch_bounds__(kThreads) shrink_mma(ShrinkTask p) {
  MOTE_SHARED(memory);
  TileHeader* header = reinterpret_cast<TileHeader*>(memory);
  unsigned char* ring = memory + kHeaderBytes;
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const InRange in = in_range(p);
  const int num_slots = list_slots<kTileRows>(header, p.stage_ids, first_row, p.num_tokens, p.num_stages, p.shared);
  clear_z<Scalar, kTileRows>(p, header, first_row);

  const int stage_bytes = (kTileRows + p.group_columns) * 128;
  const int num_steps = static_cast<int>(ceil_div<int64_t>(in.end - in.begin, kMmaDepth));
  const int num_blocks = num_slots * ceil_div(p.rank, 16);
  for (int first_block = 0; first_block < num_blocks; first_block += p.group_columns / 16) {
    const int group_blocks = smaller(num_blocks - first_block, p.group_columns / 16);
    const auto load = [&](int step) {
      if (step < num_steps) {
        load_shrink_stage<Scalar, kTileRows>(p, header, ring + step % kShrinkRing * stage_bytes, first_row,
                                             in.begin + int64_t{step} * kMmaDepth, in.end, first_block, group_blocks);
      }
      cp_async_commit();
    };
    float sums[kMaxGroupColumns / 16][2][4] = {};
    if (first_block > 0) __syncthreads();  // the last group's sums have been read from the ring
    for (int step = 0; step < kShrinkRing - 1; ++step) load(step);
    for (int step = 0; step < num_steps; ++step) {
      cp_async_wait<kShrinkRing - 2>();
      __syncthreads();
      load(step + kShrinkRing - 1);
      multiply_shrink_stage<Scalar, kTileRows>(ring + step % kShrinkRing * stage_bytes, group_blocks, sums);
    }
    __syncthreads();
    put_group<Scalar, kTileRows>(p, header, ring, first_row, first_block, group_blocks, sums);
  }
}

// ---- any alignment, any type ----------------------------------------------------------------------------------------

inline constexpr int kPlainColumns = 32;  // columns of a block, and depth of a step
inline constexpr int kPlainStride = kPlainColumns + 1;

inline size_t shrink_plain_shared_bytes(int rows) {
  return kHeaderBytes + size_t(rows + kPlainColumns) * kPlainStride * sizeof(float);
}

// acc[i][j] += a row (row0 + 16 i) · b row (column0 + 8 j) over one step, both [.., 32] in shared memory.
template <int kRowsPerThread>
__device__ __forceinline__ void multiply_plain(const float* a, const float* b, float (&acc)[kRowsPerThread][4]) {
  const int row0 = threadIdx.x / 8, column0 = threadIdx.x % 8;
  for (int k = 0; k < kPlainColumns; ++k) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        acc[i][j] += a[(row0 + 16 * i) * kPlainStride + k] * b[(column0 + 8 * j) * kPlainStride + k];
      }
    }
  }
}

template <typename Scalar, int kTileRows>
__global__ void __launch_bounds__(kThreads) shrink_plain(ShrinkTask p) {
  constexpr int kRowsPerThread = kTileRows / 16;
  MOTE_SHARED(memory);
  TileHeader* header = reinterpret_cast<TileHeader*>(memory);
  float* x_tile = reinterpret_cast<float*>(memory + kHeaderBytes);
  float* weight_tile = x_tile + kTileRows * kPlainStride;
  const Scalar* x = static_cast<const Scalar*>(p.x);
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const InRange in = in_range(p);
  const int num_slots = list_slots<kTileRows>(header, p.stage_ids, first_row, p.num_tokens, p.num_stages, p.shared);
  clear_z<Scalar, kTileRows>(p, header, first_row);

  const int num_columns = num_slots * p.rank;
  for (int first_column = 0; first_column < num_columns; first_column += kPlainColumns) {
    float sums[kRowsPerThread][4] = {};
    for (int64_t depth = in.begin; depth < in.end; depth += kPlainColumns) {
      for (int i = threadIdx.x; i < kTileRows * kPlainColumns; i += kThreads) {
        const int row = i / kPlainColumns, k = i % kPlainColumns;
        const int64_t token = first_row + row;
        const bool valid = token < p.num_tokens && depth + k < in.end;
        x_tile[row * kPlainStride + k] = valid ? to_float(x[token * p.x_row_stride + depth + k]) : 0.f;
      }
      for (int i = threadIdx.x; i < kPlainColumns * kPlainColumns; i += kThreads) {
        const int column = first_column + i / kPlainColumns, k = i % kPlainColumns;
        const bool valid = column < num_columns && depth + k < in.end;
        const int64_t expert = valid ? header->slot_expert[column / p.rank] : 0;
        weight_tile[i / kPlainColumns * kPlainStride + k] =
            valid ? to_float(weight[(expert * p.rank + column % p.rank) * p.num_in + depth + k]) : 0.f;
      }
      __syncthreads();
      multiply_plain<kRowsPerThread>(x_tile, weight_tile, sums);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = threadIdx.x / 8 + 16 * i, column = first_column + threadIdx.x % 8 + 8 * j;
        if (column >= num_columns) continue;
        const int expert = header->slot_expert[column / p.rank];
        if (uses_expert(header->ids[row], expert, p.num_stages)) {
          put_z<Scalar>(p, first_row + row, expert, column % p.rank, sums[i][j]);
        }
      }
    }
  }
}

}  // namespace mote
