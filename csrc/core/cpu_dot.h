// Dot products of rows of two matrices that both lie along k: sums[t][j] += Σ_k x[t][k] · weight[j][k].
//
// A tile of sums stays in registers while k runs, each register loaded serves a whole row or column of the tile. Every
// sum is made in one order, whatever tile it falls in. Included by the sources of CPU kernels alone, see cpu_vector.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu_vector.h"

namespace mote::MOTE_CPU_ISA {

// Of k at a time: long sums in blocks that start from zero have less rounding error than one chain, and a block of
// operands stays in cache.
inline constexpr int64_t kDotBlock = 1024;

// Sizes of a tile: its sums and one column of operands fill the registers.
inline constexpr int kNumSums = kNumRegisters == 32 ? 24 : 12;
inline constexpr int kDotTokens = 3;
inline constexpr int kDotRows = kNumSums / kDotTokens;  // of the weight
inline constexpr int kDotRowsOneToken = 8;

// The size of the tiles that `count` rows are cut into: as even as they come, none above the limit.
inline int64_t even_tile(int64_t count, int64_t limit) {
  const int64_t tiles = (count + limit - 1) / limit;
  return (count + tiles - 1) / tiles;
}

template <typename Scalar>
void widen(const Scalar* from, int64_t count, RealOf<Scalar>* to) {
  constexpr int lanes = kLanes<RealOf<Scalar>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load_first(from + i, count - i));
}

template <int kTokens, int kRows, typename Scalar>
void dot_tile(const RealOf<Scalar>* const (&x)[kTokens], const Scalar* weight, int64_t weight_stride, int64_t num_rows,
              int64_t num_in, RealOf<Scalar>* sums, int64_t sums_stride) {
  using Real = RealOf<Scalar>;
  constexpr int lanes = kLanes<Real>;
  const Scalar* rows[kRows];  // a row past the last repeats it, and is dropped
  for (int j = 0; j < kRows; ++j) rows[j] = weight + std::min<int64_t>(j, num_rows - 1) * weight_stride;

  Vector<Real> sum[kTokens][kRows] = {};
  const auto multiply_add = [&](int64_t k, const auto& load_from) {
    Vector<Real> in[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) in[t] = load_from(x[t] + k);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      const Vector<Real> row = load_from(rows[j] + k);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sum[t][j] += in[t] * row;
    }
  };
  int64_t k = 0;
  for (; k + lanes <= num_in; k += lanes) multiply_add(k, [](const auto* from) { return load(from); });
  if (k < num_in) multiply_add(k, [&](const auto* from) { return load_first(from, num_in - k); });

#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
      if (j < num_rows) sums[t * sums_stride + j] += sum_lanes<Real>(sum[t][j]);
  }
}

// At most kDotBlock of k; x_row(t) is a row of x.
template <typename XRow, typename Scalar>
void dot_block(const XRow& x_row, int64_t num_tokens, const Scalar* weight, int64_t weight_stride, int64_t num_rows,
               int64_t num_in, RealOf<Scalar>* sums, int64_t sums_stride) {
  if (num_tokens == 1) {
    for (int64_t j = 0; j < num_rows; j += kDotRowsOneToken) {
      dot_tile<1, kDotRowsOneToken>({x_row(0)}, weight + j * weight_stride, weight_stride, num_rows - j, num_in,
                                    sums + j, 0);
    }
    return;
  }
  const int64_t step = even_tile(num_tokens, kDotTokens);
  for (int64_t j = 0; j < num_rows; j += kDotRows) {
    for (int64_t t = 0; t < num_tokens; t += step) {
      with_constant<kDotTokens>(std::min(step, num_tokens - t), [&](auto tokens) {
        const RealOf<Scalar>* rows[tokens()];
        for (int i = 0; i < tokens(); ++i) rows[i] = x_row(t + i);
        dot_tile<tokens(), kDotRows>(rows, weight + j * weight_stride, weight_stride, num_rows - j, num_in,
                                     sums + t * sums_stride + j, sums_stride);
      });
    }
  }
}

}  // namespace mote::MOTE_CPU_ISA
