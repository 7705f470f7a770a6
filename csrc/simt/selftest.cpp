// Tests of the host execution itself: that it computes what a card would, and that it finds what it is there to find.
//
// The positive half holds ldmatrix and mma against the fragment tables of the PTX manual, element by element, and runs
// a small matrix product through cp.async, ldmatrix and mma under every schedule. The negative half runs kernels with
// one mistake each and demands the right complaint, or a wrong result under some schedule.
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/math.h"
#include "simt/simt.h"

namespace mote {
namespace {

constexpr int kNumSchedules = 4;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

// Small integers, so that every product and sum is exact in every type.
template <typename Scalar>
Scalar small_integer(int i) {
  return host_round<Scalar>(static_cast<float>(i * 7 % 11 - 5));
}

uint32_t pack(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

// ---- fragments, as the PTX manual has them --------------------------------------------------------------------------

template <typename Scalar>
struct MmaParams {
  const Scalar* a;  // [16, 16]
  const Scalar* b;  // [16, 8]
  float* d;         // [16, 8], added to
};

template <typename Scalar>
__global__ void one_mma(MmaParams<Scalar> p) {
  const int group = threadIdx.x / 4, quad = threadIdx.x % 4;
  Scalar a[8], b[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = quad * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a[i] = p.a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) b[i] = p.b[(quad * 2 + (i & 1) + (i < 2 ? 0 : 8)) * 8 + group];
  const uint32_t packed[4] = {pack(a[0].bits, a[1].bits), pack(a[2].bits, a[3].bits), pack(a[4].bits, a[5].bits),
                              pack(a[6].bits, a[7].bits)};
  float* own[4];
  float d[4];
  for (int i = 0; i < 4; ++i) own[i] = p.d + (i < 2 ? group : group + 8) * 8 + quad * 2 + (i & 1);
  for (int i = 0; i < 4; ++i) d[i] = *own[i];
  mma_m16n8k16<Scalar>(d, packed, pack(b[0].bits, b[1].bits), pack(b[2].bits, b[3].bits));
  for (int i = 0; i < 4; ++i) *own[i] = d[i];
}

template <typename Scalar>
void mma_follows_the_manual() {
  std::vector<Scalar> a(16 * 16), b(16 * 8);
  std::vector<float> d(16 * 8, 3.f);
  for (int i = 0; i < 16 * 16; ++i) a[i] = small_integer<Scalar>(i);
  for (int i = 0; i < 16 * 8; ++i) b[i] = small_integer<Scalar>(5 * i + 2);
  launch(one_mma<Scalar>, 1, 32, 0, nullptr, MmaParams<Scalar>{a.data(), b.data(), d.data()});
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float expected = 3.f;
      for (int k = 0; k < 16; ++k) expected += host_to_float(a[row * 16 + k]) * host_to_float(b[k * 8 + column]);
      require(d[row * 8 + column] == expected, "a wrong element of the product");
    }
  }
}

struct LdmatrixParams {
  uint32_t* fragments;  // [32, 4]
  bool transposed;
};

// Matrix m has element 256 m + 16 row + column; its rows lie 48 bytes apart, backwards.
__global__ void one_ldmatrix(LdmatrixParams p) {
  MOTE_SHARED(memory);
  const int lane = threadIdx.x;
  uint16_t* row = reinterpret_cast<uint16_t*>(memory + (31 - lane) * 48);
  for (int column = 0; column < 8; ++column) {
    row[column] = static_cast<uint16_t>(256 * (lane / 8) + 16 * (lane % 8) + column);
  }
  __syncwarp();
  uint32_t fragment[4];
  p.transposed ? ldmatrix_x4_trans(fragment, row) : ldmatrix_x4(fragment, row);
  for (int i = 0; i < 4; ++i) p.fragments[lane * 4 + i] = fragment[i];
}

void ldmatrix_follows_the_manual() {
  for (const bool transposed : {false, true}) {
    std::vector<uint32_t> fragments(32 * 4);
    launch(one_ldmatrix, 1, 32, 32 * 48, nullptr, LdmatrixParams{fragments.data(), transposed});
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int along = lane / 4, across = lane % 4 * 2;
        const int step = transposed ? 16 : 1;
        const int first = 256 * matrix + (transposed ? 16 * across + along : 16 * along + across);
        const uint32_t expected = pack(static_cast<uint16_t>(first), static_cast<uint16_t>(first + step));
        require(fragments[lane * 4 + matrix] == expected, transposed ? "transposed" : "plain");
      }
    }
  }
}

