"""The op inside torch: opcheck, gradcheck, compile, autocast, checkpointing, threads; on a card streams and graphs."""

import threading
from types import SimpleNamespace

import pytest
import torch
from cases import PARAMETERS, assert_same_bits, judge, make_case, run
from torch.utils.checkpoint import checkpoint


def leaves_of(case, names=PARAMETERS):
    return case.but(**{name: getattr(case, name).detach().requires_grad_() for name in names})


# ---- opcheck --------------------------------------------------------------------------------------------------------

OPCHECK_CASES = {
    "plain": lambda: make_case(9, 8, 6, 4, 2),
    "no_shared": lambda: make_case(9, 8, 6, 4, 2, False),
    "batched": lambda: make_case(12, 8, 6, 4, 2, layout="batched"),
    "strided": lambda: make_case(9, 8, 6, 4, 2, layout="odd"),
    "transposed": lambda: make_case(9, 8, 6, 4, 2, layout="transposed"),
    "no_tokens": lambda: make_case(0, 8, 6, 4, 2),
    "no_bias": lambda: make_case(9, 8, 6, 4, 2, bias=False),
    "masters": lambda: make_case(9, 8, 6, 4, 2, dtype=torch.bfloat16, masters=True),
    "no_experts": lambda: make_case(9, 8, 6, 4, 0, False),
    "float16": lambda: make_case(9, 8, 6, 4, 2, dtype=torch.float16),
}


def opcheck_case(name, backend):
    return OPCHECK_CASES[name]().to(backend.device)


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_linear(shipped, name):
    case = leaves_of(
        opcheck_case(name, shipped), [n for n in PARAMETERS if OPCHECK_CASES[name]().bias is not None or n != "bias"]
    )
    tail = (case.lora_A, case.lora_B, case.stage_ids, case.scales, case.shared)
    linear = shipped.ops.linear.default
    torch.library.opcheck(linear, (case.x, case.weight, case.bias, None, *tail))
    torch.library.opcheck(linear, (case.x, None, None, case.grad_y.detach().requires_grad_(), *tail))
    torch.library.opcheck(linear, (case.x.detach(), case.weight.detach(), None, None, *tail))


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_primitives(shipped, name):
    case = opcheck_case(name, shipped)
    ops, shared, ids = shipped.ops, case.shared, case.stage_ids
    num_stages = len(case.scales) - shared
    torch.library.opcheck(ops.lora_shrink.default, (case.x, case.lora_A, ids, case.scales, shared))
    z = ops.lora_shrink(case.x, case.lora_A, ids, case.scales, shared)
    for bias, addend in ((None, None), (case.bias, case.grad_y)):
        torch.library.opcheck(ops.lora_expand.default, (z, case.lora_B, ids, shared, bias, addend))
    for transposed, dtype in ((False, case.x.dtype), (True, torch.float32)):
        torch.library.opcheck(ops.lora_wgrad.default, (z, case.x, ids, num_stages, shared, transposed, dtype))
    dy, masters = case.grad_y.detach(), (case.lora_A, case.lora_B)
    for x, its_z, wanted in (
        (case.x, z, [True, True, True]),
        (None, z, [True, False, True]),
        (None, None, [False] * 3),
    ):
        arguments = (dy, x, its_z, *masters, ids, case.scales, shared, wanted)
        torch.library.opcheck(ops.linear_backward.default, arguments)
    torch.library.opcheck(
        ops.lora_add_.default,
        (case.grad_y.clone(), case.x, case.lora_A, case.lora_B, ids, case.scales, shared),
    )
    for dtype in (torch.int32, torch.int64):
        torch.library.opcheck(ops.narrow_stage_ids.default, (ids.to(dtype), num_stages))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_know_the_shape_without_a_kernel(cpu, device, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 5, 8, dtype=dtype, device=device).transpose(0, 1)
        parameters = [torch.empty(shape, dtype=dtype, device=device) for shape in ((6, 8), (6,), (3, 4, 8), (3, 6, 4))]
        ids = torch.empty(5, 3, dtype=torch.int64, device=device)
        y = cpu.mote_linear(x, *parameters, ids, torch.empty(3, device=device))
    assert (y.shape, y.dtype, y.device.type, y.is_contiguous()) == ((5, 3, 6), dtype, device, True)


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["random", "packed", "one_token", "empty_stage"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "no_shared"])
def test_gradcheck_in_float64(cpu, shared, workload):
    case = leaves_of(make_case(9, 5, 4, 3, 2, shared, dtype=torch.float64, workload=workload))
    leaves = [getattr(case, name) for name in PARAMETERS]

    def call(x, weight, bias, lora_A, lora_B):
        return cpu.mote_linear(x, weight, bias, lora_A, lora_B, case.stage_ids, case.scales, shared=shared)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("call", ["mote_linear", "lora_delta"])
