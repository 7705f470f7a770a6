"""PagedCache: keys and values of every layer in pages of a fixed number of tokens.

    slot = page · page_size + offset        keys[layer][slot] is one token's key, of whichever request owns the page

The scheduler decides who owns which page; here are only the tensors. A layer may have other heads than its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_CPU_BYTES = 1 << 30  # reserved, not touched before it is used
DEFAULT_GPU_SHARE = 0.8  # of what the model leaves free; the rest is for activations


class LayerShape(NamedTuple):
    """Heads of one layer's keys and values, and their sizes."""

    num_heads: int
    key_size: int
    value_size: int


class PagedCache:
    """num_pages pages of page_size tokens for every layer, and a spare one behind them that no request ever owns.

    shapes: layer -> LayerShape
    dtype:  what is stored; what attention reads is converted back
    keys, values: layer -> [(num_pages + 1) * page_size, heads, size]
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages, self.page_size, self.dtype, self.device = num_pages, page_size, dtype, device
        self.shapes: dict[int, LayerShape] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for layer, shape in shapes.items():
            self.add_layer(layer, shape)

    def add_layer(self, layer: int, shape: LayerShape) -> None:
        slots = (self.num_pages + 1) * self.page_size
        options = {"dtype": self.dtype, "device": self.device}
        self.shapes[layer] = shape
        self.keys[layer] = torch.empty(slots, shape.num_heads, shape.key_size, **options)
        self.values[layer] = torch.empty(slots, shape.num_heads, shape.value_size, **options)
        for tensor in (self.keys[layer], self.values[layer]):
            tensor[-self.page_size :] = 0  # the spare page

    def add_layer_under_way(self, layer: int, shape: LayerShape) -> None:
        """In a forward, whose pages were cleared before this layer was known."""
        self.add_layer(layer, shape)
        self.keys[layer].zero_()
        self.values[layer].zero_()

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [T, heads, size] into slots [T] int64."""
        self.keys[layer].index_copy_(0, slots, key.to(self.dtype))
        self.values[layer].index_copy_(0, slots, value.to(self.dtype))

    def read(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [N * page_size, heads, size] of pages [N] int64. Whole pages: slot by slot takes 5 times as
        long on a CPU."""
        keys, values = (t[layer].unflatten(0, (-1, self.page_size)) for t in (self.keys, self.values))
        return keys.index_select(0, pages).flatten(0, 1).to(dtype), values.index_select(0, pages).flatten(0, 1).to(
            dtype
        )

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Whole pages [C] int64, in every layer."""
        for tensor in self._paged():
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    def clear_pages(self, pages: Tensor) -> None:
        """Zeros in these pages [N], which are about to get their first token.

        NOTE: attention reads whole pages and gives what is not there a weight of 0, and 0 · NaN is NaN: what an earlier
        owner left behind must be a number.
        """
        for tensor in self._paged():
            tensor.index_fill_(0, pages, 0)

    def _paged(self) -> Iterator[Tensor]:
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                yield tensor.unflatten(0, (-1, self.page_size))

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for ts in (self.keys, self.values) for t in ts.values())


def page_bytes(shapes: dict[int, LayerShape], page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    values = sum(shape.num_heads * (shape.key_size + shape.value_size) for shape in shapes.values())
    return values * page_size * dtype.itemsize


def default_num_pages(bytes_per_page: int, device: torch.device, most: int) -> int:
    """As many pages as fit into the default room, and no more than `most`, which all requests together can use."""
    room = DEFAULT_CPU_BYTES
    if device.type == "cuda":
        room = int(torch.cuda.mem_get_info(device)[0] * DEFAULT_GPU_SHARE)
    return max(1, min(most, room // bytes_per_page))
