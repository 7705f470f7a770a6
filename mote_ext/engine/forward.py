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
from mote_ext.skinny import SkinnyLinears


class PagedModel:
    """model: a MoTE model; cache: its pages; kernel: of attention, None for SDPA (see kernels.py)"""

    def __init__(self, model, cache: PagedCache, kernel=None) -> None:
        self.model, self.cache, self.kernel = model, cache, kernel
        self._configs = compat.attention_configs(model)
        self._linears = SkinnyLinears(model)

    @torch.no_grad()
    def __call__(self, plan) -> tuple[Tensor, PagedBatch]:
        """Logits [L, V'] float32 of the plan's logits_at, the keys and values of its tokens written; and the batch.

        plan: flat arrays as _C.StepScheduler.plan() gives them
        """
        device = self.cache.device
        self._prepare_pages(plan, device)
        batch = PagedBatch(plan, self.cache, self.kernel)
        with compat.attention_switched(self._configs, NAME), self._linears.switched_on():
            logits = self.model(
                input_ids=_on(plan.token_ids, device)[None],
                position_ids=_on(plan.positions, device)[None],
                stage_ids=_on(plan.stage_ids, device)[None],
                use_cache=False,
                logits_to_keep=_on(plan.logits_at, device),
                **{BATCH: batch},
            ).logits
        return logits[0].float(), batch

    def _prepare_pages(self, plan, device: torch.device) -> None:
        if len(plan.copies):
            copies = _on(plan.copies.astype(np.int64), device)
            self.cache.copy_pages(copies[:, 0], copies[:, 1])
        first_slots = plan.slots[plan.slots % self.cache.page_size == 0]
        if len(first_slots):
            self.cache.clear_pages(_on(first_slots // self.cache.page_size, device))


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.copy()).to(device, non_blocking=True)  # the scheduler writes its arrays again
