"""Runs a Server with uvicorn: the socket, the first signal that drains, the second that stops at once."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from mote_ext.serving.app import Server

LOG = logging.getLogger(__name__)
LET_GO_S = 1.0  # from the second signal to the end of the process
SPARE_CONNECTIONS = 256  # beside those of open requests: idle ones, health checks, the page


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. OSError: the address is taken or none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


class DrainingServer(uvicorn.Server):
    """uvicorn's, whose first SIGTERM or Ctrl-C lets the requests that run finish while others get 503.

    drain_s: seconds they have for that
    """

    def __init__(self, config: uvicorn.Config, server: Server, drain_s: float) -> None:
        super().__init__(config)
        self.served, self.drain_s = server, drain_s
        self._drainer: asyncio.Task | None = None
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._asyncio = asyncio.get_running_loop()
        await super().serve(sockets)

    def _end_at_once(self) -> None:
        """Lets go of what runs, and ends the process where that does not: a step cannot be broken off."""
        self.should_exit = self.force_exit = True
        last_resort = threading.Timer(LET_GO_S, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would stop listening at once, and raise the signal again at the end: neither 503 nor exit code 0.
        self._signals += 1
        if self._signals == 1:
            self._asyncio.call_soon_threadsafe(self.begin_to_drain)
        else:
            self._end_at_once()

    def begin_to_drain(self) -> None:
        self._drainer = self._drainer or asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        LOG.info("draining: %d requests run", self.served.loop.num_open)
        cut = await self.served.loop.drain(self.drain_s)
        if cut:
            LOG.warning("%d requests were cut off after %g s", cut, self.drain_s)
        self.should_exit = True


def make_uvicorn(server: Server, drain_s: float = 30.0) -> DrainingServer:
    """A uvicorn server that logs neither prompts nor answers, nor who asked."""
    config = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        limit_concurrency=server.limits.max_open + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    return DrainingServer(config, server, drain_s)


def run(server: Server, bound: socket.socket, *, drain_s: float, on_start: Callable[[], None]) -> None:
    """Serves until a signal. on_start: called once requests are taken."""
    running = make_uvicorn(server, drain_s)

    async def main() -> None:
        serving = asyncio.ensure_future(running.serve([bound]))
        while not running.started and not serving.done():
            await asyncio.sleep(0.01)
        if running.started:
            on_start()
        await serving

    asyncio.run(main())
    if not server.loop.has_ended:
        LOG.error("the engine's step did not end; the process ends without it")
        os._exit(1)
