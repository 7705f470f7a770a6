// Who runs next: the seeded order of a block's threads, of a grid's blocks, and of an asynchronous copy's reading.
//
// Threads change over only where they must wait, so that what a schedule decides is how far warps run ahead of each
// other: that is what shows a missing barrier. Used by simt.cpp.
#pragma once

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "core/math.h"
#include "simt/simt.h"

namespace mote::simt {

inline constexpr int kWarpSize = 32;

enum class Order { kRoundRobin, kReverse, kWarpAhead, kRandom };

// Which thread runs next. Threads stand in a line (backwards in kReverse); the next one is the first that can run from
// a starting place on: that after the last thread, or a favourite which keeps its warp running as far as it gets.
class Schedule {
 public:
  void configure(Order order, uint64_t seed) {
    order_ = order;
    state_ = seed;
  }

  std::vector<uint64_t> block_order(uint64_t num_blocks) {
    std::vector<uint64_t> blocks(num_blocks);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (order_ == Order::kReverse) return {blocks.rbegin(), blocks.rend()};
    if (order_ != Order::kRoundRobin) {
      for (uint64_t i = num_blocks; i > 1; --i) std::swap(blocks[i - 1], blocks[random() % i]);
    }
    return blocks;
  }

  void begin_block(int num_threads) {
    num_threads_ = num_threads;
    last_place_ = num_threads - 1;
    favourite_ = static_cast<int>(random() % num_threads) / kWarpSize * kWarpSize;
    can_run_.assign(ceil_div(num_threads, 64), 0);
    for (int thread = 0; thread < num_threads; ++thread) set_can_run(thread, true);
  }

  void set_can_run(int thread, bool can_run) {
    const uint64_t bit = uint64_t{1} << place(thread) % 64;
    uint64_t& word = can_run_[place(thread) / 64];
    word = can_run ? word | bit : word & ~bit;
  }

  // The thread to run next, or -1 when none can.
  int next() {
    if (order_ == Order::kRandom && random() % 16 == 0) favourite_ = static_cast<int>(random() % num_threads_);
    const bool by_turns = order_ == Order::kRoundRobin || order_ == Order::kReverse;
    const int found = first_from(by_turns ? (last_place_ + 1) % num_threads_ : favourite_);
    if (found < 0) return -1;
    last_place_ = found;
    return place(found);
  }

  // Whether a copy's source is read when the copy is issued, or as late as it is waited for.
  bool reads_at_issue() { return order_ == Order::kReverse || (order_ == Order::kRandom && random() % 2 == 0); }

 private:
  // A thread's place in the line, and the thread of a place: the same function.
  int place(int thread) const { return order_ == Order::kReverse ? num_threads_ - 1 - thread : thread; }

  int first_from(int start) const {
    const int num_words = static_cast<int>(can_run_.size());
    const uint64_t from_start = ~uint64_t{0} << start % 64;
    for (int i = 0; i <= num_words; ++i) {
      const int word = (start / 64 + i) % num_words;
      uint64_t bits = can_run_[word];
      if (i == 0) bits &= from_start;
      if (i == num_words) bits &= ~from_start;
      if (bits != 0) return word * 64 + lowest_bit64(bits);
    }
    return -1;
  }

  // splitmix64.
  uint64_t random() {
    uint64_t value = state_ += 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    return value ^ value >> 31;
  }

  Order order_ = Order::kRoundRobin;
  uint64_t state_ = 0;
  int num_threads_ = 0;
  int last_place_ = 0;
  int favourite_ = 0;
  std::vector<uint64_t> can_run_;  // a bit for each place
};

}  // namespace mote::simt
