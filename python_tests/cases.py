"""Problems for the op: named workloads of stage ids, hostile memory layouts, and the judgement of a backend on them.

Every tensor lies inside a larger buffer of NaN (ids: of illegal ids), so that whoever reads beyond it shows.
"""

from dataclasses import dataclass, fields, replace

import torch
from closeness import FORWARD, GRADIENT, assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID_DTYPES = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
WORKLOADS = (
    "one_stage",
    "runs",
    "alternating",
    "random",
    "one_token",
    "empty_stage",
    "all_base",
    "all_shared",
    "packed",
)
LAYOUTS = ("contiguous", "gapped", "odd", "transposed", "expanded", "batched")
PARAMETERS = ("x", "weight", "bias", "lora_A", "lora_B")
ADAPTERS = ("x", "lora_A", "lora_B")
ILLEGAL_ID = 99
# Mixing weight · alpha / r as users have them: 32/24 is not representable in bf16, so a rounded scale shows.
SCALES = (32 / 24, 0.5, 1.0, 0.65, 2.0, 0.3)


@dataclass(frozen=True)
class Case:
    """One call of the op, and the gradient that arrives at its output."""

    x: torch.Tensor  # [..., K]
    weight: torch.Tensor  # [N, K]
    bias: torch.Tensor | None  # [N]
    lora_A: torch.Tensor  # [E, r, K]
    lora_B: torch.Tensor  # [E, N, r]
    stage_ids: torch.Tensor  # [...]
    scales: torch.Tensor  # [E] float32
    shared: bool
    grad_y: torch.Tensor  # [..., N]

    def to(self, device):
        """On the device, with the same strides; the buffers around the tensors go along."""
        return self.map(lambda tensor: _to_device(tensor, device))

    def but(self, **changes):
        return replace(self, **changes)

    def map(self, change):
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shared"}
        return self.but(**{name: None if t is None else change(t) for name, t in tensors.items()})

    def in_float64(self):
        """The case of the truth: masters are rounded to x's dtype first, since that is what is computed with."""
        masters = {name: getattr(self, name).to(self.x.dtype) for name in ("lora_A", "lora_B")}
        wide = self.but(**masters).map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return wide.but(scales=self.scales)

    def arguments(self, call="mote_linear"):
        names = ["x", "weight", "bias", "lora_A", "lora_B", "stage_ids", "scales"]
        if call == "lora_delta":
            names = [name for name in names if name not in ("weight", "bias")]
        return [getattr(self, name) for name in names]


def make_case(
    num_tokens,
    num_in,
    num_out,
    rank,
    num_stages,
    shared=True,
    *,
    dtype=torch.float32,
    workload="random",
    layout="contiguous",
    grad_layout="contiguous",
    masters=False,
    bias=True,
    seed=0,
):
    """masters: lora_A and lora_B in float32 whatever the dtype of x."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0):
        return torch.randn(*shape, generator=generator) * size

    num_experts = num_stages + 1 if shared else num_stages
    ids = make_stage_ids(workload, num_tokens, num_stages, generator)
    lora_dtype = torch.float32 if masters else dtype
    x = in_layout(normal(num_tokens, num_in).to(dtype), layout)
    grad_y = in_layout(normal(num_tokens, num_out).to(dtype), grad_layout)
    if x.dim() != grad_y.dim():
        grad_y = grad_y.reshape(*x.shape[:-1], num_out)
    return Case(
        x=x,
        weight=guarded(normal(num_out, num_in, size=num_in**-0.5).to(dtype)),
        bias=guarded(normal(num_out).to(dtype)) if bias else None,
        lora_A=guarded(normal(num_experts, rank, num_in, size=num_in**-0.5).to(lora_dtype)),
        lora_B=guarded(normal(num_experts, num_out, rank, size=rank**-0.5).to(lora_dtype)),
        stage_ids=guarded(ids.reshape(x.shape[:-1]), ILLEGAL_ID),
        scales=guarded(torch.tensor([SCALES[e % len(SCALES)] for e in range(num_experts)], dtype=torch.float32)),
        shared=shared,
        grad_y=grad_y,
    )


def integer_case(num_tokens, num_in, num_out, rank, num_stages, shared=True, *, dtype=torch.float32, seed=0, **options):
    """A case of sparse -1, 0, 1 in which every sum is a small integer: any order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(seed)

    def ternary(tensor):
        kept = torch.rand(tensor.shape, generator=generator) < 0.25
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        return guarded((kept * signs).to(tensor.dtype))

    case = make_case(num_tokens, num_in, num_out, rank, num_stages, shared, dtype=dtype, seed=seed, **options)
    values = {name: getattr(case, name) for name in (*PARAMETERS, "grad_y") if getattr(case, name) is not None}
    scales = torch.tensor([(1.0, 2.0, -1.0)[e % 3] for e in range(len(case.scales))])
    return case.but(scales=scales, **{name: ternary(tensor) for name, tensor in values.items()})


