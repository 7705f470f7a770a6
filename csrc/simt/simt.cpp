// The machine behind simt.h: one block at a time, its threads as fibers, its shared memory between guard zones.
//
// What hides a bug on a card is made loud here: shared memory starts as NaN; the target of an asynchronous copy is NaN
// from the copy's issue until its own thread has waited for it; which warp runs ahead, and in what order blocks run, is
// decided by a seeded schedule; threads that can never go on are named with what they wait for. Fragment layouts are
// those of PTX's ldmatrix and mma.m16n8k16.
#include "simt/simt.h"

#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/math.h"
#include "simt/arena.h"
#include "simt/fiber.h"
#include "simt/schedule.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mote::simt {
namespace {

constexpr int kMaxBlockThreads = 1024;
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kMaxSharedBytes = 99 * 1024;  // what the smallest supported cards, sm_86 and sm_120, grant a block

enum class Wait {
  kNothing,
  kBarrier,
  kSyncwarp,
  kLdmatrix,
  kLdmatrixTrans,
  kMmaF16,
  kMmaBF16,
  kOr,
  kBallot,
  kShuffle,
  kReturned
};
constexpr const char* kWaitNames[] = {"nothing",
                                      "__syncthreads",
                                      "__syncwarp",
                                      "ldmatrix_x4",
                                      "ldmatrix_x4_trans",
                                      "mma_m16n8k16<f16>",
                                      "mma_m16n8k16<bf16>",
                                      "warp_or",
                                      "warp_ballot",
                                      "warp_shuffle_xor",
                                      "its end"};

std::string name(Wait wait) { return kWaitNames[static_cast<int>(wait)]; }

struct Copy {
  unsigned char* destination;
  const unsigned char* source;  // null: zeros
  bool read_at_issue;
  unsigned char bytes[16];
  int group;
};

struct Thread {
  Fiber fiber{kStackBytes};
  uint3 index;
  Wait wait;
  std::vector<Copy> copies;  // in flight, oldest first
  int num_groups;            // committed so far
};

struct Warp {
  Wait operation;
  int num_arrived;
  void* operands[kWarpSize];  // of each lane that has arrived, on its own stack
};

// ---- a block --------------------------------------------------------------------------------------------------------

struct Machine {
  std::mutex mutex;  // one launch at a time
  Schedule schedule;
  std::vector<std::unique_ptr<Thread>> threads;  // their stacks are kept from block to block
  std::vector<Warp> warps;
  std::unique_ptr<Arena> arena;
  Fiber* launcher = nullptr;
  const std::function<void()>* thread_body = nullptr;
  int num_threads = 0;
  int num_at_barrier = 0;
  int num_returned = 0;
  int current = 0;
  std::exception_ptr error;
};

Machine machine;

Thread& thread_at(int i) { return *machine.threads[i]; }
Thread& this_thread() { return thread_at(machine.current); }

std::string in_brackets(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("thread " + in_brackets(threadIdx.x, threadIdx.y, threadIdx.z) + ": " + what);
}

// "threads 0-31 wait at __syncthreads, threads 32-127 have returned": for the message of a deadlock.
std::string waiting_threads() {
  std::string text;
  for (int first = 0; first < machine.num_threads;) {
    const Wait wait = thread_at(first).wait;
    int end = first;
    while (end < machine.num_threads && thread_at(end).wait == wait) ++end;
    const bool one = end - first == 1;
    text += (text.empty() ? "" : ", ") + std::string(one ? "thread " : "threads ") + std::to_string(first);
    if (!one) text += "-" + std::to_string(end - 1);
    text += wait == Wait::kReturned ? (one ? " has returned" : " have returned")
                                    : (one ? " waits at " : " wait at ") + name(wait);
    first = end;
  }
  return text;
}

// The next thread to run; finding none although some are left is the deadlock.
int next_thread() {
  const int next = machine.schedule.next();
  if (next < 0) throw std::runtime_error("deadlock: " + waiting_threads());
  return next;
}

Fiber& enter(int thread) {
  machine.current = thread;
  threadIdx = thread_at(thread).index;
  return thread_at(thread).fiber;
}

void yield() {
  const int self = machine.current, next = next_thread();
  if (next != self) thread_at(self).fiber.switch_to(enter(next));
}

void stop(Wait wait) {
  this_thread().wait = wait;
  machine.schedule.set_can_run(machine.current, false);
}

void release(int first_thread, int num_threads) {
  for (int thread = first_thread; thread < first_thread + num_threads; ++thread) {
    thread_at(thread).wait = Wait::kNothing;
    machine.schedule.set_can_run(thread, true);
  }
}

void finish_thread() {
  if (!this_thread().copies.empty()) {
    fail("returned with " + std::to_string(this_thread().copies.size()) +
         " asynchronous copies that were never waited for; end with cp_async_wait<0>()");
  }
  stop(Wait::kReturned);
  ++machine.num_returned;
}

// Not marked by AddressSanitizer: see switch_for_good().
MOTE_SIMT_NO_ASAN void thread_main() {
  Fiber& self = this_thread().fiber;
  self.arrived();
  try {
    (*machine.thread_body)();
    finish_thread();
    self.switch_for_good(machine.num_returned < machine.num_threads ? enter(next_thread()) : *machine.launcher);
  } catch (...) {
    machine.error = std::current_exception();
  }
  self.switch_to(*machine.launcher);
}

void start_thread(int thread) {
  Thread& started = thread_at(thread);
  const unsigned x = blockDim.x, y = blockDim.y, i = static_cast<unsigned>(thread);
  started.index = {i % x, i / x % y, i / x / y};
  started.wait = Wait::kNothing;
  started.copies.clear();
  started.num_groups = 0;
  started.fiber.start(thread_main);
}

void run_block() {
  Fiber launcher;
  machine.launcher = &launcher;
  machine.num_at_barrier = machine.num_returned = 0;
  machine.error = nullptr;
  machine.warps.assign(ceil_div(machine.num_threads, kWarpSize), Warp{});
  machine.schedule.begin_block(machine.num_threads);
  machine.arena->prepare();
  for (int thread = 0; thread < machine.num_threads; ++thread) start_thread(thread);
  launcher.switch_to(enter(next_thread()));
  if (machine.error) std::rethrow_exception(machine.error);
  machine.arena->check_guards();
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  const bool grid_fits =
      grid.x >= 1 && grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  if (!grid_fits || num_threads < 1 || num_threads > kMaxBlockThreads || shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error("no card takes a grid of " + in_brackets(grid.x, grid.y, grid.z) + " blocks of " +
                             in_brackets(block.x, block.y, block.z) + " threads with " + std::to_string(shared_bytes) +
                             " bytes of shared memory (at most " + std::to_string(kMaxSharedBytes) + ")");
  }
}

std::string readable(const std::type_info& type) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(type.name(), nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : type.name();
}

// ---- warp-wide operations -------------------------------------------------------------------------------------------

struct LdmatrixOperands {
  const void* row;
  uint32_t* fragment;
};

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

struct ShuffleOperands {
  float value;
  int lane_mask;
};

template <typename Operands>
Operands& of_lane(const Warp& warp, int lane) {
  return *static_cast<Operands*>(warp.operands[lane]);
}

// Register j of a lane holds row lane / 4 of matrix j, elements 2 * (lane % 4) and the one after; of the columns
// instead of the rows when transposed.
void perform_ldmatrix(const Warp& warp, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], of_lane<LdmatrixOperands>(warp, matrix * 8 + row).row, 16);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = transposed ? elements[column][row] : elements[row][column];
      const uint32_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      of_lane<LdmatrixOperands>(warp, lane).fragment[matrix] = low | high << 16;
    }
  }
}

