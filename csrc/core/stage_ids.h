// Stage ids: what each token's id means, the one place in C++ that says so.
//
//   0 .. S-1   that stage's expert, and the shared expert where there is one
//   -1         the shared expert alone (the base alone where there is none)
//   -2         the frozen base alone
//
// Anything else is illegal. On the CPU it is refused before a kernel runs; on a GPU the token's output row is NaN.
#pragma once

#include <cstdint>

namespace mote {

inline constexpr int32_t kSharedOnly = -1;
inline constexpr int32_t kBaseOnly = -2;
// What an id outside the range of int32 becomes when it is narrowed: illegal for every number of stages.
inline constexpr int32_t kIllegalId = INT32_MIN;

inline constexpr int kMaxStages = 64;  // the stages present in a tile are the bits of one 64-bit word
inline constexpr int kMaxRank = 256;

}  // namespace mote
