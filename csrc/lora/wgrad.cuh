// wgrad: grad[e] = Σ_t narrow[t, half(e)]ᵀ · wide[t] over the tokens t of expert e; gives dA (dz, x) and dB (z, dY).
//
// One block takes a stretch of columns of `wide`, a chunk of tokens and a group of ranks. It visits the stages present
// in its chunk one after the other; in a visit it goes through the tiles of tokens that hold the stage, and adds the
// stage's tokens to the stage's sums and to the shared expert's sums at once, so that where tokens come in runs `wide`
// is read once. Tokens are the reduced dimension here, so the rows of other stages are replaced by zeros in BOTH
// operands while they are loaded (0 · Inf would leak). A block's sums go to its own place in the workspace, and
// sum_chunks adds the chunks in order and writes zeros for an expert without tokens: no atomics, the same bits every
// time. Launched by instances/wgrad.cu; the sizes are chosen in tiles.h.
#pragma once

#include "lora/stage_tile.cuh"
#include "lora/tiles.h"

namespace mote {

struct TokenRange {
  int64_t begin, end;
};

__device__ __forceinline__ TokenRange token_range(const WgradTask& p) {
  const int64_t begin = blockIdx.y * p.tokens_per_chunk;
  return {begin, smaller(begin + p.tokens_per_chunk, p.num_tokens)};
}

// The ids whose tokens add to a gradient and that a chunk holds: its stages, and whether SHARED_ONLY is among them.
struct ChunkIds {
  uint64_t present;
  bool shared_only;

