"""Experts leave as PEFT folders and come back bit for bit; PEFT itself computes with them what the MoTE model does.

The truth is PEFT in float64 on the exported folder, plain is PEFT in float32, so a folder that says something else than
the model is far from both.
"""

import json
import math

import pytest
import torch
from closeness import assert_close
from models import KINDS, VOCABULARY, disturb, make_base, make_model, make_prompts
from safetensors.torch import load_file, save_file

from mote_ext import SHARED_ONLY
from mote_ext.checkpoint import expert_parameters
from mote_ext.config import MoTEConfig
from mote_ext.peft import CONFIG, PICKLED, WEIGHTS, export_experts, import_experts

# Beside the experts of models.py the base is negligible at the default alpha, and a saturated softmax then magnifies
# rounding, whoever rounds. Where logits are compared the experts weigh about as much as the base.
ALPHA = 2.0
ARCHITECTURES = ("llama", "llama_tied", "gpt2", "gpt_neox_fused_qkv")
STAGES = ["analysis", "guidance", "response", "check"]
LLAMA_MODULE = "model.layers.1.self_attn.k_proj"
KEY_A, KEY_B = (f"base_model.model.{LLAMA_MODULE}.lora_{letter}.weight" for letter in "AB")


def experts_and_nothing_else(model):
    return {name: tensor for name, tensor in expert_parameters(model).items() if "lora_" in name}


def assert_same_experts(got, expected):
    expected = experts_and_nothing_else(expected)
    for name, tensor in experts_and_nothing_else(got).items():
        assert torch.equal(tensor, expected[name]), name


def peft_logits(base, folder, dtype=torch.float32):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(base, folder).to(dtype).eval()
    with torch.no_grad():
        return model(**make_prompts(padded=False)).logits


def assert_peft_agrees(model, name, folder, stage):
    """model: all tokens in this stage. PEFT: a fresh base of the same weights with this folder."""
    inputs = make_prompts(padded=False)
    with torch.no_grad():
        got = model(**inputs, stage_ids=torch.full_like(inputs["input_ids"], stage)).logits[..., :VOCABULARY]
    plain, truth = (peft_logits(make_base(name), folder, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(f"{folder.name} by PEFT", got, plain, truth)
    base = make_base(name)(**inputs).logits
    assert (truth - base).abs().max() > 0.01 * base.abs().max(), "the expert says nothing; the test is empty"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Llama model and its folders, for tests that spoil a copy of one."""
    model = make_model("llama")
    return model, export_experts(model, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def folder(exported, tmp_path):
    """A sound copy of one expert's folder: rank 4, scale 0.5 · 32 / 4."""
    return write_folder(tmp_path / "adapter", *read_folder(exported[1]["analysis"]))


def read_folder(path):
    return json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)


def write_folder(path, config, tensors):
    path.mkdir(exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, path / WEIGHTS)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_bit_exact(name, kind, tmp_path):
    model = make_model(name, kind)
    folders = export_experts(model, tmp_path)
    assert list(folders) == [*STAGES, "shared"] and all(path.parent == tmp_path for path in folders.values())
    other = make_model(name, kind, seed=1)
    import_experts(other, folders)
    assert_same_experts(other, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_round_trip_in_another_dtype(dtype, tmp_path):
    model, other = (make_model("llama", seed=seed, mix=0.7, r=3, lora_alpha=7.0).to(dtype) for seed in (0, 1))
    folders = export_experts(model, tmp_path)
    scale = model.model.base.layers[0].mlp.up_proj.expert_scales()[0]
    assert read_folder(folders["check"])[0]["lora_alpha"] / 3 != scale, "they should differ in the last bit"
    import_experts(other, folders)
    assert_same_experts(other, model)


def test_the_wrappers_write_the_same_files(tmp_path):
    for path in (paths := [export_experts(make_model("gpt2", kind), tmp_path / kind) for kind in KINDS])[0]:
        whole, in_place = (read_folder(folders[path]) for folders in paths)
        assert whole[0] == in_place[0]
        assert whole[1].keys() == in_place[1].keys()
        assert all(torch.equal(whole[1][key], in_place[1][key]) for key in whole[1])


def test_what_a_folder_holds(exported):
    model, folders = exported
    config, tensors = read_folder(folders["response"])
    layer = model.model.base.layers[1].self_attn.k_proj
    assert torch.equal(tensors[KEY_A], layer.lora_A[2]) and torch.equal(tensors[KEY_B], layer.lora_B[2])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 4, 16.0, False)
    assert LLAMA_MODULE in config["target_modules"]
    assert len(tensors) == 2 * len(config["target_modules"]) == 2 * 2 * 7
    assert sorted(path.name for path in folders["response"].iterdir()) == sorted([CONFIG, WEIGHTS])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_computes_what_the_stage_does(name, kind, tmp_path):
    model = make_model(name, kind, lora_alpha=ALPHA)
    fused = export_experts(model, tmp_path / "fused", fuse_shared=True)
    assert list(fused) == STAGES and {path.name for path in (tmp_path / "fused").iterdir()} == set(STAGES)
    assert_peft_agrees(model, name, fused["guidance"], 1)
    assert_peft_agrees(model, name, export_experts(model, tmp_path)["shared"], SHARED_ONLY)


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_goes_to_its_folder(stage, tmp_path):
    model = make_model("llama", lora_alpha=ALPHA)
    assert_peft_agrees(model, "llama", export_experts(model, tmp_path, fuse_shared=True)[STAGES[stage]], stage)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{"mix": 0.8}, {"use_rslora": True}, {"use_rslora": True, "mix": 0.3, "r": 3}],
    ids=["mix", "rslora", "rslora and mix"],
)
def test_scales_are_folded(changes, kind, tmp_path):
    model = make_model("llama", kind, lora_alpha=ALPHA, **changes)
    assert_peft_agrees(model, "llama", export_experts(model, tmp_path / "fused", fuse_shared=True)["check"], 3)
    assert_peft_agrees(model, "llama", export_experts(model, tmp_path)["shared"], SHARED_ONLY)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_shared_expert(kind, tmp_path):
    model = make_model("llama", kind, lora_alpha=ALPHA, shared_expert=False)
    folders = export_experts(model, tmp_path)
    assert list(folders) == STAGES
    assert_peft_agrees(model, "llama", folders["response"], 2)


