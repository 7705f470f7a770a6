"""Attention kernels that take rows of different lengths: our own on a CPU; on a GPU those that are installed and work.

Ours and flash-attn's read the pages where they lie; torch's varlen_attn reads keys gathered behind each other. They are
tried when an engine is built, on the model itself (probe.py); what raises or gives other logits is left out, and SDPA
over groups of rows (attention.py) always remains.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mote_ext import ops
from mote_ext.engine.attention import PagedBatch, attend_by_groups

Kernel = Callable[..., Tensor]


class Rows:
    """The rows of a batch as these kernels want them: cumulative int32 counts, and page tables."""

    def __init__(self, batch: PagedBatch) -> None:
        to = batch.to_device
        self.queries = to(np.concatenate(([0], np.cumsum(batch.counts))).astype(np.int32))
        self.keys = to(np.concatenate(([0], np.cumsum(batch.lengths))).astype(np.int32))
        self.most_queries, self.most_keys = int(batch.counts.max()), int(batch.lengths.max())
        self.page_tables = to(batch.page_tables.astype(np.int32))
        size = batch.cache.page_size
        pages = [table[: -(-length // size)] for table, length in zip(batch.page_tables, batch.lengths)]
        self.pages = to(np.concatenate(pages))
        begins = np.cumsum([0, *(len(own) * size for own in pages[:-1])])
        self.slots = to(np.concatenate([begin + np.arange(n) for begin, n in zip(begins, batch.lengths)]))


def kernels_for(device: torch.device, model_dtype: torch.dtype, cache_dtype: torch.dtype) -> list[Kernel | None]:
    """What to try, best first; None is SDPA."""
    if device.type == "cuda":
        found = [_flash_over_pages()] if model_dtype == cache_dtype else []
        found.append(_varlen_over_gathered())
    else:
        found = [_short_rows_over_pages] if torch.float64 not in (model_dtype, cache_dtype) else []
    return [kernel for kernel in found if kernel is not None] + [None]


class ShortRows:
    """Rows of few tokens as ops.paged_attention_ wants them."""

    def __init__(self, batch: PagedBatch) -> None:
        short = np.flatnonzero(batch.is_short)
        rows = np.stack((short, batch.starts[short], batch.counts[short], batch.lengths[short]), axis=1)
        self.rows = torch.from_numpy(rows.astype(np.int64))
        self.page_tables = torch.from_numpy(batch.page_tables.astype(np.int32))


def _short_rows_over_pages(queries: Tensor, layer: int, batch: PagedBatch, scale, window, softcap) -> Tensor:
    """Ours reads a row's keys once for every token, which is best for few of them; long rows stay with SDPA."""
    short, cache = batch.once(ShortRows), batch.cache
    size = cache.shapes[layer].value_size
    found = queries.new_empty(*queries.shape[:2], size, dtype=torch.float32)
    if len(short.rows):
        ops.paged_attention_(
            found, queries.float(), cache.keys[layer], cache.values[layer], short.page_tables, short.rows,
            page_size=cache.page_size, scale=scale, window=window or 0, softcap=softcap or 0.0,
        )  # fmt: skip
    found = found.to(queries.dtype)
    if batch.is_short.all():
        return found
    return attend_by_groups(queries, size, layer, batch, scale, window, softcap, found)


def _flash_over_pages() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(queries: Tensor, layer: int, batch: PagedBatch, scale, window, softcap) -> Tensor:
        rows, cache = batch.once(Rows), batch.cache
        keys, values = (t[layer].unflatten(0, (-1, cache.page_size)) for t in (cache.keys, cache.values))
        return flash_attn_varlen_func(
            queries.contiguous(), keys, values, rows.queries, rows.keys, rows.most_queries, rows.most_keys,
            softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, 0 if window else -1),
            softcap=softcap or 0.0, block_table=rows.page_tables,
        )  # fmt: skip

    return attend


def _varlen_over_gathered() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def attend(queries: Tensor, layer: int, batch: PagedBatch, scale, window, softcap) -> Tensor:
        if softcap is not None:
            raise ValueError("varlen_attn has no soft cap")
        rows = batch.once(Rows)
        read = batch.cache.read(layer, rows.pages, queries.dtype)
        keys, values = (tensor.index_select(0, rows.slots) for tensor in read)
        return varlen_attn(
            queries.contiguous(), keys, values, rows.queries, rows.keys, rows.most_queries, rows.most_keys,
            scale=scale, window_size=(-1 if window is None else window - 1, 0), enable_gqa=True,
        )  # fmt: skip

    return attend
