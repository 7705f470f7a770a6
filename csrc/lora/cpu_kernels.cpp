// The arithmetic of shrink, expand and wgrad on the CPU, for one instruction set (cpu_kernels.h says how it is chosen).
//
//   shrink   tiles of dot products along K, both operands contiguous there:   tokens x ranks registers
//            tiles of outer products, K innermost, where A is transposed:      tokens x ranks registers
//   expand   tiles of outer products, r innermost, against a panel of Bᵀ:     tokens x columns registers
//   wgrad    tiles of outer products, tokens innermost:                       ranks  x columns registers
//
// A token of a tile is a row pointer, so any pattern of stage ids costs the same as long runs. 16-bit values are
// widened as they are loaded, or multiplied by pairs (core/cpu_outer.h), and rounded once as they are stored; sums are
// float, or double for kF64. Every element is summed in one fixed order that depends on neither the tile it falls in
// nor the piece: a token's row has the same bits whatever its neighbours are. Called by lora_cpu.cpp.
#include "lora/cpu_kernels.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "core/cpu_dot.h"
#include "core/cpu_outer.h"
#include "core/cpu_vector.h"
#include "core/stage_ids.h"

namespace mote::MOTE_CPU_ISA {
namespace {

// Long sums are cut into blocks that start from zero, those of shrink at kDotBlock.
constexpr int64_t kExpandBlock = 64;   // of the columns of z, in operands
constexpr int64_t kWgradBlock = 64;    // of tokens
constexpr int64_t kShrinkDepth = 256;  // of K, where the weight is transposed

// What is kept beside the sums: a block of x for wgrad and, where it is copied, for shrink (L2), a panel of weights for
// expand (L1).
constexpr int64_t kShrinkTokens = 64;
constexpr int64_t kExpandColumns = 256;
constexpr int64_t kWgradColumns = 256;
// Narrow panels where reading weights is all there is to do: the next lines are on their way while a tile is made.
constexpr int64_t kFewTokens = 4;
constexpr int64_t kFewTokensColumns = 64;
// Of the panel's rows: at a power of two apart they would compete for the same few places of L1.
constexpr int64_t kExpandStride = kExpandColumns + 16;

int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t size(Range range) { return most(range.end - range.begin, 0); }
Range intersect(Range a, Range b) { return {most(a.begin, b.begin), least(a.end, b.end)}; }

// What the params structs say about experts and halves, in the terms of TokenOrder.
struct Layout {
  int num_stages;
  int64_t rank;
  bool shared;

  template <typename Params>
  explicit Layout(const Params& params) : Layout(params, params.rank) {}
  // Of columns of z that are `rank` operands to a half.
  template <typename Params>
  Layout(const Params& params, int64_t rank) : num_stages(params.num_stages), rank(rank), shared(params.shared) {}

  int num_experts() const { return num_stages + shared; }
  int64_t z_width() const { return rank * (1 + shared); }

  Range positions_of_expert(const TokenOrder& order, int expert) const {
    const int64_t* begin = order.group_begin;
    return expert < num_stages ? Range{begin[expert], begin[expert + 1]} : Range{0, begin[num_stages + 1]};
  }

  Range z_columns_of_expert(int expert) const { return expert < num_stages ? Range{0, rank} : Range{rank, 2 * rank}; }

