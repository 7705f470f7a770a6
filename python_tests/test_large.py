"""More than 2**31 elements in one tensor: every row offset must be 64 bits wide. On a card only, a few GiB each.

Each case looks at the first and the last tokens; what lies between is one repeated row. An index that wraps reads or
writes somewhere else, so the last rows would differ from the same rows computed alone by the reference.
"""

import pytest
import torch
from closeness import GRADIENT, assert_close

from mote_ext import reference

LIMIT = 2**31
DTYPE = torch.bfloat16


@pytest.fixture
def free_memory(cuda):
    def require(gib):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.0f} are free")

    yield require
    torch.cuda.empty_cache()


def normal(*shape, size=1.0):
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=DTYPE) * size


def problem(num_tokens, num_in, num_out, rank):
    """x, A, B, ids, scales; all tokens alike and SHARED_ONLY but for the first and the last 200, of two stages."""
    x = torch.ones(num_tokens, num_in, device="cuda", dtype=DTYPE)
    x[:200], x[-200:] = normal(200, num_in), normal(200, num_in).flip(0)
    ids = torch.full((num_tokens,), -1, device="cuda", dtype=torch.int32)
    ids[:200], ids[-200:] = 0, 1
    scales = torch.tensor([0.5, 4 / 3, 0.25], device="cuda")
    return x, normal(3, rank, num_in, size=num_in**-0.5), normal(3, num_out, rank, size=rank**-0.5), ids, scales


def assert_ends(y, x, lora_A, lora_B, ids, scales):
    for rows in (slice(0, 200), slice(-200, None)):
        wide = [t.double() for t in (x[rows], lora_A, lora_B)]
        plain = reference.lora_delta(x[rows], lora_A, lora_B, ids[rows], scales)
        assert_close("y", y[rows], plain, reference.lora_delta(*wide, ids[rows], scales))
    middle = y[200:-200]
    assert torch.equal(middle[0], middle[-1])


# T, K, N, r: more than 2**31 elements in x; in y; in z.
@pytest.mark.parametrize(
    "sizes, gib",
    [
        ((LIMIT // 16384 + 300, 16384, 64, 8), 14),
        ((LIMIT // 16384 + 300, 64, 16384, 8), 14),
        ((2**23 + 300, 8, 8, 128), 14),
    ],
    ids=["x", "y", "z"],
)
def test_forward(cuda, free_memory, sizes, gib):
    free_memory(gib)
    x, lora_A, lora_B, ids, scales = problem(*sizes)
    assert max(x.numel(), sizes[0] * sizes[2], sizes[0] * 2 * sizes[3]) > LIMIT
    with torch.no_grad():
        y = cuda.lora_delta(x, lora_A, lora_B, ids, scales)
        assert_ends(y, x, lora_A, lora_B, ids, scales)
        cuda.ops.lora_add_(y, x, lora_A, lora_B, ids, scales, True)
        assert torch.equal(y[-1:].isfinite().all(), torch.tensor(True, device="cuda"))


@pytest.mark.parametrize(
    "sizes, gib", [((LIMIT // 16384 + 300, 16384, 64, 8), 24), ((2**23 + 300, 8, 8, 128), 30)], ids=["x", "z"]
)
def test_backward(cuda, free_memory, sizes, gib):
    """The gradient arrives at the first and the last tokens only, so their reference is a small problem."""
    free_memory(gib)
    x, lora_A, lora_B, ids, scales = problem(*sizes)
    ends = torch.cat([torch.arange(200), torch.arange(sizes[0] - 200, sizes[0])]).cuda()
    grad_y = torch.zeros(sizes[0], sizes[2], device="cuda", dtype=DTYPE)
    grad_y[ends] = normal(400, sizes[2])
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    got = torch.autograd.grad(cuda.lora_delta(*leaves, ids, scales), leaves, grad_y)

    def at_the_ends(dtype):
        few = [t.detach().to(dtype).requires_grad_() for t in (x[ends], lora_A, lora_B)]
        delta = reference.lora_delta(*few, ids[ends], scales)
        return torch.autograd.grad(delta, few, grad_y[ends].to(dtype))

    names = ("grad x", "grad lora_A", "grad lora_B")
    results = zip(names, (got[0][ends], *got[1:]), at_the_ends(DTYPE), at_the_ends(torch.float64), strict=True)
    for name, value, plain, truth in results:
        assert_close(name, value, plain, truth, factor=GRADIENT)
    assert got[0][200:-200].count_nonzero() == 0


def test_experts_beyond_the_limit(cuda, free_memory):
    """65 experts of rank 256 over K = 131072: an expert's offset alone passes 2**31."""
    free_memory(16)
    num_experts, rank, num_in = 65, 256, 131072
    assert num_experts * rank * num_in > LIMIT
    lora_A = torch.zeros(num_experts, rank, num_in, device="cuda", dtype=DTYPE)
    lora_A[63], lora_A[64] = 1, 2
    x = torch.zeros(20, num_in, device="cuda", dtype=DTYPE)
    x[:, -1] = 1
    ids = torch.full((20,), 63, device="cuda")
    z = cuda.ops.lora_shrink(x, lora_A, ids, torch.ones(num_experts, device="cuda"), True)
    assert torch.equal(z[:, :rank], torch.ones_like(z[:, :rank]))
    assert torch.equal(z[:, rank:], torch.full_like(z[:, rank:], 2))
