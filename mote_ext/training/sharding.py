"""FSDP2 for a MoTE model: which parameters are gathered together, and states in and out of shards.

torch's fully_shard wants one dtype in a unit, and the experts are float32 over a base in bfloat16. So a decoder layer
has two units, one of its base layers and one of its experts, each gathered at once; marker rows make up the root's.
Norms and other frozen vectors are small and stay whole. accelerate's own FSDP2 knows units of whole layers only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

from mote_ext.checkpoint import backbone_of
from mote_ext.inject import experts_of
from mote_ext.linear import MoTELinear
from mote_ext.markers import MarkerEmbedding, MarkerHead


def is_sharded(model: nn.Module) -> bool:
    """Whether shard_for_training was here."""
    return isinstance(model, FSDPModule)


def shard_for_training(
    model: PreTrainedModel, mesh: DeviceMesh | None = None, *, device_type: str | None = None
) -> PreTrainedModel:
    """Spreads a MoTE model over the processes, in place, with torch's fully_shard (FSDP2); returns it.

    mesh: one-dimensional; default all processes. Make the optimiser afterwards. A second call changes nothing
    device_type: of the default mesh, "cuda" or "cpu"; default that of the parameters. A model on the CPU goes onto the
          processes' devices unit by unit, so that no device holds it whole; each process's CPU does while it is loaded
    Parameters and gradients are DTensors then. The experts are cut along their rank or width where the number of
    processes divides it, which leaves every process an equal part of every expert, else expert by expert.
    RuntimeError: no process group. ValueError: a quantised base, whose weights no process can hold a part of; weights
    that are not loaded (meta).
    """
    if is_sharded(model):
        return model
    if not torch.distributed.is_initialized():
        raise RuntimeError("shard_for_training: no process group; start with torchrun or accelerate launch")
    _require_shardable(model)
    if mesh is None:
        device_type = device_type or next(model.parameters()).device.type
        mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for experts in _groups(model):
        fully_shard([layer.base_layer for layer in experts], mesh=mesh)
        fully_shard(experts, mesh=mesh, shard_placement_fn=lambda p: _placement(p, mesh.size()))
        for layer in experts:
            layer.base_changed()
    whole = {p for p in model.parameters() if not p.requires_grad and p.dim() < 2}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [end.base if isinstance(end, MarkerEmbedding | MarkerHead) else end for end in ends]
    # One unit, for with tied embeddings the two share their weight.
    fully_shard(bases, mesh=mesh, ignored_params=whole)
    rest = {
        p for p in model.parameters() if not p.requires_grad and not isinstance(p, torch.distributed.tensor.DTensor)
    }
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
    for parameter in rest:  # what stays whole is nobody's to move but ours
        parameter.data = parameter.data.to(mesh.device_type)
    return model


def _groups(model: PreTrainedModel) -> list[list[MoTELinear]]:
    """The layers with experts of each decoder layer; those outside of all, each by itself."""
    backbone = backbone_of(model)
    groups: dict[str, list[MoTELinear]] = {}
    for name, layer in experts_of(backbone):
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        groups.setdefault(".".join(parts[: number + 1]), []).append(layer)
    return list(groups.values())


def _placement(parameter: nn.Parameter, num_processes: int) -> Shard | None:
    """Along the first of rank and width that the processes divide; None is torch's default, expert by expert."""
    if parameter.dim() == 3:
        for dim in (1, 2):
            if parameter.shape[dim] % num_processes == 0:
                return Shard(dim)
    return None


def _require_shardable(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"shard_for_training: {name} is not loaded (meta); set fsdp_cpu_ram_efficient_loading: false"
            )
        if not parameter.dtype.is_floating_point or type(parameter) is not nn.Parameter:
            raise ValueError(
                f"shard_for_training: {name} is {type(parameter).__name__} {parameter.dtype}; a quantised base trains "
                "in one process or under DDP"
            )


@contextmanager
def without_accelerates_own() -> Iterator[None]:
    """Inside, accelerate does not see that it was launched for FSDP."""
    name = "ACCELERATE_USE_FSDP"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def leave_sharded_models_alone(accelerator) -> None:
    """accelerator.prepare gives a sharded model mixed precision but neither DDP around it nor another device."""
    prepare_model = accelerator.prepare_model

    def prepare(model, device_placement=None, evaluation_mode=False):
        if is_sharded(model):
            device_placement, evaluation_mode = False, True
        return prepare_model(model, device_placement, evaluation_mode)

    accelerator.prepare_model = prepare


def gathered_optimizer_state(model: nn.Module, optimizer) -> dict:
    """The optimiser's state with whole tensors by parameter name, on the CPU of the first process; others get {}."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, _bare(optimizer), options=options)


def spread_optimizer_state(model: nn.Module, optimizer, state: dict) -> None:
    """Gives each process its part of what gathered_optimizer_state gave."""
    set_optimizer_state_dict(model, _bare(optimizer), state, options=StateDictOptions(full_state_dict=True))


def _bare(optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
