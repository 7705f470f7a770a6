"""MoTEModel and MoTEForCausalLM: a decoder-only transformers model with experts, as its own Hugging Face architecture.

MoTEForCausalLM
  model    MoTEModel: derives the stage ids, then runs the base        (TRL and serving engines call this part alone)
    base     the base's own backbone, its linear layers MoTELinear, its embedding with marker rows
  lm_head  the base's head with marker logits
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mote_ext import checkpoint
from mote_ext.capabilities import MoTECapabilities
from mote_ext.config import MoTEConfig
from mote_ext.generation import StagedGeneration
from mote_ext.inject import freeze_base, inject_experts, remove_experts
from mote_ext.linear import keep_unpacked
from mote_ext.markers import MarkerEmbedding, MarkerHead
from mote_ext.prepare import prepare_config, start_markers
from mote_ext.routing import StageRouting


class MoTEPreTrainedModel(MoTECapabilities, PreTrainedModel):
    """What transformers asks of a class of models."""

    config_class = MoTEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Masters: at a learning rate of 2e-5 half of A's bfloat16 entries would round to no change.
    _keep_in_fp32_modules_strict = {"lora_A", "lora_B", "rows", "marker_bias"}

    @property
    def dtype(self) -> torch.dtype:
        """The base's; the experts are float32 over any base."""
        embedding = self.get_input_embeddings()
        return getattr(embedding, "base", embedding).weight.dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a full or an adapter-only checkpoint; every expert is accounted for, nothing is unpickled.

        ValueError: a missing, extra or misshapen weight, with the list; a damaged file. Options: transformers'.
        """
        return checkpoint.load_pretrained(cls, super().from_pretrained, pretrained_model_name_or_path, args, kwargs)

    def save_pretrained(self, save_directory, *, adapter_only: bool = False, **kwargs) -> None:
        """Writes a folder that from_pretrained reads: the whole model, or with `adapter_only` experts and markers
        alone, to be put onto the base recorded in config.json. Options: transformers'."""
        if adapter_only:
            checkpoint.save_experts(
                self,
                save_directory,
                max_shard_size=kwargs.get("max_shard_size", "50GB"),
                is_main_process=kwargs.get("is_main_process", True),
            )
        else:
            super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            checkpoint.write_model_card(self, Path(save_directory), adapter_only)


