"""Backends as a fixture: the same test bodies run on the C++ CPU code, on the CUDA kernels executed on the host (simt),
and on a card where there is one. MOTE_REQUIRE_SIMT=1 and MOTE_REQUIRE_CUDA=1 turn a skipped backend into a failure.
"""

import importlib
import os

# NOTE: before torch is imported. OpenMP's threads spin while they wait, and beside anything else on the machine every
# small op then costs milliseconds: the tests took 20 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


class Backend:
    """The public functions and the torch ops of one voice, and the device its tensors live on."""

    def __init__(self, name):
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"
        self.refuses_ids = name == "cpu"  # elsewhere an illegal id makes its token's row NaN
        self.simulator = importlib.import_module("mote_ext._simt") if name == "simt" else None
        self.package = importlib.import_module("mote_ext")
        self.ops = torch.ops.mote_simt if name == "simt" else torch.ops.mote_ext

    def mote_linear(self, x, weight, bias, lora_A, lora_B, stage_ids, scales, *, shared=True):
        if self.simulator is None:
            return self.package.mote_linear(x, weight, bias, lora_A, lora_B, stage_ids, scales, shared=shared)
        return self.ops.linear(x, weight, bias, None, lora_A, lora_B, stage_ids, scales, shared)[0]

    def lora_delta(self, x, lora_A, lora_B, stage_ids, scales, *, shared=True):
        if self.simulator is None:
            return self.package.lora_delta(x, lora_A, lora_B, stage_ids, scales, shared=shared)
        return self.ops.linear(x, None, None, None, lora_A, lora_B, stage_ids, scales, shared)[0]


def _missing(backend):
    if backend == "simt" and importlib.util.find_spec("mote_ext._simt") is None:
        return "mote_ext._simt is not built (MOTE_SIMT=1 pip install --no-build-isolation -e .)"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None


@pytest.fixture(params=["cpu", "simt", "cuda"])
def backend(request):
    return _backend(request.param)


@pytest.fixture(params=["cpu", "cuda"])
def shipped(request):
    """What a user has: every backend but the instrument of tests."""
    return _backend(request.param)


@pytest.fixture
def cpu():
    return _backend("cpu")


@pytest.fixture
def simt():
    return _backend("simt")


@pytest.fixture
def cuda():
    return _backend("cuda")


def _backend(name):
    why = _missing(name)
    if why and os.environ.get(f"MOTE_REQUIRE_{name.upper()}") == "1":
        pytest.fail(f"MOTE_REQUIRE_{name.upper()}=1, but {why}")
    if why:
        pytest.skip(why)
    return Backend(name)


@pytest.fixture
def poisoned_memory():
    """Every torch.empty, in Python and in C++, is filled with NaN (the largest value for integers)."""
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


@pytest.fixture
def num_threads():
    """Changes torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
