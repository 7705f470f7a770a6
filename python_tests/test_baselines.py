"""Baselines: what each changes, that routing alone differs, and `mote train` with every one of them."""

import json

import pytest
import torch
from models import ENDS, KINDS, MARKER_IDS, chain, make_base, make_config, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

import mote_ext
import mote_ext.allocator
from mote_ext import cli
from mote_ext.cli import train as command
from mote_ext.inject import experts_of
from mote_ext.training import BASELINES, apply_baseline, train

PROMPT = [11, 12, 13]
ROW = torch.tensor([PROMPT + chain(0, 1, 2)])
STAGES = [-1] * 3 + [0] * 5 + [1] * 5 + [2] * 5


@pytest.fixture
def recorded():
    """The ids a model's layers saw, through its context."""

    def record(model, *args, **kwargs):
        seen = []
        _, layer = next(experts_of(model))
        handle = layer.register_forward_pre_hook(lambda module, given: seen.append(module.context.stage_ids.tolist()))
        model(*args, **kwargs)
        handle.remove()
        return seen[0]

    return record


# ---- what a baseline changes


@pytest.mark.parametrize(
    ("name", "experts", "rank", "scales", "p_dropout"),
    [
        ("mote", 5, 4, [1.0] * 5, 0.3),
        ("lora", 1, 4, [2.0], 0.0),
        ("lora_x2", 1, 8, [2.0], 0.0),
        ("lora_skipping", 1, 4, [2.0], 0.3),
        ("lora_matched", 1, 20, [2.0], 0.0),
        ("no_shared", 4, 4, [2.0] * 4, 0.3),
        ("no_skipping", 5, 4, [1.0] * 5, 0.0),
        ("random_experts", 5, 4, [1.0] * 5, 0.3),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_ranks_and_scales(kind, name, experts, rank, scales, p_dropout):
    given = make_config(lora_alpha=8)
    config, dropped = apply_baseline(name, given, 0.3)
    assert dropped == p_dropout and given.r == 4 and given.assignment == "stage"
    wrap = mote_ext.MoTEForCausalLM.from_base if kind == "whole" else mote_ext.get_mote_model
    model = wrap(make_base(), config)
    for _, layer in experts_of(model):
        assert list(layer.lora_A.shape[:2]) == [experts, rank] and layer.expert_scales() == scales
    assert config.num_experts == experts and config.stage_table.names == given.stage_table.names
    model(ROW)
    assert model.last_stage_ids[0].tolist() == ([-2] * 3 + STAGES[3:] if name == "no_shared" else STAGES)


def test_a_table_for_every_baseline_and_errors():
    assert set(BASELINES) == {"mote", "lora", "lora_x2", "lora_skipping", "lora_matched"} | {
        "no_shared",
        "no_skipping",
        "random_experts",
    }
    with pytest.raises(ValueError, match="baseline must be one of .*, got 'peft'"):
        apply_baseline("peft", make_config(), 0.5)
    with pytest.raises(ValueError, match="assignment must be one of"):
        make_config(assignment="any")
    with pytest.raises(ValueError, match="shared_expert must be True with assignment='shared'"):
        make_config(assignment="shared", shared_expert=False, prompt_expert="none")


# ---- routing


@pytest.mark.parametrize("kind", KINDS)
def test_one_lora_for_all_tokens(kind, recorded):
    model = make_model(kind=kind, assignment="shared")
    assert recorded(model, ROW) == [[-1] * 18] and model.last_stage_ids[0].tolist() == STAGES
    given = torch.tensor([[-2, 3] * 9])
    assert recorded(model, ROW, stage_ids=given) == [[-2, -1] * 9]
    assert model.last_stage_ids.tolist() == given.tolist()
    # It is the LoRA of its only expert, folded into the weights.
    expected = model(ROW).logits
    with torch.no_grad():
        for _, layer in experts_of(model):
            layer.base_layer.weight += layer.scales[0] * layer.lora_B[0] @ layer.lora_A[0]
            layer.lora_B.zero_()
    torch.testing.assert_close(model(ROW).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_random_experts_are_a_function_of_the_token(kind, recorded):
    model = make_model(kind=kind, assignment="random")
    ids = torch.tensor([PROMPT + chain(0, 2) + [20], [14] + chain(2, 3) + PROMPT])
    seen = recorded(model, ids)
    stages = model.last_stage_ids.tolist()
    expert_of = {}
    for tokens, experts, own in zip(ids.tolist(), seen, stages):
        for token, expert, stage in zip(tokens, experts, own):
            assert expert in range(4) if stage >= 0 else expert == -1
            if stage >= 0:
                assert expert_of.setdefault(token, expert) == expert
    everything = torch.arange(60)[None].repeat(1, 1)
    drawn = recorded(model, everything, stage_ids=torch.zeros_like(everything))[0]
    assert {expert: drawn.count(expert) > 5 for expert in range(4)} == dict.fromkeys(range(4), True)
    model.routing.config.seed = 1
    assert recorded(model, everything, stage_ids=torch.zeros_like(everything))[0] != drawn
    with pytest.raises(ValueError, match="pass input_ids, got inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32), stage_ids=torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assignment", ["shared", "random"])
def test_generation_is_the_same_with_a_cache_and_without(assignment, kind):
    model = make_model(kind=kind, assignment=assignment)
    ids = torch.tensor([PROMPT])
    options = {"path": "full", "max_new_tokens": 24, "do_sample": False}
    cached, whole = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, whole)
    markers = [token for token in cached[0].tolist() if token in MARKER_IDS]
    assert markers == MARKER_IDS[:6] and cached[0, -1] == ENDS[2]


# ---- folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASELINES)
def test_a_folder_comes_back_as_the_same_baseline(name, kind, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    config, _ = apply_baseline(name, make_config(), 0.5)
    changes = {field: getattr(config, field) for field in ("assignment", "shared_expert", "r", "lora_alpha")}
    prompts = {"prompt_expert": config.prompt_expert, "train_prompt_expert": config.train_prompt_expert}
    model = make_model(kind=kind, base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **changes, **prompts)
    model.save_pretrained(tmp_path / "experts", adapter_only=True)
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path / "experts")
    assert loaded.config.assignment == config.assignment
    assert torch.equal(loaded(ROW).logits, model(ROW).logits)


def test_a_folder_from_before_there_were_baselines(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, adapter_only=True)
    for file in ("config.json", "mote_config.json"):
        content = json.loads((tmp_path / file).read_text())
        assert content.pop("assignment") == "stage"
        (tmp_path / file).write_text(json.dumps(content))
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert torch.equal(loaded(ROW).logits, model(ROW).logits)
    (tmp_path / "mote_config.json").write_text(json.dumps({**content, "assignment": "random"}))
    with pytest.raises(ValueError, match="saved with assignment='random', the configuration says 'stage'"):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base())


def test_one_lora_is_exported_to_peft_and_back(tmp_path):
    model = make_model(assignment="shared")
    folders = mote_ext.peft.export_experts(model, tmp_path)
    assert list(folders) == ["shared"]
    assert json.loads((folders["shared"] / "adapter_config.json").read_text())["lora_alpha"] == 32
    other = make_model(assignment="shared", seed=1)
    mote_ext.peft.import_experts(other, folders)
    for (_, got), (_, expected) in zip(experts_of(other), experts_of(model)):
        assert torch.equal(got.lora_A, expected.lora_A) and torch.equal(got.lora_B, expected.lora_B)
    with pytest.raises(ValueError, match="fuse_shared=True needs stage experts"):
        mote_ext.peft.export_experts(model, tmp_path, fuse_shared=True)
    with pytest.raises(ValueError, match=r"must name experts of this model, \['shared'\]"):
        mote_ext.peft.import_experts(model, {"analysis": tmp_path})


# ---- mote train


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a base and chains.jsonl."""
    folder = tmp_path_factory.mktemp("given")
    make_base("llama_tied", vocab_size=300).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    lines = [{"prompt": f"q{i}", "analysis": "why", "response": f"so {i}", "check": "safe"} for i in range(4)]
    (folder / "chains.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def mote_train(given, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", command)

    def run(out, *options):
        required = [str(given / "chains.jsonl"), "--base", str(given / "base"), "--out", str(out)]
        return cli.main(["train", *required, "--batch-size", "2", "--accumulate", "1", *options])

    return run


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains_by_its_flag(name, mote_train, tmp_path, capsys):
    assert mote_train(tmp_path, "--baseline", name, "--epochs", "2", "--r", "4", "--learning-rate", "1e-2") == 0
    shown = capsys.readouterr().out
    assert f"{name} trained on 4 chains: {tmp_path}" in shown and "4 steps" in shown and "mote generate" in shown
    facts = json.loads((tmp_path / "metrics.json").read_text())
    config, p_dropout = apply_baseline(name, mote_ext.MoTEConfig(r=4, lora_alpha=8), 0.5)
    assert facts["settings"]["baseline"] == name and facts["settings"]["p_dropout"] == p_dropout
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.r, loaded.config.assignment) == (config.r, config.assignment)
    assert facts["trained_parameters"] == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert any(layer.lora_B.any() for _, layer in experts_of(loaded))


def test_the_options_reach_the_model_and_the_trainer(mote_train, given, tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"lr_scheduler_type": "constant", "weight_decay": 0.1}))
    options = "--r 2 --alpha 6 --mix 0.25 --p-dropout 0.2 --prompt-expert random --frozen check --seed 7 --packing"
    options += " --marker-learning-rate 0.5 --learning-rate 0.01 --epochs 1 --gradient-checkpointing --samples 1"
    options += f" --eval-data {given}/chains.jsonl --dtype bfloat16 --settings {tmp_path}/settings.json"
    assert mote_train(tmp_path / "out", *options.split()) == 0
    config = mote_ext.MoTEConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.mix, config.seed) == (2, 6, 0.25, 7)
    assert (config.train_prompt_expert, config.prompt_expert) == ("random", "response")
    assert config.dtype == torch.bfloat16
    log = json.loads((tmp_path / "out" / "metrics.json").read_text())["log"]
    assert log[0]["grad_norm/check"] == 0 and log[0]["learning_rate"] == 0.01
    assert (tmp_path / "out" / "samples" / "step-2.jsonl").is_file()
    assert "evaluation" in capsys.readouterr().out


def test_freed_memory_is_kept_where_there_is_no_gpu(mote_train, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(mote_ext.allocator, "keep_freed_memory", lambda: calls.append("kept"))
    assert mote_train(tmp_path, "--epochs", "1") == 0
    assert calls == ([] if torch.cuda.is_available() else ["kept"])


def test_a_run_is_resumed_and_not_overwritten(mote_train, tmp_path, capsys):
    assert mote_train(tmp_path / "whole", "--epochs", "3") == 0
    options = ["--epochs", "3", "--resume"]
    assert mote_train(tmp_path / "parts", *options) == 0  # nothing to resume: it begins
    for number in (6, 4):
        for file in (tmp_path / "parts" / f"checkpoint-{number}").iterdir() if number == 6 else ():
            file.unlink()
    (tmp_path / "parts" / "checkpoint-6").rmdir()
    assert mote_train(tmp_path / "parts", *options) == 0
    assert "2 steps" in capsys.readouterr().out
    weights = [(tmp_path / name / "mote_experts.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert mote_train(tmp_path / "whole") == 2
    assert "holds checkpoints of another run; resume it" in capsys.readouterr().err


def test_errors_of_the_command_line(mote_train, given, tmp_path, capsys):
    for options, said in (
        (["--baseline", "peft"], "baseline must be one of"),
        (["--frozen", "answer"], "frozen_stages must be experts of this model"),
        (["--r", "0"], "r must be in 1..256"),
        (["--max-length", "5"], "no chain of the data fits max_length=5"),
    ):
        assert mote_train(tmp_path / "out", *options) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "settings.json").write_text(json.dumps({"learning_speed": 1}))
    assert mote_train(tmp_path / "out", "--settings", str(tmp_path / "settings.json")) == 2
    assert "['learning_speed'] are no arguments" in capsys.readouterr().err
    with pytest.raises(ValueError, match="quantize must be '4bit'"):
        train(given / "chains.jsonl", given / "base", tmp_path / "out", quantize="2bit")
