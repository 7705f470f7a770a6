"""Saving and loading: what comes back is what was saved, to the bit, or nothing comes back and it is said why."""

import json
import logging
import pickle

import pytest
import torch
from models import ARCHITECTURES, FOUR, KINDS, make_base, make_config, make_model, make_prompts, make_tokenizer, twin
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import mote_ext
from mote_ext.digest import weights_digest

EXPERTS = "mote_experts.safetensors"
PROMPTS = make_prompts()


def logits_of(model):
    return model(**PROMPTS).logits.detach()


def saved_base(folder, name="llama"):
    """A base as a folder, and the same base loaded from it."""
    make_base(name).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# ---- whole models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_whole_model_comes_back_bit_for_bit(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    for loaded in (
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is mote_ext.MoTEForCausalLM and not loaded.training
        assert torch.equal(logits_of(loaded), logits_of(model))
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == wanted
    out = [m.generate(**PROMPTS, path="full", check="flag", max_new_tokens=24) for m in (model, loaded)]
    assert torch.equal(*out)


def test_the_backbone_loads_alone(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is mote_ext.MoTEModel
    assert torch.equal(loaded(**PROMPTS).last_hidden_state, model.model(**PROMPTS).last_hidden_state)


def test_sharded_and_in_bfloat16(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(mote_ext.MoTEForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {n: p.dtype for n, p in loaded.named_parameters()}
    masters = ("lora_A", "lora_B", "rows")
    for parameter, dtype in dtypes.items():
        assert dtype == (torch.float32 if parameter.endswith(masters) else torch.bfloat16), parameter
    assert logits_of(loaded).isfinite().all()


def test_the_configuration_comes_back(tmp_path):
    config = make_model("llama_tied", r=3, mix=0.25, prompt_expert="guidance", use_rslora=True).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, mote_ext.MoTEConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert (loaded.vocab_size, loaded.base_vocab_size, loaded.get_text_config().num_hidden_layers) == (68, 60, 2)
    assert loaded.tie_word_embeddings and loaded.stage_table.names == config.stage_table.names


# ---- experts alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOUR)
def test_experts_come_back_onto_their_base(name, kind, tmp_path, caplog):
    base = saved_base(tmp_path / "base", name)
    model = make_model(name, kind, base=base)
    model.save_pretrained(tmp_path / "experts", adapter_only=True)
    size = (tmp_path / "experts" / EXPERTS).stat().st_size
    assert size < sum(p.numel() * 4 for p in model.parameters() if p.requires_grad) + 10_000
    with caplog.at_level(logging.WARNING):
        loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path / "experts")
        onto = mote_ext.get_mote_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), tmp_path / "experts"
        )
    assert not [record for record in caplog.records if record.name.startswith("mote_ext")]
    assert torch.equal(logits_of(loaded), logits_of(model)) and torch.equal(logits_of(onto), logits_of(model))


def test_what_is_in_the_folder(tmp_path):
    base = saved_base(tmp_path / "base")
    mote_ext.get_mote_model(base, make_config()).save_pretrained(tmp_path / "experts")
    config = json.loads((tmp_path / "experts" / "config.json").read_text())
    assert config["model_type"] == "mote" and config["base_model_name_or_path"] == str(tmp_path / "base")
    assert len(config["base_digest"]) == 64
    own = json.loads((tmp_path / "experts" / "mote_config.json").read_text())
    assert own["format"] == 1 and own["r"] == 4 and "base_config" not in own
    card = (tmp_path / "experts" / "README.md").read_text()
    assert "| analysis | 0 | `<|analysis|>` | guidance, response |" in card and "base_model: " in card
    (tmp_path / "experts" / "README.md").write_text("mine")
    mote_ext.get_mote_model(make_base(), make_config()).save_pretrained(tmp_path / "experts")
    assert (tmp_path / "experts" / "README.md").read_text() == "mine"


def test_experts_in_shards(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, adapter_only=True, max_shard_size="10KB")
    assert len(list(tmp_path.glob("mote_experts-*.safetensors"))) > 2
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert torch.equal(logits_of(loaded), logits_of(model))
    next(tmp_path.glob("mote_experts-00002*")).unlink()
    with pytest.raises(ValueError, match="mote_experts-00002.*is missing"):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base())


def test_another_base_is_warned_of(tmp_path, caplog):
    make_model().save_pretrained(tmp_path, adapter_only=True)
    with caplog.at_level(logging.WARNING):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base(seed=7))
    assert any("NOT THE BASE" in record.message for record in caplog.records)


