"""The op as torch knows it: public functions and fake kernels.

    y[t] = x[t] Wᵀ + bias + Σ_e scales[e] · B[e] A[e] x[t]      over the experts e of token t

Hop 1 of four: this file records (schemas, gradient and autocast live beside the kernels in csrc/binding), the binding
checks and allocates, the launcher chooses tiles, the kernel computes. Truth: reference.py.
Source: MoTE, arXiv 2405.00557, section 3.2. Used by linear.py and by anyone who wants only the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mote_ext import _C  # noqa: F401  (importing it registers torch.ops.mote_ext)

_linear = torch.ops.mote_ext.linear.default
_lora_add_ = torch.ops.mote_ext.lora_add_.default
_skinny_linear = torch.ops.mote_ext.skinny_linear.default
_paged_attention_ = torch.ops.mote_ext.paged_attention_.default
narrow_stage_ids = torch.ops.mote_ext.narrow_stage_ids.default  # (ids of any integer dtype, S) -> int32, range-checked


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
    """y[t] = x[t] Wᵀ + bias + Σ_e scales[e] · B[e] A[e] x[t] over the experts of token t.

    The experts of a token with id 0..S-1 are that stage's and, with `shared`, the shared one, which is the last slice;
    of SHARED_ONLY (-1) the shared one alone; of BASE_ONLY (-2) none.

    x:         [..., K]   float32 | float16 | bfloat16 (float64 on the CPU), any strides
    weight:    [N, K]     dtype of x
    bias:      [N]        dtype of x, or None
    lora_A:    [E, r, K]  dtype of x, or float32 masters, rounded to the dtype of x for the product; r in 1..256
    lora_B:    [E, N, r]  likewise; E = S + 1 with `shared`, E = S without; S in 0..64
    stage_ids: [...]      any integer dtype, one id a token
    scales:    [E]        float32, constants: mixing weight · alpha / r
    returns:   [..., N]   dtype of x, or the autocast dtype; accumulated in float32

    Differentiable once in x, weight, bias, lora_A and lora_B; gradients have their tensor's dtype, those of a stage
    without tokens are zeros. The same input gives the same bits. On a GPU nothing is read back: an illegal id makes
    its token's row NaN there, or raises with the environment variable MOTE_DEBUG=1.

    ValueError: shapes, devices, ranks or ids do not fit; TypeError: a dtype or a layout. Both name the tensor.
    Truth: reference.mote_linear. Kernels: csrc/lora. Source: MoTE, arXiv 2405.00557, section 3.2.
    """
    if weight is None:
        raise ValueError("mote_linear: weight is required, got None; lora_delta computes the experts' part alone")
    return _call("mote_linear", x, weight, bias, None, lora_A, lora_B, stage_ids, scales, shared)


def lora_delta(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, stage_ids: Tensor, scales: Tensor, *, shared: bool = True
) -> Tensor:
    """d[t] = Σ_e scales[e] · B[e] A[e] x[t] over the experts of token t: mote_linear without its base.

    Shapes, dtypes, ids, gradients and errors as in mote_linear; rows of BASE_ONLY tokens are zero.

    x:       [..., K]
    returns: [..., N]  dtype of x, or the autocast dtype; accumulated in float32, rounded once
    Truth: reference.lora_delta. Kernels: csrc/lora/shrink.cuh, expand.cuh, wgrad.cuh.
    """
    return _call("lora_delta", x, None, None, None, lora_A, lora_B, stage_ids, scales, shared)


def lora_add(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, stage_ids: Tensor, scales: Tensor, *, shared: bool = True
) -> Tensor:
    """y + lora_delta(x, …) in one pass: for a base that is not a plain linear, such as a quantised one.

    y:       [..., N]  dtype of x; differentiable too, never written
    returns: [..., N]  dtype of x, rounded once
    Everything else as in mote_linear.
    """
    return _call("lora_add", x, None, None, y, lora_A, lora_B, stage_ids, scales, shared)


def lora_add_(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, stage_ids: Tensor, scales: Tensor, *, shared: bool = True
) -> Tensor:
    """y += lora_delta(x, …) in place, for inference; returns y. RuntimeError when differentiated: use lora_add."""
    try:
        _lora_add_(y, x, lora_A, lora_B, stage_ids, scales, shared)
    except Exception:
        _require_dense("lora_add_", x, y, None, lora_A, lora_B, stage_ids, scales)
        raise
    return y


def paged_attention_(
    out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, page_tables: Tensor, rows: Tensor, *,
    page_size: int, scale: float, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of some rows of a flat batch over keys and values in pages, written into out; CPU, without a gradient.

    out:         [T, H, D'] float32; tokens of no row keep what they have
    queries:     [T, H, D] float32; query heads h share key head h // (H / H')
    keys:        [slots, H', D], values: [slots, H', D']  float32, float16 or bfloat16; page p has the slots from
                 p * page_size on
    page_tables: [·, P] int32, the pages of each request in order
    rows:        [R, 4] int64: row of page_tables, first query token, query tokens, keys; the last token is the last key
    window:      keys a token sees, itself included; 0: all before it. softcap: of the scores; 0: none
    returns:     out. Accumulated in float32; a token's bits do not depend on the rest of the batch
    ValueError, TypeError: shapes, dtypes, or a page that does not exist. RuntimeError when differentiated.
    Source: PagedAttention, arXiv 2309.06180.
    """
    _paged_attention_(out, queries, keys, values, page_tables, rows, page_size, scale, window, softcap)
    return out


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t] = x[t] Wᵀ + bias for few rows, bound by reading the weight; CPU, without a gradient.

    x:       [..., K] float32 | float16 | bfloat16, any strides, K >= 1
    weight:  [N, K]   dtype of x; bias: [N] dtype of x, or None
    returns: [..., N] dtype of x. Accumulated in float32, rounded once; a row's bits depend neither on the other rows
             nor on the number of threads. Any number of rows is right; in float32 it is quick for up to some 64.
    ValueError: shapes, devices. TypeError: dtypes. RuntimeError when differentiated: use torch's linear.
    """
    return _skinny_linear(x, weight, bias)


def _call(name, x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared) -> Tensor:
    try:
        return _linear(x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared)[0]
    except Exception:  # only now, as looking at seven tensors takes longer than a small product
        _require_dense(name, x, addend if weight is None else weight, bias, lora_A, lora_B, stage_ids, scales)
        raise


def _require_dense(call, x, weight_or_y, bias, lora_A, lora_B, stage_ids, scales) -> None:
    """Refuses what torch does not route to the checks in C++: no tensors, sparse ones, tensors of several devices."""
    given = (x, lora_A, lora_B, stage_ids, scales, weight_or_y, bias)
    for position, tensor in enumerate(given):
        if tensor is None and position >= 5:
            continue
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_quantized
        if dense and tensor.device == x.device:
            continue
        names = ("x", "lora_A", "lora_B", "stage_ids", "scales", "y" if "add" in call else "weight", "bias")
        if dense:
            raise ValueError(f"{call}: {names[position]} must be on {x.device} like x, got {tensor.device}")
        got = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{call}: {names[position]} must be a dense, unquantized torch.Tensor, got {got}")


def register_fakes(namespace: str) -> None:
    """Gives the ops of this torch namespace their fake kernels: sizes, dtypes and strides of the outputs."""

    def fake(name):
        return torch.library.register_fake(f"{namespace}::{name}")

    @fake("linear")
    def _(x, weight, bias, addend, lora_A, lora_B, stage_ids, scales, shared):
        call = "mote_linear" if weight is not None else "lora_delta" if addend is None else "lora_add"
        _require_dense(call, x, addend if weight is None else weight, bias, lora_A, lora_B, stage_ids, scales)
        leading, halves = list(x.shape[:-1]), 2 if shared else 1
        return x.new_empty(leading + [lora_B.shape[1]]), x.new_empty(leading + [halves * lora_A.shape[1]])

    @fake("lora_add_")
    def _(y, x, lora_A, lora_B, stage_ids, scales, shared):
        return None

    @fake("lora_shrink")
    def _(x, lora_A, stage_ids, scales, shared):
        return x.new_empty(list(x.shape[:-1]) + [(2 if shared else 1) * lora_A.shape[1]])

    @fake("lora_expand")
    def _(z, lora_B, stage_ids, shared, bias=None, addend=None):
        return z.new_empty(list(z.shape[:-1]) + [lora_B.shape[1]])

    @fake("lora_wgrad")
    def _(narrow, wide, stage_ids, num_stages, shared, transposed, dtype):
        rank = narrow.shape[-1] // (2 if shared else 1)
        tail = [wide.shape[-1], rank] if transposed else [rank, wide.shape[-1]]
        return wide.new_empty([num_stages + (1 if shared else 0)] + tail, dtype=dtype)

    @fake("linear_backward")
    def _(dy, x, z, lora_A, lora_B, stage_ids, scales, shared, wanted):
        sizes = [*dy.shape[:-1], lora_A.shape[2]], lora_A.shape, lora_B.shape
        dtypes = dy.dtype, lora_A.dtype, lora_B.dtype
        return [dy.new_empty(s, dtype=dtype) for s, dtype, is_wanted in zip(sizes, dtypes, wanted) if is_wanted]

    @fake("narrow_stage_ids")
    def _(stage_ids, num_stages):
        return stage_ids.new_empty(stage_ids.shape, dtype=torch.int32)


register_fakes("mote_ext")


@torch.library.register_fake("mote_ext::paged_attention_")
def _(out, queries, keys, values, page_tables, rows, page_size, scale, window, softcap):
    return None


@torch.library.register_fake("mote_ext::skinny_linear")
def _(x, weight, bias=None):
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"skinny_linear: {name} must be on {x.device} like x, got {tensor.device}")
    return x.new_empty([*x.shape[:-1], weight.shape[0]])