  // Takes the next one: the stages in order, then SHARED_ONLY.
  __device__ __forceinline__ bool take(int32_t& id) {
    if (present == 0 && !shared_only) return false;
    id = present != 0 ? lowest_bit64(present) : kSharedOnly;
    shared_only = present != 0 && shared_only;
    present &= present - 1;
    return true;
  }
};

// Every warp finds them for itself.
__device__ __forceinline__ ChunkIds ids_of_chunk(const WgradTask& p, TokenRange tokens) {
  uint32_t low = 0, high = 0, shared_only = 0;
  for (int64_t token = tokens.begin + threadIdx.x % 32; token < tokens.end; token += 32) {
    const int32_t id = p.stage_ids[token];
    if (is_stage(id, p.num_stages)) (id < 32 ? low : high) |= 1u << (id % 32);
    if (p.shared && id == kSharedOnly) shared_only = 1;
  }
  return {uint64_t{warp_or(high)} << 32 | warp_or(low), warp_or(shared_only) != 0};
}

// The first tile at or after `tile` with a token of this id, or num_tiles. The same answer in every warp.
template <int kTileTokens>
__device__ __forceinline__ int next_tile(const WgradTask& p, TokenRange tokens, int tile, int num_tiles, int32_t id) {
  for (; tile < num_tiles; ++tile) {
    uint32_t found = 0;
    for (int row = threadIdx.x % 32; row < kTileTokens; row += 32) {
      const int64_t token = tokens.begin + int64_t{tile} * kTileTokens + row;
      if (token < tokens.end && p.stage_ids[token] == id) found = 1;
    }
    if (warp_or(found)) break;
  }
  return tile;
}

__device__ __forceinline__ float* sums_of(const WgradTask& p, int expert) {
  return p.sums() + (int64_t{blockIdx.y} * p.num_experts() + expert) * p.rank * p.num_wide;
}

__device__ __forceinline__ void keep_present(const WgradTask& p, ChunkIds ids) {
  if (blockIdx.x == 0 && blockIdx.z == 0 && threadIdx.x == 0) p.present()[blockIdx.y] = ids.present;
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

inline constexpr int kWgradRing = 3;

// kRankBlocks blocks of 16 ranks, for the stage and for the shared expert: the sizes of one stage of the ring.
template <int kRankBlocks>
struct WgradShape {
  static constexpr int kTileTokens = kRankBlocks == 4 ? 32 : 64;
  static constexpr int kRanks = kRankBlocks * 16;
  static constexpr int kNarrowStride = 2 * kRanks + 8;  // an odd number of 16-byte pieces: ldmatrix without conflicts
  static constexpr int kWideStride = kWgradColumns + 8;
  static constexpr int kNarrowElements = kTileTokens * kNarrowStride;
  static constexpr int kStageElements = kNarrowElements + kTileTokens * kWideStride;
  static constexpr size_t kSharedBytes = size_t{kWgradRing} * kStageElements * 2;
};

// The tile's rows of `wide` and of both halves of `narrow`; rows of tokens with another id are zeros.
template <typename Scalar, int kRankBlocks>
__device__ __forceinline__ void load_wgrad_stage(const WgradTask& p, Scalar* stage, int64_t first_token,
                                                 int64_t token_end, int32_t id) {
  using Shape = WgradShape<kRankBlocks>;
  const Scalar* narrow = static_cast<const Scalar*>(p.narrow);
  const Scalar* wide = static_cast<const Scalar*>(p.wide);
  const int first_rank = blockIdx.z * Shape::kRanks;
  constexpr int kNarrowPieces = 2 * Shape::kRanks / 8, kWidePieces = kWgradColumns / 8;
  for (int i = threadIdx.x; i < Shape::kTileTokens * kNarrowPieces; i += kThreads) {
    const int row = i / kNarrowPieces, column = i % kNarrowPieces * 8;
    const int half = column / Shape::kRanks, rank_index = first_rank + column % Shape::kRanks;
    const int64_t token = first_token + row;
    const bool has_half = half == 0 || p.shared;
    const bool valid = token < token_end && rank_index < p.rank && has_half && p.stage_ids[token] == id;
    cp_async_16(stage + row * Shape::kNarrowStride + column,
                valid ? narrow + token * p.narrow_width() + half * p.rank + rank_index : narrow, valid);
  }
  Scalar* wide_stage = stage + Shape::kNarrowElements;
  for (int i = threadIdx.x; i < Shape::kTileTokens * kWidePieces; i += kThreads) {
    const int row = i / kWidePieces;
    const int64_t token = first_token + row, column = int64_t{blockIdx.x} * kWgradColumns + i % kWidePieces * 8;
    const bool valid = token < token_end && column < p.num_wide && p.stage_ids[token] == id;
    cp_async_16(wide_stage + row * Shape::kWideStride + i % kWidePieces * 8,
                valid ? wide + token * p.wide_row_stride + column : wide, valid);
  }
}

// Adds one stage of the ring to both experts' sums. A warp takes 32 columns and all ranks.
template <typename Scalar, int kRankBlocks>
__device__ __forceinline__ void multiply_wgrad_stage(const Scalar* stage, float (&stage_sums)[kRankBlocks][4][4],
                                                     float (&shared_sums)[kRankBlocks][4][4]) {
  using Shape = WgradShape<kRankBlocks>;
  const int lane = threadIdx.x % 32, warp_column = threadIdx.x / 32 * 32;
  const Scalar* wide = stage + Shape::kNarrowElements + warp_column;
#pragma unroll
  for (int slice = 0; slice < Shape::kTileTokens / 16; ++slice) {
    uint32_t b[2][4];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int row = slice * 16 + lane / 8 % 2 * 8 + lane % 8;
      ldmatrix_x4_trans(b[block], wide + row * Shape::kWideStride + block * 16 + lane / 16 * 8);
    }
#pragma unroll
    for (int rank_block = 0; rank_block < 2 * kRankBlocks; ++rank_block) {
      uint32_t a[4];
      const int row = slice * 16 + lane / 16 * 8 + lane % 8;
      ldmatrix_x4_trans(a, stage + row * Shape::kNarrowStride + rank_block * 16 + lane / 8 % 2 * 8);
      auto& sums = rank_block < kRankBlocks ? stage_sums[rank_block] : shared_sums[rank_block - kRankBlocks];
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        mma_m16n8k16<Scalar>(sums[block], a, b[block / 2][block % 2 * 2], b[block / 2][block % 2 * 2 + 1]);
      }
    }
  }
}

template <int kRankBlocks>
__device__ __forceinline__ void put_sums(const WgradTask& p, int expert, const float (&sums)[kRankBlocks][4][4]) {
  const int lane = threadIdx.x % 32;
  const int64_t first_column = int64_t{blockIdx.x} * kWgradColumns + threadIdx.x / 32 * 32 + lane % 4 * 2;
  const int first_rank = blockIdx.z * kRankBlocks * 16 + lane / 4;
  float* out = sums_of(p, expert);
#pragma unroll
  for (int i = 0; i < kRankBlocks * 16; ++i) {
    const int rank_index = first_rank + i / 16 * 16 + i % 4 / 2 * 8;
    const int64_t column = first_column + i / 4 % 4 * 8 + i % 2;
    if (rank_index < p.rank && column < p.num_wide)
      out[rank_index * p.num_wide + column] = sums[i / 16][i / 4 % 4][i % 4];
  }
}

