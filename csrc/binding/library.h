// The name under which torch knows the ops, and their one set of schemas.
//
// The test-only build of the CUDA kernels for the host registers the same ops under another name, on CPU tensors.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#ifdef MOTE_SIMT
#define MOTE_OPS mote_simt
#define MOTE_OPS_PREFIX "mote_simt::"
#else
#define MOTE_OPS mote_ext
#define MOTE_OPS_PREFIX "mote_ext::"
#endif

// One more level, so that MOTE_OPS is expanded before the macros of torch paste it.
#define MOTE_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define MOTE_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)
