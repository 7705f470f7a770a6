// The CPU kernels on random problems, without torch and Python, so that AddressSanitizer sees every byte they touch.
//
// Each tensor is an allocation of exactly its size. Each operation runs on the whole problem and, into garbage, cut
// into pieces as threads would cut it: both must give the same bits, and a stage without tokens zeros. What the numbers
// are is judged in python_tests.
//
//   cpu_kernels_asan [problems] [seed]      exit status 1 and the problem, or 0; 77 where the processor lacks AVX2
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "lora/cpu_kernels.h"
#include "lora/sorted_tokens.h"

namespace mote {

namespace MOTE_CPU_ISA {
const CpuKernels& cpu_kernels(DType dtype);
}

namespace {

struct Random {
  std::mt19937_64 engine;
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
  bool one_in(int64_t times) { return between(1, times) == 1; }
};

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};

// Of exactly this size, so that one byte beyond is seen.
struct Tensor {
  explicit Tensor(int64_t num_bytes) : num_bytes(num_bytes), memory(static_cast<std::byte*>(std::malloc(num_bytes))) {}

  Tensor(int64_t count, DType dtype) : Tensor(count * (dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2)) {}

  // Small positive numbers in every dtype: the highest bytes are given, the others drawn.
  Tensor(int64_t count, DType dtype, Random& random) : Tensor(count, dtype) {
    const int64_t size = num_bytes / std::max<int64_t>(count, 1);
    const int high = dtype == DType::kF16 ? 0x38 : 0x3f;
    for (int64_t i = 0; i < num_bytes; ++i) {
      const bool is_high = i % size == size - 1, is_next = size > 2 && i % size == size - 2;
      memory.get()[i] = std::byte(is_high ? high : is_next ? 0x20 : random.between(0, 31));
    }
  }

  Tensor copy() const {
    Tensor other(num_bytes);
    std::memcpy(other.memory.get(), memory.get(), num_bytes);
    return other;
  }
  void fill(int value) { std::memset(memory.get(), value, num_bytes); }
  bool operator==(const Tensor& other) const { return !std::memcmp(memory.get(), other.memory.get(), num_bytes); }

  int64_t num_bytes;
  std::unique_ptr<std::byte, Free> memory;
};

struct Problem {
  explicit Problem(Random& random)
      : dtype(std::vector{DType::kF32, DType::kF16, DType::kBF16, DType::kF64}[random.between(0, 3)]),
        num_tokens(random.one_in(4) ? random.between(60, 140) : random.between(1, 20)),
        num_in(random.one_in(4) ? random.between(250, 1300) : random.between(1, 90)),
        num_out(random.one_in(4) ? random.between(200, 600) : random.between(1, 90)),
        rank(random.one_in(3) ? random.between(30, 140) : random.between(1, 20)),
        num_stages(random.between(0, 4)),
        shared(num_stages == 0 || random.one_in(2)) {
    for (int64_t i = 0; i < num_tokens; ++i)
      ids.push_back(random.one_in(4) ? kBaseOnly : static_cast<int32_t>(random.between(kBaseOnly, num_stages - 1)));
  }

  SortedTokens sorted() const { return {ids.data(), num_tokens, static_cast<int>(num_stages), shared}; }

  // What the params of every operation have.
  template <typename Params>
  Params params() const {
    Params params = {};
    params.num_tokens = num_tokens;
    params.rank = static_cast<int>(rank);
    params.num_stages = static_cast<int>(num_stages);
    params.shared = shared;
    params.dtype = dtype;
    return params;
  }

  int64_t num_experts() const { return num_stages + shared; }
  int64_t z_width() const { return rank * (1 + shared); }

  std::string text() const {
    static const char* names[] = {"f32", "f16", "bf16", "f64"};
    return "T=" + std::to_string(num_tokens) + " K=" + std::to_string(num_in) + " N=" + std::to_string(num_out) +
           " r=" + std::to_string(rank) + " S=" + std::to_string(num_stages) + (shared ? " shared " : " ") +
           names[static_cast<int>(dtype)];
  }

