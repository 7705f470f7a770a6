"""Server-sent events: a response that is written while the engine works, and that ends when nobody reads it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still at work\n\n"
MORE_TO_READ_S = 10.0  # for the reader of a stream, once its request's time is over


def data(content: dict) -> bytes:
    """One event. Escaped to ASCII, so that no line break of a text ends it."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Streams chunks, and calls on_end once whatever happens: all was sent, the client has gone, or does not read.

    time_limit_s: of the request; a client that has not read everything MORE_TO_READ_S later is given up
    on_end:       is told whether its client has gone, or does not read
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], time_limit_s: float, on_end: Callable[[bool], None]) -> None:
        super().__init__(chunks, headers={"X-Accel-Buffering": "no"})
        self.time_limit_s, self.on_end = time_limit_s, on_end
        self._is_over = False

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except OSError:  # the client has gone
            raise
        except Exception:
            self._is_over = True
            raise
        self._is_over = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self.time_limit_s + MORE_TO_READ_S):
                await super().__call__(scope, receive, send)
        finally:
            self.on_end(not self._is_over)