class MoTEModel(MoTEPreTrainedModel):
    """The backbone: token ids to hidden states, each token through its stage's experts.

    config: MoTEConfig with a base_config
    base:   a transformers backbone to build on, in place; None makes one from config.base_config
    """

    def __init__(self, config: MoTEConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base = AutoModel.from_config(config.original_base_config()) if base is None else base
        self.routing = StageRouting(config)
        inject_experts(self.base, config, self.routing.context)
        if config.marker_ids is not None:
            embedding = MarkerEmbedding(self.base.get_input_embeddings(), self.routing.table, self.routing.context)
            self.base.set_input_embeddings(embedding)
        self.post_init()
        freeze_base(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        stage_ids: Tensor | None = None,
        **kwargs,
    ):
        """The base's forward and outputs. stage_ids [B, T]: instead of those the marker tokens say; needed with
        inputs_embeds, and with a filled cache."""
        if use_cache is None:  # set by a Trainer; the base has a configuration of its own, and with a cache finds no
            use_cache = getattr(self.config, "use_cache", None)  # documents in a packed row
        return self.routing.run_backbone(
            self.base,
            training=self.training,
            stage_ids=stage_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class MoTEForCausalLM(StagedGeneration, MoTEPreTrainedModel, GenerationMixin):
    """A causal language model that answers in stages. Made by from_base, from_pretrained or the Auto classes.

    config: MoTEConfig with a base_config
    base:   a transformers causal language model to build on, in place; None makes one from config.base_config
    """

    def __init__(self, config: MoTEConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.base_config is None:
            raise ValueError(
                "MoTEForCausalLM: config.base_config is None; MoTEForCausalLM.from_base wraps a base model"
            )
        if base is None:
            base = AutoModelForCausalLM.from_config(config.original_base_config())
        head = base.get_output_embeddings()
        tied = config.tie_word_embeddings  # not the weights' identity: from_pretrained ties them after this
        self.model = MoTEModel(config, getattr(base, base.base_model_prefix))
        self.lm_head = head
        if config.marker_ids is not None:
            self.lm_head = MarkerHead(head, self.get_input_embeddings(), tied)
        self._is_stateful = getattr(base, "_is_stateful", False)  # generation asks before it takes tokens back
        self._tied_weights_keys = checkpoint.tied_keys(self) if tied else None
        self.post_init()
        freeze_base(self)

    @classmethod
    def from_base(
        cls, base: PreTrainedModel | str | os.PathLike, config: MoTEConfig | None = None, *, tokenizer=None, **kwargs
    ) -> MoTEForCausalLM:
        """Puts fresh experts and markers on a base model; the result computes what the base does until it is trained.

        base:      a causal language model, whose modules are taken over (use the result in its place), or its name
        config:    MoTEConfig; it is copied and completed
        tokenizer: gets the marker tokens; without one, config.marker_ids must say them
        kwargs:    of AutoModelForCausalLM.from_pretrained, for a name
        ValueError: targets that match nothing, a base whose head does what cannot be reproduced, no marker ids.
        """
        if not isinstance(base, PreTrainedModel):
            base = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **kwargs)
        config = prepare_config(config, base, tokenizer)
        if config.marker_ids is None:
            raise ValueError("from_base: pass tokenizer=, which gets the marker tokens, or marker_ids= in the config")
        keep_unpacked(base)
        expected = _first_logits(base)
        generation_config = copy.deepcopy(base.generation_config)
        model = cls(config, base)
        model.generation_config = generation_config
        if (quantizer := getattr(base, "hf_quantizer", None)) is not None:
            model.hf_quantizer = quantizer  # knows how its weights are written
        start_markers(model, tokenizer)
        if expected is not None:
            with model.disable_experts():
                got = _first_logits(model)
            if not _same(got, expected):
                remove_experts(model.model.base)
                raise ValueError(
                    f"from_base: {type(base).__name__} changes its logits in a way MoTEForCausalLM does not reproduce; "
                    "get_mote_model keeps the class, and with it what it does"
                )
        return model.train(base.training)

    @property
    def routing(self) -> StageRouting:
        return self.model.routing

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        stage_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V'], marker columns included, and with labels [B, T] (-100 = no loss) the mean loss.

        logits_to_keep: 0 for all, n for the last n, or an index tensor into the T tokens
        stage_ids:      [B, T], instead of those the marker tokens say; see MoTEModel.forward
        """
        # Not for the backbone, whose outputs are read by name here.
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            stage_ids=stage_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._finished(self.lm_head(outputs.last_hidden_state[:, kept, :]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def _finished(self, logits: Tensor) -> Tensor:
        """What some architectures do after their head, as their configurations say it."""
        config = self.config.get_text_config()
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits


@torch.no_grad()
def _first_logits(model: PreTrainedModel) -> Tensor | None:
    """Logits of a few tokens, or None where the weights are not at hand (meta, offloaded)."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return None
    was_training = model.training
    tokens = torch.arange(1, 4, device=model.get_input_embeddings().weight.device)[None]  # 0 may be padding, all zeros
    logits = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    model.train(was_training)
    return logits


def _same(got: Tensor, expected: Tensor) -> bool:
    """Without experts, a difference is in what the base does after its head."""
    return bool((got - expected).abs().max() <= 0.05 * expected.abs().max())


AutoModel.register(MoTEConfig, MoTEModel, exist_ok=True)
AutoModelForCausalLM.register(MoTEConfig, MoTEForCausalLM, exist_ok=True)
