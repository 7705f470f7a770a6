# Asks the torch of Python_EXECUTABLE where it is and how it was built, and pybind11 likewise.
#
# Sets MOTE_TORCH_VERSION, MOTE_TORCH_CUDA (empty for a CPU torch) and the target mote_torch.

execute_process(
  COMMAND ${Python_EXECUTABLE} -c "
import os, pybind11, torch
print(torch.__version__, torch.version.cuda or '', int(torch.compiled_with_cxx11_abi()),
      os.path.dirname(torch.__file__), pybind11.get_cmake_dir(), sep='|')"
  OUTPUT_VARIABLE facts OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_VARIABLE failure RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${Python_EXECUTABLE} must be able to import torch and pybind11 to build mote_ext:\n${failure}")
endif()
string(REPLACE "|" ";" facts "${facts}")
list(POP_FRONT facts MOTE_TORCH_VERSION MOTE_TORCH_CUDA cxx11_abi torch_dir pybind11_DIR)

find_package(pybind11 CONFIG REQUIRED)

# IMPORTED makes the headers system headers: no warnings from them. torch carries a pybind11 of its own, so pybind11 must
# come before it in the search.
add_library(mote_torch INTERFACE IMPORTED)
target_link_libraries(mote_torch INTERFACE pybind11::headers)
target_include_directories(mote_torch INTERFACE
  ${torch_dir}/include ${torch_dir}/include/torch/csrc/api/include)
target_compile_definitions(mote_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${cxx11_abi})
foreach(library c10 torch_cpu torch torch_python)
  target_link_libraries(mote_torch INTERFACE ${torch_dir}/lib/lib${library}.so)
endforeach()
if(MOTE_TORCH_CUDA)
  target_link_libraries(mote_torch INTERFACE ${torch_dir}/lib/libc10_cuda.so ${torch_dir}/lib/libtorch_cuda.so)
endif()
