// The CPU backend: picks the instruction set, sorts the tokens by stage, cuts the result into pieces, one thread a
// piece.
//
// On a CPU an index is free: a kernel walks a list of tokens through row pointers, so no row of x, z or y is moved and
// alternating ids cost what long runs cost. Pieces never share an output element and never split a sum, so no reduction
// between threads is needed and the bits do not depend on their number. The kernels are in cpu_kernels.cpp.
//
// NOTE: compile with -fopenmp, or at::parallel_for silently runs on one thread.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "core/cpu_isa.h"
#include "core/cpu_threads.h"
#include "core/math.h"
#include "lora/cpu_kernels.h"
#include "lora/lora.h"
#include "lora/sorted_tokens.h"

namespace mote {
namespace {

// Fewer tokens than this and A is read more often than it need be: cut ranks, not tokens.
constexpr int64_t kShrinkTokens = 24;
// Fewer tokens than this and transposing the panels of B dominates an expand: cut columns, not tokens.
constexpr int64_t kExpandTokens = 96;
// Columns are cut at multiples of this: whole tiles of ranks, whole cache lines of every dtype.
constexpr int64_t kRankUnit = 8;
constexpr int64_t kColumnUnit = 32;

const CpuKernels& choose_kernels(DType dtype) {
  static const auto kernel_for = MOTE_FUNCTION_FOR(choose_isa(at::get_cpu_capability()), cpu_kernels);
  return kernel_for(dtype);
}

template <typename Params>
SortedTokens sort_tokens(const Params& params) {
  return {params.stage_ids, params.num_tokens, params.num_stages, params.shared};
}

int64_t z_width(int rank, bool shared) { return int64_t{rank} * (1 + shared); }

// The at most num_pieces ranges of 0 .. size, each beginning at a multiple of unit.
class Cut {
 public:
  Cut(int64_t size, int64_t num_pieces, int64_t unit)
      : size_(size), step_(round_up(ceil_div(size, larger<int64_t>(num_pieces, 1)), unit)) {}
  int64_t num_pieces() const { return ceil_div(size_, step_); }
  Range piece(int64_t index) const { return {index * step_, smaller((index + 1) * step_, size_)}; }

 private:
  int64_t size_;
  int64_t step_;
};

template <typename Function>
void for_each_piece(const Cut& tokens, const Cut& columns, const Function& function) {
  at::parallel_for(0, tokens.num_pieces() * columns.num_pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      function(Piece{tokens.piece(i / columns.num_pieces()), columns.piece(i % columns.num_pieces())});
  });
}

// Tokens are cut; columns of z as well when the tokens are too few for the threads.
void shrink_sorted(const ShrinkParams& params, const TokenOrder& order) {
  if (params.num_tokens == 0) return;
  const CpuKernels& kernels = choose_kernels(params.dtype);
  const int64_t width = z_width(params.rank, params.shared);
  const int64_t num_threads = useful_threads(params.num_tokens * params.num_in * width, at::get_num_threads());
  const Cut tokens(params.num_tokens, smaller(num_threads, params.num_tokens / kShrinkTokens), 1);
  const Cut columns(width, num_threads / tokens.num_pieces(), kRankUnit);
  for_each_piece(tokens, columns, [&](const Piece& piece) { kernels.shrink(params, order, piece); });
}

// Columns are cut; tokens as well when the columns are too few for the threads.
void expand_sorted(const ExpandParams& params, const TokenOrder& order) {
  if (params.num_tokens == 0) return;
  const CpuKernels& kernels = choose_kernels(params.dtype);
  const int64_t width = z_width(params.rank, params.shared);
  const int64_t num_threads = useful_threads(params.num_tokens * params.num_out * width, at::get_num_threads());
  const Cut columns(params.num_out, num_threads, kColumnUnit);
  const Cut tokens(params.num_tokens, smaller(num_threads / columns.num_pieces(), params.num_tokens / kExpandTokens),
                   1);
  for_each_piece(tokens, columns, [&](const Piece& piece) { kernels.expand(params, order, piece); });
}

void shrink(const ShrinkParams& params, Stream) { shrink_sorted(params, sort_tokens(params).order()); }

void expand(const ExpandParams& params, Stream) { expand_sorted(params, sort_tokens(params).order()); }

void delta(const ShrinkParams& shrink_params, const ExpandParams& expand_params, Stream) {
  const SortedTokens sorted = sort_tokens(shrink_params);
  shrink_sorted(shrink_params, sorted.order());
  expand_sorted(expand_params, sorted.order());
}

// Columns are cut; the tokens are summed over and stay whole.
void wgrad(const WgradParams& params, Stream) {
  const CpuKernels& kernels = choose_kernels(params.dtype);
  const SortedTokens sorted = sort_tokens(params);
  const int64_t width = z_width(params.rank, params.shared);
  const int64_t num_threads = useful_threads(params.num_tokens * params.num_wide * width, at::get_num_threads());
  const Cut columns(params.num_wide, num_threads, kColumnUnit);
  at::parallel_for(0, columns.num_pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.wgrad(params, sorted.order(), columns.piece(i));
  });
}

int64_t no_shrink_workspace(const ShrinkParams&) { return 0; }
int64_t no_wgrad_workspace(const WgradParams&) { return 0; }

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend = {
      true, no_shrink_workspace, shrink, expand, delta, no_wgrad_workspace, wgrad, nullptr,
  };
  return backend;
}

}  // namespace mote
