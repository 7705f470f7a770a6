"""Step skipping: in training a stage may be hidden from a later one, so that each learns to do without it.

              question  analysis  guidance  response           hidden blocks, each drawn by itself with p_dropout:
    analysis     ×         ×                                     guidance→analysis, response→analysis,
    guidance     ×         ?         ×                           response→guidance, check→analysis, check→guidance
    response     ×         ?         ?         ×               never: anything→question, check→response

A block is a whole one, its markers with it. It cuts the direct way only: with response→analysis hidden and
guidance→analysis kept, analysis still reaches the response through guidance. Source: MoTE, arXiv 2405.00557, section
3.2, figure 3 and appendix B; the check's two blocks are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mote_ext import keyed
from mote_ext.chains.attention_mask import AttentionForm, MaskProbe
from mote_ext.stages import StageTable, stage_ids_from_tokens


class StepSkipping:
    """Turns a batch of chains into the model's inputs, some of its blocks hidden.

    table:     the stages, with marker ids
    p_dropout: probability of each droppable block, 0..1 (the paper does not say its value)
    seed:      of the draws, which depend on it, the epoch and a chain's row alone
    compact_positions: number the tokens behind a stage that no later stage of its chain sees as if it was absent
    pairs:     the droppable blocks as (later stage, earlier stage)
    ValueError: p_dropout outside 0..1, a table without marker ids.
    """

    def __init__(self, table: StageTable, p_dropout: float, seed: int = 0, compact_positions: bool = False) -> None:
        if not 0 <= p_dropout <= 1:
            raise ValueError(f"StepSkipping: p_dropout must be in 0..1, got {p_dropout}")
        if table.marker_ids is None:
            raise ValueError("StepSkipping: the table has no marker ids; take model.routing.table")
        self.table, self.p_dropout, self.seed, self.compact_positions = table, p_dropout, seed, compact_positions
        reasoning = [i for i, stage in enumerate(table.stages) if stage.role == "reasoning"]
        self.pairs = tuple((late, early) for late in range(len(table)) for early in reasoning if early < late)
        self._probe = MaskProbe()

    def drawn(self, epoch: int, row: int) -> list[tuple[int, int]]:
        """The blocks hidden from this chain in this epoch, whether or not it has the stages."""
        names = self.table.names
        return [
            (late, early)
            for late, early in self.pairs
            if keyed.uniform("skip", self.seed, epoch, row, names[late], names[early]) < self.p_dropout
        ]

    def inputs(self, model, batch: dict, epoch: int) -> dict:
        """The batch for model(**…): without "rows", and with p_dropout above 0 with a mask of its own in the form the
        model's attention takes, with position_ids [B, T], and with stage_ids [B, T] where the model routes by stage
        (a packed batch is not seen as such beside a mask, and padding only in a 2D one).

        model: MoTEForCausalLM, an in-place model, or any decoder-only causal language model of transformers
        batch: ChainCollator's; padded on either side, or packed
        epoch: of the draws
        The mask is combined with the causal one, padding, documents and the model's own sliding window. What follows
        the last stage (EOS) sees what that stage sees.
        ValueError: an attention that such a mask does not fit (flash attention, ALiBi, chunks, recurrent layers), a
        model that was tried and does not follow it, rows that do not match the documents.
        """
        inputs = {name: value for name, value in batch.items() if name != "rows"}
        if not self.p_dropout or not self.pairs:
            return inputs
        if "rows" not in batch:
            raise ValueError('StepSkipping: the batch has no "rows", by which blocks are drawn; use ChainCollator')
        form = AttentionForm.of(model)
        self._probe.require(model, form, self)
        hidden = [self.drawn(epoch, row) for row in batch["rows"].flatten().tolist()]
        return self.masked(model, form, inputs, hidden)

    def masked(self, model, form: AttentionForm, inputs: dict, hidden: Sequence[Sequence[tuple[int, int]]]) -> dict:
        """inputs with these blocks hidden, a list a chain (a row, or a document of a packed row)."""
        routing = getattr(model, "routing", None)
        if routing is not None and inputs.get("stage_ids") is None:
            given = {name: inputs.get(name) for name in ("attention_mask", "position_ids")}
            ids = routing.stage_ids(inputs["input_ids"], training=model.training, **given)
            inputs = {**inputs, "stage_ids": ids}
        layout = Layout.of(self.table, inputs, hidden)
        if self.compact_positions:
            layout.compact(self.table)
        return {
            **inputs,
            "attention_mask": form.mask(layout.visible, inputs["input_ids"]),
            "position_ids": layout.position,
        }


@dataclass
class Layout:
    """What decides who sees whom, a token each.

    document:  [B, T] int64    its chain, numbered through the batch
    packed:    whether a row holds several
    own:       [B, T] int64    its stage, S outside of stages: what it is hidden as
    position:  [B, T] int64    its place in its chain
    concealed: [B, T] bits     stages it does not see, and padding (bit S); none for padding itself, so that no row of
                               the mask is empty, which some kernels answer with NaN
    bit:       [B, T] bits     its own stage's, padding's, or 0
    hidden:    [D, S + 1] bits stages hidden from each stage of each chain
    """

    document: Tensor
    packed: bool
    own: Tensor
    position: Tensor
    concealed: Tensor
    bit: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, table: StageTable, inputs: dict, hidden: Sequence[Sequence[tuple[int, int]]]) -> Layout:
        ids, count = inputs["input_ids"], len(table)
        padding, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        _check_shapes(ids, padding, positions)
        packed = padding is None and positions is not None
        if positions is not None:
            position = positions.expand(ids.shape)
        else:
            present = torch.ones_like(ids) if padding is None else padding.long()
            position = (present.cumsum(1) - 1).clamp(min=0)
        begins = position == 0 if packed else torch.zeros_like(ids, dtype=torch.bool)
        document = _documents(ids, begins, packed, len(hidden))
        own = stage_ids_from_tokens(ids, table, prompt_id=count, position_ids=position if packed else None).long()
        place = torch.arange(ids.shape[1], device=ids.device)
        newest = torch.where((own < count) | begins, place, 0).cummax(1).values
        bits = _bits(hidden, count, ids.device)
        concealed = bits[document, own.gather(1, newest)] | (1 << count)
        bit = torch.where(own < count, 1 << own.clamp(max=count - 1), 0).to(bits.dtype)
        if padding is not None:
            concealed = concealed.masked_fill(padding == 0, 0)
            bit = bit.masked_fill(padding == 0, 1 << count)
        return cls(document, packed, own, position, concealed, bit, bits)

    def visible(self, window: int | None):
        """A function (batch, head, query, key) of index tensors: whether the query sees the key."""
        concealed, bit = self.concealed, self.bit
        document = self.document.int() if self.packed else None
        position = None if window is None else self.position.int()
        behind = None if window is None else position - window

        def visible(batch, head, query, key):
            seen = (query >= key) & ((concealed[batch, query] & bit[batch, key]) == 0)
            if document is not None:
                seen = seen & (document[batch, query] == document[batch, key])
            if window is not None:
                seen = seen & (behind[batch, query] < position[batch, key])
            return seen

        return visible

    def compact(self, table: StageTable) -> None:
        """Renumbers what stands behind fully hidden stages; their own tokens keep their numbers."""
        count, device = len(table), self.own.device
        present = torch.zeros(len(self.hidden), count + 1, dtype=torch.bool, device=device)
        present[self.document, self.own] = True
        absent = torch.zeros_like(present)
        for early in range(count):
            later = present[:, early + 1 : count]
            hides = (self.hidden[:, early + 1 : count] >> early) & 1 == 1
            absent[:, early] = present[:, early] & later.any(1) & (hides | ~later).all(1)
        gone = absent[self.document, self.own].long()
        before = gone.cumsum(1) - gone
        place = torch.arange(self.own.shape[1], device=device)

        def at_begin_of(what: Tensor) -> Tensor:
            """`before` at the first token of each run of equal values."""
            change = torch.ones_like(what, dtype=torch.bool)
            change[:, 1:] = what[:, 1:] != what[:, :-1]
            return before.gather(1, torch.where(change, place, 0).cummax(1).values)

        run = self.document * (count + 1) + self.own
        self.position = self.position - at_begin_of(run) + at_begin_of(self.document)


def _check_shapes(ids: Tensor, padding, positions: Tensor | None) -> None:
    if padding is not None and (not isinstance(padding, Tensor) or padding.shape != ids.shape):
        got = list(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
        raise ValueError(f"StepSkipping: attention_mask must be {list(ids.shape)}, as input_ids, got {got}")
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != ids.shape[1]):
        raise ValueError(f"StepSkipping: position_ids must be {list(ids.shape)}, got {list(positions.shape)}")


def _documents(ids: Tensor, begins: Tensor, packed: bool, count: int) -> Tensor:
    """[B, T]: the number of each token's chain. ValueError: there are not `count`; of a packed batch this is seen on a
    CPU alone, as a look at a device's tensor would wait for it."""
    rows = ids.shape[0]
    if not packed:
        if rows != count:
            raise ValueError(f"StepSkipping: the batch has {rows} sequences, its rows name {count}")
        document = torch.zeros_like(ids)
    else:
        if begins.device.type == "cpu":
            require_documents(begins, count)
        document = begins.cumsum(1) - 1
    return document + torch.arange(rows, device=ids.device)[:, None] * (count // rows)


def require_documents(begins: Tensor, count: int) -> None:
    """ValueError: a packed batch has not `count` documents, the same number in each row; begins [B, T], on a CPU."""
    numbers = begins.sum(1).tolist()
    even = set(numbers) == {count // len(numbers)} and bool(begins[:, 0].all())
    if sum(numbers) != count or not even:
        shown = "an uneven number of" if sum(numbers) == count else sum(numbers)
        raise ValueError(
            f"StepSkipping: the batch has {shown} documents (where position_ids are 0), its rows name {count}"
        )


def sent(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor for a device, which the host does not wait for."""
    made = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        made = made.pin_memory()
    return made.to(device, non_blocking=True)


def _bits(hidden: Sequence[Sequence[tuple[int, int]]], count: int, device: torch.device) -> Tensor:
    """[D, S + 1]: for each chain and stage, a bit for every stage that is hidden from it."""
    bits = [[0] * (count + 1) for _ in hidden]
    for of_stage, pairs in zip(bits, hidden):
        for late, early in pairs:
            of_stage[late] |= 1 << early
    # Bytes where they do: a mask is made of [B, T, T] of them.
    return sent(bits, torch.uint8 if count < 8 else torch.int64, device)
