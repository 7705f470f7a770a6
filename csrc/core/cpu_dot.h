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

// What dot products take of x: its own values, or widened ones.
template <typename Scalar>
using DotScalar = std::conditional_t<kMultipliesPairs<Scalar>, Scalar, RealOf<Scalar>>;

// What a step along k does.
template <typename X, typename Scalar>
struct DotStep {
  using Real = RealOf<Scalar>;
  using Values = Vector<Real>;
  static constexpr int kWidth = kLanes<Real>;
  static Values load_whole(const auto* from) { return load(from); }
  static Values load_part(const auto* from, int64_t count) { return load_first(from, count); }
  static Vector<Real> add(Vector<Real> sum, Values x, Values weight) { return sum + x * weight; }
};

template <>
struct DotStep<bf16, bf16> {
  using Values = Bf16Pairs;
  static constexpr int kWidth = 2 * kLanes<float>;
  static Values load_whole(const bf16* from) { return load_pairs(from); }
  [[gnu::noinline]] static Values load_part(const bf16* from, int64_t count) {
    bf16 padded[kWidth] = {};
    std::memcpy(padded, from, count * sizeof(bf16));
    return load_pairs(padded);
  }
  static Vector<float> add(Vector<float> sum, Values x, Values weight) { return add_products(sum, x, weight); }
};

template <typename Scalar>
void widen(const Scalar* from, int64_t count, RealOf<Scalar>* to) {
  constexpr int lanes = kLanes<RealOf<Scalar>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load_first(from + i, count - i));
}

template <int kTokens, int kRows, typename X, typename Scalar>
void dot_tile(const X* const (&x)[kTokens], const Scalar* weight, int64_t weight_stride, int64_t num_rows,
              int64_t num_in, RealOf<Scalar>* sums, int64_t sums_stride) {
  using Real = RealOf<Scalar>;
  using Step = DotStep<X, Scalar>;
  const Scalar* rows[kRows];  // a row past the last repeats it, and is dropped
  for (int j = 0; j < kRows; ++j) rows[j] = weight + std::min<int64_t>(j, num_rows - 1) * weight_stride;

  Vector<Real> sum[kTokens][kRows] = {};
  const auto multiply_add = [&](int64_t k, const auto& load_from) {
    typename Step::Values in[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) in[t] = load_from(x[t] + k);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      const typename Step::Values row = load_from(rows[j] + k);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sum[t][j] = Step::add(sum[t][j], in[t], row);
    }
  };
  int64_t k = 0;
  for (; k + Step::kWidth <= num_in; k += Step::kWidth)
    multiply_add(k, [](const auto* from) { return Step::load_whole(from); });
  if (k < num_in) multiply_add(k, [&](const auto* from) { return Step::load_part(from, num_in - k); });

#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
      if (j < num_rows) sums[t * sums_stride + j] += sum_lanes<Real>(sum[t][j]);
  }
}

// At most kDotBlock of k; x_row(t) is a row of x, of float or double, or of DotScalar<Scalar>.
template <typename XRow, typename Scalar>
void dot_block(const XRow& x_row, int64_t num_tokens, const Scalar* weight, int64_t weight_stride, int64_t num_rows,
               int64_t num_in, RealOf<Scalar>* sums, int64_t sums_stride) {
  if (num_tokens == 1) {
    for (int64_t j = 0; j < num_rows; j += kDotRowsOneToken) {
      const decltype(x_row(0)) rows[] = {x_row(0)};
      dot_tile<1, kDotRowsOneToken>(rows, weight + j * weight_stride, weight_stride, num_rows - j, num_in, sums + j, 0);
    }
    return;
  }
  const int64_t step = even_tile(num_tokens, kDotTokens);
  for (int64_t j = 0; j < num_rows; j += kDotRows) {
    for (int64_t t = 0; t < num_tokens; t += step) {
      with_constant<kDotTokens>(std::min(step, num_tokens - t), [&](auto tokens) {
        decltype(x_row(0)) rows[tokens()];
        for (int i = 0; i < tokens(); ++i) rows[i] = x_row(t + i);
        dot_tile<tokens(), kDotRows>(rows, weight + j * weight_stride, weight_stride, num_rows - j, num_in,
                                     sums + t * sums_stride + j, sums_stride);
      });
    }
  }
}

}  // namespace mote::MOTE_CPU_ISA
