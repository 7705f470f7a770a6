"""Randomness of data, keyed by what it is for and never by a process's generator: a resumed run draws what the
uninterrupted one did, and two processes draw what one does.

    keyed.uniform("skip", seed, epoch, row, "response", "analysis")
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def bits(*key) -> int:
    """64 bits that depend on the key (strings, numbers, tuples of them) alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def uniform(*key) -> float:
    """A number in [0, 1)."""
    return (bits(*key) >> 11) / 2**53


def integer(below: int, *key) -> int:
    """A whole number in 0..below-1."""
    return bits(*key) % below


def draw(items: Sequence[Item], most: int | None, key_of: Callable[[Item], tuple]) -> list[Item]:
    """At most so many of the items (None: all), drawn by their keys, in their own order."""
    ranked = sorted(range(len(items)), key=lambda place: bits(*key_of(items[place])))
    return [items[place] for place in sorted(ranked[:most])]


def generator(*key) -> torch.Generator:
    """A CPU generator of one's own, for draws of many numbers."""
    return torch.Generator().manual_seed(bits(*key) >> 1)
