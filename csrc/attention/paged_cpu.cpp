// Paged attention on the CPU: picks the instruction set and deals out the query tokens to the threads in turns, because
// neighbours are of the same row and as long as each other. All key heads of a token go together, for that is how a
// page lies in memory; of few tokens each key head goes by itself, so that all threads have as much to do.
//
// NOTE: compile with -fopenmp, or at::parallel_for silently runs on one thread.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "attention/paged.h"
#include "core/cpu_isa.h"
#include "core/cpu_threads.h"

namespace mote {
namespace {

PagedToken choose_kernel(DType dtype) {
  static const auto kernel_for = MOTE_FUNCTION_FOR(choose_isa(at::get_cpu_capability()), paged_token);
  return kernel_for(dtype);
}

constexpr int64_t kTokensAThread = 4;  // at least, or key heads are dealt out

}  // namespace

void paged_attention(const PagedAttentionParams& params) {
  int64_t num_keys = 0, num_tokens = 0;
  for (int64_t i = 0; i < params.num_rows; ++i) {
    num_tokens += params.rows[i].count;
    num_keys += params.rows[i].count * params.rows[i].length;
  }
  const int64_t work = num_keys * params.num_heads * (params.key_size + params.value_size);
  const int64_t num_threads = useful_threads(work, at::get_num_threads());
  const int64_t step = num_tokens < kTokensAThread * num_threads ? 1 : params.num_key_heads;
  const PagedToken attend = choose_kernel(params.dtype);
  at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      int64_t turn = 0;
      for (int64_t i = 0; i < params.num_rows; ++i) {
        const PagedRow& row = params.rows[i];
        for (int64_t token = row.begin; token < row.begin + row.count; ++token) {
          for (int64_t head = 0; head < params.num_key_heads; head += step) {
            if (turn++ % num_threads == thread) attend(params, row, token, {head, head + step});
          }
        }
      }
    }
  });
}

}  // namespace mote
