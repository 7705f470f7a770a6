"""Experts on a quantised base: it is held as it is, called as it is, and its product is what the delta is added to."""

import pytest
import torch
from closeness import GRADIENT, assert_close
from models import KINDS, VOCABULARY, WHOLE_BLOCKS, make_base, make_model, make_prompts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from mote_ext import MoTEForCausalLM, get_mote_model, reference
from mote_ext.inject import experts_of

QUANTISATIONS = ("4 bit", "8 bit", "torchao int8")


@pytest.fixture(params=QUANTISATIONS)
def quantisation(request):
    """What transformers is asked for, made anew: it writes into the object."""
    name = request.param
    pytest.importorskip("torchao" if name == "torchao int8" else "bitsandbytes")

    def make():
        if name == "torchao int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        return BitsAndBytesConfig(load_in_4bit=name == "4 bit", load_in_8bit=name == "8 bit")

    return make


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("llama", **WHOLE_BLOCKS).save_pretrained(folder)
    return folder


@pytest.fixture
def make_quantised(quantisation, base_folder):
    """Loads the base quantised; every call gives another object with the same values."""

    def make(dtype=torch.float32):
        base = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=quantisation(), dtype=dtype)
        assert type(linears_of(base)["model.layers.0.mlp.up_proj"].weight) is not torch.nn.Parameter
        return base.eval()

    return make


def linears_of(base):
    return {name: module for name, module in base.named_modules() if name.endswith("_proj")}


def some_ids():
    """Stage ids of make_prompts' tokens: -2, -1 and every stage."""
    return torch.arange(18).remainder(6).sub(2).reshape(2, 9)


def logits_of(model):
    with torch.no_grad():
        return model(**make_prompts(padded=False), stage_ids=some_ids()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_kept_and_never_copied(kind, make_quantised):
    base = make_quantised()
    before = {id(linear): linear.weight for linear in linears_of(base).values()}
    layers = [layer for _, layer in experts_of(make_model(kind=kind, base=base))]
    assert len(layers) == len(before) == 14
    for layer in layers:
        assert layer.base_layer.weight is before[id(layer.base_layer)]
        assert not layer.base_layer.weight.requires_grad
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_zero_experts_are_the_quantised_base(kind, make_quantised):
    base = make_quantised()
    expected = base(**make_prompts(padded=False)).logits
    got = logits_of(make_model(kind=kind, base=base, zero=True))
    assert torch.equal(got[..., :VOCABULARY], expected)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_is_its_base_and_the_delta(dtype, grad, make_quantised):
    """And the experts' gradients are the reference's."""
    layer = dict(experts_of(make_model(base=make_quantised(dtype))))["model.base.layers.0.mlp.up_proj"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, layer.in_features, generator=generator).to(dtype)
    gradient = torch.randn(2, 9, layer.out_features, generator=generator).to(dtype)
    base = layer.base_layer(x).detach()

    def run(compute, dtype):
        experts = [p.detach().to(dtype).requires_grad_(grad) for p in (layer.lora_A, layer.lora_B)]
        y = compute(*experts)
        return [y.detach(), *(torch.autograd.grad(y, experts, gradient.to(y.dtype)) if grad else ())]

    def by_reference(x):
        return lambda A, B: base.to(x.dtype) + reference.lora_delta(x, A, B, some_ids(), layer.scales)

    def by_layer(A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x, some_ids()))

    with torch.set_grad_enabled(grad):
        got, plain = run(by_layer, torch.float32), run(by_reference(x), torch.float32)
        truth = run(by_reference(x.double()), torch.float64)
    for name, factor, *results in zip(("y", "lora_A.grad", "lora_B.grad"), (2, GRADIENT, GRADIENT), got, plain, truth):
        assert_close(name, *results, factor=factor, unit_dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_experts_and_nothing_of_the_base(kind, make_quantised):
    model = make_model(kind=kind, base=make_quantised()).train()
    inputs = make_prompts(padded=False)
    model(**inputs, stage_ids=some_ids(), labels=inputs["input_ids"]).loss.backward()
    for name, layer in experts_of(model):
        for expert in range(5):
            assert layer.lora_A.grad[expert].count_nonzero() and layer.lora_B.grad[expert].count_nonzero(), name
        assert all(parameter.grad is None for parameter in layer.base_layer.parameters()), name


def expert_gradients(model):
    model.train()
    model.zero_grad()
    inputs = make_prompts(padded=False)
    model(**inputs, stage_ids=some_ids(), labels=inputs["input_ids"]).loss.backward()
    return torch.cat([layer.lora_A.grad.flatten() for _, layer in experts_of(model)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_does_not_change_the_gradients_after_it(kind, make_quantised):
    model = make_model(kind=kind, base=make_quantised())
    before = expert_gradients(model)
    logits_of(model.eval())
    assert torch.equal(expert_gradients(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_ran_before_it_was_wrapped_has_its_gradients(kind, make_quantised):
    """To the rounding of the scales of 4-bit weights, a tenth; with the path through the base lost it is a third."""
    base = make_quantised()
    expected = expert_gradients(make_model(kind=kind, base=make_quantised()))
    with torch.no_grad():
        base(**make_prompts(padded=False))
    error = (expert_gradients(make_model(kind=kind, base=base)) - expected).norm() / expected.norm()
    assert error < 0.2


def test_an_adapter_folder_goes_onto_the_quantised_base(make_quantised, quantisation, tmp_path):
    model = make_model(base=make_quantised())
    model.save_pretrained(tmp_path, adapter_only=True)
    for reloaded in (
        MoTEForCausalLM.from_pretrained(tmp_path, base=make_quantised()),
        MoTEForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation()),
    ):
        assert torch.equal(logits_of(reloaded), logits_of(model))


def test_an_in_place_adapter_folder_goes_onto_the_quantised_base(make_quantised, tmp_path):
    model = make_model(kind="in_place", base=make_quantised())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(get_mote_model(make_quantised(), tmp_path).eval()), logits_of(model))


def test_a_whole_checkpoint_is_quantised_while_it_is_loaded(make_quantised, quantisation, tmp_path):
    """Its experts and markers are not; and what was quantised is saved and loaded as it is."""
    make_model(base=make_base("llama", **WHOLE_BLOCKS)).save_pretrained(tmp_path / "plain")
    model = MoTEForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=quantisation()).eval()
    expected = logits_of(make_model(base=make_quantised()))
    assert torch.equal(logits_of(model), expected)
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits_of(MoTEForCausalLM.from_pretrained(tmp_path / "quantised").eval()), expected)


def test_a_whole_model_made_from_a_quantised_base_is_saved(make_quantised, tmp_path):
    model = make_model(base=make_quantised())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(MoTEForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))
