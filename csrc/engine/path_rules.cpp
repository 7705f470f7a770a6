#include "engine/path_rules.h"

#include <algorithm>
#include <bit>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace mote::engine {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("PathRules: " + what); }

void check_total(int64_t max_new_tokens) {
  if (max_new_tokens < 1 || max_new_tokens > INT32_MAX) {
    refuse("max_new_tokens must be from 1 to 2^31 - 1, got " + std::to_string(max_new_tokens));
  }
}

Next forced(int64_t token) { return {.kind = Next::kForced, .token = token}; }
Next finished(Reason reason) { return {.kind = Next::kFinished, .reason = reason}; }

}  // namespace

Markers::Markers(std::vector<int64_t> ids) : ids_(std::move(ids)) {
  if (ids_.size() % 2 != 0 || ids_.size() > 2 * kMaxPathStages) {
    throw std::invalid_argument("marker_ids must be a start and an end id for each of at most " +
                                std::to_string(kMaxPathStages) + " stages, got " + std::to_string(ids_.size()) +
                                " ids");
  }
  if (ids_.empty()) return;
  const auto [least, greatest] = std::minmax_element(ids_.begin(), ids_.end());
  least_ = *least, greatest_ = *greatest;
  if (least_ < 0 || std::set<int64_t>(ids_.begin(), ids_.end()).size() != ids_.size()) {
    throw std::invalid_argument("marker_ids must be different token ids, none negative");
  }
}

int Markers::find_in_range(int64_t token) const {
  for (size_t place = 0; place < ids_.size(); ++place) {
    if (ids_[place] == token) return static_cast<int>(place);
  }
  return -1;
}

PathRules::PathRules(std::vector<uint64_t> following, std::vector<int64_t> whole, std::vector<int64_t> tail,
                     std::vector<int64_t> limits, int64_t max_new_tokens, int last_stage, int check_stage,
                     int64_t safe_id)
    : following_(std::move(following)),
      whole_(std::move(whole)),
      tail_(std::move(tail)),
      limits_(std::move(limits)),
      max_new_tokens_(max_new_tokens),
      safe_id_(safe_id),
      last_stage_(last_stage),
      check_stage_(check_stage) {
  check_total(max_new_tokens);
  check_sizes();
  check_reachable_stages();
}

PathRules PathRules::free(int64_t max_new_tokens, std::vector<int64_t> eos_ids) {
  check_total(max_new_tokens);
  PathRules rules;
  rules.max_new_tokens_ = max_new_tokens;
  rules.eos_ids_ = std::move(eos_ids);
  return rules;
}

void PathRules::check_sizes() const {
  const size_t num_stages = whole_.size();
  if (num_stages < 1 || num_stages > kMaxPathStages || following_.size() != num_stages + 1 ||
      tail_.size() != num_stages || limits_.size() != num_stages) {
    refuse("following must have one entry more than whole, tail and limits, which have one a stage, 1 to " +
           std::to_string(kMaxPathStages) + "; got " + std::to_string(following_.size()) + ", " +
           std::to_string(num_stages) + ", " + std::to_string(tail_.size()) + ", " + std::to_string(limits_.size()));
  }
  for (size_t i = 0; i < num_stages; ++i) {
    if (std::min(whole_[i], tail_[i]) < 0 || std::max({whole_[i], tail_[i], limits_[i]}) > INT32_MAX ||
        limits_[i] < -1) {
      refuse("whole, tail and limits of stage " + std::to_string(i) + " must be lengths below 2^31 (limits: or -1)");
    }
  }
  const int limit = static_cast<int>(num_stages);
  if (last_stage_ < 0 || last_stage_ >= limit || check_stage_ < -1 || check_stage_ >= limit) {
    refuse("last_stage and check_stage must be stages below " + std::to_string(limit) + " (check_stage or -1), got " +
           std::to_string(last_stage_) + " and " + std::to_string(check_stage_));
  }
  if (check_stage_ >= 0 && safe_id_ < 0) refuse("a check_stage needs safe_id, the token of its safe verdict");
}

