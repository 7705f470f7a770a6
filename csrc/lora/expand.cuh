// expand: y[t] = (bias, addend) + Σ_e z[t, half(e)] · B[e]ᵀ over the experts e of token t; r -> N, a write of y.
//
// One block takes a tile of rows and a stretch of columns. It keeps its rows of z in shared memory and goes through the
// columns in steps of 64 and, in each, through the slots of its tile: the product of every row with the slot's B is
// made in accumulators of its own, and added where the row uses that expert. expand_mma streams B through a ring of
// cp.async stages; expand_plain takes fp32 and everything unaligned. Where the shrink before it was split, z is summed
// here. Launched by instances/expand.cu; the sizes are chosen in tiles.h.
#pragma once

#include "lora/shrink.cuh"

namespace mote {

// One element of z: finished already, or the ordered sum of a split shrink, rounded as z is.
template <typename Scalar>
__device__ __forceinline__ Scalar z_element(const ExpandTask& p, int32_t id, int64_t token, int column) {
  if (p.planes == nullptr) return static_cast<const Scalar*>(p.z)[token * p.z_width() + column];
  return round_to<Scalar>(
      finished_z(p.planes, p.num_splits, p.scales, id, token, column, p.num_tokens, p.rank, p.num_stages, p.z_width()));
}

// The first column of blocks leaves the z it summed for the backward.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void keep_finished_z(const ExpandTask& p, const TileHeader* header, int64_t first_row) {
  if (p.planes == nullptr || blockIdx.y > 0) return;
  const int width = p.z_width();
  for (int i = threadIdx.x; i < kTileRows * width; i += kThreads) {
    const int64_t token = first_row + i / width;
    if (token < p.num_tokens) {
      static_cast<Scalar*>(p.finished_z)[token * width + i % width] =
          z_element<Scalar>(p, header->ids[i / width], token, i % width);
    }
  }
}

// What y[token, column] becomes: the delta with the bias and the addend, NaN for an illegal id.
template <typename Scalar>
__device__ __forceinline__ float y_element(const ExpandTask& p, int32_t id, int64_t token, int64_t column,
                                           float delta) {
  if (!is_legal(id, p.num_stages)) return quiet_nan();
  if (p.bias != nullptr) delta += to_float(static_cast<const Scalar*>(p.bias)[column]);
  if (p.addend != nullptr) {
    delta += to_float(static_cast<const Scalar*>(p.addend)[token * p.addend_row_stride + column]);
  }
  return delta;
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

inline constexpr int kExpandRing = 3;
inline constexpr int kRankStep = 64;                 // ranks of one stage of the ring
inline constexpr int kWeightStride = kRankStep + 8;  // an odd number of 16-byte pieces: ldmatrix without conflicts
inline constexpr int kWeightStageBytes = kExpandColumns * kWeightStride * 2;

MOTE_HOST_DEVICE inline int z_tile_stride(int width_16) { return width_16 + 8; }  // odd pieces, as above

// Bytes of a row tile of z whose halves are padded to a multiple of 16 ranks.
MOTE_HOST_DEVICE inline int z_tile_bytes(int rows, int halves, int rank) {
  return round_up(rows * z_tile_stride(halves * round_up(rank, 16)) * 2, 128);
}

inline size_t expand_mma_shared_bytes(const ExpandTask& task, int rows) {
  const int columns_per_warp = kExpandColumns * rows / kMaxTileRows;
  const size_t staged_bytes = size_t{4} * 16 * (columns_per_warp + 4) * sizeof(float);
  return kHeaderBytes + z_tile_bytes(rows, task.shared ? 2 : 1, task.rank) + kExpandRing * kWeightStageBytes +
         staged_bytes;
}

// The tile's rows of z, its halves padded with zero ranks: asynchronous when z is finished, summed here when it is not.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void load_z_tile(const ExpandTask& p, const TileHeader* header, Scalar* tile,
                                            int64_t first_row) {
  const int padded_rank = round_up(p.rank, 16), pieces = p.z_width() / p.rank * padded_rank / 8;
  const int stride = z_tile_stride(pieces * 8);
  for (int i = threadIdx.x; i < kTileRows * pieces; i += kThreads) {
    const int row = i / pieces, column = i % pieces * 8;
    const int half = column / padded_rank, rank_index = column % padded_rank;
    const int64_t token = first_row + row;
    const bool valid = token < p.num_tokens && rank_index < p.rank;
    const int z_column = half * p.rank + rank_index;
    Scalar* piece = tile + row * stride + column;
    if (p.planes == nullptr) {
      const Scalar* z = static_cast<const Scalar*>(p.z);
      cp_async_16(piece, valid ? z + token * p.z_width() + z_column : z, valid);
    } else {
      for (int j = 0; j < 8; ++j) {
        piece[j] = valid ? z_element<Scalar>(p, header->ids[row], token, z_column + j) : round_to<Scalar>(0.f);
      }
    }
  }
}

