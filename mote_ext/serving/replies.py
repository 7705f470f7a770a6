"""Events of the engine become what a client may see of them, and that becomes OpenAI's objects.

A sample's text is content where it answers, reasoning where it prepares the answer. Where the operator shows reasoning
that is safe, it is kept back until the verdict, and dropped unless that is "safe". The check's own text is never shown,
the verdict stands beside the answer.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mote_ext.engine import RequestOutput, StageEvent
from mote_ext.serving.errors import RequestError
from mote_ext.serving.policy import Policy
from mote_ext.serving.protocol import Ask
from mote_ext.stages import PROMPT

LOG = logging.getLogger(__name__)
HALF = "\N{REPLACEMENT CHARACTER}"
CONTENT, REASONING, HELD = "content", "reasoning_content", "held"


class Piece(NamedTuple):
    """What one sample shows next: text of the answer or of the reasoning, or that a stage goes on unseen."""

    kind: str  # CONTENT, REASONING or HELD
    stage: str
    text: str = ""


class SampleView:
    """Decides piece by piece what is seen of one sample."""

    def __init__(self, ask: Ask, policy: Policy) -> None:
        self.ask, self.policy = ask, policy
        self._kept: list[Piece] = []
        self._announced = ""

    def take(self, event: StageEvent) -> list[Piece]:
        """What the event shows; with the last one also what was kept back, if its verdict allows."""
        pieces = self._seen(event)
        if event.output is not None:
            if event.output.verdict == "safe":
                pieces += self._kept
            self._kept = []
        return pieces

    def whole(self, output: RequestOutput) -> tuple[str, str | None]:
        """(content, reasoning) of a finished sample: the same as its pieces put together."""
        answer = "".join(text for stage, text in output.texts if self._kind(stage) == CONTENT)
        reasoning = [text for stage, text in output.texts if stage in self.policy.reasoning]
        shows = self.ask.shows_reasoning and (not self.ask.waits_for_verdict or output.verdict == "safe")
        return answer, "\n".join(reasoning) if shows and reasoning else None

    def _seen(self, event: StageEvent) -> list[Piece]:
        kind = self._kind(event.stage)
        if kind == CONTENT:
            return [Piece(CONTENT, event.stage, event.text)] if event.text else []
        if kind == REASONING and self.ask.shows_reasoning and not self.ask.waits_for_verdict:
            return [Piece(REASONING, event.stage, event.text)] if event.text else []
        if kind == REASONING and self.ask.waits_for_verdict and event.text:
            self._kept.append(Piece(REASONING, event.stage, event.text))
        if event.stage == self._announced or event.output is not None:
            return []
        self._announced = event.stage
        return [Piece(HELD, event.stage)]

    def _kind(self, stage: str) -> str:
        if stage in self.policy.reasoning:
            return REASONING
        return CONTENT if stage in (self.policy.response, PROMPT) else HELD


def require_good(output: RequestOutput) -> None:
    """RequestError: the engine could not finish this sample."""
    if output.status == "failed":
        LOG.error("request %s failed: %s", output.request_id, output.error)
        raise RequestError(500, "the request failed; the server's log says why", code="request_failed")
    if output.status == "cancelled":
        raise RequestError(503, "the request was cancelled", code="cancelled")


def answer_end(output: RequestOutput, ask: Ask, policy: Policy) -> str:
    """Why the answer ended: the last word of stop_reason, but of a checked chain its response's, not the check's."""
    why = output.stop_reason.rpartition(":")[2]
    if why != "end" or output.verdict is None:
        return why
    limit = (ask.params.stage_max_tokens or {}).get(policy.response, ask.params.max_new_tokens)
    num_tokens = output.stage_ids.count(policy.stages.index(policy.response)) - 2  # less its markers
    # The check takes what is kept back for it and no more: all is used where the response was cut by the total.
    cut = num_tokens >= limit or output.num_generated >= ask.params.max_new_tokens
    return "limit" if cut else "end"


def finish_reason(why: str) -> str:
    """OpenAI's word: "content_filter" (refused), "length" (cut) or "stop". why: of answer_end."""
    return {"refusal": "content_filter", "max_new_tokens": "length", "limit": "length"}.get(why, "stop")


