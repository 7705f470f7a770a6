// mote_ext._C: importing it registers the ops of bind_lora.cpp with torch; what Python itself sees are the build's
// facts and the scheduler of bind_engine.cpp.
#include <pybind11/pybind11.h>

#include "binding/bind_engine.h"
#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of mote_ext. Importing it registers torch.ops.mote_ext.";
  mote::bind_engine(m);
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
