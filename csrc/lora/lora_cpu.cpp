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

#include <algorithm>
#include <optional>

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

// The at most num_pieces ranges of 0 .. size, each beginning at a multiple of unit.
class Cut {
 public:
  Cut(int64_t size, int64_t num_pieces, int64_t unit)
      : size_(size), step_(larger(round_up(ceil_div(size, larger<int64_t>(num_pieces, 1)), unit), unit)) {}
  int64_t num_pieces() const { return ceil_div(size_, step_); }
  Range piece(int64_t index) const { return {index * step_, smaller((index + 1) * step_, size_)}; }

 private:
  int64_t size_;
  int64_t step_;
};

struct Pieces {
  Cut tokens;
  Cut columns;
  int64_t count() const { return tokens.num_pieces() * columns.num_pieces(); }
  Piece piece(int64_t index) const {
    return {tokens.piece(index / columns.num_pieces()), columns.piece(index % columns.num_pieces())};
  }
};

template <typename Params>
int64_t z_width(const Params& params) {
  return int64_t{params.rank} * (1 + params.shared);
}

template <typename Params>
int64_t threads_for(const Params& params, int64_t num_wide) {
  return useful_threads(params.num_tokens * num_wide * z_width(params), at::get_num_threads());
}

// Tokens are cut; columns of z as well when the tokens are too few for the threads.
Pieces cut(const ShrinkParams& params) {
  const int64_t num_threads = threads_for(params, params.num_in);
  const Cut tokens(params.num_tokens, smaller(num_threads, params.num_tokens / kShrinkTokens), 1);
  return {tokens, Cut(z_width(params), num_threads / larger<int64_t>(tokens.num_pieces(), 1), kRankUnit)};
}

// Columns are cut; tokens as well when the columns are too few for the threads.
Pieces cut(const ExpandParams& params) {
  const int64_t num_threads = threads_for(params, params.num_out);
  const Cut columns(params.num_out, num_threads, kColumnUnit);
  const int64_t num_pieces = smaller(num_threads / columns.num_pieces(), params.num_tokens / kExpandTokens);
  return {Cut(params.num_tokens, num_pieces, 1), columns};
}

// Columns are cut; the tokens are summed over and stay whole.
Pieces cut(const WgradParams& params) {
  return {Cut(1, 1, 1), Cut(params.num_wide, threads_for(params, params.num_wide), kColumnUnit)};
}

void compute(const ShrinkParams& params, const TokenOrder& order, const Piece& piece) {
  choose_kernels(params.dtype).shrink(params, order, piece);
}

void compute(const ExpandParams& params, const TokenOrder& order, const Piece& piece) {
  choose_kernels(params.dtype).expand(params, order, piece);
}

void compute(const WgradParams& params, const TokenOrder& order, const Piece& piece) {
  choose_kernels(params.dtype).wgrad(params, order, piece.columns);
}

// A problem that is cut for the threads, or none.
template <typename Params>
class Job {
 public:
  explicit Job(const std::optional<Params>& params)
      : params_(params), pieces_(params ? cut(*params) : Pieces{Cut(0, 1, 1), Cut(0, 1, 1)}) {}
  int64_t num_pieces() const { return pieces_.count(); }
  void run(const TokenOrder& order, int64_t index) const {
    if (index < num_pieces()) compute(*params_, order, pieces_.piece(index));
  }

 private:
  std::optional<Params> params_;
  Pieces pieces_;
};

// Jobs that do not need one another's results; a thread takes a piece of each.
template <typename... Params>
void run_side_by_side(const TokenOrder& order, const Job<Params>&... jobs) {
  at::parallel_for(0, std::max({jobs.num_pieces()...}), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (jobs.run(order, i), ...);
  });
}

template <typename Params>
SortedTokens sort_tokens(const Params& params) {
  return {params.stage_ids, params.num_tokens, params.num_stages, params.shared};
}

template <typename Params>
void run_alone(const Params& params, Stream) {
  run_side_by_side(sort_tokens(params).order(), Job(std::optional(params)));
}

void delta(const ShrinkParams& shrink_params, const ExpandParams& expand_params, Stream) {
  const SortedTokens sorted = sort_tokens(shrink_params);
  run_side_by_side(sorted.order(), Job(std::optional(shrink_params)));
  run_side_by_side(sorted.order(), Job(std::optional(expand_params)));
}

// dx and dA need dz; dB does not.
void backward(const BackwardParams& params, Stream) {
  const SortedTokens sorted = params.dz ? sort_tokens(*params.dz) : sort_tokens(*params.dB);
  run_side_by_side(sorted.order(), Job(params.dz), Job(params.dB));
  run_side_by_side(sorted.order(), Job(params.dx), Job(params.dA));
}

int64_t no_shrink_workspace(const ShrinkParams&) { return 0; }
int64_t no_wgrad_workspace(const WgradParams&) { return 0; }

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend = {
      true,    no_shrink_workspace, run_alone<ShrinkParams>, run_alone<ExpandParams>,
      delta,   no_wgrad_workspace,  run_alone<WgradParams>,  backward,
      nullptr,
  };
  return backend;
}

}  // namespace mote
