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

from mote_ext import ops

# With more rows torch's float32 product is as good or better (measured on AVX2). In 16 bits the limit lies higher where
# the processor has no such products, and may lie lower where it has.
MOST_ROWS = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def skinny_linears(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, `with mote_ext.skinny_linears(model):`, the model's linear layers are quicker for up to 64 rows.

    Meant for generate() on a CPU: of any model, in float32, float16 or bfloat16, for as long as no gradient is wanted.
    Logits differ from torch's by rounding, and not at all between one row alone and the same row in a batch of up to
    64 rows, as far as linear layers go. Layers it does not know (quantised ones, for example) compute as always.
    One thread at a time; a copy of the model that is made inside keeps the kernel.
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
            for attributes, forward in own:
                if attributes.get("forward") is forward:  # and not what somebody has put there since
                    del attributes["forward"]


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in module.__dict__ and _has_plain_weight(module)


def _has_plain_weight(layer: nn.Linear) -> bool:
    """Now: pruning, quantising and casting change it in place."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or "bias" not in layer._parameters:
        return False
    return weight.is_cpu and weight.dtype in _DTYPES and weight.layout is torch.strided


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    is_few = 0 < x.numel() <= MOST_ROWS * x.shape[-1] and type(x) in (Tensor, nn.Parameter) and x.is_cpu
    differs = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if not is_few or differs or not _has_plain_weight(layer) or x.dtype != layer._parameters["weight"].dtype:
        return nn.Linear.forward(layer, x)
    return ops.skinny_linear(x, layer._parameters["weight"], layer._parameters["bias"])
