// The tokens of a problem by stage, as the CPU kernels walk them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/stage_ids.h"
#include "lora/cpu_kernels.h"

namespace mote {

// A stable counting sort of the tokens, O(T + S).
class SortedTokens {
 public:
  SortedTokens(const int32_t* stage_ids, int64_t num_tokens, int num_stages, bool shared) : tokens_(num_tokens) {
    const auto group_of = [&](int64_t token) {
      const int32_t id = stage_ids[token];
      if (id >= 0) return id;
      return id == kSharedOnly && shared ? num_stages : num_stages + 1;
    };
    for (int64_t token = 0; token < num_tokens; ++token) ++group_begin_[group_of(token) + 1];
    for (int group = 0; group < num_stages + 2; ++group) group_begin_[group + 1] += group_begin_[group];
    auto next = group_begin_;
    for (int64_t token = 0; token < num_tokens; ++token) tokens_[next[group_of(token)]++] = token;
  }

  TokenOrder order() const { return {tokens_.data(), group_begin_.data()}; }

 private:
  std::vector<int64_t> tokens_;
  std::array<int64_t, kMaxStages + 3> group_begin_ = {};
};

}  // namespace mote
