"""MoTELinear by itself: a drop-in around whatever linear layer it is given."""

import math

import pytest
import torch
from closeness import GRADIENT, assert_close
from torch import nn
from transformers.pytorch_utils import Conv1D

import mote_ext

NUM_STAGES, NUM_IN, NUM_OUT = 3, 24, 40


class DoubledLinear(nn.Linear):
    """A linear layer with a forward of its own, as quantised ones have."""

    def forward(self, x):
        return super().forward(x) * 2


def make_base(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "Conv1D":
        layer = Conv1D(NUM_OUT, NUM_IN)
    else:
        layer = {"Linear": nn.Linear, "DoubledLinear": DoubledLinear}[kind](NUM_IN, NUM_OUT)
    return layer.to(dtype)


def make_layer(kind="Linear", dtype=torch.float32, **options):
    layer = mote_ext.MoTELinear(make_base(kind, dtype), NUM_STAGES, r=4, **options)
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    return layer


def make_input(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, NUM_IN, generator=generator).to(dtype)
    return x, torch.randint(-2, NUM_STAGES, (2, 7), generator=generator)


def expected(layer, x, ids, dtype):
    """The layer's definition in plain PyTorch."""
    base = make_base(type(layer.base_layer).__name__, x.dtype).to(dtype)
    masters = (lora.detach().to(x.dtype).to(dtype) for lora in (layer.lora_A, layer.lora_B))
    x = x.to(dtype)
    return base(x) + mote_ext.reference.lora_delta(x, *masters, ids, layer.scales, shared=layer.shared_expert)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "DoubledLinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_it_computes_its_base_and_the_experts(kind, dtype, grad):
    layer, (x, ids) = make_layer(kind, dtype), make_input(dtype)
    with torch.set_grad_enabled(grad):
        got = layer(x, ids)
    assert_close(
        "y", got.detach(), expected(layer, x, ids, dtype).detach(), expected(layer, x, ids, torch.float64).detach()
    )


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "DoubledLinear"])
def test_an_untrained_layer_is_its_base_bit_for_bit(kind):
    base, (x, ids) = make_base(kind), make_input()
    layer = mote_ext.MoTELinear(base, NUM_STAGES)
    assert layer.base_layer is base
    assert torch.equal(layer(x, ids), make_base(kind)(x))


def test_gradients_reach_the_experts_and_the_input_and_nothing_else():
    layer, (x, ids) = make_layer(), make_input()
    x.requires_grad_()
    layer(x, ids).square().sum().backward()
    got = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())

    def gradients(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
        base = make_base("Linear").to(dtype)
        y = base(leaves[0]) + mote_ext.reference.lora_delta(*leaves, ids, layer.scales)
        return torch.autograd.grad(y.square().sum(), leaves)

    for name, *three in zip(("x", "lora_A", "lora_B"), got, gradients(torch.float32), gradients(torch.float64)):
        assert_close(name, *three, factor=GRADIENT)


def test_dropout_is_on_what_the_experts_read():
    layer, (x, ids) = make_layer(lora_dropout=0.5), make_input()
    torch.manual_seed(3)
    got = layer(x, ids)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    delta = mote_ext.lora_delta(dropped, layer.lora_A, layer.lora_B, ids, layer.scales)
    assert torch.equal(got, layer.base_layer(x) + delta)
    assert torch.equal(layer.eval()(x, ids), make_layer()(x, ids))


@pytest.mark.parametrize(
    "options, stage, shared",
    [
        ({}, 0.5 * 32 / 4, 0.5 * 32 / 4),
        ({"lora_alpha": 24, "mix": 0.75}, 0.75 * 6, 0.25 * 6),
        ({"use_rslora": True}, 0.5 * 32 / 2, 0.5 * 32 / 2),
        ({"shared_expert": False}, 32 / 4, None),
    ],
)
def test_scales_are_the_mixing_weight_times_alpha_over_r(options, stage, shared):
    layer = make_layer(**options)
    assert layer.scales.tolist() == [stage] * NUM_STAGES + ([] if shared is None else [shared])


def test_scales_survive_every_change_of_dtype_and_the_state_does_not_hold_them():
    layer = make_layer(lora_alpha=32 / 6)
    exact = layer.scales.clone()
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        assert torch.equal(change(layer).scales, exact) and layer.scales.dtype == torch.float32
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B"}


def test_masters_stay_float32_over_a_bfloat16_base():
    layer = mote_ext.MoTELinear(make_base("Linear", torch.bfloat16))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_A_starts_as_pefts_a_slice_at_a_time_and_B_as_zero():
    layer = mote_ext.MoTELinear(nn.Linear(400, 8), NUM_STAGES, r=16)
    bound = 1 / math.sqrt(400)
    for expert in layer.lora_A:
        assert 0.99 * bound < expert.abs().max() <= bound
        assert abs(expert.std() / (bound / math.sqrt(3)) - 1) < 0.05
    assert not layer.lora_B.any() and len({expert.sum().item() for expert in layer.lora_A}) == NUM_STAGES + 1


WRONG = [
    (lambda: mote_ext.MoTELinear(nn.LayerNorm(4)), TypeError, "base_layer must be linear.*LayerNorm"),
    (lambda: mote_ext.MoTELinear(nn.Linear(4, 4), 65), ValueError, "num_stages must be in 0..64"),
    (lambda: mote_ext.MoTELinear(nn.Linear(4, 4), 0, shared_expert=False), ValueError, "num_stages"),
    (lambda: mote_ext.MoTELinear(nn.Linear(4, 4), r=0), ValueError, "r must be in 1..256"),
    (lambda: mote_ext.MoTELinear(nn.Linear(4, 4), mix=1.5), ValueError, "mix must be"),
    (lambda: mote_ext.MoTELinear(nn.Linear(4, 4), lora_dropout=1.0), ValueError, "lora_dropout"),
    (lambda: make_layer()(torch.ones(2, NUM_IN)), ValueError, "stage_ids is required"),
    (lambda: make_layer()(torch.ones(2, NUM_IN), torch.tensor([0, 3])), ValueError, r"stage_ids\[1\] is 3"),
    (lambda: make_layer()(torch.ones(2, NUM_IN), torch.tensor([0])), ValueError, "stage_ids"),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
