// The real kernels on the host, without torch and Python, so that AddressSanitizer sees every byte they touch.
//
// Each tensor is an allocation of exactly its size, gaps between rows and rows of BASE_ONLY tokens are NaN, outputs
// start as garbage, workspaces as NaN. Each operation runs once under every schedule: the first result is held against
// plain loops in double, element by element, within the rounding errors that fp32 sums can make; the others must have
// its bits. Without AddressSanitizer the same program is what python_tests/mutate_kernels.py tries its mutants on.
//
//   simt_asan [seed]      exit status 1 and the first wrong element, or 0
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "lora/lora.h"
#include "simt/matrix.h"

extern "C" void mote_simt_configure(int schedule, uint64_t seed);

namespace mote {
namespace {

using namespace simt;

#ifdef __SANITIZE_ADDRESS__
constexpr int kSchedulesPerCase = 2;  // addresses are judged here; orders are by the build without AddressSanitizer
#else
constexpr int kSchedulesPerCase = 4;
#endif

// ---- cases ----------------------------------------------------------------------------------------------------------

enum class Layout { kContiguous, kGapped, kOdd, kExpanded };

struct Case {
  std::string workload;
  int64_t num_tokens, num_in, num_out;
  int rank, num_stages;
  bool shared = true;
  Layout layout = Layout::kContiguous;
  std::string misaligned = "";  // one tensor that begins one element off; or all of them in Layout::kOdd
  int infinite_expert = -1;     // whose A and B hold Inf
  std::string only = "";        // the one operation that is tried; or all of them

  bool has(const char* operation) const { return only.empty() || only == operation; }

