// Integer arithmetic used on the host and in kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOTE_HOST_DEVICE __host__ __device__
#else
#define MOTE_HOST_DEVICE
#endif

namespace mote {

template <typename Int>
MOTE_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename Int>
MOTE_HOST_DEVICE constexpr Int round_up(Int value, Int multiple) {
  return ceil_div(value, multiple) * multiple;
}

template <typename Int>
MOTE_HOST_DEVICE constexpr Int smaller(Int a, Int b) {
  return b < a ? b : a;
}

template <typename Int>
MOTE_HOST_DEVICE constexpr Int larger(Int a, Int b) {
  return a < b ? b : a;
}

}  // namespace mote
