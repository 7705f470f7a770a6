"""The CPU kernels are compiled once for each instruction set; the choice is made when they are first called.

A process chooses once, so the sets below this machine's best run in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_op_with_a_lesser_instruction_set(capability):
    # The names are those of torch, which also caps them at what the machine has.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "test_linear_op.py", "-k", "cpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-4000:]
