// Tests only: requests that random draws make, alike enough to share prefixes, and the schedulers they are given to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/step_scheduler.h"

namespace mote::engine {

inline constexpr int kStages = 4;        // analysis, guidance, response, check
inline constexpr int64_t kMarker = 100;  // the first of their markers
inline constexpr int64_t kSafe = 3;
inline constexpr int kWords = 3;  // tokens of text: few, so that prefixes are alike

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // From 0 to bound - 1.
  int64_t below(int64_t bound) { return static_cast<int64_t>(draw() % static_cast<uint64_t>(bound)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }

 private:
  uint64_t draw() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

// Rules of a chain that goes through these stages in order, or may skip any but the last ones.
inline PathRules rules_of(const std::vector<int>& chain, bool may_skip, bool with_check, int64_t spare, int64_t limit) {
  std::vector<uint64_t> following(kStages + 1);
  std::vector<int64_t> whole(kStages), tail(kStages), limits(kStages, limit);
  const int last = chain.back();
  for (size_t i = 0; i < chain.size(); ++i) {
    following[i == 0 ? 0 : 1 + chain[i - 1]] |= uint64_t{1} << chain[i];
    if (may_skip && chain[i] != last)
      following[i == 0 ? 0 : 1 + chain[i - 1]] |= uint64_t{1} << (with_check ? 2 : last);
  }
  for (size_t i = chain.size(); i-- > 0;) {
    const int stage = chain[i];
    int64_t least = following[1 + stage] == 0 ? 0 : INT64_MAX;
    for (int after = 0; after < kStages; ++after) {
      if (following[1 + stage] >> after & 1) least = std::min(least, whole[after]);
    }
    tail[stage] = least;
    whole[stage] = 3 + least;
  }
  int64_t total = 0;
  for (const int stage : chain) total = std::max(total, whole[stage]);
  if (with_check) limits[kStages - 1] = 1;
  return {following, whole, tail, limits, total + spare, last, with_check ? kStages - 1 : -1, kSafe};
}

inline std::vector<int64_t> random_prompt(Random& random) {
  // A walk through few common texts that ends anywhere, and then something of its own.
  Random text(static_cast<uint64_t>(random.below(3)));
  std::vector<int64_t> tokens(random.between(1, 24));
  for (int64_t& token : tokens) token = text.below(kWords);
  if (random.one_in(8)) tokens[random.below(tokens.size())] = kMarker + random.below(2 * kStages);
  for (int64_t i = random.below(4); i > 0; --i) tokens.push_back(random.below(kWords));
  return tokens;
}

inline std::vector<PathRules> random_rules(Random& random) {
  const int64_t spare = random.below(40), limit = random.one_in(3) ? random.between(1, 4) : -1;
  switch (random.below(6)) {
    case 0: return {PathRules::free(1 + spare, {1})};
    case 1: return {rules_of({2}, false, false, spare, limit)};
    case 2: return {rules_of({0, 1, 2}, false, false, spare, limit)};
    case 3: return {rules_of({0, 1, 2}, true, false, spare, limit)};
    case 4: return {rules_of({0, 2, 3}, true, true, spare, limit)};
    default:
      return {rules_of({2, 3}, false, true, spare, limit), rules_of({0, 2, 3}, false, true, spare, limit),
              rules_of({0, 1, 2, 3}, false, true, spare, limit)};
  }
}

// Without ids.
inline Submission random_submission(Random& random) {
  Submission given{.tokens = random_prompt(random), .prompt_id = -1};
  if (random.one_in(4)) given.prompt_id = static_cast<int32_t>(random.between(-2, 0));
  given.attempts = random_rules(random);
  given.salt = random.one_in(5);
  given.experts = random.one_in(5);
  given.priority = random.one_in(8);
  if (random.one_in(6)) {
    std::vector<int64_t> ids(given.tokens.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = i > 0 && !random.one_in(5) ? ids[i - 1] : random.between(-2, kStages - 1);
    }
    given.stage_ids = ids;
  }
  return given;
}

// Has it begin as another sequence did, and go on with something of its own.
inline void continue_one(const Submission& seen, Random& random, Submission& given) {
  given.tokens.assign(seen.tokens.begin(), seen.tokens.begin() + random.between(1, seen.tokens.size()));
  for (int64_t i = random.below(3); i > 0; --i) given.tokens.push_back(random.below(kWords));
  given.stage_ids.reset();
  given.prompt_id = seen.prompt_id, given.salt = seen.salt, given.experts = seen.experts;
}

inline SchedulerOptions random_options(Random& random) {
  SchedulerOptions options;
  options.num_pages = random.between(4, 40);
  options.page_size = random.between(1, 8);
  options.max_batch_tokens = random.one_in(4) ? random.between(1, 4) : random.between(5, 60);
  options.max_running = random.between(1, 8);
  options.max_waiting = random.between(1, 20);
  for (int64_t i = 0; i < 2 * kStages; ++i) options.marker_ids.push_back(kMarker + i);
  options.safety_margin = random.one_in(2) ? 0 : 0.2;
  options.share_prefixes = !random.one_in(8);
  options.max_passed_over = random.below(4);
  options.key_bits = random.one_in(3) ? static_cast<int>(random.below(3)) : 64;
  return options;
}

}  // namespace mote::engine
