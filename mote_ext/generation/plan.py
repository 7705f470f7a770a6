"""Which stages a request goes through, in which order, and how many tokens each may take: pure rules, no tensors.

    answer    Q → response                              check: the check stage follows the response on any path
    analysis  Q → analysis → response
    full      Q → analysis → guidance → response        (every stage of the table)
    adaptive  Q → whatever legal stage the model opens

Source of the paths: MoTE, arXiv 2405.00557, figure 6 (fixed and adaptive inference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mote_ext.stages import StageTable

START = -1  # in `following`: before any stage
CHECKS = (False, "flag", "enforce")
DEFAULT_TOTAL = 512


@dataclass(frozen=True)
class StagePlan:
    """Rules of one request.

    following: stage (or START) -> stages that may come next; none after the last one
    limits:    stage -> most tokens between its markers
    max_new_tokens: of everything, markers included
    reserve:   tokens kept back for the response, so that a long chain is cut and not the answer
    """

    table: StageTable
    following: Mapping[int, tuple[int, ...]]
    limits: Mapping[int, int]
    max_new_tokens: int
    reserve: int
    check_threshold: float
    verdict_ids: tuple[int, int] | None  # safe, unsafe; None without a check
    _tails: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < self.tail(START):
            raise ValueError(
                f"generate: max_new_tokens must be at least {self.tail(START)} for this path (markers, a token a "
                f"stage and {self.reserve} for the response), got {self.max_new_tokens}"
            )

    @property
    def last_stage(self) -> int:
        """The stage whose end marker ends the chain."""
        check = self.table.check
        return self.table.response if self.verdict_ids is None else check

    def opening(self) -> int | None:
        """The first stage where the path leaves no choice."""
        first = self.following[START]
        return first[0] if len(first) == 1 else None

    def tail(self, stage: int) -> int:
        """The fewest tokens from after this stage's end marker to the end of the chain."""
        if stage not in self._tails:
            self._tails[stage] = min((self.whole(after) for after in self.following[stage]), default=0)
        return self._tails[stage]

    def whole(self, stage: int) -> int:
        """The fewest tokens from this stage's start marker on."""
        body = self.reserve if stage == self.table.response else 1
        return 1 + body + 1 + self.tail(stage)

    def choices(self, stage: int, num_used: int) -> tuple[int, ...]:
        """Stages that may open after this one when num_used tokens are spent: those whose chain still fits."""
        left = self.max_new_tokens - num_used
        following = self.following[stage]
        fitting = tuple(after for after in following if self.whole(after) <= left)
        return fitting or (min(following, key=self.whole),)

    def must_end(self, stage: int, num_in_stage: int, num_used: int) -> bool:
        """Whether the stage's end marker is due: its limit or the reserve of those after it is reached."""
        left = self.max_new_tokens - num_used
        return num_in_stage >= self.limits.get(stage, num_in_stage + 1) or left <= 1 + self.tail(stage)


def make_plan(
    config,
    table: StageTable,
    path: str | Sequence[str],
    check: bool | str,
    max_new_tokens: int,
    stage_max_tokens: Mapping[str, int] | None = None,
    response_reserve: int | None = None,
) -> StagePlan:
    """The rules of a request. config: MoTEConfig. ValueError: a path, check or limit that makes no sense, and why."""
    if check not in CHECKS:
        raise ValueError(f"generate: check must be one of {CHECKS}, got {check!r}")
    following = _following(table, path)
    if check:
        if table.check is None:
            raise ValueError(f"generate: check={check!r} needs a check stage; this model has {list(table.names)}")
        if config.verdict_ids is None:
            raise ValueError("generate: a check needs the verdicts' token ids; wrap the base with tokenizer=")
        following[table.response], following[table.check] = (table.check,), ()
    limits = {}
    for name, limit in (stage_max_tokens or {}).items():
        if limit < 1:
            raise ValueError(f"generate: stage_max_tokens[{name!r}] must be at least 1, got {limit}")
        limits[table.index(name)] = int(limit)
    if check:
        limits[table.check] = 1  # the verdict is one token
    reserve = max(1, max_new_tokens // 4) if response_reserve is None else max(1, response_reserve)
    reserve = min(reserve, limits.get(table.response, reserve))
    return StagePlan(
        table=table,
        following=following,
        limits=limits,
        max_new_tokens=max_new_tokens,
        reserve=reserve,
        check_threshold=config.check_threshold,
        verdict_ids=tuple(config.verdict_ids) if check else None,
    )


def escalation(table: StageTable) -> list[tuple[str, ...]]:
    """Ever longer paths: the response alone, then with the first reasoning stage before it, then with two, …"""
    reasoning = [stage.name for stage in table.stages if stage.role == "reasoning"]
    return [(*reasoning[:n], table.names[table.response]) for n in range(len(reasoning) + 1)]


def _following(table: StageTable, path: str | Sequence[str]) -> dict[int, tuple[int, ...]]:
    if path == "adaptive":
        legal = {i: table.following(i) for i, stage in enumerate(table.stages) if stage.role == "reasoning"}
        return {**legal, START: table.first(), table.response: ()}
    chain = [table.index(name) for name in _names(table, path)]
    return {stage: (after,) for stage, after in zip([START, *chain], chain)} | {chain[-1]: ()}


def _names(table: StageTable, path: str | Sequence[str]) -> tuple[str, ...]:
    response = table.names[table.response]
    reasoning = tuple(stage.name for stage in table.stages if stage.role == "reasoning")
    if isinstance(path, str):
        named = {"answer": (response,), "full": (*reasoning, response), **{n: (n, response) for n in reasoning}}
        if path not in named:
            raise ValueError(
                f"generate: path must be one of {['adaptive', *named, 'escalate']}, a tuple of stage names, or None "
                f"for no stage rules, got {path!r}"
            )
        return named[path]
    names = tuple(path)
    places = [table.index(name) for name in names]
    if not names or names[-1] != response or places != sorted(set(places)) or not set(names) <= {*reasoning, response}:
        raise ValueError(
            f"generate: a path of stage names must follow the order {[*reasoning, response]} and end with "
            f"{response!r}, got {names}"
        )
    return names
