"""Nothing leaks: an Inf or NaN stays with its token and its expert, and no output depends on memory nobody wrote."""

import math

import pytest
import torch
from cases import ADAPTERS, DTYPES, PARAMETERS, assert_same_bits, judge, make_case, run

SIZES = [(20, 1030, 24, 8, 3), (133, 72, 80, 16, 3), (40, 33, 17, 5, 3)]  # split K; tiles of 64; nothing aligned


def delta_case(sizes, dtype, backend, workload="packed"):
    return make_case(*sizes, dtype=dtype, workload=workload).to(backend.device)


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_expert_without_tokens_touches_nothing(backend, sizes, dtype, value):
    case = delta_case(sizes, dtype, backend, "empty_stage")
    expected = run(backend, case)
    case.lora_A[0] = case.lora_B[0] = value
    case.scales[0] = value
    got = run(backend, case)
    assert_same_bits(got, expected)
    assert got["grad lora_A"][0].count_nonzero() == 0 and got["grad lora_B"][0].count_nonzero() == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["x", "grad_y"])
def test_a_token_touches_its_own_row_and_its_own_experts(backend, name, sizes, dtype, value):
    """The token is of stage 1, between tokens of other stages; without a shared expert, stages 0 and 2 never see it."""
    num_tokens = sizes[0]
    case = make_case(*sizes, False, dtype=dtype, workload="alternating").to(backend.device)
    expected = run(backend, case, "lora_delta")
    getattr(case, name)[13] = value
    assert case.stage_ids[13] == 1
    got = judge(backend, case, "lora_delta")
    others = [t for t in range(num_tokens) if t != 13]
    for output, rows in (("y", others), ("grad x", others), ("grad lora_A", [0, 2]), ("grad lora_B", [0, 2])):
        assert torch.equal(got[output][rows], expected[output][rows]), output
    # Nobody may swallow it either.
    assert not got["y" if name == "x" else "grad x"][13].isfinite().any()
    assert not got["grad lora_A"][1].isfinite().any()


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_expert_touches_its_own_tokens_only(backend, name, sizes, dtype, value):
    case = make_case(*sizes, dtype=dtype, workload="random").to(backend.device)
    expected = run(backend, case, "lora_delta")
    getattr(case, name)[1] = value
    got = judge(backend, case, "lora_delta")
    others = case.stage_ids != 1
    assert torch.equal(got["y"][others], expected["y"][others])
    assert torch.equal(got["grad x"][others], expected["grad x"][others])
    assert not got["y"][~others].isfinite().any()
    for output in ("grad lora_A", "grad lora_B"):
        assert torch.equal(got[output][[0, 2, 3]], expected[output][[0, 2, 3]]), output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padding_with_garbage_adds_to_no_expert(backend, sizes, dtype):
    """A padded token is BASE_ONLY, its gradient zero, its x whatever the memory held."""
    case = delta_case(sizes, dtype, backend)
    padding = torch.arange(sizes[0], device=backend.device) % 3 == 1
    case.stage_ids[padding] = -2
    case.grad_y[padding] = 0
    case.x[padding] = 1
    expected = run(backend, case, "lora_delta")
    case.x[padding] = math.nan
    assert_same_bits(run(backend, case, "lora_delta"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shared_half_does_not_see_the_stage_half(backend, dtype):
    """An infinite stage expert must leave the gradients of the shared one, which runs over the same rows, finite."""
    case = delta_case((133, 72, 80, 16, 3), dtype, backend)
    expected = run(backend, case, "lora_delta")
    case.lora_A[0] = math.inf
    got = judge(backend, case, "lora_delta")
    for output in ("grad lora_A", "grad lora_B"):
        assert torch.equal(got[output][1:], expected[output][1:]), output


@pytest.mark.parametrize("masters", [False, True], ids=["same_dtype", "masters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (0, 24, 16, 8, 2), (300, 40, 24, 8, 5)], ids=str)
def test_outputs_are_written_whole(backend, sizes, dtype, masters, poisoned_memory):
    assert torch.empty(3, device=backend.device).isnan().all(), "nothing is poisoned"
    case = make_case(*sizes, dtype=dtype, masters=masters, workload="packed").to(backend.device)
    poisoned = run(backend, case)
    assert all(tensor.isfinite().all() for tensor in poisoned.values())
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert_same_bits(run(backend, case), poisoned)


def test_results_do_not_share_memory_with_arguments(backend):
    """A later change of an argument must not reach a result, nor the other way round."""
    case = make_case(20, 24, 24, 8, 2, workload="all_base").to(backend.device)
    got = run(backend, case)
    storages = {getattr(case, name).untyped_storage().data_ptr() for name in (*PARAMETERS, "grad_y", "stage_ids")}
    for name, tensor in got.items():
        if name != "grad bias":  # torch's own sum
            assert tensor.untyped_storage().data_ptr() not in storages, name
    before = {name: tensor.clone() for name, tensor in got.items()}
    again = run(backend, case)
    assert_same_bits(again, before)


def test_arguments_are_left_as_they_were(backend):
    case = make_case(40, 24, 24, 8, 2, layout="gapped", grad_layout="odd").to(backend.device)
    before = case.map(torch.clone)
    run(backend, case)
    run(backend, case, "lora_delta", ADAPTERS)
    for name in (*PARAMETERS, "stage_ids", "scales", "grad_y"):
        assert torch.equal(getattr(case, name), getattr(before, name)), name