  Range z_columns_of_group(int group) const {
    if (group < num_stages) return {0, z_width()};
    return group == num_stages ? Range{rank, z_width()} : Range{0, 0};
  }
};

// Into L2, for pieces of rows that are too short for the processor to see the next one coming.
template <typename Scalar>
void prefetch(const Scalar* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(Scalar)) __builtin_prefetch(from + i, 0, 2);
}

template <typename Scalar, typename Real>
void round_to(const Real* from, int64_t count, Scalar* to) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

// ---- shrink

// Strips of at most this many registers of ranks, and as many tokens as fill the sums.
constexpr int kStripVectors = 2;
constexpr int strip_rows(int vectors) { return kOuterRows * kStripVectors / vectors; }

// sums[t][j] += Σ_k x[t][k] · weight[k][j], for the num_columns of one strip.
template <int kRows, int kVectors, typename Value, typename Real>
[[gnu::noinline]] void shrink_tile(const Value* const (&x)[kRows], const Value* weight, int64_t weight_stride,
                                   int64_t num_steps, Real* sums, int64_t sums_stride, int64_t num_columns) {
  constexpr int lanes = kLanes<Real>;
  Vector<Real> sum[kRows][kVectors] = {};
  outer_products(sum, x, 1, weight, weight_stride, num_steps);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Real* to = sums + i * sums_stride + v * lanes;
      const int64_t left = num_columns - v * lanes;
      store_first(to, load_first(to, left) + sum[i][v], left);
    }
  }
}

template <int kVectors, typename Value, typename Row, typename Real>
void shrink_strip(const Row& x_row, int64_t num_tokens, const Value* weight, int64_t weight_stride, int64_t num_steps,
                  Real* sums, int64_t sums_stride, int64_t num_columns) {
  const int64_t step = even_tile(num_tokens, strip_rows(kVectors));
  for (int64_t t = 0; t < num_tokens; t += step) {
    with_constant<strip_rows(kVectors)>(least(step, num_tokens - t), [&](auto count) {
      const Value* rows[count()];
      for (int i = 0; i < count(); ++i) rows[i] = reinterpret_cast<const Value*>(x_row(t + i));
      shrink_tile<count(), kVectors>(rows, weight, weight_stride, num_steps, sums + t * sums_stride, sums_stride,
                                     num_columns);
    });
  }
}

// The sums of dot_block where the weight lies along the ranks. panel: [kShrinkDepth, a strip].
template <typename Scalar>
void outer_block(const DotScalar<Scalar>* const* x, int64_t num_tokens, const Scalar* weight, int64_t weight_stride,
                 int64_t num_ranks, int64_t num_in, Operand<Scalar>* panel, RealOf<Scalar>* sums, int64_t sums_stride) {
  using Real = RealOf<Scalar>;
  constexpr int64_t lanes = kLanes<Real>, strip = kStripVectors * lanes;
  for (int64_t k = 0; k < num_in; k += kShrinkDepth) {
    const int64_t depth = least(kShrinkDepth, num_in - k);
    for (int64_t j = 0; j < num_ranks; j += strip) {
      const int64_t width = least(strip, num_ranks - j);
      const Scalar* from = weight + k * weight_stride + j;
      const auto run = [&](const Operand<Scalar>* rows, int64_t stride) {
        with_constant<kStripVectors>((width + lanes - 1) / lanes, [&](auto vectors) {
          shrink_strip<vectors()>([&](int64_t t) { return x[t] + k; }, num_tokens, rows, stride,
                                  operands_of<Scalar>(depth), sums + j, sums_stride, width);
        });
      };
      if constexpr (std::is_same_v<Scalar, Operand<Scalar>>) {
        if (width % lanes == 0) {
          run(from, weight_stride);
          continue;
        }
      }
      for (int64_t i = 0; i < depth; i += kDepth<Scalar>) {
        const auto row = [&](int64_t next) { return i + next < depth ? from + (i + next) * weight_stride : nullptr; };
        pack_across<Scalar>(row, width, panel + i / kDepth<Scalar> * strip);
      }
      run(panel, strip);
    }
  }
}

template <typename Scalar>
struct ShrinkScratch {
  Scratch<DotScalar<Scalar>> x;    // [tokens, kDotBlock], unless x is read where it lies
  Scratch<RealOf<Scalar>> sums;    // [tokens, columns]
  Scratch<Operand<Scalar>> panel;  // [kShrinkDepth, a strip] of a transposed weight
};

// x is read where it lies, unless it is to be widened, or a pair of its values would end beyond the row.
template <typename Scalar>
bool copies_x(const ShrinkParams& params) {
  if constexpr (kMultipliesPairs<Scalar>) return params.weight_transposed && params.num_in % kDepth<Scalar> != 0;
  return !std::is_same_v<Scalar, RealOf<Scalar>>;
}

