"""Options of the benches, and the condition under which they measure at all: quiet cores."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from mote_ext.allocator import keep_freed_memory

# The rule of closeness is the tests'; there is no second one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))

# With less than this share of the cores for a spin of 50 ms, medians are about the neighbours.
QUIET_SHARE = 0.95
WAIT_S = 20


def pytest_configure():
    """For every contender alike: whom page faults hit, up to half of a time, depends on what was allocated before."""
    keep_freed_memory()


def pytest_addoption(parser):
    group = parser.getgroup("mote_ext benches")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    group.addoption("--allow-busy", action="store_true", help="measure on busy cores too; report.py will say so")


def quiet_share():
    """How much of every core a short spin on all of them gets, at most 1."""
    num_cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(num_cores)
    work = torch.ones(num_cores << 16)
    work.cos_()  # the threads exist from here on
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 0.05:
        work.cos_()
    share = (time.process_time() - cpu) / (time.perf_counter() - wall) / num_cores
    torch.set_num_threads(before)
    return min(share, 1.0)


@pytest.fixture
def quiet(request):
    """Waits for quiet cores, or refuses; returns a function for the share now."""
    share = quiet_share()
    deadline = time.monotonic() + WAIT_S
    while share < QUIET_SHARE and time.monotonic() < deadline and not request.config.getoption("--allow-busy"):
        time.sleep(1)
        share = quiet_share()
    if share < QUIET_SHARE and not request.config.getoption("--allow-busy"):
        pytest.fail(f"the cores are busy: a spin got {share:.0%} of them, {QUIET_SHARE:.0%} are needed (--allow-busy)")
    return lambda: min(share, quiet_share())
