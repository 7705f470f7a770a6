"""Two ways to read an engine's events: all outputs of a list of prompts, or one request as it comes. Neither swallows
what belongs to others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mote_ext._C import QueueFull
from mote_ext.engine.outputs import RequestOutput, StageEvent
from mote_ext.engine.prompts import Prepared


def collect(engine, prepared: list[Prepared], progress: bool) -> list[RequestOutput]:
    """Runs requests to their end and returns their outputs in order; whatever is raised cancels them."""
    waiting = deque(enumerate(prepared))
    found: dict[tuple[int, int], RequestOutput] = {}
    numbers: dict[str, int] = {}
    try:
        with _bar(sum(request.params.n for request in prepared), progress) as bar:
            while waiting or numbers:
                _fill(engine, waiting, numbers)
                for event in _own_events(engine, numbers):
                    if event.output is None:
                        continue
                    number = numbers[event.request_id]
                    found[number, event.sample] = event.output
                    bar.update()
                    if all((number, sample) in found for sample in range(prepared[number].params.n)):
                        del numbers[event.request_id]
    except BaseException:
        for request_id in numbers:
            engine.drop(request_id)
        raise
    return [found[key] for key in sorted(found)]


class RequestEvents(Iterator[StageEvent]):
    """One request's events until its last. close(), or letting go of it, cancels the request; a generator's `finally`
    would not run before its first event."""

    def __init__(self, engine, request_id: str) -> None:
        self._engine, self._request_id = engine, request_id
        self._events: deque[StageEvent] = deque()

    def __next__(self) -> StageEvent:
        try:
            while not self._events:
                if not self._engine.is_unfinished(self._request_id) and not self._engine.has_work:
                    raise StopIteration
                self._events += _own_events(self._engine, (self._request_id,))
                if not self._events and not self._engine.is_unfinished(self._request_id):
                    raise StopIteration
        except BaseException:
            self.close()
            raise
        return self._events.popleft()

    def close(self) -> None:
        self._engine.drop(self._request_id)

    def __del__(self) -> None:
        self.close()


def _fill(engine, waiting: deque, numbers: dict[str, int]) -> None:
    while waiting:
        number, request = waiting[0]
        try:
            numbers[engine.enqueue(request, None, streams=False)] = number
        except QueueFull:
            return
        waiting.popleft()


def _own_events(engine, own) -> list[StageEvent]:
    events = engine.step()
    engine.put_back([event for event in events if event.request_id not in own])
    return [event for event in events if event.request_id in own]


def _bar(total: int, shown: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="sample", disable=None if shown else True)