template <typename Scalar>
void shrink_block(const ShrinkParams& params, const TokenOrder& order, const Piece& piece,
                  ShrinkScratch<Scalar>& scratch) {
  using Real = RealOf<Scalar>;
  const Layout layout(params);
  const int64_t num_tokens = size(piece.positions);
  const int64_t width = size(piece.columns);
  const int64_t* tokens = order.tokens + piece.positions.begin;
  DotScalar<Scalar>* x = scratch.x;
  Real* sums = scratch.sums;
  for (int64_t i = 0; i < num_tokens * width; ++i) sums[i] = 0;

  // Calls function(expert, positions, columns of z) for the part of each expert that lies in the piece.
  const auto for_each_expert = [&](const auto& function) {
    for (int expert = 0; expert < layout.num_experts(); ++expert) {
      const Range positions = intersect(layout.positions_of_expert(order, expert), piece.positions);
      const Range columns = intersect(layout.z_columns_of_expert(expert), piece.columns);
      if (size(positions) > 0 && size(columns) > 0) function(expert, positions, columns);
    }
  };
  const auto sums_at = [&](int64_t position, int64_t column) {
    return sums + (position - piece.positions.begin) * width + (column - piece.columns.begin);
  };

  const DotScalar<Scalar>* rows[kShrinkTokens];  // of x from k on
  for (int64_t k = 0; k < params.num_in; k += kDotBlock) {
    const int64_t num_in = least(kDotBlock, params.num_in - k);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const Scalar* from = static_cast<const Scalar*>(params.x) + tokens[t] * params.x_row_stride + k;
      if (copies_x<Scalar>(params)) {
        pack_along(from, num_in, reinterpret_cast<Operand<Scalar>*>(x + t * kDotBlock));
        rows[t] = x + t * kDotBlock;
      } else {
        rows[t] = reinterpret_cast<const DotScalar<Scalar>*>(from);
      }
    }
    for_each_expert([&](int expert, Range positions, Range columns) {
      const int64_t rank_index = columns.begin % params.rank;
      const Scalar* weight = static_cast<const Scalar*>(params.weight) + int64_t{expert} * params.rank * params.num_in;
      const int64_t place = positions.begin - piece.positions.begin;
      Real* to = sums_at(positions.begin, columns.begin);
      if (params.weight_transposed) {
        outer_block(rows + place, size(positions), weight + k * params.rank + rank_index, params.rank, size(columns),
                    num_in, +scratch.panel, to, width);
      } else {
        dot_block([&](int64_t t) { return rows[place + t]; }, size(positions), weight + rank_index * params.num_in + k,
                  params.num_in, size(columns), num_in, to, width);
      }
    });
  }

  // Only where an expert is active: the other half of z stays zero, whatever the scale.
  for_each_expert([&](int expert, Range positions, Range columns) {
    for (int64_t position = positions.begin; position < positions.end; ++position)
      for (int64_t j = columns.begin; j < columns.end; ++j) *sums_at(position, j) *= params.scales[expert];
  });
  for (int64_t t = 0; t < num_tokens; ++t)
    round_to(sums + t * width, width,
             static_cast<Scalar*>(params.z) + tokens[t] * layout.z_width() + piece.columns.begin);
}

template <typename Scalar>
void shrink(const ShrinkParams& params, const TokenOrder& order, const Piece& piece) {
  using Real = RealOf<Scalar>;
  const int64_t num_tokens = least(kShrinkTokens, size(piece.positions));
  ShrinkScratch<Scalar> scratch = {
      Scratch<DotScalar<Scalar>>(copies_x<Scalar>(params) ? num_tokens * kDotBlock : 0),
      Scratch<Real>(num_tokens * size(piece.columns)),
      Scratch<Operand<Scalar>>(params.weight_transposed ? kShrinkDepth * kStripVectors * kLanes<Real> : 0)};
  for (int64_t begin = piece.positions.begin; begin < piece.positions.end; begin += kShrinkTokens) {
    const Range positions = {begin, least(begin + kShrinkTokens, piece.positions.end)};
    shrink_block<Scalar>(params, order, {positions, piece.columns}, scratch);
  }
}

