"""StagedGeneration: generate() of a MoTE model. The loop is transformers'; stages come from the token ids at every
step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mote_ext.generation import outcome
from mote_ext.generation.forced import ForcedMarkers
from mote_ext.generation.outcome import MoTEGenerateOutput
from mote_ext.generation.plan import StagePlan, escalation
from mote_ext.generation.request import Request
from mote_ext.generation.rules import StageRules
from mote_ext.generation.streamer import StageStreamer
from mote_ext.stages import stage_ids_from_tokens

_DEFAULT = object()


class StagedGeneration:
    """Mixed into causal language models before their own class. Expects `routing`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        path: str | Sequence[str] | None = _DEFAULT,
        check: bool | str = False,
        stage_max_tokens: Mapping[str, int] | None = None,
        response_reserve: int | None = None,
        hide: Sequence[str] = (),
        return_stage_ids: bool = False,
        return_stage_logprobs: bool = False,
        trusted_prompt: bool = False,
        **kwargs,
    ) -> Tensor | MoTEGenerateOutput:
        """transformers' generate, stage by stage. Everything it takes may be given too.

        inputs, input_ids: [B, T] prompts, padded on the left with attention_mask
        path:   "adaptive" (default: the model's own start markers decide), "answer", "analysis", "full", a tuple of
                stage names ending with the response, "escalate" (answer, check, and while unsafe roll the cache back to
                the question and go the next longer way), or None for no stage rules
        check:  "flag" lets the check stage judge the answer; "enforce" also replaces an unsafe one by the refusal
        stage_max_tokens:  {stage: tokens}, most tokens between its markers
        max_new_tokens:    of everything, markers included (default 512); a chain that runs long is cut into the next
                           marker, response_reserve tokens (default a quarter) are kept for the response
        hide:              stages left out of the result, and of a StageStreamer's text
        return_stage_ids:  returns a MoTEGenerateOutput, which holds them
        return_stage_logprobs: likewise; also sums of log-probabilities a stage, from one more forward
        trusted_prompt:    the prompt may hold marker tokens (a chain to continue); otherwise they are refused
        returns: [B, T'] ids, or with return_dict_in_generate=True too a MoTEGenerateOutput. A chain ends with its last
                 end marker, not with EOS.
        ValueError: a path, check or limit without sense; markers in an untrusted prompt; escalate with beams, assisted
                    decoding, several sequences a prompt or a static cache.
        """
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
            if getattr(generation_config, "is_assistant", False):
                return super().generate(inputs, **kwargs)  # a draft: what it proposes is judged by the model it assists
        if path is _DEFAULT:
            path = "adaptive" if self.routing.table.marker_ids is not None else None
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if path is None:
            staged = {
                "check": check,
                "stage_max_tokens": stage_max_tokens,
                "response_reserve": response_reserve,
                "hide": hide,
                "return_stage_ids": return_stage_ids,
                "return_stage_logprobs": return_stage_logprobs,
            }
            return self._generate_freely(ids, [name for name, value in staged.items() if value], trusted_prompt, kwargs)
        request = Request(self, ids, path, check, hide, trusted_prompt, kwargs)
        make = {"stage_max_tokens": stage_max_tokens, "response_reserve": response_reserve}
        request.return_dict = request.return_dict or return_stage_ids or return_stage_logprobs
        try:
            if path == "escalate":
                found = self._escalate(request, make)
            else:
                plan = request.plan(path, check, make)
                raw = self._run(request.ids, plan, request, request.attention_mask, None)
                found = _Found(raw.sequences, [plan] * len(raw.sequences), raw)
            return self._deliver(request, found, return_stage_logprobs)
        finally:
            if request.stage_streamer is not None:
                request.stage_streamer.finish()

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, inputs_embeds=None, stage_ids=None, **kwargs
    ):
        """transformers' inputs of one forward, and the stage ids of its tokens. stage_ids: [B, T] the prompt's"""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if self.routing.context.experts_enabled:
            embeds = model_inputs.get("inputs_embeds")
            fed = embeds if embeds is not None else model_inputs["input_ids"]
            cache = model_inputs.get("past_key_values")  # not the argument: Phi3 may drop it
            num_cached = 0 if cache is None else int(cache.get_seq_length())
            if cache is None and fed.shape[1] < input_ids.shape[1]:
                raise ValueError(
                    f"generate: {type(self).__name__} keeps its past in something else than past_key_values, so which "
                    "tokens a step is of, and their stages, are unknown; use_cache=False works"
                )
            if inputs_embeds is not None:  # input_ids then holds what was generated, and stage_ids the prompt's
                written = stage_ids_from_tokens(input_ids, self.routing.table, prompt_id=self._prompt_id())
                stage_ids = torch.cat((stage_ids.to(written.dtype), written), dim=1)
            model_inputs["stage_ids"] = self._ids_of_step(input_ids, fed.shape[1], num_cached, stage_ids)
        return model_inputs

    def _ids_of_step(self, input_ids: Tensor, num_fed: int, num_cached: int, prompt_ids: Tensor | None) -> Tensor:
        """Stage ids of the num_fed tokens after num_cached; input_ids is all of them, or prompt_ids is."""
        begin, end = num_cached, num_cached + num_fed
        if prompt_ids is not None and prompt_ids.shape[1] >= end:
            return prompt_ids[:, begin:end]
        if input_ids is None or input_ids.shape[1] < end:
            raise ValueError(
                f"generate: the cache holds {num_cached} tokens that are not in input_ids, so their stages are "
                "unknown; pass all ids, or stage_ids of them"
            )
        found = stage_ids_from_tokens(input_ids, self.routing.table, prompt_id=self._prompt_id())
        if prompt_ids is not None:
            found = torch.cat((prompt_ids.to(found.dtype), found[:, prompt_ids.shape[1] :]), dim=1)
        return found[:, begin:end]

    def _prompt_id(self) -> int:
        return self.routing.config.prompt_id(training=False)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """The stage rules go first: a repetition penalty must not change a verdict or keep a marker from closing."""
        processors = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(sorted(processors, key=lambda processor: not isinstance(processor, StageRules)))

    def _get_candidate_generator(self, *args, **kwargs):
        rules = [p for p in kwargs.get("logits_processor") or () if isinstance(p, StageRules)]
        if rules and rules[0].forces_markers:
            return ForcedMarkers(rules[0])
        return super()._get_candidate_generator(*args, **kwargs)

    def _generate_freely(self, ids: Tensor | None, given: list[str], trusted_prompt: bool, kwargs: dict):
        if given:
            raise ValueError(f"generate: path=None has no stage rules, so {given} mean nothing there; give a path")
        table, stage_ids = self.routing.table, kwargs.get("stage_ids")
        if self.routing.context.experts_enabled:
            table.on(self.device)  # raises when there are no markers, so that nothing says what a new token's stage is
            if kwargs.get("inputs_embeds") is not None and stage_ids is None:
                raise ValueError("generate: inputs_embeds do not tell the stages: pass stage_ids [B, T] beside them")
        if ids is not None:
            self._check_prompt(ids, stage_ids, trusted_prompt)
            if kwargs.get("prefill_chunk_size") and stage_ids is None:
                kwargs["stage_ids"] = stage_ids_from_tokens(ids, table, prompt_id=self._prompt_id())
        streamer = kwargs.get("streamer")
        if not isinstance(streamer, StageStreamer):
            return super().generate(ids, **kwargs)
        streamer.begin(table if table.marker_ids else None)
        try:
            return super().generate(ids, **kwargs)
        finally:
            streamer.finish()

    def _check_prompt(self, ids: Tensor, stage_ids: Tensor | None, trusted_prompt: bool) -> None:
        if stage_ids is not None and stage_ids.shape != ids.shape:
            raise ValueError(
                f"generate: stage_ids must be {list(ids.shape)}, one id a token of the prompt, got "
                f"{list(stage_ids.shape)}"
            )
        if not trusted_prompt:
            self._refuse_markers(ids)

    def _refuse_markers(self, ids: Tensor) -> None:
        table = self.routing.table
        if table.marker_ids is None:
            return
        found = torch.isin(ids, table.on(ids.device)).nonzero()
        if len(found):
            row, place = found[0].tolist()
            raise ValueError(
                f"generate: the prompt holds the control token {int(ids[row, place])} at [{row}, {place}]. Typed text "
                "must never become one: mote_ext.encode_prompt encodes it as text. To continue a chain, pass "
                "trusted_prompt=True"
            )

    def _run(self, ids: Tensor, plan: StagePlan, request: Request, attention_mask: Tensor, cache):
        """One call of transformers' generate under the plan. A first marker without choice joins the prompt."""
        opening, max_new_tokens = plan.opening(), plan.max_new_tokens
        prompt_length = ids.shape[1]
        if opening is not None:
            marker = ids.new_full((len(ids), 1), plan.table.start_id(opening))
            ids = torch.cat((ids, marker), dim=1)
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(ids), 1)), dim=1)
            max_new_tokens -= 1
        rules = StageRules(plan, prompt_length, request.eos_ids)
        options = dict(request.options)
        # Not onto a filled cache: the assisted loop's first forward would feed all ids again.
        if cache is None and request.may_force_markers(len(ids)):
            # One proposed token at most: transformers verifies it in the forward that is due anyway.
            rules.forces_markers = True
            options["prompt_lookup_num_tokens"] = 1
        stage_ids = request.prompt_stage_ids
        if stage_ids is not None and opening is not None:
            stage_ids = torch.nn.functional.pad(stage_ids, (0, 1), value=opening)
        if stage_ids is None and request.generation_config_value("prefill_chunk_size"):
            stage_ids = stage_ids_from_tokens(ids, plan.table, prompt_id=self._prompt_id())
        if request.stage_streamer is not None:
            request.stage_streamer.begin_attempt()
        end_id = plan.table.end_id(plan.last_stage)
        raw = super().generate(
            ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=[end_id],
            pad_token_id=request.pad_id,
            logits_processor=LogitsProcessorList([rules, *request.processors]),
            return_dict_in_generate=True,
            **({} if stage_ids is None else {"stage_ids": stage_ids}),
            **({} if cache is None else {"past_key_values": cache}),
            **options,
        )
        raw.sequences = outcome.padded_behind_end(raw.sequences, prompt_length, end_id, request.pad_id)
        return raw

    def _escalate(self, request: Request, make: dict) -> _Found:
        """Answer and check; rows still unsafe go the next longer way from the question's own cache, which is kept."""
        request.require_escalation()
        question = DynamicCache(config=self.config.get_text_config())
        self._prefill_question(request, question)
        rows = list(range(len(request.ids)))
        sequences: list[Tensor] = [request.ids[0]] * len(rows)
        plans: list[StagePlan] = [None] * len(rows)
        raw = None
        for attempt in escalation(self.routing.table):
            plan = request.plan(attempt, "enforce", make)
            picked = torch.tensor(rows, device=request.ids.device)
            cache = _copied(question)
            if len(rows) < len(sequences):
                cache.batch_select_indices(picked)
            raw = self._run(request.ids[picked], plan, request, request.attention_mask[picked], cache)
            found = outcome.verdicts_of(raw.sequences, request.prompt_length, plan)
            for number, row in enumerate(rows):
                sequences[row], plans[row] = raw.sequences[number], plan
            rows = [row for row, verdict in zip(rows, found) if verdict == "unsafe"]
            if not rows:
                break
            if request.stage_streamer is not None:
                request.stage_streamer.discard()
        return _Found(outcome.padded_on_right(sequences, request.pad_id), plans, raw)

    def _prefill_question(self, request: Request, cache: DynamicCache) -> None:
        """Fills the cache with the question, once for all attempts."""
        position_ids = (request.attention_mask.cumsum(-1) - 1).clamp(min=0)
        inputs = self.prepare_inputs_for_generation(
            request.ids,
            past_key_values=cache,
            attention_mask=request.attention_mask,
            position_ids=position_ids,
            stage_ids=request.prompt_stage_ids,
            use_cache=True,
            is_first_iteration=True,
        )
        self(**{**inputs, "logits_to_keep": 1, "return_dict": True})

    def _deliver(self, request: Request, found: _Found, return_stage_logprobs: bool):
        """Refusals, hidden stages and the report, in this order: what is reported is what is returned."""
        sequences, length, table = found.sequences, request.prompt_length, self.routing.table
        rows = sequences[:, length:].tolist()
        verdicts = [outcome.verdicts_of(sequences[i : i + 1], length, p)[0] for i, p in enumerate(found.plans)]
        reasons = [outcome.stop_reason(row, plan) for row, plan in zip(rows, found.plans)]
        stages = [outcome.stages_of(row, table) for row in rows]
        num_generated = [outcome.num_generated(row, plan) for row, plan in zip(rows, found.plans)]
        logprobs = self._stage_logprobs(sequences, length, request) if return_stage_logprobs else None
        if request.check == "enforce":
            unsafe = [row for row, verdict in enumerate(verdicts) if verdict == "unsafe"]
            sequences = outcome.replace_answers(
                sequences, unsafe, length, found.plans[0], request.refusal_ids, request.pad_id
            )
            for row in unsafe:
                reasons[row], stages[row] = f"{table.names[table.response]}:refusal", [table.names[table.response]]
        request.finish_stream(verdicts[0] if verdicts else None)
        if request.hide:
            sequences = outcome.without_stages(sequences, length, table, request.hide, request.pad_id)
        if not request.return_dict:
            return sequences
        return MoTEGenerateOutput(
            sequences=sequences,
            stage_ids=stage_ids_from_tokens(sequences, table, prompt_id=self._prompt_id()),
            stages=stages,
            verdicts=verdicts,
            stop_reasons=reasons,
            num_generated=num_generated,
            stage_logprobs=logprobs,
            raw=None if request.hide or request.check == "enforce" else found.raw,
        )

    def _stage_logprobs(self, sequences: Tensor, prompt_length: int, request: Request) -> list[dict]:
        """From one forward over the finished sequences; padding behind the last end marker does not count."""
        mask = request.expanded_mask(len(sequences))
        mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
        ids = stage_ids_from_tokens(sequences, self.routing.table, prompt_id=self._prompt_id())
        if request.prompt_stage_ids is not None:
            given = request.prompt_stage_ids.repeat_interleave(len(ids) // len(request.prompt_stage_ids), 0)
            ids[:, : given.shape[1]] = given
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        num_written = sequences.shape[1] - prompt_length
        logits = self(
            input_ids=sequences, attention_mask=mask, position_ids=position_ids, stage_ids=ids, use_cache=False,
            logits_to_keep=num_written + 1,
        ).logits[:, :-1]  # fmt: skip
        written = sequences[:, prompt_length:]
        chosen = logits.float().log_softmax(-1).gather(-1, written[..., None])[..., 0]
        stages = stage_ids_from_tokens(written, self.routing.table).tolist()
        return [outcome.stage_sums(row, of, self.routing.table) for row, of in zip(chosen, stages)]


class _Found:
    """What the runs came to: sequences [B, T], the plan of each row, and transformers' last output."""

    def __init__(self, sequences: Tensor, plans: list[StagePlan], raw) -> None:
        self.sequences, self.plans, self.raw = sequences, plans, raw


def _copied(cache: DynamicCache) -> DynamicCache:
    """A cache that grows apart from this one. Attention layers append by making new tensors, so theirs are shared;
    recurrent and convolutional states are updated in place, so those are copied."""
    twin = copy.copy(cache)
    shared = (DynamicLayer, DynamicSlidingWindowLayer)
    twin.layers = [copy.copy(layer) if type(layer) in shared else copy.deepcopy(layer) for layer in cache.layers]
    return twin