def test_the_digest_knows_a_fine_tuning_from_another_dtype():
    base = make_base()
    digest = weights_digest(base)
    assert weights_digest(twin(base).to(torch.bfloat16)) == digest
    changed = twin(base)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    assert weights_digest(changed) != digest
    with torch.device("meta"):
        assert weights_digest(type(base)(base.config)) is None


def test_an_in_place_model_saves_experts_alone(tmp_path):
    with pytest.raises(ValueError, match="from_base"):
        make_model(kind="in_place").save_pretrained(tmp_path, adapter_only=False)


# ---- damage


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


def make_pickle(path):
    path.write_bytes(pickle.dumps({"lora_A": 1}))


def missing_key(path):
    edit(path, lambda tensors: tensors.pop(sorted(tensors)[0]))


def extra_key(path):
    edit(path, lambda tensors: tensors.update(surplus=torch.ones(1)))


def wrong_shape(path):
    edit(
        path,
        lambda tensors: tensors.update({name: t[..., :-1].contiguous() for name, t in [sorted(tensors.items())[0]]}),
    )


DAMAGE = [
    (truncate, "damaged"),
    (cut_header, "damaged"),
    (make_pickle, "damaged"),
    (missing_key, "missing"),
    (extra_key, "unexpected.*surplus"),
    (wrong_shape, "expected|misshapen"),
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("damage, message", DAMAGE)
def test_damage_is_refused_and_nothing_is_half_loaded(damage, message, whole, tmp_path):
    make_model().save_pretrained(tmp_path, adapter_only=not whole)
    damage(tmp_path / ("model.safetensors" if whole else EXPERTS))
    base = make_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, **({} if whole else {"base": base}))
    if not whole:
        model = make_model(kind="in_place")
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"(?s){message}"):
            mote_ext.checkpoint.load_experts(model, tmp_path)
        assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())
    if not whole:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            mote_ext.get_mote_model(base, tmp_path)
        assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
        assert before.keys() == base.state_dict().keys()


def test_experts_are_not_read_with_another_configuration(tmp_path):
    make_model().save_pretrained(tmp_path, adapter_only=True)
    config = mote_ext.MoTEConfig.from_pretrained(tmp_path)
    names = [stage["name"] for stage in config.stages]
    config.stages = [{**stage, "name": name} for stage, name in zip(config.stages, [names[1], names[0], *names[2:]])]
    with pytest.raises(ValueError, match="stages="):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base(), config=config)
    own = json.loads((tmp_path / "mote_config.json").read_text())
    (tmp_path / "mote_config.json").write_text(json.dumps({**own, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        mote_ext.get_mote_model(make_base(), tmp_path)


def test_a_bfloat16_base_stays_one(tmp_path):
    model = make_model(base=make_base().to(torch.bfloat16))
    assert model.dtype == model.config.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


def test_the_generation_config_comes_back_with_the_experts(tmp_path):
    model = make_model()
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path, adapter_only=True)
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert loaded.generation_config.max_new_tokens == 77


def test_pickles_are_never_read(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unpickle"):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path)


def test_an_index_cannot_point_elsewhere(tmp_path):
    make_model().save_pretrained(tmp_path, adapter_only=True)
    (tmp_path / EXPERTS).rename(tmp_path.parent / EXPERTS)
    index = {"weight_map": {"x": f"../{EXPERTS}"}}
    (tmp_path / f"{EXPERTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must lie beside it"):
        mote_ext.checkpoint.read_experts(tmp_path)


def test_experts_without_a_known_base_ask_for_it(tmp_path):
    make_model().save_pretrained(tmp_path, adapter_only=True)
    with pytest.raises(ValueError, match="pass base="):
        mote_ext.MoTEForCausalLM.from_pretrained(tmp_path)


def test_saved_with_its_tokenizer_a_model_is_whole(tmp_path):
    tokenizer = make_tokenizer()
    base = make_base("llama_tied", vocab_size=300)
    model = mote_ext.MoTEForCausalLM.from_base(base, mote_ext.MoTEConfig(r=4), tokenizer=tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path), type(tokenizer).from_pretrained(tmp_path)
    prompts = mote_ext.encode_prompts(again, ["hello"])
    for path in ("adaptive", "full", "escalate"):
        got, expected = (m.generate(**prompts, path=path, max_new_tokens=30, do_sample=False) for m in (loaded, model))
        assert torch.equal(got, expected)