def test_a_stage_without_weight_still_round_trips(tmp_path):
    model, other = (make_model("llama", seed=seed, mix=1.0) for seed in (0, 1))  # the shared expert's scale is 0
    import_experts(other, export_experts(model, tmp_path))
    assert_same_experts(other, model)


def test_the_rest_stays_as_it_is(exported):
    model, folders = exported
    other, before = make_model("llama", seed=1), make_model("llama", seed=1)
    import_experts(other, {"guidance": folders["guidance"]})
    for name, tensor in experts_and_nothing_else(other).items():
        expected = experts_and_nothing_else(before)[name].detach().clone()
        expected[1] = experts_and_nothing_else(model)[name][1]
        assert torch.equal(tensor, expected), name
    import_experts(other, {})
    assert other.model.base.layers[0].mlp.up_proj.lora_A.requires_grad


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_that_peft_wrote(use_rslora, tmp_path):
    """Another scale, a dropout, a smaller rank: the expert computes what the adapter did."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, lora_alpha=1, use_rslora=use_rslora, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapter = peft.get_peft_model(make_base("llama"), settings)
    disturb(adapter).save_pretrained(tmp_path / "adapter")
    model = make_model("llama", lora_alpha=3.0, shared_expert=False, seed=1)
    import_experts(model, {"check": tmp_path / "adapter"})
    assert_peft_agrees(model, "llama", tmp_path / "adapter", 3)


def test_a_smaller_rank_leaves_the_rest_trainable(folder):
    config, tensors = read_folder(folder)
    smaller = {key: (t[:3] if "lora_A" in key else t[:, :3]).contiguous() for key, t in tensors.items()}
    write_folder(folder, {**config, "r": 3, "lora_alpha": 4.0 * 3}, smaller)
    model = make_model("llama", seed=1)
    before = model.model.base.layers[1].self_attn.k_proj.lora_A.detach().clone()
    import_experts(model, {"guidance": folder})
    layer = model.model.base.layers[1].self_attn.k_proj
    assert torch.equal(layer.lora_A[1, :3], smaller[KEY_A]) and torch.equal(layer.lora_B[1, :, :3], smaller[KEY_B])
    assert torch.equal(layer.lora_A[1, 3], before[1, 3]) and layer.lora_B[1, :, 3].count_nonzero() == 0


def test_another_scale_is_folded_into_B(folder):
    config, tensors = read_folder(folder)
    write_folder(folder, {**config, "lora_alpha": 2 * config["lora_alpha"]}, tensors)
    model = make_model("llama")
    import_experts(model, {"analysis": folder})
    layer = model.model.base.layers[1].self_attn.k_proj
    assert torch.equal(layer.lora_A[0], tensors[KEY_A]) and torch.equal(layer.lora_B[0], 2 * tensors[KEY_B])


def test_a_fused_folder_fits_a_model_of_twice_the_rank_without_a_shared_expert(tmp_path):
    model = make_model("llama", lora_alpha=ALPHA)
    folders = export_experts(model, tmp_path, fuse_shared=True)
    wide = make_model("llama", lora_alpha=ALPHA, shared_expert=False, r=8, zero=True)
    import_experts(wide, folders)
    assert_peft_agrees(wide, "llama", folders["response"], 2)


def spoil(change):
    """A function that writes a folder anew after change(config, tensors)."""

    def spoiled(folder):
        config, tensors = read_folder(folder)
        change(config, tensors)
        write_folder(folder, config, tensors)

    return spoiled


def sets(**fields):
    return spoil(lambda config, tensors: config.update(fields))


def only_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / PICKLED)


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])


def swap(key, change):
    return spoil(lambda config, tensors: tensors.update({key: change(tensors[key]).contiguous()}))


REFUSED = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "pickle": (only_a_pickle, "a pickle, which can run code"),
    "truncated": (truncate, "damaged or no safetensors file"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json is missing"),
    "config no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is damaged"),
    "config no object": (lambda folder: (folder / CONFIG).write_text("[]"), r"peft_type must be 'LORA', got \[\]"),
    "other method": (sets(peft_type="LOHA"), "peft_type must be 'LORA', got 'LOHA'"),
    "no rank": (sets(r=None), "r must be a positive int"),
    "alpha no number": (sets(lora_alpha=math.nan), "lora_alpha a number, got 4 and nan"),
    "larger rank": (sets(r=8), r"make the model with MoTEConfig\(r=8\)"),
    "dora": (sets(use_dora=True), "cannot hold use_dora=True"),
    "bias": (sets(bias="lora_only"), "cannot hold bias='lora_only'"),
    "lora bias": (sets(lora_bias=True), "cannot hold lora_bias=True"),
    "modules to save": (sets(modules_to_save=["lm_head"]), r"cannot hold modules_to_save=\['lm_head'\]"),
    "rank pattern": (sets(rank_pattern={"q_proj": 2}), "cannot hold rank_pattern="),
    "alpha pattern": (sets(alpha_pattern={"q_proj": 2}), "cannot hold alpha_pattern="),
    "changed base": (sets(init_lora_weights="pissa_niter_4"), "cannot hold init_lora_weights='pissa_niter_4'"),
    "unheard-of": (sets(something_of_2030=1), "cannot hold something_of_2030=1"),
    "missing": (spoil(lambda config, tensors: tensors.pop(KEY_A)), f"missing {KEY_A}"),
    "unexpected": (spoil(lambda config, tensors: tensors.update(x=torch.ones(1))), "unexpected x"),
    "misshapen": (
        swap(KEY_B, lambda t: t[:-1]),
        rf"{KEY_B}: expected floating-point \[16, 4\], got torch.float32 \[15",
    ),
    "rank of one": (swap(KEY_A, lambda t: t[:2]), rf"{KEY_A}: expected floating-point \[4, 32\]"),
    "integers": (swap(KEY_A, lambda t: t.int()), r"got torch.int32 \[4, 32\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_folder_leaves_the_model_untouched(case, folder, exported):
    damage, message = REFUSED[case]
    damage(folder)
    model = make_model("llama", seed=1)
    with pytest.raises(ValueError, match=message):
        import_experts(model, {"response": exported[1]["response"], "guidance": folder})
    assert_same_experts(model, make_model("llama", seed=1))


CALLS = {
    "unknown expert": (
        lambda model, folders: import_experts(model, {"safety": folders["check"]}),
        ValueError,
        r"import_experts: folders must name experts of this model, \['analysis'.*got \['safety'\]",
    ),
    "no shared expert": (
        lambda _, folders: import_experts(make_model(shared_expert=False), {"shared": folders["shared"]}),
        ValueError,
        r"must name experts .* got \['shared'\]",
    ),
    "weight of 0": (
        lambda _, folders: import_experts(make_model(mix=1.0), {"shared": folders["shared"]}),
        ValueError,
        "a scale of 4, in this model the expert's is 0",
    ),
    "other base": (
        lambda _, folders: import_experts(make_model("gpt2"), folders),
        ValueError,
        "(?s)do not fit this model.*missing base_model.model.transformer.*unexpected base_model.model.model",
    ),
    "import into no MoTE model": (
        lambda _, folders: import_experts(make_base(), folders),
        TypeError,
        "import_experts: model must be a MoTE model.*got LlamaForCausalLM",
    ),
    "export of no MoTE model": (
        lambda _, folders: export_experts(torch.nn.Linear(2, 2), "never"),
        TypeError,
        "export_experts: model must be a MoTE model.*got Linear",
    ),
    "nothing to fuse": (
        lambda _, folders: export_experts(make_model(shared_expert=False), "never", fuse_shared=True),
        ValueError,
        "fuse_shared=True needs a shared expert",
    ),
    "no scale to fuse by": (
        lambda _, folders: export_experts(make_model(mix=0.0), "never", fuse_shared=True),
        ValueError,
        "fuse_shared=True needs stages with a weight",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_refused_calls(case, exported):
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call(*exported)


def test_stages_of_another_table(tmp_path):
    model = make_model("llama", marker_ids=list(range(VOCABULARY, VOCABULARY + 6)), stages=MoTEConfig.paper().stages)
    assert list(export_experts(model, tmp_path)) == [*STAGES[:3], "shared"]
