// The subset of CUDA that csrc/lora is written in, for a host compiler: given to it with -include, never by an #include
// of a kernel, so that the very same .cuh and .cu files run on CPU memory in tests.
//
// A thread of a block is a fiber. It runs until it reaches __syncthreads() or a warp-wide operation, where a seeded
// schedule picks the next one; blocks run one after the other. simt.cpp holds the machine, README.md what it can show.
// Everything that a card would answer with a hang, a fault or garbage is a std::runtime_error from launch().
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <typeinfo>

#include "core/scalar.h"
#include "lora/lora.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Those of the thread that runs now. Plain globals: launches are serialised, and a block never leaves its system
// thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

void __syncthreads();
void __syncwarp();

// How threads and blocks are ordered from the next launch on: 0 round robin, 1 reverse, 2 one warp running ahead, 3
// random.
extern "C" void mote_simt_configure(int schedule, uint64_t seed);

namespace mote {
namespace simt {

unsigned char* shared_memory();
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::type_info& params,
              const std::function<void()>& thread_body);
void cp_async_wait(int num_pending);
void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace simt

#define MOTE_SHARED(name) unsigned char* name = ::mote::simt::shared_memory()

void cp_async_16(void* shared_dst, const void* global_src, bool valid);
void cp_async_commit();

template <int kPending>
void cp_async_wait() {
  simt::cp_async_wait(kPending);
}

void ldmatrix_x4(uint32_t (&fragment)[4], const void* shared_row);
void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* shared_row);

template <typename Scalar>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<Scalar, f16> || std::is_same_v<Scalar, bf16>);
  std::is_same_v<Scalar, f16> ? simt::mma_f16(d, a, b0, b1) : simt::mma_bf16(d, a, b0, b1);
}

void load_16(uint32_t (&words)[4], const void* source);
void store_16(void* destination, const uint32_t (&words)[4]);

uint32_t warp_or(uint32_t value);
uint32_t warp_ballot(bool value);
float warp_shuffle_xor(float value, int lane_mask);

inline int popcount64(uint64_t bits) { return std::popcount(bits); }
inline int lowest_bit64(uint64_t bits) { return bits == 0 ? -1 : std::countr_zero(bits); }

template <typename Scalar>
float to_float(Scalar value) {
  return host_to_float(value);
}

template <typename Scalar>
Scalar round_to(float value) {
  return host_round<Scalar>(value);
}

inline float quiet_nan() { return float_of(0x7fc00000u); }

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream, const Params& params) {
  simt::run_grid(grid, block, shared_bytes, typeid(Params), [&] { kernel(params); });
}

}  // namespace mote
