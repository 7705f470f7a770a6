// What the scheduler proposes (Plan) and what it says after it was told the sampled tokens (Outcome): flat arrays that
// are written once and read from Python without a copy.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace mote::engine {

// One forward: R rows, T tokens, L rows of logits. Rows stand in the order of the stage of their first token.
struct Plan {
  std::vector<int64_t> request_ids;      // [R]; of a row whose samples fork behind it, the first one's
  std::vector<int64_t> token_ids;        // [T]
  std::vector<int64_t> positions;        // [T]
  std::vector<int32_t> stage_ids;        // [T]
  std::vector<int64_t> slots;            // [T] page * page_size + place in it
  std::vector<int32_t> query_starts;     // [R + 1] into T
  std::vector<int32_t> lengths;          // [R] tokens in memory after this step
  std::vector<int32_t> page_tables;      // [R, table_width], padded with 0
  std::vector<int32_t> copies;           // [C, 2] page from, page to: whole pages, before the forward
  std::vector<int64_t> logits_at;        // [L] into T; repeated for samples that fork
  std::vector<int64_t> logits_requests;  // [L]
  std::vector<int32_t> modes;            // [L] Mode
  std::vector<int64_t> end_ids;          // [L] end marker that may come, -1 for none
  std::vector<int64_t> choices;          // [L] bits of the stages whose start marker may come
  std::vector<int64_t> preempted;        // requests that lost their pages since the last plan
  int64_t table_width = 0;
};

// What a step came to. N requests were given tokens; F finished; B were rolled back by their verdict.
struct Outcome {
  std::vector<int64_t> request_ids;  // [N]
  std::vector<int32_t> counts;       // [N] tokens appended to each, sampled and forced
  std::vector<int64_t> tokens;       // [sum of counts]
  std::vector<int32_t> stage_ids;    // [sum of counts]
  std::vector<int64_t> finished;     // [F]
  std::vector<int32_t> reasons;      // [F] Reason
  std::vector<int64_t> rolled_back;  // [B] their tokens above are those after the roll-back
  std::vector<int32_t> attempts;     // [B] the attempt that begins

  void clear() {
    for (auto* array : {&request_ids, &tokens, &finished, &rolled_back}) array->clear();
    for (auto* array : {&counts, &stage_ids, &reasons, &attempts}) array->clear();
  }
};

// Objects whose memory is used again once nobody but this holds them.
template <typename T>
class Recycled {
 public:
  const std::shared_ptr<T>& take() {
    for (const auto& object : made_) {
      if (object.use_count() == 1) return object;
    }
    return made_.emplace_back(std::make_shared<T>());
  }

 private:
  std::vector<std::shared_ptr<T>> made_;
};

}  // namespace mote::engine
