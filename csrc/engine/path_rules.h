// The rules of a request's path: which stage may open next, when the open one must end, and what that makes of the next
// token: forced by the rules, sampled from some of the vocabulary, or none because the request is finished.
//
//   choices(stage, used)             stages that may open after `stage`: those whose chain still fits
//   must_end(stage, in_stage, used)  whether the stage's end marker is due: its limit, or the reserve of what comes
//   after
//
// The numbers and both functions are those of StagePlan in mote_ext/generation/plan.py, where paths become rules.
#pragma once

#include <cstdint>
#include <vector>

namespace mote::engine {

inline constexpr int kMaxPathStages = 63;  // the stages to choose from are the bits of one int64
inline constexpr int kStart = -1;          // in place of a stage: before any

enum Mode : int32_t { kText = 0, kFree = 1, kChoose = 2, kVerdict = 3 };
enum Reason : int32_t { kEnded = 0, kTotal = 1, kEos = 2, kFailed = 3 };

// The marker tokens of all stages: start and end of stage 0, of stage 1, …
class Markers {
 public:
  // std::invalid_argument: an odd number, more than kMaxPathStages stages, a negative or repeated id.
  explicit Markers(std::vector<int64_t> ids);

  int num_stages() const { return static_cast<int>(ids_.size() / 2); }
  int64_t start_id(int stage) const { return ids_[2 * stage]; }
  int64_t end_id(int stage) const { return ids_[2 * stage + 1]; }

  // The token's place among the markers, twice its stage, plus one when it is an end marker; -1 when it is none.
  int find(int64_t token) const {
    if (token < least_ || token > greatest_) return -1;  // almost every token
    return find_in_range(token);
  }

 private:
  int find_in_range(int64_t token) const;

  std::vector<int64_t> ids_;
  int64_t least_ = 0, greatest_ = -1;
};

// Where a request stands in its path.
struct PathState {
  int32_t stage = kStart;  // the open stage, or between stages the last one
  bool at_eos = false;     // without rules: the last token ends the sequence
  int64_t in_stage = -1;   // tokens since the start marker; -1 between stages
  int64_t used = 0;        // tokens generated, markers included
};

// What the next token is.
struct Next {
  enum Kind : int32_t { kSampled, kForced, kFinished };

  Kind kind = kSampled;
  Mode mode = kFree;        // sampled
  int64_t token = -1;       // forced
  int64_t end_id = -1;      // sampled text: the end marker that may come, -1 when it may not yet
  int64_t choices = 0;      // sampled start marker: bits of the stages
  Reason reason = kFailed;  // finished
};

// Observed lengths of stages, from which the rest of a chain is guessed.
class StageLengths {
 public:
  explicit StageLengths(int num_stages) : totals_(num_stages), counts_(num_stages) {}

  void add(int stage, int64_t length) { totals_[stage] += length, ++counts_[stage]; }
  // Their mean, or `otherwise` before the first.
  double mean(int stage, double otherwise) const {
    return counts_[stage] ? static_cast<double>(totals_[stage]) / counts_[stage] : otherwise;
  }

 private:
  std::vector<int64_t> totals_, counts_;
};

class PathRules {
 public:
  // following: S + 1 sets of stages as bits; [0] before any stage, [1 + s] after stage s
  // whole:     S, fewest tokens from a stage's start marker to the end of the chain
  // tail:      S, fewest tokens after a stage's end marker
  // limits:    S, most tokens between a stage's markers, -1 for none
  // check_stage: its first token is a verdict, safe when it is safe_id; -1 for no check
  // std::invalid_argument: sizes that disagree, stages that lead backwards, numbers that cannot be.
  PathRules(std::vector<uint64_t> following, std::vector<int64_t> whole, std::vector<int64_t> tail,
            std::vector<int64_t> limits, int64_t max_new_tokens, int last_stage, int check_stage, int64_t safe_id);
  // No rules: any token, until one of eos_ids or the total.
  static PathRules free(int64_t max_new_tokens, std::vector<int64_t> eos_ids);

  bool is_free() const { return following_.empty(); }
  int num_stages() const { return static_cast<int>(whole_.size()); }
  int64_t max_new_tokens() const { return max_new_tokens_; }

  uint64_t choices(int stage, int64_t used) const;
  bool must_end(int stage, int64_t in_stage, int64_t used) const {
    const int64_t left = max_new_tokens_ - used;
    return (limits_[stage] >= 0 && in_stage >= limits_[stage]) || left <= 1 + tail_[stage];
  }

  Next next(const PathState& state, const Markers& markers) const;
  // How many more tokens of text the open stage takes before its end marker may be due.
  int64_t num_plain(const PathState& state) const;
  // The state after `token`, whose place among the markers is `marker`.
  void advance(PathState& state, int64_t token, int marker) const;
  bool is_safe(int64_t verdict) const { return verdict == safe_id_; }
  bool in_last_stage(const PathState& state) const { return !is_free() && state.stage == last_stage_; }
  // Guess of the tokens still to be generated, never more than the total allows.
  double expected_remaining(const PathState& state, const StageLengths& lengths) const;

 private:
  PathRules() = default;
  void check_sizes() const;
  void check_reachable_stages() const;
  double expected_length(int stage, const StageLengths& lengths) const;

  std::vector<uint64_t> following_;
  std::vector<int64_t> whole_, tail_, limits_, eos_ids_;
  int64_t max_new_tokens_ = 0, safe_id_ = -1;
  int last_stage_ = -1, check_stage_ = -1;
};

}  // namespace mote::engine
