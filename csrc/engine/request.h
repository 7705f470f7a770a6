// One request as the scheduler sees it: its tokens and pages, where it stands in its path, and its place in the order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/kv_pages.h"
#include "engine/path_rules.h"

namespace mote::engine {

struct alignas(64) Request : Sequence {
  // What every step needs, behind what every step needs of a Sequence: three lines of the processor's cache.
  bool is_running = false;
  bool is_decoding = false;  // its last step ended with a sampled token
  int32_t text_id = 0;       // stage id of the next token unless that is a marker
  int64_t id = 0;
  std::vector<int64_t> other_ids;  // while the prompt is computed: the samples that will fork from it
  int64_t num_reported = 0;        // leading tokens that the caller knows
  int64_t num_plain = 0;           // text tokens that change nothing about `next`: the rules need not be asked
  Next next;
  PathState path;

  std::shared_ptr<const std::vector<PathRules>> attempts;
  int32_t attempt = 0;
  int32_t priority = 0;
  int64_t arrival = 0;      // grows with every sample submitted, kept for life
  int32_t passed_over = 0;  // how often a younger request was admitted before it
  int32_t prompt_id = 0;    // stage id outside of stages
  int32_t text_id_after_prompt = 0;
  bool was_admitted = false;
  int64_t prompt_length = 0;
  int64_t num_cached = 0;  // of the prompt, found in the cache when it was first admitted

  int64_t num_samples() const { return 1 + static_cast<int64_t>(other_ids.size()); }
  const PathRules& rules() const { return (*attempts)[attempt]; }
};

// Who comes first, among the waiting and among the running.
struct ComesFirst {
  bool operator()(const Request* a, const Request* b) const {
    return a->priority != b->priority ? a->priority > b->priority : a->arrival < b->arrival;
  }
};

// The memory of requests, in pieces: those of about the same age lie side by side, so that a step over hundreds of them
// touches few pages of the processor's memory.
class RequestStore {
 public:
  size_t num_taken() const { return pieces_.size() * kPiece - unused_.size(); }

  Request& take() {
    if (unused_.empty()) {
      pieces_.push_back(std::make_unique<Request[]>(kPiece));
      for (size_t i = kPiece; i > 0; --i) unused_.push_back(&pieces_.back()[i - 1]);
    }
    Request* const taken = unused_.back();
    unused_.pop_back();
    return *taken;
  }

  void give_back(Request& request) {
    request = Request();
    unused_.push_back(&request);
  }

 private:
  static constexpr size_t kPiece = 64;

  std::vector<std::unique_ptr<Request[]>> pieces_;
  std::vector<Request*> unused_;
};

}  // namespace mote::engine