// ---- expand

template <typename Scalar>
struct ExpandTile {
  const int64_t* tokens;     // of the tile
  const Operand<Scalar>* z;  // [tokens, z_width]
  int64_t z_width;
  Range z_columns;               // that are active
  const Operand<Scalar>* panel;  // [z_width, kExpandStride], Bᵀ of the active columns
  const RealOf<Scalar>* bias;    // [kExpandColumns]
  Range columns;                 // of y
};

// y = sum + addend, where the row ends inside the register. Out of line: it stands in every unrolled loop.
template <typename Scalar>
[[gnu::noinline]] void finish_row(Vector<RealOf<Scalar>> sum, const Scalar* addend, int64_t num_columns, Scalar* y) {
  if (addend) sum += load_first(addend, num_columns);
  store_first(y, sum, num_columns);
}

// Out of line, as a register that is spilled in the inner loop costs a fifth.
template <int kRows, typename Scalar>
[[gnu::noinline]] void expand_tile(const ExpandParams& params, const ExpandTile<Scalar>& tile) {
  using Real = RealOf<Scalar>;
  constexpr int lanes = kLanes<Real>;
  constexpr int vectors = outer_vectors(kRows);
  const int64_t num_columns = size(tile.columns);
  Scalar* y[kRows];
  for (int i = 0; i < kRows; ++i)
    y[i] = static_cast<Scalar*>(params.y) + tile.tokens[i] * params.y_row_stride + tile.columns.begin;
  const auto addend = [&](int i, int64_t column) {
    const auto* rows = static_cast<const Scalar*>(params.addend);
    return rows ? rows + tile.tokens[i] * params.addend_row_stride + tile.columns.begin + column : nullptr;
  };
  for (int64_t first = 0; first < num_columns; first += vectors * lanes) {
    const auto add_block = [&](Vector<Real>(&to)[kRows][vectors], int64_t z) {
      const Operand<Scalar>* rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = tile.z + i * tile.z_width + z;
      outer_products(to, rows, 1, tile.panel + z * kExpandStride + first, kExpandStride,
                     least(kExpandBlock, tile.z_columns.end - z));
    };
    const auto for_each_sum = [&](const auto& function) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) function(i, v, first + v * lanes);
      }
    };
    // The lines that are written next but one: a store waits for its line as a load does.
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(y[i] + first + 2 * vectors * lanes, 1);
    Vector<Real> sum[kRows][vectors] = {};
    add_block(sum, tile.z_columns.begin);
    for (int64_t z = tile.z_columns.begin + kExpandBlock; z < tile.z_columns.end; z += kExpandBlock) {
      Vector<Real> block[kRows][vectors] = {};
      add_block(block, z);
      for_each_sum([&](int i, int v, int64_t) { sum[i][v] += block[i][v]; });
    }
    Vector<Real> bias[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) bias[v] = load(tile.bias + first + v * lanes);
    const bool is_whole = first + vectors * lanes <= num_columns;
    if (is_whole && params.addend == nullptr) {
      for_each_sum([&](int i, int v, int64_t column) { store(y[i] + column, sum[i][v] + bias[v]); });
    } else if (is_whole) {
      for_each_sum(
          [&](int i, int v, int64_t column) { store(y[i] + column, sum[i][v] + bias[v] + load(addend(i, column))); });
    } else {
      for_each_sum([&](int i, int v, int64_t column) {
        finish_row(sum[i][v] + bias[v], addend(i, column), num_columns - column, y[i] + column);
      });
    }
  }
}

template <typename Scalar>
struct ExpandScratch {
  Scratch<Operand<Scalar>> panel;  // [z_width, kExpandStride]
  Scratch<Operand<Scalar>> z;      // [kOuterRows, z_width], then a register
  Scratch<RealOf<Scalar>> bias;    // [kExpandColumns], zeros where there is none
};

