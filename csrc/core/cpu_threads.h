// How many threads a piece of work is worth on the CPU.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace mote {

// Below this many multiply-adds (about 3 µs on one core) a second thread costs more than it saves.
inline constexpr int64_t kThreadWork = 1 << 15;

inline int64_t useful_threads(int64_t multiply_adds, int64_t num_threads) {
  return larger<int64_t>(smaller<int64_t>(multiply_adds / kThreadWork, num_threads), 1);
}

}  // namespace mote
