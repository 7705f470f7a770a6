// StepScheduler decides what each forward of the model computes: which requests, which of their tokens, where in KV
// memory. plan() proposes a step, commit() takes the tokens sampled from it (or abandon() takes it back).
//
//   submit ─► waiting ──admit──► running: prefill, in chunks ──► decode ──► finished
//                ▲                              └─────preempt──────┘│
//                └──────────────────────────────────────────────────┘   returns through its own cached pages
//
// One budget of tokens a step: decodes first, then prefills, then admissions (planning.cpp). Nothing about a request
// is changed by a plan but its pages; commit moves it on (committing.cpp). No torch, no clock, no randomness: the same
// calls give the same plans. Not thread-safe. Source of the parts: docs/serving.md.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/kv_pages.h"
#include "engine/path_rules.h"
#include "engine/plan.h"
#include "engine/request.h"

namespace mote::engine {

inline constexpr int64_t kFailedRow = -1;  // in place of a sampled token

struct QueueFull : std::length_error {
  using std::length_error::length_error;
};

struct UnknownRequest : std::out_of_range {
  using std::out_of_range::out_of_range;
};

struct SchedulerOptions {
  int64_t num_pages = 0;
  int64_t page_size = 16;
  int64_t max_batch_tokens = 512;  // of one plan
  int64_t max_running = 64;        // samples
  int64_t max_waiting = 4096;      // samples
  std::vector<int64_t> marker_ids;
  double safety_margin = 0.02;  // share of all pages that an admission leaves
  bool share_prefixes = true;
  int64_t max_passed_over = 16;
  int key_bits = 64;  // less in tests only, where keys of pages must collide
};

struct SchedulerStats {
  int64_t num_running = 0, num_waiting = 0;
  int64_t pages_total = 0, pages_used = 0, pages_cached = 0, pages_free = 0;
  int64_t prefix_hit_tokens = 0, prefix_query_tokens = 0;
  int64_t preemptions = 0, rolled_back = 0, evictions = 0, copies = 0;
  int64_t steps = 0, planned_tokens = 0;
  int64_t submitted = 0, finished = 0, cancelled = 0, failed = 0;
  std::vector<int64_t> stage_tokens;  // [S + 2]: base only, shared only, stage 0, …
};

// What submit takes.
struct Submission {
  std::vector<int64_t> ids;  // one a sample
  std::vector<int64_t> tokens;
  int32_t prompt_id = 0;
  std::vector<PathRules> attempts;
  std::optional<std::vector<int64_t>> stage_ids;  // of the tokens; else the markers say
  uint64_t salt = 0, experts = 0;
  int32_t priority = 0;
};

class StepScheduler {
 public:
  explicit StepScheduler(const SchedulerOptions& options);

  // std::invalid_argument: what can never run; QueueFull.
  void submit(Submission submission);
  // Null when there is nothing to do. only: this request and no other.
  std::shared_ptr<const Plan> plan(std::optional<int64_t> only = std::nullopt);
  // tokens: in the order of logits_at, -1 for a row that failed. std::invalid_argument: one that the rules forbid;
  // nothing is changed then.
  std::shared_ptr<const Outcome> commit(const int64_t* tokens, int64_t count);
  // The forward did not happen: as if the plan had not been made.
  void abandon();
  // At any time, also between a plan and its commit. UnknownRequest
  void cancel(int64_t id);
  // To its first num_tokens tokens, and what the rules force after them. std::invalid_argument: not between the end of
  // the prompt and that of the request; std::logic_error: a plan is open.
  void roll_back(int64_t id, int64_t num_tokens);
  // Nothing computed so far is found again: the experts have changed.
  void drop_cache();

  const Request& request(int64_t id) const { return *find(id); }
  bool has_work() const { return !running_.empty() || !waiting_.empty(); }
  SchedulerStats stats() const;
  // Everything that must hold between calls. std::logic_error
  void check() const;

 private:
  struct Row {
    Request* request;      // null when it was cancelled
    int64_t count;         // of its tokens
    int64_t first_logits;  // into wanted_
    int64_t num_logits;
    int32_t stage_id;  // of its first token
  };
  struct Wanted {
    int64_t id;
    bool is_live;  // false when it was cancelled
  };

  // step_scheduler.cpp
  Request* find(int64_t id) const;
  void check_submission(const Submission& submission) const;
  int32_t advance(Request& request, int64_t token) const;
  void append(Request& request, int64_t token);
  void append_forced(Request& request);
  void rewind(Request& request, int64_t num_tokens);
  void start_running(Request& request);
  void stop_running(Request& request);
  void put_to_waiting(Request& request);
  void take_from_waiting(Request& request);
  void remove(Request& request);

  // planning.cpp
  void plan_running(bool decoding, const Request* only);
  void plan_admissions(Request* only);
  void add_row(Request& request, int64_t count);
  bool secure(Request& request, int64_t count);
  void preempt(Request& request);
  Request& choose_victim() const;
  Request& choose_waiting() const;
  void pass_over(const Request& admitted);
  int64_t margin() const;
  int64_t chunk(const Request& request) const;
  void order_rows();
  void write_plan(Plan& plan);
  void write_row(Plan& plan, size_t row, int64_t begin);
  void write_logits(Plan& plan, const Row& row, int64_t at);

  // committing.cpp
  void check_tokens(const int64_t* tokens, int64_t count) const;
  void check_token(const Request& request, int64_t id, int64_t token) const;
  void settle(const Row& row, const int64_t* tokens);
  std::vector<Request*> fork(Request& request);
  void take_token(Request& request, int64_t token);
  void report(Request& request);
  void finish(Request& request, Reason reason);
  void close_plan();

  SchedulerOptions options_;
  Markers markers_;
  KvPages kv_;
  StageLengths lengths_;
  SchedulerStats stats_;

  RequestStore requests_;
  std::unordered_map<int64_t, Request*> by_id_;
  std::vector<Request*> running_;  // in the order of ComesFirst
  std::set<Request*, ComesFirst> waiting_;
  int64_t num_running_ = 0, num_waiting_ = 0;  // samples
  int64_t num_arrived_ = 0;

  // Of the plan that was made and neither committed nor abandoned.
  bool is_open_ = false;
  std::vector<Row> rows_;
  std::vector<Wanted> wanted_;
  std::vector<int64_t> preempted_;
  std::vector<int64_t> stage_tokens_;
  int64_t budget_ = 0;  // tokens left

  std::vector<Row> ordered_rows_;     // kept for their memory
  std::vector<Request*> candidates_;  // likewise
  Recycled<Plan> plans_;
  Recycled<Outcome> outcomes_;
  Outcome* outcome_ = nullptr;  // of the commit that runs
};

}  // namespace mote::engine