template <typename Scalar, int kRankBlocks>
__global__ void __launch_bounds__(kThreads) wgrad_mma(WgradTask p) {
  using Shape = WgradShape<kRankBlocks>;
  MOTE_SHARED(memory);
  Scalar* ring = reinterpret_cast<Scalar*>(memory);
  const TokenRange tokens = token_range(p);
  ChunkIds ids = ids_of_chunk(p, tokens);
  const int num_tiles = static_cast<int>(ceil_div<int64_t>(tokens.end - tokens.begin, Shape::kTileTokens));
  keep_present(p, ids);

  float shared_sums[kRankBlocks][4][4] = {};
  for (int32_t id; ids.take(id);) {
    float stage_sums[kRankBlocks][4][4] = {};
    int tile = next_tile<Shape::kTileTokens>(p, tokens, 0, num_tiles, id);
    int loaded = 0;
    const auto load = [&] {
      if (tile < num_tiles) {
        load_wgrad_stage<Scalar, kRankBlocks>(p, ring + loaded % kWgradRing * Shape::kStageElements,
                                              tokens.begin + int64_t{tile} * Shape::kTileTokens, tokens.end, id);
        ++loaded;
        tile = next_tile<Shape::kTileTokens>(p, tokens, tile + 1, num_tiles, id);
      }
      cp_async_commit();
    };
    __syncthreads();  // the visit before has been read from the ring
    for (int i = 0; i < kWgradRing - 1; ++i) load();
    for (int done = 0; done < loaded; ++done) {
      cp_async_wait<kWgradRing - 2>();
      __syncthreads();
      load();
      multiply_wgrad_stage<Scalar, kRankBlocks>(ring + done % kWgradRing * Shape::kStageElements, stage_sums,
                                                shared_sums);
    }
    if (id >= 0) put_sums<kRankBlocks>(p, id, stage_sums);
  }
  if (p.shared) put_sums<kRankBlocks>(p, p.num_stages, shared_sums);
}

// ---- any alignment, any type ----------------------------------------------------------------------------------------

inline constexpr int kPlainTokens = 16, kPlainRanks = 16, kPlainWide = 64;
inline constexpr size_t kWgradPlainSharedBytes = kPlainTokens * (2 * kPlainRanks + kPlainWide) * sizeof(float);

template <typename Scalar>
__device__ __forceinline__ void load_wgrad_plain(const WgradTask& p, float* narrow_tile, float* wide_tile,
                                                 int64_t first_token, int64_t token_end, int32_t id) {
  const Scalar* narrow = static_cast<const Scalar*>(p.narrow);
  const Scalar* wide = static_cast<const Scalar*>(p.wide);
  for (int i = threadIdx.x; i < kPlainTokens * 2 * kPlainRanks; i += kThreads) {
    const int64_t token = first_token + i / (2 * kPlainRanks);
    const int half = i / kPlainRanks % 2, rank_index = blockIdx.z * kPlainRanks + i % kPlainRanks;
    const bool has_half = half == 0 || p.shared;
    const bool valid = token < token_end && rank_index < p.rank && has_half && p.stage_ids[token] == id;
    narrow_tile[i] = valid ? to_float(narrow[token * p.narrow_width() + half * p.rank + rank_index]) : 0.f;
  }
  for (int i = threadIdx.x; i < kPlainTokens * kPlainWide; i += kThreads) {
    const int64_t token = first_token + i / kPlainWide, column = int64_t{blockIdx.x} * kPlainWide + i % kPlainWide;
    const bool valid = token < token_end && column < p.num_wide && p.stage_ids[token] == id;
    wide_tile[i] = valid ? to_float(wide[token * p.wide_row_stride + column]) : 0.f;
  }
}

// A thread's share of a block's sums: ranks rank0 + 8 i, columns column0 + 16 j.
struct PlainSums {
  float values[2][4];
};

__device__ __forceinline__ void multiply_wgrad_plain(const float* narrow_tile, const float* wide_tile, int half,
                                                     PlainSums& sums) {
  const int rank0 = threadIdx.x / 16, column0 = threadIdx.x % 16;
  for (int row = 0; row < kPlainTokens; ++row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = narrow_tile[(row * 2 + half) * kPlainRanks + rank0 + 8 * i];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.values[i][j] += value * wide_tile[row * kPlainWide + column0 + 16 * j];
    }
  }
}

