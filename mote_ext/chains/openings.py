"""Openings that many requests share: their keys and values, run once, as the beginning of a cache of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(frozen=True)
class Opening:
    """ids and, a layer each, keys and values [1, heads, len(ids), size]."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]


class RoomyLayer(DynamicLayer):
    """A cache layer with room for the tokens to come, so that a step writes its own and copies nothing.

    transformers' own layer copies everything at each step: a fifth of the time with openings of a few hundred tokens.
    keys, values: [B, heads, T, size]; room: tokens to come
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._all_keys, self._all_values = (functional.pad(given, (0, 0, 0, room)) for given in (keys, values))
        self._show(keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T + t, size] with those of t more tokens."""
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        self._all_keys[:, :, begin:end] = key_states
        self._all_values[:, :, begin:end] = value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]


def cache_of(openings: Sequence[Opening], room: int) -> DynamicCache:
    """A cache with a row for each opening, padded on the left to the longest, and room for so many tokens more."""
    width = max(len(opening.ids) for opening in openings)
    distinct = list({id(opening): opening for opening in openings}.values())
    numbers = {id(opening): number for number, opening in enumerate(distinct)}
    rows = torch.tensor([numbers[id(opening)] for opening in openings], device=distinct[0].layers[0][0].device)
    cache = DynamicCache()
    for layer in range(len(distinct[0].layers)):
        padded = (
            torch.cat(
                [
                    functional.pad(opening.layers[layer][which], (0, 0, width - len(opening.ids), 0))
                    for opening in distinct
                ]
            ).index_select(0, rows)
            for which in (0, 1)
        )
        cache.layers.append(RoomyLayer(*padded, room))
    return cache
