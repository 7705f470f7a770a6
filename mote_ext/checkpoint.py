"""Saving and loading: whole models through transformers, experts alone in a folder of their own, both audited.

    adapter folder   config.json               MoTEConfig: the base's id, revision and digest too
                     mote_config.json          the same without the base's configuration, and the format's version
                     mote_experts.safetensors  lora_A, lora_B and marker rows, named by their place in the backbone
Nothing is unpickled, and nothing is written into a model before every file and every tensor has been checked.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mote_ext.config import MoTEConfig
from mote_ext.digest import weights_digest
from mote_ext.inject import experts_of, find_targets, freeze_base
from mote_ext.linear import linear_sizes
from mote_ext.markers import MarkerEmbedding, MarkerHead
from mote_ext.model_card import model_card

EXPERTS = "mote_experts"
FORMAT = 1
# What the tensors mean nothing without.
_MEANING = {"stages", "r", "lora_alpha", "use_rslora", "mix", "assignment", "shared_expert", "marker_ids"}
_logger = logging.getLogger(__name__)


def expert_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every trained tensor of a MoTE model by a name that does not depend on how the base is wrapped."""
    backbone = backbone_of(model)
    found = {}
    for name, layer in experts_of(backbone):
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, MarkerEmbedding):
        found["markers.input_rows"] = embedding.rows
    if isinstance(head, MarkerHead):
        if head.rows is not None:
            found["markers.output_rows"] = head.rows
        if head.marker_bias is not None:
            found["markers.output_bias"] = head.marker_bias
    return found


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The base's own backbone inside a MoTE model of either kind."""
    inner = getattr(model, model.base_model_prefix, model)
    return getattr(inner, "base", inner) if isinstance(inner.config, MoTEConfig) else inner


def save_experts(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    max_shard_size: int | str = "50GB",
    is_main_process: bool = True,
) -> None:
    """Writes the adapter folder of this MoTE model. A sharded model's processes all call it, the main one writes."""
    directory = Path(directory)
    state = {name: _whole(parameter.detach()) for name, parameter in expert_parameters(model).items()}
    if not is_main_process:
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = mote_config_of(model)
    config.save_pretrained(directory)
    own = {k: v for k, v in config.to_dict().items() if k in MoTEConfig.__annotations__ and k != "base_config"}
    (directory / "mote_config.json").write_text(json.dumps({"format": FORMAT, **own}, indent=2, sort_keys=True) + "\n")
    save_torch_state_dict(
        state, directory, filename_pattern=EXPERTS + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def load_experts(model: PreTrainedModel, directory: str | Path) -> None:
    """Fills the experts and markers of a MoTE model from an adapter folder, all of them or none.

    ValueError: files missing or damaged; tensors missing, extra or misshapen, with the list.
    """
    fill_experts(model, read_experts(directory), directory)


def fill_experts(model: PreTrainedModel, loaded: dict[str, Tensor], directory: str | Path) -> None:
    """load_experts of tensors that are read already; the folder is what errors name."""
    wanted = expert_parameters(model)
    _require_shapes(loaded, {name: parameter.shape for name, parameter in wanted.items()}, directory)
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = loaded[name].to(parameter.device, parameter.dtype)
            if hasattr(parameter, "full_tensor"):  # a DTensor; importing its module takes a second
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor; of a sharded one all parts, which every process has to ask for."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def read_fitting(base: PreTrainedModel, config: MoTEConfig, directory: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder, checked before the base is touched.

    ValueError: a file is missing or damaged; the experts are not those of this base and configuration.
    """
    require_meaning(config, directory)
    backbone = getattr(base, base.base_model_prefix)
    num_experts, rank = config.num_experts, config.r
    shapes = {}
    for name in find_targets(backbone, config):
        num_in, num_out = linear_sizes(backbone.get_submodule(name))
        shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = (num_experts, rank, num_in), (num_experts, num_out, rank)
    if config.marker_ids is not None:
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        shapes["markers.input_rows"] = (len(config.marker_ids), embedding.weight.shape[1])
        if not config.tie_word_embeddings:
            shapes["markers.output_rows"] = (len(config.marker_ids), head.weight.shape[1])
        if getattr(head, "bias", None) is not None:
            shapes["markers.output_bias"] = (len(config.marker_ids),)
    loaded = read_experts(directory)
    _require_shapes(loaded, shapes, directory)
    return loaded


def require_meaning(config: MoTEConfig, directory: str | Path) -> None:
    """ValueError: the folder's experts were saved under a configuration in which they mean something else."""
    own, given = _read_own_config(directory), config.to_dict()
    own.setdefault("assignment", "stage")  # folders of the first release do not say it
    for name in sorted(_MEANING):
        if given.get(name) != own.get(name):
            raise ValueError(
                f"{directory}: the experts were saved with {name}={own.get(name)!r}, the configuration says "
                f"{given.get(name)!r}"
            )


def require_same_run(config: MoTEConfig, directory: str | Path) -> None:
    """require_meaning, and ValueError: training that goes on from this folder would be on another base, or with other
    experts for the question or for tokens drawn at random."""
    require_meaning(config, directory)
    own = _read_own_config(directory)
    names = ["prompt_expert", "train_prompt_expert", *(["seed"] if config.assignment == "random" else [])]
    if config.base_digest is not None and own.get("base_digest") is not None:
        names.append("base_digest")
    for name in names:
        if own.get(name) != getattr(config, name):
            raise ValueError(
                f"{directory}: the run was begun with {name}={own.get(name)!r}, now it is {getattr(config, name)!r}; "
                "go on with the same base and configuration, or train in another folder"
            )


def _require_shapes(loaded: dict[str, Tensor], wanted: dict[str, tuple], directory: str | Path) -> None:
    wrong = [f"missing {name}" for name in wanted if name not in loaded]
    wrong += [f"unexpected {name}" for name in loaded if name not in wanted]
    for name, shape in wanted.items():
        tensor = loaded.get(name)
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            wrong.append(f"{name}: expected {list(shape)}, got {list(tensor.shape)} {tensor.dtype}")
    if wrong:
        raise ValueError(f"{directory}: the experts do not fit this model:\n  " + "\n  ".join(wrong))


def _read_own_config(directory: str | Path) -> dict:
    path = Path(directory) / "mote_config.json"
    try:
        own = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); an adapter folder has it beside config.json"
        ) from error
    if own.get("format") != FORMAT:
        raise ValueError(f"{path}: format {own.get('format')!r} is not known here, only {FORMAT}; update mote_ext")
    return own


