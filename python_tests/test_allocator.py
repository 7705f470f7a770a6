"""keep_freed_memory: what is freed is not faulted in again, and `mote train` asks for it where there is no GPU."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from mote_ext.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (1, 3, 40, 130):
        torch.ones(megabytes << 18).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_step()
print(faults_of_a_step())
"""

needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")


def faults(word):
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@needs_glibc
def test_what_is_freed_is_not_faulted_in_again():
    kept, left = faults("keep"), faults("leave")
    assert kept < left / 10, "a step of 174 MB has 44,000 pages of 4 KB"


def test_another_c_library_is_said_and_no_error(monkeypatch):
    from mote_ext import allocator

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
