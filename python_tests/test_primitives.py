"""The torch ops below the public functions: shrink, expand, wgrad, the addition in place, the narrowing of ids."""

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, WORKLOADS, assert_same_bits, guarded, in_layout, make_case
from closeness import GRADIENT, assert_close

from mote_ext import reference

SIZES = [
    (0, 24, 16, 8, 2, True),
    (1, 1100, 40, 16, 2, True),
    (16, 72, 64, 5, 3, True),
    (17, 64, 24, 24, 2, False),
    (65, 129, 40, 16, 2, True),
    (133, 40, 136, 40, 3, True),
    (30, 16, 16, 8, 0, True),
]


def rows_of_half(ids, num_experts, shared):
    """(expert, half, its tokens) for each expert: half 0 belongs to the stage experts, half 1 to the shared one."""
    num_stages = num_experts - shared
    for expert in range(num_stages):
        yield expert, 0, (ids == expert).nonzero().squeeze(1)
    if shared:
        yield num_stages, 1, (ids >= -1).nonzero().squeeze(1)


def wide_dtype(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def shrink(x, lora_A, ids, scales, shared):
    """z in plain PyTorch, rounded to x's dtype."""
    num_experts, rank, _ = lora_A.shape
    z = x.new_zeros(len(ids), (1 + shared) * rank)
    for expert, half, rows in rows_of_half(ids, num_experts, shared):
        wide = x[rows].to(wide_dtype(x)) @ lora_A[expert].to(wide_dtype(x)).mT * scales[expert].to(wide_dtype(x))
        z[rows, half * rank : (half + 1) * rank] = wide.to(x.dtype)
    return z


def expand(z, lora_B, ids, shared, bias=None, addend=None):
    num_experts, num_out, rank = lora_B.shape
    y = z.new_zeros(len(ids), num_out, dtype=wide_dtype(z))
    for expert, half, rows in rows_of_half(ids, num_experts, shared):
        y[rows] += z[rows, half * rank : (half + 1) * rank].to(y.dtype) @ lora_B[expert].to(y.dtype).mT
    for part in (bias, addend):
        y = y if part is None else y + part.to(y.dtype)
    return y.to(z.dtype)


def wgrad(narrow, wide, ids, num_stages, shared, transposed, dtype):
    rank, high = narrow.shape[1] // (1 + shared), wide_dtype(narrow)
    num_experts = num_stages + shared
    grad = narrow.new_zeros(num_experts, rank, wide.shape[1], dtype=high)
    for expert, half, rows in rows_of_half(ids, num_experts, shared):
        grad[expert] = narrow[rows, half * rank : (half + 1) * rank].to(high).mT @ wide[rows].to(high)
    return (grad.mT if transposed else grad).to(dtype)


def widened(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def z_of(case):
    """A z that is exactly zero in the half of an inactive expert, as shrink leaves it; in guarded memory."""
    return guarded(shrink(case.x.reshape(-1, case.x.shape[-1]), case.lora_A, case.stage_ids, case.scales, case.shared))


def sizes_id(sizes):
    return "-".join(str(part) for part in sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=sizes_id)
def test_shrink(backend, sizes, dtype):
    case = make_case(*sizes, dtype=dtype).to(backend.device)
    arguments = (case.x, case.lora_A, case.stage_ids, case.scales, case.shared)
    assert_close("z", backend.ops.lora_shrink(*arguments), shrink(*arguments), shrink(*widened(*arguments)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_half_of_an_inactive_expert_is_zero(backend, workload, dtype):
    case = make_case(70, 40, 24, 8, 3, dtype=dtype, workload=workload).to(backend.device)
    z = backend.ops.lora_shrink(case.x, case.lora_A, case.stage_ids, case.scales, True)
    assert z.shape == (70, 16) and z.dtype == dtype
    assert z[case.stage_ids < 0, :8].count_nonzero() == 0
    assert z[case.stage_ids == -2].count_nonzero() == 0
    assert z[case.stage_ids >= 0, :8].count_nonzero() == (case.stage_ids >= 0).sum() * 8
    assert z[case.stage_ids >= -1, 8:].count_nonzero() == (case.stage_ids >= -1).sum() * 8


@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=sizes_id)
def test_expand(backend, sizes, dtype, with_bias, with_addend):
    case = make_case(*sizes, dtype=dtype, grad_layout="gapped")
    z = z_of(case).to(backend.device)
    case = case.to(backend.device)
    bias = case.bias if with_bias else None
    addend = case.grad_y if with_addend else None  # any [T, N] will do; this one has a gap of NaN between its rows
    arguments = (z, case.lora_B, case.stage_ids, case.shared, bias, addend)
    assert_close("y", backend.ops.lora_expand(*arguments), expand(*arguments), expand(*widened(*arguments)))


@pytest.mark.parametrize("num_out", [3848, 3850])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_of_so_many_columns_that_a_block_takes_several_steps(backend, dtype, num_out):
    case = make_case(513, 8, num_out, 8, 2, dtype=dtype, workload="packed")
    z = z_of(case).to(backend.device)
    case = case.to(backend.device)
    arguments = (z, case.lora_B, case.stage_ids, True, case.bias, None)
    assert_close("y", backend.ops.lora_expand(*arguments), expand(*arguments), expand(*widened(*arguments)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expand_with_an_addend_of_any_strides(backend, layout):
    case = make_case(40, 24, 72, 8, 2, dtype=torch.bfloat16, grad_layout=layout)
    z, addend = z_of(case).to(backend.device), case.grad_y.to(backend.device)
    z = z.reshape(*addend.shape[:-1], -1)
    case = case.to(backend.device)
    ids = case.stage_ids.reshape(addend.shape[:-1])
    got = backend.ops.lora_expand(z, case.lora_B, ids, True, None, addend)
    flat = (z.reshape(40, -1), case.lora_B, case.stage_ids, True, None, addend.reshape(40, -1))
    assert_close("y", got.reshape(40, -1), expand(*flat), expand(*widened(*flat)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (300, 24, 20, 8, 5, True), (300, 24, 20, 8, 5, False)], ids=sizes_id)
def test_wgrad(backend, sizes, dtype, transposed):
    num_stages, shared = sizes[4], sizes[5]
    case = make_case(*sizes, dtype=dtype, workload="packed")
    narrow = z_of(case).to(backend.device)
    case = case.to(backend.device)
    arguments = (narrow, case.grad_y, case.stage_ids, num_stages, shared, transposed)
    truth = wgrad(*widened(*arguments), torch.float64)
    for grad_dtype in {dtype, torch.float32}:
        got = backend.ops.lora_wgrad(*arguments, grad_dtype)
        assert got.is_contiguous()
        assert_close("grad", got, wgrad(*arguments, grad_dtype), truth, factor=GRADIENT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgrad_of_any_strides(backend, layout, dtype):
    case = make_case(70, 40, 24, 8, 3, dtype=dtype, workload="alternating")
    narrow, wide = z_of(case).to(backend.device), in_layout(case.x, layout).to(backend.device)
    ids = case.stage_ids.to(backend.device)
    shaped = narrow.reshape(*wide.shape[:-1], -1), wide, ids.reshape(wide.shape[:-1])
    got = backend.ops.lora_wgrad(*shaped, 3, True, False, dtype)
    flat = (narrow, wide.reshape(70, -1), ids, 3, True, False)
    truth = wgrad(*widened(*flat), torch.float64)
    assert_close("grad", got, wgrad(*flat, dtype), truth, factor=GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgrad_of_an_absent_stage_is_written_zeros(backend, dtype, poisoned_memory):
    case = make_case(133, 24, 16, 8, 4, dtype=dtype, workload="empty_stage")
    narrow = z_of(case).to(backend.device)
    case = case.to(backend.device)
    got = backend.ops.lora_wgrad(narrow, case.x, case.stage_ids, 4, True, False, torch.float32)
    assert got[0].equal(torch.zeros_like(got[0]))
    nobody = torch.full_like(case.stage_ids, -2)
    got = backend.ops.lora_wgrad(narrow, case.x, nobody, 4, True, True, torch.float32)
    assert got.equal(torch.zeros_like(got))


# Three of them have so much work that the CPU cuts it for several threads.
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (70, 640, 264, 16, 4, True), (133, 257, 520, 24, 3, False)], ids=sizes_id)
def test_backward_has_the_bits_of_its_parts(backend, sizes, dtype, threads, poisoned_memory):
    """linear_backward is shrink, expand and wgrad twice; whatever is wanted, and however it is cut."""
    shared = sizes[5]
    case = make_case(*sizes, dtype=dtype, masters=True)
    z, ops = z_of(case.but(lora_A=case.lora_A.to(dtype))).to(backend.device), backend.ops
    case = case.to(backend.device)
    tail = case.stage_ids, case.scales, shared
    dz = ops.lora_shrink(case.grad_y, case.lora_B.mT, *tail)
    parts = (
        ops.lora_expand(dz, case.lora_A.mT, case.stage_ids, shared),
        ops.lora_wgrad(dz, case.x, case.stage_ids, sizes[4], shared, False, torch.float32),
        ops.lora_wgrad(z, case.grad_y, case.stage_ids, sizes[4], shared, True, torch.float32),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for wanted in itertools.product([True, False], repeat=3):
            x, its_z = case.x if wanted[1] else None, z if wanted[2] else None
            got = ops.linear_backward(case.grad_y, x, its_z, case.lora_A, case.lora_B, *tail, wanted)
            expected = list(itertools.compress(parts, wanted))
            assert len(got) == len(expected)
            assert_same_bits(dict(enumerate(got)), dict(enumerate(expected)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("y_layout", ["contiguous", "gapped", "odd", "transposed", "batched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_in_place(backend, dtype, y_layout):
    case = make_case(70, 40, 72, 8, 3, dtype=dtype, layout="batched" if y_layout == "batched" else "gapped")
    y = in_layout(case.grad_y.reshape(70, 72), y_layout)
    case, y = case.to(backend.device), y.to(backend.device)
    adapters = (case.lora_A, case.lora_B, case.stage_ids, case.scales)
    before, around = y.clone(), torch.empty(0, dtype=dtype).set_(y.untyped_storage())
    untouched = around.isnan()
    assert backend.ops.lora_add_(y, case.x, *adapters, True) is None
    plain = before + reference.lora_delta(case.x, *adapters)
    wide = case.in_float64()
    truth = before.double() + reference.lora_delta(wide.x, wide.lora_A, wide.lora_B, wide.stage_ids, wide.scales)
    assert_close("y", y, plain, truth)
    assert around.isnan().equal(untouched), "the memory between the rows of y was written"


def test_add_in_place_counts_as_a_change_of_y(backend):
    case = make_case(9, 8, 8, 4, 1).to(backend.device)
    leaf = case.grad_y.detach().requires_grad_()
    y = leaf.exp()  # its backward needs y itself
    with torch.no_grad():
        backend.ops.lora_add_(y, case.x, case.lora_A, case.lora_B, case.stage_ids, case.scales, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_public_addition(shipped):
    """For a base that is not a plain linear: out of place when gradients are wanted, in place when not."""
    from mote_ext import ops

    case = make_case(33, 40, 24, 8, 2, dtype=torch.bfloat16).to(shipped.device)
    base = case.grad_y.detach().clone().requires_grad_()
    before = base.detach().clone()
    arguments = (case.x, case.lora_A, case.lora_B, case.stage_ids, case.scales)
    y = ops.lora_add(base, *arguments)
    assert torch.equal(torch.autograd.grad(y, base, case.grad_y)[0], case.grad_y)
    assert torch.equal(base.detach(), before)
    with torch.no_grad():
        written = before.clone()
        assert ops.lora_add_(written, *arguments) is written
    assert_same_bits({"y": written}, {"y": y.detach()})
    with pytest.raises(ValueError, match=r"^lora_add: .*\[33, 23\]"):
        ops.lora_add(base[:, :23], *arguments)
    with pytest.raises(ValueError, match=r"^lora_add_: .*\[33, 23\]"):
        ops.lora_add_(written[:, :23], *arguments)


def test_linear_gives_z_for_the_backward(backend):
    case = make_case(33, 40, 24, 8, 2, dtype=torch.bfloat16).to(backend.device)
    leaf = case.x.detach().requires_grad_()
    y, z = backend.ops.linear(
        leaf, case.weight, case.bias, None, case.lora_A, case.lora_B, case.stage_ids, case.scales, True
    )
    assert y.requires_grad and not z.requires_grad
    expected = backend.ops.lora_shrink(case.x, case.lora_A, case.stage_ids, case.scales, True)
    assert_same_bits({"z": z}, {"z": expected})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["nothing", "addend", "addend and bias", "addend and weight", "everything"])
def test_linear_of_any_parts(backend, parts, dtype):
    """y = addend + x Wᵀ + bias + delta, each part optional; the gradient of the addend is that of y."""
    case = make_case(33, 40, 24, 8, 2, dtype=dtype).to(backend.device)
    everything = parts == "everything"
    weight = case.weight.detach().requires_grad_() if "weight" in parts or everything else None
    bias = case.bias.detach().requires_grad_() if "bias" in parts or everything else None
    addend = case.grad_y.flip(0).clone().requires_grad_() if "addend" in parts or everything else None
    before = None if addend is None else addend.detach().clone()
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (case.x, case.lora_A, case.lora_B))
    y, _ = backend.ops.linear(x, weight, bias, addend, lora_A, lora_B, case.stage_ids, case.scales, True)

    def plain(x, weight, bias, addend, lora_A, lora_B):
        y = reference.lora_delta(x, lora_A, lora_B, case.stage_ids, case.scales)
        y = y if weight is None else y + x @ weight.mT
        for part in (bias, addend):
            y = y if part is None else y + part
        return y

    inputs = (x, weight, bias, addend, lora_A, lora_B)
    leaves = [t for t in inputs if t is not None]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    outputs = []
    for output, at in ((y, leaves), (plain(*inputs), leaves), (plain(*wide), [t for t in wide if t is not None])):
        grads = torch.autograd.grad(output, at, case.grad_y.to(output.dtype))
        outputs.append([output.detach(), *grads])
    for index, (got, expected, truth) in enumerate(zip(*outputs, strict=True)):
        assert_close(f"output {index}", got, expected, truth, factor=GRADIENT if index else 2)
    assert addend is None or torch.equal(addend, before), "the addend was written to"


@pytest.mark.parametrize("shared", [True, False])
def test_an_illegal_id_makes_its_row_nan_and_no_other(backend, shared):
    if backend.refuses_ids:
        pytest.skip("the CPU refuses illegal ids: test_errors.py")
    for num_tokens, dtype in ((20, torch.bfloat16), (133, torch.float32), (133, torch.float16)):
        case = make_case(num_tokens, 40, 72, 8, 3, shared, dtype=dtype, workload="runs").to(backend.device)
        expected = backend.lora_delta(*case.arguments("lora_delta"), shared=shared)
        y = torch.zeros_like(expected)
        for illegal in (3, 4, -3, 63, 64, 2**31 - 1, -(2**31), 2**32, -(2**32) - 1, 2**63 - 1):
            rows = [0, num_tokens // 2, num_tokens - 1]
            ids = case.stage_ids.long()
            ids[rows] = illegal
            wrong = torch.zeros(num_tokens, dtype=torch.bool, device=ids.device)
            wrong[rows] = True
            bad = case.but(stage_ids=ids)
            y.zero_()
            backend.ops.lora_add_(y, bad.x, bad.lora_A, bad.lora_B, bad.stage_ids, bad.scales, shared)
            for name, got in (
                ("delta", backend.lora_delta(*bad.arguments("lora_delta"), shared=shared)),
                ("add", y),
            ):
                assert got[wrong].isnan().all(), (name, illegal)
                assert torch.equal(got[~wrong], expected[~wrong]), (name, illegal)
            assert backend.mote_linear(*bad.arguments(), shared=shared)[wrong].isnan().all(), illegal


def test_a_wrapped_id_is_illegal_too(backend):
    if backend.refuses_ids:
        pytest.skip("the CPU refuses illegal ids: test_errors.py")
    case = make_case(4, 8, 8, 4, 3).to(backend.device)
    for ids in (
        torch.tensor([255, 254, 0, 1], dtype=torch.uint8),
        torch.tensor([2**64 - 1, 2**64 - 2, 0, 1], dtype=torch.uint64),
        torch.tensor([2**32 - 1, 2**32 - 2, 0, 1], dtype=torch.uint32),
        torch.tensor([2**16 - 1, 2**16 - 2, 0, 1], dtype=torch.uint16),
        torch.tensor([2**32, 2**32 - 1, 0, 1]),
        torch.tensor([-128, 127, 0, 1], dtype=torch.int8),
        torch.tensor([-(2**15), 2**15 - 1, 0, 1], dtype=torch.int16),
    ):
        bad = case.but(stage_ids=ids.to(backend.device))
        nan = backend.lora_delta(*bad.arguments("lora_delta")).isnan()
        assert nan.any(dim=1).tolist() == nan.all(dim=1).tolist() == [True, True, False, False], ids


def test_narrowed_ids_are_int32_of_the_same_shape(backend):
    ids = torch.tensor([[0, 1, 2], [-1, -2, 0]], device=backend.device)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        narrowed = backend.ops.narrow_stage_ids(ids.to(dtype), 3)
        assert narrowed.dtype == torch.int32
        assert narrowed.tolist() == ids.tolist()
    assert backend.ops.narrow_stage_ids(ids[:, 1:].long(), 3).tolist() == ids[:, 1:].tolist()
    assert backend.ops.narrow_stage_ids(ids[:0], 3).shape == (0, 3)
