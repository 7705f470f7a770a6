// One vector register of float or double, in the compiler's own vector types: loads that widen, stores that round once,
// the sum over lanes, the transpose of a square of registers; and products of pairs of bfloat16.
//
// Included by the sources of CPU kernels alone. Everything stands in the namespace of the instruction set it is
// compiled for: an inline function shared between objects of different instruction sets would let the linker keep the
// wrong one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/scalar.h"

namespace mote::MOTE_CPU_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kNumRegisters = 32;
#else
inline constexpr int kNumRegisters = 16;
#endif

template <typename Scalar>
using RealOf = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename Real>
inline constexpr int kLanes = kVectorBytes / sizeof(Real);

template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;

typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef float HalfOfFloats __attribute__((vector_size(kVectorBytes / 2)));

#if defined(__AVX512F__)
// NOTE: used with intrinsics that zero what a mask leaves out; in those without a mask GCC 12 warns of its own headers.
inline constexpr __mmask16 kAllLanes = 0xffff;
#endif

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- loads: kLanes scalars, widened; any alignment

inline Vector<float> load(const float* from) {
  Vector<float> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Vector<double> load(const double* from) {
  Vector<double> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The upper half of each float. NOTE: the compiler's own conversion takes four instructions on AVX2 where one will do.
inline Vector<float> load(const bf16* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bit_cast<Vector<float>>(bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(kAllLanes, bits)) << 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return bit_cast<Vector<float>>(bit_cast<Bits32>(_mm256_cvtepu16_epi32(bits)) << 16);
#else
  Bits16 bits;
  std::memcpy(&bits, from, sizeof bits);
  return bit_cast<Vector<float>>(__builtin_convertvector(bits, Bits32) << 16);
#endif
}

inline Vector<float> load(const f16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector<float> value;
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = host_to_float(from[lane]);
  return value;
#endif
}

// ---- stores: rounded to nearest even, any alignment

inline void store(float* to, Vector<float> value) { std::memcpy(to, &value, sizeof value); }

inline void store(double* to, Vector<double> value) { std::memcpy(to, &value, sizeof value); }

inline void store(float* to, Vector<double> value) {
  const HalfOfFloats rounded = __builtin_convertvector(value, HalfOfFloats);
  std::memcpy(to, &rounded, sizeof rounded);
}

inline void store(bf16* to, Vector<float> value) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Bits32 quiet_nan = bits >> 16 | 0x40u;
  const Bits16 kept = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, Bits16);
  std::memcpy(to, &kept, sizeof kept);
}

inline void store(f16* to, Vector<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(kAllLanes, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = host_round<f16>(value[lane]);
#endif
}

// ---- at the end of a row: the first `count` lanes exist (none if count <= 0, all if it is kLanes or more)
// The rare case is kept out of line: it stands in every unrolled loop.

template <typename Scalar>
[[gnu::noinline]] Vector<RealOf<Scalar>> load_some(const Scalar* from, int64_t count) {
  Scalar padded[kLanes<RealOf<Scalar>>] = {};
  if (count > 0) std::memcpy(padded, from, count * sizeof(Scalar));
  return load(padded);
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return count > 0 ? (1u << count) - 1 : 0; }

inline Vector<float> load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
#endif

template <typename Scalar>
inline Vector<RealOf<Scalar>> load_first(const Scalar* from, int64_t count) {
  return count >= kLanes<RealOf<Scalar>> ? load(from) : load_some(from, count);
}

template <typename Scalar, typename Value>
[[gnu::noinline]] void store_some(Scalar* to, Value value, int64_t count) {
  Scalar whole[sizeof(Value) / sizeof(value[0])];
  store(whole, value);
  if (count > 0) std::memcpy(to, whole, count * sizeof(Scalar));
}

#if defined(__AVX512F__)
inline void store_some(float* to, Vector<float> value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), value);
}
#endif

template <typename Scalar, typename Value>
inline void store_first(Scalar* to, Value value, int64_t count) {
  constexpr int64_t lanes = sizeof(Value) / sizeof(value[0]);
  count >= lanes ? store(to, value) : store_some(to, value, count);
}

// ---- pairs of bfloat16, which some processors multiply and add up at once: twice as many products an instruction

// NOTE: such processors take subnormal numbers for zero, in bfloat16 and in the sum.
#if defined(__AVX512BF16__)
using Bf16Pairs = __m512bh;

// sum[lane] + a[lane].first · b[lane].first + a[lane].second · b[lane].second
inline Vector<float> add_products(Vector<float> sum, Bf16Pairs a, Bf16Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

inline Bits32 load_bits(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(kAllLanes, bits));
}
#else
// For tests on other processors.
using Bf16Pairs = Bits32;

inline Vector<float> add_products(Vector<float> sum, Bf16Pairs a, Bf16Pairs b) {
  sum += bit_cast<Vector<float>>(a << 16) * bit_cast<Vector<float>>(b << 16);
  return sum + bit_cast<Vector<float>>(a & 0xffff0000u) * bit_cast<Vector<float>>(b & 0xffff0000u);
}

