"""mote_paged: attention of a flat batch over the paged cache, on unmodified transformers models.

    tokens of all requests, one after the other, [1, T]; request r's are query_starts[r] … query_starts[r + 1] and see
    its lengths[r] keys in the cache, causally

transformers' attention interface hands every layer's query, key and value (rotated already) to `attend`, with the
PagedBatch of this step as one more keyword of the forward. Rows of few tokens (decoding, forced markers) are gathered
together, padded to the longest; longer ones (prefill) go one by one. What the masks and gathers are is worked out once
a step and window, not once a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from mote_ext.engine.cache import LayerShape, PagedCache

NAME = "mote_paged"
BATCH = "mote_batch"  # the keyword of the forward
SHORT_ROW = 4  # tokens; decoding has 1, an end marker with the start marker behind it 2 or 3
PADDED_TO = 0.6  # rows shorter than this share of the longest are padded in a group of their own

# Keywords of attention layers that change nothing here: there is no dropout, positions are in the keys already.
_WITHOUT_EFFECT = {
    "dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings",
    "output_hidden_states", "return_dict", "past_key_values", "past_key_value", "layer_past", "cu_seq_lens_q",
    "output_router_logits", "logits_to_keep", "num_items_in_batch",
}  # fmt: skip


class RowGroup:
    """Some rows of a batch, padded to one shape: R rows, Q query tokens, L keys.

    tokens: [R * Q] places in the flat batch, or None where the group is the whole batch in its order
    picked: [·] which of R * Q are tokens and not padding, or None for all; places: their places in the flat batch
    pages:  [R * pages a row]; padding repeats the row's first page, so that it is never another request's
    mask:   [R, 1, Q, L] 0 or -inf, or None where all sees all; causal: Q = L and each sees what is before it
    """

    def __init__(self, batch: PagedBatch, rows: np.ndarray, window: int | None, dtype: torch.dtype) -> None:
        counts, lengths, page_size = batch.counts[rows], batch.lengths[rows], batch.cache.page_size
        first_pages = _first_keys(counts, lengths, window) // page_size
        num_pages = -(-lengths // page_size) - first_pages
        columns = np.arange(num_pages.max())
        columns = first_pages[:, None] + np.where(columns < num_pages[:, None], columns, 0)
        self.pages = batch.to_device(batch.page_tables[rows[:, None], columns].reshape(-1))
        self.R, self.Q = len(rows), int(counts.max())
        self.L = int((lengths - first_pages * page_size).max())
        self._place_queries(batch, batch.starts[rows], counts)
        self._mask_keys(batch, first_pages * page_size, counts, lengths, window, dtype)

    def _place_queries(self, batch: PagedBatch, starts: np.ndarray, counts: np.ndarray) -> None:
        places = np.arange(self.Q)
        exist = places < counts[:, None]
        tokens = starts[:, None] + np.where(exist, places, 0)
        every = np.arange(batch.num_tokens)
        is_whole = tokens.size == len(every) and np.array_equal(tokens.reshape(-1), every)
        self.tokens = None if is_whole else batch.to_device(tokens.reshape(-1))
        self.places = None if is_whole else batch.to_device(tokens[exist])
        self.picked = None if exist.all() else batch.to_device(np.flatnonzero(exist))

    def _mask_keys(self, batch: PagedBatch, begin, counts, lengths, window: int | None, dtype: torch.dtype) -> None:
        """begin [R]: the position of each row's first gathered key."""
        queries = np.minimum(np.arange(self.Q), counts[:, None] - 1)
        at = ((lengths - counts)[:, None] + queries)[:, :, None]
        keys = (begin[:, None] + np.arange(self.L))[:, None, :]
        sees = keys <= at
        if window is not None:
            sees &= keys > at - window
        self.causal = self.R == 1 and self.Q == self.L > 1 and (window is None or window >= self.L)
        self.mask = None
        if not self.causal and not sees.all():
            mask = np.where(sees, np.float32(0), np.float32(-np.inf))[:, None]
            self.mask = batch.to_device(mask).to(dtype)
        self._folded: dict[int, Tensor | None] = {}

    def folded_mask(self, share: int, dtype: torch.dtype) -> Tensor | None:
        """The mask for query heads that share a key head: [R or 1, 1, share * Q, L]."""
        if share not in self._folded:
            mask = self.mask
            if self.causal:
                mask = torch.full((1, 1, self.Q, self.L), -torch.inf, dtype=dtype, device=self.pages.device).triu(1)
            self._folded[share] = mask if mask is None or self.Q == 1 else mask.repeat(1, 1, share, 1)
        return self._folded[share]


