"""Mixture of insighTful Experts: LoRA experts by reasoning stage, one shared, in kernels for CPU and CUDA.

Importing starts no CUDA context. What is installed and built: python -m mote_ext.env.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

from mote_ext import _build

try:
    __version__ = version("mote_ext")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0+unknown"

BASE_ONLY = -2  # stage id of a token that only the frozen base processes
SHARED_ONLY = -1  # stage id of a token that the shared expert alone processes

# Python imports this file before mote_ext.env, which must run where the rest cannot be imported: it says why.
if "mote_ext.env" not in sys.orig_argv:
    _build.require_compiled_module()

    from mote_ext import reference
    from mote_ext.ops import lora_delta, mote_linear

__all__ = ["BASE_ONLY", "SHARED_ONLY", "__version__", "lora_delta", "mote_linear", "reference"]