template <typename Scalar>
void expand_panel(const ExpandParams& params, const TokenOrder& order, const Piece& piece,
                  ExpandScratch<Scalar>& scratch) {
  const Layout layout(params, operands_of<Scalar>(params.rank));
  const int64_t z_width = layout.z_width();
  const int64_t num_columns = size(piece.columns);

  const auto pack_panel = [&](int expert) {
    const Scalar* weight = static_cast<const Scalar*>(params.weight) + expert * params.num_out * params.rank;
    auto* panel = scratch.panel + layout.z_columns_of_expert(expert).begin * kExpandStride;
    if (!params.weight_transposed) {
      pack_transposed(weight + piece.columns.begin * params.rank, num_columns, params.rank, panel, kExpandStride);
      return;
    }
    for (int64_t j = 0; j < params.rank; j += kDepth<Scalar>) {
      const auto row = [&](int64_t next) {
        return j + next < params.rank ? weight + (j + next) * params.num_out + piece.columns.begin : nullptr;
      };
      pack_across<Scalar>(row, num_columns, panel + j / kDepth<Scalar> * kExpandStride);
    }
  };
  const auto pack_z = [&](int64_t token, Operand<Scalar>* to) {
    const int64_t halves = 1 + params.shared;
    const Scalar* z = static_cast<const Scalar*>(params.z) + token * halves * params.rank;
    for (int64_t half = 0; half < halves; ++half)
      pack_along(z + half * params.rank, params.rank, to + half * layout.rank);
  };
  if (params.bias) widen(static_cast<const Scalar*>(params.bias) + piece.columns.begin, num_columns, +scratch.bias);
  if (layout.shared) pack_panel(params.num_stages);

  for (int group = 0; group < params.num_stages + 2; ++group) {
    const Range in_order = {order.group_begin[group], order.group_begin[group + 1]};
    const Range positions = intersect(in_order, piece.positions);
    if (size(positions) == 0) continue;
    if (group < params.num_stages) pack_panel(group);
    const int64_t step = even_tile(size(positions), kOuterRows);
    for (int64_t position = positions.begin; position < positions.end; position += step) {
      const int64_t* tokens = order.tokens + position;
      const int64_t num_rows = least(step, positions.end - position);
      for (int64_t i = 0; i < num_rows; ++i) pack_z(tokens[i], scratch.z + i * z_width);
      const Range z_columns = layout.z_columns_of_group(group);
      const ExpandTile<Scalar> tile = {tokens,        scratch.z,    z_width,      z_columns,
                                       scratch.panel, scratch.bias, piece.columns};
      with_constant<kOuterRows>(num_rows, [&](auto rows) { expand_tile<rows()>(params, tile); });
    }
  }
}

template <typename Scalar>
void expand(const ExpandParams& params, const TokenOrder& order, const Piece& piece) {
  using Real = RealOf<Scalar>;
  const int64_t z_width = Layout(params, operands_of<Scalar>(params.rank)).z_width();
  ExpandScratch<Scalar> scratch = {Scratch<Operand<Scalar>>(z_width * kExpandStride),
                                   Scratch<Operand<Scalar>>(kOuterRows * z_width + kLanes<Real>),
                                   Scratch<Real>(kExpandColumns)};
  for (int64_t column = 0; column < kExpandColumns; ++column) scratch.bias[column] = 0;
  const int64_t width = size(piece.positions) <= kFewTokens ? kFewTokensColumns : kExpandColumns;
  for (int64_t begin = piece.columns.begin; begin < piece.columns.end; begin += width) {
    const Range columns = {begin, least(begin + width, piece.columns.end)};
    expand_panel<Scalar>(params, order, {piece.positions, columns}, scratch);
  }
}

// ---- wgrad

