"""get_mote_model: experts on the user's own model, which stays an instance of its class."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from mote_ext import checkpoint
from mote_ext.capabilities import MoTECapabilities
from mote_ext.config import MoTEConfig
from mote_ext.encoding import set_up_tokenizer
from mote_ext.generation import StagedGeneration
from mote_ext.inject import freeze_base, inject_experts
from mote_ext.markers import MarkerEmbedding, MarkerHead
from mote_ext.prepare import prepare_config, start_markers
from mote_ext.routing import StageRouting


def get_mote_model(model: PreTrainedModel, config: MoTEConfig | str | os.PathLike | None = None, *, tokenizer=None):
    """Puts experts and markers on a causal language model, in place, and returns it: the same object, of a subclass of
    its own class, with stage routing in its backbone and stages in its generate.

    model:     any decoder-only transformers model with a head
    config:    MoTEConfig (copied and completed), or an adapter folder, whose experts are loaded
    tokenizer: gets the marker tokens. Without one, and without marker_ids in the config, there are no markers, and
               every forward needs stage_ids
    save_pretrained writes the adapter folder, as PEFT does. Errors: from_base's and load_experts'.
    """
    folder = None if config is None or isinstance(config, MoTEConfig) else Path(config)
    if folder is not None:
        config = MoTEConfig.from_pretrained(folder)
        loaded = checkpoint.read_fitting(model, config, folder)
        checkpoint.warn_of_other_base(config, model)
        if tokenizer is not None:
            set_up_tokenizer(tokenizer, config.stage_table)
    else:
        config = prepare_config(config, model, tokenizer)
    backbone = getattr(model, model.base_model_prefix)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    routing = StageRouting(config)
    inject_experts(backbone, config, routing.context)
    if config.marker_ids is not None:
        marked = MarkerEmbedding(embedding, routing.table, routing.context)
        model.set_input_embeddings(marked)
        model.set_output_embeddings(MarkerHead(head, marked, tied))
        _set_vocab_size(model, config.vocab_size)
    # Where the tokens go in: OPT's head calls its decoder, not the backbone around it.
    for part, make_class in ((model.get_decoder(), _routed_class), (model, _causal_class)):
        part.__class__ = make_class(type(part))
        part.routing = routing
    if tied:
        model._tied_weights_keys = model.all_tied_weights_keys = checkpoint.tied_keys(model)
    freeze_base(model)
    if folder is not None:
        checkpoint.fill_experts(model, loaded, folder)
    elif config.marker_ids is not None:
        start_markers(model, tokenizer)
    return model


class _InPlace(MoTECapabilities):
    """What differs from a whole model: the base's own configuration is in use, and saving."""

    @contextmanager
    def disable_experts(self) -> Iterator[None]:
        """Inside, the model is its base; losses are computed over the base's vocabulary again."""
        config = self.routing.config
        if config.base_vocab_size is not None:
            _set_vocab_size(self, config.base_vocab_size)
        try:
            with super().disable_experts():
                yield
        finally:
            if config.base_vocab_size is not None:
                _set_vocab_size(self, config.vocab_size)

    disable_adapter = disable_experts

    def save_pretrained(self, save_directory, *, adapter_only: bool = True, **kwargs) -> None:
        """Writes the adapter folder: experts, markers and their configuration. ValueError: adapter_only=False."""
        if not adapter_only:
            raise ValueError(
                f"save_pretrained: {type(self).__mro__[1].__name__} has no format for experts, so an in-place model "
                "saves them alone; MoTEForCausalLM.from_base makes a model that is saved whole"
            )
        checkpoint.save_experts(
            self,
            save_directory,
            max_shard_size=kwargs.get("max_shard_size", "50GB"),
            is_main_process=kwargs.get("is_main_process", True),
        )
        if kwargs.get("is_main_process", True):
            checkpoint.write_model_card(self, Path(save_directory), adapter_only)


def _set_vocab_size(model: PreTrainedModel, vocab_size: int) -> None:
    """Where losses look for the number of logits: the configuration, and in Gemma the model itself."""
    model.config.get_text_config().vocab_size = vocab_size
    if hasattr(model, "vocab_size"):
        model.vocab_size = vocab_size


@functools.cache
def _routed_class(base_class: type) -> type:
    """The backbone's class with stage routing around its forward."""

    names = [name for name in inspect.signature(base_class.forward).parameters if name != "self"]

    def forward(self, *args, stage_ids=None, **kwargs):
        run = super(routed, self).forward
        named = {**dict(zip(names, args)), **kwargs}  # routing looks at inputs by name
        return self.routing.run_backbone(run, training=self.training, stage_ids=stage_ids, **named)

    routed = _subclass(base_class, (base_class,), forward)
    return routed


@functools.cache
def _causal_class(base_class: type) -> type:
    """The model's class, whose forward hands explicit stage ids to the backbone and whose generate knows stages."""

    def forward(self, *args, stage_ids=None, **kwargs):
        if self.routing.context.explicit_ids is not None:
            raise RuntimeError(
                "a forward of this MoTE model is running already, in another thread; use a lock or a copy"
            )
        self.routing.context.explicit_ids = stage_ids
        try:
            return super(causal, self).forward(*args, **kwargs)
        finally:
            self.routing.context.explicit_ids = None

    causal = _subclass(base_class, (StagedGeneration, _InPlace, base_class), forward)
    return causal


def _subclass(base_class: type, bases: tuple, forward) -> type:
    """transformers reads the signature of forward to decide what it may pass."""
    signature = inspect.signature(base_class.forward)
    parameters = list(signature.parameters.values())
    place = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    parameters.insert(place, inspect.Parameter("stage_ids", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)
    forward.__doc__ = base_class.forward.__doc__
    return type(f"MoTE{base_class.__name__}", bases, {"forward": forward, "__module__": base_class.__module__})
