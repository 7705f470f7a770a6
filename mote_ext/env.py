"""python -m mote_ext.env: what is installed, what was built, and why not. Paste it into a bug report.

Runs where the package itself cannot be imported: without torch, unbuilt, or built for another torch.
"""

import importlib.metadata
import os
import platform
import sys

from mote_ext import _build

PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "tqdm", "numpy")


def report():
    """(name, value) pairs in the order they are printed."""
    lines = [
        ("mote_ext", f"{_version('mote_ext')}, {_build.PACKAGE}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("system", f"{platform.platform()}, {_cpu()}"),
    ]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("compiled module", _module_state())]
    lines += _built_with(_build.build_facts())
    lines += [("GPUs", _gpus())]
    return lines


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu():
    cores = f"{len(os.sched_getaffinity(0))} cores"
    try:
        import torch
    except ImportError:
        return cores
    return f"{cores}, {torch.backends.cpu.get_cpu_capability()}"


def _module_state():
    try:
        _build.require_compiled_module()
    except ImportError as error:
        return "\n".join(line for line in str(error).splitlines() if line)
    return "works"


def _built_with(facts):
    if facts is None:
        return []
    kernels = f"CUDA {facts['cuda']} for {facts['cuda_archs']}" if facts["cuda"] else f"none: {facts['cuda_reason']}"
    return [("built for torch", facts["torch"]), ("built by", facts["compiler"]), ("CUDA kernels", kernels)]


def _gpus():
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch, built for CUDA {torch.version.cuda}, sees no GPU"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "\n".join(f"{gpu.name}, {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in devices)


def main():
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value.replace(chr(10), chr(10) + ' ' * (width + 2))}")


if __name__ == "__main__":
    main()