struct WarpParams {
  uint32_t* results;  // [64, 3]
};

__global__ void warp_values(WarpParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* own = p.results + threadIdx.x * 3;
  own[0] = warp_or(lane == 7 || lane == 31 ? 1u << (lane + warp) % 32 : 0u);
  own[1] = warp_ballot(lane % 3 == warp);
  own[2] = static_cast<uint32_t>(warp_shuffle_xor(static_cast<float>(lane), 5));
}

void warp_operations_reach_every_lane() {
  std::vector<uint32_t> results(64 * 3);
  launch(warp_values, 1, 64, 0, nullptr, WarpParams{results.data()});
  for (uint32_t thread = 0; thread < 64; ++thread) {
    const uint32_t warp = thread / 32, *own = results.data() + thread * 3;
    require(own[0] == (1u << (7 + warp) | 1u << (31 + warp) % 32), "warp_or");
    require(own[1] == (warp == 0 ? 0x49249249u : 0x92492492u), "warp_ballot");
    require(own[2] == (thread % 32 ^ 5u), "warp_shuffle_xor");
  }
}

// ---- a matrix product, with mistakes on request ---------------------------------------------------------------------

enum class Mistake {
  kNone,
  kNoBarrierAfterWait,
  kNoBarrierBeforeReuse,
  kNoWait,
  kNeverWaited,
  kMisaligned,
  kOutsideShared
};

template <typename Scalar>
struct ProductParams {
  const Scalar* a;  // [M, stride]
  const Scalar* b;  // [N, stride]
  float* c;         // [M, N] = a · bᵀ
  int m, n, k, stride;
  Mistake mistake;
};

constexpr int kTileRows = 64, kTileColumns = 16, kDepth = 16, kRowElements = 24;
constexpr int kStageElements = (kTileRows + kTileColumns) * kRowElements;

template <typename Scalar>
void load_tiles(const ProductParams<Scalar>& p, Scalar* stage, int depth) {
  const int num_pieces = (kTileRows + kTileColumns) * kDepth / 8;
  for (int i = threadIdx.x; i < num_pieces; i += blockDim.x) {
    const int tile_row = i / 2, in = depth + i % 2 * 8;
    const bool is_a = tile_row < kTileRows;
    const int row = is_a ? blockIdx.x * kTileRows + tile_row : blockIdx.y * kTileColumns + tile_row - kTileRows;
    const bool valid = row < (is_a ? p.m : p.n) && in < p.k;
    const Scalar* source = is_a ? p.a : p.b;
    cp_async_16(stage + tile_row * kRowElements + i % 2 * 8, valid ? source + row * p.stride + in : source, valid);
  }
  cp_async_commit();
}