  int num_experts() const { return num_stages + (shared ? 1 : 0); }
  int halves() const { return shared ? 2 : 1; }
};

std::string text(const Case& c, DType dtype) {
  static const char* kDTypes[] = {"f32", "f16", "bf16"};
  static const char* kLayouts[] = {"contiguous", "gapped", "odd", "expanded"};
  return c.workload + " T=" + std::to_string(c.num_tokens) + " K=" + std::to_string(c.num_in) +
         " N=" + std::to_string(c.num_out) + " r=" + std::to_string(c.rank) + " S=" + std::to_string(c.num_stages) +
         (c.shared ? " shared " : " ") + kLayouts[static_cast<int>(c.layout)] + " " + kDTypes[static_cast<int>(dtype)] +
         (c.misaligned.empty() ? "" : " misaligned " + c.misaligned) +
         (c.infinite_expert < 0 ? "" : " Inf in expert " + std::to_string(c.infinite_expert));
}

int32_t id_of(const Case& c, int64_t token, Random& random) {
  const int stages = c.num_stages;
  if (c.workload == "one_stage") return stages / 2;
  if (c.workload == "runs") return static_cast<int32_t>(token * (stages + 2) / c.num_tokens) - 2;
  if (c.workload == "alternating") return stages == 0 ? -1 : static_cast<int32_t>(token % stages);
  if (c.workload == "random") return random.below(stages + 2) - 2;
  if (c.workload == "one_token") return token == c.num_tokens - 1 ? stages - 1 : -2;
  if (c.workload == "empty_stage") return stages < 2 ? -1 : 1 + random.below(stages - 1);
  if (c.workload == "all_base") return -2;
  if (c.workload == "all_shared") return -1;
  const int32_t illegal[] = {stages, 99, -3, kIllegalId};
  if (c.workload == "illegal") return random.below(3) > 0 ? random.below(stages + 2) - 2 : illegal[random.below(4)];
  throw std::logic_error("no workload " + c.workload);
}

std::vector<Case> named_workloads() {
  std::vector<Case> cases;
  for (const char* workload : {"one_stage", "runs", "alternating", "random", "one_token", "empty_stage", "all_base",
                               "all_shared", "illegal"}) {
    cases.push_back({workload, 133, 72, 80, 8, 3});
    cases.push_back({workload, 37, 136, 72, 24, 4, false, Layout::kGapped});
    cases.push_back({workload, 70, 33, 41, 5, 2, true, Layout::kOdd});
  }
  return cases;
}

std::vector<Case> edge_cases() {
  std::vector<Case> cases;
  // Sizes at and around the edges of tiles.
  for (const int64_t num_tokens : {0, 1, 16, 17, 64, 65, 128}) cases.push_back({"random", num_tokens, 72, 136, 16, 3});
  for (const int64_t size : {1, 7, 8, 32, 64, 65, 128, 129}) cases.push_back({"random", 66, size, size, 8, 2});
  for (const int rank : {1, 15, 16, 32, 40, 64, 72}) cases.push_back({"random", 66, 40, 72, rank, 2});
  for (const int rank : {136, 256}) cases.push_back({"random", 18, 40, 72, rank, 2});
  for (const int stages : {0, 1, 33, 64}) cases.push_back({"random", 80, 40, 72, 16, stages});
  for (const int stages : {0, 1, 33, 64}) cases.push_back({"random", 50, 24, 40, 8, stages, false});
  // Several turns of the rings: deep splits of K, long chunks of tokens, several steps of columns in a block.
  const auto add_for = [&](const char* operation, Case c) {
    c.only = operation;
    cases.push_back(c);
  };
  add_for("shrink", {"random", 16, 32 * 64 * 5 + 8, 8, 16, 3});
  add_for("shrink", {"random", 133, 16 * 64 * 5 + 8, 8, 24, 2});
  add_for("wgrad", {"runs", 16 * 192 + 70, 24, 40, 8, 2});
  add_for("wgrad", {"alternating", 16 * 64 + 70, 24, 40, 40, 2});
  add_for("expand", {"random", 20, 8, 64 * 264 + 8, 8, 1});
  // Memory: one row for all tokens, and each tensor in turn one element off the alignment the fast kernels need.
  cases.push_back({"random", 67, 72, 80, 8, 3, true, Layout::kExpanded});
  for (const char* tensor : {"x", "lora_A", "z", "lora_B", "bias", "addend", "y", "grad_y"}) {
    cases.push_back({"random", 67, 72, 80, 8, 2, true, Layout::kContiguous, tensor});
  }
  // An expert of Inf shows in its own tokens and in no others.
  for (const int expert : {0, 2, 3}) {
    for (const char* workload : {"random", "runs", "illegal"}) {
      cases.push_back({workload, 133, 72, 80, 8, 3, true, Layout::kContiguous, "", expert});
      cases.push_back({workload, 40, 72, 80, 40, 3, true, Layout::kGapped, "", expert});
    }
  }
  return cases;
}

// ---- judging --------------------------------------------------------------------------------------------------------

// A sum in double, and of how many terms of which total size it was made.
struct Truth {
  double value = 0, magnitude = 0;
  int64_t num_terms = 0;

  void add(double term) {
    value += term;
    magnitude += std::abs(term);
    ++num_terms;
  }

