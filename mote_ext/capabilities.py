"""What every MoTE model can do besides its forward, whether it is a MoTEForCausalLM or the user's own class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mote_ext.routing import StageRouting


class MoTECapabilities:
    """Mixed into the model classes. Expects `routing`."""

    routing: StageRouting

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many, and how many a token uses, as PEFT's models do."""
        print(self.trainable_parameters_line())

    def trainable_parameters_line(self) -> str:
        parameters = list(self.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"

    @contextmanager
    def disable_experts(self) -> Iterator[None]:
        """Inside, the model is its base: no experts, and markers can neither be read nor written. For all threads."""
        context = self.routing.context
        before, context.experts_enabled = context.experts_enabled, False
        try:
            yield
        finally:
            context.experts_enabled = before

    disable_adapter = disable_experts

    @property
    def last_stage_ids(self):
        """Stage ids [B, T] int32 of the newest forward, or None."""
        return self.routing.last_stage_ids

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs) -> None:
        # Overridden, not hooked: which calls a hook on a layer sees in the recomputation differs from release to
        # release.
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = self.routing.context.checkpointed(gradient_checkpointing_func)
            if enable:
                # Reentrant checkpointing gives no gradient to layers whose input has none, and the base is frozen.
                self.enable_input_require_grads()
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
