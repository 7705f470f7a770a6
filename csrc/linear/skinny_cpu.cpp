// The product of a few rows on the CPU: picks the instruction set and cuts the columns of y, a piece for each thread.
//
// NOTE: compile with -fopenmp, or at::parallel_for silently runs on one thread.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "core/cpu_isa.h"
#include "core/cpu_threads.h"
#include "core/math.h"
#include "linear/skinny.h"

namespace mote {
namespace {

constexpr int64_t kColumnUnit = 32;  // whole cache lines of every dtype, so that no two threads write to one

SkinnyColumns choose_kernel(DType dtype) {
  static const auto kernel_for = MOTE_FUNCTION_FOR(choose_isa(at::get_cpu_capability()), skinny_columns);
  return kernel_for(dtype);
}

}  // namespace

void skinny_linear(const SkinnyParams& params) {
  const int64_t work = params.num_tokens * params.num_in * params.num_out;
  const int64_t num_threads = useful_threads(work, at::get_num_threads());
  const int64_t step = round_up(ceil_div(params.num_out, num_threads), kColumnUnit);
  const SkinnyColumns compute = choose_kernel(params.dtype);
  at::parallel_for(0, ceil_div(params.num_out, step), 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece)
      compute(params, piece * step, smaller((piece + 1) * step, params.num_out));
  });
}

}  // namespace mote
