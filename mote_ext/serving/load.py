"""The load generator of `mote bench serve`: streamed chat requests of mixed paths against a running server.

Bounded in number and time. Prompts are harmless sentences of a few words, drawn by keys, so that two runs ask the same;
some share a long beginning, as requests with one system message do. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mote_ext import keyed

_OPENINGS = ("Tell me", "Explain", "Describe", "Write a line about", "Give three facts about", "Why do people like")
_THINGS = ("rivers", "bread", "maps", "bicycles", "gardens", "clocks", "kites", "tea", "bridges", "owls", "stamps")
_ENDINGS = ("in short", "for a child", "with an example", "as a list", "in one sentence", "step by step")
_SYSTEMS = ("", "You answer in plain words. " * 6, "You teach at a village school and like comparisons. " * 4)


@dataclass(frozen=True)
class Load:
    """What to send.

    num_requests, seconds: the run ends at the first of these bounds; what runs then is finished
    concurrency: requests at once
    paths:       drawn evenly
    check:       "none", "flag" or "enforce"
    max_tokens:  of an answer; drawn between a quarter of it and all, but at least 32
    """

    num_requests: int = 64
    seconds: float = 120.0
    concurrency: int = 8
    paths: Sequence[str] = ("adaptive",)
    check: str = "none"
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def body(self, number: int, model: str) -> dict:
        """Request `number` of this load; depends on the seed and the number alone."""
        key = ("load", self.seed, number)
        words = [part[keyed.integer(len(part), *key, i)] for i, part in enumerate((_OPENINGS, _THINGS, _ENDINGS))]
        system = _SYSTEMS[keyed.integer(len(_SYSTEMS), *key, "system")]
        least = min(self.max_tokens, max(32, self.max_tokens // 4))
        return {
            "model": model,
            "messages": [
                *([{"role": "system", "content": system}] if system else []),
                {"role": "user", "content": " ".join(words)},
            ],
            "path": self.paths[keyed.integer(len(self.paths), *key, "path")],
            "check": self.check,
            "max_tokens": least + keyed.integer(self.max_tokens - least + 1, *key, "length"),
            "temperature": self.temperature,
            "seed": keyed.integer(2**31, *key, "seed"),
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass
class Timing:
    """One request as its client saw it, in seconds from its sending; None for what never came.

    error: why it failed, or None
    """

    path: str
    first: float | None = None
    first_answer: float | None = None
    last: float | None = None
    total: float = 0.0
    num_tokens: int = 0
    num_prompt: int = 0
    verdict: str | None = None
    error: str | None = None


@dataclass
class Measured:
    """A run: its timings, its length in seconds, and the scheduler's counts before and after."""

    timings: list[Timing]
    seconds: float
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)

    def grown(self, name: str) -> int:
        return self.after[name] - self.before[name]

    def summary(self) -> dict:
        """Rates, percentiles in seconds, and the scheduler's counts, for JSON."""
        good = [timing for timing in self.timings if timing.error is None]
        tokens = sum(timing.num_tokens for timing in good)
        per_token = [
            (timing.last - timing.first) / (timing.num_tokens - 1)
            for timing in good
            if timing.first is not None and timing.num_tokens > 1
        ]
        looked = self.grown("prefix_query_tokens")
        return {
            "requests": len(self.timings),
            "failed": len(self.timings) - len(good),
            "errors": Counter(timing.error for timing in self.timings if timing.error is not None),
            "seconds": self.seconds,
            "requests_per_second": len(good) / self.seconds,
            "generated_tokens_per_second": tokens / self.seconds,
            "prompt_tokens_per_second": sum(timing.num_prompt for timing in good) / self.seconds,
            "time_to_first_token": percentiles([timing.first for timing in good]),
            "time_to_first_answer_token": percentiles([timing.first_answer for timing in good]),
            "time_per_output_token": percentiles(per_token),
            "request_time": percentiles([timing.total for timing in good]),
            "hit_rate": self.grown("prefix_hit_tokens") / looked if looked else 0.0,
            "preemptions": self.grown("preemptions"),
            "roll_backs": self.grown("rolled_back"),
            "steps": self.grown("steps"),
            "paths": Counter(timing.path for timing in good),
        }


