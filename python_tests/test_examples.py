"""The examples run from end to end on a tiny model with random weights: what they print is not judged, only that the
journey has no gap and leaves what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import WHOLE_BLOCKS, make_base, make_tokenizer

import mote_ext
from mote_ext.judges import read_labelled
from mote_ext.suites import SuitePrompt, overlaps

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("llama_tied", vocab_size=300, **WHOLE_BLOCKS).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    rows = [
        {"prompt": f"why {i}", "analysis": "a word", "guidance": "be kind", "response": "so", "check": "safe"}
        for i in range(3)
    ]
    rows.append({"prompt": "how", "response": "no", "check": "unsafe"})
    path = tmp_path_factory.mktemp("data") / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_gpu(base, chains, tmp_path):
    pytest.importorskip("bitsandbytes")
    import one_gpu

    one_gpu.main([str(chains), "--base", str(base), "--out", str(tmp_path / "out"), "--steps", "3"])
    assert_has_experts(tmp_path / "out", base)


def test_several_gpus(base, chains, tmp_path):
    """Two processes, sharded with FSDP2 over gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launch, str(EXAMPLES / "several_gpus.py"), str(chains)]
    options = ["--base", str(base), "--out", str(tmp_path / "out"), "--dtype", "float32", "--steps", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("experts in") == 1  # the first process alone speaks
    assert_has_experts(tmp_path / "out", base)


def test_ablation(base, chains, tmp_path, capsys):
    import ablation

    pytest.importorskip("matplotlib")
    prompts = {
        label: [SuitePrompt(f"{label}-{i}", f"what {i}", label, "test") for i in range(2)]
        for label in ("harmful", "benign")
    }
    options = ["--base", str(base), "--out", str(tmp_path), "--r", "2", "--epochs", "1", "--max-new-tokens", "24"]
    only = ["--only", "mote", "lora_x2", "--mix", "0.25", "--p-dropout", "0.1", "--paths", "answer", "full"]
    ablation.main([str(chains), *options, *only], prompts)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        f"{name}, seed 0" for name in ("mote", "lora_x2", "mote, mix 0.25", "mote, p_dropout 0.1")
    ]
    assert (tmp_path / "report.html").is_file() and lines[0] in capsys.readouterr().out
    config = mote_ext.MoTEConfig.from_pretrained(tmp_path / "lora_x2-seed-0")
    assert (config.r, config.assignment) == (4, "shared")


@pytest.mark.parametrize("size", ["SMALL", "FULL"])
def test_the_demo_trains_on_nothing_it_is_judged_on(size):
    import demo

    size = getattr(demo, size)
    judged = [prompt for prompts in demo.judged_prompts(size).values() for prompt in prompts]
    harmful, benign = demo.training_prompts(size, seed=0)
    assert (len(harmful), len(benign)) == (size.harmful, size.benign)
    assert {p.label for p in harmful} == {"harmful"} and {p.label for p in benign} == {"benign"}
    assert len({p.id for p in harmful + benign}) == size.harmful + size.benign
    assert not overlaps([p.prompt for p in harmful + benign], [p.prompt for p in judged])


def test_the_demo_teaches_the_check_expert_alone_from_labelled_replies():
    import demo

    chains = demo.labelled_chains(60)
    table = mote_ext.MoTEConfig().stage_table
    assert {chain.check for chain in chains} == {"safe", "unsafe"}
    assert {tuple(chain.stages_with_loss(table)) for chain in chains} == {(table.check,)}
    held_out = {reply.response for reply in read_labelled(split="test", kind="harm")}
    assert not held_out & {chain.texts["response"] for chain in chains}


def assert_has_experts(folder, base):
    model = mote_ext.MoTEForCausalLM.from_pretrained(folder)
    assert model.config.base_model_name_or_path == str(base)
    assert any(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if name.endswith("lora_B"))
