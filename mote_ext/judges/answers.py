"""Plain answers of any causal language model, many prompts at a time: a base model's, or those of a model that judges.

Rows of similar length share a batch, the longest first, so that little is padding and memory runs out at the beginning
or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch

from mote_ext.encoding import Messages, encode_prompt, pad_id_of, padded_on_left
from mote_ext.generation import GREEDY


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, the longest first. ValueError: a batch of no rows."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def as_base(model):
    """A context in which a MoTE model is its base; any other model is what it is."""
    return model.disable_experts() if hasattr(model, "routing") else nullcontext()


@torch.no_grad()
def base_answers(
    model,
    tokenizer,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    system: str | None = None,
    done: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The token ids each prompt is answered with, greedily and without stages, EOS included where it came.

    model: a transformers causal language model; a MoTE model answers as its base
    done:  called with the number of prompts after each batch
    """
    rows = [encode_prompt(tokenizer, prompt, system=system) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in rows]
    pad_id, ends = pad_id_of(tokenizer), end_ids(model)
    with as_base(model):
        options = {"path": None} if hasattr(model, "routing") else {}
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            inputs = padded_on_left([rows[i] for i in batch], pad_id, model.device)
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad_id, **GREEDY, **options)
            for i, row in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist()):
                answers[i] = _until(row, ends)
            if done is not None:
                done(len(batch))
    return answers


def end_ids(model) -> set[int]:
    """The token ids that end an answer without stages."""
    found = model.generation_config.eos_token_id
    return set() if found is None else {int(found)} if isinstance(found, int) else set(map(int, found))


def _until(row: list[int], ends: set[int]) -> list[int]:
    place = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: place + 1]
