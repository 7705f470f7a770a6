"""Keyed sampling: the token a row draws depends on its own key and position, never on the batch it stands in.

    token = argmax over the nucleus of  log p(token) + g,    g = -log(-log u),    u = hash(key, position, token)

The Gumbel-max trick makes an argmax a draw from p, so transformers' greedy loop samples; noise hashed from the token
id needs no generator whose state a batch, a resumed run or another process would have to share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote_ext import keyed

NUM_CANDIDATES = 512  # sorting a whole vocabulary costs as much as a small model's forward


class KeyedSampling(LogitsProcessor):
    """Leaves one token possible: the one that is drawn.

    keys:          of each row, such as (seed, row id, stage, attempt)
    prompt_length: ids before the first generated one, padding counted
    temperature:   > 0
    top_p:         the likeliest tokens that together reach this probability are drawn from
    """

    def __init__(self, keys: Sequence[tuple], prompt_length: int, temperature: float, top_p: float) -> None:
        self.keys, self.prompt_length = keys, prompt_length
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        log_p = (scores.float() / self.temperature).log_softmax(-1)
        values, tokens = nucleus(log_p, self.top_p)
        noise = gumbel([keyed.bits("sample", *key, position) for key in self.keys], tokens)
        drawn = tokens.gather(1, (values + noise).argmax(1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def nucleus(log_p: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The candidates of each row: log-probabilities [B, C] float32, -inf outside of the nucleus, and token ids [B, C].

    A token is in the nucleus while those likelier than it have less than top_p together; one always is.
    """
    num_tokens = log_p.shape[1]
    if top_p >= 1:
        return log_p, torch.arange(num_tokens, device=log_p.device).expand_as(log_p)
    values, tokens = log_p.topk(min(NUM_CANDIDATES, num_tokens))
    if values.shape[1] < num_tokens and bool((values.exp().sum(1) < top_p).any()):
        values, tokens = log_p.sort(1, descending=True)
    likelier = values.exp().cumsum(1) - values.exp()
    inside = (likelier < top_p) | (torch.arange(values.shape[1], device=log_p.device) == 0)
    return values.masked_fill(~inside, -torch.inf), tokens


def gumbel(keys: Sequence[int], tokens: Tensor) -> Tensor:
    """Standard Gumbel noise [B, C] float64 of each row's 64-bit key and the token ids [B, C] (splitmix64)."""
    key = torch.tensor([bits - 2**63 for bits in keys], device=tokens.device)[:, None]
    mixed = (tokens + 1) * _signed(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    mixed = mixed ^ _shifted(mixed, 31)
    uniform = (_shifted(mixed, 11).double() + 0.5) / 2**53  # never 0 nor 1
    return -(-uniform.log()).log()


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places of the 64 bits as an unsigned number; torch's own shift copies the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
