"""Products of few rows with the plain linear layers of a model on the CPU, through ops.skinny_linear while switched on.

Decoding multiplies a few rows with every weight of the model; the kernels of libraries are made for many rows and take
up to three times what reading the weight takes. A row's bits then depend on nothing beside it, and are not those of
torch's product. Used by the engine, and by anyone around generate().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mote_ext import ops

MOST_ROWS = 64  # with more of them torch's product is as good or better (measured on AVX2)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def skinny_linears(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, `with mote_ext.skinny_linears(model):`, the model's linear layers are quicker for up to 64 rows.

    Meant for generate() on a CPU: of any model, in float32, float16 or bfloat16, for as long as no gradient is wanted.
    Logits differ from torch's by rounding, and not at all between one row alone and the same row in a batch of up to
    64 rows, as far as linear layers go. Layers it does not know (quantised ones, for example) compute as always.
    """
    return SkinnyLinears(model).switched_on()


class SkinnyLinears:
    """The layers of a model that are nn.Linear and nothing else, those inside of MoTELinear among them.

    Left out: other classes (quantised, Conv1D, sharded), layers whose forward somebody replaced (offloading does
    that), weights on another device or in float64.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards = [(layer.__dict__, partial(_forward, layer)) for layer in model.modules() if _is_plain(layer)]

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Inside, the layers compute few rows by ops.skinny_linear; afterwards each has its own forward again."""
        own = [pair for pair in self._forwards if "forward" not in pair[0]]  # switched on already, or replaced since
        try:
            for attributes, forward in own:
                attributes["forward"] = forward
            yield
        finally:
            for attributes, _ in own:
                attributes.pop("forward", None)


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype in _DTYPES


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    is_few = x.numel() <= MOST_ROWS * x.shape[-1] and x.dtype == weight.dtype and x.device == weight.device
    if not is_few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return ops.skinny_linear(x, weight, bias)