// One stage of the ring: 64 columns (rows of B) by up to 64 ranks of one expert.
template <typename Scalar>
__device__ __forceinline__ void load_weight_stage(const ExpandTask& p, unsigned char* stage, int64_t expert,
                                                  int64_t first_out, int first_rank) {
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  const int pieces = smaller(kRankStep, round_up(p.rank, 16) - first_rank) / 8;
  for (int i = threadIdx.x; i < kExpandColumns * pieces; i += kThreads) {
    const int column = i / pieces, rank_index = first_rank + i % pieces * 8;
    const int64_t out = first_out + column;
    const bool valid = out < p.num_out && rank_index < p.rank;
    cp_async_16(reinterpret_cast<Scalar*>(stage) + column * kWeightStride + i % pieces * 8,
                valid ? weight + (expert * p.num_out + out) * p.rank + rank_index : weight, valid);
  }
}

// product += z half · Bᵀ for one stage of the ring; a warp takes 16 rows and its own columns.
template <typename Scalar, int kColumnBlocks>
__device__ __forceinline__ void multiply_weight_stage(const Scalar* z_rows, int z_stride, const unsigned char* stage,
                                                      int first_column, int num_rank_blocks,
                                                      float (&product)[kColumnBlocks][2][4]) {
  const int lane = threadIdx.x % 32;
  const Scalar* weight = reinterpret_cast<const Scalar*>(stage);
#pragma unroll
  for (int rank_block = 0; rank_block < kRankStep / 16; ++rank_block) {
    if (rank_block < num_rank_blocks) {
      uint32_t a[4];
      ldmatrix_x4(a, z_rows + lane % 16 * z_stride + rank_block * 16 + lane / 16 * 8);
#pragma unroll
      for (int block = 0; block < kColumnBlocks; ++block) {
        uint32_t b[4];
        ldmatrix_x4(b, weight + (first_column + block * 16 + lane / 16 * 8 + lane % 8) * kWeightStride +
                           rank_block * 16 + lane / 8 % 2 * 8);
        mma_m16n8k16<Scalar>(product[block][0], a, b[0], b[1]);
        mma_m16n8k16<Scalar>(product[block][1], a, b[2], b[3]);
      }
    }
  }
}

// values += eight elements of a row of y's dtype
template <typename Scalar>
__device__ __forceinline__ void add_piece(float (&values)[8], const void* row, int64_t column) {
  uint32_t words[4];
  load_16(words, static_cast<const Scalar*>(row) + column);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] += to_float(Scalar{static_cast<uint16_t>(words[j / 2] >> j % 2 * 16)});
}

// y_element for eight columns at once.
template <typename Scalar>
__device__ __forceinline__ void put_piece(const ExpandTask& p, int32_t id, int64_t token, int64_t column,
                                          const float* delta) {
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = delta[j];
  if (p.bias != nullptr) add_piece<Scalar>(values, p.bias, column);
  if (p.addend != nullptr) add_piece<Scalar>(values, p.addend, token * p.addend_row_stride + column);
  const bool legal = is_legal(id, p.num_stages);
  uint32_t words[4] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    words[j / 2] |= uint32_t{round_to<Scalar>(legal ? values[j] : quiet_nan()).bits} << j % 2 * 16;
  }
  store_16(static_cast<Scalar*>(p.y) + token * p.y_row_stride + column, words);
}