  void multiply(double factor) {
    value *= factor;
    magnitude *= std::abs(factor);
  }
};

// Whether `got` is the truth up to what summing in fp32 in any order and rounding once can lose.
bool close(double got, const Truth& truth, DType dtype) {
  if (std::isnan(truth.value)) return std::isnan(got);
  if (std::isinf(truth.value)) return got == truth.value;
  const double half_unit = dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  const double summing = static_cast<double>(truth.num_terms + 4) * 0x1p-24 * truth.magnitude;
  const double smallest = dtype == DType::kF16 ? 0x1p-25 : 0x1p-140;
  return std::abs(got - truth.value) <= summing * (1 + half_unit) + half_unit * std::abs(truth.value) + smallest;
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

template <typename TruthOf>
void judge(const char* what, const Matrix& got, const TruthOf& truth_of) {
  for (int64_t row = 0; row < got.rows; ++row) {
    for (int64_t column = 0; column < got.columns; ++column) {
      const Truth truth = truth_of(row, column);
      if (close(got.get(row, column), truth, got.dtype)) continue;
      throw std::runtime_error(std::string(what) + "[" + std::to_string(row) + ", " + std::to_string(column) + "] is " +
                               std::to_string(got.get(row, column)) + ", expected " + std::to_string(truth.value));
    }
  }
  require(got.gaps_untouched(), std::string(what) + ": memory between the rows was written");
}

// ---- one case in one element type -----------------------------------------------------------------------------------

class Trial {
 public:
  Trial(const Case& c, DType dtype, uint64_t seed) : c_(c), dtype_(dtype), seed_(seed), random_(seed) {
    std::vector<int32_t> ids;
    for (int64_t token = 0; token < c.num_tokens; ++token) ids.push_back(id_of(c, token, random_));
    ids_ = exactly(ids);
    std::vector<float> scales;
    for (int expert = 0; expert < c.num_experts(); ++expert)
      scales.push_back(32.f / 24.f / static_cast<float>(expert + 1));
    scales_ = exactly(scales);
  }

  void run() {
    const Matrix x = tokens_matrix("x", c_.num_in), grad_y = tokens_matrix("grad_y", c_.num_out);
    const Matrix lora_a = weights("lora_A", c_.rank, c_.num_in), lora_b = weights("lora_B", c_.num_out, c_.rank);
    const Matrix z = halves_matrix();
    if (c_.has("shrink")) shrink(x, lora_a);
    if (c_.has("expand")) expand(z, lora_b);
    if (c_.has("delta")) delta(x, lora_a, lora_b);
    if (c_.has("wgrad")) {
      wgrad("grad A", z, x, false, dtype_);
      wgrad("grad B", z, grad_y, true, DType::kF32);
    }
  }

 private:
  // -- inputs

  bool is_misaligned(const std::string& name) const { return c_.layout == Layout::kOdd || c_.misaligned == name; }

  int64_t row_stride(int64_t columns) const {
    if (c_.layout == Layout::kGapped) return (columns + 7) / 8 * 8 + 8;
    return c_.layout == Layout::kOdd ? columns + 3 : columns;
  }

  // [T, columns]; what nobody may use is NaN: the rows of BASE_ONLY tokens, and the gaps.
  Matrix tokens_matrix(const char* name, int64_t columns) {
    const int64_t stride = c_.layout == Layout::kExpanded ? 0 : row_stride(columns);
    Matrix matrix(dtype_, c_.num_tokens, columns, stride, is_misaligned(name), kNaNByte);
    for (int64_t token = 0; token < (stride == 0 ? 1 : c_.num_tokens); ++token) {
      if (stride != 0 && ids_[token] == kBaseOnly) continue;
      for (int64_t column = 0; column < columns; ++column) matrix.set(token, column, random_.symmetric());
    }
    return matrix;
  }

  Matrix dense(const char* name, int64_t rows, int64_t columns) {
    Matrix matrix(dtype_, rows, columns, columns, is_misaligned(name), kNaNByte);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) matrix.set(row, column, random_.symmetric());
    }
    return matrix;
  }

  // [E · rows, columns]
  Matrix weights(const char* name, int64_t rows, int64_t columns) {
    Matrix matrix = dense(name, c_.num_experts() * rows, columns);
    if (c_.infinite_expert >= 0) {
      for (int64_t row = 0; row < rows; ++row) matrix.set(c_.infinite_expert * rows + row, row % columns, INFINITY);
    }
    return matrix;
  }

  // z as shrink leaves it: zeros in inactive halves, NaN in the rows of illegal ids.
  Matrix halves_matrix() {
    Matrix matrix = dense("z", c_.num_tokens, c_.halves() * c_.rank);
    for (int64_t token = 0; token < c_.num_tokens; ++token) {
      for (int64_t column = 0; column < matrix.columns; ++column) {
        if (!is_legal(token))
          matrix.set(token, column, NAN);
        else if (expert_of(token, column / c_.rank) < 0)
          matrix.set(token, column, 0);
      }
    }
    return matrix;
  }

  // -- what ids mean, said again

  bool is_legal(int64_t token) const { return ids_[token] >= kBaseOnly && ids_[token] < c_.num_stages; }

