// Which experts the tokens of a tile need, found from the ids alone: no sorting, no counts, nothing made on the host.
//
// A kernel's block reads the ids of its tile, gets the stages present as the bits of one word, and lists them as slots:
// slot i is the i-th stage present, the last slot is the shared expert when a token of the tile uses it. Work is done
// for each slot over all rows of the tile, and rows are selected on the accumulators when a result is taken: never
// multiplied by zero, since 0 · Inf would carry one expert's Inf into another expert's tokens.
#pragma once

#include "lora/intrinsics.cuh"

namespace mote {

inline constexpr int kThreads = 128;
inline constexpr int kMaxTileRows = 64;

__device__ __forceinline__ bool is_stage(int32_t id, int num_stages) {
  return static_cast<uint32_t>(id) < static_cast<uint32_t>(num_stages);
}

__device__ __forceinline__ bool uses_shared(int32_t id, int num_stages) {
  return id == kSharedOnly || is_stage(id, num_stages);
}

__device__ __forceinline__ bool is_legal(int32_t id, int num_stages) {
  return id == kBaseOnly || uses_shared(id, num_stages);
}

// Expert S is the shared one; it exists only where the problem says so.
__device__ __forceinline__ bool uses_expert(int32_t id, int expert, int num_stages) {
  return expert == num_stages ? uses_shared(id, num_stages) : id == expert;
}

// Which expert fills column `column` of this token's row of z, or -1 when that half is not active.
__device__ __forceinline__ int expert_of_half(int32_t id, int half, int num_stages) {
  if (half == 1) return uses_shared(id, num_stages) ? num_stages : -1;
  return is_stage(id, num_stages) ? id : -1;
}

// In shared memory, at the start of a block's dynamic part.
struct TileHeader {
  int32_t ids[kMaxTileRows];
  int32_t slot_expert[kMaxStages + 1];
};

inline constexpr int kHeaderBytes = 640;  // TileHeader, rounded up so that what follows is 128-byte aligned
static_assert(sizeof(TileHeader) <= kHeaderBytes);

// Reads the tile's ids into the header and lists its slots; returns how many. Ends with a barrier. Rows beyond the last
// token count as BASE_ONLY, so that no expert's sum is taken for them.
template <int kTileRows>
__device__ __forceinline__ int list_slots(TileHeader* header, const int32_t* stage_ids, int64_t first_row,
                                          int64_t num_tokens, int num_stages, bool shared) {
  const int thread = threadIdx.x;
  if (thread < kTileRows) {
    const int64_t token = first_row + thread;
    header->ids[thread] = token < num_tokens ? stage_ids[token] : kBaseOnly;
  }
  __syncthreads();
  uint32_t low = 0, high = 0, any_shared = 0;
  for (int row = thread % 32; row < kTileRows; row += 32) {
    const int32_t id = header->ids[row];
    if (is_stage(id, num_stages)) (id < 32 ? low : high) |= 1u << (id % 32);
    if (shared && uses_shared(id, num_stages)) any_shared = 1;
  }
  const uint64_t present = uint64_t{warp_or(high)} << 32 | warp_or(low);
  const int num_present = popcount64(present);
  any_shared = warp_or(any_shared);
  if (thread < num_stages && (present >> thread & 1)) {
    header->slot_expert[popcount64(present & ((uint64_t{1} << thread) - 1))] = thread;
  }
  if (thread == 0) header->slot_expert[num_present] = num_stages;
  __syncthreads();
  return num_present + static_cast<int>(any_shared);
}

// The 16-byte piece `chunk` of row `row` of a tile with rows of 128 bytes. The XOR spreads a column of pieces over all
// banks, so that ldmatrix and the 16-byte stores are free of conflicts.
__device__ __forceinline__ unsigned char* swizzled(unsigned char* tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}

}  // namespace mote