class Client:
    """A server to be loaded.

    url: such as http://127.0.0.1:8000; key: of its API, or None; timeout_s: of one read
    ValueError: an address that is none.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an address such as http://127.0.0.1:8000 expected, got {url!r}")
        self._parts, self._timeout_s = parts, timeout_s
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def get(self, path: str) -> dict:
        """A JSON object. ConnectionError: the server cannot be reached or answers with an error."""
        connection = self._connect()
        try:
            connection.request("GET", self._parts.path.rstrip("/") + path, headers=self._headers)
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{self._parts.geturl()} cannot be reached: {type(error).__name__}") from error
        finally:
            connection.close()
        if reply.status != 200:
            raise ConnectionError(f"{self._parts.geturl()}{path} answered HTTP {reply.status}")
        return json.loads(body)

    def ask(self, body: dict) -> Timing:
        """One streamed request to its end, timed."""
        timing = Timing(body["path"])
        begin = time.perf_counter()
        connection = self._connect()
        try:
            path = self._parts.path.rstrip("/") + "/v1/chat/completions"
            connection.request("POST", path, json.dumps(body), self._headers)
            reply = connection.getresponse()
            if reply.status != 200:
                reply.read()
                timing.error = f"HTTP {reply.status}"
            else:
                self._read(reply, timing, begin)
        except (OSError, http.client.HTTPException, ValueError) as error:
            timing.error = type(error).__name__
        finally:
            connection.close()
        timing.total = time.perf_counter() - begin
        return timing

    def _read(self, reply: http.client.HTTPResponse, timing: Timing, begin: float) -> None:
        for event in _events(reply):
            now = time.perf_counter() - begin
            if "error" in event:
                timing.error = event["error"].get("code") or "error in the stream"
                return
            if event.get("usage"):
                timing.num_tokens = event["usage"]["completion_tokens"]
                timing.num_prompt = event["usage"]["prompt_tokens"]
            timing.verdict = (event.get("mote") or {}).get("verdict") or timing.verdict
            if event["choices"]:
                timing.first = now if timing.first is None else timing.first
                timing.last = now
                if event["choices"][0]["delta"].get("content") and timing.first_answer is None:
                    timing.first_answer = now
        if timing.last is None:
            timing.error = "the stream ended early"

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname, self._parts.port, timeout=self._timeout_s)


def measure(client: Client, load: Load, model: str, progress=None) -> Measured:
    """Sends the load. progress: called with each finished Timing, from several threads in turn."""
    begin = time.perf_counter()
    before = client.get("/state")["stats"]
    numbers, lock = iter(range(load.num_requests)), threading.Lock()
    timings: list[Timing] = []

    def work() -> None:
        while time.perf_counter() - begin < load.seconds:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            timing = client.ask(load.body(number, model))
            with lock:
                timings.append(timing)
                if progress is not None:
                    progress(timing)

    with ThreadPoolExecutor(load.concurrency) as pool:
        for worker in [pool.submit(work) for _ in range(load.concurrency)]:
            worker.result()
    return Measured(timings, time.perf_counter() - begin, before, client.get("/state")["stats"])


def percentiles(values: Sequence[float | None]) -> dict[str, float | None]:
    """p50, p90 and p99 (nearest rank) of what is there; None where nothing is."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return {"p50": None, "p90": None, "p99": None}
    return {f"p{share}": found[max(0, -(-share * len(found) // 100) - 1)] for share in (50, 90, 99)}


def _events(reply: http.client.HTTPResponse) -> Iterator[dict]:
    for line in reply:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])
