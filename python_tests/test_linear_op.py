"""mote_linear and lora_delta, forward and backward, against the truth: sizes, workloads, layouts, dtypes, schedules."""

import pytest
import torch
from cases import (
    DTYPES,
    ID_DTYPES,
    LAYOUTS,
    PARAMETERS,
    WORKLOADS,
    assert_same_bits,
    integer_case,
    judge,
    judge_exactly,
    make_case,
    run,
)

from mote_ext import reference

# T, K, N, r, S, shared. Tiles are 16 rows up to T = 64 and 64 rows beyond; K and N that are multiples of 8 and that are
# not take different kernels, ranks of 8, 16 and odd ones too; a large K with few tokens is split.
SIZES = [
    (0, 64, 48, 8, 2, True),
    (1, 1, 1, 1, 1, True),
    (1, 1024, 96, 16, 4, True),
    (3, 1024, 40, 8, 2, False),
    (5, 1100, 24, 24, 3, True),
    (15, 129, 7, 5, 3, True),
    (16, 64, 64, 16, 4, True),
    (17, 80, 72, 24, 2, False),
    (64, 136, 200, 16, 4, True),
    (65, 128, 264, 40, 2, True),
    (70, 640, 64, 16, 2, True),
    (133, 257, 80, 16, 4, True),
    (133, 80, 257, 8, 5, True),
    (133, 72, 136, 64, 3, True),
    (33, 200, 72, 100, 2, True),
    (20, 40, 24, 256, 1, True),
    (20, 40, 24, 136, 2, False),
    (70, 64, 64, 8, 0, True),
    (9, 16, 8, 4, 0, False),
    (150, 24, 24, 8, 64, True),
    (40, 24, 40, 16, 33, False),
    (300, 24, 40, 8, 3, True),
    # Long enough for every ring of asynchronous copies to go round more than once: shrink over K, expand over ranks,
    # wgrad over the tokens of a chunk.
    (18, 5200, 16, 8, 2, True),
    (66, 5128, 24, 16, 3, True),
    (40, 72, 200, 128, 2, True),
    (2200, 24, 16, 64, 2, True),
    (4200, 16, 8, 8, 1, True),
]

# The same for the CPU alone, where runs long enough for the library's GEMM and for several threads are affordable.
CPU_SIZES = [
    (700, 320, 257, 16, 4, True),
    (1025, 129, 384, 5, 3, False),
    (513, 512, 512, 64, 2, True),
    (2, 4096, 512, 16, 4, True),
]


def sizes_id(sizes):
    num_tokens, num_in, num_out, rank, num_stages, shared = sizes
    return f"T{num_tokens}-K{num_in}-N{num_out}-r{rank}-S{num_stages}{'' if shared else '-no_shared'}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=sizes_id)
def test_sizes(backend, sizes, dtype):
    judge(backend, make_case(*sizes, dtype=dtype).to(backend.device))