inline Bits32 load_bits(const bf16* from) { return bit_cast<Bits32>(load(from)) >> 16; }
#endif

inline Bf16Pairs load_pairs(const bf16* from) {
  Bf16Pairs pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return pairs;
}

inline Bf16Pairs broadcast_pair(const bf16* pair) {
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bit_cast<Bf16Pairs>(Bits32{} + bits);
}

// to = first[0], second[0], first[1], second[1], …; a null row is zeros.
inline void interleave(const bf16* first, const bf16* second, int64_t count, bf16* to) {
  constexpr int lanes = kLanes<float>;
  static constexpr bf16 zeros[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Bits32 pairs = load_bits(first ? first + i : zeros) | load_bits(second ? second + i : zeros) << 16;
    std::memcpy(to + 2 * i, &pairs, sizeof pairs);
  }
  for (; i < count; ++i) {
    to[2 * i] = first ? first[i] : bf16{};
    to[2 * i + 1] = second ? second[i] : bf16{};
  }
}

#if defined(__AVX512BF16__) || defined(MOTE_EMULATE_PAIRS)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

template <typename Scalar>
inline constexpr bool kMultipliesPairs = kHasPairs && std::is_same_v<Scalar, bf16>;

// ---- across lanes

template <int kDistance, typename Value, int... kLane>
inline Value swap_lanes(Value value, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(value, value, (kLane ^ kDistance)...);
}

// A balanced tree, the same for every sum.
template <typename Real, int kDistance = kLanes<Real> / 2>
inline Real sum_lanes(Vector<Real> value) {
  if constexpr (kDistance == 0) {
    return value[0];
  } else {
    const auto swapped = swap_lanes<kDistance>(value, std::make_integer_sequence<int, kLanes<Real>>{});
    return sum_lanes<Real, kDistance / 2>(value + swapped);
  }
}

template <int kDistance, typename Value, int... kLane>
inline void exchange_lanes(Value& low, Value& high, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  const Value from_low = low;
  low = __builtin_shufflevector(from_low, high, (kLane & kDistance ? kLane - kDistance + lanes : kLane)...);
  high = __builtin_shufflevector(from_low, high, (kLane & kDistance ? kLane + lanes : kLane + kDistance)...);
}

// rows[i][j] and rows[j][i] change places: at each level the off-diagonal quarters of every square are exchanged. With
// fewer rows than lanes there are several squares side by side.
template <typename Real, int kRows, int kDistance = kRows / 2>
inline void transpose_registers(Vector<Real> (&rows)[kRows]) {
  if constexpr (kDistance > 0) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      if ((row & kDistance) != 0) continue;
      exchange_lanes<kDistance>(rows[row], rows[row + kDistance], std::make_integer_sequence<int, kLanes<Real>>{});
    }
    transpose_registers<Real, kRows, kDistance / 2>(rows);
  }
}

// Two loads of half the lanes.
template <int... kLane>
inline Vector<float> load_halves(const float* low, const float* high, std::integer_sequence<int, kLane...>) {
  HalfOfFloats halves[2];
  std::memcpy(&halves[0], low, sizeof halves[0]);
  std::memcpy(&halves[1], high, sizeof halves[1]);
  return __builtin_shufflevector(halves[0], halves[1], kLane...);
}

// ---- what kernels need around their registers

// Calls function with a compile-time constant equal to value, which is in 1 .. kLimit.
template <int kLimit, typename Function>
void with_constant(int64_t value, const Function& function) {
  if constexpr (kLimit > 1) {
    if (value < kLimit) return with_constant<kLimit - 1>(value, function);
  }
  function(std::integral_constant<int, kLimit>{});
}

// Zeros that nobody reads soon: past the caches where the processor can, so that the old bytes are not fetched first.
inline void stream_zeros(std::byte* to, int64_t num_bytes) {
#if defined(__AVX2__)
  constexpr int64_t worthwhile = 4096;  // below, the fence costs more than it saves
  constexpr int64_t step = sizeof(__m256i);
  if (num_bytes >= worthwhile) {
    const int64_t unaligned = -reinterpret_cast<intptr_t>(to) & (step - 1);
    std::memset(to, 0, unaligned);
    to += unaligned, num_bytes -= unaligned;
    for (; num_bytes >= step; to += step, num_bytes -= step)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_setzero_si256());
    _mm_sfence();  // such stores are not ordered among others
  }
#endif
  std::memset(to, 0, num_bytes);
}

// Uninitialised, on a cache line of its own. NOTE: the aligned operator new is slow enough to show in a single token.
template <typename Real>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(new std::byte[count * sizeof(Real) + kAlignment]),
        data_(bytes_.get() + (kAlignment - reinterpret_cast<uintptr_t>(bytes_.get()) % kAlignment)) {}
  operator Real*() { return reinterpret_cast<Real*>(data_); }

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<std::byte[]> bytes_;
  std::byte* data_;
};

}  // namespace mote::MOTE_CPU_ISA