template <typename Scalar>
__global__ void product(ProductParams<Scalar> p) {
  MOTE_SHARED(memory);
  Scalar* ring = reinterpret_cast<Scalar*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_steps = ceil_div(p.k, kDepth);
  float sums[2][4] = {};
  load_tiles(p, ring, 0);
  for (int step = 0; step < num_steps; ++step) {
    if (step + 1 < num_steps) load_tiles(p, ring + (step + 1) % 2 * kStageElements, (step + 1) * kDepth);
    if (p.mistake != Mistake::kNoWait) step + 1 < num_steps ? cp_async_wait<1>() : cp_async_wait<0>();
    if (p.mistake != Mistake::kNoBarrierAfterWait) __syncthreads();
    const Scalar* a_tile = ring + step % 2 * kStageElements;
    const Scalar* b_tile = a_tile + kTileRows * kRowElements;
    uint32_t a[4], b[4];
    ldmatrix_x4(a, a_tile + (warp * 16 + lane % 16) * kRowElements + lane / 16 * 8);
    ldmatrix_x4(b, b_tile + (lane / 16 * 8 + lane % 8) * kRowElements + lane / 8 % 2 * 8);
    mma_m16n8k16<Scalar>(sums[0], a, b[0], b[1]);
    mma_m16n8k16<Scalar>(sums[1], a, b[2], b[3]);
    if (p.mistake != Mistake::kNoBarrierBeforeReuse) __syncthreads();
  }
  if (p.mistake == Mistake::kNoWait) cp_async_wait<0>();
  if (p.mistake == Mistake::kNeverWaited) cp_async_16(ring, p.a, true);
  if (p.mistake == Mistake::kMisaligned) cp_async_16(ring, p.a + 1, true);
  if (p.mistake == Mistake::kOutsideShared) cp_async_16(ring + 2 * kStageElements, p.a, true);
  for (int i = 0; i < 8; ++i) {
    const int row = blockIdx.x * kTileRows + warp * 16 + lane / 4 + i % 4 / 2 * 8;
    const int column = blockIdx.y * kTileColumns + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < p.m && column < p.n) p.c[row * p.n + column] = sums[i / 4][i % 4];
  }
}

// Whether the product comes out right under the schedule that is set.
template <typename Scalar>
bool product_is_right(Mistake mistake = Mistake::kNone) {
  constexpr int m = 133, n = 80, k = 257, stride = 264;
  std::vector<Scalar> a(m * stride), b(n * stride);
  for (int i = 0; i < m * stride; ++i) a[i] = i % stride < k ? small_integer<Scalar>(i) : Scalar{};
  for (int i = 0; i < n * stride; ++i) b[i] = i % stride < k ? small_integer<Scalar>(3 * i + 1) : Scalar{};
  std::vector<float> c(m * n, kNaN);
  const dim3 grid(ceil_div(m, kTileRows), ceil_div(n, kTileColumns));
  launch(product<Scalar>, grid, 128, 2 * kStageElements * sizeof(Scalar), nullptr,
         ProductParams<Scalar>{a.data(), b.data(), c.data(), m, n, k, stride, mistake});
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column < n; ++column) {
      float expected = 0.f;
      for (int i = 0; i < k; ++i)
        expected += host_to_float(a[row * stride + i]) * host_to_float(b[column * stride + i]);
      if (c[row * n + column] != expected) return false;
    }
  }
  return true;
}

template <typename Scalar>
void product_under_every_schedule() {
  for (int schedule = 0; schedule < kNumSchedules; ++schedule) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      mote_simt_configure(schedule, seed);
      require(product_is_right<Scalar>(), "wrong under schedule " + std::to_string(schedule));
    }
  }
}

void mistake_shows(Mistake mistake) {
  int num_wrong = 0;
  for (int schedule = 0; schedule < kNumSchedules; ++schedule) {
    mote_simt_configure(schedule, 1);
    num_wrong += !product_is_right<bf16>(mistake);
  }
  require(num_wrong > 0, "no schedule showed it");
}

// ---- kernels that must be refused -----------------------------------------------------------------------------------

template <typename Body>
void must_complain(const std::string& fragment, const Body& body) {
  for (int schedule = 0; schedule < kNumSchedules; ++schedule) {
    mote_simt_configure(schedule, 1);
    std::string complaint = "nothing";
    try {
      body();
    } catch (const std::runtime_error& error) {
      complaint = error.what();
    }
    require(complaint.find(fragment) != std::string::npos, "expected '" + fragment + "', got '" + complaint + "'");
  }
}

enum class Misuse { kEarlyReturn, kBarrierInOneLane, kLaneReturns, kLanesDiverge, kWriteOutside, kThrow };

struct MisuseParams {
  Misuse misuse;
};

__global__ void misuse_kernel(MisuseParams p) {
  const unsigned thread = threadIdx.x;
  switch (p.misuse) {
    case Misuse::kEarlyReturn:
      if (thread >= 32) return;
      return __syncthreads();
    case Misuse::kBarrierInOneLane:
      if (thread == 40) __syncthreads();
      return __syncwarp();
    case Misuse::kLaneReturns:
      if (thread == 5) return;
      return __syncwarp();
    case Misuse::kLanesDiverge:
      if (thread == 5) return static_cast<void>(warp_ballot(true));
      return static_cast<void>(warp_or(1));
    case Misuse::kWriteOutside: {
      MOTE_SHARED(memory);
      if (thread == 63) memory[100] = 1;
      return;
    }
    case Misuse::kThrow: throw std::runtime_error("thrown by a thread");
  }
}