// Writes a warp's 16 rows of one step, through its own shared memory so that the stores are 16 bytes wide.
template <typename Scalar, int kColumnBlocks>
__device__ __forceinline__ void put_y(const ExpandTask& p, const TileHeader* header, float* staged, int warp_row,
                                      int64_t first_row, int64_t first_out, const float (&delta)[kColumnBlocks][2][4]) {
  constexpr int kStride = kColumnBlocks * 16 + 4, kPieces = kColumnBlocks * 2;
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the step before has been read
#pragma unroll
  for (int block = 0; block < kColumnBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      staged[(lane / 4 + i % 4 / 2 * 8) * kStride + block * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] =
          delta[block][i / 4][i % 4];
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const int64_t token = first_row + warp_row + row, out = first_out + column;
    if (token < p.num_tokens && out < p.num_out) {
      put_piece<Scalar>(p, header->ids[warp_row + row], token, out, staged + row * kStride + column);
    }
  }
}

template <typename Scalar, int kTileRows>
__global__ void __launch_bounds__(kThreads) expand_mma(ExpandTask p) {
  constexpr int kRowWarps = kTileRows / 16, kColumnBlocks = kRowWarps;  // 64 columns over 4 / kRowWarps warps
  MOTE_SHARED(memory);
  TileHeader* header = reinterpret_cast<TileHeader*>(memory);
  const int halves = p.shared ? 2 : 1, padded_rank = round_up(p.rank, 16);
  const int z_stride = z_tile_stride(halves * padded_rank);
  Scalar* z_tile = reinterpret_cast<Scalar*>(memory + kHeaderBytes);
  unsigned char* ring = memory + kHeaderBytes + z_tile_bytes(kTileRows, halves, p.rank);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* staged =
      reinterpret_cast<float*>(ring + kExpandRing * kWeightStageBytes) + warp * 16 * (kColumnBlocks * 16 + 4);
  const int warp_row = warp % kRowWarps * 16, warp_column = warp / kRowWarps * kColumnBlocks * 16;

  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t out_begin = blockIdx.y * p.out_per_block;
  const int64_t out_end = smaller(out_begin + p.out_per_block, p.num_out);
  const int num_slots = list_slots<kTileRows>(header, p.stage_ids, first_row, p.num_tokens, p.num_stages, p.shared);
  if (num_slots > 0) load_z_tile<Scalar, kTileRows>(p, header, z_tile, first_row);
  keep_finished_z<Scalar, kTileRows>(p, header, first_row);

  const int rank_steps = ceil_div(p.rank, kRankStep);
  const int loads_per_step = num_slots * rank_steps;
  const int num_loads = static_cast<int>(ceil_div<int64_t>(out_end - out_begin, kExpandColumns)) * loads_per_step;
  const auto load = [&](int i) {
    if (i < num_loads) {
      const int within = i % loads_per_step;
      load_weight_stage<Scalar>(p, ring + i % kExpandRing * kWeightStageBytes, header->slot_expert[within / rank_steps],
                                out_begin + int64_t{i / loads_per_step} * kExpandColumns,
                                within % rank_steps * kRankStep);
    }
    cp_async_commit();
  };
  for (int i = 0; i < kExpandRing - 1; ++i) load(i);

  const int32_t id_above = header->ids[warp_row + lane / 4], id_below = header->ids[warp_row + lane / 4 + 8];
  int next = 0;
  for (int64_t out = out_begin; out < out_end; out += kExpandColumns) {
    float delta[kColumnBlocks][2][4] = {};
    for (int slot = 0; slot < num_slots; ++slot) {
      const int expert = header->slot_expert[slot];
      const int half = expert == p.num_stages ? 1 : 0;
      float product[kColumnBlocks][2][4] = {};
      for (int first_rank = 0; first_rank < p.rank; first_rank += kRankStep, ++next) {
        cp_async_wait<kExpandRing - 2>();
        __syncthreads();
        load(next + kExpandRing - 1);
        multiply_weight_stage<Scalar, kColumnBlocks>(z_tile + warp_row * z_stride + half * padded_rank + first_rank,
                                                     z_stride, ring + next % kExpandRing * kWeightStageBytes,
                                                     warp_column, smaller(kRankStep, padded_rank - first_rank) / 16,
                                                     product);
      }
      const bool above = uses_expert(id_above, expert, p.num_stages),
                 below = uses_expert(id_below, expert, p.num_stages);
#pragma unroll
      for (int i = 0; i < kColumnBlocks * 8; ++i) {
        if (i % 4 < 2 ? above : below) delta[i / 8][i / 4 % 2][i % 4] += product[i / 8][i / 4 % 2][i % 4];
      }
    }
    put_y<Scalar, kColumnBlocks>(p, header, staged, warp_row, first_row, out + warp_column, delta);
  }
}

