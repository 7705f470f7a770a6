// The few device primitives that the kernels are written in, each one instruction or a line or two.
//
// Portable from sm_80 to sm_120: cp.async, ldmatrix and mma.sync only. A host execution of the same names exists for
// tests; it is given to the compiler from outside, which is why everything CUDA-specific stands in this file and
// nowhere else.
//
// Fragment layouts are those of PTX's m16n8k16: lane = 4 * group + quad holds rows (group, group + 8) and columns
// (2 * quad, 2 * quad + 1) of the 16 x 8 accumulator, in the order (row, col), (row, col+1), (row+8, col), (row+8,
// col+1).
#pragma once

#include "core/math.h"
#include "core/scalar.h"
#include "core/stage_ids.h"
#include "lora/lora.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mote {

#define MOTE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or 16 zero bytes when not valid (the source is not read). Lands at
// cp_async_wait.
__device__ __forceinline__ void cp_async_16(void* shared_dst, const void* global_src, bool valid) {
  const int num_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared_dst)), "l"(global_src),
               "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d += a · b, 16 x 16 times 16 x 8, accumulated in fp32.
template <typename Scalar>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One 16-byte access to global memory, which must be aligned. In assembly, since the compiler splits the store.
__device__ __forceinline__ void load_16(uint32_t (&words)[4], const void* source) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(source)
               : "memory");
}

__device__ __forceinline__ void store_16(void* destination, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ uint32_t warp_or(uint32_t value) { return __reduce_or_sync(0xffffffffu, value); }

__device__ __forceinline__ int popcount64(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int lowest_bit64(uint64_t bits) { return __ffsll(static_cast<long long>(bits)) - 1; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(f16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

template <typename Scalar>
__device__ __forceinline__ Scalar round_to(float value);

template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ f16 round_to<f16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ bf16 round_to<bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }

// The one way a kernel is started. Kernels take one struct of parameters by value.
template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Params& params) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kAlwaysAllowed) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    status = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // a launch failure is not sticky; leave a clean state to the caller
    throw std::runtime_error(std::string("mote_ext: a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(status));
  }
}

}  // namespace mote

#endif  // __CUDACC__