def make_stage_ids(workload, num_tokens, num_stages, generator):
    """[T] int32. A stage where there are none is the shared expert alone."""
    token = torch.arange(num_tokens)
    ids = {
        "one_stage": lambda: torch.full_like(token, num_stages // 2),
        "runs": lambda: token * (num_stages + 2) // max(num_tokens, 1) - 2,
        "alternating": lambda: token % max(num_stages, 1),
        "random": lambda: torch.randint(-2, max(num_stages, 1), (num_tokens,), generator=generator),
        "one_token": lambda: torch.where(token == num_tokens - 1, num_stages - 1, -2),
        "empty_stage": lambda: torch.randint(1, max(num_stages, 2), (num_tokens,), generator=generator),
        "all_base": lambda: torch.full_like(token, -2),
        "all_shared": lambda: torch.full_like(token, -1),
        "packed": lambda: _packed_chains(num_tokens, num_stages),
    }[workload]()
    return torch.where(ids >= num_stages, -1, ids).to(torch.int32)


def _packed_chains(num_tokens, num_stages):
    """Chains of growing length one after the other: a prompt, then each stage, then one padding token."""
    ids = []
    length = 1
    while len(ids) < num_tokens:
        ids += [-1] * length
        for stage in range(num_stages):
            ids += [stage] * (length + stage)
        ids += [-2]
        length = length * 2 + 1
    return torch.tensor(ids[:num_tokens], dtype=torch.int64)


def guarded(tensor, fill=float("nan")):
    """The same values, contiguous, in the middle of a buffer of `fill`; aligned to 64 bytes on either side."""
    pad = 64 // tensor.element_size()
    buffer = torch.full((tensor.numel() + 2 * pad,), fill, dtype=tensor.dtype)
    inside = buffer[pad : pad + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def in_layout(matrix, layout):
    """A [T, D] matrix in other memory; "expanded" repeats its first row, "batched" is 3-D and permuted."""
    num_rows, num_columns = matrix.shape
    if layout == "contiguous":
        return guarded(matrix)
    if layout == "transposed":
        return guarded(matrix.t()).t()
    if layout == "expanded":
        return guarded(matrix[:1]).expand(num_rows, num_columns)
    if layout == "batched":
        outer = next((d for d in range(2, num_rows) if num_rows % d == 0), 1)
        return guarded(matrix.reshape(outer, num_rows // outer, num_columns).transpose(0, 1)).transpose(0, 1)
    # A column slice of a wider matrix of NaN: "gapped" keeps rows aligned to 16 bytes, "odd" does not.
    before, after = {"gapped": (8, -num_columns % 8 + 8), "odd": (1, 2)}[layout]
    return guarded(torch.nn.functional.pad(matrix, (before, after), value=float("nan")))[
        :, before : before + num_columns
    ]


def _to_device(tensor, device):
    if tensor.device.type == torch.device(device).type:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run(op, case, call="mote_linear", wanted=None):
    """{"y": ..., "grad x": ..., ...}: the op on the case and the gradients of the wanted tensors."""
    if wanted is None:
        wanted = PARAMETERS if call == "mote_linear" else ADAPTERS
    wanted = [name for name in wanted if getattr(case, name) is not None]
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in wanted}
    y = getattr(op, call)(*case.but(**leaves).arguments(call), shared=case.shared)
    grad_y = case.grad_y.to(y.dtype)
    # With E = 0 the reference uses neither adapter: their gradients are empty, not missing.
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y, materialize_grads=True) if leaves else []
    return {"y": y.detach()} | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def judge(op, case, call="mote_linear", wanted=None):
    """Holds the op to the rule of closeness, forward and backward; returns what it gave."""
    from mote_ext import reference

    got = run(op, case, call, wanted)
    plain = run(reference, case, call, wanted)
    truth = run(reference, case.in_float64(), call, wanted)
    for name in got:
        factor = FORWARD if name == "y" else GRADIENT
        assert_close(name, got[name], plain[name], truth[name], factor=factor, unit_dtype=case.x.dtype)
    return got


def judge_exactly(op, case, call="mote_linear"):
    """For a case of integers: no rounding anywhere, so that not one token or element may differ from the truth."""
    from mote_ext import reference

    got, truth = run(op, case, call), run(reference, case.in_float64(), call)
    for name, expected in truth.items():
        largest = 2 / torch.finfo(case.x.dtype).eps
        assert expected.numel() == 0 or expected.abs().max() <= largest, f"{name} is not exact: choose a smaller case"
        assert torch.equal(got[name].double(), expected), name


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert bits(got[name]).equal(bits(expected[name])), f"{name} is not bit for bit the same"


def bits(tensor):
    """The same memory as integers: NaN equals NaN, and -0 is not 0."""
    sized = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sized[tensor.element_size()])
