"""Two processes on the CPU (gloo) train what one process trains: DDP, and FSDP2 whose parameters are DTensors."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_program import train
from models import make_base, make_tokenizer
from safetensors.torch import load_file
from test_training import step_logs

from mote_ext.training import shard_for_training, sharding

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Sums of float32 in another order, which AdamW's division by the square root of a small moment makes larger.
LOSSES, WEIGHTS = 1e-5, 2e-5


def launch(command, folder, *scenarios):
    """Runs the program in the processes that `command` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *command(port), str(HERE / "distributed_program.py"), str(folder), *scenarios]
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done


def torchrun(port):
    return ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]


def read(folder, scenario):
    experts = load_file(folder / scenario / "mote_experts.safetensors")
    return json.loads((folder / f"{scenario}.json").read_text()), experts


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in one process: losses, evaluations, experts."""
    folder = tmp_path_factory.mktemp("alone")
    trainer, _, _ = train(folder)
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return step_logs(trainer), evaluations, load_file(folder / "mote_experts.safetensors")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder of what two processes did, with what they printed; one launch, for each imports everything again."""
    folder = tmp_path_factory.mktemp("together")
    make_base("llama_tied", vocab_size=300).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    lines = [{"prompt": f"question {i}", "analysis": "why", "response": f"so {i}"} for i in range(4)]
    (folder / "chains.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = "--epochs 1 --batch-size 1 --accumulate 1 --shard --r 4"
    (folder / "command.txt").write_text(f"{folder}/chains.jsonl --base {folder}/base --out {folder}/out {options}")
    scenarios = ("ddp", "ddp_accumulated", "fsdp", "fsdp_in_place", "fsdp_bfloat16", "command")
    (folder / "printed.txt").write_text(launch(torchrun, folder, *scenarios).stdout)
    return folder


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(scenario, alone, together):
    logs, evaluations, experts = alone
    found, trained = read(together, scenario)
    assert found["processes"] == 2
    for got, expected in zip(found["logs"], logs, strict=True):
        assert got.keys() == expected.keys()  # norms of each expert, losses and shares of each stage
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=10 * LOSSES, abs=1e-6), name
        assert got["loss"] == pytest.approx(expected["loss"], rel=LOSSES)
    assert found["eval_losses"] == pytest.approx(evaluations, rel=LOSSES)
    assert trained.keys() == experts.keys()
    for name, value in experts.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=WEIGHTS)
    assert found["resumed_is_the_same"]


def test_accumulation_is_the_mean_over_all_tokens_of_all_processes(alone, together, tmp_path):
    trainer, _, _ = train(tmp_path, gradient_accumulation_steps=2)
    found, _ = read(together, "ddp_accumulated")
    assert [entry["loss"] for entry in found["logs"]] == pytest.approx(
        [entry["loss"] for entry in step_logs(trainer)], rel=LOSSES
    )
    assert found["logs"][0]["loss"] != pytest.approx(alone[0][0]["loss"], rel=1e-3)


def test_every_trained_tensor_and_its_gradient_is_sharded(together):
    for scenario in ("fsdp", "fsdp_in_place", "fsdp_bfloat16"):
        found, _ = read(together, scenario)
        assert found["without_shards"] == [] and found["sharded"] == 44  # all but five norms
    assert read(together, "ddp")[0]["sharded"] == 0
    assert read(together, "fsdp")[0]["parts"]


def test_experts_stay_float32_over_a_sharded_base_in_bfloat16(together, tmp_path):
    trainer, _, _ = train(tmp_path, dtype=torch.bfloat16)
    found, experts = read(together, "fsdp_bfloat16")
    assert found["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert {tensor.dtype for tensor in experts.values()} == {torch.float32}
    expected = [entry["loss"] for entry in step_logs(trainer)]
    unit = torch.finfo(torch.bfloat16).eps
    assert [entry["loss"] for entry in found["logs"]] == pytest.approx(expected, rel=unit)


def test_sharded_frozen_experts_keep_every_bit(alone, together, tmp_path):
    found, experts = read(together, "fsdp_in_place")
    trainer, _, _ = train(tmp_path, kind="in_place", frozen_stages=("analysis",))
    assert [entry["loss"] for entry in found["logs"]] == pytest.approx(
        [entry["loss"] for entry in step_logs(trainer)], rel=LOSSES
    )
    expected = load_file(tmp_path / "mote_experts.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(experts[name], value, rtol=0, atol=WEIGHTS)
        if name.endswith("lora_A"):
            assert torch.equal(experts[name][0], value[0]) and not torch.equal(experts[name][0], alone[2][name][0])


def test_accelerate_launch_with_an_fsdp_file_shards(tmp_path):
    """accelerate by itself would run DDP on a CPU and not say so."""
    given = (ROOT / "examples" / "launch" / "fsdp2.yaml").read_text()
    assert "num_processes: 4" in given and "use_cpu: false" in given
    file = tmp_path / "fsdp2.yaml"
    file.write_text(given.replace("num_processes: 4", "num_processes: 2").replace("use_cpu: false", "use_cpu: true"))

    def accelerate(port):
        return ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", str(port)]

    launch(accelerate, tmp_path, "launched")
    found, _ = read(tmp_path, "launched")
    assert (found["processes"], found["sharded"], found["without_shards"]) == (2, 44, [])


def test_mote_train_under_torchrun(together):
    """One screen of two processes, and half as many steps as one of them would take."""
    printed = (together / "printed.txt").read_text()
    assert printed.count("trained on 4 chains") == 1 and "2 steps" in printed
    assert {"mote_experts.safetensors", "metrics.json"} <= {path.name for path in (together / "out").iterdir()}


def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no process group; start with torchrun"):
        shard_for_training(make_base())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.device("meta"):
        empty = make_base()
    with pytest.raises(ValueError, match=r"is not loaded \(meta\)"):
        shard_for_training(empty)
    quantised = make_base()
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="a quantised base trains in one process or under DDP"):
        shard_for_training(quantised)


def test_where_experts_are_cut():
    """Along the rank or the width where that comes out even, so that every process has a part of every expert."""
    parameter = torch.nn.Parameter(torch.zeros(5, 6, 8))
    assert sharding._placement(parameter, 3).dim == 1
    assert sharding._placement(parameter, 4).dim == 2
    assert sharding._placement(parameter, 5) is None
    assert sharding._placement(torch.nn.Parameter(torch.zeros(8, 6)), 2) is None
