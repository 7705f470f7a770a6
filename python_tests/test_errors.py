"""One table of wrong calls: the class of the exception, the tensor it names, and what it says was expected and got."""

import pytest
import torch
from cases import assert_same_bits, make_case

T, K, N, RANK, STAGES, EXPERTS = 6, 8, 5, 4, 2, 3


def good():
    case = make_case(T, K, N, RANK, STAGES)
    names = ("x", "weight", "bias", "lora_A", "lora_B", "stage_ids", "scales")
    return {name: getattr(case, name) for name in names} | {"shared": True}


def ids(*values, dtype=torch.int64):
    return torch.tensor([*values, *[0] * (T - len(values))], dtype=dtype)


def quantized():
    if not hasattr(torch, "quantize_per_tensor"):
        pytest.skip("this torch has no quantised tensors")
    return torch.quantize_per_tensor(torch.zeros(T, K), 0.1, 0, torch.qint8)


def jagged():
    return torch.nested.nested_tensor([torch.zeros(2, K), torch.zeros(4, K)], layout=torch.jagged)


SHAPE, TYPE, EITHER = ValueError, TypeError, (ValueError, TypeError)

# name: (what is passed instead, exception, the tensor it names, fragments of the message)
WRONG = {
    "x without a last dimension": ({"x": torch.tensor(1.0)}, SHAPE, "x", ["[]|without dimensions"]),
    "x of another K": ({"x": torch.zeros(T, 7)}, SHAPE, "", ["[6, 7]"]),
    "x without columns": (
        {"x": torch.zeros(T, 0), "weight": torch.zeros(N, 0), "lora_A": torch.zeros(EXPERTS, RANK, 0)},
        SHAPE, "x", ["[6, 0]"],
    ),
    "an output without columns": (
        {"weight": torch.zeros(0, K), "bias": None, "lora_B": torch.zeros(EXPERTS, 0, RANK)}, SHAPE, "", ["0"],
    ),
    "x is jagged": ({"x": jagged}, TYPE, "x", ["jagged"]),
    "x is of another library": ({"x": lambda: torch.zeros(T, K).to_mkldnn()}, TYPE, "x", ["mkldnn"]),
    "x of integers": ({"x": torch.zeros(T, K, dtype=torch.int64)}, TYPE, "x", ["int64"]),
    "x of complex numbers": ({"x": torch.zeros(T, K, dtype=torch.complex64)}, TYPE, "x", ["complex64"]),
    "x of 8-bit floats": ({"x": torch.zeros(T, K).to(torch.float8_e4m3fn)}, TYPE, "x", ["float8_e4m3fn"]),
    "x is a list": ({"x": [[1.0] * K] * T}, TYPE, "x", ["list"]),
    "x is None": ({"x": None}, TYPE, "x", ["None"]),
    "x is sparse": ({"x": torch.zeros(T, K).to_sparse()}, TYPE, "x", ["sparse"]),
    "x is compressed": ({"x": lambda: torch.zeros(T, K).to_sparse_csr()}, TYPE, "x", ["sparse"]),
    "x is quantised": ({"x": quantized}, TYPE, "x", ["qint8|quantized"]),
    "weight of one dimension": ({"weight": torch.zeros(K)}, SHAPE, "weight", ["[8]"]),
    "weight transposed": ({"weight": torch.zeros(K, N)}, SHAPE, "weight", ["[8, 5]"]),
    "weight of another dtype": ({"weight": torch.zeros(N, K).half()}, TYPE, "weight", ["float16", "float32"]),
    "weight is None": ({"weight": None}, EITHER, "weight", ["None"]),
    "weight is sparse": ({"weight": torch.zeros(N, K).to_sparse()}, TYPE, "weight", ["sparse"]),
    "bias of two dimensions": ({"bias": torch.zeros(1, N)}, SHAPE, "bias", ["[1, 5]"]),
    "bias of another N": ({"bias": torch.zeros(4)}, SHAPE, "bias", ["[4]"]),
    "bias of another dtype": ({"bias": torch.zeros(N).double()}, TYPE, "bias", ["float64"]),
    "lora_A of two dimensions": ({"lora_A": torch.zeros(RANK, K)}, SHAPE, "lora_A", ["[4, 8]"]),
    "lora_A of another K": ({"lora_A": torch.zeros(EXPERTS, RANK, 7)}, SHAPE, "lora_A", ["8", "[3, 4, 7]"]),
    "lora_A transposed": ({"lora_A": torch.zeros(EXPERTS, K, RANK)}, SHAPE, "lora_A", ["[3, 8, 4]"]),
    "lora_A of another E": ({"lora_A": torch.zeros(4, RANK, K)}, SHAPE, "lora_", ["[4, ", "[3, "]),
    "lora_A of another dtype": ({"lora_A": torch.zeros(EXPERTS, RANK, K).half()}, TYPE, "lora_A", ["float16"]),
    "lora_A of integers": ({"lora_A": torch.zeros(EXPERTS, RANK, K).long()}, TYPE, "lora_A", ["int64"]),
    "lora_A is None": ({"lora_A": None}, TYPE, "lora_A", ["None"]),
    "lora_B of two dimensions": ({"lora_B": torch.zeros(N, RANK)}, SHAPE, "lora_B", ["[5, 4]"]),
    "lora_B of another rank": ({"lora_B": torch.zeros(EXPERTS, N, 3)}, SHAPE, "lora_B", ["4", "[3, 5, 3]"]),
    "lora_B transposed": ({"lora_B": torch.zeros(EXPERTS, RANK, N)}, SHAPE, "lora_B", ["[3, 4, 5]"]),
    "lora_B of another dtype": ({"lora_B": torch.zeros(EXPERTS, N, RANK).bfloat16()}, TYPE, "lora_B", ["bfloat16"]),
    "lora_B is sparse": ({"lora_B": torch.zeros(EXPERTS, N, RANK).to_sparse()}, TYPE, "lora_B", ["sparse"]),
    "a rank of zero": (
        {"lora_A": torch.zeros(EXPERTS, 0, K), "lora_B": torch.zeros(EXPERTS, N, 0)}, SHAPE, "", ["r", "256", "0"],
    ),
    "a rank of 257": (
        {"lora_A": torch.zeros(EXPERTS, 257, K), "lora_B": torch.zeros(EXPERTS, N, 257)}, SHAPE, "", ["256", "257"],
    ),
    "too many stages": (
        {"lora_A": torch.zeros(66, RANK, K), "lora_B": torch.zeros(66, N, RANK), "scales": torch.ones(66)},
        SHAPE, "", ["64", "65|66"],
    ),
    "a shared expert that is not there": (
        {"lora_A": torch.zeros(0, RANK, K), "lora_B": torch.zeros(0, N, RANK), "scales": torch.ones(0)},
        SHAPE, "", ["shared"],
    ),
    "ids of floats": ({"stage_ids": torch.zeros(T)}, TYPE, "stage_ids", ["integer", "float32"]),
    "ids of bools": ({"stage_ids": torch.zeros(T, dtype=torch.bool)}, TYPE, "stage_ids", ["integer", "bool"]),
    "ids are a list": ({"stage_ids": [0] * T}, TYPE, "stage_ids", ["list"]),
    "ids are None": ({"stage_ids": None}, TYPE, "stage_ids", ["None"]),
    "ids are too few": ({"stage_ids": torch.zeros(5, dtype=torch.int64)}, SHAPE, "stage_ids", ["[6]", "[5]"]),
    "ids are too many": ({"stage_ids": torch.zeros(7, dtype=torch.int64)}, SHAPE, "stage_ids", ["[6]", "[7]"]),
    "one id for all": ({"stage_ids": torch.tensor(0)}, SHAPE, "stage_ids", ["[6]", "[]"]),
    "ids with a dimension more": ({"stage_ids": torch.zeros(T, 1).long()}, SHAPE, "stage_ids", ["[6]", "[6, 1]"]),
    "flat ids for a batch": (
        {"x": torch.zeros(2, 3, K), "stage_ids": torch.zeros(T).long()}, SHAPE, "stage_ids", ["[2, 3]", "[6]"],
    ),
    "scales of two dimensions": ({"scales": torch.ones(EXPERTS, 1)}, SHAPE, "scales", ["[3, 1]"]),
    "scales for another number of experts": ({"scales": torch.ones(2)}, SHAPE, "scales", ["3", "[2]"]),
    "scales in float64": ({"scales": torch.ones(EXPERTS).double()}, TYPE, "scales", ["float32", "float64"]),
    "scales in bfloat16": ({"scales": torch.ones(EXPERTS).bfloat16()}, TYPE, "scales", ["float32", "bfloat16"]),
    "scales are a number": ({"scales": 1.0}, TYPE, "scales", ["float"]),
    "scales are to be trained": (
        {"scales": torch.ones(EXPERTS, requires_grad=True)}, SHAPE, "scales", ["requires_grad|require grad|gradient"],
    ),
}  # fmt: skip

