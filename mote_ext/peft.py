"""Experts as plain PEFT LoRA folders, one an expert, and back.

    directory/analysis/adapter_config.json         r, lora_alpha, the target modules by their whole names
                       adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, K], …lora_B.weight [N, r]
    and so on for every stage, and `shared`

PEFT computes lora_alpha / r · B A x, so lora_alpha = the expert's scale · r, mixing weight and rsLoRA folded in.
Reading and writing need no peft. Marker rows stay behind: PEFT has no place for them. What such a folder can and
cannot be used for: docs/peft.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mote_ext.capabilities import MoTECapabilities
from mote_ext.checkpoint import backbone_of, mote_config_of
from mote_ext.inject import experts_of
from mote_ext.linear import MoTELinear

SHARED = "shared"
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Fields of PEFT's LoraConfig that are read here, or that do not change what a trained adapter computes. Every other
# field that is set is refused: DoRA, patterns of ranks, trained biases, and whatever comes in later releases.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
_HARMLESS = {
    *("peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the weights' names say it
    *("fan_in_fan_out", "lora_dropout", "eva_config", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "qalora_group_size"),
}
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def export_experts(model: PreTrainedModel, directory: str | Path, *, fuse_shared: bool = False) -> dict[str, Path]:
    """Writes every expert as a PEFT LoRA folder of the base's causal language model; returns {expert's name: folder}.

    model:       a MoTE model of either kind
    directory:   gets a folder for each stage, by its name, and `shared`; files of these names are overwritten
    fuse_shared: no `shared` folder; that of a stage holds its expert's rank and then the shared expert's, so that it
                 alone computes what the MoTE model computes when all tokens are in that stage

    Slices are written bit for bit in their dtype (float32 masters). A fused folder has the stage's scale: B of its
    shared half is multiplied by the ratio of the two, which for mix=0.5 is 1.
    TypeError: not a MoTE model. ValueError: fuse_shared=True without a shared expert, or with a stage scale of 0.
    """
    layers = _layers_of("export_experts", model)
    config = mote_config_of(model)
    if fuse_shared and not (config.shared_expert and config.num_stage_experts):
        missing = "a shared expert" if config.num_stage_experts else "stage experts"
        raise ValueError(f"export_experts: fuse_shared=True needs {missing}, this model has none; leave it out")
    scales = next(iter(layers.values())).expert_scales()
    if fuse_shared and scales[0] == 0:
        raise ValueError("export_experts: fuse_shared=True needs stages with a weight, here mix=0; leave it out")

    names = _expert_names(model)
    folders = {}
    for expert, name in enumerate(names[: config.num_stage_experts] if fuse_shared else names):
        tensors = {}
        for module, layer in layers.items():
            tensors.update(zip(_keys(module), _slices(layer, expert, fuse_shared)))
        rank = 2 * config.r if fuse_shared else config.r
        adapter_config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.base_model_name_or_path,
            "revision": config.base_revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": scales[expert] * rank,
            "lora_dropout": config.lora_dropout,
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
            "target_modules": list(layers),
        }
        folders[name] = Path(directory) / name
        _write_folder(folders[name], adapter_config, tensors)
    return folders


def import_experts(model: PreTrainedModel, folders: Mapping[str, str | Path]) -> None:
    """Fills experts of a MoTE model from PEFT LoRA folders, all that are named or, on any error, none.

    model:   a MoTE model of either kind
    folders: {expert's name: folder}, names as export_experts gives them; experts that are not named stay as they are

    Where a folder's scale, lora_alpha / r (/ √r with use_rslora), is not the expert's own, B is multiplied by their
    ratio; export and then import are bit-exact. A smaller rank is allowed: B's columns beyond it become zero, A's rows
    beyond it stay, so that they can still be trained. The model keeps its own lora_dropout, which acts in training
    alone.
    TypeError: not a MoTE model. ValueError: no such expert; a file missing, pickled or damaged; weights missing,
    unexpected or misshapen, with the list; a larger rank; a configuration that is more than plain LoRA, by field.
    """
    layers = _layers_of("import_experts", model)
    names = _expert_names(model)
    if unknown := [name for name in folders if name not in names]:
        raise ValueError(f"import_experts: folders must name experts of this model, {names}, got {unknown}")
    adapters = {names.index(name): _read_adapter(layers, names.index(name), Path(f)) for name, f in folders.items()}
    with torch.no_grad():
        for expert, tensors in adapters.items():
            for module, layer in layers.items():
                A, B = (tensors[key] for key in _keys(module))
                rank = len(A)
                layer.lora_A[expert, :rank] = A.to(layer.lora_A)
                layer.lora_B[expert, :, :rank] = B.to(layer.lora_B)
                layer.lora_B[expert, :, rank:] = 0


def _layers_of(call: str, model: PreTrainedModel) -> dict[str, MoTELinear]:
    """{module's name in the base's causal language model: layer}, in the model's order."""
    if not isinstance(model, MoTECapabilities):
        raise TypeError(
            f"{call}: model must be a MoTE model, made by MoTEForCausalLM or get_mote_model and not wrapped further, "
            f"got {type(model).__name__}"
        )
    backbone = backbone_of(model)
    # A family's backbones and causal models share one prefix: "model", "transformer", "gpt_neox", …
    return {f"{backbone.base_model_prefix}.{name}": layer for name, layer in experts_of(backbone)}


def _expert_names(model: PreTrainedModel) -> list[str]:
    """In the order of the slices."""
    config = mote_config_of(model)
    stages = model.routing.table.names if config.num_stage_experts else ()
    return [*stages, *([SHARED] if config.shared_expert else [])]


def _slices(layer: MoTELinear, expert: int, fuse_shared: bool) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of an expert; fused with the shared one [2r, K] and [N, 2r], in the scale of the first."""
    A, B, scales = layer.lora_A.detach(), layer.lora_B.detach(), layer.expert_scales()
    if not fuse_shared:
        return A[expert], B[expert]
    shared_B = B[-1] * (scales[-1] / scales[expert])
    return torch.cat((A[expert], A[-1])), torch.cat((B[expert], shared_B), dim=1)


def _keys(module: str) -> tuple[str, str]:
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _write_folder(folder: Path, adapter_config: dict, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _read_adapter(layers: dict[str, MoTELinear], expert: int, folder: Path) -> dict[str, Tensor]:
    """The folder's tensors, known to fit this expert, B in the expert's scale. ValueError: whatever does not fit."""
    rank, scale = _read_config(folder)
    tensors = _read_weights(folder)
    layer = next(iter(layers.values()))
    if rank > layer.r:
        raise ValueError(
            f"{folder}: rank {rank} does not fit into this model's experts of rank {layer.r}; make the model with "
            f"MoTEConfig(r={rank}), or, if the folder was exported with fuse_shared=True, export it without"
        )
    _require_fit(folder, layers, rank, tensors)
    own_scale = layer.expert_scales()[expert]
    # s · r / r may differ from s in its last bit; that ratio is no scale to fold into B.
    if math.isclose(scale, own_scale):
        return tensors
    if own_scale == 0:
        raise ValueError(
            f"{folder}: lora_alpha gives the adapter a scale of {scale:g}, in this model the expert's is 0; make the "
            "model with another mix"
        )
    return {
        key: tensor.double() * (scale / own_scale) if key.endswith(".lora_B.weight") else tensor
        for key, tensor in tensors.items()
    }


def _read_config(folder: Path) -> tuple[int, float]:
    """(rank, scale) of a plain LoRA. ValueError: no such file, no JSON object, a field that says more."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} is missing; a folder that PEFT saved has it beside the weights")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: peft_type must be 'LORA', got {found!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: r must be a positive int and lora_alpha a number, got {rank!r} and {alpha!r}")

    wrong = {name: value for name, value in config.items() if value and name not in _READ | _HARMLESS}
    if config.get("bias", "none") != "none":
        wrong["bias"] = config["bias"]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        wrong["init_lora_weights"] = init
    if wrong:
        fields = ", ".join(f"{name}={value!r}" for name, value in sorted(wrong.items()))
        raise ValueError(
            f"{path}: an expert is plain LoRA on the base's own weights and cannot hold {fields}; train the adapter "
            "without, or, where a field changes nothing, remove it from the file"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise ValueError(
                f"{folder} holds {PICKLED}, a pickle, which can run code and is never read here; load it with PEFT, if "
                f"you trust it, and save it again as {WEIGHTS} (save_pretrained's default)"
            )
        raise ValueError(f"{path} is missing; a folder that PEFT saved has it beside {CONFIG}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from error


def _require_fit(folder: Path, layers: dict[str, MoTELinear], rank: int, tensors: dict[str, Tensor]) -> None:
    wanted = {}
    for module, layer in layers.items():
        key_A, key_B = _keys(module)
        wanted[key_A], wanted[key_B] = [rank, layer.in_features], [layer.out_features, rank]
    wrong = [f"missing {key}" for key in wanted if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in wanted]
    for key, shape in wanted.items():
        got = tensors.get(key)
        if got is not None and (list(got.shape) != shape or not got.is_floating_point()):
            wrong.append(f"{key}: expected floating-point {shape}, got {got.dtype} {list(got.shape)}")
    if wrong:
        raise ValueError(
            f"{folder}: the weights do not fit this model, whose target_modules and base must be the adapter's:\n  "
            + "\n  ".join(wrong)
        )
