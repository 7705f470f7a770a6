// The product of a few rows with a weight, on the CPU: y[t] = x[t] Wᵀ + bias.
//
// Few rows are bound by reading the weight, once for all of them; libraries are built for many. A row's bits depend
// neither on the rows beside it nor on the number of threads. Called by csrc/binding.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace mote {

struct SkinnyParams {
  const void* x;  // [T, K] dtype, unit stride along K
  int64_t x_row_stride;
  const void* weight;  // [N, K] dtype, unit stride along K
  int64_t weight_row_stride;
  const void* bias;  // [N] dtype, or null
  void* y;           // [T, N] dtype, contiguous
  int64_t num_tokens;
  int64_t num_in;   // K
  int64_t num_out;  // N
  DType dtype;      // kF32, kF16 or kBF16; sums are float
};

void skinny_linear(const SkinnyParams& params);

// Columns begin .. end of y; for each instruction set.
using SkinnyColumns = void (*)(const SkinnyParams&, int64_t begin, int64_t end);

namespace baseline {
SkinnyColumns skinny_columns(DType dtype);
}
namespace avx2 {
SkinnyColumns skinny_columns(DType dtype);
}
namespace avx512 {
SkinnyColumns skinny_columns(DType dtype);
}
namespace avx512_bf16 {
SkinnyColumns skinny_columns(DType dtype);
}

}  // namespace mote