  int expert_of(int64_t token, int64_t half) const {
    const int32_t id = ids_[token];
    if (!is_legal(token) || id == kBaseOnly) return -1;
    return half == 1 ? c_.num_stages : id == kSharedOnly ? -1 : id;
  }

  // -- the operations

  // Runs the operation under every schedule; judges the first outputs, compares the others with them.
  template <typename Run, typename Judge>
  void try_out(const std::string& what, const Run& run, const Judge& judge_outputs) {
    std::vector<Matrix> first;
    for (int i = 0; i < kSchedulesPerCase; ++i) {
      const int schedule = static_cast<int>((seed_ + static_cast<uint64_t>(i)) % 4);
      try {
        mote_simt_configure(schedule, seed_);
        std::vector<Matrix> outputs = run();
        if (i == 0) {
          judge_outputs(outputs);
          first = std::move(outputs);
          continue;
        }
        for (size_t j = 0; j < first.size(); ++j) require(outputs[j].same_bits(first[j]), "not the bits of the first");
      } catch (const std::exception& error) {
        throw std::runtime_error(text(c_, dtype_) + ": " + what + ", schedule " + std::to_string(schedule) + ", seed " +
                                 std::to_string(seed_) + ": " + error.what());
      }
    }
  }

  Matrix output(const char* name, int64_t rows, int64_t columns, int64_t stride, DType dtype) const {
    return Matrix(dtype, rows, columns, stride, is_misaligned(name), kGarbageByte);
  }

  static std::unique_ptr<float[]> workspace(int64_t num_floats) {
    std::unique_ptr<float[]> floats(new float[static_cast<size_t>(num_floats)]);
    std::memset(floats.get(), kNaNByte, static_cast<size_t>(num_floats) * sizeof(float));
    return floats;
  }

  ShrinkParams shrink_params(const Matrix& x, const Matrix& lora_a, Matrix& z) const {
    return {x.data(), x.stride,      lora_a.data(), false,   ids_.get(),    scales_.get(), z.data(),
            nullptr,  c_.num_tokens, c_.num_in,     c_.rank, c_.num_stages, c_.shared,     dtype_};
  }

  ExpandParams expand_params(const Matrix& z, const Matrix& lora_b, const Matrix* bias, const Matrix* addend,
                             Matrix& y) const {
    return {z.data(),
            lora_b.data(),
            false,
            ids_.get(),
            bias ? bias->data() : nullptr,
            addend ? addend->data() : nullptr,
            addend ? addend->stride : 0,
            y.data(),
            y.stride,
            c_.num_tokens,
            c_.num_out,
            c_.rank,
            c_.num_stages,
            c_.shared,
            dtype_};
  }

  void judge_z(const Matrix& got, const Matrix& x_matrix, const Matrix& lora_a) const {
    const Numbers x(x_matrix), a(lora_a);
    judge("z", got, [&](int64_t token, int64_t column) {
      Truth truth;
      const int expert = expert_of(token, column / c_.rank);
      if (!is_legal(token)) truth.add(NAN);
      if (expert < 0) return truth;
      const double* x_row = x.row(token);
      const double* a_row = a.row(expert * c_.rank + column % c_.rank);
      for (int64_t i = 0; i < c_.num_in; ++i) truth.add(x_row[i] * a_row[i]);
      truth.multiply(scales_[expert]);
      return truth;
    });
  }

  void judge_y(const Matrix& got, const Matrix& z_matrix, const Matrix& lora_b, const Matrix* bias,
               const Matrix* addend) const {
    const Numbers z(z_matrix), b(lora_b);
    judge("y", got, [&](int64_t token, int64_t column) {
      Truth truth;
      if (!is_legal(token)) truth.add(NAN);
      if (bias != nullptr) truth.add(bias->get(0, column));
      if (addend != nullptr) truth.add(addend->get(token, column));
      for (int half = 0; half < c_.halves(); ++half) {
        const int expert = expert_of(token, half);
        if (expert < 0) continue;
        const double* z_half = z.row(token) + half * c_.rank;
        const double* b_row = b.row(expert * c_.num_out + column);
        for (int i = 0; i < c_.rank; ++i) truth.add(z_half[i] * b_row[i]);
      }
      return truth;
    });
  }

