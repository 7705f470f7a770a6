"""From samples of a ChainDataset to a batch: padded on the right, or packed into one row without padding.

    padded  input_ids, labels, attention_mask [B, T], rows [B, 1]
    packed  input_ids, labels, position_ids   [1, T], rows [1, D] of D documents

The packed keys are those of transformers' DataCollatorWithFlattening: without an attention_mask a model finds the
documents where position_ids begin again at 0, and so does the stage scan. `rows` is for keyed draws (block_mask.py) and
is taken out before the model sees the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mote_ext.chains.dataset import NO_LOSS
from mote_ext.encoding import pad_id_of


class ChainCollator:
    """Callable as a DataLoader's collate_fn.

    tokenizer:          a tokenizer, whose padding token fills up rows (else its EOS), or the token's id. Labels never
                        depend on it: padding may be EOS, which carries loss where it ends a chain
    packing:            put all samples into one row
    pad_to_multiple_of: widths to round up to
    """

    def __init__(self, tokenizer, packing: bool = False, pad_to_multiple_of: int | None = None) -> None:
        if packing and pad_to_multiple_of is not None:
            raise ValueError("ChainCollator: packing leaves no padding, so pad_to_multiple_of must be None with it")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"ChainCollator: pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        self.pad_id = tokenizer if isinstance(tokenizer, int) else pad_id_of(tokenizer)
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        """int64 tensors, as above. ValueError: no samples."""
        if not samples:
            raise ValueError("ChainCollator: at least one sample is needed, got none")
        return self._packed(samples) if self.packing else self._padded(samples)

    def _padded(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        step = self.pad_to_multiple_of
        width = -(-max(len(sample["input_ids"]) for sample in samples) // step) * step

        def filled(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows])

        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": filled(ids, self.pad_id),
            "labels": filled([sample["labels"] for sample in samples], NO_LOSS),
            "attention_mask": filled([[1] * len(row) for row in ids], 0),
            "rows": torch.tensor([[sample["row"]] for sample in samples]),
        }

    def _packed(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        ids = [token for sample in samples for token in sample["input_ids"]]
        # A document's first token would be predicted from its neighbour's last.
        labels = [label for sample in samples for label in (NO_LOSS, *sample["labels"][1:])]
        positions = [place for sample in samples for place in range(len(sample["input_ids"]))]
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "rows": torch.tensor([[sample["row"] for sample in samples]]),
        }
