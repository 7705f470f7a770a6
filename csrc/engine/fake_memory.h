// Tests only: KV memory in which a slot holds a fingerprint in place of keys and values, and the model that reads it.
//
// The fingerprint of a token stands for all that its keys and values depend on: the tokens and stage ids up to it, the
// experts as they were then, and the salt, over which nothing may be shared. Every step makes the plan's copies, writes
// its tokens, and reads the whole history of every row back through its page table: whatever is shared, evicted,
// copied or rolled back wrongly is a fingerprint that is not the one of the row's own tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/stage_ids.h"
#include "engine/step_scheduler.h"

namespace mote::engine {

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

inline std::vector<int64_t> ids_of(const Request& request) {
  std::vector<int64_t> ids;
  for (const Token& token : request.tokens) ids.push_back(token.id);
  return ids;
}

class FakeMemory {
 public:
  FakeMemory(int64_t num_pages, int64_t page_size) : page_size_(page_size), slots_(num_pages * page_size) {}

  // The experts are other ones from here on.
  void retrain() { ++generation_; }
  // What the request computed is no longer in memory, or only its first tokens are.
  void forget(int64_t id, int64_t num_tokens = 0) {
    auto& written = written_[id];
    written.resize(std::min<size_t>(written.size(), num_tokens));
  }

  void run(const Plan& plan, const StepScheduler& scheduler) {
    copy(plan);
    for (size_t row = 0; row < plan.request_ids.size(); ++row)
      write(plan, row, scheduler.request(plan.request_ids[row]));
    for (size_t row = 0; row < plan.request_ids.size(); ++row) read(plan, row);
  }

  // The forward raised: after the copies or before, and what it has written is anything.
  void raise(const Plan& plan, const StepScheduler& scheduler, bool with_copies) {
    for (size_t row = 0; row < plan.request_ids.size(); ++row) {
      note_hits(plan.positions[plan.query_starts[row]], scheduler.request(plan.request_ids[row]));
    }
    if (with_copies) copy(plan);
    for (const int64_t slot : plan.slots) slots_[slot] = ~uint64_t{0};
  }

  // What the request's row has written is worthless.
  void poison(const Plan& plan, int64_t id) {
    for (size_t row = 0; row < plan.request_ids.size(); ++row) {
      if (plan.request_ids[row] != id) continue;
      for (int32_t i = plan.query_starts[row]; i < plan.query_starts[row + 1]; ++i)
        slots_[plan.slots[i]] = ~uint64_t{0};
    }
  }

  // The samples of a request go on from what it wrote.
  void fork(int64_t from, int64_t to) { written_[to] = written_[from]; }

 private:
  void copy(const Plan& plan) {
    if (plan.copies.empty()) return;
    const auto before = slots_;  // none of them reads what another one wrote
    for (size_t i = 0; i < plan.copies.size(); i += 2) {
      std::copy_n(&before[plan.copies[i] * page_size_], page_size_, &slots_[plan.copies[i + 1] * page_size_]);
    }
  }

  uint64_t next(uint64_t fingerprint, const Request& request, int64_t place) const {
    const int32_t stage_id = request.tokens[place].stage_id;
    const uint64_t experts = stage_id == kBaseOnly ? 0 : (request.experts << 32) + generation_;
    for (const uint64_t word :
         {static_cast<uint64_t>(request.tokens[place].id), static_cast<uint64_t>(stage_id + 3), experts}) {
      fingerprint = (fingerprint ^ word) * 0xBF58476D1CE4E5B9u;
      fingerprint ^= fingerprint >> 31;
    }
    return fingerprint;
  }

  // Of the tokens before a row, those it did not compute itself it found in the cache.
  void note_hits(int64_t num_tokens, const Request& request) {
    auto& written = written_[request.id];
    written.resize(std::min<size_t>(written.size(), num_tokens));
    while (static_cast<int64_t>(written.size()) < num_tokens) add(written, request);
  }

  void add(std::vector<uint64_t>& written, const Request& request) const {
    const uint64_t last = written.empty() ? request.salt + 1 : written.back();
    written.push_back(next(last, request, static_cast<int64_t>(written.size())));
  }

  void write(const Plan& plan, size_t row, const Request& request) {
    auto& written = written_[request.id];
    const int32_t begin = plan.query_starts[row], end = plan.query_starts[row + 1];
    note_hits(plan.positions[begin], request);
    for (int32_t i = begin; i < end; ++i) {
      require(plan.positions[i] == static_cast<int64_t>(written.size()), "a row's positions do not follow each other");
      require(plan.token_ids[i] == request.tokens[written.size()].id, "a planned token is not the request's");
      require(plan.stage_ids[i] == request.tokens[written.size()].stage_id, "a planned stage id is not the request's");
      add(written, request);
      slots_[plan.slots[i]] = written.back();
    }
  }

  void read(const Plan& plan, size_t row) const {
    const auto& written = written_.at(plan.request_ids[row]);
    require(plan.lengths[row] == static_cast<int64_t>(written.size()), "a row's length is not that of its tokens");
    const int32_t* const table = &plan.page_tables[row * plan.table_width];
    for (int64_t place = 0; place < plan.lengths[row]; ++place) {
      const int64_t slot = table[place / page_size_] * page_size_ + place % page_size_;
      require(slots_[slot] == written[place], "request " + std::to_string(plan.request_ids[row]) +
                                                  " reads something else than its token " + std::to_string(place));
    }
  }

  int64_t page_size_;
  uint64_t generation_ = 0;
  std::vector<uint64_t> slots_;
  std::unordered_map<int64_t, std::vector<uint64_t>> written_;  // fingerprints of each request's leading tokens
};

}  // namespace mote::engine