def test_double_backward_is_refused(backend, call, name):
    case = leaves_of(make_case(9, 8, 6, 4, 2).to(backend.device))
    grad_y = case.grad_y.detach().requires_grad_()
    y = getattr(backend, call)(*case.arguments(call))
    (grad,) = torch.autograd.grad(y, getattr(case, name), grad_y, create_graph=True)
    for again in (case.x, case.lora_A, case.lora_B, grad_y):
        with pytest.raises(RuntimeError, match="(?i)double backward.*not supported.*reference"):
            torch.autograd.grad(grad.sum(), again, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", ["lora_shrink", "lora_expand", "lora_wgrad", "linear_backward"])
def test_primitives_are_not_silently_detached(backend, name):
    case = leaves_of(make_case(9, 8, 6, 4, 2).to(backend.device))
    ids, scales, ops = case.stage_ids, case.scales, backend.ops
    z = torch.ones(9, 8, device=backend.device, requires_grad=True)
    with pytest.raises(RuntimeError) as error:
        {
            "lora_shrink": lambda: ops.lora_shrink(case.x, case.lora_A, ids, scales, True),
            "lora_expand": lambda: ops.lora_expand(z, case.lora_B, ids, True),
            "lora_wgrad": lambda: ops.lora_wgrad(z, case.x, ids, 2, True, False, torch.float32),
            "linear_backward": lambda: ops.linear_backward(
                case.grad_y, case.x, z, case.lora_A, case.lora_B, ids, scales, True, [True, True, True]
            )[0],
        }[name]().sum().backward()
    assert "does not require grad" not in str(error.value), "the graph was cut without a word"


@pytest.mark.parametrize("name", ["y", "x", "lora_A", "lora_B"])
def test_addition_in_place_is_not_silently_detached(backend, name):
    case = make_case(9, 8, 6, 4, 2).to(backend.device)
    tensors = {"y": case.grad_y.clone(), "x": case.x, "lora_A": case.lora_A, "lora_B": case.lora_B}
    tensors[name] = tensors[name].detach().requires_grad_()
    y, x, lora_A, lora_B = tensors.values()
    if name == "y":
        y = y * 1  # a leaf could not be written to
    with pytest.raises(RuntimeError) as error:
        backend.ops.lora_add_(y, x, lora_A, lora_B, case.stage_ids, case.scales, True)
        y.sum().backward()
    assert "does not require grad" not in str(error.value), "the graph was cut without a word"


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "weight"])
def test_forward_mode_is_not_silently_zero(shipped, name):
    from torch.autograd import forward_ad

    case = make_case(9, 8, 6, 4, 2).to(shipped.device)
    with forward_ad.dual_level():
        primal = getattr(case, name)
        dual = case.but(**{name: forward_ad.make_dual(primal, torch.ones_like(primal))})
        try:
            y = shipped.mote_linear(*dual.arguments())
        except (RuntimeError, NotImplementedError):
            return
        assert forward_ad.unpack_dual(y).tangent is not None, "the tangent was dropped without a word"


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_gives_the_same_bits(shipped, dtype, use_reentrant):
    case = make_case(133, 40, 40, 8, 3, dtype=dtype, workload="packed").to(shipped.device)

    def two_layers(*arguments):
        hidden = shipped.mote_linear(*arguments)
        return shipped.mote_linear(hidden.relu(), *arguments[1:])

    def step(call):
        leaves = leaves_of(case)
        y = call(*leaves.arguments())
        y.backward(case.grad_y)
        return {"y": y.detach()} | {f"grad {name}": getattr(leaves, name).grad for name in PARAMETERS}

    plain = step(two_layers)
    assert_same_bits(step(lambda *arguments: checkpoint(two_layers, *arguments, use_reentrant=use_reentrant)), plain)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(step(two_layers), plain)


