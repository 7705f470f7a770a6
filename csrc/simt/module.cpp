// mote_ext._simt, for tests only: importing it registers the device kernels, run on the host, as torch.ops.mote_simt.
#include <pybind11/pybind11.h>

#include <cstdint>

extern "C" void mote_simt_configure(int schedule, uint64_t seed);

PYBIND11_MODULE(_simt, m) {
  m.doc() = "The CUDA kernels of mote_ext on the host. Importing it registers torch.ops.mote_simt on CPU tensors.";
  m.def("configure", &mote_simt_configure, pybind11::arg("schedule"), pybind11::arg("seed"),
        "The order in which threads run: 0 round robin, 1 reverse, 2 one warp ahead, 3 random by seed.");
}
