"""ops.skinny_linear against float64, its bits, bad input; and models whose linear layers are switched to it."""

import models
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from closeness import assert_close
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import mote_ext
from mote_ext import ops, skinny

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = {  # tokens, K, N
    "one of each": (1, 1, 1),
    "one row": (1, 576, 192),
    "odd": (3, 7, 5),
    "a tile and one": (4, 33, 13),
    "many columns": (7, 24, 1030),
    "blocks of k": (5, 2049, 70),
    "blocks of rows": (130, 65, 129),
    "no rows": (0, 4, 3),
    "no columns": (2, 4, 0),
}


def make_operands(tokens, num_in, num_out, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (tokens, num_in), "weight": (num_out, num_in), "bias": (num_out,)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def truth(operands):
    return F.linear(*(tensor.double() for tensor in operands.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_it_is_a_linear(sizes, dtype):
    operands = make_operands(*sizes, dtype=dtype)
    assert_close("y", ops.skinny_linear(**operands), F.linear(**operands), truth(operands))
    operands.pop("bias")
    assert_close("y", ops.skinny_linear(**operands), F.linear(**operands), truth(operands))


def test_any_leading_sizes_and_strides():
    operands = make_operands(12, 40, 9)
    expected = ops.skinny_linear(**operands)
    x, weight, bias = operands.values()
    assert torch.equal(ops.skinny_linear(x.view(3, 1, 4, 40), weight, bias), expected.view(3, 1, 4, 9))
    assert torch.equal(ops.skinny_linear(x[0], weight, bias), expected[0])
    apart = torch.full((12, 80), torch.nan)
    apart[:, ::2] = x
    wide = torch.full((9, 50), torch.nan)
    wide[:, 3:43] = weight
    assert torch.equal(ops.skinny_linear(apart[:, ::2], wide[:, 3:43], bias.repeat(2, 1).t()[:, 1]), expected)
    assert torch.equal(ops.skinny_linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads(dtype):
    operands = make_operands(70, 1500, 333, dtype)
    together = ops.skinny_linear(**operands)
    x = operands.pop("x")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (slice(0, 1), slice(5, 7), slice(60, 63), slice(1, 66), slice(None)):
                assert torch.equal(ops.skinny_linear(x[rows], **operands), together[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_row_and_column(value):
    operands = make_operands(9, 100, 30)
    operands["x"][4, 99], operands["weight"][7, 50] = value, value
    assert_close("y", ops.skinny_linear(**operands), F.linear(**operands), truth(operands))


def test_nothing_is_read_behind_the_end():
    """Operands that end where poison begins."""
    for tokens, num_in, num_out in SIZES.values():
        operands = make_operands(tokens, num_in, num_out)
        for name, tensor in operands.items():
            memory = torch.full((tensor.numel() + 64,), torch.nan)
            memory[: tensor.numel()] = tensor.flatten()
            operands[name] = memory[: tensor.numel()].view(tensor.shape)
        assert ops.skinny_linear(**operands).isfinite().all()


def test_opcheck():
    operands = make_operands(3, 7, 5)
    torch.library.opcheck(torch.ops.mote_ext.skinny_linear.default, tuple(operands.values()))
    torch.library.opcheck(torch.ops.mote_ext.skinny_linear.default, (operands["x"].view(3, 1, 7), operands["weight"]))


REFUSED = {
    "x in float64": (lambda o: {"x": o["x"].double()}, TypeError, "x must be float32, float16 or bfloat16"),
    "a weight of another dtype": (lambda o: {"weight": o["weight"].half()}, TypeError, "weight must be Float like x"),
    "a bias of another dtype": (lambda o: {"bias": o["bias"].half()}, TypeError, "bias must be Float like x"),
    "another K": (lambda o: {"x": o["x"][:, :6]}, ValueError, r"x \[..., K\] and weight \[N, K\]"),
    "no K": (lambda o: {"x": o["x"][:, :0], "weight": o["weight"][:, :0]}, ValueError, "K >= 1"),
    "a number": (lambda o: {"x": torch.tensor(1.0)}, ValueError, r"x \[..., K\]"),
    "a weight of three dimensions": (lambda o: {"weight": o["weight"][None]}, ValueError, r"weight \[N, K\]"),
    "a bias of another size": (lambda o: {"bias": o["bias"][:4]}, ValueError, r"bias must be \[N\] = 5"),
    "a weight elsewhere": (lambda o: {"weight": o["weight"].to("meta")}, ValueError, "weight must be on cpu like x"),
    "a bias elsewhere": (lambda o: {"bias": o["bias"].to("meta")}, ValueError, "bias must be on cpu like x"),
    "x that is differentiated": (lambda o: {"x": o["x"].requires_grad_()}, RuntimeError, "has no gradient"),
    "a weight that is": (lambda o: {"weight": o["weight"].requires_grad_()}, RuntimeError, "has no gradient"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_named(change, error, message):
    operands = make_operands(3, 7, 5)
    with pytest.raises(error, match=f"skinny_linear.*{message}"):
        ops.skinny_linear(**{**operands, **change(operands)})


# ---- models


@pytest.fixture
def rows(monkeypatch):
    """How many rows each product had that came to the op."""
    seen, own = [], ops.skinny_linear

    def watched(x, weight, bias=None):
        seen.append(x.numel() // x.shape[-1])
        return own(x, weight, bias)

    monkeypatch.setattr(ops, "skinny_linear", watched)
    return seen


def logits(model, ids, stage=None):
    stages = {} if stage is None else {"stage_ids": torch.full_like(ids, stage)}
    with torch.no_grad():
        return model(input_ids=ids, **stages).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # without biases, and with
def test_a_model_computes_the_same_within_rounding(architecture, dtype, rows):
    ids = torch.arange(10, 40).view(2, 15)
    model, own = models.make_model(architecture).to(dtype), models.make_model(architecture).double()
    plain, exact = logits(model, ids, stage=1), logits(own, ids, stage=1)
    with mote_ext.skinny_linears(model):
        got = logits(model, ids, stage=1)
    num_linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert rows == [30] * num_linears
    assert_close("logits", got, plain, exact)
    assert torch.equal(logits(model, ids, stage=1), plain) and len(rows) == num_linears


def test_afterwards_all_is_as_before_even_after_an_error():
    model = models.make_base("llama")
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), mote_ext.skinny_linears(model):
        assert "forward" in model.lm_head.__dict__
        raise ZeroDivisionError
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_switching_on_twice_and_hooks_that_came_later(rows):
    model = models.make_base("llama")
    linears = skinny.SkinnyLinears(model)
    with mote_ext.skinny_linears(model):
        outer = model.lm_head.forward
        with linears.switched_on():
            pass
        assert model.lm_head.forward is outer
    model.lm_head.forward = later = lambda x: x
    with linears.switched_on():
        assert model.lm_head.forward is later
    assert model.lm_head.forward is later


def test_many_rows_gradients_autocast_and_float64_are_torchs(rows):
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(skinny.MOST_ROWS + 1, 6)
    with mote_ext.skinny_linears(model):
        with torch.no_grad():
            assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
            with torch.autocast("cpu", torch.bfloat16):
                assert model(x[:2]).dtype == torch.bfloat16
        model(x[:2]).sum().backward()
        assert model[0].weight.grad is not None
    model.double()
    with mote_ext.skinny_linears(model), torch.no_grad():
        model(x[:2].double())
    assert rows == []


def test_layers_of_another_kind_are_left_alone(rows):
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    model = nn.Sequential(Halved(6, 6), nn.Linear(6, 6))
    own = model[1].forward
    model[1].forward = lambda x: own(x) * 3  # as accelerate's hooks do
    x = torch.randn(2, 6)
    with torch.no_grad():
        expected = model(x)
        with mote_ext.skinny_linears(model):
            assert torch.equal(model(x), expected) and rows == []


def pruned(layer):
    prune.l1_unstructured(layer, "bias", 0.5)


def sparse(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)


CHANGES = {"pruned": pruned, "sparse": sparse, "cast": lambda layer: layer.double(), "as it was": lambda layer: None}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_change_after_they_were_looked_at(change, rows):
    model = nn.Sequential(nn.Linear(6, 4))
    linears = skinny.SkinnyLinears(model)
    change(model[0])
    x = torch.randn(2, 6).to(next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model(x)
        for switched in (linears.switched_on(), mote_ext.skinny_linears(model)):
            with switched:
                torch.testing.assert_close(model(x), expected)
    assert len(rows) == (2 if change is CHANGES["as it was"] else 0)


def test_an_engine_whose_model_is_quantised_later():
    quantization = pytest.importorskip("torchao.quantization")
    model = models.make_model("llama")
    engine = mote_ext.MoTEEngine(model, num_pages=64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    (output,) = engine.generate([list(range(10, 20))], mote_ext.SamplingParams(path=None, max_new_tokens=4))
    assert (output.status, len(output.generated_tokens)) == ("finished", 4), output.error


def test_a_forward_that_was_set_inside_stays():
    model = nn.Sequential(nn.Linear(6, 4))
    with mote_ext.skinny_linears(model):
        model[0].forward = later = lambda x: x
    assert model[0].forward is later


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_no_tangent_is_dropped(name):
    operands = make_operands(3, 7, 5)
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="skinny_linear has no forward-mode gradient"):
        operands[name] = fwAD.make_dual(operands[name], torch.ones_like(operands[name]))
        ops.skinny_linear(**operands)


def test_a_mote_layer_calls_a_base_whose_forward_was_replaced():
    """Offloading replaces it to fetch the weight first; the fused op would not."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer = mote_ext.MoTELinear(nn.Linear(6, 4), 2, r=2)
    nn.init.normal_(layer.lora_B)
    x, ids = torch.randn(3, 6), torch.tensor([0, 1, -1])
    with torch.no_grad():
        expected = layer(x, ids)
        hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
        assert layer.base_layer.weight.device.type == "meta"
        assert_close("y", layer(x, ids), expected, expected.double())


def test_a_compiled_mote_layer_notices_a_forward_that_was_replaced_later():
    layer = mote_ext.MoTELinear(nn.Linear(6, 4), 2, r=2)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, ids = torch.randn(3, 6), torch.tensor([0, 1, -1])
    with torch.no_grad():
        before, own = compiled(x, ids), layer.base_layer.forward
        layer.base_layer.forward = lambda given: own(given) + 100
        assert_close("y", compiled(x, ids), before + 100, before.double() + 100)


def test_generate_inside_is_generate(rows):
    model = models.make_model("llama")
    ids = torch.arange(10, 30).view(2, 10)
    options = {"do_sample": False, "path": None, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with mote_ext.skinny_linears(model):
        assert torch.equal(model.generate(ids, **options), expected)
    assert 2 in rows and 20 in rows


def test_the_engine_computes_few_rows_by_it(rows):
    model = models.make_model("llama")
    engine = mote_ext.MoTEEngine(model, num_pages=64)
    engine.generate([list(range(10, 20))] * 2, mote_ext.SamplingParams(path=None, max_new_tokens=4))
    assert 2 in rows
    assert all("forward" not in module.__dict__ for module in model.modules())
