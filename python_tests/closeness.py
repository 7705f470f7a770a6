"""The one rule of closeness. No other tolerance stands anywhere in the tests.

    error(got) ≤ factor · error(plain PyTorch) + one unit in the last place of the dtype

measured twice: by the Frobenius norm, and by the largest element against the truth's largest. The truth is reference.py
in float64; plain PyTorch is reference.py on the same inputs in the same dtype, so the rule asks how much worse than the
obvious program we are. The factor is 2 for values and 3 for gradients. Inf and NaN stand exactly where the truth has
them. Float64 itself has no truth above it: there gradcheck judges, and integers (cases.integer_case) without rounding.
"""

import torch

FORWARD = 2
GRADIENT = 3


def assert_close(name, got, plain, truth, *, factor=FORWARD, unit_dtype=None):
    """got and plain in the tested dtype, truth in float64.

    unit_dtype: whose last place is meant, where that is not got's dtype: the gradient of a float32 master is made from
    values of 16 bits.
    """
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    _assert_same_pattern(name, got, truth)

    finite = truth.isfinite()
    unit = torch.finfo(unit_dtype or got.dtype).eps
    got, plain, truth = (tensor.double()[finite] for tensor in (got, plain, truth))
    if truth.numel() == 0:
        return
    for norm, order in (("Frobenius norm", 2), ("largest element", torch.inf)):
        size = torch.linalg.vector_norm(truth, order)
        error = torch.linalg.vector_norm(got - truth, order)
        allowed = factor * torch.linalg.vector_norm(plain - truth, order) + unit * size
        assert error <= allowed, (
            f"{name}: error {error:.3g} by {norm}, allowed {allowed:.3g} (truth has {size:.3g}); "
            f"largest at element {(got - truth).abs().argmax().item()} of {got.numel()} finite ones"
        )


def _assert_same_pattern(name, got, truth):
    for kind, where in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        wrong = (where(got) != where(truth)).nonzero()
        assert len(wrong) == 0, (
            f"{name}: {kind} differs from the truth at {len(wrong)} elements, first {wrong[0].tolist()}: "
            f"got {got[tuple(wrong[0])].item()}, expected {truth[tuple(wrong[0])].item()}"
        )
