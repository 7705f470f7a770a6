// Element types as storage, and their conversions on the host. Kernels compute in float (double for kF64).
//
// The 16-bit types are plain bits so that no header of CUDA or torch is needed to name them; the same struct is passed
// to device code, where intrinsics.cuh converts in hardware. Rounding is to nearest even, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace mote {

enum class DType : int8_t { kF32, kF16, kBF16, kF64 };

struct f16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float host_to_float(float value) { return value; }

inline float host_to_float(bf16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float host_to_float(f16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));         // normal
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

template <typename Scalar>
inline Scalar host_round(float value);

template <>
inline float host_round<float>(float value) {
  return value;
}

template <>
inline bf16 host_round<bf16>(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline f16 host_round<f16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536: Inf
  if (magnitude < 0x38800000u) {
    // Subnormal in f16: adding 0.5 puts the unit in the last place of f16 at the last bit of the float.
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

}  // namespace mote
