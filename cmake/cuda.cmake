# Decides whether the CUDA kernels are built, and for which architectures.
#
# Reads MOTE_CUDA, MOTE_CUDA_ARCHS, MOTE_TORCH_CUDA. Sets MOTE_WITH_CUDA, MOTE_CUDA_VERSION, MOTE_CUDA_ARCH_NAMES (what
# was built, in torch's notation) and MOTE_CUDA_REASON (why CUDA was left out).
include(${CMAKE_CURRENT_LIST_DIR}/cuda_archs.cmake)

set(MOTE_WITH_CUDA OFF)
set(MOTE_CUDA_VERSION "")
set(MOTE_CUDA_ARCH_NAMES "")
set(MOTE_CUDA_REASON "")

if(NOT MOTE_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "MOTE_CUDA must be auto, 1 or 0, got '${MOTE_CUDA}'")
endif()
if(MOTE_CUDA STREQUAL "0")
  set(MOTE_CUDA_REASON "switched off by MOTE_CUDA=0")
  return()
endif()

# CUDACXX, when set, is the only place to look, as it is for CMake itself.
unset(MOTE_NVCC CACHE)
if(DEFINED ENV{CUDACXX})
  find_program(MOTE_NVCC "$ENV{CUDACXX}")
  set(places "CUDACXX=$ENV{CUDACXX}")
else()
  find_program(MOTE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  set(places "CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda")
endif()
if(NOT MOTE_NVCC)
  set(MOTE_CUDA_REASON "no nvcc found (${places})")
  if(MOTE_CUDA STREQUAL "1")
    message(FATAL_ERROR "MOTE_CUDA=1, but ${MOTE_CUDA_REASON}. Install the CUDA toolkit and set CUDA_HOME to it, or "
                        "build for the CPU only with MOTE_CUDA=0.")
  endif()
  message(STATUS "CUDA left out: ${MOTE_CUDA_REASON}")
  return()
endif()

execute_process(COMMAND ${MOTE_NVCC} --version OUTPUT_VARIABLE banner)
execute_process(COMMAND ${MOTE_NVCC} --list-gpu-arch OUTPUT_VARIABLE known_archs)
string(REGEX MATCH "release ([0-9]+)\\.[0-9]+" MOTE_CUDA_VERSION "${banner}")
set(nvcc_major "${CMAKE_MATCH_1}")
string(REPLACE "release " "" MOTE_CUDA_VERSION "${MOTE_CUDA_VERSION}")
string(REGEX MATCHALL "[0-9]+" known_archs "${known_archs}")

if(MOTE_TORCH_CUDA AND NOT MOTE_TORCH_CUDA MATCHES "^${nvcc_major}\\.")
  message(FATAL_ERROR
    "${MOTE_NVCC} is CUDA ${MOTE_CUDA_VERSION}, but torch ${MOTE_TORCH_VERSION} was built with CUDA ${MOTE_TORCH_CUDA}; "
    "the major versions must agree. Point CUDA_HOME at a CUDA toolkit of torch's major version, or install a torch built "
    "for CUDA ${nvcc_major}, or build for the CPU only with MOTE_CUDA=0.")
endif()

mote_cuda_architectures("${MOTE_CUDA_ARCHS}" "${known_archs}" CMAKE_CUDA_ARCHITECTURES MOTE_CUDA_ARCH_NAMES)
set(CMAKE_CUDA_COMPILER ${MOTE_NVCC})
if(NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(MOTE_WITH_CUDA ON)
message(STATUS "CUDA ${MOTE_CUDA_VERSION} (${MOTE_NVCC}) for ${MOTE_CUDA_ARCH_NAMES}")
