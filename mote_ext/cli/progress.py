"""A bar of optimiser steps with the loss beside it, for commands that train."""

from __future__ import annotations

import sys

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """One bar on stderr; evaluations and samples run inside of it."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Shows the bar, at a resumed run's place."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="Training", unit="step", file=sys.stderr
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """One step further."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """The newest losses."""
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in (logs or {})}
        if self._bar is not None and shown:
            self._bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
