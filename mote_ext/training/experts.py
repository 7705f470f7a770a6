"""Single experts inside stacked parameters: the norm of each one's gradient, and experts that are not trained.

Under FSDP2 a process holds a part of each stacked tensor; all of this works on that part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from mote_ext.checkpoint import mote_config_of
from mote_ext.inject import experts_of
from mote_ext.markers import MarkerEmbedding, MarkerHead

SHARED, MARKERS = "shared", "markers"


def expert_names(model: PreTrainedModel) -> list[str]:
    """In the order of the slices."""
    config = mote_config_of(model)
    stages = model.routing.table.names if config.num_stage_experts else ()
    return [*stages, *([SHARED] if config.shared_expert else [])]


def stacked_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """lora_A and lora_B of every layer."""
    for _, layer in experts_of(model):
        yield layer.lora_A
        yield layer.lora_B


def marker_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Rows and biases of the markers that are trained, each once."""
    layers = [module for module in model.modules() if isinstance(module, MarkerEmbedding | MarkerHead)]
    return [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a stacked tensor [E, …], and the number of the first expert in it."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    first = 0
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            size = -(-tensor.shape[0] // tensor.device_mesh.size(axis))  # as torch.chunk cuts
            first = min(tensor.device_mesh.get_local_rank(axis) * size, tensor.shape[0])
    return tensor.to_local(), first


@torch.no_grad()
def gradient_norms(model: PreTrainedModel, scale: float = 1.0) -> dict[str, Tensor]:
    """{expert's name, and "markers": norm of its gradient over all layers}, float32 on the device.

    scale: what the loss was multiplied by (fp16's gradient scaler)
    """
    names = expert_names(model)
    stacked = [parameter.grad for parameter in stacked_parameters(model) if parameter.grad is not None]
    if not stacked:
        return {}
    squares = torch.zeros(len(names) + 1, device=stacked[0].device)
    for gradient in stacked:
        part, first = local_part(gradient)
        norms = torch.linalg.vector_norm(part, dim=(1, 2), dtype=torch.float32)
        squares[first : first + len(part)] += norms.square()
    for parameter in marker_parameters(model):
        if parameter.grad is not None:
            squares[-1] += torch.linalg.vector_norm(local_part(parameter.grad)[0], dtype=torch.float32).square()
    if isinstance(stacked[0], DTensor):  # then the markers are sharded as well
        torch.distributed.all_reduce(squares, group=stacked[0].device_mesh.get_group())
    return dict(zip([*names, MARKERS], squares.sqrt() / scale))


class FrozenExperts(TrainerCallback):
    """Experts that keep every bit although they are slices of tensors that are trained.

    Their gradients are zeroed before the norm of all gradients is taken, and after each step their values are put back,
    which holds against weight decay and against momentum from a checkpoint in which they were not frozen.

    names: of expert_names. ValueError: another one.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        known = expert_names(model)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"frozen_stages must be experts of this model, {known}, got {unknown}")
        self.model = model
        self.experts = sorted({known.index(name) for name in names})
        self._kept: list[list[Tensor]] = []

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Call it when the gradients of a step are complete."""
        for parameter in stacked_parameters(self.model):
            if parameter.grad is not None:
                for slice_ in self._slices(parameter.grad):
                    slice_.zero_()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Notes the values, after a checkpoint was read and the model sharded."""
        self._kept = [[s.clone() for s in self._slices(p.detach())] for p in stacked_parameters(self.model)]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Puts them back."""
        for parameter, kept in zip(stacked_parameters(self.model), self._kept):
            for slice_, value in zip(self._slices(parameter.detach()), kept):
                slice_.copy_(value)

    def _slices(self, tensor: Tensor) -> list[Tensor]:
        part, first = local_part(tensor)
        return [part[e - first] for e in self.experts if first <= e < first + len(part)]