// Element 0 or 1 of a register.
template <typename Scalar>
float element(uint32_t bits, int i) {
  return host_to_float(Scalar{static_cast<uint16_t>(bits >> 16 * i)});
}

template <typename Scalar>
void perform_mma(const Warp& warp) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaOperands& operands = of_lane<MmaOperands>(warp, lane);
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) a[group + j % 2 * 8][quad * 2 + j / 2 * 8 + i] = element<Scalar>(operands.a[j], i);
      for (int j = 0; j < 2; ++j) b[quad * 2 + j * 8 + i][group] = element<Scalar>(operands.b[j], i);
      for (int j = 0; j < 2; ++j) d[group + j * 8][quad * 2 + i] = operands.d[j * 2 + i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* own = of_lane<MmaOperands>(warp, lane).d;
    for (int i = 0; i < 4; ++i) own[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void perform_or(const Warp& warp) {
  uint32_t all = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) all |= of_lane<uint32_t>(warp, lane);
  for (int lane = 0; lane < kWarpSize; ++lane) of_lane<uint32_t>(warp, lane) = all;
}

void perform_ballot(const Warp& warp) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) votes |= uint32_t{of_lane<uint32_t>(warp, lane) != 0} << lane;
  for (int lane = 0; lane < kWarpSize; ++lane) of_lane<uint32_t>(warp, lane) = votes;
}

