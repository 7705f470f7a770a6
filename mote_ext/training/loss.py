"""The loss: cross-entropy of the labelled tokens, in float32, and its sums by stage.

Logits are made only of the columns in which some row has a label; those of the question, which never has one, are the
larger part of a short chain's memory. What the host has to know of a batch, the columns and the rows of its samples, is
written down where the batch is made, so that a step never reads anything back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mote_ext.chains.block_mask import require_documents
from mote_ext.chains.dataset import NO_LOSS
from mote_ext.stages import PROMPT, StageTable, stage_ids_from_tokens

COLUMNS, ROWS = "loss_columns", "sample_rows"


class AnnotatingCollator:
    """A collator's batch, with COLUMNS (int64 [C]) and, in place of "rows", ROWS (numbers, which no device gets).

    ValueError: a packed batch has not as many documents as rows.
    """

    def __init__(self, collator: Callable[[Sequence], dict]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence) -> dict:
        batch = dict(self.collator(samples))
        labels = batch["labels"].clone()
        labels[:, 0] = NO_LOSS  # nothing predicts it; so a count of labels is a count of targets
        batch["labels"], batch[COLUMNS] = labels, loss_columns(labels)
        if "rows" in batch:
            rows = batch.pop("rows")
            if "position_ids" in batch and "attention_mask" not in batch:
                require_documents(batch["position_ids"] == 0, rows.numel())
            batch[ROWS] = rows.tolist()
        return batch


def loss_columns(labels: Tensor) -> Tensor:
    """int64 [C]: the columns whose logits predict a label of some row; labels are [B, T]."""
    return (labels[:, 1:] != NO_LOSS).any(0).nonzero().flatten()


def labelled_losses(model, batch: dict, labels: Tensor, columns: Tensor) -> tuple:
    """(outputs, losses, targets) of one forward, the last two [B, C]; C columns, as loss_columns finds them."""
    targets = labels[:, columns + 1]
    outputs = model(**batch, use_cache=False, logits_to_keep=columns)
    targets = targets.to(outputs.logits.device)  # elsewhere than the batch where layers lie on several devices
    return outputs, token_losses(outputs.logits, targets), targets


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 [B, C]: -log p of each target, 0 where it is NO_LOSS. logits [B, C, V] of any dtype, targets [B, C]."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NO_LOSS, reduction="none")
    return losses.view(targets.shape)


@torch.no_grad()
def stage_sums(
    losses: Tensor,
    targets: Tensor,
    columns: Tensor,
    input_ids: Tensor,
    table: StageTable,
    *,
    position_ids: Tensor | None = None,
    stage_ids: Tensor | None = None,
) -> Tensor:
    """float32 [B, 2, S + 1]: sum of the losses and number of targets of each row, by stage, "prompt" last.

    losses and targets are [B, C], of the columns; the other arguments are the batch's, [B, T]. A target belongs to its
    own token's stage, EOS to the stage before it, and whatever has none to "prompt".
    """
    prompt = len(table)
    if stage_ids is None:
        stage_ids = stage_ids_from_tokens(input_ids, table, prompt_id=prompt, position_ids=position_ids)
    stage_ids = torch.where(stage_ids < 0, prompt, stage_ids)
    own, before = stage_ids[:, columns + 1], stage_ids[:, columns]
    stages = torch.where(own == prompt, before, own)
    # A product, not index_add_: that one adds in any order on a GPU.
    member = stages[..., None] == torch.arange(prompt + 1, device=stages.device)
    pair = torch.stack((losses.detach(), (targets != NO_LOSS).float()), 1)
    return pair @ member.to(pair.device, pair.dtype)


class StageLosses:
    """Adds up stage_sums on the device until they are asked for."""

    def __init__(self, table: StageTable) -> None:
        self.names = (*table.names, PROMPT)
        self._sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """sums [B, 2, S + 1] of stage_sums."""
        total = sums.sum(0)
        self._sums = total if self._sums is None else self._sums + total

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, tuple[float, float]]:
        """{stage: (sum of losses, number of targets)} since the last call; stages without targets are left out.

        reduce: sums a tensor over the processes. Reads from the device.
        """
        if self._sums is None:
            return {}
        losses, counts = reduce(self._sums).tolist()
        self._sums = None
        return {name: (loss, count) for name, loss, count in zip(self.names, losses, counts) if count > 0}