def test_two_threads_at_once(shipped):
    cases = [make_case(133, 72, 48, 8, 3, seed=seed, workload="runs").to(shipped.device) for seed in range(2)]
    expected = [run(shipped, case) for case in cases]
    wrong = []

    def work(case, result):
        try:
            for _ in range(10):
                assert_same_bits(run(shipped, case), result)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_is_cast", [False, True], ids=["float32_x", "16_bit_x"])
@pytest.mark.parametrize("masters", [True, False], ids=["masters", "16_bit_adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["mote_linear", "lora_delta"])
def test_autocast_equals_casting_by_hand(backend, call, dtype, masters, x_is_cast):
    """x, weight and bias become the autocast dtype; masters stay masters, and scales stay float32."""
    by_hand = make_case(70, 40, 48, 8, 3, dtype=dtype, masters=masters, workload="packed").to(backend.device)
    case = by_hand.but(weight=by_hand.weight.float(), bias=by_hand.bias.float())
    if not x_is_cast:
        case = case.but(x=case.x.float())

    def under_autocast(*arguments, shared):
        with torch.autocast(backend.device, dtype):
            y = getattr(backend, call)(*arguments, shared=shared)
        assert y.dtype == dtype
        return y

    got = run(SimpleNamespace(**{call: under_autocast}), case, call)
    expected = run(backend, by_hand, call)
    assert_same_bits(got, {name: tensor.to(got[name].dtype) for name, tensor in expected.items()})
    names = PARAMETERS if call == "mote_linear" else ("x", "lora_A", "lora_B")
    assert all(got[f"grad {name}"].dtype == getattr(case, name).dtype for name in names)


def test_autocast_around_the_backward_too(backend):
    case = make_case(70, 40, 48, 8, 3, masters=True).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        inside = run(backend, case)
        leaves = leaves_of(case)
        y = backend.mote_linear(*leaves.arguments())
    grads = torch.autograd.grad(y, [getattr(leaves, name) for name in PARAMETERS], case.grad_y.to(y.dtype))
    outside = {"y": y.detach()} | {f"grad {name}": grad for name, grad in zip(PARAMETERS, grads, strict=True)}
    assert_same_bits(inside, outside)


def test_autocast_switched_off_inside_autocast(backend):
    case = make_case(20, 24, 16, 8, 2).to(backend.device)
    expected = run(backend, case)
    with torch.autocast(backend.device, torch.bfloat16), torch.autocast(backend.device, enabled=False):
        assert_same_bits(run(backend, case), expected)


def test_autocast_leaves_float64_alone(cpu):
    case = make_case(20, 24, 16, 8, 2, dtype=torch.float64)
    expected = run(cpu, case)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(cpu, case), expected)


# ---- compile --------------------------------------------------------------------------------------------------------


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **({"backend": "aot_eager"} | options))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("call", ["mote_linear", "lora_delta"])
def test_compiled_equals_eager(shipped, call, dynamic):
    op = SimpleNamespace(**{call: compiled(getattr(shipped, call), dynamic=dynamic)})
    for num_tokens, layout in ((16, "contiguous"), (33, "gapped"), (12, "batched")):
        case = make_case(num_tokens, 24, 40, 8, 2, dtype=torch.bfloat16, layout=layout, masters=True).to(shipped.device)
        assert_same_bits(run(op, case, call), run(shipped, case, call))


def test_a_dynamic_number_of_tokens_compiles_once(shipped):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    op = compiled(shipped.mote_linear, dynamic=True, backend=counter)
    with torch.no_grad():
        for num_tokens in (19, 7, 133):  # of no other size: equal sizes are taken for one symbol
            case = make_case(num_tokens, 24, 40, 8, 2).to(shipped.device)
            assert torch.equal(op(*case.arguments()), shipped.mote_linear(*case.arguments()))
    assert counter.frame_count == 1


def test_compiled_under_autocast(shipped):
    def step(x, weight, bias, lora_A, lora_B, stage_ids, scales, *, shared):
        with torch.autocast(shipped.device, torch.bfloat16):
            return shipped.mote_linear(x, weight, bias, lora_A, lora_B, stage_ids, scales, shared=shared)

    case = make_case(33, 24, 40, 8, 2).to(shipped.device)
    got = run(SimpleNamespace(mote_linear=compiled(step)), case)
    assert got["y"].dtype == torch.bfloat16
    assert_same_bits(got, run(SimpleNamespace(mote_linear=step), case))