// What an impossible set of numbers would make of a request is a chain without an end; so they are refused here.
void PathRules::check_reachable_stages() const {
  const int num_stages = this->num_stages();
  if (following_[0] == 0) refuse("following[0] must name the stages that may come first, got none");
  uint64_t reachable = following_[0];
  for (int stage = kStart; stage < num_stages; ++stage) {
    const bool is_reached = stage == kStart || (reachable >> stage & 1) != 0;
    if (!is_reached) continue;
    const uint64_t after = following_[1 + stage];
    reachable |= after;
    const uint64_t not_later = stage == kStart ? 0 : (uint64_t{2} << stage) - 1;
    if (after >> num_stages != 0 || (after & not_later) != 0) {
      refuse("following[" + std::to_string(1 + stage) + "] must name later stages of " + std::to_string(num_stages));
    }
    int64_t least = after == 0 ? 0 : INT64_MAX;
    for (uint64_t rest = after; rest != 0; rest &= rest - 1) least = std::min(least, whole_[std::countr_zero(rest)]);
    if (stage == kStart) {
      if (max_new_tokens_ < least) {
        refuse("max_new_tokens must be at least " + std::to_string(least) + " for this path, got " +
               std::to_string(max_new_tokens_));
      }
      continue;
    }
    const std::string of = " of stage " + std::to_string(stage);
    if (limits_[stage] == 0) refuse("limits" + of + " must be -1 or at least 1");
    if (tail_[stage] != least) refuse("tail" + of + " must be " + std::to_string(least) + ", the least that follows");
    if (whole_[stage] < 3 + tail_[stage]) {
      refuse("whole" + of + " must hold two markers, a token and the tail");
    }
  }
}

uint64_t PathRules::choices(int stage, int64_t used) const {
  const int64_t left = max_new_tokens_ - used;
  uint64_t fitting = 0, shortest = 0;
  int64_t least = INT64_MAX;
  for (uint64_t rest = following_[1 + stage]; rest != 0; rest &= rest - 1) {
    const int after = std::countr_zero(rest);
    const uint64_t bit = uint64_t{1} << after;
    if (whole_[after] <= left) fitting |= bit;
    if (whole_[after] < least) least = whole_[after], shortest = bit;
  }
  return fitting != 0 ? fitting : shortest;
}

Next PathRules::next(const PathState& state, const Markers& markers) const {
  const bool at_total = state.used >= max_new_tokens_;
  if (is_free()) {
    if (state.at_eos) return finished(kEos);
    return at_total ? finished(kTotal) : Next{.mode = kFree};
  }
  const int stage = state.stage;
  if (state.in_stage < 0) {
    if (stage != kStart && (stage == last_stage_ || following_[1 + stage] == 0)) return finished(kEnded);
    if (at_total) return finished(kTotal);
    const uint64_t open = choices(stage, state.used);
    if (std::has_single_bit(open)) return forced(markers.start_id(std::countr_zero(open)));
    return {.mode = kChoose, .choices = static_cast<int64_t>(open)};
  }
  if (at_total) return finished(kTotal);
  if (stage == check_stage_ && state.in_stage == 0) return {.mode = kVerdict};
  const int64_t end_id = markers.end_id(stage);
  if (stage == check_stage_ || must_end(stage, state.in_stage, state.used)) return forced(end_id);
  return {.mode = kText, .end_id = state.in_stage > 0 ? end_id : -1};
}

int64_t PathRules::num_plain(const PathState& state) const {
  int64_t most = max_new_tokens_ - state.used - 2 - tail_[state.stage];
  if (limits_[state.stage] >= 0) most = std::min(most, limits_[state.stage] - 1 - state.in_stage);
  return std::max<int64_t>(most, 0);
}

void PathRules::advance(PathState& state, int64_t token, int marker) const {
  ++state.used;
  if (is_free()) {
    state.at_eos = std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end();
  } else if (marker < 0) {
    ++state.in_stage;
  } else {
    state.stage = marker / 2;
    state.in_stage = marker % 2 == 0 ? 0 : -1;
  }
}

double PathRules::expected_length(int stage, const StageLengths& lengths) const {
  const double share = static_cast<double>(max_new_tokens_) / num_stages();
  const double mean = lengths.mean(stage, share);
  return limits_[stage] >= 0 ? std::min(mean, static_cast<double>(limits_[stage])) : mean;
}

double PathRules::expected_remaining(const PathState& state, const StageLengths& lengths) const {
  const double left = static_cast<double>(max_new_tokens_ - state.used);
  if (is_free()) return left;
  // after[1 + s]: what comes behind stage s, the mean over the stages that may open; last stages first.
  double after[1 + kMaxPathStages] = {};
  for (int stage = num_stages() - 1; stage >= state.stage; --stage) {
    double sum = 0;
    for (uint64_t rest = following_[1 + stage]; rest != 0; rest &= rest - 1) {
      const int opened = std::countr_zero(rest);
      sum += expected_length(opened, lengths) + 2 + after[1 + opened];
    }
    if (following_[1 + stage] != 0) after[1 + stage] = sum / std::popcount(following_[1 + stage]);
  }
  double here = 0;
  if (state.in_stage >= 0) {
    here = std::max(1.0, expected_length(state.stage, lengths) - static_cast<double>(state.in_stage)) + 1;
  }
  return std::min(left, here + after[1 + state.stage]);
}

}  // namespace mote::engine
