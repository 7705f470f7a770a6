// The arithmetic of a product of few rows on the CPU, for one instruction set (core/cpu_isa.h says which).
//
// x is copied once, widened unless pairs of it are multiplied, and stays in cache; the weight streams by, each of its
// rows read once for up to kTokens of x. Called by skinny_cpu.cpp.
#include <algorithm>
#include <cstdint>

#include "core/cpu_dot.h"
#include "linear/skinny.h"

namespace mote::MOTE_CPU_ISA {
namespace {

constexpr int64_t kTokens = 64;    // rows of x that are kept
constexpr int64_t kColumns = 256;  // of y, whose sums are kept

// Some rows of x as dot products take them.
template <typename Scalar>
class Rows {
 public:
  Rows(const SkinnyParams& params, int64_t first, int64_t num_tokens)
      // NOTE: the 16 keep rows off a power of two apart, where they would compete for the same few places of L1.
      : stride_((params.num_in + 31) / 16 * 16 + 16), copy_(num_tokens * stride_) {
    const Scalar* x = static_cast<const Scalar*>(params.x) + first * params.x_row_stride;
    for (int64_t t = 0; t < num_tokens; ++t) {
      const Scalar* row = x + t * params.x_row_stride;
      if constexpr (kMultipliesPairs<Scalar>)
        std::copy_n(row, params.num_in, copy_ + t * stride_);
      else
        widen(row, params.num_in, copy_ + t * stride_);
    }
  }

  const DotScalar<Scalar>* row(int64_t t) { return copy_ + t * stride_; }

 private:
  int64_t stride_;
  Scratch<DotScalar<Scalar>> copy_;
};

template <typename Scalar>
void store_sums(const SkinnyParams& params, const float* sums, int64_t count, int64_t token, int64_t column) {
  Scalar* y = static_cast<Scalar*>(params.y) + token * params.num_out + column;
  const Scalar* bias = static_cast<const Scalar*>(params.bias);
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    Vector<float> value = load(sums + i);
    if (bias != nullptr) value += load_first(bias + column + i, count - i);
    store_first(y + i, value, count - i);
  }
}

template <typename Scalar>
void columns(const SkinnyParams& params, int64_t begin, int64_t end) {
  const Scalar* weight = static_cast<const Scalar*>(params.weight);
  Scratch<float> sums(std::min(kTokens, params.num_tokens) * kColumns);
  for (int64_t first = 0; first < params.num_tokens; first += kTokens) {
    const int64_t num_tokens = std::min(kTokens, params.num_tokens - first);
    Rows<Scalar> x(params, first, num_tokens);
    for (int64_t column = begin; column < end; column += kColumns) {
      const int64_t width = std::min(kColumns, end - column);
      std::fill_n(+sums, num_tokens * kColumns, 0.0f);
      for (int64_t k = 0; k < params.num_in; k += kDotBlock) {
        dot_block([&](int64_t t) { return x.row(t) + k; }, num_tokens, weight + column * params.weight_row_stride + k,
                  params.weight_row_stride, width, std::min(kDotBlock, params.num_in - k), +sums, kColumns);
      }
      for (int64_t t = 0; t < num_tokens; ++t)
        store_sums<Scalar>(params, sums + t * kColumns, width, first + t, column);
    }
  }
}

}  // namespace

SkinnyColumns skinny_columns(DType dtype) {
  if (dtype == DType::kF16) return columns<f16>;
  if (dtype == DType::kBF16) return columns<bf16>;
  return columns<float>;
}

}  // namespace mote::MOTE_CPU_ISA