// sums[j][c] (+)= Σ_t narrow[t][j] · wide[t][c], over the tokens of one block. Rows of wide and sums: kWgradColumns
// apart.
template <int kRows, typename Value, typename Real>
[[gnu::noinline]] void wgrad_tile(const Value* narrow, int64_t narrow_stride, const Value* wide, int64_t num_steps,
                                  bool is_first, Real* sums) {
  constexpr int vectors = outer_vectors(kOuterRows);
  Vector<Real> sum[kRows][vectors] = {};
  const Value* rows[kRows];
  for (int j = 0; j < kRows; ++j) rows[j] = narrow + j;
  outer_products(sum, rows, narrow_stride, wide, kWgradColumns, num_steps);
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      Real* to = sums + j * kWgradColumns + v * kLanes<Real>;
      store(to, is_first ? sum[j][v] : load(to) + sum[j][v]);
    }
  }
}

template <typename Value, typename Real>
void wgrad_block(const Value* narrow, int64_t narrow_stride, int64_t num_ranks, const Value* wide, int64_t num_columns,
                 int64_t num_steps, bool is_first, Real* sums) {
  constexpr int64_t width = outer_vectors(kOuterRows) * kLanes<Real>;
  const int64_t step = even_tile(num_ranks, kOuterRows);
  for (int64_t column = 0; column < num_columns; column += width) {
    for (int64_t j = 0; j < num_ranks; j += step) {
      with_constant<kOuterRows>(least(step, num_ranks - j), [&](auto rows) {
        wgrad_tile<rows()>(narrow + j, narrow_stride, wide + column, num_steps, is_first,
                           sums + j * kWgradColumns + column);
      });
    }
  }
}

template <typename Grad, typename Real>
void write_grad(const WgradParams& params, int expert, Range columns, const Real* sums) {
  Grad* grad = static_cast<Grad*>(params.grad) + int64_t{expert} * params.rank * params.num_wide;
  if (params.transposed) {
    transpose(sums, kWgradColumns, params.rank, size(columns), grad + columns.begin * params.rank, params.rank);
    return;
  }
  for (int j = 0; j < params.rank; ++j)
    round_to(sums + j * kWgradColumns, size(columns), grad + j * params.num_wide + columns.begin);
}

// The gradient of an expert without tokens: zero, which is all bits zero in every dtype.
void clear_grad(const WgradParams& params, int expert, Range columns, int64_t bytes_per_element) {
  const int64_t num_rows = params.transposed ? 1 : params.rank;
  const int64_t bytes_per_column = (params.transposed ? params.rank : 1) * bytes_per_element;
  auto* grad =
      static_cast<std::byte*>(params.grad) + int64_t{expert} * params.rank * params.num_wide * bytes_per_element;
  for (int64_t row = 0; row < num_rows; ++row) {
    stream_zeros(grad + (row * params.num_wide + columns.begin) * bytes_per_column, size(columns) * bytes_per_column);
  }
}

template <typename Scalar>
struct WgradScratch {
  Scratch<RealOf<Scalar>> sums;     // [z_width, kWgradColumns], the stage expert at hand and the shared one
  Scratch<Operand<Scalar>> wide;    // [kWgradBlock, kWgradColumns]
  Scratch<Operand<Scalar>> narrow;  // [kWgradBlock, z_width], then a register
};

// Packs the tokens at these positions of the order. A group begins with an operand of its own, as no operand may mix
// what one expert sums with what it does not: 0 · Inf is NaN. begins[g] is where group g begins.
template <typename Scalar>
void pack_tokens(const WgradParams& params, const TokenOrder& order, Range block, Range columns,
                 WgradScratch<Scalar>& scratch, int64_t (&begins)[kMaxStages + 2]) {
  const Layout layout(params);
  const int64_t z_width = layout.z_width();
  const auto wide_row = [&](int64_t position) {
    return static_cast<const Scalar*>(params.wide) + order.tokens[position] * params.wide_row_stride + columns.begin;
  };
  const auto narrow_row = [&](int64_t position) {
    return static_cast<const Scalar*>(params.narrow) + order.tokens[position] * z_width;
  };
  const int64_t num_positions = order.group_begin[layout.num_experts()];
  int64_t at = 0;
  for (int group = 0; group < layout.num_experts(); ++group) {
    begins[group] = at;
    const Range run = intersect({order.group_begin[group], order.group_begin[group + 1]}, block);
    for (int64_t position = run.begin; position < run.end; position += kDepth<Scalar>, ++at) {
      const auto row_of = [&](const auto& row) {
        return [&, row](int64_t next) { return position + next < run.end ? row(position + next) : nullptr; };
      };
      pack_across<Scalar>(row_of(wide_row), size(columns), scratch.wide + at * kWgradColumns);
      pack_across<Scalar>(row_of(narrow_row), z_width, scratch.narrow + at * z_width);
      for (int64_t next = position; next < position + kDepth<Scalar>; ++next)
        if (next + kWgradBlock < num_positions) prefetch(wide_row(next + kWgradBlock), size(columns));
    }
  }
  begins[layout.num_experts()] = at;
}

