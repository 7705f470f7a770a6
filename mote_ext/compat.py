"""Names of transformers that are private or differ from release to release, in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel, TrainingArguments

_HAS_ADAPTERS = "_hf_peft_config_loaded"


def checkpointing_field() -> str:
    """The training argument that recomputes activations; the older name is deprecated where there is another."""
    fields = TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"


@contextmanager
def trainable_on_a_quantised_base(model: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers' Trainer takes a quantised model: it asks for adapters by a flag that PEFT sets.

    Afterwards the flag is as before, for with it save_pretrained would write PEFT's files.
    """
    before = getattr(model, _HAS_ADAPTERS, False)
    setattr(model, _HAS_ADAPTERS, True)
    try:
        yield
    finally:
        setattr(model, _HAS_ADAPTERS, before)


def attention_implementation(config) -> str | None:
    """ "eager", "sdpa", "flex_attention", …: what the layers of a model with this configuration run."""
    return config._attn_implementation


def attention_configs(model: PreTrainedModel) -> list:
    """The configurations that the layers of a model look their attention up in, each once."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


@contextmanager
def attention_switched(configs: Sequence, name: str) -> Iterator[None]:
    """Inside, layers with these configurations run the attention of this name; afterwards each its own again."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before):
            config._attn_implementation_internal = own
