"""Builds mote_ext._C with CMake and puts it into the package; what is built, and from what, stands in CMakeLists.txt.

Read from the environment: MOTE_CUDA (auto, 1, 0), TORCH_CUDA_ARCH_LIST, MAX_JOBS, and MOTE_SIMT=1 for the test module,
which is built in an editable install only.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent


def require_torch():
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"mote_ext: there is no torch in this build environment ({sys.executable}).\n"
            "The compiled module fits only the torch it was built against, so build it where that torch is:\n\n"
            "    pip install torch cmake ninja pybind11 'setuptools>=77'\n"
            "    pip install --no-build-isolation ."
        )


def tool(name):
    """The program's path; the one beside this Python first, which need not be on PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=places) or sys.exit(f"mote_ext: {name} is needed to build; pip install {name}")


class BuildWithCMake(build_ext):
    def run(self):
        require_torch()
        in_place = self.inplace or self.editable_mode
        package = ROOT / "mote_ext" if in_place else Path(self.build_lib).resolve() / "mote_ext"
        with_tests = in_place and os.environ.get("MOTE_SIMT") == "1"
        # Kept between builds, so that one changed file compiles alone.
        build = ROOT / "build" / sys.implementation.cache_tag

        cmake = tool("cmake")
        jobs = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
        configure = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "MOTE_CUDA": os.environ.get("MOTE_CUDA", "auto"),
            "MOTE_CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "MOTE_BUILD_TESTS": "ON" if with_tests else "OFF",
        }
        call(cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *(f"-D{name}={value}" for name, value in configure.items()))
        call(cmake, "--build", build, "--parallel", jobs)
        for component in ["module", "tests"] if with_tests else ["module"]:
            call(cmake, "--install", build, "--prefix", package, "--component", component)

    def get_source_files(self):
        return []  # MANIFEST.in lists them


class DistInfo(dist_info):
    """pip asks for this before it fetches the dependencies: the moment to refuse, not gigabytes later."""

    def run(self):
        require_torch()
        super().run()


def call(*command):
    if subprocess.call([str(part) for part in command]) != 0:
        sys.exit("mote_ext: the build failed; the reason stands above")


setup(
    ext_modules=[Extension("mote_ext._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake, "dist_info": DistInfo},
)