template <typename Scalar>
void wgrad_panel(const WgradParams& params, const TokenOrder& order, Range columns, WgradScratch<Scalar>& scratch) {
  const Layout layout(params);
  const int64_t z_width = layout.z_width();

  const auto sums_of = [&](int expert) {
    return scratch.sums + layout.z_columns_of_expert(expert).begin * kWgradColumns;
  };
  const auto write = [&](int expert) {
    if (params.grad_dtype == params.dtype)
      write_grad<Scalar>(params, expert, columns, sums_of(expert));
    else
      write_grad<float>(params, expert, columns, sums_of(expert));
  };

  // The base's tokens come last; without a shared expert those of the shared one alone have none either.
  const int64_t num_positions = order.group_begin[layout.num_experts()];
  for (int64_t begin = 0; begin < num_positions; begin += kWgradBlock) {
    const Range block = {begin, least(begin + kWgradBlock, num_positions)};
    int64_t begins[kMaxStages + 2];
    pack_tokens(params, order, block, columns, scratch, begins);
    for (int expert = 0; expert < layout.num_experts(); ++expert) {
      const Range all = layout.positions_of_expert(order, expert);
      const Range positions = intersect(all, block);
      if (size(positions) == 0) continue;
      const bool is_shared = expert == params.num_stages;
      const int64_t first = is_shared ? 0 : begins[expert];
      wgrad_block(scratch.narrow + first * z_width + layout.z_columns_of_expert(expert).begin, z_width, params.rank,
                  scratch.wide + first * kWgradColumns, size(columns), begins[expert + 1] - first,
                  positions.begin == all.begin, sums_of(expert));
      if (positions.end == all.end) write(expert);
    }
  }
}

template <typename Scalar>
void wgrad(const WgradParams& params, const TokenOrder& order, Range piece) {
  using Real = RealOf<Scalar>;
  const Layout layout(params);
  const int64_t z_width = layout.z_width();
  for (int expert = 0; expert < layout.num_experts(); ++expert) {
    if (size(layout.positions_of_expert(order, expert)) > 0) continue;
    clear_grad(params, expert, piece, params.grad_dtype == params.dtype ? sizeof(Scalar) : sizeof(float));
  }
  WgradScratch<Scalar> scratch = {Scratch<Real>(z_width * kWgradColumns),
                                  Scratch<Operand<Scalar>>(kWgradBlock * kWgradColumns),
                                  Scratch<Operand<Scalar>>(kWgradBlock * z_width + kLanes<Real>)};
  for (int64_t begin = piece.begin; begin < piece.end; begin += kWgradColumns)
    wgrad_panel<Scalar>(params, order, {begin, least(begin + kWgradColumns, piece.end)}, scratch);
}

template <typename Scalar>
constexpr CpuKernels kKernels = {shrink<Scalar>, expand<Scalar>, wgrad<Scalar>};

}  // namespace

const CpuKernels& cpu_kernels(DType dtype) {
  switch (dtype) {
    case DType::kF32: return kKernels<float>;
    case DType::kF16: return kKernels<f16>;
    case DType::kBF16: return kKernels<bf16>;
    case DType::kF64: return kKernels<double>;
  }
  __builtin_unreachable();
}

}  // namespace mote::MOTE_CPU_ISA
