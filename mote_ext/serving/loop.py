"""EngineLoop: one thread owns the engine; the server's coroutines put commands into a queue and get events back.

    coroutine   submit ──► commands ──► thread: engine.submit / cancel / step
                Ticket ◄── call_soon_threadsafe ◄── events of the step

The engine is not thread-safe, so nothing else touches it. An error that the engine itself does not put down to one
request ends the thread: every request fails, and the loop says so instead of hanging.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mote_ext.engine import QueueFull, SamplingParams, StageEvent
from mote_ext.serving.errors import Busy, EngineStalled, EngineStopped, RequestError, Stopping

LOG = logging.getLogger(__name__)
STATS_EVERY_S = 0.1
STOP_S = 5.0  # for the step that runs when the thread is to end


@dataclass(frozen=True)
class _Submit:
    key: str
    prompt: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True)
class _Cancel:
    key: str


class _Stop:
    """The thread's last command."""


class Ticket:
    """One request in the engine, and the events that come of it.

    request_id: the client's; free again once the ticket is cancelled
    key:        the engine's, never used twice: events of a cancelled request may still be on their way
    """

    def __init__(self, request_id: str, key: str, num_samples: int) -> None:
        self.request_id, self.key = request_id, key
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = num_samples  # samples whose last event has not come yet
        self._unread: list[StageEvent] = []
        self._error: RequestError | None = None
        self._news = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        return self._left == 0

    async def events(self, wait_s: Callable[[], float] | None = None) -> AsyncIterator[list[StageEvent]]:
        """Events as they come, all that are there at a time; none whenever none came for wait_s() seconds.

        RequestError: the engine, or the server, has stopped.
        """
        while not self.is_finished or self._unread or self._error:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s and wait_s())
            self._news.clear()
            if self._error is not None:
                raise self._error
            found, self._unread = self._unread, []
            yield found

    def _put(self, event: StageEvent) -> None:
        self._left -= event.output is not None
        self._unread.append(event)
        self._news.set()

    def _fail(self, error: RequestError) -> None:
        if self.is_finished:
            return
        self._left, self._error = 0, error
        self._news.set()
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # its coroutine may be gone; asyncio complains of errors nobody looks at


