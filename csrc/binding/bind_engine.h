// The scheduler's classes as Python sees them; bind_engine.cpp puts them into the module.
#pragma once

#include <pybind11/pybind11.h>

namespace mote {

void bind_engine(pybind11::module_& m);

}  // namespace mote