def test_compiled_in_place_addition(shipped):
    def step(x, weight, adapters):
        y = torch.nn.functional.linear(x, weight)
        shipped.ops.lora_add_(y, x, *adapters, True)
        return y * 2

    case = make_case(33, 24, 40, 8, 2).to(shipped.device)
    adapters = (case.lora_A, case.lora_B, case.stage_ids, case.scales)
    assert torch.equal(compiled(step)(case.x, case.weight, adapters), step(case.x, case.weight, adapters))


def test_inductor(shipped):
    def block(x, weight, bias, lora_A, lora_B, stage_ids, scales, *, shared):
        return shipped.mote_linear(x + 0, weight, bias, lora_A, lora_B, stage_ids, scales, shared=shared) * 1

    op = SimpleNamespace(mote_linear=compiled(block, backend="inductor"))
    judge(op, make_case(33, 24, 40, 8, 2, dtype=torch.bfloat16, workload="packed").to(shipped.device))


# ---- on a card ------------------------------------------------------------------------------------------------------


def test_nothing_synchronises(cuda):
    case = leaves_of(make_case(133, 72, 48, 8, 3, dtype=torch.bfloat16, workload="packed").to("cuda"))
    run(cuda, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(cuda, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream(cuda):
    """The work goes to the current stream: elsewhere it would read x before it is there."""
    case = make_case(300, 520, 264, 16, 3, dtype=torch.bfloat16).to("cuda")
    expected = run(cuda, case)
    stream = torch.cuda.Stream()
    late = case.map(torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name in (*PARAMETERS, "stage_ids", "scales", "grad_y"):
            getattr(late, name).copy_(getattr(case, name), non_blocking=True)
        got = run(cuda, late)
    stream.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 300])
def test_a_graph_is_replayed_with_other_ids(cuda, num_tokens):
    case = make_case(num_tokens, 1024, 264, 16, 3, dtype=torch.bfloat16, workload="packed").to("cuda")
    static = leaves_of(case.map(torch.clone).but(stage_ids=case.stage_ids.long()))
    leaves = [getattr(static, name) for name in PARAMETERS]

    def step():
        y = cuda.mote_linear(*static.arguments())
        return [y.detach(), *torch.autograd.grad(y, leaves, static.grad_y)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    for workload in ("random", "all_base", "all_shared", "alternating", "packed"):
        other = make_case(num_tokens, 1024, 264, 16, 3, dtype=torch.bfloat16, workload=workload, seed=1).to("cuda")
        static.stage_ids.copy_(other.stage_ids)
        with torch.no_grad():
            static.x.copy_(other.x)
        graph.replay()
        expected = run(cuda, case.but(x=other.x, stage_ids=other.stage_ids))
        assert_same_bits(dict(zip(expected, captured, strict=True)), expected)

    static.stage_ids[0] = 77
    graph.replay()
    assert captured[0][0].isnan().all() and captured[0][1:].isfinite().all()


def test_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    case = make_case(70, 72, 48, 8, 3, dtype=torch.bfloat16).to("cuda:0")
    expected = run(cuda, case)
    elsewhere = case.map(lambda tensor: tensor.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    got = run(cuda, elsewhere)
    assert all(tensor.device.index == 1 for tensor in got.values())
    assert_same_bits({name: tensor.to("cuda:0") for name, tensor in got.items()}, expected)


def test_debugging_raises_on_illegal_ids(cuda, monkeypatch):
    case = make_case(9, 8, 8, 4, 2, dtype=torch.bfloat16).to("cuda")
    ids = case.stage_ids.long()
    ids[5] = 2**32
    bad = case.but(stage_ids=ids)
    assert cuda.lora_delta(*bad.arguments("lora_delta"))[5].isnan().all()
    monkeypatch.setenv("MOTE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"stage_ids.*4294967296"):
        cuda.lora_delta(*bad.arguments("lora_delta"))
    run(cuda, case)
    monkeypatch.setenv("MOTE_DEBUG", "0")
    cuda.lora_delta(*bad.arguments("lora_delta"))


def test_debugging_stays_out_of_a_capture(cuda, monkeypatch):
    case = make_case(9, 8, 8, 4, 2, dtype=torch.bfloat16).to("cuda")
    cuda.mote_linear(*case.arguments())
    monkeypatch.setenv("MOTE_DEBUG", "1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.mote_linear(*case.arguments())
    graph.replay()
    monkeypatch.setenv("MOTE_DEBUG", "0")
    assert torch.equal(y, cuda.mote_linear(*case.arguments()))
