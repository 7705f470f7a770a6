"""What is known of the compiled module before it is opened, and the errors that say how to get one that fits.

A module built for another torch fails to open with an undefined C++ symbol, which tells a user nothing. So the build
leaves its facts in _build_info.json beside the module, and they are compared first. Called by __init__.py and env.py.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def build_facts():
    """The dictionary the build left (torch, cuda, cuda_archs, cuda_reason, compiler), or None when nothing is built."""
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError:
        return None


def require_compiled_module():
    """Opens mote_ext._C. ImportError: it, or the torch it was built for, is not there; says what to run."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"mote_ext needs PyTorch, which {sys.executable} does not have. Install torch first, then build mote_ext "
            f"against it:\n\n    {sys.executable} -m pip install 'torch>=2.11'\n    {_build_command()}\n",
            name="torch",
        ) from None

    facts = build_facts()
    if facts is None or importlib.util.find_spec("mote_ext._C") is None:
        raise _unusable(
            f"mote_ext is imported from {PACKAGE}, where its compiled module for Python "
            f"{sys.version_info.major}.{sys.version_info.minor} is missing. Build it:"
        )
    if facts["torch"] != torch.__version__:
        raise _unusable(
            f"mote_ext was built for torch {facts['torch']}, but torch {torch.__version__} is installed. "
            f"Build it again for this torch (or install torch {facts['torch']}):"
        )
    try:
        importlib.import_module("mote_ext._C")
    except ImportError as error:
        raise _unusable(f"The compiled module of mote_ext cannot be opened: {error}. Build it again:") from error


def _unusable(problem):
    return ImportError(f"{problem}\n\n    {_build_command()}\n", name="mote_ext._C")


def _build_command():
    pip = f"{sys.executable} -m pip install --no-build-isolation"
    checkout = PACKAGE.parent
    if (checkout / "setup.py").exists():
        return f"{pip} -e {checkout}"
    # pip keeps wheels it built; the one for the other torch must not come back.
    return f"{pip} --no-deps --force-reinstall --no-cache-dir mote_ext"
