"""From what a caller asks to what can be computed: token ids that exist, parameters that go together, or a ValueError
before anything has begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mote_ext.encoding import encode_prompt
from mote_ext.engine.params import SamplingParams
from mote_ext.engine.requests import Served
from mote_ext.engine.rules import plans_of
from mote_ext.generation.plan import StagePlan

Prompt = str | Sequence[dict[str, str]] | Sequence[int]


class Prepared(NamedTuple):
    """A request that was found possible: prompt ids int64, and the plan of each attempt."""

    ids: np.ndarray
    params: SamplingParams
    plans: list[StagePlan]


def prepare(
    prompt: Prompt, params: SamplingParams | None, served: Served, num_base_ids: int, context_length: int | None
) -> Prepared:
    """ValueError: what can never run, and why. params None: the defaults, without stages where the model has none."""
    config, table = served.config, served.table
    if params is None:
        params = SamplingParams() if table.marker_ids is not None else SamplingParams(path=None)
    if params.path is not None:
        table.start_id(0)  # raises when there are no markers
    plans = plans_of(params, config, table)
    for name in params.hide:
        table.index(name)
    if (params.check == "enforce" or params.path == "escalate") and not config.refusal_ids:
        raise ValueError("MoTEEngine: enforce needs the refusal's token ids; wrap the base with tokenizer=")
    if params.stop and served.tokenizer is None:
        raise ValueError("MoTEEngine: stop texts need a tokenizer: pass tokenizer= to the engine")
    ids = encode(prompt, served, num_base_ids, trusted=params.trusted_prompt)
    if context_length is not None and len(ids) + params.max_new_tokens > context_length:
        raise ValueError(
            f"MoTEEngine: prompt and max_new_tokens must fit into the model's context of {context_length} tokens, got "
            f"{len(ids)} + {params.max_new_tokens}"
        )
    return Prepared(ids, params, plans)


def encode(prompt: Prompt, served: Served, num_base_ids: int, *, trusted: bool) -> np.ndarray:
    """int64 ids of a text, messages or a list of ids.

    num_base_ids: ids the base's embedding has rows for; beyond them only markers exist
    ValueError: nothing, text without a tokenizer, ids that do not exist, markers in ids that are not trusted. Text can
    never become a marker.
    """
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], dict)):
        if served.tokenizer is None:
            raise ValueError("MoTEEngine: a text needs a tokenizer: pass tokenizer= to the engine, or token ids")
        ids = np.array(encode_prompt(served.tokenizer, prompt), dtype=np.int64)
        trusted = True
    else:
        ids = _as_ids(prompt)
    if not len(ids):
        raise ValueError("MoTEEngine: the prompt must have at least one token, got none")
    markers = np.array(served.table.marker_ids or (), dtype=np.int64)
    is_marker = np.isin(ids, markers)
    wrong = (ids < 0) | ((ids >= num_base_ids) & ~is_marker)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"MoTEEngine: token ids must be in 0..{num_base_ids - 1}, got {ids[place]} at [{place}]")
    if is_marker.any() and not trusted:
        place = int(is_marker.argmax())
        raise ValueError(
            f"MoTEEngine: the prompt holds the control token {ids[place]} at [{place}]. Typed text must never become "
            "one: give the text, or encode it with mote_ext.encode_prompt. To continue a chain, pass "
            "SamplingParams(trusted_prompt=True)"
        )
    return ids


def _as_ids(prompt: Sequence[int]) -> np.ndarray:
    ids = np.asarray(prompt)
    if not len(ids):
        return np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"MoTEEngine: a prompt must be a text, messages or a list of token ids, got {ids.dtype} {list(ids.shape)}"
        )
    return ids.astype(np.int64)