  void judge_grad(const Matrix& got, const Matrix& narrow_matrix, const Matrix& wide_matrix, bool transposed) const {
    const Numbers narrow(narrow_matrix), wide(wide_matrix);
    const int64_t rows = transposed ? wide_matrix.columns : c_.rank;
    judge("grad", got, [&](int64_t row, int64_t column) {
      Truth truth;
      const int64_t expert = row / rows, half = expert == c_.num_stages ? 1 : 0;
      const int64_t rank_index = transposed ? column : row % rows, wide_index = transposed ? row % rows : column;
      for (int64_t token = 0; token < c_.num_tokens; ++token) {
        if (expert_of(token, half) != expert) continue;
        truth.add(narrow.row(token)[half * c_.rank + rank_index] * wide.row(token)[wide_index]);
      }
      return truth;
    });
  }

  void shrink(const Matrix& x, const Matrix& lora_a) {
    try_out(
        "shrink",
        [&] {
          std::vector<Matrix> outputs;
          outputs.push_back(output("z", c_.num_tokens, c_.halves() * c_.rank, c_.halves() * c_.rank, dtype_));
          ShrinkParams params = shrink_params(x, lora_a, outputs[0]);
          const auto floats = workspace(device_backend().shrink_workspace_floats(params));
          params.workspace = floats.get();
          device_backend().shrink(params, nullptr);
          return outputs;
        },
        [&](const std::vector<Matrix>& outputs) { judge_z(outputs[0], x, lora_a); });
  }

  // Alone, then with a bias and an addend, then with y itself as the addend.
  void expand(const Matrix& z, const Matrix& lora_b) {
    const Matrix bias = dense("bias", 1, c_.num_out);
    Matrix addend(dtype_, c_.num_tokens, c_.num_out, row_stride(c_.num_out), is_misaligned("addend"), kNaNByte);
    for (int64_t token = 0; token < c_.num_tokens; ++token) {
      for (int64_t column = 0; column < c_.num_out; ++column) addend.set(token, column, random_.symmetric());
    }
    for (const int additions : {0, 1, 2}) {
      const Matrix* used_bias = additions == 1 ? &bias : nullptr;
      const Matrix* used_addend = additions > 0 ? &addend : nullptr;
      try_out(
          additions == 0   ? "expand"
          : additions == 1 ? "expand with bias and addend"
                           : "expand in place",
          [&] {
            std::vector<Matrix> outputs;
            outputs.push_back(output("y", c_.num_tokens, c_.num_out, row_stride(c_.num_out), dtype_));
            if (additions == 2) {
              for (int64_t token = 0; token < c_.num_tokens; ++token) {
                for (int64_t i = 0; i < c_.num_out; ++i) outputs[0].set(token, i, addend.get(token, i));
              }
            }
            const Matrix* given = additions == 2 ? &outputs[0] : used_addend;
            device_backend().expand(expand_params(z, lora_b, used_bias, given, outputs[0]), nullptr);
            return outputs;
          },
          [&](const std::vector<Matrix>& outputs) { judge_y(outputs[0], z, lora_b, used_bias, used_addend); });
    }
  }

  // y is judged by the z that was left, so that a rounding of z is not counted against y.
  void delta(const Matrix& x, const Matrix& lora_a, const Matrix& lora_b) {
    const Matrix bias = dense("bias", 1, c_.num_out);
    try_out(
        "delta",
        [&] {
          std::vector<Matrix> outputs;
          outputs.push_back(output("z", c_.num_tokens, c_.halves() * c_.rank, c_.halves() * c_.rank, dtype_));
          outputs.push_back(output("y", c_.num_tokens, c_.num_out, row_stride(c_.num_out), dtype_));
          ShrinkParams params = shrink_params(x, lora_a, outputs[0]);
          const auto floats = workspace(device_backend().shrink_workspace_floats(params));
          params.workspace = floats.get();
          device_backend().delta(params, expand_params(outputs[0], lora_b, &bias, nullptr, outputs[1]), nullptr);
          return outputs;
        },
        [&](const std::vector<Matrix>& outputs) {
          judge_z(outputs[0], x, lora_a);
          judge_y(outputs[1], outputs[0], lora_b, &bias, nullptr);
        });
  }

