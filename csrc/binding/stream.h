// The one place that asks torch for its current CUDA stream. A CPU build of torch has no such stream and lacks the
// headers that name it, yet the CUDA operations must compile against it: there a stub stands in, which no call can
// reach, since no CUDA tensor can exist.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include "lora/lora.h"

#ifdef MOTE_TORCH_HAS_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace mote {

#ifdef MOTE_TORCH_HAS_CUDA

inline Stream current_stream(const c10::Device& device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

// While a stream is captured into a graph nothing may wait for it or read a value back.
inline bool stream_is_capturing(const c10::Device& device) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(device.index()).stream(), &status));
  return status != cudaStreamCaptureStatusNone;
}

#else

inline Stream current_stream(const c10::Device& device) {
  TORCH_CHECK(false, "mote_ext: asked for the CUDA stream of ", device, ", but it was built with a CPU build of torch");
}

inline bool stream_is_capturing(const c10::Device& device) {
  TORCH_CHECK(false, "mote_ext: asked for the CUDA stream of ", device, ", but it was built with a CPU build of torch");
}

#endif

}  // namespace mote
