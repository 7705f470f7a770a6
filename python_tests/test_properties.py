"""Identities the op must satisfy whatever the implementation: equivalences, determinism, gradients only where asked."""

from itertools import chain, combinations

import pytest
import torch
from cases import (
    DTYPES,
    PARAMETERS,
    WORKLOADS,
    assert_same_bits,
    bits,
    integer_case,
    judge,
    judge_exactly,
    make_case,
    run,
)
from closeness import GRADIENT, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mote_ext import reference

# ---- equivalences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 200, 600])
def test_zero_B_is_the_base_bit_for_bit(cpu, num_tokens, dtype, bias):
    case = make_case(num_tokens, 96, 130, 8, 3, dtype=dtype, bias=bias)
    case.lora_B.zero_()
    got = run(cpu, case, wanted=["x", "weight", "bias"])

    x, weight = (t.detach().requires_grad_() for t in (case.x, case.weight))
    base = torch.nn.functional.linear(x, weight, case.bias)
    assert torch.equal(got["y"], base)
    if not bias:
        assert torch.equal(bits(got["y"]), bits(base.detach())), "the sign of a zero differs"
    grad_x, grad_weight = torch.autograd.grad(base, (x, weight), case.grad_y)
    assert torch.equal(got["grad x"], grad_x)
    assert torch.equal(got["grad weight"], grad_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_B_is_the_base(backend, dtype):
    case = make_case(70, 96, 72, 8, 3, dtype=dtype).to(backend.device)
    case.lora_B.zero_()
    judge(backend, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workload", ["all_base", "all_shared"])
def test_without_stages_in_use_the_stage_experts_do_not_matter(backend, workload, dtype):
    case = make_case(70, 40, 48, 8, 3, dtype=dtype, workload=workload).to(backend.device)
    expected = run(backend, case)
    other = case.map(torch.clone)
    other.lora_A[:3], other.lora_B[:3], other.scales[:3] = 7, -7, 7
    got = run(backend, other)
    assert_same_bits({"y": got["y"], "grad x": got["grad x"]}, {"y": expected["y"], "grad x": expected["grad x"]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_experts_are_plain_lora_of_the_summed_weight(backend, dtype):
    """All stage experts equal, every token in a stage: y = x (W + (s_stage + s_shared) · B A)ᵀ + bias."""
    case = make_case(70, 72, 48, 8, 4, dtype=dtype, workload="alternating").to(backend.device)
    case.lora_A[:], case.lora_B[:] = case.lora_A[0].clone(), case.lora_B[0].clone()
    case.scales[:] = 0.75
    wide = case.in_float64()
    summed = wide.weight + 1.5 * wide.lora_B[0] @ wide.lora_A[0]
    truth = torch.nn.functional.linear(wide.x, summed, wide.bias)
    assert_close("y", run(backend, case)["y"], run(reference, case)["y"], truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workload", ["one_stage", "packed", "random"])
def test_chunked_equals_unchunked(backend, workload, dtype):
    """Prefill in pieces: the rows of y do not know how many came with them."""
    case = make_case(133, 72, 48, 8, 3, dtype=dtype, workload=workload).to(backend.device)
    pieces = [slice(0, 1), slice(1, 17), slice(17, 90), slice(90, 133)]
    chunks = [
        run(backend, case.but(x=case.x[at], stage_ids=case.stage_ids[at], grad_y=case.grad_y[at])) for at in pieces
    ]
    plain, truth = run(reference, case), run(reference, case.in_float64())
    for name, factor in (("y", 2), ("grad x", GRADIENT)):
        assert_close(name, torch.cat([chunk[name] for chunk in chunks]), plain[name], truth[name], factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_tokens_does_not_matter(backend, dtype):
    case = make_case(133, 72, 48, 8, 3, dtype=dtype, workload="packed").to(backend.device)
    order = torch.randperm(133, generator=torch.Generator().manual_seed(0)).to(backend.device)
    shuffled = case.but(x=case.x[order], stage_ids=case.stage_ids[order], grad_y=case.grad_y[order])
    got, plain, truth = run(backend, shuffled), run(reference, case), run(reference, case.in_float64())
    for name in got:
        back = order.argsort() if name in ("y", "grad x") else slice(None)
        factor = 2 if name == "y" else GRADIENT
        assert_close(name, got[name][back], plain[name], truth[name], factor=factor)


def test_a_mixed_batch_equals_its_stages_one_by_one(backend):
    case = integer_case(90, 40, 24, 8, 3).to(backend.device)
    mixed = run(backend, case, "lora_delta")
    for stage in (-2, -1, 0, 1, 2):
        rows = case.stage_ids == stage
        alone = run(
            backend,
            case.but(x=case.x[rows], stage_ids=case.stage_ids[rows], grad_y=case.grad_y[rows]),
            "lora_delta",
        )
        assert torch.equal(alone["y"], mixed["y"][rows]), stage
        assert torch.equal(alone["grad x"], mixed["grad x"][rows]), stage
        if stage >= 0:
            assert torch.equal(alone["grad lora_A"][stage], mixed["grad lora_A"][stage]), stage
            assert torch.equal(alone["grad lora_B"][stage], mixed["grad lora_B"][stage]), stage


def test_linear_in_the_scale(backend):
    """A scale is a plain factor: powers of two change exponents only."""
    case = make_case(70, 40, 24, 8, 3).to(backend.device)
    got = run(backend, case.but(scales=case.scales * 4), "lora_delta")
    expected = run(backend, case, "lora_delta")
    assert_same_bits(got, {name: tensor * 4 for name, tensor in expected.items()})


# ---- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_same_input_gives_the_same_bits(backend, workload, dtype):
    case = make_case(133, 72, 48, 8, 3, dtype=dtype, workload=workload).to(backend.device)
    first = run(backend, case)
    assert_same_bits(run(backend, case), first)
    moved = case.map(lambda t: t.clone())  # other addresses, the same alignment
    assert_same_bits(run(backend, moved), first)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("workload", ["one_stage", "runs", "random", "packed"])
def test_the_number_of_threads_does_not_matter(cpu, num_threads, workload, dtype):
    case = make_case(1025, 200, 136, 16, 3, dtype=dtype, workload=workload)
    num_threads(1)
    one = run(cpu, case, "lora_delta")
    num_threads(2)
    assert_same_bits(run(cpu, case, "lora_delta"), one)
    num_threads(3)
    assert_same_bits(run(cpu, case, "lora_delta"), one)


# ---- gradients only where asked -------------------------------------------------------------------------------------


def subsets(names):
    return chain.from_iterable(combinations(names, count) for count in range(len(names) + 1))


@pytest.mark.parametrize("wanted", list(subsets(PARAMETERS)), ids=lambda names: "+".join(names) or "none")
def test_each_subset_of_gradients(backend, wanted):
    case = make_case(70, 40, 24, 8, 2, dtype=torch.bfloat16).to(backend.device)
    everything = run(backend, case)
    leaves = {name: getattr(case, name).detach().requires_grad_(name in wanted) for name in PARAMETERS}
    y = backend.mote_linear(*case.but(**leaves).arguments())
    assert y.requires_grad == bool(wanted)
    assert torch.equal(y, everything["y"])
    if wanted:
        y.backward(case.grad_y)
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, everything[f"grad {name}"]), name
            assert leaf.grad.dtype == leaf.dtype
        else:
            assert leaf.grad is None, name


def test_no_grad_and_inference_mode_give_the_same_values(backend):
    case = make_case(70, 40, 24, 8, 2, dtype=torch.bfloat16).to(backend.device)
    leaves = case.map(lambda t: t.detach().requires_grad_(t.is_floating_point() and t is not case.scales))
    expected = backend.mote_linear(*leaves.arguments())
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            y = backend.mote_linear(*leaves.arguments())
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_gradients_accumulate_over_two_backwards(backend):
    case = integer_case(40, 24, 16, 8, 2).to(backend.device)
    once = run(backend, case)
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in PARAMETERS}
    for _ in range(2):
        backend.mote_linear(*case.but(**leaves).arguments()).backward(case.grad_y)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[f"grad {name}"]), name


def test_two_forwards_before_one_backward(backend):
    """Each graph keeps its own z and ids: reuse of a buffer between calls would show."""
    case = integer_case(40, 24, 16, 8, 2).to(backend.device)
    other = case.but(stage_ids=case.stage_ids.flip(0), x=case.x.flip(0))
    first, second = run(backend, case, "lora_delta"), run(backend, other, "lora_delta")
    lora_A, lora_B = (t.detach().requires_grad_() for t in (case.lora_A, case.lora_B))
    outputs = [backend.lora_delta(*c.but(lora_A=lora_A, lora_B=lora_B).arguments("lora_delta")) for c in (case, other)]
    grads = torch.autograd.grad(outputs, (lora_A, lora_B), [case.grad_y, case.grad_y])
    for name, grad in zip(("grad lora_A", "grad lora_B"), grads, strict=True):
        assert torch.equal(grad, first[name] + second[name]), name


def test_an_expanded_gradient(backend):
    """y.sum().backward() hands down one number with strides of zero."""
    case = integer_case(70, 24, 16, 8, 2).to(backend.device)
    ones = run(backend, case.but(grad_y=torch.ones_like(case.grad_y)))
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in PARAMETERS}
    backend.mote_linear(*case.but(**leaves).arguments()).sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, ones[f"grad {name}"]), name


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "stage_ids", "scales"])
def test_a_change_between_forward_and_backward_is_never_silently_used(backend, name):
    """Either the backward refuses, or it is that of the forward."""
    case = integer_case(40, 24, 16, 8, 2, workload="alternating").to(backend.device)
    expected = run(backend, case, "lora_delta")
    leaves = {n: getattr(case, n).detach().clone().requires_grad_() for n in ("x", "lora_A", "lora_B")}
    changed = case.but(**leaves, stage_ids=case.stage_ids.clone(), scales=case.scales.clone())
    y = backend.lora_delta(*changed.arguments("lora_delta"))
    with torch.no_grad():
        getattr(changed, name).fill_(1)
    try:
        grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for parameter, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, expected[f"grad {parameter}"]), f"grad {parameter} is of the changed {name}"


# ---- anything at all ------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    shared = draw(st.booleans())
    num_stages = draw(st.one_of(st.integers(0, 6), st.sampled_from([31, 32, 33, 63, 64])))
    num_tokens = draw(st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 129])))
    case = integer_case(
        num_tokens,
        draw(st.integers(1, 80)),
        draw(st.integers(1, 80)),
        draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 128, 129]))),
        num_stages,
        shared,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()),
    )
    # Ids drawn one by one, so that a failure shrinks to the tokens that matter.
    ids = draw(st.lists(st.integers(-2, num_stages - 1), min_size=num_tokens, max_size=num_tokens))
    return case.but(stage_ids=torch.tensor(ids, dtype=torch.int32))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(case=problems())
def test_any_problem_of_integers_is_exact(backend, case):
    judge_exactly(backend, case.to(backend.device))