def read_experts(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder, sharded or not. ValueError: a file is missing, truncated or no safetensors."""
    directory = Path(directory)
    index, single = directory / f"{EXPERTS}.safetensors.index.json", directory / f"{EXPERTS}.safetensors"
    names = [single.name]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error})") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index}: files must lie beside it, got {outside}")
    tensors = {}
    for name in names:
        tensors.update(_read_file(directory / name))
    return tensors


def is_adapter_folder(directory: str | Path) -> bool:
    directory = Path(directory)
    return any((directory / f"{EXPERTS}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def load_pretrained(cls, load_whole, name_or_path, args: tuple, kwargs: dict):
    """from_pretrained of the MoTE classes; load_whole is transformers'."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError("from_pretrained: use_safetensors=False would unpickle; mote_ext reads safetensors only")
    if is_adapter_folder(name_or_path):
        return _load_onto_base(cls, name_or_path, kwargs)
    kwargs["use_safetensors"] = True
    wants_info = kwargs.pop("output_loading_info", False)
    _require_sound_files(Path(name_or_path))
    # Misshapen weights are reported with all others, below.
    model, info = load_whole(
        name_or_path, *args, output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True}
    )
    wrong = [f"{kind[:-5]} {key}" for kind in ("missing_keys", "unexpected_keys") for key in sorted(info[kind])]
    wrong += [f"misshapen {key}" for key in sorted(map(str, info["mismatched_keys"]))]
    if cls.__name__ == "MoTEModel":  # the backbone of a whole model leaves its head alone
        wrong = [line for line in wrong if "lm_head" not in line]
    if wrong:
        raise ValueError(f"{name_or_path}: the weights do not fit the configuration:\n  " + "\n  ".join(wrong))
    freeze_base(model)  # transformers makes every weight it loads trainable
    return (model, info) if wants_info else model


def warn_of_other_base(config: MoTEConfig, base: PreTrainedModel) -> None:
    """A loud warning when the base is not the one the experts were made for."""
    digest = weights_digest(base)
    if config.base_digest is None or digest is None:
        _logger.warning("the base's weights are quantised, so they were not compared with those the experts belong to")
    elif digest != config.base_digest:
        _logger.warning(
            "THIS IS NOT THE BASE THE EXPERTS WERE MADE FOR: %s has digest %s…, expected %s… of %s (revision %s). "
            "Results will be wrong unless you know why.",
            base.name_or_path or type(base).__name__,
            digest[:12],
            config.base_digest[:12],
            config.base_model_name_or_path,
            config.base_revision,
        )


def mote_config_of(model: PreTrainedModel) -> MoTEConfig:
    return model.routing.config


def tied_keys(model: PreTrainedModel) -> dict[str, str]:
    """{head's weight: embedding's weight} as transformers names what is tied, below the marker layers."""
    names = {module: name for name, module in model.named_modules()}
    head, embedding = (
        module.base if isinstance(module, MarkerHead | MarkerEmbedding) else module
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return {f"{names[head]}.weight": f"{names[embedding]}.weight"}


def write_model_card(model: PreTrainedModel, directory: Path, adapter_only: bool) -> None:
    """README.md beside the weights, unless the user has put one there."""
    card = directory / "README.md"
    if not card.exists():
        card.write_text(model_card(mote_config_of(model), adapter_only))


def _load_onto_base(cls, directory: str | Path, kwargs: dict):
    if not hasattr(cls, "from_base"):
        raise ValueError(
            f"{directory} holds experts alone: load it with MoTEForCausalLM, and take .model for the backbone"
        )
    config = kwargs.pop("config", None) or MoTEConfig.from_pretrained(directory)
    wants_info = kwargs.pop("output_loading_info", False)
    base = kwargs.pop("base", None)
    if base is None:
        if config.base_model_name_or_path is None:
            raise ValueError(f"{directory}: config.json does not say which base the experts belong to; pass base=")
        kwargs.setdefault("revision", config.base_revision)
        kwargs.setdefault("dtype", config.dtype)
        base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, use_safetensors=True, **kwargs)
    loaded = read_fitting(base, config, directory)
    warn_of_other_base(config, base)
    generation_config = base.generation_config
    if (Path(directory) / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(directory)
    model = cls(config, base)
    model.generation_config = generation_config
    fill_experts(model, loaded, directory)
    empty = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model.eval(), empty) if wants_info else model.eval()


def _require_sound_files(directory: Path) -> None:
    """Opens every safetensors file of a local folder, so that a damaged one is refused before anything is built."""
    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        _read_header(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    _read_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dictionary)


def _read_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; an adapter folder has it beside config.json") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from error