void complains_of(Misuse misuse, const std::string& fragment) {
  must_complain(fragment, [&] { launch(misuse_kernel, 2, 64, 100, nullptr, MisuseParams{misuse}); });
}

void misuse_is_named() {
  complains_of(Misuse::kEarlyReturn, "deadlock: threads 0-31 wait at __syncthreads, threads 32-63 have returned");
  complains_of(Misuse::kBarrierInOneLane,
               "threads 0-31 have returned, threads 32-39 wait at __syncwarp, thread 40 waits at __syncthreads");
  complains_of(Misuse::kLaneReturns,
               "threads 0-4 wait at __syncwarp, thread 5 has returned, threads 6-31 wait at __syncwarp");
  complains_of(Misuse::kLanesDiverge, "warp_ballot");
  complains_of(Misuse::kThrow, "thrown by a thread");
#ifndef __SANITIZE_ADDRESS__  // which ends the process there
  complains_of(Misuse::kWriteOutside, "wrote outside its 100 bytes of shared memory, at byte 100");
#endif
  must_complain("never waited for", [] { product_is_right<bf16>(Mistake::kNeverWaited); });
  must_complain("not a multiple of 16", [] { product_is_right<bf16>(Mistake::kMisaligned); });
  must_complain("outside the block's shared memory", [] { product_is_right<bf16>(Mistake::kOutsideShared); });
  must_complain("no card takes", [] { launch(misuse_kernel, dim3(1, 65536), 64, 0, nullptr, MisuseParams{}); });
  must_complain("no card takes", [] { launch(misuse_kernel, 1, 64, 100 * 1024, nullptr, MisuseParams{}); });
}

struct PoisonParams {
  float* seen;  // [64]
};

__global__ void read_shared(PoisonParams p) {
  MOTE_SHARED(memory);
  p.seen[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
  reinterpret_cast<float*>(memory)[threadIdx.x] = 1.f;
}

void shared_memory_starts_as_nan() {
  std::vector<float> seen(64, 0.f);
  launch(read_shared, 3, 64, 64 * sizeof(float), nullptr, PoisonParams{seen.data()});
  for (const float value : seen) require(std::isnan(value), "a value of the block before");
}

struct Test {
  const char* name;
  void (*run)();
};

constexpr Test kTests[] = {
    {"mma f16 follows the manual", mma_follows_the_manual<f16>},
    {"mma bf16 follows the manual", mma_follows_the_manual<bf16>},
    {"ldmatrix follows the manual", ldmatrix_follows_the_manual},
    {"warp operations reach every lane", warp_operations_reach_every_lane},
    {"shared memory starts as NaN", shared_memory_starts_as_nan},
    {"a product in f16 under every schedule", product_under_every_schedule<f16>},
    {"a product in bf16 under every schedule", product_under_every_schedule<bf16>},
    {"a missing barrier after the wait shows", [] { mistake_shows(Mistake::kNoBarrierAfterWait); }},
    {"a missing barrier before reuse shows", [] { mistake_shows(Mistake::kNoBarrierBeforeReuse); }},
    {"a missing wait shows", [] { mistake_shows(Mistake::kNoWait); }},
    {"misuse is named", misuse_is_named},
    {"a product after the complaints", [] { product_under_every_schedule<f16>(); }},
};

}  // namespace
}  // namespace mote

int main() {
  int num_failed = 0;
  for (const mote::Test& test : mote::kTests) {
    try {
      mote_simt_configure(0, 0);
      test.run();
      std::printf("ok    %s\n", test.name);
    } catch (const std::exception& error) {
      ++num_failed;
      std::printf("FAIL  %s: %s\n", test.name, error.what());
    }
  }
  return num_failed == 0 ? 0 : 1;
}