class PagedBatch:
    """One plan, as attention needs it.

    plan:  slots int64 [T], query_starts int32 [R + 1], lengths int32 [R], page_tables int32 [R, P], as the scheduler's
    calls, windows: how often each layer came by, and the sliding windows they named, which the probe looks at
    """

    def __init__(self, plan, cache: PagedCache, kernel=None) -> None:
        self.cache, self.kernel = cache, kernel
        self.starts = plan.query_starts[:-1].astype(np.int64)
        self.counts = np.diff(plan.query_starts).astype(np.int64)
        self.lengths = plan.lengths.astype(np.int64)
        self.page_tables = plan.page_tables.astype(np.int64)
        self.is_short = self.counts <= SHORT_ROW
        self.num_tokens = len(plan.slots)
        self.slots = self.to_device(plan.slots.copy())
        self.calls: dict[int, int] = {}
        self.windows: set[int] = set()
        self._groups: dict[tuple, list[RowGroup]] = {}
        self._made: dict[type, object] = {}

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.cache.device, non_blocking=True)

    def once(self, kind: type):
        """kind(self), made at the first layer that asks."""
        if kind not in self._made:
            self._made[kind] = kind(self)
        return self._made[kind]

    def groups(self, window: int | None, dtype: torch.dtype) -> list[RowGroup]:
        if window is not None and window >= int(self.lengths.max()):
            window = None
        found = self._groups.get((window, dtype))
        if found is None:
            rows = self._grouped_rows(window)
            found = self._groups[window, dtype] = [RowGroup(self, group, window, dtype) for group in rows]
        return found

    def _grouped_rows(self, window: int | None) -> Iterator[np.ndarray]:
        # What kernels.py chose takes the short rows itself.
        short = np.flatnonzero(self.is_short) if self.kernel is None else np.empty(0, np.int64)
        num_keys = self.lengths - _first_keys(self.counts, self.lengths, window)
        if len(short) and num_keys[short].min() >= PADDED_TO * num_keys[short].max():
            yield short  # in the batch's order, which saves a gather of the queries
        elif len(short):
            by_length = short[np.argsort(-num_keys[short], kind="stable")]
            while len(by_length):
                fits = num_keys[by_length] >= PADDED_TO * num_keys[by_length[0]]
                yield np.sort(by_length[fits])
                by_length = by_length[~fits]
        for row in np.flatnonzero(~self.is_short):
            yield np.array([row])


def _first_keys(counts: np.ndarray, lengths: np.ndarray, window: int | None) -> np.ndarray:
    """The first key that any query of a row sees."""
    return np.zeros_like(lengths) if window is None else np.maximum(0, lengths - counts - window + 1)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H', T, D] -> [1, T, H, D].

    ValueError: a keyword that would change the result, or no PagedBatch: then the model is not one this can serve.
    """
    batch: PagedBatch | None = kwargs.pop(BATCH, None)
    if batch is None:
        raise ValueError(f"{NAME}: {type(module).__name__} does not hand on the forward's keyword {BATCH!r}")
    unknown = [name for name, given in kwargs.items() if name not in _WITHOUT_EFFECT and _means_something(given)]
    if unknown or attention_mask is not None:
        raise ValueError(
            f"{NAME}: {type(module).__name__} attends with {unknown or ['attention_mask']}, which this does not apply"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(f"{NAME}: {type(module).__name__} has no layer_idx, so its keys have no place in the cache")
    batch.calls[layer] = batch.calls.get(layer, 0) + 1
    if sliding_window is not None:
        batch.windows.add(sliding_window)
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if layer not in batch.cache.shapes:
        batch.cache.add_layer_under_way(layer, LayerShape(key.shape[1], key.shape[2], value.shape[2]))
    batch.cache.write(layer, batch.slots, key, value)
    queries = query[0].transpose(0, 1)  # [T, H, D]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = (scale, sliding_window, softcap)
    if batch.kernel is not None:
        return batch.kernel(queries, layer, batch, *options)[None], None
    return attend_by_groups(queries, value.shape[-1], layer, batch, *options)[None], None


def _means_something(given) -> bool:
    return given is not None and given is not False


def attend_by_groups(
    queries: Tensor, size: int, layer: int, batch: PagedBatch, scale, window, softcap, found: Tensor | None = None
) -> Tensor:
    """[T, H, D] -> [T, H, D'], group of rows by group of rows; found: where the other rows are already."""
    num_tokens, num_heads = queries.shape[:2]
    for group in batch.groups(window, queries.dtype):
        keys, values = batch.cache.read(layer, group.pages, queries.dtype)
        picked = queries if group.tokens is None else queries.index_select(0, group.tokens)
        result = _attend_group(picked, keys, values, group, scale, softcap).reshape(-1, num_heads, size)
        if group.tokens is None:
            return result
        found = queries.new_empty(num_tokens, num_heads, size) if found is None else found
        found.index_copy_(0, group.places, result if group.picked is None else result.index_select(0, group.picked))
    return found


def _attend_group(queries: Tensor, keys: Tensor, values: Tensor, group: RowGroup, scale, softcap) -> Tensor:
    """queries [R * Q, H, D], keys and values [slots of all pages, H', D] -> [R, Q, H, D'].

    Query heads that share a key head stand in the place of query tokens, so that no key is repeated.
    """
    R, Q, L = group.R, group.Q, group.L
    num_heads, num_shared = queries.shape[1], keys.shape[1]
    share = num_heads // num_shared
    keys, values = (t.unflatten(0, (R, -1))[:, :L].transpose(1, 2) for t in (keys, values))
    if group.causal and softcap is None:
        heads = queries.view(R, Q, num_heads, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(
            heads, keys, values, is_causal=True, scale=scale, enable_gqa=share > 1
        ).transpose(1, 2)
    folded = queries.view(R, Q, num_shared, share, -1).permute(0, 2, 3, 1, 4).reshape(R, num_shared, share * Q, -1)
    mask = group.folded_mask(share, folded.dtype)
    if softcap is None:
        result = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        result = _attend_capped(folded, keys, values, mask, scale, softcap)
    return result.view(R, num_shared, share, Q, -1).permute(0, 3, 1, 2, 4).reshape(R, Q, num_heads, -1)


def _attend_capped(queries, keys, values, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """With Gemma 2's soft cap on the scores, which no fused attention of torch has."""
    scores = torch.tanh(queries @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


masked_windows: set[int] = set()  # of the masks that were asked for, which the probe looks at


def _no_mask(*args, local_size: int | None = None, **kwargs) -> None:
    """Which token sees which is in the batch; what transformers would make knows nothing of the cache."""
    if local_size is not None:
        masked_windows.add(local_size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
