"""What the operator of a server allows: paths, the weakest check, whether reasoning is shown, how long answers are.

A client chooses among what is left. Reasoning is shown when a verdict says "safe": of a harmful request it holds what
the refusal withholds, and without a check nobody knows which requests those are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mote_ext.generation.plan import DEFAULT_TOTAL, escalation, make_plan
from mote_ext.serving.errors import RequestError
from mote_ext.serving.fields import shown
from mote_ext.stages import StageTable

CHECKS = ("none", "flag", "enforce")  # from the weakest to the strictest
SHOWINGS = ("always", "safe", "never")
Route = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Policy:
    """The operator's decisions about one model; Policy.of makes it.

    routes:       name a client asks by -> the engine's path
    default_path: of a request that names none
    min_check:    what every request is checked by at least, one of CHECKS
    checks:       what a client may ask for, from min_check on
    show_reasoning: "always", "safe" (once a verdict says so) or "never"
    max_tokens, default_tokens: most tokens of one answer, and those of a request that does not say
    min_stage_tokens: fewest tokens a client may leave to a reasoning stage, where the paths force them on it
    stages:       names in order; reasoning, response: which is which; markers: ids of their markers
    """

    routes: Mapping[str, Route]
    default_path: str
    min_check: str
    checks: tuple[str, ...]
    show_reasoning: str
    max_tokens: int
    default_tokens: int
    min_stage_tokens: int
    stages: tuple[str, ...]
    reasoning: tuple[str, ...]
    response: str
    refusal: str
    markers: frozenset[int]
    _plain: Mapping[tuple[str, ...], str] = field(default_factory=dict)  # chain of stages -> its name

    @classmethod
    def of(
        cls,
        config,
        *,
        allow_paths: Sequence[str] | None = None,
        default_path: str | None = None,
        min_check: str = "none",
        show_reasoning: str = "safe",
        max_tokens: int = 2048,
        min_stage_tokens: int = 16,
    ) -> Policy:
        """config: MoTEConfig. allow_paths: names; stages joined by + are a chain of one's own; "none": no stage rules.

        ValueError: a path or check that this model does not have, a default that is not allowed.
        """
        table = config.stage_table
        legal = legal_paths(config)
        names = list(dict.fromkeys(legal if allow_paths is None else allow_paths))
        if not names:
            raise ValueError(f"--allow-paths: at least one of {', '.join(legal)} is needed")
        if min_check not in CHECKS or show_reasoning not in SHOWINGS:
            raise ValueError(
                f"policy: min_check must be one of {CHECKS} and show_reasoning one of {SHOWINGS}, got {min_check!r} "
                f"and {show_reasoning!r}"
            )
        routes = {name: _route(name, table, legal) for name in names}
        has_check = "escalate" in legal
        if min_check != "none" and not has_check:
            raise ValueError(f"--min-check {min_check}: this model has no check stage, its stages are {table.names}")
        if min_check != "none" and "none" in routes:
            raise ValueError(f"--min-check {min_check}: the path 'none' has no stages and so no check; leave it out")
        for name, route in routes.items():
            _require_plan(config, table, name, route, min_check, max_tokens)
        default = default_path or ("adaptive" if "adaptive" in routes else names[0])
        if default not in routes:
            raise ValueError(f"--default-path: one of the allowed paths {names} expected, got {default!r}")
        return cls(
            routes=routes,
            default_path=default,
            min_check=min_check,
            checks=CHECKS[CHECKS.index(min_check) :] if has_check else ("none",),
            show_reasoning=show_reasoning,
            max_tokens=max_tokens,
            default_tokens=min(DEFAULT_TOTAL, max_tokens),
            min_stage_tokens=min_stage_tokens,
            stages=table.names,
            reasoning=tuple(stage.name for stage in table.stages if stage.role == "reasoning"),
            response=table.names[table.response],
            refusal=config.refusal,
            markers=frozenset(config.marker_ids or ()),
            _plain={_chain(route, table): name for name, route in routes.items() if _chain(route, table)},
        )

    def path(self, asked) -> str:
        """The name of the path a client gets. asked: a name, a list of stage names, or None for the default.

        RequestError 403: a path of another server's; the message names those of this one.
        """
        if asked is None:
            return self.default_path
        name = self._plain.get(tuple(asked), "+".join(asked)) if isinstance(asked, list) else asked
        if name not in self.routes:
            raise RequestError(
                403,
                f"path must be one of {list(self.routes)} on this server, got {shown(asked)}",
                param="path",
                code="path_not_allowed",
            )
        return name

    def check(self, asked: str, path: str) -> str:
        """The check a request gets: what it asks for, or the operator's where that is stricter.

        RequestError 400: a check on a model, or a path, that has none.
        """
        if path == "escalate":
            return "enforce"
        strict = max(asked, self.min_check, key=CHECKS.index)
        if strict != "none" and (self.checks == ("none",) or self.routes[path] is None):
            where = "this model" if self.checks == ("none",) else f"the path {path!r}"
            raise RequestError(400, f"check must be 'none': {where} has no check stage, got {asked!r}", param="check")
        return strict

    def hides_reasoning(self, check: str) -> bool:
        """Whether no text of the reasoning stages may ever reach this request's client."""
        return self.show_reasoning == "never" or (self.show_reasoning == "safe" and check == "none")

    def stage_limits(self, path: str, max_tokens: int, limits: Mapping[str, int], check: str) -> dict[str, int]:
        """A request's own limits, and those that leave every reasoning stage its path forces on it min_stage_tokens.

        A plan keeps back one token for each stage that follows; the earlier stages' limits keep back the rest. Where
        "answer" is allowed a client may go without them altogether, and nothing is required.
        RequestError 400: too few tokens for that.
        """
        chain = self._forced(path)
        least = self.min_stage_tokens
        if "answer" in self.routes or not chain:
            return dict(limits)
        short = {name: limits[name] for name in chain if limits.get(name, least) < least}
        if short:
            raise RequestError(
                400,
                f"stage_max_tokens must leave a reasoning stage {least} tokens on this server, got {short}",
                param="stage_max_tokens",
            )
        needed = len(chain) * (2 + least) + 2 + (3 if check != "none" else 0)
        reserve = max(1, max_tokens // 4)  # the response's, as make_plan has it
        spare = max_tokens - min(reserve, limits.get(self.response, reserve)) - needed
        if spare < 0:
            enough = needed * 4 // 3 + 2
            raise RequestError(
                400,
                f"max_tokens must be at least {enough} on the path {path!r} of this server, got {max_tokens}",
                param="max_tokens",
            )
        most = least + spare // max(1, len(chain) - 1)
        return {**limits, **{name: min(limits.get(name, most), most) for name in chain[:-1]}}

    def describe(self) -> dict:
        """What a page or a client needs to know, for JSON."""
        return {
            "paths": list(self.routes),
            "default_path": self.default_path,
            "checks": list(self.checks),
            "show_reasoning": self.show_reasoning,
            "stages": list(self.stages),
            "response_stage": self.response,
            "max_tokens": self.max_tokens,
            "default_max_tokens": self.default_tokens,
        }

    def _forced(self, path: str) -> tuple[str, ...]:
        """Reasoning stages of a path, all of them where the model chooses and where a verdict may add them."""
        route = self.routes[path]
        if isinstance(route, tuple):
            return route[:-1]
        if route in self.reasoning:
            return (route,)
        return self.reasoning if route in ("full", "adaptive", "escalate") else ()


def legal_paths(config) -> list[str]:
    """Names of a model's paths; "escalate" among them where it can check and refuse."""
    table = config.stage_table
    reasoning = [stage.name for stage in table.stages if stage.role == "reasoning"]
    can_check = table.check is not None and config.verdict_ids is not None and bool(config.refusal_ids)
    # On a table of two reasoning stages "full" and the last of the shorter paths differ; of one, they are the same.
    names = ["answer", *reasoning[:1], "full", "adaptive", "escalate"]
    return [name for name in dict.fromkeys(names) if name != "escalate" or can_check]


def _route(name: str, table: StageTable, legal: Sequence[str]) -> Route:
    if name == "none":
        return None
    if "+" in name:
        return tuple(name.split("+"))
    if name not in legal and name not in table.names:
        raise ValueError(
            f"--allow-paths: {', '.join(legal)}, stages joined by + such as {'+'.join(table.names[:2])}, or none "
            f"expected, got {name!r}"
        )
    return name


def _chain(route: Route, table: StageTable) -> tuple[str, ...]:
    """The stages of a path that is one chain; empty for the others."""
    reasoning = tuple(stage.name for stage in table.stages if stage.role == "reasoning")
    response = table.names[table.response]
    if isinstance(route, tuple):
        return route
    named = {"answer": (response,), "full": (*reasoning, response), **{name: (name, response) for name in reasoning}}
    return named.get(route, ())


def _require_plan(config, table: StageTable, name: str, route: Route, min_check: str, max_tokens: int) -> None:
    """ValueError: the path cannot be gone with this check and so many tokens."""
    if route is None:
        return
    check = "enforce" if route == "escalate" else False if min_check == "none" else min_check
    try:
        for path in escalation(table) if route == "escalate" else [route]:
            make_plan(config, table, path, check, max_tokens)
    except ValueError as error:
        raise ValueError(f"--allow-paths {name}: {str(error).removeprefix('generate: ')}") from error