class Reply:
    """Writes the objects of one request. decode: token ids -> text, for log-probabilities."""

    def __init__(self, ask: Ask, policy: Policy, model: str, reply_id: str, decode: Callable[[list[int]], str]) -> None:
        self.ask, self.policy, self.decode = ask, policy, decode
        self.views = [SampleView(ask, policy) for _ in range(ask.params.n)]
        kind = "chat.completion" if ask.is_chat else "text_completion"
        self._head = {"id": reply_id, "object": kind, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> dict:
        """The object of a request that is not streamed."""
        choices = [self._choice(output) for output in sorted(outputs, key=lambda output: output.sample)]
        return {**self._head, "choices": choices, "usage": self.usage(outputs), **self._about(outputs)}

    def chunks(self, event: StageEvent) -> Iterable[dict]:
        """The streamed objects an event makes."""
        for piece in self.views[event.sample].take(event):
            yield self._chunk(event.sample, piece)
        if event.output is not None:
            yield self._last_chunk(event.output)

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict:
        return {**self._chunk_head(), "choices": [], "usage": self.usage(outputs)}

    def usage(self, outputs: Sequence[RequestOutput]) -> dict:
        """Token counts; all that was generated counts, what is withheld and earlier attempts too."""
        prompt, generated = len(outputs[0].prompt_ids), sum(output.num_drawn for output in outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": max(output.num_cached for output in outputs)},
        }

    def _choice(self, output: RequestOutput) -> dict:
        content, reasoning = self.views[output.sample].whole(output)
        choice = {"index": output.sample, "finish_reason": self._reason(output), "logprobs": self._logprobs(output)}
        if not self.ask.is_chat:
            return {**choice, "text": content, **({"reasoning_content": reasoning} if reasoning else {})}
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning, "refusal": None}
        return {**choice, "message": message}

    def _chunk(self, sample: int, piece: Piece) -> dict:
        about = {"mote": {"stage": piece.stage, "held": piece.kind == HELD}}
        delta = {} if piece.kind == HELD else {piece.kind: piece.text}
        return {**self._chunk_head(), "choices": [self._delta(sample, delta, None)], **about}

    def _last_chunk(self, output: RequestOutput) -> dict:
        choice = self._delta(output.sample, {}, self._reason(output))
        choice["logprobs"] = self._logprobs(output)
        return {**self._chunk_head(), "choices": [choice], **self._about([output])}

    def _delta(self, sample: int, delta: dict, reason: str | None) -> dict:
        choice = {"index": sample, "finish_reason": reason, "logprobs": None}
        if not self.ask.is_chat:
            text = delta.pop("content", "")
            return {**choice, "text": text, **delta}
        if sample not in self._begun:
            self._begun.add(sample)
            delta = {"role": "assistant", **delta}
        return {**choice, "delta": delta}

    def _chunk_head(self) -> dict:
        return {**self._head, "object": "chat.completion.chunk"} if self.ask.is_chat else self._head

    def _about(self, outputs: Sequence[RequestOutput]) -> dict:
        """What OpenAI's form has no place for."""
        samples = [
            {
                "index": output.sample,
                "stages": output.stages,
                "verdict": output.verdict,
                "stop_reason": output.stop_reason,
            }
            for output in sorted(outputs, key=lambda output: output.sample)
        ]
        first = {name: value for name, value in samples[0].items() if name != "index"}
        more = {"samples": samples} if self.ask.params.n > 1 else {}
        return {"mote": {"path": self.ask.path, "check": self.ask.check, **first, **more}}

    def _reason(self, output: RequestOutput) -> str:
        return finish_reason(answer_end(output, self.ask, self.policy))

    def _logprobs(self, output: RequestOutput) -> dict | None:
        """Those of the answer's tokens: what was thought before it may be hidden, and must not be read off here."""
        if output.logprobs is None:
            return None
        response = self.policy.stages.index(self.policy.response)
        rows = [row for row, stage in zip(output.logprobs, output.stage_ids) if stage == response or stage < 0]
        rows = [row for row in rows if row.logprob is not None and row.token_id not in self.policy.markers]
        if output.stop_reason.endswith(":stop"):  # with a check the chain went on behind the stop text
            ids = [row.token_id for row in rows]
            rows = rows[: bisect_right(range(len(ids)), len(output.text), key=lambda n: len(self.decode(ids[: n + 1])))]
        if self.ask.is_chat:
            return {"content": [self._token(row) for row in rows], "refusal": None}
        tokens = [self._token(row) for row in rows]
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
            "text_offset": None,
        }

    def _token(self, row) -> dict:
        top = [self._scored(token, logprob) for token, logprob in row.top]
        return {**self._scored(row.token_id, row.logprob), "top_logprobs": top}

    def _scored(self, token_id: int, logprob: float) -> dict:
        text = self.decode([token_id])
        whole = list(text.encode()) if HALF not in text else None  # part of a character: its bytes are not known here
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": whole}
