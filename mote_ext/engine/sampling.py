"""The next token of every row: stage rules as masks, then greedy or drawn.

    logits → log-probabilities to report, verdicts → stage masks → repetition penalty
           → greedy: the largest;  drawn: temperature → top-k → top-p → min-p → inverse of the cumulative sum

A batch that is greedy throughout is one argmax; only rows that ask for more cost more. The order of operations is
transformers'. Token number i of sample j is drawn by a number that depends on (seed, j, i) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mote_ext import _C, keyed
from mote_ext.engine.outputs import TokenLogprob
from mote_ext.engine.params import SamplingParams

FAILED = -1  # instead of a token: the row's logits are no numbers
FIRST_CANDIDATES = 256  # sorting a whole vocabulary takes 20 times as long as finding these; mostly they are enough


class Row(Protocol):
    """What is asked of a sample, and what of it decides about the next token."""

    params: SamplingParams
    seed: int
    number: int
    num_drawn: int  # tokens before this one, those of earlier attempts included
    verdict: tuple[int, int, float]  # safe id, unsafe id, least probability of safe; asked for where a verdict is due

    def history(self) -> np.ndarray:
        """Every id of the prompt and of what was generated, int64."""


class Choice(NamedTuple):
    """tokens: int64 [L], FAILED where there is none; logprobs: one a row that asked, for its token."""

    tokens: np.ndarray
    logprobs: dict[int, TokenLogprob]


class Sampler:
    """The rules' token ids of one model.

    marker_ids: of the stages, start and end in turn, masked in text; eos_ids: masked in text too
    """

    def __init__(self, marker_ids: Sequence[int], eos_ids: Sequence[int], device: torch.device) -> None:
        self._controls = torch.tensor([*marker_ids, *eos_ids], dtype=torch.int64, device=device)
        self._size = -1  # of the vocabulary, known with the first logits
        self._starts = torch.tensor(marker_ids[::2], dtype=torch.int64, device=device)

    def choose(self, logits: Tensor, plan, rows: Sequence[Row]) -> Choice:
        """logits [L, V] float32 of the plan's logits_at, overwritten; rows: the sample of each."""
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        own = logits[asked].log_softmax(-1) if asked else None
        verdicts = _verdicts(logits, plan, rows)
        self._mask(logits, plan)
        for i, row in enumerate(rows):
            if row.params.repetition_penalty != 1:
                _penalise(logits[i], row)
        largest, tokens = logits.max(-1)  # NaN counts as the largest
        largest, tokens = largest.cpu().numpy(), tokens.cpu().numpy()
        tokens[np.isnan(largest)] = FAILED
        drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and tokens[i] >= 0 and i not in verdicts]
        if drawn:
            tokens[drawn] = draw(logits[drawn], [rows[i] for i in drawn])
        for i, token in verdicts.items():
            tokens[i] = token
        logprobs = {i: _report(own[at], int(tokens[i]), rows[i].params.logprobs) for at, i in enumerate(asked)}
        return Choice(tokens, logprobs)

    def _mask(self, logits: Tensor, plan) -> None:
        if logits.shape[-1] != self._size:
            self._size = logits.shape[-1]
            self._controls = self._controls[self._controls < self._size]  # an eos id may be none of this vocabulary
        text = np.flatnonzero(plan.modes == _C.TEXT)
        if len(text):
            ends = plan.end_ids[text]
            may_end = np.flatnonzero(ends >= 0)
            which = torch.from_numpy(text)
            ending = which[may_end], torch.from_numpy(ends[may_end])
            kept = logits[ending]
            logits[which[:, None], self._controls] = -torch.inf
            logits[ending] = kept
        smallest = torch.finfo(logits.dtype).min  # finite, so that one of the markers is taken whatever the model says
        for i in np.flatnonzero(plan.modes == _C.CHOOSE).tolist():
            allowed = self._starts[[s for s in range(len(self._starts)) if int(plan.choices[i]) >> s & 1]]
            kept = logits[i, allowed].clamp(min=smallest)
            logits[i] = -torch.inf
            logits[i, allowed] = kept


def _verdicts(logits: Tensor, plan, rows: Sequence[Row]) -> dict[int, int]:
    """Row -> the verdict its probability of "safe" says, under the model's own distribution."""
    found = {}
    for i in np.flatnonzero(plan.modes == _C.VERDICT).tolist():
        safe, unsafe, threshold = rows[i].verdict
        probability = float(logits[i].softmax(-1)[safe])
        found[i] = safe if probability >= threshold else unsafe if probability < threshold else FAILED
    return found