void perform_shuffle(const Warp& warp) {
  float values[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) values[lane] = of_lane<ShuffleOperands>(warp, lane).value;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    ShuffleOperands& operands = of_lane<ShuffleOperands>(warp, lane);
    operands.value = values[lane ^ operands.lane_mask];
  }
}

void perform(const Warp& warp) {
  switch (warp.operation) {
    case Wait::kLdmatrix: return perform_ldmatrix(warp, false);
    case Wait::kLdmatrixTrans: return perform_ldmatrix(warp, true);
    case Wait::kMmaF16: return perform_mma<f16>(warp);
    case Wait::kMmaBF16: return perform_mma<bf16>(warp);
    case Wait::kOr: return perform_or(warp);
    case Wait::kBallot: return perform_ballot(warp);
    case Wait::kShuffle: return perform_shuffle(warp);
    default: return;
  }
}

// The last of the warp's lanes to arrive does the work of all, on operands that lie on their stacks.
void join_warp(Wait operation, void* operands) {
  const int lane = machine.current % kWarpSize, first_thread = machine.current - lane;
  Warp& warp = machine.warps[machine.current / kWarpSize];
  if (warp.num_arrived > 0 && warp.operation != operation) {
    fail("is at " + name(operation) + " while lanes of its warp are at " + name(warp.operation) + ": " +
         waiting_threads());
  }
  warp.operation = operation;
  warp.operands[lane] = operands;
  stop(operation);
  if (++warp.num_arrived == kWarpSize) {
    perform(warp);
    warp.num_arrived = 0;
    release(first_thread, kWarpSize);
  }
  yield();
}

void check_aligned(const void* pointer, const char* operation) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
    fail(std::string(operation) + ": an address is not a multiple of 16");
}

void check_aligned_shared(const void* pointer, const char* operation) {
  if (!machine.arena->holds_16(pointer)) fail(std::string(operation) + " outside the block's shared memory");
  check_aligned(pointer, operation);
}

void load_matrices(Wait operation, uint32_t* fragment, const void* row) {
  check_aligned_shared(row, "ldmatrix_x4");
  LdmatrixOperands operands{row, fragment};
  join_warp(operation, &operands);
}

void land(const Copy& copy) {
  if (copy.source == nullptr) {
    std::memset(copy.destination, 0, 16);
  } else {
    std::memcpy(copy.destination, copy.read_at_issue ? copy.bytes : copy.source, 16);
  }
}

}  // namespace

