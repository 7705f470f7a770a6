"""Numbers for Prometheus in its text format: what the server counts, and what the engine's stats() says."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mote_ext.engine import RequestOutput, StageEvent
from mote_ext.serving.policy import Policy
from mote_ext.serving.protocol import Ask
from mote_ext.serving.replies import answer_end

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/models": "models",
    "/health": "health",
    "/metrics": "metrics",
    "/state": "state",
    "/": "page",
}
_GAUGES = {
    "num_running": ("mote_requests_running", "Samples that the scheduler runs."),
    "num_waiting": ("mote_requests_waiting", "Samples that wait for pages or a place."),
}
_COUNTERS = {
    "prefix_query_tokens": ("mote_prefix_query_tokens", "Prompt tokens that were looked up in the prefix cache."),
    "prefix_hit_tokens": ("mote_prefix_hit_tokens", "Prompt tokens that were found in the prefix cache."),
    "preemptions": ("mote_preemptions", "Samples put back for want of pages."),
    "rolled_back": ("mote_roll_backs", "Attempts of the path escalate that were taken back."),
    "evictions": ("mote_evictions", "Cached pages that were given to others."),
    "steps": ("mote_steps", "Forward passes."),
    "planned_tokens": ("mote_planned_tokens", "Tokens that went through the model."),
}


class Histogram:
    """Counts of seconds by upper bound; cumulative only when written."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterable[str]:
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts):
            seen += count
            yield f'{name}_bucket{{le="{bound}"}} {seen}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {seen}"


class Metrics:
    """What the server itself counts; only the event loop touches it."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.finished: Counter[tuple[str, str]] = Counter()  # (path, why it ended)
        self.disconnects = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.first_token = Histogram()
        self.first_answer_token = Histogram()
        self.token = Histogram(TOKEN_SECONDS)
        self.request = Histogram()

    def text(self, stats: Mapping[str, Any], stages: Sequence[str], *, num_open: int, is_healthy: bool) -> str:
        """The page of /metrics. stats: the engine's; stages: names of stage_tokens' entries from the third on."""
        lines = [*self._own(num_open, is_healthy), *_of_engine(stats, stages)]
        return "\n".join(lines) + "\n"

    def _own(self, num_open: int, is_healthy: bool) -> Iterable[str]:
        yield from _family("mote_up", "gauge", "Whether the engine's thread runs.", [("", int(is_healthy))])
        yield from _family("mote_requests_open", "gauge", "Requests taken on and not yet done.", [("", num_open)])
        by_status = [(f'route="{route}",status="{status}"', n) for (route, status), n in self.responses.items()]
        yield from _family("mote_responses", "counter", "Responses begun.", by_status)
        by_reason = [(f'path="{_escaped(path)}",reason="{reason}"', n) for (path, reason), n in self.finished.items()]
        yield from _family("mote_answers", "counter", "Samples that ended, by path and why.", by_reason)
        yield from _family("mote_disconnects", "counter", "Clients gone before their answer.", [("", self.disconnects)])
        yield from _family("mote_prompt_tokens", "counter", "Tokens of accepted prompts.", [("", self.prompt_tokens)])
        count = [("", self.generated_tokens)]
        yield from _family("mote_generated_tokens", "counter", "Tokens generated, what is withheld included.", count)
        for name, histogram, what in (
            ("mote_time_to_first_token_seconds", self.first_token, "From the request to its first generated token."),
            ("mote_time_to_first_answer_token_seconds", self.first_answer_token, "To the first token of the answer."),
            ("mote_time_per_token_seconds", self.token, "Mean time of a token after the first, per request."),
            ("mote_request_seconds", self.request, "From the request to its end."),
        ):
            yield f"# HELP {name} {what}"
            yield f"# TYPE {name} histogram"
            yield from histogram.lines(name)


class CountResponses:
    """ASGI middleware, the outermost: counts every response by route and status when it begins."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route, begun = ROUTES.get(scope["path"], "other"), False

        async def counting_send(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.metrics.responses[route, message["status"]] += 1
            await send(message)

        try:
            await self.app(scope, receive, counting_send)
        except Exception:
            self.metrics.responses[route, 500] += not begun  # Starlette answers it outside of all middleware
            raise


class Watch:
    """The times and the end of one request, for the metrics. begin: on time.monotonic's clock."""

    def __init__(self, metrics: Metrics, ask: Ask, policy: Policy, begin: float) -> None:
        self.metrics, self.ask, self.policy, self.begin = metrics, ask, policy, begin
        self._first: float | None = None
        self._answers = False
        self._num_tokens, self._left = 0, ask.params.n

    def see(self, event: StageEvent) -> None:
        now = time.monotonic()
        self._num_tokens += len(event.token_ids)
        if self._first is None and event.token_ids:
            self._first = now
            self.metrics.first_token.observe(now - self.begin)
        if not self._answers and event.stage == self.policy.response and event.text:
            self._answers = True
            self.metrics.first_answer_token.observe(now - self.begin)
        if event.output is not None:
            self._see_end(event.output, now)

    def _see_end(self, output: RequestOutput, now: float) -> None:
        self.metrics.finished[self.ask.path, answer_end(output, self.ask, self.policy)] += 1
        self.metrics.generated_tokens += output.num_drawn
        self._left -= 1
        if self._left == 0:
            self.metrics.request.observe(now - self.begin)
            if self._first is not None and self._num_tokens > 1:
                self.metrics.token.observe((now - self._first) / (self._num_tokens - 1))


def _of_engine(stats: Mapping[str, Any], stages: Sequence[str]) -> Iterable[str]:
    for key, (name, what) in _GAUGES.items():
        yield from _family(name, "gauge", what, [("", stats[key])])
    pages = [(f'state="{state}"', stats[f"pages_{state}"]) for state in ("used", "cached", "free")]
    yield from _family("mote_pages", "gauge", "Pages of the cache; unused ones may still hold a prefix.", pages)
    for key, (name, what) in _COUNTERS.items():
        yield from _family(name, "counter", what, [("", stats[key])])
    names = ("base_only", "shared_only", *stages)
    tokens = [(f'stage="{name}"', count) for name, count in zip(names, stats["stage_tokens"])]
    yield from _family("mote_stage_tokens", "counter", "Tokens that went through the model, by stage.", tokens)


def _family(name: str, kind: str, what: str, samples: Iterable[tuple[str, float]]) -> Iterable[str]:
    name = f"{name}_total" if kind == "counter" else name
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
