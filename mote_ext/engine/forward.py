"""PagedModel: one plan of the scheduler through a transformers model, over the paged cache.

The attention implementation, and on a CPU the products of few rows, are switched for the length of the forward and back
again whatever happens in it: a plain forward or generate() of the same model between two steps gives what it always
gave.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mote_ext import compat
from mote_ext.engine.attention import BATCH, NAME, PagedBatch
from mote_ext.engine.cache import PagedCache
from mote_ext.engine.replay import DecodeBatch, DecodeInputs, DecodeReplay
from mote_ext.skinny import SkinnyLinears


class PagedModel:
    """model: a MoTE model; cache: its pages; kernel: of attention, None for SDPA (see kernels.py); recorder: of decode
    steps (see replay.py), None: none is recorded"""

    def __init__(self, model, cache: PagedCache, kernel=None, recorder=None) -> None:
        self.model, self.cache, self.kernel = model, cache, kernel
        self._configs = compat.attention_configs(model)
        self._linears = SkinnyLinears(model)
        self._replay = DecodeReplay(self._decode, cache, recorder)

    @torch.no_grad()
    def __call__(self, plan) -> tuple[Tensor, PagedBatch | None]:
        """Logits [L, V'] float32 of the plan's logits_at, the keys and values of its tokens written; and the batch,
        unless the step was replayed.

        plan: flat arrays as _C.StepScheduler.plan() gives them
        """
        device = self.cache.device
        self._prepare_pages(plan, device)
        logits = self._replay(plan)
        if logits is not None:
            return logits.float(), None
        batch = PagedBatch(plan, self.cache, self.kernel)
        arrays = plan.token_ids, plan.positions, plan.stage_ids, plan.logits_at
        return self._forward(*(_on(array, device) for array in arrays), batch).float(), batch

    def weights_changed(self) -> None:
        self._replay.forget()

    def _decode(self, inputs: DecodeInputs, batch: DecodeBatch) -> Tensor:
        return self._forward(inputs.token_ids, inputs.positions, inputs.stage_ids, inputs.logits_at, batch)

    def _forward(self, token_ids: Tensor, positions: Tensor, stage_ids: Tensor, logits_at: Tensor, batch) -> Tensor:
        with compat.attention_switched(self._configs, NAME), self._linears.switched_on():
            outputs = self.model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                stage_ids=stage_ids[None],
                use_cache=False,
                logits_to_keep=logits_at,
                **{BATCH: batch},
            )
        return outputs.logits[0]

    def _prepare_pages(self, plan, device: torch.device) -> None:
        if len(plan.copies):
            copies = _on(plan.copies.astype(np.int64), device)
            self.cache.copy_pages(copies[:, 0], copies[:, 1])
        first_slots = plan.slots[plan.slots % self.cache.page_size == 0]
        if len(first_slots):
            self.cache.clear_pages(_on(first_slots // self.cache.page_size, device))


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.copy()).to(device, non_blocking=True)  # the scheduler writes its arrays again
