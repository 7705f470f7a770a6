// mote_ext._C: importing it registers the ops of bind_lora.cpp with torch; what Python itself sees is the build's
// facts.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of mote_ext. Importing it registers torch.ops.mote_ext.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = mote::kTorchVersion;
        info["cuda"] = mote::kCudaVersion;
        info["cuda_archs"] = mote::kCudaArchs;
        info["cuda_reason"] = mote::kCudaReason;
        info["compiler"] = mote::kCompiler;
        return info;
      },
      "What this module was built with: torch, cuda (empty without), cuda_archs, cuda_reason, compiler.");
}
