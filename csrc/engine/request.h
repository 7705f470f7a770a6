// One request as the scheduler sees it: its tokens and pages, where it stands in its path, and its place in the order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/kv_pages.h"
#include "engine/path_rules.h"

namespace mote::engine {

struct Request : Sequence {
  // Its id; while the prompt is computed, the ids of all samples that will fork from it.
  std::vector<int64_t> ids;
  int64_t arrival = 0;  // grows with every sample submitted, kept for life
  int32_t priority = 0;
  int32_t passed_over = 0;  // how often a younger request was admitted before it

  int64_t prompt_length = 0;
  int32_t prompt_id = 0;  // stage id outside of stages
  int32_t text_id = 0;    // stage id of the next token unless that is a marker
  int32_t text_id_after_prompt = 0;
  std::shared_ptr<const std::vector<PathRules>> attempts;
  int32_t attempt = 0;
  PathState path;
  Next next;

  int64_t num_reported = 0;  // leading tokens that the caller knows
  int64_t num_cached = 0;    // of the prompt, found in the cache when it was first admitted
  bool was_admitted = false;
  bool is_running = false;
  bool is_decoding = false;  // its last step ended with a sampled token

  const PathRules& rules() const { return (*attempts)[attempt]; }
};

// Who comes first, among the waiting and among the running.
struct ComesFirst {
  bool operator()(const Request* a, const Request* b) const {
    return a->priority != b->priority ? a->priority > b->priority : a->arrival < b->arrival;
  }
};

}  // namespace mote::engine
