"""What a MoTE folder holds, from its configuration and the headers of its safetensors files; no weight is read.

adapter folder   layers.0.mlp.up_proj.lora_A               markers.input_rows
full folder      model.base.layers.0.mlp.up_proj.lora_A    model.base.embed_tokens.rows, lm_head.rows
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from mote_ext.cli.errors import CommandError
from mote_ext.cli.folder import EXPERT_FILES, is_adapter_folder
from mote_ext.config import MoTEConfig

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MARKERS = re.compile(r"markers\.\w+|.*\.rows|.*\.marker_bias")


@dataclass(frozen=True)
class TargetKind:
    """Layers of one name (numbers as *) and one shape, and the parameters of all their experts."""

    target: str
    count: int
    num_in: int
    num_out: int
    rank: int
    parameters: int


@dataclass(frozen=True)
class Census:
    """kinds of targets, parameters of one expert, of all marker rows, and of everything (None: the base is unknown)."""

    is_adapter: bool
    kinds: list[TargetKind]
    an_expert: int
    experts: int
    markers: int
    trained: int
    everything: int | None


def take_census(folder: Path, config: MoTEConfig) -> Census:
    """Counts what is in the folder. CommandError: files are missing or damaged, or do not fit the configuration."""
    is_adapter = is_adapter_folder(folder)
    shapes = read_shapes(folder, EXPERT_FILES if is_adapter else "*.safetensors")
    layers = {name.removesuffix(".lora_A") for name in shapes if name.endswith(".lora_A")}
    kinds = _kinds(shapes, sorted(layers), config)
    experts = sum(kind.parameters for kind in kinds)
    markers = sum(math.prod(shape) for name, shape in shapes.items() if _MARKERS.fullmatch(name))
    everything = sum(map(math.prod, shapes.values()))
    if is_adapter:
        base = count_base(config)
        everything = None if base is None else base + everything
    return Census(
        is_adapter=is_adapter,
        kinds=kinds,
        an_expert=experts // _num_experts(config),
        experts=experts,
        markers=markers,
        trained=experts + markers * config.train_markers,
        everything=everything,
    )


def read_shapes(folder: Path, pattern: str) -> dict[str, list[int]]:
    """Name -> shape of every tensor in the matching files."""
    shapes = {}
    for path in sorted(folder.glob(pattern)):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CommandError(f"{path} is damaged or no safetensors file ({error}); copy it again") from error
    if not shapes:
        raise CommandError(f"{folder} has a config.json, but no weights: there is no safetensors file")
    return shapes


def count_base(config: MoTEConfig) -> int | None:
    """Parameters of the base, from its configuration: it is built without memory. None: it is not recorded."""
    if config.base_config is None:
        return None
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config.original_base_config())
    return sum(parameter.numel() for parameter in base.parameters())


def _kinds(shapes: dict[str, list[int]], layers: list[str], config: MoTEConfig) -> list[TargetKind]:
    if not layers:
        raise CommandError("the configuration says MoTE, but there are no experts among the weights")
    found: dict[tuple, int] = {}
    for layer in layers:
        num_in, num_out = _sizes(shapes, layer, config)
        kind = (_NUMBER.sub("*", f".{layer.removeprefix('model.base.')}.")[1:-1], num_in, num_out)
        found[kind] = found.get(kind, 0) + 1
    each = _num_experts(config) * config.r
    return [
        TargetKind(name, count, num_in, num_out, config.r, count * each * (num_in + num_out))
        for (name, num_in, num_out), count in found.items()
    ]


def _sizes(shapes: dict[str, list[int]], layer: str, config: MoTEConfig) -> tuple[int, int]:
    """(in, out) of a layer from its experts [E, r, in] and [E, out, r]."""
    a, b = shapes[f"{layer}.lora_A"], shapes.get(f"{layer}.lora_B", [])
    num_experts = _num_experts(config)
    if a[:2] != [num_experts, config.r] or b[::2] != [num_experts, config.r]:
        raise CommandError(
            f"{layer}: {num_experts} experts of rank {config.r} expected by config.json, got lora_A {a} and lora_B {b}"
        )
    return a[2], b[1]


def _num_experts(config: MoTEConfig) -> int:
    return config.num_experts