  DType dtype;
  int64_t num_tokens, num_in, num_out, rank, num_stages;
  bool shared;
  std::vector<int32_t> ids;
};

// Runs the operation whole and in pieces; false when their bits differ. Columns are cut at multiples of unit.
bool same_in_pieces(Random& random, int64_t num_tokens, int64_t num_columns, int64_t unit, Tensor& out,
                    const std::function<void(const Piece&)>& run) {
  run({{0, num_tokens}, {0, num_columns}});
  const Tensor whole = out.copy();
  out.fill(0xa5);
  const int64_t token = random.between(0, num_tokens);
  const int64_t column = std::min(num_columns, random.between(0, num_columns / unit) * unit);
  for (const Range positions : {Range{0, token}, Range{token, num_tokens}})
    for (const Range columns : {Range{0, column}, Range{column, num_columns}})
      if (positions.begin < positions.end && columns.begin < columns.end) run({positions, columns});
  return out == whole;
}

const char* try_shrink(const Problem& p, const CpuKernels& kernels, Random& random, bool transposed) {
  const Tensor x(p.num_tokens * p.num_in, p.dtype, random);
  const Tensor weight(p.num_experts() * p.rank * p.num_in, p.dtype, random);
  const std::vector<float> scales(p.num_experts(), 0.5f);
  Tensor z(p.num_tokens * p.z_width(), p.dtype);
  const SortedTokens sorted = p.sorted();
  auto params = p.params<ShrinkParams>();
  params.x = x.memory.get();
  params.x_row_stride = p.num_in;
  params.weight = weight.memory.get();
  params.weight_transposed = transposed;
  params.scales = scales.data();
  params.z = z.memory.get();
  params.num_in = p.num_in;
  const auto run = [&](const Piece& piece) { kernels.shrink(params, sorted.order(), piece); };
  return same_in_pieces(random, p.num_tokens, p.z_width(), 8, z, run) ? nullptr : "shrink";
}

const char* try_expand(const Problem& p, const CpuKernels& kernels, Random& random, bool transposed) {
  const Tensor z(p.num_tokens * p.z_width(), p.dtype, random);
  const Tensor weight(p.num_experts() * p.rank * p.num_out, p.dtype, random);
  const Tensor bias(p.num_out, p.dtype, random), addend(p.num_tokens * p.num_out, p.dtype, random);
  Tensor y(p.num_tokens * p.num_out, p.dtype);
  const SortedTokens sorted = p.sorted();
  auto params = p.params<ExpandParams>();
  params.z = z.memory.get();
  params.weight = weight.memory.get();
  params.weight_transposed = transposed;
  if (random.one_in(2)) params.bias = bias.memory.get();
  if (random.one_in(2)) params.addend = addend.memory.get();
  params.addend_row_stride = params.y_row_stride = p.num_out;
  params.y = y.memory.get();
  params.num_out = p.num_out;
  const auto run = [&](const Piece& piece) { kernels.expand(params, sorted.order(), piece); };
  return same_in_pieces(random, p.num_tokens, p.num_out, 32, y, run) ? nullptr : "expand";
}

const char* try_wgrad(const Problem& p, const CpuKernels& kernels, Random& random, bool transposed) {
  const Tensor narrow(p.num_tokens * p.z_width(), p.dtype, random), wide(p.num_tokens * p.num_in, p.dtype, random);
  const DType grad_dtype = p.dtype == DType::kF64 || random.one_in(2) ? p.dtype : DType::kF32;
  Tensor grad(p.num_experts() * p.rank * p.num_in, grad_dtype);
  const SortedTokens sorted = p.sorted();
  auto params = p.params<WgradParams>();
  params.narrow = narrow.memory.get();
  params.wide = wide.memory.get();
  params.wide_row_stride = p.num_in;
  params.grad = grad.memory.get();
  params.transposed = transposed;
  params.num_wide = p.num_in;
  params.grad_dtype = grad_dtype;
  const auto run = [&](const Piece& piece) {
    if (piece.positions.begin == 0) kernels.wgrad(params, sorted.order(), piece.columns);  // its tokens are never cut
  };
  if (!same_in_pieces(random, p.num_tokens, p.num_in, 32, grad, run)) return "wgrad";
  const int64_t expert_bytes = grad.num_bytes / p.num_experts();
  for (int64_t stage = 0; stage < p.num_stages; ++stage) {
    const std::byte* begin = grad.memory.get() + stage * expert_bytes;
    const bool is_absent = sorted.order().group_begin[stage] == sorted.order().group_begin[stage + 1];
    const bool is_zero = std::all_of(begin, begin + expert_bytes, [](std::byte b) { return b == std::byte{0}; });
    if (is_absent != is_zero) return is_absent ? "wgrad of an absent stage" : "wgrad of a stage";
  }
  return nullptr;
}

}  // namespace
}  // namespace mote

int main(int argc, char** argv) {
#ifdef __AVX2__
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
#ifdef __AVX512F__
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return 77;
#endif
  const int64_t num_problems = argc > 1 ? std::atoll(argv[1]) : 300;
  mote::Random random{std::mt19937_64(argc > 2 ? std::atoll(argv[2]) : 0)};
  for (int64_t i = 0; i < num_problems; ++i) {
    const mote::Problem problem(random);
    const mote::CpuKernels& kernels = mote::MOTE_CPU_ISA::cpu_kernels(problem.dtype);
    for (const auto attempt : {mote::try_shrink, mote::try_expand, mote::try_wgrad}) {
      for (const bool transposed : {false, true}) {
        const char* wrong = attempt(problem, kernels, random, transposed);
        if (wrong == nullptr) continue;
        std::printf("%s%s: %s\n", wrong, transposed ? ", transposed" : "", problem.text().c_str());
        return 1;
      }
    }
  }
  std::printf("%lld problems\n", static_cast<long long>(num_problems));
}
