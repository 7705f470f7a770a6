// The CPU kernels, as lora_cpu.cpp sees them: one table of functions for each instruction set and dtype.
//
// cpu_kernels.cpp is compiled once for each instruction set, with MOTE_CPU_ISA naming the namespace it lands in; the
// choice is made at run time. A kernel computes one Piece of the result, of any size, reads only what that piece needs,
// and gives the same bits however the result was cut: lora_cpu.cpp cuts a piece for each thread.
#pragma once

#include <cstdint>

#include "lora/lora.h"

namespace mote {

// The tokens sorted by what they use, in their own order within each group: groups 0 .. S-1 are the stages, group S the
// tokens of the shared expert alone, group S+1 those of the base alone. The users of an expert are then one range of
// positions, for the shared expert as well: all but the last group.
struct TokenOrder {
  const int64_t* tokens;       // [T], token at each position
  const int64_t* group_begin;  // [S + 3], position at which each group begins, then T
};

struct Range {
  int64_t begin;
  int64_t end;
};

struct Piece {
  Range positions;  // in the TokenOrder
  Range columns;    // of z or of y
};

struct CpuKernels {
  void (*shrink)(const ShrinkParams&, const TokenOrder&, const Piece&);
  void (*expand)(const ExpandParams&, const TokenOrder&, const Piece&);
  void (*wgrad)(const WgradParams&, const TokenOrder&, Range columns);  // of the wide side
};

namespace baseline {
const CpuKernels& cpu_kernels(DType dtype);
}
namespace avx2 {  // with FMA and F16C
const CpuKernels& cpu_kernels(DType dtype);
}
namespace avx512 {  // F, BW, VL
const CpuKernels& cpu_kernels(DType dtype);
}
namespace avx512_bf16 {  // and pairs of bfloat16
const CpuKernels& cpu_kernels(DType dtype);
}

}  // namespace mote