def _penalise(scores: Tensor, row: Row) -> None:
    """transformers' repetition penalty, in place: scores of ids that were there move towards the unlikely."""
    seen = torch.from_numpy(np.unique(row.history())).to(scores.device)
    penalty, found = row.params.repetition_penalty, scores[seen]
    scores[seen] = torch.where(found < 0, found * penalty, found / penalty)


def draw(scores: Tensor, rows: Sequence[Row]) -> np.ndarray:
    """Tokens int64 [n] for scores [n, V], each by its row's parameters; FAILED where there are no probabilities."""
    temperatures = torch.tensor([row.params.temperature for row in rows], device=scores.device)
    scores = scores / temperatures[:, None]
    numbers = [keyed.uniform("sample", row.seed, row.number, row.num_drawn) for row in rows]
    tokens = np.full(len(rows), FAILED, dtype=np.int64)
    cut = [row.params.top_k > 0 or row.params.top_p < 1 for row in rows]
    for wanted, pick in ((False, _from_all), (True, _from_likeliest)):
        chosen = [i for i, is_cut in enumerate(cut) if is_cut is wanted]
        if chosen:
            tokens[chosen] = pick(scores[chosen], [rows[i].params for i in chosen], [numbers[i] for i in chosen])
    return tokens


def _from_all(scores: Tensor, params: list[SamplingParams], numbers: list[float]) -> np.ndarray:
    places = _inverse(_without_unlikely(scores.softmax(-1), params), numbers)
    return places.cpu().numpy()


def _from_likeliest(scores: Tensor, params: list[SamplingParams], numbers: list[float]) -> np.ndarray:
    """top-k and top-p over the likeliest tokens, in their order; how many are looked at does not change the result."""
    size = scores.shape[-1]
    top_k = torch.tensor([min(p.top_k or size, size) for p in params], device=scores.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=scores.device)[:, None]
    width = min(FIRST_CANDIDATES, size)
    while True:
        found, tokens = scores.topk(width, dim=-1)
        is_within = torch.arange(width, device=scores.device) < top_k
        # The mass of all tokens, or of the k likeliest: top-p is a share of what top-k left.
        left = found.masked_fill(~is_within, -torch.inf).logsumexp(-1, True)
        probabilities = (found - torch.where(top_k < size, left, scores.logsumexp(-1, True))).exp()
        before = probabilities.cumsum(-1) - probabilities
        is_kept = is_within & ((before < top_p) | (top_p >= 1))
        enough = ((top_k <= width) | (before[:, -1:] >= top_p)).all()
        if width == size or enough:
            break
        width = min(size, width * 16)
    kept = torch.where(is_kept, probabilities, 0)
    places = _inverse(_without_unlikely(kept, params), numbers)
    picked = tokens.gather(-1, places.clamp(min=0)[:, None])[:, 0]
    return torch.where(places >= 0, picked, FAILED).cpu().numpy()


def _without_unlikely(probabilities: Tensor, params: list[SamplingParams]) -> Tensor:
    """min-p: what is less likely than this share of the likeliest gets 0."""
    if not any(p.min_p for p in params):
        return probabilities
    share = torch.tensor([p.min_p for p in params], device=probabilities.device)[:, None]
    return torch.where(probabilities < share * probabilities.amax(-1, True), 0, probabilities)


def _inverse(weights: Tensor, numbers: list[float]) -> Tensor:
    """int64 [n]: where the cumulative sum of weights [n, V] passes each number's share of it; FAILED for NaN."""
    sums = weights.double().cumsum(-1)
    target = torch.tensor(numbers, dtype=torch.float64, device=weights.device)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, target, right=True)[:, 0]
    # A number next to 1 may be rounded up to the whole sum: then the last one with any weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.int8).argmax(-1)
    return torch.where(sums[:, -1] > 0, torch.minimum(places, last), FAILED)


def _report(own: Tensor, token: int, count: int) -> TokenLogprob:
    """own: [V] log-probabilities of the model."""
    count = min(count, len(own))
    values, ids = own.topk(count) if count else (own[:0], own[:0])
    return TokenLogprob(token, float(own[token]) if token >= 0 else None, tuple(zip(ids.tolist(), values.tolist())))
