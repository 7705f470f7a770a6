"""Puts experts around a model's linear layers: finds the targets, replaces each in place, all sharing one context, and
says which parameters are trained."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from mote_ext.config import MoTEConfig
from mote_ext.context import StageContext
from mote_ext.linear import MoTELinear, is_linear
from mote_ext.markers import MarkerEmbedding, MarkerHead

ALL_LINEAR = "all-linear"


def inject_experts(backbone: nn.Module, config: MoTEConfig, context: StageContext) -> list[str]:
    """Replaces every target of the backbone by a MoTELinear around it; returns the targets' names.

    ValueError: a target or exclusion that matches nothing, with what there is; experts are in there already.
    """
    if any(isinstance(module, MoTELinear) for module in backbone.modules()):
        raise ValueError("this model has experts already; get_mote_model and from_base take a model without")
    targets = find_targets(backbone, config)
    for name in targets:
        base_layer = backbone.get_submodule(name)
        layer = MoTELinear(
            base_layer,
            config.num_stage_experts,
            config.r,
            config.lora_alpha,
            shared_expert=config.shared_expert,
            mix=config.mix if config.num_stage_experts else 0.0,  # alone the shared expert has weight 1
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            context=context,
        )
        layer.train(base_layer.training)
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer)
    return targets


def remove_experts(backbone: PreTrainedModel) -> None:
    """Puts back what inject_experts and the marker rows replaced in the backbone."""
    for name, layer in list(experts_of(backbone)):
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer.base_layer)
    embedding = backbone.get_input_embeddings()
    if isinstance(embedding, MarkerEmbedding):
        backbone.set_input_embeddings(embedding.base)


def find_targets(backbone: nn.Module, config: MoTEConfig) -> list[str]:
    """Names of the linear layers that target_modules means and exclude_modules does not."""
    linears = [name for name, module in backbone.named_modules() if name and is_linear(module)]
    targets = linears if config.target_modules == ALL_LINEAR else _matching("target_modules", config, linears)
    if config.exclude_modules:
        excluded = set(_matching("exclude_modules", config, linears))
        targets = [name for name in targets if name not in excluded]
    if not targets:
        raise ValueError(f"MoTEConfig: target_modules leaves no linear layer; there are {_kinds(linears)}")
    return targets


def experts_of(module: nn.Module) -> Iterator[tuple[str, MoTELinear]]:
    """(name, layer) of every MoTELinear inside."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, MoTELinear))


def freeze_base(model: nn.Module) -> None:
    """Leaves requires_grad on experts and, where the configuration trains them, marker rows alone."""
    model.requires_grad_(False)
    for _, layer in experts_of(model):
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, MarkerEmbedding | MarkerHead):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(model.routing.config.train_markers)


def _matching(field: str, config: MoTEConfig, linears: list[str]) -> list[str]:
    """A string is a regular expression over whole names; each item of a list is a whole name or its ending."""
    wanted = getattr(config, field)
    if isinstance(wanted, str):
        found = [name for name in linears if re.fullmatch(wanted, name)]
        missing = [] if found else [wanted]
    else:
        endings = list(wanted)
        found = [name for name in linears if any(_ends_with(name, ending) for ending in endings)]
        missing = [ending for ending in endings if not any(_ends_with(name, ending) for name in linears)]
    if missing:
        raise ValueError(f"MoTEConfig: {field} {missing} match no linear layer; there are {_kinds(linears)}")
    return found


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _kinds(linears: list[str]) -> list[str]:
    """The names with layer numbers as *, each once."""
    return sorted({re.sub(r"\b\d+\b", "*", name) for name in linears})
