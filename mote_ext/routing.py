"""From a model's inputs to the stage id of every token: what MoTEModel and an in-place model have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from mote_ext.config import MoTEConfig
from mote_ext.context import StageContext
from mote_ext.ops import narrow_stage_ids
from mote_ext.stages import SHARED_ONLY, stage_ids_from_tokens


class StageRouting:
    """The stage table of one model and the context its layers read.

    last_stage_ids: int32 [B, T] of the newest forward: the stage of every token, whoever of the experts it went to
    """

    def __init__(self, config: MoTEConfig) -> None:
        self.config = config
        self.table = config.stage_table
        self.context = StageContext()
        self.last_stage_ids: Tensor | None = None

    def run_backbone(self, forward, *, training: bool, stage_ids: Tensor | None = None, **inputs):
        """forward(…) of the base's backbone, its layers seeing the ids of these inputs."""
        explicit = stage_ids if stage_ids is not None else self.context.explicit_ids
        self.context.explicit_ids = None
        if not self.context.experts_enabled:
            return forward(**inputs)
        ids = self.stage_ids(
            inputs.get("input_ids"),
            training=training,
            stage_ids=explicit,
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs.get("position_ids"),
            past_key_values=inputs.get("past_key_values"),
            inputs_embeds=inputs.get("inputs_embeds"),
        )
        self.last_stage_ids = ids
        return self.context.run(self.expert_ids(ids, inputs.get("input_ids")), forward, **inputs)

    def expert_ids(self, stage_ids: Tensor, input_ids: Tensor | None) -> Tensor:
        """int32 [B, T]: what the layers read. Other than the stage ids only in the controls of MoTEConfig.assignment.

        ValueError: assignment="random" without input_ids, of which the draw is a function.
        """
        if self.config.assignment == "stage":
            return stage_ids
        if self.config.assignment == "shared":
            return stage_ids.clamp(max=SHARED_ONLY)
        if input_ids is None:
            raise ValueError('assignment="random" draws experts from the token ids: pass input_ids, got inputs_embeds')
        return torch.where(stage_ids >= 0, self._drawn(input_ids), stage_ids)

    def stage_ids(
        self,
        input_ids: Tensor | None,
        *,
        training: bool,
        stage_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """int32 [B, T]: the ids given, checked, or those the tokens say.

        ValueError: neither says it: embeddings without ids, or a filled cache whose tokens are not here.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("a MoTE model needs input_ids or inputs_embeds, got neither")
        if stage_ids is not None:
            if stage_ids.shape != given.shape[:2]:
                raise ValueError(
                    f"stage_ids must be {list(given.shape[:2])}, one id a token of this forward, got "
                    f"{list(stage_ids.shape)}"
                )
            return narrow_stage_ids(stage_ids, self.config.num_stages)
        if input_ids is None:
            raise ValueError("inputs_embeds do not tell the stages: pass stage_ids [B, T] beside them")
        if past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
            raise ValueError(
                "past_key_values holds earlier tokens, and these alone do not tell their stage: pass stage_ids [B, T], "
                "or use generate()"
            )
        if position_ids is not None and position_ids.dim() == 3:
            position_ids = position_ids[0]  # of several axes the first is time
        prompt = self.config.prompt_id(training)
        if prompt is None:
            prompt = self._drawn_stage(input_ids, attention_mask)
        return stage_ids_from_tokens(input_ids, self.table, prompt_id=prompt, position_ids=position_ids)

    def _drawn_stage(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, 1]: a stage a row, drawn from the row's own tokens and the seed, whatever padding and batch they are in.

        Never torch's generator: a resumed run must draw what the uninterrupted one does. A collator that knows the
        epoch passes stage_ids instead.
        """
        mixed = self._mixed(input_ids)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            mixed = mixed * (attention_mask[:, -input_ids.shape[1] :] != 0)
        return self._folded(mixed.sum(1, keepdim=True))

    def _drawn(self, input_ids: Tensor) -> Tensor:
        """[B, T]: a stage a token, the same for the same token everywhere."""
        return self._folded(self._mixed(input_ids))

    def _mixed(self, input_ids: Tensor) -> Tensor:
        mixed = (input_ids + self.config.seed + 1) * 0x9E3779B97F4A7C1
        return (mixed ^ (mixed >> 29)) * 0x5851F42D4C957F2D

    def _folded(self, mixed: Tensor) -> Tensor:
        return ((mixed ^ (mixed >> 31)) % self.config.num_stages).to(torch.int32)