// ---- any alignment, any type ----------------------------------------------------------------------------------------

inline size_t expand_plain_shared_bytes(int rows) {
  return kHeaderBytes + size_t(rows + kPlainColumns) * kPlainStride * sizeof(float);
}

// z [kTileRows, 32 ranks] and B [32 columns, 32 ranks] of one expert, zero beyond the ends.
template <typename Scalar, int kTileRows>
__device__ __forceinline__ void load_plain_step(const ExpandTask& p, const TileHeader* header, float* z_tile,
                                                float* weight_tile, int64_t first_row, int64_t first_out,
                                                int64_t expert, int first_rank) {
  const int half = expert == p.num_stages ? 1 : 0;
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  for (int i = threadIdx.x; i < kTileRows * kPlainColumns; i += kThreads) {
    const int row = i / kPlainColumns, rank_index = first_rank + i % kPlainColumns;
    const int64_t token = first_row + row;
    const bool valid = token < p.num_tokens && rank_index < p.rank;
    z_tile[row * kPlainStride + i % kPlainColumns] =
        valid ? to_float(z_element<Scalar>(p, header->ids[row], token, half * p.rank + rank_index)) : 0.f;
  }
  for (int i = threadIdx.x; i < kPlainColumns * kPlainColumns; i += kThreads) {
    const int rank_index = first_rank + i % kPlainColumns;
    const int64_t out = first_out + i / kPlainColumns;
    const bool valid = out < p.num_out && rank_index < p.rank;
    weight_tile[i / kPlainColumns * kPlainStride + i % kPlainColumns] =
        valid ? to_float(weight[(expert * p.num_out + out) * p.rank + rank_index]) : 0.f;
  }
}

template <typename Scalar, int kTileRows>
__global__ void __launch_bounds__(kThreads) expand_plain(ExpandTask p) {
  constexpr int kRowsPerThread = kTileRows / 16;
  MOTE_SHARED(memory);
  TileHeader* header = reinterpret_cast<TileHeader*>(memory);
  float* z_tile = reinterpret_cast<float*>(memory + kHeaderBytes);
  float* weight_tile = z_tile + kTileRows * kPlainStride;
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t out_begin = blockIdx.y * p.out_per_block;
  const int64_t out_end = smaller(out_begin + p.out_per_block, p.num_out);
  const int num_slots = list_slots<kTileRows>(header, p.stage_ids, first_row, p.num_tokens, p.num_stages, p.shared);
  keep_finished_z<Scalar, kTileRows>(p, header, first_row);

  for (int64_t first_out = out_begin; first_out < out_end; first_out += kPlainColumns) {
    float delta[kRowsPerThread][4] = {};
    for (int slot = 0; slot < num_slots; ++slot) {
      const int expert = header->slot_expert[slot];
      float product[kRowsPerThread][4] = {};
      for (int first_rank = 0; first_rank < p.rank; first_rank += kPlainColumns) {
        load_plain_step<Scalar, kTileRows>(p, header, z_tile, weight_tile, first_row, first_out, expert, first_rank);
        __syncthreads();
        multiply_plain<kRowsPerThread>(z_tile, weight_tile, product);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        if (!uses_expert(header->ids[threadIdx.x / 8 + 16 * i], expert, p.num_stages)) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) delta[i][j] += product[i][j];
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = threadIdx.x / 8 + 16 * i;
        const int64_t token = first_row + row, out = first_out + threadIdx.x % 8 + 8 * j;
        if (token < p.num_tokens && out < out_end) {
          static_cast<Scalar*>(p.y)[token * p.y_row_stride + out] =
              round_to<Scalar>(y_element<Scalar>(p, header->ids[row], token, out, delta[i][j]));
        }
      }
    }
  }
}

}  // namespace mote
