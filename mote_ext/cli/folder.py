"""From the MODEL a person names to what is in it: its folder, its configuration, its tokenizer, the loaded model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mote_ext import _build
from mote_ext.cli.errors import CommandError

if TYPE_CHECKING:
    from mote_ext.config import MoTEConfig

EXPERT_FILES = "mote_experts*.safetensors"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def find_folder(name: str) -> Path:
    """The folder of a model: the one named, or a model hub's "owner/name", fetched into the Hugging Face cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CommandError(f"{name} is a file; MODEL is the folder it lies in")
    if not is_hub_name(name):
        raise CommandError(f"there is no folder {name}")
    return _fetched(name)


def is_hub_name(name: str) -> bool:
    """Whether it is a model hub's "owner/name" and nothing that is here."""
    is_one = _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")
    return is_one and not Path(name).exists()


def read_model_type(folder: Path) -> str:
    """model_type of its config.json."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise CommandError(f"{folder} holds no model: there is no config.json") from None
    except ValueError as error:
        raise CommandError(f"{path} is no JSON: {error}") from error
    return found.get("model_type", "unknown") if isinstance(found, dict) else "unknown"


def read_config(folder: Path) -> MoTEConfig:
    """The MoTE configuration of a full or an adapter-only folder."""
    model_type = read_model_type(folder)
    if model_type != "mote":
        raise CommandError(
            f"{folder} holds a plain {model_type} model, not MoTE; `mote generate --base` puts untrained experts on it"
        )
    from mote_ext.config import MoTEConfig

    return MoTEConfig.from_pretrained(folder)


def is_adapter_folder(folder: Path) -> bool:
    return any(folder.glob(EXPERT_FILES))


def require_base(folder: Path, config: MoTEConfig) -> None:
    """CommandError: experts alone whose recorded base is a folder that is not here."""
    base = config.base_model_name_or_path
    if not is_adapter_folder(folder) or base is None or Path(base).is_dir() or _HUB_NAME.fullmatch(base):
        return
    raise CommandError(
        f"the base of {folder} is not here: {base}; base_model_name_or_path in its config.json says where it is"
    )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, config: MoTEConfig | None = None):
    """The folder's tokenizer; with a configuration, one that has its markers at its ids."""
    if not has_tokenizer(folder):
        raise CommandError(f"{folder} has no tokenizer; put one there: tokenizer.save_pretrained({str(folder)!r})")
    from transformers import AutoTokenizer

    # The configuration is said, for "mote" is known to transformers only once mote_ext.model is imported.
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    if config is None or config.marker_ids is None:
        return tokenizer
    markers = config.stage_table.markers
    found = [tokenizer.get_added_vocab().get(marker) for marker in markers]
    for marker, expected, got in zip(markers, config.marker_ids, found):
        if got != expected:
            raise CommandError(
                f"the tokenizer in {folder} is not this model's: {marker} is {got} there, {expected} in config.json"
            )
    return tokenizer


def load_model(folder: Path, *, dtype: str = "auto", device: str | None = None, tokenizer=None):
    """The MoTE model in a folder, or with a tokenizer untrained experts on the plain model in it; on its device."""
    _build.require_compiled_module()
    import torch
    from transformers.utils import logging

    from mote_ext.model import MoTEForCausalLM

    logging.disable_progress_bar()
    where = find_device(device)
    options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if tokenizer is not None:
        model = MoTEForCausalLM.from_base(str(folder), tokenizer=tokenizer, **options)
    else:
        model = MoTEForCausalLM.from_pretrained(str(folder), **options)
    return model.to(where).eval()


def load_any(folder: Path, *, dtype: str = "auto", device: str | None = None) -> tuple:
    """(model, tokenizer): a causal language model of transformers, MoTE or not; on its device."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder) if read_model_type(folder) == "mote" else None
    if config is not None:
        require_base(folder, config)
        return load_model(folder, dtype=dtype, device=device), load_tokenizer(folder, config)
    tokenizer, where = load_tokenizer(folder), find_device(device)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
    return model.to(where).eval(), tokenizer


def find_device(name: str | None):
    """The torch.device of this name, or of the machine's GPU, if it has one. CommandError: it cannot be used."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CommandError(
            f"there is no folder {name}, and the model hub did not give it: {type(error).__name__}"
        ) from error
