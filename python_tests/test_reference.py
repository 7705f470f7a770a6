"""The truth itself, against a loop over tokens that knows nothing of experts' rows, and against autograd's checks."""

import math

import pytest
import torch
from cases import ADAPTERS, DTYPES, ID_DTYPES, PARAMETERS, WORKLOADS, assert_same_bits, integer_case, make_case, run

from mote_ext import reference


def experts_of(stage_id, num_experts, shared):
    """The sentence of the contract, word by word."""
    num_stages = num_experts - shared
    experts = [stage_id] if 0 <= stage_id < num_stages else []
    if shared and stage_id >= -1:
        experts.append(num_experts - 1)
    return experts


def one_token_at_a_time(case):
    """float64; y and, from the products written out, the gradients."""
    x, weight, lora_A, lora_B, grad_y = (
        t.double() for t in (case.x, case.weight, case.lora_A, case.lora_B, case.grad_y)
    )
    bias = case.bias.double()
    y = torch.zeros_like(grad_y)
    grads = {name: torch.zeros_like(getattr(case, name), dtype=torch.float64) for name in PARAMETERS}
    for t in range(len(x)):
        y[t] = weight @ x[t] + bias
        grads["x"][t] = weight.T @ grad_y[t]
        grads["weight"] += torch.outer(grad_y[t], x[t])
        grads["bias"] += grad_y[t]
        for e in experts_of(case.stage_ids[t].item(), len(lora_A), case.shared):
            scale = case.scales[e].double()
            z = scale * (lora_A[e] @ x[t])
            dz = scale * (lora_B[e].T @ grad_y[t])
            y[t] += lora_B[e] @ z
            grads["x"][t] += lora_A[e].T @ dz
            grads["lora_A"][e] += torch.outer(dz, x[t])
            grads["lora_B"][e] += torch.outer(grad_y[t], z)
    return {"y": y} | {f"grad {name}": grad for name, grad in grads.items()}


@pytest.mark.parametrize("num_stages, shared", [(0, True), (0, False), (1, True), (3, True), (3, False)])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_equals_a_loop_over_tokens_exactly(workload, num_stages, shared):
    case = integer_case(29, 12, 10, 5, num_stages, shared, dtype=torch.float64, workload=workload)
    got, expected = run(reference, case), one_token_at_a_time(case)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_dtypes_lose_nothing_on_integers(dtype):
    case = integer_case(29, 12, 10, 5, 3, dtype=dtype)
    got, expected = run(reference, case), one_token_at_a_time(case)
    for name in expected:
        assert got[name].dtype == dtype
        assert torch.equal(got[name].double(), expected[name]), name


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck_and_gradgradcheck(shared):
    case = make_case(7, 5, 4, 2, 2, shared, dtype=torch.float64, workload="packed")
    leaves = [getattr(case, name).detach().requires_grad_() for name in PARAMETERS]

    def call(x, weight, bias, lora_A, lora_B):
        return reference.mote_linear(x, weight, bias, lora_A, lora_B, case.stage_ids, case.scales, shared=shared)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_delta_is_the_difference_to_the_base():
    case = integer_case(20, 8, 6, 4, 2, dtype=torch.float64)
    base = torch.nn.functional.linear(case.x, case.weight, case.bias)
    delta = reference.lora_delta(*case.arguments("lora_delta"))
    assert torch.equal(reference.mote_linear(*case.arguments()), base + delta)
    assert torch.equal(delta[case.stage_ids == -2], torch.zeros(int((case.stage_ids == -2).sum()), 6).double())


@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_every_integer_dtype_of_ids(dtype):
    case = make_case(20, 8, 6, 4, 3, workload="alternating")
    expected = run(reference, case)
    assert_same_bits(run(reference, case.but(stage_ids=case.stage_ids.to(dtype))), expected)


