"""The CPU kernels are compiled once for each instruction set; the choice is made when they are first called.

A process chooses once, so the sets below this machine's best run in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


RUNS = {"lora": ["test_linear_op.py", "-k", "cpu"], "serving": ["test_paged_op.py", "test_skinny.py"]}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_ops_with_a_lesser_instruction_set(capability, run):
    # The names are those of torch, which also caps them at what the machine has.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *run]
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
