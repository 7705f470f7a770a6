"""One call of generate: its arguments, checked and completed from the model's generation config."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import StaticCache

from mote_ext.generation.plan import DEFAULT_TOTAL, StagePlan, make_plan
from mote_ext.generation.streamer import StageStreamer, StageText


class Request:
    """The arguments of one generate call, checked and completed from the model's generation config."""

    def __init__(self, model, ids, path, check, hide, trusted_prompt, kwargs: dict) -> None:
        self.model, self.path = model, path
        self.check = "enforce" if path == "escalate" else check
        table, config = model.routing.table, model.routing.config
        if ids is None or ids.dim() != 2 or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "generate: stage paths need input_ids [B, T]; with inputs_embeds use path=None and stage_ids"
            )
        if not model.routing.context.experts_enabled:
            raise ValueError("generate: inside disable_experts() there are no stages; use path=None")
        table.on(ids.device)  # raises when there are no markers
        model._check_prompt(ids, kwargs.get("stage_ids"), trusted_prompt)
        self.ids, self.prompt_length = ids, ids.shape[1]
        self.generation_config: GenerationConfig = kwargs.get("generation_config") or model.generation_config
        mask = kwargs.pop("attention_mask", None)
        self.prompt_stage_ids = kwargs.pop("stage_ids", None)
        self.return_dict = kwargs.pop("return_dict_in_generate", self.generation_config.return_dict_in_generate)
        self.processors = kwargs.pop("logits_processor", None) or []
        self.max_new_tokens = self._total(kwargs)
        eos = kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        self.eos_ids = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [int(eos)]
        pad = kwargs.pop("pad_token_id", self.generation_config.pad_token_id)
        # Never transformers' default, the end marker itself: padding would then look like a stage.
        self.pad_id = pad if pad is not None else self.eos_ids[0] if self.eos_ids else 0
        self.attention_mask = self._inferred_mask(pad) if mask is None else mask
        self.options = kwargs
        if self.generation_config_value("min_new_tokens") or self.generation_config_value("min_length"):
            raise ValueError(
                "generate: min_new_tokens cannot be kept beside stage limits; use stage_max_tokens, or path=None"
            )
        self.hide = tuple(hide)
        for name in self.hide:
            table.index(name)
        self.refusal_ids = config.refusal_ids
        if self.check == "enforce" and not self.refusal_ids:
            raise ValueError("generate: enforce needs the refusal's token ids; wrap the base with tokenizer=")
        self._begin_stream(kwargs.get("streamer"), table)

    def plan(self, path, check, options: dict) -> StagePlan:
        routing = self.model.routing
        return make_plan(routing.config, routing.table, path, check, self.max_new_tokens, **options)

    def generation_config_value(self, name: str):
        return self.options.get(name, getattr(self.generation_config, name, None))

    def may_force_markers(self, batch_size: int) -> bool:
        """Whether transformers' assisted loop, which takes one sequence and no beams, is free for forced.py."""
        busy = self._is_assisted() or self.generation_config_value("cache_implementation") is not None
        single = self._num_beams() == 1 and self._num_return_sequences() == 1
        busy = busy or self.options.get("past_key_values") is not None or getattr(self.model, "_is_stateful", False)
        return batch_size == 1 and single and not busy and self.generation_config_value("use_cache") is not False

    def require_escalation(self) -> None:
        """ValueError: options under which a cache cannot be rolled back row by row."""
        static = self.generation_config_value("cache_implementation") in ("static", "hybrid", "sliding_window")
        reasons = {
            "beams": self._num_beams() > 1,
            "several sequences a prompt": self._num_return_sequences() > 1,
            "assisted decoding": self._is_assisted(),
            "a static cache": static or isinstance(self.options.get("past_key_values"), StaticCache),
            "a cache of the caller's": self.options.get("past_key_values") is not None,
            "use_cache=False": self.generation_config_value("use_cache") is False,
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            raise ValueError(f"generate: path='escalate' rolls the cache back, which {' and '.join(found)} cannot")

    def expanded_mask(self, num_rows: int) -> Tensor:
        return self.attention_mask.repeat_interleave(num_rows // len(self.attention_mask), dim=0)

    def finish_stream(self, verdict: str | None) -> None:
        if self.stage_streamer is None:
            return
        if self.check == "enforce" and verdict == "unsafe":
            response = self.model.routing.table.names[self.model.routing.table.response]
            self.stage_streamer.discard(StageText(response, self.model.routing.config.refusal))
        else:
            self.stage_streamer.release()

    def _begin_stream(self, streamer, table) -> None:
        self.stage_streamer = streamer if isinstance(streamer, StageStreamer) else None
        if streamer is not None and self.stage_streamer is None and (self.check == "enforce" or self.hide):
            raise ValueError(
                "generate: an answer that is enforced or hidden must not be streamed before its verdict; "
                "use mote_ext.StageStreamer, which holds it back"
            )
        if self.stage_streamer is not None:
            self.stage_streamer.begin(table, hold=self.check == "enforce", hide=self.hide)

    def _total(self, kwargs: dict) -> int:
        total, max_length = kwargs.pop("max_new_tokens", None), kwargs.pop("max_length", None)
        if total is None and max_length is None:
            total, max_length = self.generation_config.max_new_tokens, self.generation_config.max_length
        if total is None:
            total = DEFAULT_TOTAL if max_length is None else max_length - self.prompt_length
        return int(total)

    def _inferred_mask(self, pad: int | None) -> Tensor:
        """As transformers: what equals a padding token that ends nothing is padding."""
        if pad is None or pad in self.eos_ids:
            return torch.ones_like(self.ids)
        return self.ids.ne(pad).to(self.ids.dtype)

    def _is_assisted(self) -> bool:
        asked = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")
        return any(self.generation_config_value(name) is not None for name in asked)

    def _num_beams(self) -> int:
        return self.generation_config_value("num_beams") or 1

    def _num_return_sequences(self) -> int:
        return self.generation_config_value("num_return_sequences") or 1
