// Outer products of rows: sum[i][c] += Σ_s left[i][s] · right[s][c], and the operands they are made of.
//
// An operand is what one instruction multiplies: a float or a double, or, where the processor multiplies them by pairs,
// two bfloat16 that follow each other along the sum; so an operand is kDepth values of the sum. Packing puts scalars of
// any type into operands. Included by the sources of CPU kernels alone, see cpu_vector.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cpu_dot.h"
#include "core/cpu_vector.h"

namespace mote::MOTE_CPU_ISA {

struct Bf16Pair {
  bf16 values[2];
};

template <typename Scalar>
using Operand = std::conditional_t<kMultipliesPairs<Scalar>, Bf16Pair, RealOf<Scalar>>;

template <typename Scalar>
inline constexpr int kDepth = kMultipliesPairs<Scalar> ? 2 : 1;

template <typename Scalar>
constexpr int64_t operands_of(int64_t num_values) {
  return (num_values + kDepth<Scalar> - 1) / kDepth<Scalar>;
}

// ---- packing

// Values that follow each other along the sum; what is missing from the last operand is zero.
template <typename Scalar>
void pack_along(const Scalar* from, int64_t num_values, Operand<Scalar>* to) {
  if constexpr (kDepth<Scalar> == 1) {
    widen(from, num_values, to);
  } else {
    std::memcpy(to, from, num_values * sizeof(Scalar));
    if (num_values % 2 != 0) to[num_values / 2].values[1] = {};
  }
}

// Rows that follow each other along the sum, kDepth of them from row(0) on; a null one is zeros.
template <typename Scalar, typename Row>
void pack_across(const Row& row, int64_t num_columns, Operand<Scalar>* to) {
  if constexpr (kDepth<Scalar> == 1) {
    widen(row(0), num_columns, to);
  } else {
    interleave(row(0), row(1), num_columns, &to->values[0]);
  }
}

// to[j][i] = from[i][j]
template <typename From, typename To>
inline void transpose_square(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  using Real = RealOf<From>;
  Vector<Real> square[kLanes<Real>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Real>; ++i) square[i] = load(from + i * from_stride);
  transpose_registers<Real>(square);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<Real>; ++j) store(to + j * to_stride, square[j]);
}

// The same for half as many columns, and twice as many rows as those: of a rank that is half a register.
inline void transpose_halves(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  constexpr int half = kLanes<float> / 2;
  Vector<float> rows[half];
#pragma GCC unroll 16
  for (int i = 0; i < half; ++i) {
    rows[i] = load_halves(from + i * from_stride, from + (i + half) * from_stride,
                          std::make_integer_sequence<int, kLanes<float>>{});
  }
  transpose_registers<float>(rows);
#pragma GCC unroll 16
  for (int j = 0; j < half; ++j) store(to + j * to_stride, rows[j]);
}

// The same where the matrix ends inside the square.
template <typename From, typename To>
[[gnu::noinline]] void transpose_corner(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to,
                                        int64_t to_stride) {
  using Real = RealOf<From>;
  constexpr int lanes = kLanes<Real>;
  Vector<Real> square[lanes] = {};
  for (int i = 0; i < std::min<int64_t>(rows, lanes); ++i) square[i] = load_first(from + i * from_stride, columns);
  transpose_registers<Real>(square);
  for (int j = 0; j < std::min<int64_t>(columns, lanes); ++j) store_first(to + j * to_stride, square[j], rows);
}

template <typename From, typename To>
void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
  constexpr int lanes = kLanes<RealOf<From>>;
  for (int64_t row = 0; row < rows; row += lanes) {
    for (int64_t column = 0; column < columns; column += lanes) {
      const From* square = from + row * from_stride + column;
      To* transposed = to + column * to_stride + row;
      if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
        if (row + lanes <= rows && column + lanes / 2 == columns) {
          transpose_halves(square, from_stride, transposed, to_stride);
          continue;
        }
      }
      if (row + lanes <= rows && column + lanes <= columns)
        transpose_square(square, from_stride, transposed, to_stride);
      else
        transpose_corner(square, from_stride, rows - row, columns - column, transposed, to_stride);
    }
  }
}

// Rows that lie along the sum, of num_values each, to operands across it: to[s][i] = operand s of row i.
template <typename Scalar>
void pack_transposed(const Scalar* from, int64_t num_rows, int64_t num_values, Operand<Scalar>* to, int64_t to_stride) {
  if constexpr (kDepth<Scalar> == 1) {
    transpose(from, num_values, num_rows, num_values, to, to_stride);
  } else if (num_values % 2 == 0) {
    // A pair is moved as the float it would be: loads, shuffles and stores do not look at it.
    transpose(reinterpret_cast<const float*>(from), num_values / 2, num_rows, num_values / 2,
              reinterpret_cast<float*>(to), to_stride);
  } else {
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t j = 0; j < num_values; j += 2) {
        const bf16* pair = from + i * num_values + j;
        to[j / 2 * to_stride + i] = {pair[0], j + 1 < num_values ? pair[1] : bf16{}};
      }
    }
  }
}

// ---- the tile

inline constexpr int kOuterRows = 6;

// Registers across `rows` rows of outer products; for few rows more, as a chain of sums waits for itself.
constexpr int outer_vectors(int rows) {
  return std::min(8, static_cast<int>(std::bit_floor(kNumSums / unsigned(rows))));
}

// sum[i][c] += Σ_s left[i][s·left_step] · right[s·right_step + c], in a register kLanes<Real> columns
template <int kRows, int kVectors, typename Real>
inline void outer_products(Vector<Real> (&sum)[kRows][kVectors], const Real* const (&left)[kRows], int64_t left_step,
                           const Real* right, int64_t right_step, int64_t num_steps) {
  for (int64_t step = 0; step < num_steps; ++step) {
    Vector<Real> row[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) row[v] = load(right + step * right_step + v * kLanes<Real>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Real factor = left[i][step * left_step];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[i][v] += row[v] * factor;
    }
  }
}

template <int kRows, int kVectors>
inline void outer_products(Vector<float> (&sum)[kRows][kVectors], const Bf16Pair* const (&left)[kRows],
                           int64_t left_step, const Bf16Pair* right, int64_t right_step, int64_t num_steps) {
  for (int64_t step = 0; step < num_steps; ++step) {
    Bf16Pairs row[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) row[v] = load_pairs((right + step * right_step + v * kLanes<float>)->values);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Bf16Pairs factor = broadcast_pair(left[i][step * left_step].values);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[i][v] = add_products(sum[i][v], row[v], factor);
    }
  }
}

}  // namespace mote::MOTE_CPU_ISA