class EngineLoop:
    """Runs an engine in a thread of its own; everything here is called from one event loop.

    engine:    MoTEEngine, or what has its submit, step, cancel, has_work and stats
    max_open:  requests in the engine, running and waiting; one more is Busy
    stall_s:   seconds that one step may take before nothing more is taken on
    stats:     the newest of engine.stats()
    error:     what ended the thread, or None
    """

    def __init__(self, engine, *, max_open: int, stall_s: float = 60.0) -> None:
        self.engine, self.max_open, self.stall_s = engine, max_open, stall_s
        self.stats: dict[str, Any] = engine.stats()
        self.error: BaseException | None = None
        self.is_draining = False
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._open: dict[str, Ticket] = {}
        self._numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="mote-engine", daemon=True)
        self._stats_at = 0.0
        self._busy_since: float | None = None  # when the thread last began a round; None while it waits for commands

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def is_healthy(self) -> bool:
        return self.error is None and self._thread.is_alive()

    @property
    def is_stalled(self) -> bool:
        """Whether the thread has been in one step for too long."""
        since = self._busy_since
        return self.is_healthy and since is not None and time.monotonic() - since > self.stall_s

    @property
    def is_up(self) -> bool:
        return self.is_healthy and not self.is_stalled

    @property
    def has_ended(self) -> bool:
        """Whether the thread has, or never began."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread; events are delivered to the event loop that runs now."""
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Ticket:
        """Puts a request into the engine.

        prompt:  token ids
        RequestError: 429 no place, 503 stopping or stopped, 409 the id is in use, 400 what the engine refuses, and why.
        """
        self.require_place()
        if any(ticket.request_id == request_id for ticket in self._open.values()):
            raise RequestError(
                409,
                f"a request with the id {request_id!r} is still running; X-Request-Id must differ",
                code="duplicate_id",
            )
        key = f"{request_id}#{next(self._numbers)}"
        ticket = self._open[key] = Ticket(request_id, key, params.n)
        self._idle.clear()
        self._commands.put(_Submit(key, prompt, params))
        try:
            await ticket.accepted
        except BaseException:  # refused, or the client has gone while it waited
            self.cancel(ticket)
            raise
        return ticket

    def require_place(self, num_coming: int = 0) -> None:
        """RequestError: nothing is taken on any more (503), or with those that are on their way all is taken (429)."""
        if not self.is_healthy:
            raise EngineStopped()
        if self.is_draining:
            raise Stopping()
        if self.is_stalled:
            raise EngineStalled()
        if len(self._open) + num_coming >= self.max_open:
            raise Busy()

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request early, if it has not ended; its events are dropped. Has to be called for every ticket."""
        if self._open.pop(ticket.key, None) is None:
            return
        if not ticket.is_finished:
            self._commands.put(_Cancel(ticket.key))
        if not self._open:
            self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing on any more and waits for what runs; returns how many requests had to be cut off."""
        self.is_draining = True
        await asyncio.wait([asyncio.ensure_future(self._idle.wait())], timeout=timeout_s)
        cut = list(self._open.values())
        for ticket in cut:
            self._commands.put(_Cancel(ticket.key))
            ticket._fail(Stopping())
        return len(cut)

    async def stop(self) -> None:
        """Ends the thread after its step; gives it up, a daemon, when that takes longer than STOP_S."""
        self.is_draining = True
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join, STOP_S)

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException as error:
            LOG.exception("the engine has stopped")
            self._post(self._fail_all, error)

    def _serve(self) -> bool:
        """What is in the queue, then one step; waits where there is neither. False: stopped."""
        for command in self._waiting_commands():
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Submit):
                self._submit(command)
            else:
                self._cancel(command)
        if self.engine.has_work:
            events = self.engine.step()
            if events:
                self._post(self._deliver, events)
        self._publish_stats()
        return True

    def _waiting_commands(self) -> list:
        commands = []
        if not self.engine.has_work:
            self._busy_since = None
            commands.append(self._commands.get())
        self._busy_since = time.monotonic()
        while not self._commands.empty():
            commands.append(self._commands.get_nowait())
        return commands

    def _submit(self, command: _Submit) -> None:
        try:
            self.engine.submit(list(command.prompt), command.params, request_id=command.key)
        except QueueFull:
            error: RequestError = Busy()
        except ValueError as refused:
            error = RequestError(400, str(refused), code="refused")
        except Exception:
            LOG.exception("a request could not be taken on")
            error = RequestError(500, "the request could not be taken on; the server's log says why")
        else:
            self._post(self._accept, command.key)
            return
        self._post(self._refuse, command.key, error)

    def _cancel(self, command: _Cancel) -> None:
        with suppress(KeyError):  # it may have ended while the command was on its way
            self.engine.cancel(command.key)

    def _publish_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at >= STATS_EVERY_S or not self.engine.has_work:
            self._stats_at, self.stats = now, self.engine.stats()

    def _post(self, call: Callable, *args) -> None:
        try:
            self._asyncio.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the event loop has been closed: nobody waits for this any more
            LOG.debug("events of a closed server dropped")

    # ---- back in the event loop

    def _accept(self, key: str) -> None:
        ticket = self._open.get(key)
        if ticket is not None and not ticket.accepted.done():
            ticket.accepted.set_result(None)

    def _refuse(self, key: str, error: RequestError) -> None:
        ticket = self._open.get(key)
        if ticket is not None:
            ticket._fail(error)

    def _deliver(self, events: Sequence[StageEvent]) -> None:
        for event in events:
            ticket = self._open.get(event.request_id)
            if ticket is not None:
                ticket._put(event)

    def _fail_all(self, error: BaseException) -> None:
        self.error = error
        for ticket in list(self._open.values()):
            ticket._fail(EngineStopped())
