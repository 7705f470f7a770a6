"""TextWriter: many requests in one batch through any causal language model of transformers.

Requests that open alike (a chat template's system message, examples) share the keys and values of that opening: it is
run once a model, not once a row. Rows of different openings still form one batch:

    cache  [pad pad opening A] [pad question 1]        attention masks the pads, positions count the rest
           [    opening B    ] [   question 2  ]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer

from mote_ext.chains.openings import Opening, cache_of
from mote_ext.chains.sampling import KeyedSampling
from mote_ext.config import context_length
from mote_ext.encoding import encode_prompt
from mote_ext.generation import GREEDY, StagedGeneration

MIN_SHARED_TOKENS = 32  # a shorter opening costs less than taking it apart
_SENTENCE_END = re.compile(r"(?:(?<!\d)[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]|\n)")


@dataclass(frozen=True)
class Request:
    """What a model is asked.

    turns: messages, the last one the user's
    num_shared: how many of them, from the first, other requests begin with too
    key:   of its draws; two requests with the same key and the same turns get the same text
    """

    turns: tuple[dict, ...]
    num_shared: int = 0
    key: tuple = ()


@dataclass(frozen=True)
class Written:
    """What a model wrote. text: trimmed, may be empty; num_tokens: drawn; cut: whether the limit ended it"""

    text: str
    num_tokens: int
    cut: bool


class TextWriter:
    """A model and its tokenizer as a writer of texts.

    model:       any causal language model of transformers, in evaluation mode; of a MoTE model the stage rules are off
                 and its markers impossible
    temperature: 0 takes the likeliest token; else draws are keyed (sampling.py)
    top_p:       share of the likeliest tokens that are drawn from
    """

    def __init__(self, model, tokenizer, temperature: float = 0.0, top_p: float = 1.0) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.top_p = temperature, top_p
        eos = model.generation_config.eos_token_id
        eos_ids = eos if isinstance(eos, (list, tuple)) else [eos]
        self.eos_ids = [token for token in dict.fromkeys([*eos_ids, tokenizer.eos_token_id]) if token is not None]
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else self.eos_ids[0] if self.eos_ids else 0
        self._options = {**GREEDY, "num_beams": 1}
        if isinstance(model, StagedGeneration):
            markers = model.routing.table.marker_ids
            self._options |= {"path": None} | ({"suppress_tokens": list(markers)} if markers else {})
        self._openings: dict[str, Opening | None] = {}
        self._shares = True

    def write(self, requests: Sequence[Request], max_tokens: int) -> list[Written | None]:
        """One text a request, in order, of at most max_tokens tokens; None where the model's context is too short.

        A text that the limit ends is cut behind its last sentence, if one of it is whole.
        """
        return self._where_it_fits(requests, max_tokens, lambda fitting: self._written(fitting, max_tokens))

    def first_logits(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """The logits [V] float32 of the first token of each reply, from one forward; None where it does not fit."""
        return self._where_it_fits(requests, 1, self._logits)

    def encode(self, turns: Sequence[dict]) -> list[int]:
        """The token ids of a request. ValueError: the chat template refuses it."""
        return encode_prompt(self.tokenizer, self._turns(turns))

    def _where_it_fits(self, requests, max_tokens: int, ask) -> list:
        if not requests:
            return []
        rows = [self.encode(request.turns) for request in requests]
        limit = context_length(self.model.config)
        fits = [limit is None or len(ids) + max_tokens <= limit for ids in rows]
        fitting = [(request, ids) for request, ids, fit in zip(requests, rows, fits) if fit]
        results = iter(ask(fitting) if fitting else [])
        return [next(results) if fit else None for fit in fits]

    def _written(self, fitting: list[tuple[Request, list[int]]], max_tokens: int) -> list[Written]:
        inputs = self._inputs(fitting, max_tokens)
        width = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if self.temperature > 0:
            keys = [request.key for request, _ in fitting]
            processors.append(KeyedSampling(keys, width, self.temperature, self.top_p))
        ids = self._generate(inputs, max_new_tokens=max_tokens, logits_processor=processors)
        return [self._text(row, max_tokens) for row in ids[:, width:].tolist()]

    def _logits(self, fitting: list[tuple[Request, list[int]]]) -> list[Tensor]:
        found = self._generate(
            self._inputs(fitting, 1), max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        return list(found.logits[0].float().cpu())

    @torch.no_grad()
    def _generate(self, inputs: dict, **options):
        ends = {"eos_token_id": self.eos_ids or None, "pad_token_id": self.pad_id}
        return self.model.generate(**inputs, **ends, **self._options, **options)

    def _inputs(self, fitting: list[tuple[Request, list[int]]], max_tokens: int) -> dict:
        """input_ids and attention_mask [B, T], padded on the left, and a cache of the openings where they are shared"""
        openings = [self._opening(request) for request, _ in fitting]
        shared = all(
            opening is not None and tuple(ids[: len(opening.ids)]) == opening.ids and len(ids) > len(opening.ids)
            for opening, (_, ids) in zip(openings, fitting)
        )
        if not shared:
            return self._tensors([([], ids) for _, ids in fitting])
        rows = [(list(opening.ids), ids[len(opening.ids) :]) for opening, (_, ids) in zip(openings, fitting)]
        room = max(len(question) for _, question in rows) + max_tokens
        return {**self._tensors(rows), "past_key_values": cache_of(openings, room)}

    def _tensors(self, rows: list[tuple[list[int], list[int]]]) -> dict:
        """Two columns of ids side by side, each padded on the left."""
        ids, mask = [], []
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for row in rows:
            pads = [width - len(part) for width, part in zip(widths, row)]
            ids.append([token for pad, part in zip(pads, row) for token in [self.pad_id] * pad + part])
            mask.append([bit for pad, part in zip(pads, row) for bit in [0] * pad + [1] * len(part)])
        device = self.model.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _opening(self, request: Request) -> Opening | None:
        """What every request with these shared turns begins with, run through the model once."""
        turns = request.turns[: request.num_shared]
        name = repr(turns)
        if self._shares and name not in self._openings:
            a, b = (self.encode([*turns, {"role": "user", "content": text}]) for text in "a0")
            same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0)
            self._openings[name] = self._run(tuple(a[:same])) if same >= MIN_SHARED_TOKENS else None
        return self._openings.get(name)

    def _run(self, ids: tuple[int, ...]) -> Opening | None:
        found = self._generate(self._tensors([([], list(ids))]), max_new_tokens=1, return_dict_in_generate=True)
        cache = getattr(found, "past_key_values", None)
        # Other layers (sliding windows, states) hold something else than every token's keys and values.
        self._shares = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        return Opening(ids, [(layer.keys, layer.values) for layer in cache.layers]) if self._shares else None

    def _turns(self, turns: Sequence[dict]) -> Sequence[dict] | str:
        """Without a chat template a conversation becomes one text."""
        if getattr(self.tokenizer, "chat_template", None):
            return turns
        return "\n\n".join(turn["content"] for turn in turns)

    def _text(self, ids: list[int], max_tokens: int) -> Written:
        length = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        cut = length is None and len(ids) >= max_tokens
        ids = ids[:length]
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Written(to_sentence_end(text) if cut else text, len(ids), cut)


def to_sentence_end(text: str) -> str:
    """The text up to the end of its last whole sentence or line; all of it where there is none."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else text
