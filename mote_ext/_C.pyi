from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXT: int
FREE: int
CHOOSE: int
VERDICT: int
ENDED: int
TOTAL: int
EOS: int
FAILED: int

def build_info() -> dict[str, str]: ...

class QueueFull(RuntimeError): ...

class PathRules:
    """following: S + 1 sets of stages as bits, [0] before any stage and [1 + s] after stage s; whole, tail, limits: a
    number a stage, as StagePlan's whole(), tail() and limits (-1: none). ValueError: numbers that make no path."""

    def __init__(
        self,
        following: Sequence[int],
        whole: Sequence[int],
        tail: Sequence[int],
        limits: Sequence[int],
        max_new_tokens: int,
        last_stage: int,
        check_stage: int = -1,
        safe_id: int = -1,
    ) -> None: ...
    @staticmethod
    def free(max_new_tokens: int, eos_ids: Sequence[int]) -> PathRules: ...
    def choices(self, stage: int, used: int) -> list[int]: ...
    def must_end(self, stage: int, in_stage: int, used: int) -> bool: ...

class Plan:
    """One forward of R rows, T tokens and L rows of logits. The arrays are views of it: no copies."""

    request_ids: NDArray[np.int64]  # [R]
    token_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    stage_ids: NDArray[np.int32]  # [T]
    slots: NDArray[np.int64]  # [T] page * page_size + place in the page
    query_starts: NDArray[np.int32]  # [R + 1] into T
    lengths: NDArray[np.int32]  # [R] tokens in memory after this step
    page_tables: NDArray[np.int32]  # [R, P] padded with 0
    copies: NDArray[np.int32]  # [C, 2] page from, page to; whole pages, before the forward
    logits_at: NDArray[np.int64]  # [L] into T; repeated for samples that fork
    logits_requests: NDArray[np.int64]  # [L]
    modes: NDArray[np.int32]  # [L] TEXT, FREE, CHOOSE or VERDICT
    end_ids: NDArray[np.int64]  # [L] the end marker that may come, -1: none may
    choices: NDArray[np.int64]  # [L] bits of the stages whose start marker may come
    preempted: NDArray[np.int64]  # requests that lost their pages since the last plan
    num_tokens: int

class Outcome:
    """What a step came to. Of a request in rolled_back, tokens holds what was appended after the roll-back; one that
    failed is in finished alone."""

    request_ids: NDArray[np.int64]  # [N]
    counts: NDArray[np.int32]  # [N] tokens appended, sampled and forced
    tokens: NDArray[np.int64]  # [sum of counts]
    stage_ids: NDArray[np.int32]  # [sum of counts]
    finished: NDArray[np.int64]  # [F]
    reasons: NDArray[np.int32]  # [F] ENDED, TOTAL, EOS or FAILED
    rolled_back: NDArray[np.int64]  # [B]
    attempts: NDArray[np.int32]  # [B] the attempt that begins

class StepScheduler:
    """Decides what each forward computes. One thread owns it: RuntimeError when two are inside at once."""

    has_work: bool

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_batch_tokens: int,
        max_running: int,
        max_waiting: int,
        marker_ids: Sequence[int],
        safety_margin: float = 0.02,
        share_prefixes: bool = True,
        max_passed_over: int = 16,
        _key_bits: int = 64,
    ) -> None: ...
    def submit(
        self,
        request_ids: Sequence[int],
        tokens: Sequence[int] | NDArray[np.int64],
        prompt_id: int,
        attempts: Sequence[PathRules],
        *,
        stage_ids: Sequence[int] | NDArray[np.int32] | None = None,
        salt: int = 0,
        experts: int = 0,
        priority: int = 0,
    ) -> None: ...
    def plan(self, only: int | None = None) -> Plan | None: ...
    def commit(self, tokens: Sequence[int] | NDArray[np.int64]) -> Outcome: ...
    def abandon(self) -> None: ...
    def cancel(self, request_id: int) -> None: ...
    def roll_back(self, request_id: int, num_tokens: int) -> None: ...
    def drop_cache(self) -> None: ...
    def tokens(self, request_id: int) -> NDArray[np.int64]: ...
    def stage_ids(self, request_id: int) -> NDArray[np.int32]: ...
    def num_cached(self, request_id: int) -> int: ...
    def stats(self) -> dict[str, Any]: ...
    def check(self) -> None: ...
