"""Asks a model, before it is served, whether it can be: two short sequences through the paged cache, in chunks and
token by token, must give the logits that its own eager attention gives.

An architecture that keeps its keys elsewhere, adds a bias per position or attends to sinks would otherwise answer
without an error, and wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mote_ext import compat
from mote_ext.config import context_length
from mote_ext.engine.attention import masked_windows
from mote_ext.engine.cache import LayerShape, PagedCache
from mote_ext.engine.forward import PagedModel
from mote_ext.engine.kernels import Kernel, kernels_for

LENGTHS = (21, 13)
# (sequence, begin, end): chunks with and without a past, a marker's two tokens, decoding, alone and together.
STEPS = (
    ((0, 0, 8), (1, 0, 10)),
    ((1, 10, 12), (0, 8, 19)),
    ((0, 19, 20), (1, 12, 13)),
    ((0, 20, 21),),
)


@dataclass
class ProbePlan:
    """A plan as the scheduler makes them."""

    token_ids: np.ndarray
    positions: np.ndarray
    stage_ids: np.ndarray
    slots: np.ndarray
    query_starts: np.ndarray
    lengths: np.ndarray
    page_tables: np.ndarray
    logits_at: np.ndarray
    copies: np.ndarray


@dataclass
class Probed:
    """What was found: the layers' shapes, and the attention kernel to use (None for SDPA)."""

    shapes: dict[int, LayerShape]
    kernel: Kernel | None


@torch.no_grad()
def probe(model, page_size: int, cache_dtype: torch.dtype, device: torch.device) -> Probed:
    """ValueError, naming the model's class: it cannot be served, and why."""
    tokens, stages = _sequences(model)
    expected = _own_logits(model, tokens, stages, device)
    reasons = []
    for kernel in kernels_for(device, model.dtype, cache_dtype):
        try:
            shapes = _probe_kernel(model, page_size, cache_dtype, kernel, tokens, stages, expected, device)
            return Probed(shapes, kernel)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"MoTEEngine: {type(model).__name__} cannot be served from a paged cache: {reasons[-1]}")


def _probe_kernel(model, page_size, cache_dtype, kernel, tokens, stages, expected, device) -> dict[int, LayerShape]:
    tables = _page_tables(page_size)
    cache = PagedCache({}, int(tables.max()) + 1, page_size, cache_dtype, device)
    paged = PagedModel(model, cache, kernel)
    got = [torch.empty_like(logits) for logits in expected]
    masked_windows.clear()
    for rows in STEPS:
        logits, batch = paged(_plan(rows, tokens, stages, tables, page_size))
        _check_calls(model, batch)
        at = 0
        for sequence, begin, end in rows:
            got[sequence][begin:end] = logits[at : at + end - begin]
            at += end - begin
    # Rounding of another order of sums; what a missing bias or a wrong mask does is far above it.
    allowed = max(torch.finfo(dtype).eps for dtype in (model.dtype, cache_dtype)) ** 0.5
    for logits, own in zip(got, expected):
        finite = own.isfinite()
        if not finite.any():
            raise ValueError("its own logits are no numbers")
        error = float((logits - own)[finite].abs().max() / own[finite].abs().max())
        if not error <= allowed:  # NaN too
            raise ValueError(f"its logits over the paged cache differ by {error:.2g} of the largest from its own")
    return cache.shapes


def _check_calls(model, batch) -> None:
    calls, num_layers = batch.calls, model.config.get_text_config().num_hidden_layers
    if len(calls) != num_layers or set(calls.values()) != {1}:
        raise ValueError(
            f"attention was called for layers {sorted(calls)}, {sum(calls.values())} times in all, and not once for "
            f"each of {num_layers}"
        )
    # A window that stands in the mask alone shows in no logits as short as the probe's.
    if masked_windows != batch.windows:
        raise ValueError(
            f"its masks have the windows {sorted(masked_windows)}, its attention layers name {sorted(batch.windows)}"
        )


def _own_logits(model, tokens, stages, device) -> list[torch.Tensor]:
    found = []
    with compat.attention_switched(compat.attention_configs(model), "eager"):
        for ids, of in zip(tokens, stages):
            inputs = {"input_ids": ids, "stage_ids": of, "position_ids": np.arange(len(ids))}
            rows = {name: torch.from_numpy(value)[None].to(device) for name, value in inputs.items()}
            found.append(model(**rows, use_cache=False).logits[0].float())
    return found


def _sequences(model) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token and stage ids: some prompt, then every stage in turn."""
    config = model.routing.config
    num_ids = config.base_vocab_size or config.vocab_size or model.config.get_text_config().vocab_size
    num_stages = config.num_stages
    tokens, stages = [], []
    for number, length in enumerate(LENGTHS):
        place = np.arange(length)
        tokens.append((place * 7 + 3 + number) % (num_ids - 1) + 1)  # not 0, which may be padding
        stages.append(np.where(place < 5, config.prompt_id(training=False), place % num_stages).astype(np.int32))
    return tokens, stages


def _page_tables(page_size: int) -> np.ndarray:
    """[2, P]: the pages of each sequence, in an order nobody would guess."""
    most = -(-max(LENGTHS) // page_size)
    return np.arange(2 * most).reshape(2, most)[::-1, ::-1].copy()


def _plan(rows, tokens, stages, tables, page_size) -> ProbePlan:
    places = [np.arange(begin, end) for _, begin, end in rows]
    slots = [tables[row[0], p // page_size] * page_size + p % page_size for row, p in zip(rows, places)]
    return ProbePlan(
        token_ids=np.concatenate([tokens[s][begin:end] for s, begin, end in rows]),
        positions=np.concatenate(places),
        stage_ids=np.concatenate([stages[s][begin:end] for s, begin, end in rows]),
        slots=np.concatenate(slots),
        query_starts=np.cumsum([0, *(end - begin for _, begin, end in rows)]).astype(np.int32),
        lengths=np.array([end for *_, end in rows], dtype=np.int32),
        page_tables=tables[[row[0] for row in rows]].astype(np.int32),
        logits_at=np.arange(sum(map(len, places))),
        copies=np.empty((0, 2), dtype=np.int32),
    )


def served_length(config) -> int | None:
    """Most tokens of a sequence, by a model's configuration; None where nothing limits them.

    Rotations that change once a sequence is longer than the trained length (dynamic, longrope) would differ with what
    else is in the batch and make cached keys wrong, so there the trained length is the limit.
    """
    length, text = context_length(config), config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        trained = rope.get("original_max_position_embeddings")
        trained = trained or getattr(text, "original_max_position_embeddings", None) or length
        return trained if length is None else min(length, trained)
    return length