# What is wrong here is not a value that was got.
NOTHING_GOT = {"a shared expert that is not there", "scales are to be trained"}

ILLEGAL = {
    "the shared expert by its number": (ids(0, 0, 2), "2", "2"),
    "far too large": (ids(0, 77), "77", "1"),
    "below BASE_ONLY": (ids(0, 0, 0, -3), "-3", "3"),
    "the last one": (ids(0, 0, 0, 0, 0, 5), "5", "5"),
    "2**32, which wraps to 0": (ids(0, 2**32), "4294967296", "1"),
    "2**32 - 1, which wraps to -1": (ids(0, 2**32 - 1), "4294967295", "1"),
    "-2**32, which wraps to 0": (ids(0, 0, -(2**32)), "-4294967296", "2"),
    "2**63 - 1": (ids(0, 2**63 - 1), "9223372036854775807", "1"),
    "-2**63": (ids(0, -(2**63)), "-9223372036854775808", "1"),
    "-2**31, which marks an illegal id": (ids(0, 0, -(2**31)), "-2147483648", "2"),
    "-2**31 in int32": (ids(0, 0, -(2**31), dtype=torch.int32), "-2147483648", "2"),
    "2**64 - 1 of uint64, which wraps to -1": (ids(0, 2**64 - 1, dtype=torch.uint64), "18446744073709551615", "1"),
    "2**32 - 2 of uint32, which wraps to -2": (ids(0, 0, 2**32 - 2, dtype=torch.uint32), "4294967294", "2"),
    "2**16 - 1 of uint16, which wraps to -1": (ids(2**16 - 1, dtype=torch.uint16), "65535", "0"),
    "255 of uint8, which wraps to -1": (ids(0, 255, dtype=torch.uint8), "255", "1"),
    "254 of uint8, which wraps to -2": (ids(0, 0, 0, 254, dtype=torch.uint8), "254", "3"),
    "-128 of int8": (ids(-128, dtype=torch.int8), "-128", "0"),
    "2**15 - 1 of int16": (ids(0, 2**15 - 1, dtype=torch.int16), "32767", "1"),
}


