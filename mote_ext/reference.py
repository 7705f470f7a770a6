"""The truth: the op in plain PyTorch, one expert after the other, in any floating dtype and on any device.

    z[t, e] = round(scales[e] · A[e] x[t])      d[t] = Σ_e B[e] z[t, e]      y[t] = W x[t] + bias + d[t]

over the experts e of token t. Every other implementation is judged by this file (python_tests/closeness.py). An expert
sees only the rows of its own tokens, forward and backward, so an Inf or NaN never reaches another expert's tokens; and
because everything is plain autograd, it is also what to use for double backward.

Sums are kept in float32 (float64 for float64); z is rounded to the dtype of x, and so is the output.
Source: MoTE, arXiv 2405.00557, section 3.2 (a shared and a stage expert, no gate).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def mote_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    stage_ids: Tensor,
    scales: Tensor,
    *,
    shared: bool = True,
) -> Tensor:
    """y[t] = W x[t] + bias + Σ_e scales[e] · B[e] A[e] x[t] over the experts of token t.

    x [..., K], weight [N, K], bias [N] or None; the rest as in lora_delta.   returns [..., N]
    """
    x = x.to(_compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return base + _delta("mote_linear", x, lora_A, lora_B, stage_ids, scales, shared)


def lora_delta(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, stage_ids: Tensor, scales: Tensor, *, shared: bool = True
) -> Tensor:
    """d[t] = Σ_e scales[e] · B[e] A[e] x[t] over the experts of token t; the rows of BASE_ONLY tokens are zero.

    x:         [..., K]   any floating dtype, any strides
    lora_A:    [E, r, K]  dtype of x, or float32 masters (rounded to the dtype of x; their gradients are not)
    lora_B:    [E, N, r]  as lora_A
    stage_ids: [...]      any integer dtype; 0..S-1, -1 = the shared expert alone, -2 = none
    scales:    [E]        float32
    shared:    the last of the E experts is the shared one: S = E - 1 stages, else S = E
    returns:   [..., N]   dtype of x, or the autocast dtype under autocast
    ValueError: an id outside [-2, S), ids of another shape than x.shape[:-1], shared=True without an expert.
    """
    x = x.to(_compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        return _delta("lora_delta", x, lora_A, lora_B, stage_ids, scales, shared)


def _delta(
    call: str, x: Tensor, lora_A: Tensor, lora_B: Tensor, stage_ids: Tensor, scales: Tensor, shared: bool
) -> Tensor:
    num_experts, _, num_in = lora_A.shape
    num_out = lora_B.shape[1]
    if shared and num_experts == 0:
        raise ValueError(f"{call}: lora_A must hold the shared expert, got E=0 (pass shared=False for no experts)")
    num_stages = num_experts - 1 if shared else num_experts
    ids = _checked_ids(call, stage_ids, x, num_stages).reshape(-1)

    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    tokens = x.reshape(-1, num_in).to(wide)
    delta = tokens.new_zeros(len(ids), num_out)
    for expert in range(num_experts):
        is_shared = shared and expert == num_experts - 1
        rows = (ids >= -1 if is_shared else ids == expert).nonzero().squeeze(1)
        A, B = (_Rounded.apply(lora[expert], dtype).to(wide) for lora in (lora_A, lora_B))
        z = (tokens.index_select(0, rows) @ A.mT * scales[expert].to(wide)).to(dtype)
        delta = delta.index_add(0, rows, z.to(wide) @ B.mT)
    return delta.to(dtype).reshape(*stage_ids.shape, num_out)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x, or autocast's where it is on; float64 is never cast down."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _checked_ids(call: str, stage_ids: Tensor, x: Tensor, num_stages: int) -> Tensor:
    dtype = stage_ids.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"{call}: stage_ids must be an integer tensor, got {dtype}")
    if stage_ids.shape != x.shape[:-1]:
        expected, got = list(x.shape[:-1]), list(stage_ids.shape)
        raise ValueError(f"{call}: stage_ids must be {expected}, one id a token of x {list(x.shape)}, got {got}")
    # NOTE: widened before any comparison (in uint8, 255 == -1 is true), and an unsigned id that then is negative has
    # wrapped: uint64 is not narrower than int64.
    ids = stage_ids.to(torch.int64)
    illegal = ((ids < (-2 if dtype.is_signed else 0)) | (ids >= num_stages)).nonzero()
    if len(illegal):
        position = illegal[0].tolist()
        value = stage_ids[tuple(position)].item()
        raise ValueError(f"{call}: stage_ids must be in [-2, S={num_stages}), got {value} at position {position}")
    return ids


class _Rounded(torch.autograd.Function):
    """Rounds float32 masters to the compute dtype and back; the gradient passes in the parameter's own dtype."""

    @staticmethod
    def forward(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype).to(tensor.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