  void wgrad(const std::string& what, const Matrix& narrow, const Matrix& wide, bool transposed, DType grad_dtype) {
    const int64_t rows = transposed ? wide.columns : c_.rank, columns = transposed ? c_.rank : wide.columns;
    try_out(
        what,
        [&] {
          std::vector<Matrix> outputs;
          outputs.push_back(output("grad", c_.num_experts() * rows, columns, columns, grad_dtype));
          WgradParams params{narrow.data(), wide.data(), wide.stride,   ids_.get(),   outputs[0].data(),
                             transposed,    nullptr,     c_.num_tokens, wide.columns, c_.rank,
                             c_.num_stages, c_.shared,   dtype_,        grad_dtype};
          const auto floats = workspace(device_backend().wgrad_workspace_floats(params));
          params.workspace = floats.get();
          device_backend().wgrad(params, nullptr);
          return outputs;
        },
        [&](const std::vector<Matrix>& outputs) { judge_grad(outputs[0], narrow, wide, transposed); });
  }

  const Case& c_;
  const DType dtype_;
  const uint64_t seed_;
  Random random_;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<float[]> scales_;
};

// Ids that are legal, that are not, and that would only be after wrapping.
template <typename Id>
void try_narrowing() {
  const int num_stages = 3;
  std::vector<Id> ids;
  std::vector<int32_t> expected;
  for (const int64_t id :
       {0L, 2L, 3L, -1L, -2L, -3L, 255L, 127L, int64_t{1} << 32, (int64_t{1} << 32) - 1, INT64_MIN}) {
    for (int repeat = 0; repeat < 30; ++repeat) {
      ids.push_back(static_cast<Id>(id));
      const bool legal = std::is_signed_v<Id> ? ids.back() >= Id(-2) && ids.back() < Id{3} : ids.back() < Id{3};
      expected.push_back(legal ? static_cast<int32_t>(ids.back()) : kIllegalId);
    }
  }
  const auto given = exactly(ids);
  const auto narrowed = exactly(std::vector<int32_t>(ids.size(), 77));
  device_backend().narrow_ids(
      {given.get(), sizeof(Id), std::is_signed_v<Id>, narrowed.get(), static_cast<int64_t>(ids.size()), num_stages},
      nullptr);
  for (size_t i = 0; i < ids.size(); ++i) {
    require(narrowed[i] == expected[i], "narrow_ids: id " + std::to_string(ids[i]) + " became " +
                                            std::to_string(narrowed[i]) + ", expected " + std::to_string(expected[i]));
  }
}

void try_everything(uint64_t seed) {
  try_narrowing<int8_t>();
  try_narrowing<uint8_t>();
  try_narrowing<int16_t>();
  try_narrowing<uint16_t>();
  try_narrowing<int32_t>();
  try_narrowing<uint32_t>();
  try_narrowing<int64_t>();
  try_narrowing<uint64_t>();
  uint64_t number = seed;
  for (const Case& c : named_workloads()) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) Trial(c, dtype, number++).run();
  }
  // The 16-bit types are one template: by turns.
  for (const Case& c : edge_cases()) {
    Trial(c, DType::kF32, number++).run();
    Trial(c, number / 2 % 2 == 0 ? DType::kF16 : DType::kBF16, number).run();
    ++number;
  }
  std::printf("%d trials, each under %d schedules\n", static_cast<int>(number - seed), kSchedulesPerCase);
}

}  // namespace
}  // namespace mote

int main(int num_arguments, char** arguments) {
  try {
    mote::try_everything(num_arguments > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
