// Starts the kernels of one chosen task; each function is compiled in instances/, so that they build in parallel.
#pragma once

#include <stdexcept>

#include "lora/tiles.h"

namespace mote {

// Calls body with a value of the element type's storage struct.
template <typename Body>
void with_scalar(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32: return body(float{});
    case DType::kF16: return body(f16{});
    case DType::kBF16: return body(bf16{});
    case DType::kF64: break;
  }
  throw std::runtime_error("mote_ext: the device kernels have no float64");  // the binding refuses it first
}

void launch_shrink(const ShrinkTask& task, Stream stream);    // z, or the planes of a split shrink
void launch_finish_z(const ShrinkTask& task, Stream stream);  // planes -> z
void launch_expand(const ExpandTask& task, Stream stream);
void launch_wgrad(const WgradTask& task, Stream stream);

}  // namespace mote
