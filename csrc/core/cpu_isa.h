// The instruction sets the CPU kernels are compiled for, and the best one to use here.
#pragma once

#include <string>

namespace mote {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// limit: torch's own choice (ATEN_CPU_CAPABILITY=default|avx2|avx512), which holds for these kernels too.
inline Isa choose_isa([[maybe_unused]] const std::string& limit) {
#if defined(__x86_64__)
  const bool has_avx2 = limit != "DEFAULT" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && limit == "AVX512" && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (has_avx512) return Isa::kAvx512;
  if (has_avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// The function of this name from the namespace of an instruction set; other machines have the baseline alone.
#if defined(__x86_64__)
#define MOTE_FUNCTION_FOR(isa, name)                     \
  ((isa) == ::mote::Isa::kAvx512Bf16 ? avx512_bf16::name \
   : (isa) == ::mote::Isa::kAvx512   ? avx512::name      \
   : (isa) == ::mote::Isa::kAvx2     ? avx2::name        \
                                     : baseline::name)
#else
#define MOTE_FUNCTION_FOR(isa, name) (static_cast<void>(isa), baseline::name)
#endif

}  // namespace mote