unsigned char* shared_memory() { return machine.arena->begin(); }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::type_info& params,
              const std::function<void()>& thread_body) {
  const std::lock_guard lock(machine.mutex);
  bool inside = false;
  try {
    check_launch(grid, block, shared_bytes);
    gridDim = grid;
    blockDim = block;
    machine.num_threads = static_cast<int>(block.x * block.y * block.z);
    const size_t num_threads = static_cast<size_t>(machine.num_threads);
    while (machine.threads.size() < num_threads) machine.threads.push_back(std::make_unique<Thread>());
    machine.thread_body = &thread_body;
    machine.arena = std::make_unique<Arena>(shared_bytes);
    inside = true;
    for (const uint64_t i : machine.schedule.block_order(uint64_t{grid.x} * grid.y * grid.z)) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      run_block();
    }
  } catch (const std::exception& error) {
    const std::string where = inside ? "block " + in_brackets(blockIdx.x, blockIdx.y, blockIdx.z) + ": " : "";
    throw std::runtime_error("simt: kernel of " + readable(params) + ": " + where + error.what());
  }
}

void cp_async_wait(int num_pending) {
  Thread& thread = this_thread();
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < thread.num_groups - num_pending; ++copy) land(*copy);
  thread.copies.erase(thread.copies.begin(), copy);
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands operands{d, a, {b0, b1}};
  join_warp(Wait::kMmaF16, &operands);
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands operands{d, a, {b0, b1}};
  join_warp(Wait::kMmaBF16, &operands);
}

}  // namespace mote::simt

namespace mote {

using namespace simt;

void cp_async_16(void* shared_dst, const void* global_src, bool valid) {
  check_aligned_shared(shared_dst, "cp_async_16");
  check_aligned(global_src, "cp_async_16");
  Copy copy{static_cast<unsigned char*>(shared_dst),
            valid ? static_cast<const unsigned char*>(global_src) : nullptr,
            machine.schedule.reads_at_issue(),
            {},
            this_thread().num_groups};
  if (valid && copy.read_at_issue) std::memcpy(copy.bytes, global_src, 16);
  std::memset(shared_dst, kPoison, 16);
  this_thread().copies.push_back(copy);
}

void cp_async_commit() { ++this_thread().num_groups; }

void ldmatrix_x4(uint32_t (&fragment)[4], const void* shared_row) {
  load_matrices(Wait::kLdmatrix, fragment, shared_row);
}

void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* shared_row) {
  load_matrices(Wait::kLdmatrixTrans, fragment, shared_row);
}

void load_16(uint32_t (&words)[4], const void* source) {
  check_aligned(source, "load_16");
  std::memcpy(words, source, 16);
}

void store_16(void* destination, const uint32_t (&words)[4]) {
  check_aligned(destination, "store_16");
  std::memcpy(destination, words, 16);
}

uint32_t warp_or(uint32_t value) {
  join_warp(Wait::kOr, &value);
  return value;
}

uint32_t warp_ballot(bool value) {
  uint32_t votes = value;
  join_warp(Wait::kBallot, &votes);
  return votes;
}

float warp_shuffle_xor(float value, int lane_mask) {
  if (lane_mask < 0 || lane_mask >= kWarpSize) fail("warp_shuffle_xor: the lane mask must be from 0 to 31");
  ShuffleOperands operands{value, lane_mask};
  join_warp(Wait::kShuffle, &operands);
  return operands.value;
}

}  // namespace mote

void __syncthreads() {
  using namespace mote::simt;
  stop(Wait::kBarrier);
  if (++machine.num_at_barrier == machine.num_threads) {
    machine.num_at_barrier = 0;
    release(0, machine.num_threads);
  }
  yield();
}

void __syncwarp() { mote::simt::join_warp(mote::simt::Wait::kSyncwarp, nullptr); }

void mote_simt_configure(int schedule, uint64_t seed) {
  using namespace mote::simt;
  if (schedule < 0 || schedule > static_cast<int>(Order::kRandom)) {
    throw std::invalid_argument("mote_simt_configure: schedule must be from 0 to 3, got " + std::to_string(schedule));
  }
  const std::lock_guard lock(machine.mutex);
  machine.schedule.configure(static_cast<Order>(schedule), seed);
}