@pytest.mark.parametrize("workload", ["random", "runs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CPU_SIZES, ids=sizes_id)
def test_sizes_of_long_runs(cpu, sizes, dtype, workload):
    judge(cpu, make_case(*sizes, dtype=dtype, workload=workload))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads(backend, workload, dtype):
    judge(backend, make_case(133, 80, 72, 16, 4, dtype=dtype, workload=workload).to(backend.device))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "no_shared"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads_of_the_delta_alone(backend, workload, shared):
    case = make_case(37, 40, 48, 8, 3, shared, dtype=torch.bfloat16, workload=workload)
    judge(backend, case.to(backend.device), "lora_delta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(backend, layout, dtype):
    judge(backend, make_case(70, 72, 40, 8, 2, dtype=dtype, layout=layout).to(backend.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(backend, layout, dtype):
    judge(backend, make_case(70, 40, 72, 8, 2, dtype=dtype, grad_layout=layout).to(backend.device))


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_parameters_may_be_transposed_views(backend, name):
    case = make_case(33, 40, 24, 8, 2, dtype=torch.bfloat16).to(backend.device)
    transposed = getattr(case, name).mT.contiguous().mT
    assert not transposed.is_contiguous()
    got = judge(backend, case.but(**{name: transposed}))
    if name != "weight":  # the library's GEMM may sum another way over a transposed weight
        assert_same_bits(got, run(backend, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bias(backend, dtype):
    judge(backend, make_case(33, 40, 24, 8, 2, dtype=dtype, bias=False).to(backend.device))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3, 5), (2, 0, 3)])
def test_any_leading_shape(backend, leading):
    num_tokens = torch.Size(leading).numel()
    case = integer_case(num_tokens, 12, 10, 4, 2).to(backend.device)
    shaped = case.but(
        **{
            name: getattr(case, name).reshape((*leading, *getattr(case, name).shape[1:]))
            for name in ("x", "grad_y", "stage_ids")
        }
    )
    got, flat = run(backend, shaped), run(backend, case)
    assert got["y"].shape == (*leading, 10)
    assert_same_bits(got | {"y": got["y"].reshape(-1, 10), "grad x": got["grad x"].reshape(-1, 12)}, flat)


@pytest.mark.parametrize("layout", ["contiguous", "gapped", "odd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workload", ["random", "packed"])
def test_float32_masters(backend, workload, dtype, layout):
    case = make_case(70, 72, 40, 8, 2, dtype=dtype, masters=True, workload=workload, layout=layout)
    got = judge(backend, case.to(backend.device))
    assert got["grad lora_A"].dtype == got["grad lora_B"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_masters_leave_the_accumulators_in_float32(backend, dtype):
    """Integers that 16 bits cannot hold: a gradient rounded on its way would not equal the truth."""
    case = integer_case(133, 16, 24, 8, 1, dtype=dtype, masters=True, workload="one_stage")
    large = case.but(x=torch.full_like(case.x, 5), grad_y=torch.full_like(case.grad_y, 3)).to(backend.device)
    got = run(backend, large, "lora_delta")
    truth = run(reference, large.in_float64(), "lora_delta")
    for name in ("grad lora_A", "grad lora_B"):
        assert not torch.equal(truth[name], truth[name].to(dtype).double()), "the case shows nothing"
        assert torch.equal(got[name].double(), truth[name]), name


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_every_integer_dtype_of_ids(backend, dtype):
    workload = "random" if dtype.is_signed else "alternating"
    case = integer_case(40, 24, 16, 8, 3, workload=workload).to(backend.device)
    assert_same_bits(run(backend, case.but(stage_ids=case.stage_ids.to(dtype))), run(backend, case))


@pytest.mark.parametrize("view", ["strided", "expanded", "transposed"])
def test_ids_of_any_strides(backend, view):
    case = integer_case(40, 24, 16, 8, 3, layout="batched").to(backend.device)
    ids = case.stage_ids if view != "expanded" else case.stage_ids[:, :1].expand(case.stage_ids.shape)
    views = {
        "strided": torch.stack([ids, torch.full_like(ids, 99)], dim=-1)[..., 0],
        "expanded": ids,
        "transposed": ids.mT.contiguous().mT,
    }
    assert not views[view].is_contiguous()
    assert_same_bits(run(backend, case.but(stage_ids=views[view])), run(backend, case.but(stage_ids=ids.contiguous())))


# ---- no rounding: whatever the order of summation, the bits are known -----------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [s for s in SIZES if max(s[0], s[1]) < 600 and s[3] <= 64], ids=sizes_id)
def test_integers_come_out_exactly(backend, sizes, dtype):
    judge_exactly(backend, integer_case(*sizes, dtype=dtype, workload="packed").to(backend.device))


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("sizes", [(133, 80, 72, 16, 4, True), (300, 130, 65, 5, 3, False)], ids=sizes_id)
def test_integers_come_out_exactly_in_float64(cpu, sizes, workload):
    judge_exactly(cpu, integer_case(*sizes, dtype=torch.float64, workload=workload))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scale_is_not_rounded_to_the_dtype_of_x(backend, dtype):
    scale = 1 + 0.49 * torch.finfo(dtype).eps  # the dtype would make 1 of it
    x = torch.full((3, 8), 1.75).to(dtype)
    lora_A = torch.zeros(1, 8, 8, dtype=dtype)
    lora_A[0, :, 0] = 1
    lora_B = torch.eye(8, dtype=dtype)[None]
    scales = torch.tensor([scale], dtype=torch.float32)
    ids = torch.full((3,), -1)
    got = backend.lora_delta(*(t.to(backend.device) for t in (x, lora_A, lora_B, ids, scales)))
    expected = torch.tensor(1.75 * scale).to(dtype)
    assert expected != 1.75
    assert (got == expected.to(backend.device)).all()


def test_z_is_scaled_before_it_is_rounded_to_float16(backend):
    """x · Aᵀ and dY · B are beyond 65504; the scale brings them back, in float32."""
    case = make_case(40, 64, 48, 8, 2, dtype=torch.float16)
    case.x.fill_(64)
    case.lora_A.fill_(32)  # x · A = 131072
    case.lora_B.fill_(2**-6)
    case.scales.fill_(2**-8)
    got = judge(backend, case.to(backend.device), "lora_delta")
    assert got["y"].isfinite().all() and got["y"].count_nonzero() > 0


# ---- the kernels under every order of threads -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 1024, 40, 8, 2, True), (70, 136, 72, 24, 3, True), (133, 129, 65, 5, 2, False)], ids=sizes_id
)
def test_schedules_give_the_same_bits(simt, sizes, dtype):
    if not hasattr(simt.simulator, "configure"):
        pytest.skip("mote_ext._simt has no configure(schedule, seed)")
    case = make_case(*sizes, dtype=dtype)
    results = []
    for schedule, seed in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2)):
        simt.simulator.configure(schedule, seed)
        try:
            results.append(run(simt, case))
        finally:
            simt.simulator.configure(0, 0)
    judge(simt, case)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_every_parameter_has_a_gradient(backend):
    """Guards the tests above: what is not in the result is not judged."""
    case = make_case(9, 8, 8, 4, 1).to(backend.device)
    assert run(backend, case).keys() == {"y", *(f"grad {name}" for name in PARAMETERS)}