def call(op, name, arguments):
    names = ("x", "lora_A", "lora_B", "stage_ids", "scales")
    names = names if name == "lora_delta" else ("x", "weight", "bias", *names[1:])
    return getattr(op, name)(*(arguments[n] for n in names), shared=arguments["shared"])


def moved(arguments, device):
    return {n: value.to(device) if isinstance(value, torch.Tensor) else value for n, value in arguments.items()}


def assert_says(message, name, tensor, fragments):
    assert message.startswith(f"{name}: "), message
    assert tensor in message, f"{tensor!r} is not named: {message}"
    for fragment in fragments:
        assert any(choice in message for choice in fragment.split("|")), f"{fragment!r} is not said: {message}"


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:Sparse CSR")
@pytest.mark.parametrize("name", ["mote_linear", "lora_delta"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(shipped, wrong, name):
    changes, exception, tensor, fragments = WRONG[wrong]
    changes = {n: value() if callable(value) else value for n, value in changes.items()}
    if name == "lora_delta" and changes.keys() <= {"weight", "bias"}:
        pytest.skip("lora_delta has no base")
    if wrong == "lora_B transposed" and name == "lora_delta":
        fragments = ["[3, 4, 5]"]  # N is what lora_B says; the rank is what disagrees
    if wrong == "x is of another library" and shipped.device != "cpu":
        pytest.skip("of the CPU only")
    arguments = moved(good() | changes, shipped.device)
    with pytest.raises(exception) as error:
        call(shipped, name, arguments)
    assert_says(str(error.value), name, tensor, fragments)
    assert wrong in NOTHING_GOT or "got" in str(error.value)


@pytest.mark.parametrize("name", ["mote_linear", "lora_delta"])
@pytest.mark.parametrize("wrong", ILLEGAL)
def test_illegal_ids_are_named_with_their_position(cpu, wrong, name):
    stage_ids, value, position = ILLEGAL[wrong]
    with pytest.raises(ValueError) as error:
        call(cpu, name, good() | {"stage_ids": stage_ids})
    assert_says(str(error.value), name, "stage_ids", [value])
    assert position in str(error.value).replace(value, "", 1), f"the position is not said: {error.value}"


def test_an_illegal_id_deep_in_a_batch(cpu):
    x = torch.zeros(40, 50, K)
    stage_ids = torch.zeros(40, 50, dtype=torch.int16)
    stage_ids[23, 31] = 300
    with pytest.raises(ValueError, match="300"):
        call(cpu, "lora_delta", good() | {"x": x, "stage_ids": stage_ids})
    with pytest.raises(ValueError, match="300"):  # the same elements, other strides
        call(cpu, "lora_delta", good() | {"x": x.mT.reshape(40, 50, K), "stage_ids": stage_ids.T.contiguous().T})


@pytest.mark.parametrize("legal", [-2, -1])
def test_ids_without_any_stage(cpu, legal):
    """E = 0: only -1 and -2 are legal, and both mean the base."""
    none = {"lora_A": torch.zeros(0, RANK, K), "lora_B": torch.zeros(0, N, RANK), "scales": torch.ones(0)}
    arguments = good() | none | {"shared": False, "stage_ids": torch.full((T,), legal)}
    base = torch.nn.functional.linear(arguments["x"], arguments["weight"], arguments["bias"])
    assert torch.equal(call(cpu, "mote_linear", arguments), base)
    with pytest.raises(ValueError, match="stage_ids"):
        call(cpu, "mote_linear", arguments | {"stage_ids": torch.zeros(T, dtype=torch.int64)})


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B", "stage_ids", "scales"])
def test_tensors_on_other_devices(shipped, name):
    other = "meta" if shipped.device == "cpu" else "cpu"
    arguments = moved(good(), shipped.device)
    arguments[name] = arguments[name].to(other)
    with pytest.raises(EITHER) as error:
        call(shipped, "mote_linear", arguments)
    assert_says(str(error.value), "mote_linear", name, [shipped.device, other])


def test_float64_is_for_the_cpu_alone(cuda):
    arguments = {n: v.double() if n not in ("stage_ids", "scales", "shared") else v for n, v in good().items()}
    with pytest.raises(TypeError) as error:
        call(cuda, "mote_linear", moved(arguments, "cuda"))
    assert_says(str(error.value), "mote_linear", "x", ["float64"])


def test_wrong_calls_are_refused_when_no_token_is_there(cpu):
    """T = 0 must not hide a mistake that the first real batch would show."""
    empty = good() | {"x": torch.zeros(0, K), "stage_ids": torch.zeros(0, dtype=torch.int64)}
    assert call(cpu, "mote_linear", empty).shape == (0, N)
    for changes, exception in (
        ({"lora_A": torch.zeros(EXPERTS, RANK, 7)}, ValueError),
        ({"stage_ids": torch.zeros(0)}, TypeError),
        ({"scales": torch.ones(2)}, ValueError),
        ({"weight": torch.zeros(N, K).half()}, TypeError),
    ):
        with pytest.raises(exception):
            call(cpu, "mote_linear", empty | changes)


def test_wrong_calls_are_refused_while_compiling(cpu):
    compiled = torch.compile(cpu.mote_linear, backend="aot_eager")
    arguments = good()
    arguments["lora_A"] = torch.zeros(EXPERTS, RANK, 7)
    values = [value for name, value in arguments.items() if name != "shared"]
    with pytest.raises(Exception, match="lora_A|Dynamo"):
        compiled(*values)


# ---- the primitives -------------------------------------------------------------------------------------------------


def test_wrong_primitive_calls(backend):
    a = moved(good(), backend.device)
    ops, stage_ids, scales = backend.ops, a["stage_ids"], a["scales"]
    z = torch.zeros(T, 2 * RANK, device=backend.device)
    y = torch.zeros(T, N, device=backend.device)
    f32 = torch.float32

    def backward(**changes):
        right = {"dy": y, "x": a["x"], "z": z, "lora_A": a["lora_A"], "lora_B": a["lora_B"]}
        right |= {"stage_ids": stage_ids, "scales": scales} | changes
        return ops.linear_backward(*right.values(), True, [True, True, True])

    assert len(backward()) == 3
    wrong = {
        "lora_shrink": [
            lambda: ops.lora_shrink(a["x"][:, :7], a["lora_A"], stage_ids, scales, True),
            lambda: ops.lora_shrink(a["x"], a["lora_A"][0], stage_ids, scales, True),
            lambda: ops.lora_shrink(a["x"], a["lora_A"], stage_ids[:5], scales, True),
            lambda: ops.lora_shrink(a["x"], a["lora_A"], stage_ids, scales[:2], True),
            lambda: ops.lora_shrink(a["x"], a["lora_A"], stage_ids.float(), scales, True),
            lambda: ops.lora_shrink(a["x"], a["lora_A"], stage_ids, scales.double(), True),
        ],
        "lora_expand": [
            lambda: ops.lora_expand(z[:, :7], a["lora_B"], stage_ids, True),
            lambda: ops.lora_expand(z, a["lora_B"], stage_ids, False),  # two halves, but one expected
            lambda: ops.lora_expand(z, a["lora_B"][0], stage_ids, True),
            lambda: ops.lora_expand(z, a["lora_B"], stage_ids[:5], True),
            lambda: ops.lora_expand(z, a["lora_B"], stage_ids, True, a["bias"][:4]),
            lambda: ops.lora_expand(z, a["lora_B"], stage_ids, True, None, y[:5]),
            lambda: ops.lora_expand(z, a["lora_B"], stage_ids, True, None, y.half()),
        ],
        "lora_wgrad": [
            lambda: ops.lora_wgrad(z[:5], a["x"], stage_ids, STAGES, True, False, f32),
            lambda: ops.lora_wgrad(z[:, :7], a["x"], stage_ids, STAGES, True, False, f32),
            lambda: ops.lora_wgrad(z, a["x"], stage_ids[:5], STAGES, True, False, f32),
            lambda: ops.lora_wgrad(z, a["x"], stage_ids, 65, True, False, f32),
            lambda: ops.lora_wgrad(z, a["x"], stage_ids, -1, True, False, f32),
            lambda: ops.lora_wgrad(z, a["x"].half(), stage_ids, STAGES, True, False, f32),
            lambda: ops.lora_wgrad(z, a["x"], stage_ids, STAGES, True, False, torch.int32),
        ],
        "linear_backward": [
            lambda: backward(dy=y[:5]),
            lambda: backward(dy=y[:, :4]),
            lambda: backward(dy=y.int()),
            lambda: backward(x=a["x"][:, :7]),
            lambda: backward(x=a["x"].half()),
            lambda: backward(x=None),
            lambda: backward(z=z[:, :7]),
            lambda: backward(z=z[:5]),
            lambda: backward(z=None),
            lambda: backward(lora_A=a["lora_A"][0]),
            lambda: backward(lora_A=a["lora_A"][:, :, :0]),
            lambda: backward(lora_A=a["lora_A"].half()),
            lambda: backward(lora_B=a["lora_B"][:2]),
            lambda: backward(lora_B=a["lora_B"][:, :, :1]),
            lambda: backward(stage_ids=stage_ids[:5]),
            lambda: backward(stage_ids=stage_ids.float()),
            lambda: backward(scales=scales[:2]),
            lambda: backward(scales=scales.double()),
        ],
        "lora_add_": [
            lambda: ops.lora_add_(y[:5], a["x"], a["lora_A"], a["lora_B"], stage_ids, scales, True),
            lambda: ops.lora_add_(y[:, :4], a["x"], a["lora_A"], a["lora_B"], stage_ids, scales, True),
            lambda: ops.lora_add_(y.half(), a["x"], a["lora_A"], a["lora_B"], stage_ids, scales, True),
        ],
        "stage_ids": [
            lambda: ops.narrow_stage_ids(stage_ids.float(), STAGES),
            lambda: ops.narrow_stage_ids(stage_ids, 65),
            lambda: ops.narrow_stage_ids(stage_ids, -1),
        ],
    }
    for name, calls in wrong.items():
        for number, wrong_call in enumerate(calls):
            try:
                wrong_call()
            except (ValueError, TypeError) as error:
                assert name in str(error), (name, number, str(error))  # noqa: PT017  (the loop says which call it was)
            else:
                pytest.fail(f"call {number} of {name} was accepted")
    assert y.count_nonzero() == 0


def test_primitives_refuse_illegal_ids_too(cpu):
    a = good()
    z, bad = torch.zeros(T, 2 * RANK), ids(0, 0, 2**32)
    for wrong_call in (
        lambda: cpu.ops.lora_shrink(a["x"], a["lora_A"], bad, a["scales"], True),
        lambda: cpu.ops.lora_expand(z, a["lora_B"], bad, True),
        lambda: cpu.ops.lora_wgrad(z, a["x"], bad, STAGES, True, False, torch.float32),
        lambda: cpu.ops.linear_backward(
            torch.zeros(T, N), None, None, a["lora_A"], a["lora_B"], bad, a["scales"], True, [True, False, False]
        ),
        lambda: cpu.ops.narrow_stage_ids(bad, STAGES),
    ):
        with pytest.raises(ValueError, match="4294967296"):
            wrong_call()


def test_no_output_is_half_written(cpu):
    case = make_case(200, 24, 16, 8, 2)
    y, before = case.grad_y.clone(), case.grad_y.clone()
    bad = case.stage_ids.clone()
    bad[-1] = 2
    with pytest.raises(ValueError, match="stage_ids"):
        cpu.ops.lora_add_(y, case.x, case.lora_A, case.lora_B, bad, case.scales, True)
    assert_same_bits({"y": y}, {"y": before})
    leaf = case.lora_A.detach().requires_grad_()
    with pytest.raises(ValueError, match="stage_ids"):
        cpu.lora_delta(case.x, leaf, case.lora_B, bad, case.scales)
    assert leaf.grad is None


def test_adding_into_one_of_the_arguments(backend):
    """y that is x itself: refused, or as if x had been copied first."""
    case = make_case(70, 24, 24, 8, 2).to(backend.device)
    expected = case.x.clone()
    adapters = (case.lora_A, case.lora_B, case.stage_ids, case.scales, True)
    backend.ops.lora_add_(expected, case.x.clone(), *adapters)
    aliased = case.x.clone()
    try:
        backend.ops.lora_add_(aliased, aliased, *adapters)
    except (ValueError, RuntimeError) as error:
        assert "y" in str(error)
    else:
        assert torch.equal(aliased, expected)


def test_adding_into_an_expanded_y(backend):
    """Rows that share memory cannot each receive their own sum."""
    case = make_case(20, 24, 16, 8, 2).to(backend.device)
    y = torch.zeros(1, 16, device=backend.device).expand(20, 16)
    with pytest.raises((ValueError, RuntimeError)):
        backend.ops.lora_add_(y, case.x, case.lora_A, case.lora_B, case.stage_ids, case.scales, True)
