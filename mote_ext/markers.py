"""Rows of the marker tokens, laid over a model's embedding and head without resizing either.

The base's own rows stay frozen and untouched. A marker's id may lie beyond them (the usual case) or be one of the spare
rows some models have; both are addressed by a list of ids. With tied embeddings one set of rows serves both ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mote_ext.context import StageContext
from mote_ext.stages import StageTable


class MarkerEmbedding(nn.Module):
    """The base's embedding, with trained rows for the marker ids.

    base:    the model's input embedding, frozen; what it does beyond the look-up (Gemma's scale) is done to rows too
    rows:    [M, H] float32 parameter
    forward: input_ids [...] int64 -> [..., H] in base's dtype
    weight:  [V', H] base's rows and the markers', differentiable in `rows`; V' = max(V, largest id + 1)
    """

    def __init__(self, base: nn.Module, table: StageTable, context: StageContext) -> None:
        super().__init__()
        self.base, self.table, self.context = base, table, context
        base.requires_grad_(False)
        marker_ids = table.marker_ids
        self.embedding_dim = base.weight.shape[1]
        self.num_embeddings = max(base.weight.shape[0], max(marker_ids) + 1)
        self.padding_idx = getattr(base, "padding_idx", None)
        if base.weight.device.type != "meta":
            table.on(base.weight.device)  # made now, or torch.compile would compile the first call apart
        self.rows = nn.Parameter(
            torch.empty(len(marker_ids), self.embedding_dim, dtype=torch.float32, device=base.weight.device)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        if not self.context.experts_enabled:
            return self.base(input_ids)
        match = input_ids.unsqueeze(-1) == self.table.on(input_ids.device)
        is_marker = match.any(-1, keepdim=True)
        embedded = self.base(input_ids.masked_fill(is_marker.squeeze(-1), 0))
        rows = F.embedding(match.to(torch.int32).argmax(-1), self._scaled_rows(embedded.dtype))
        return torch.where(is_marker, rows, embedded)

    @property
    def weight(self) -> Tensor:
        return merged_rows(self.base.weight, self.rows, self.table)

    def _scaled_rows(self, dtype: torch.dtype) -> Tensor:
        # Gemma's embedding multiplies what it looks up; models that scale later scale the markers with the rest.
        scale = getattr(self.base, "embed_scale", None)
        rows = self.rows.to(dtype)
        return rows if scale is None else rows * torch.as_tensor(scale, dtype=dtype, device=rows.device)


class MarkerHead(nn.Module):
    """The base's output head, with a logit for every marker.

    base:    the model's head, frozen
    rows:    [M, H] float32 parameter, or None when tied: then the embedding's are used
    forward: hidden [..., H] -> logits [..., V'], V' as in MarkerEmbedding; ids nobody has a row for get -inf. Inside
             disable_experts() the base's logits [..., V]
    weight:  [V', H] differentiable; bias: [V'] or None. TRL's losses multiply by them without calling forward
    """

    def __init__(self, base: nn.Module, embedding: MarkerEmbedding, tied: bool) -> None:
        super().__init__()
        self.base, self.table, self.context = base, embedding.table, embedding.context
        base.requires_grad_(False)
        marker_ids = self.table.marker_ids
        self.in_features = base.weight.shape[1]
        self.out_features = max(base.weight.shape[0], max(marker_ids) + 1)
        self._embedding = [embedding] if tied else []  # in a list: not a submodule of the head
        rows = torch.empty(len(marker_ids), self.in_features, dtype=torch.float32, device=base.weight.device)
        self.rows = None if tied else nn.Parameter(rows)
        # What a marker's logit begins with; a head with a bias (Phi) would else favour the rows without one.
        has_bias = getattr(base, "bias", None) is not None
        self.marker_bias = nn.Parameter(rows.new_zeros(len(marker_ids))) if has_bias else None

    @property
    def output_rows(self) -> Tensor:
        return self._embedding[0].rows if self._embedding else self.rows

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.base(hidden)
        # Not columns of -inf: Gemma's soft cap, which comes after the head, would make them -30.
        if not self.context.experts_enabled:
            return logits
        num_base = logits.shape[-1]
        bias = None if self.marker_bias is None else self.marker_bias.to(logits.dtype)
        markers = F.linear(hidden, self.output_rows.to(hidden.dtype), bias).to(logits.dtype)
        if self.table.marker_ids == tuple(range(num_base, self.out_features)):
            return torch.cat((logits, markers), dim=-1)
        logits = F.pad(logits, (0, self.out_features - num_base), value=-torch.inf)
        return logits.index_copy(-1, self.table.on(logits.device), markers)

    @property
    def weight(self) -> Tensor:
        return merged_rows(self.base.weight, self.output_rows, self.table)

    @property
    def bias(self) -> Tensor | None:
        if self.marker_bias is None:
            return None
        padded = F.pad(self.base.bias, (0, self.out_features - len(self.base.bias)))
        return padded.index_copy(0, self.table.on(padded.device), self.marker_bias.to(padded.dtype))


def merged_rows(base: Tensor, rows: Tensor, table: StageTable) -> Tensor:
    """[V', H]: base with the rows at the marker ids; ids beyond it that are no marker's get zeros."""
    padded = F.pad(base, (0, 0, 0, max(0, max(table.marker_ids) + 1 - base.shape[0])))
    return padded.index_copy(0, table.on(base.device), rows.to(base.dtype))


@torch.no_grad()
def rows_from_words(weight: Tensor, tokenizer, words: list[str]) -> Tensor:
    """[M, H] float32: for each text the mean of its tokens' rows in weight [V, H].

    A mean of rows has a logit no larger than the largest among them, so an untrained model never prefers a marker; and
    different words keep the markers apart, which the mean of all rows would not.
    """
    found = []
    for text in words:
        tokens = [token for token in tokenizer.encode(text, add_special_tokens=False) if token < weight.shape[0]]
        if len(set(tokens)) < 2:
            raise ValueError(
                f"a marker's words must be two tokens or more for this tokenizer, got {text!r} -> {tokens}"
            )
        found.append(weight[torch.tensor(tokens, device=weight.device)].float().mean(0))
    return torch.stack(found)


@torch.no_grad()
def rows_without_words(weight: Tensor, num_rows: int) -> Tensor:
    """[M, H] float32, for want of a tokenizer: each the mean of two of weight's rows [V, H], far apart."""
    places = torch.linspace(0, weight.shape[0] - 1, 2 * num_rows, device=weight.device).long()
    return weight[places].float().reshape(num_rows, 2, -1).mean(1)
