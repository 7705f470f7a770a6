"""One sample of a request from its first token to its output: what it wrote, what of it may be seen, how it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mote_ext.config import MoTEConfig
from mote_ext.engine.outputs import RequestOutput, StageEvent, TokenLogprob
from mote_ext.engine.params import SamplingParams
from mote_ext.engine.text import StageReader, split_text
from mote_ext.generation import outcome
from mote_ext.generation.plan import StagePlan
from mote_ext.stages import PROMPT, StageTable, stage_ids_from_tokens

FREE_REASONS = {True: "end", False: outcome.UNFINISHED}  # whether a run without rules met an end-of-sequence token


@dataclass(frozen=True)
class Served:
    """What every request of an engine shares."""

    config: MoTEConfig
    table: StageTable
    tokenizer: object | None
    eos_ids: list[int]

    @property
    def prompt_id(self) -> int:
        return self.config.prompt_id(training=False)

    @property
    def response(self) -> str:
        return self.table.names[self.table.response]


class Sample:
    """State of one sample.

    prompt: int64; plans: one an attempt, none with path=None; seed, number: what its draws depend on
    history: the scheduler's ids of prompt and generated tokens; streams: whether events with text are wanted
    """

    def __init__(
        self,
        served: Served,
        request_id: str,
        number: int,
        prompt: np.ndarray,
        params: SamplingParams,
        plans: Sequence[StagePlan],
        seed: int,
        history: Callable[[], np.ndarray],
        streams: bool,
    ) -> None:
        self.served, self.request_id, self.number = served, request_id, number
        self.prompt, self.params, self.plans, self.seed = prompt, params, plans, seed
        self.history = history
        self.holds = bool(plans) and (params.check == "enforce" or params.path == "escalate")
        stop_stage = served.response if plans else None
        needs_reader = streams or bool(params.stop)
        self._reader = StageReader(served.tokenizer, served.table, params.stop, stop_stage) if needs_reader else None
        self._streams = streams
        self.num_cached: int | None = None  # prompt tokens found in the cache, known with the first forward
        self.generated: list[int] = []
        self._num_before = 0  # tokens of earlier attempts
        self.restart(0)

    def restart(self, attempt: int) -> None:
        """The chain begins again behind the prompt, by the next plan."""
        self._num_before += len(self.generated)
        self.attempt, self.generated, self._held = attempt, [], []
        self._logprobs: list[TokenLogprob] = []
        if self._reader is not None:
            self._reader.restart()

    @property
    def plan(self) -> StagePlan | None:
        return self.plans[self.attempt] if self.plans else None

    @property
    def num_drawn(self) -> int:
        return self._num_before + len(self.generated)

    @property
    def verdict(self) -> tuple[int, int, float]:
        return (*self.plan.verdict_ids, self.plan.check_threshold)

    @property
    def stopped(self) -> bool:
        """Whether a stop text ends the sample now; with a check its chain goes on to the verdict."""
        unchecked = self.plan is None or self.plan.verdict_ids is None
        return self._reader is not None and self._reader.stopped and unchecked

    def take(self, tokens: Sequence[int], logprob: TokenLogprob | None) -> list[StageEvent]:
        """What the step gave this sample, in order; logprob belongs to the one token among them that was chosen."""
        if self.params.logprobs is not None:
            self._logprobs += _aligned(tokens, logprob)
        self.generated += tokens
        if self._reader is None:
            return []
        pieces = [piece for piece in self._reader.take(tokens) if piece.stage not in self.params.hide]
        events = [self._event(*piece) for piece in pieces] if self._streams else []
        if self.holds:
            self._held += events
            return []
        return events

    def finish(self, status: str, error: str | None = None) -> list[StageEvent]:
        """The last events. status: "finished", "failed" or "cancelled"; what was held back comes out if it may."""
        verdict = self._verdict() if status == "finished" else None
        refused = self.holds and verdict == "unsafe"
        output = self._output(status, verdict, refused)
        output.num_cached, output.error = self.num_cached or 0, error
        if refused:
            config = self.served.config
            said = (
                (config.refusal, list(config.refusal_ids)) if self.served.response not in self.params.hide else ("", [])
            )
            return [self._event(self.served.response, *said, output)]
        held, self._held = (self._held, []) if verdict is not None else ([], [])
        stage, text = PROMPT, ""
        if self._reader is not None and status != "failed":  # its text may be what failed
            stage, text, _ = self._reader.finish()
        may_be_seen = stage not in self.params.hide and (verdict is not None or not self.holds)
        return [*held, self._event(stage, text if self._streams and may_be_seen else "", [], output)]

    def _event(self, stage: str, text: str, token_ids: list[int], output: RequestOutput | None = None) -> StageEvent:
        return StageEvent(self.request_id, self.number, stage, text, token_ids, output)

    def _verdict(self) -> str | None:
        if self.plan is None or self.plan.verdict_ids is None:
            return None
        return outcome.verdicts_of(torch.tensor([self.generated]), 0, self.plan)[0]

    def _output(self, status: str, verdict: str | None, refused: bool) -> RequestOutput:
        served, plan = self.served, self.plan
        tokens, logprobs = self._visible(refused, withheld=self.holds and verdict is None)
        stages = outcome.stages_of(self.generated, served.table) if plan is not None else []
        output = RequestOutput(
            self.request_id,
            self.number,
            self.prompt.tolist(),
            generated_tokens=tokens,
            stage_ids=self._stage_ids(tokens),
            stages=[served.response] if refused else stages,
            verdict=verdict,
            stop_reason=f"{served.response}:refusal" if refused else self._reason(status, stages),
            num_generated=len(self.generated),
            num_drawn=self.num_drawn,
            logprobs=None if refused else logprobs,
            status=status,
        )
        if served.tokenizer is not None and status != "failed":
            output.texts = self._texts(tokens, refused)
            said = [text for stage, text in output.texts if plan is None or stage == served.response]
            output.text = "".join(said)
        return output

    def _visible(self, refused: bool, withheld: bool) -> tuple[list[int], list[TokenLogprob] | None]:
        served, hidden = self.served, set(self.params.hide)
        logprobs = self._logprobs if self.params.logprobs is not None else None
        if withheld:
            return [], None if logprobs is None else []
        tokens = self.generated
        if refused:
            row = torch.tensor([tokens])
            tokens = outcome.replace_answers(row, [0], 0, self.plan, served.config.refusal_ids, 0)[0].tolist()
        if not hidden:
            return tokens, logprobs
        names = (*served.table.names, PROMPT)  # the id outside of stages is -1
        places = [i for i, stage in enumerate(_stages_around(tokens, served.table)) if names[stage] not in hidden]
        return [tokens[i] for i in places], None if logprobs is None else [logprobs[i] for i in places]

    def _stage_ids(self, tokens: list[int]) -> list[int]:
        if self.served.table.marker_ids is None or not tokens:
            return [self.served.prompt_id] * len(tokens)
        ids = torch.tensor([[*self.prompt.tolist(), *tokens]])
        found = stage_ids_from_tokens(ids, self.served.table, prompt_id=self.served.prompt_id)
        return found[0, len(self.prompt) :].tolist()

    def _reason(self, status: str, stages: list[str]) -> str:
        if status != "finished":
            return f"{stages[-1] if stages else PROMPT}:{status}"
        stopped = self._reader is not None and self._reader.stopped
        if self.plan is None:
            ended = bool(self.generated) and self.generated[-1] in self.served.eos_ids
            return f"{PROMPT}:{'stop' if stopped else FREE_REASONS[ended]}"
        return f"{self.served.response}:stop" if stopped else outcome.stop_reason(self.generated, self.plan)

    def _texts(self, tokens: list[int], refused: bool) -> list[tuple[str, str]]:
        texts = split_text(self.served.tokenizer, tokens, self.served.table)
        if refused or self._reader is None or not self._reader.stopped:
            return texts
        left, cut = self._reader.stop_text, []
        for stage, text in texts:
            if self.plan is None or stage == self.served.response:
                text, left = text[: len(left)], left[len(text) :]
            cut.append((stage, text))
        return cut


def _aligned(tokens: Sequence[int], logprob: TokenLogprob | None) -> list[TokenLogprob]:
    """One entry a token: the chosen one's own, and for forced ones that there is none. A forced token before the chosen
    one is a start marker, which is no choice inside of a stage, so the first of its id is the chosen one."""
    at = -1 if logprob is None else tokens.index(logprob.token_id)
    return [logprob if i == at else TokenLogprob(token, None) for i, token in enumerate(tokens)]


def _stages_around(tokens: list[int], table: StageTable) -> list[int]:
    """The stage each token stands in; -1 outside, whoever processes those."""
    return stage_ids_from_tokens(torch.tensor([tokens]), table)[0].tolist() if tokens else []