@pytest.mark.parametrize(
    "ids, value, position",
    [
        (torch.tensor([0, 1, 2, 0]), "2", "[2]"),
        (torch.tensor([0, -3, 1, 0]), "-3", "[1]"),
        (torch.tensor([0, 1, 0, 2**32]), "4294967296", "[3]"),
        (torch.tensor([0, 255, 0, 0], dtype=torch.uint8), "255", "[1]"),
        (torch.tensor([0, 0, 0, -128], dtype=torch.int8), "-128", "[3]"),
        (torch.tensor([0, 0, 2**64 - 1, 0], dtype=torch.uint64), "18446744073709551615", "[2]"),
    ],
)
def test_an_illegal_id_is_named_with_its_position(ids, value, position):
    case = make_case(4, 8, 6, 4, 2)
    with pytest.raises(ValueError, match="^lora_delta: stage_ids") as error:
        reference.lora_delta(case.x, case.lora_A, case.lora_B, ids, case.scales)
    assert f"got {value} at position {position}" in str(error.value)


def test_ids_of_another_shape_or_kind_are_refused():
    case = make_case(4, 8, 6, 4, 2)
    for ids, exception in (
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError),
        (torch.zeros(4), TypeError),
        (torch.zeros(4, dtype=torch.bool), TypeError),
    ):
        with pytest.raises(exception, match="^mote_linear: stage_ids must be"):
            reference.mote_linear(case.x, case.weight, case.bias, case.lora_A, case.lora_B, ids, case.scales)


def test_a_shared_expert_must_exist():
    case = make_case(4, 8, 6, 4, 0, shared=False)
    assert reference.lora_delta(*case.arguments("lora_delta"), shared=False).count_nonzero() == 0
    with pytest.raises(ValueError, match="shared"):
        reference.lora_delta(*case.arguments("lora_delta"), shared=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_are_rounded_for_the_values_and_not_for_their_gradients(dtype):
    case = make_case(40, 16, 12, 4, 2, dtype=dtype, masters=True, workload="packed")
    rounded = case.but(lora_A=case.lora_A.to(dtype), lora_B=case.lora_B.to(dtype))
    got, expected = run(reference, case), run(reference, rounded)
    assert_same_bits({"y": got["y"], "grad x": got["grad x"]}, {"y": expected["y"], "grad x": expected["grad x"]})
    for name in ("grad lora_A", "grad lora_B"):
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name].to(dtype), expected[name])
        assert not torch.equal(got[name], expected[name].float())


def test_autocast_casts_all_but_the_scales():
    case = make_case(40, 16, 12, 4, 2, masters=True)
    by_hand = case.but(x=case.x.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())
    expected = reference.mote_linear(*by_hand.arguments())
    with torch.autocast("cpu", torch.bfloat16):
        got = reference.mote_linear(*case.arguments())
        assert reference.lora_delta(*case.arguments("lora_delta")).dtype == torch.bfloat16
        assert reference.mote_linear(*case.in_float64().arguments()).dtype == torch.float64
    assert_same_bits({"y": got}, {"y": expected})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_expert_without_tokens_touches_nothing(value):
    case = make_case(30, 8, 6, 4, 3, workload="empty_stage")
    expected = run(reference, case, "lora_delta", ADAPTERS)
    case.lora_A[0] = case.lora_B[0] = case.scales[0] = value
    assert_same_bits(run(reference, case, "lora_delta", ADAPTERS), expected)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_token_touches_only_its_own_row_and_its_own_experts(value):
    case = make_case(12, 8, 6, 4, 3, shared=False, workload="alternating")
    expected = run(reference, case, "lora_delta", ADAPTERS)
    case.x[4] = value  # a token of stage 1
    got = run(reference, case, "lora_delta", ADAPTERS)
    others = torch.arange(12) != 4
    for name, rows in (("y", others), ("grad x", others), ("grad lora_A", [0, 2]), ("grad lora_B", [0, 2])):
        assert torch.equal(got[name][rows], expected[name][rows]), name
    assert not got["grad lora_A"][1].isfinite().any()
