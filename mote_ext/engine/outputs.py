"""What the engine hands out: events while a request runs, and one output per sample at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class TokenLogprob(NamedTuple):
    """The model's own distribution (before stage rules, temperature and the rest) at one generated token.

    logprob: of the token; None where it was forced by the stage rules, for which no distribution is computed
    top:     the likeliest (token id, log-probability) pairs, as many as SamplingParams.logprobs asked for
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class RequestOutput:
    """One finished sample.

    prompt_ids:       ids the model was given
    generated_tokens: what generate() returns after the prompt: markers included, the refusal in place of an enforced
                      unsafe chain, hidden stages left out; nothing where a chain ended before the verdict it waited for
    stage_ids:        of generated_tokens, one each
    stages:           names of the stages gone through; of a refused answer the response alone
    text:             of the response; with path=None all text
    texts:            [(stage, text), …] in order, hidden stages left out; "prompt" is what stands outside of stages
    verdict:          "safe", "unsafe", or None without a check or without its end
    stop_reason:      "<stage>:<why>", why as in MoTEGenerateOutput, or "stop" (a stop text), "cancelled", "failed"
    num_generated:    tokens generated, what was withheld included; of "escalate" the last try's
    num_drawn:        tokens generated, those of earlier attempts included
    num_cached:       prompt tokens that were found in the cache
    logprobs:         of generated_tokens, or None where none were asked for or the refusal stands in their place
    status:           "finished", "failed" or "cancelled"; error: why it failed
    """

    request_id: str
    sample: int
    prompt_ids: list[int]
    generated_tokens: list[int] = field(default_factory=list)
    stage_ids: list[int] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    text: str = ""
    texts: list[tuple[str, str]] = field(default_factory=list)
    verdict: str | None = None
    stop_reason: str = ""
    num_generated: int = 0
    num_drawn: int = 0
    num_cached: int = 0
    logprobs: list[TokenLogprob] | None = None
    status: str = "finished"
    error: str | None = None


@dataclass
class StageEvent:
    """A piece of one sample. Pieces of a stage, put together, are its text.

    stage:     the stage's name, "prompt" outside of stages
    text:      never half of a character or of a stop text; empty where a token made no whole character yet
    token_ids: tokens of this stage in this step, markers included
    output:    on the last event of a sample
    """

    request_id: str
    sample: int
    stage: str
    text: str
    token_ids: list[int]
    output: RequestOutput | None = None