__device__ __forceinline__ void put_plain_sums(const WgradTask& p, int expert, const PlainSums& sums) {
  float* out = sums_of(p, expert);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int rank_index = blockIdx.z * kPlainRanks + threadIdx.x / 16 + 8 * i;
      const int64_t column = int64_t{blockIdx.x} * kPlainWide + threadIdx.x % 16 + 16 * j;
      if (rank_index < p.rank && column < p.num_wide) out[rank_index * p.num_wide + column] = sums.values[i][j];
    }
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) wgrad_plain(WgradTask p) {
  MOTE_SHARED(memory);
  float* narrow_tile = reinterpret_cast<float*>(memory);
  float* wide_tile = narrow_tile + kPlainTokens * 2 * kPlainRanks;
  const TokenRange tokens = token_range(p);
  ChunkIds ids = ids_of_chunk(p, tokens);
  const int num_tiles = static_cast<int>(ceil_div<int64_t>(tokens.end - tokens.begin, kPlainTokens));
  keep_present(p, ids);

  PlainSums shared_sums = {};
  for (int32_t id; ids.take(id);) {
    PlainSums stage_sums = {};
    for (int tile = next_tile<kPlainTokens>(p, tokens, 0, num_tiles, id); tile < num_tiles;
         tile = next_tile<kPlainTokens>(p, tokens, tile + 1, num_tiles, id)) {
      load_wgrad_plain<Scalar>(p, narrow_tile, wide_tile, tokens.begin + int64_t{tile} * kPlainTokens, tokens.end, id);
      __syncthreads();
      multiply_wgrad_plain(narrow_tile, wide_tile, 0, stage_sums);
      multiply_wgrad_plain(narrow_tile, wide_tile, 1, shared_sums);
      __syncthreads();
    }
    if (id >= 0) put_plain_sums(p, id, stage_sums);
  }
  if (p.shared) put_plain_sums(p, p.num_stages, shared_sums);
}

// ---- the chunks' sums, added in order -------------------------------------------------------------------------------

inline constexpr int kSumTile = 32;  // ranks and columns of a block
inline constexpr size_t kSumChunksSharedBytes = kSumTile * (kSumTile + 1) * sizeof(float);

// Through shared memory, so that both the reading along D and the writing along D or r is coalesced.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads) sum_chunks(WgradTask p) {
  MOTE_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  const int groups = ceil_div(p.rank, kSumTile);
  const int64_t expert = blockIdx.y / groups;
  const int first_rank = blockIdx.y % groups * kSumTile;
  const int64_t first_column = int64_t{blockIdx.x} * kSumTile;
  const int64_t expert_floats = int64_t{p.rank} * p.num_wide;
  for (int i = threadIdx.x; i < kSumTile * kSumTile; i += kThreads) {
    const int rank_index = first_rank + i / kSumTile;
    const int64_t column = first_column + i % kSumTile;
    float sum = 0.f;
    if (rank_index < p.rank && column < p.num_wide) {
      for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
        const bool present = expert == p.num_stages || (p.present()[chunk] >> expert & 1);
        if (present) {
          sum += p.sums()[(chunk * p.num_experts() + expert) * expert_floats + rank_index * p.num_wide + column];
        }
      }
    }
    tile[i / kSumTile * (kSumTile + 1) + i % kSumTile] = sum;
  }
  __syncthreads();
  Scalar* grad = static_cast<Scalar*>(p.grad) + expert * expert_floats;
  for (int i = threadIdx.x; i < kSumTile * kSumTile; i += kThreads) {
    const int row = i / kSumTile, column = i % kSumTile;
    const int rank_index = first_rank + (p.transposed ? column : row);
    const int64_t wide_index = first_column + (p.transposed ? row : column);
    if (rank_index < p.rank && wide_index < p.num_wide) {
      const float sum = tile[(p.transposed ? column : row) * (kSumTile + 1) + (p.transposed ? row : column)];
      const int64_t place = p.transposed ? wide_index * p.rank + rank_index : rank_index * p.num_wide + wide_index;
      grad[place] = round_to<Scalar>(sum);
    }
  }
}

}  // namespace mote
