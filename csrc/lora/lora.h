// The op, as everything outside this folder sees it: problems on raw pointers, and one table of functions a backend.
//
//   shrink   z[t]  = scale[e] · x[t] · A[e]ᵀ            for the experts e of token t           [T, halves·r]
//   expand   y[t]  = (bias or addend) + Σ_e z[t, half(e)] · B[e]ᵀ                              [T, N]
//   wgrad    dA[e] = Σ_t dz[t, half(e)]ᵀ · x[t],   dB[e] = Σ_t dY[t]ᵀ · z[t, half(e)]           over the tokens of e
//
// Letters: T tokens, K in-features, N out-features, r rank, S stages, E experts. E = S + 1 with a shared expert, which
// is the last one; E = S without. halves = 2 with a shared expert, else 1. Half 0 of a row of z belongs to the token's
// stage expert, half 1 to the shared one; the half of an expert that is not active is zero. Backward is the same three:
// dz = shrink(dY, Bᵀ), dX = expand(dz, Aᵀ), dA and dB = wgrad.
//
// The journey of eight tokens, two stages and a shared expert:
//
//   Q  Q  <|analysis|>  a  <|endofanalysis|>  <|response|>  s  <|endofresponse|>
//  -1 -1       0        0         0                1        1         1            stage_ids
//
// Called by csrc/binding. All strides are in elements; matrices are row-major with unit column stride unless said.
// Source: MoTE, arXiv 2405.00557, section 3.2 (shared and stage expert, no gate).
#pragma once

#include <cstdint>
#include <optional>

#include "core/scalar.h"
#include "core/stage_ids.h"

namespace mote {

using Stream = void*;  // cudaStream_t; ignored on the CPU

struct ShrinkParams {
  const void* x;             // [T, K] dtype
  int64_t x_row_stride;      // may be 0 (an expanded row)
  const void* weight;        // [E, r, K] dtype, contiguous
  bool weight_transposed;    // it is [E, K, r] instead; only where Backend says so
  const int32_t* stage_ids;  // [T]
  const float* scales;       // [E]
  void* z;                   // [T, halves * r] dtype, contiguous, out
  float* workspace;          // shrink_workspace_floats() floats at least; may be null when that is 0
  int64_t num_tokens;        // T
  int64_t num_in;            // K
  int rank;                  // r
  int num_stages;            // S
  bool shared;
  DType dtype;
};

struct ExpandParams {
  const void* z;             // [T, halves * r] dtype, contiguous
  const void* weight;        // [E, N, r] dtype, contiguous
  bool weight_transposed;    // it is [E, r, N] instead; only where Backend says so
  const int32_t* stage_ids;  // [T]
  const void* bias;          // [N] dtype, or null
  const void* addend;        // [T, N] dtype, added before the one rounding, may be y itself; or null
  int64_t addend_row_stride;
  void* y;  // [T, N] dtype, out
  int64_t y_row_stride;
  int64_t num_tokens;  // T
  int64_t num_out;     // N
  int rank;            // r
  int num_stages;      // S
  bool shared;
  DType dtype;
};

struct WgradParams {
  const void* narrow;        // [T, halves * r] dtype, contiguous: dz for dA, z for dB
  const void* wide;          // [T, D] dtype: x for dA, dY for dB
  int64_t wide_row_stride;   // may be 0
  const int32_t* stage_ids;  // [T]
  void* grad;  // [E, r, D], or [E, D, r] when transposed; contiguous, out; zeros for an expert without tokens
  bool transposed;
  float* workspace;    // wgrad_workspace_floats() floats at least; may be null when that is 0
  int64_t num_tokens;  // T
  int64_t num_wide;    // D
  int rank;            // r
  int num_stages;      // S
  bool shared;
  DType dtype;       // of narrow and wide
  DType grad_dtype;  // dtype, or kF32
};

// The wanted gradients of x, A and B for one dY; they share their tokens, ids and experts.
struct BackwardParams {
  std::optional<ShrinkParams> dz;  // of dY; there whenever dx or dA is
  std::optional<ExpandParams> dx;  // of dz
  std::optional<WgradParams> dA;   // of dz and x
  std::optional<WgradParams> dB;   // of z and dY
};

struct NarrowParams {
  const void* ids;  // [T] contiguous integers of id_bytes bytes each
  int id_bytes;     // 1, 2, 4 or 8
  bool is_signed;
  int32_t* narrowed;  // [T], out; an id outside [-2, S) becomes kIllegalId
  int64_t num_tokens;
  int num_stages;
};

// What a backend offers. Every function only enqueues on the stream (the CPU one runs at once), keeps nothing, and
// gives the same bits for the same input. They throw std::runtime_error when a launch fails, never about the caller's
// input.
struct Backend {
  bool reads_transposed_weights;  // else the binding copies them into the other layout
  int64_t (*shrink_workspace_floats)(const ShrinkParams&);
  void (*shrink)(const ShrinkParams&, Stream);
  void (*expand)(const ExpandParams&, Stream);
  // shrink, then expand of the z it made; one call so that a backend may finish z inside the expand.
  void (*delta)(const ShrinkParams&, const ExpandParams&, Stream);
  int64_t (*wgrad_workspace_floats)(const WgradParams&);
  void (*wgrad)(const WgradParams&, Stream);
  // The three of them as a backward needs them, which may share one workspace; one call so that a backend may look at
  // the ids once, and compute side by side what does not need one another.
  void (*backward)(const BackwardParams&, Stream);
  void (*narrow_ids)(const NarrowParams&, Stream);  // null on the CPU: the binding refuses bad ids while it narrows
};

const Backend& cpu_backend();
const Backend& device_backend();  // CUDA; under csrc/simt the same kernels on the host

}  // namespace mote
