"""Notices that a model's weights, or who of the experts sees what, changed: cached pages are then another model's."""

from __future__ import annotations

from torch import nn


class WeightsWatch:
    """What a training step or load_state_dict does to the weights between two steps of an engine.

    key: a number for the pages made since the last change

    Not seen: values written through `.data` (no version says so), and modules that are put in another's
    place; after these the engine's reset_cache() is needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.key = model, 0
        self.renew()

    def renew(self) -> None:
        self.key += 1
        # Looked up in their modules at each step, for a parameter may be replaced; walking the modules costs ten times.
        self._places = [
            (m._parameters, name) for m in self._model.modules() for name, p in m._parameters.items() if p is not None
        ]
        self._stamp = self._stamp_now()

    def changed(self) -> bool:
        return self._stamp != self._stamp_now()

    def _stamp_now(self) -> tuple:
        """Every in-place change raises a parameter's version; another one has another identity, or lies elsewhere."""
        config = self._model.routing.config
        found = [own[name] for own, name in self._places]
        versions = sum(p._version for p in found if not p.is_inference())
        settings = config.assignment, config.seed, config.prompt_id(training=False)
        return versions, sum(map(id, found)), sum(p.data_ptr() for p in found), settings
