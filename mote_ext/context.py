"""The one object through which a model tells its MoTELinears the stage of every token.

The backbone sets it for the length of one forward; a recomputation under gradient checkpointing sets the same ids
again. Nothing else is kept between forwards, so a stale id cannot be read: reading without ids raises.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class StageContext:
    """stage_ids: int32 [B, T] inside a forward, None outside. experts_enabled: False inside disable_experts()."""

    def __init__(self) -> None:
        self.stage_ids: Tensor | None = None
        self.explicit_ids: Tensor | None = None  # given to the outer forward, for the backbone to take
        self.experts_enabled = True

    def ids_for(self, x: Tensor) -> Tensor:
        """The ids of the tokens of x [..., K], in x's leading shape; models that flatten their tokens are served too.

        RuntimeError: no forward of the backbone is running. ValueError: the number of tokens differs.
        """
        ids = self.stage_ids
        if ids is None:
            raise RuntimeError(
                "MoTELinear: no stage ids. Call the MoTE model or its backbone, which derive them from the tokens, not "
                "a part of it; or pass stage_ids to the layer"
            )
        if ids.shape == x.shape[:-1]:
            return ids
        if x.dim() == 2 and x.shape[0] == ids.numel():
            return ids.reshape(-1)
        raise ValueError(
            f"MoTELinear: x has {list(x.shape[:-1])} tokens, the forward's stage ids are {list(ids.shape)}; layers "
            "that select or reorder tokens (mixture-of-experts blocks) cannot be targets: use exclude_modules"
        )

    def run(self, stage_ids: Tensor | None, function: Callable, *args, **kwargs):
        """function(…) with these ids, and afterwards what was there before.

        RuntimeError: another forward of the same model is running, in another thread: its tokens would be routed by
        these ids.
        """
        before = self.stage_ids
        if before is not None and before is not stage_ids:
            raise RuntimeError(
                "a forward of this MoTE model is running already, perhaps in another thread: one model serves one "
                "forward at a time; use a lock, or a copy of the model a thread"
            )
        self.stage_ids = stage_ids
        try:
            return function(*args, **kwargs)
        finally:
            self.stage_ids = before

    def checkpointed(self, checkpoint: Callable) -> Callable:
        """A gradient-checkpointing function whose recomputation sees the ids of its own forward."""

        def with_ids(function, *args, **kwargs):
            ids = self.stage_ids

            def forward(*inner, **options):
                return self.run(ids, function, *inner, **options)

            return checkpoint(forward, *args, **kwargs)

        return with_ids
