"""SamplingParams: what a request may ask of the engine. The stage rules mean what generate() means by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mote_ext.generation.plan import CHECKS, DEFAULT_TOTAL


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. ValueError names the field that cannot mean anything.

    path, check, max_new_tokens, stage_max_tokens, response_reserve, hide, trusted_prompt: as in generate()
    temperature:        0 takes the likeliest token, the other fields of sampling then mean nothing
    top_k, top_p, min_p: 0, 1 and 0 switch them off; applied in transformers' order, after the temperature
    repetition_penalty: on every id of the prompt and the tokens generated so far, before the temperature
    seed:               token i of sample j is drawn by (seed, j, i) alone, whatever else is in the batch; None takes
                        another seed each time. An escalation counts on through its attempts
    n:                  samples of one prompt, which is computed once
    stop:               texts that end the response (with path=None everything); what stands before one is kept. With a
                        check the chain still runs to its verdict, which is about the whole response
    logprobs:           None, or how many likeliest alternatives to report beside each token's own log-probability
    priority:           higher ones are admitted first and preempted last
    cache_salt:         requests share cached pages only under the same salt
    """

    path: str | tuple[str, ...] | None = "adaptive"
    check: bool | str = False
    max_new_tokens: int = DEFAULT_TOTAL
    stage_max_tokens: Mapping[str, int] | None = None
    response_reserve: int | None = None
    hide: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    trusted_prompt: bool = False

    def __post_init__(self) -> None:
        for name in ("hide", "stop"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.path is not None and not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(self.path))
        self._check_stages()
        self._check_sampling()

    def _check_stages(self) -> None:
        self._require(self.check in CHECKS, "check", f"one of {CHECKS}")
        self._require(_is_int(self.max_new_tokens) and self.max_new_tokens > 0, "max_new_tokens", "a whole number > 0")
        limits = self.stage_max_tokens
        self._require(limits is None or isinstance(limits, Mapping), "stage_max_tokens", "{stage: tokens} or None")
        self._require(all(_is_int(limit) for limit in (limits or {}).values()), "stage_max_tokens", "whole numbers")
        reserve = self.response_reserve
        self._require(reserve is None or (_is_int(reserve) and reserve > 0), "response_reserve", "None or a number > 0")
        if self.path is None:
            staged = ("check", "stage_max_tokens", "response_reserve", "hide")
            asked = [name for name in staged if getattr(self, name)]
            if asked:
                raise ValueError(f"SamplingParams: path=None has no stages, so {asked} mean nothing there; give a path")

    def _check_sampling(self) -> None:
        number = (int, float)
        heat = self.temperature
        self._require(
            isinstance(heat, number) and (heat == 0 or 1e-4 <= heat < 1e4), "temperature", "0 or in 1e-4..1e4"
        )
        self._require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "a whole number >= 0")
        self._require(isinstance(self.top_p, number) and 0 < self.top_p <= 1, "top_p", "in 0..1 without 0")
        self._require(isinstance(self.min_p, number) and 0 <= self.min_p <= 1, "min_p", "in 0..1")
        penalty = self.repetition_penalty
        self._require(isinstance(penalty, number) and 0 < penalty < 1e4, "repetition_penalty", "in 0..1e4 without 0")
        self._require(self.seed is None or _is_int(self.seed), "seed", "None or a whole number")
        self._require(_is_int(self.n) and self.n >= 1, "n", "a whole number >= 1")
        self._require(all(isinstance(text, str) and text for text in self.stop), "stop", "texts that are not empty")
        count = self.logprobs
        self._require(count is None or (_is_int(count) and 0 <= count <= 100), "logprobs", "None or in 0..100")
        self._require(_is_int(self.priority) and abs(self.priority) < 1 << 31, "priority", "a whole number of 32 bits")
        self._require(isinstance(self.cache_salt, str), "cache_salt", "a text")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"SamplingParams: {name} must be {expected}, got {getattr(self, name)!r}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
