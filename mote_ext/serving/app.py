"""The routes: OpenAI's completions and models, health, metrics, the page and the state it shows."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mote_ext.engine import RequestOutput, StageEvent
from mote_ext.serving.encoder import Encoder
from mote_ext.serving.errors import RequestError
from mote_ext.serving.fields import Fields, parse_object
from mote_ext.serving.guard import Guard, Keys
from mote_ext.serving.loop import EngineLoop, Ticket
from mote_ext.serving.metrics import CONTENT_TYPE, CountResponses, Metrics, Watch
from mote_ext.serving.page import page_response
from mote_ext.serving.policy import Policy
from mote_ext.serving.protocol import Ask, parse_chat, parse_completion
from mote_ext.serving.replies import Reply, require_good
from mote_ext.serving.streaming import DONE, KEEP_ALIVE, EventStream, data

GONE = 499  # nginx's status of a client that has left; nobody reads it
Done = TypeVar("Done")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    body_bytes: of a request's body
    body_s:     seconds in which it must have come
    request_s:  seconds from the request to its answer's end
    keep_alive_s: seconds of silence in a stream before a comment
    stall_s:    seconds that one step of the engine may take before the server calls itself unhealthy
    max_open:   requests running and waiting
    """

    body_bytes: int = 1 << 20
    body_s: float = 30.0
    request_s: float = 600.0
    keep_alive_s: float = 10.0
    stall_s: float = 60.0
    max_open: int = 320


class Server:
    """A model that is served: its engine, what is allowed, what is counted. app() makes the ASGI application."""

    def __init__(
        self,
        engine,
        tokenizer,
        policy: Policy,
        *,
        model: str,
        keys: Keys | None = None,
        limits: Limits | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.policy, self.model, self.hosts = policy, model, hosts
        self.keys, self.limits = keys or Keys(), limits or Limits()
        self.metrics = Metrics()
        self.loop = EngineLoop(engine, max_open=self.limits.max_open, stall_s=self.limits.stall_s)
        self.encoder = Encoder(tokenizer)
        self._begun = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and ends the engine's thread."""
        return Starlette(
            routes=[
                Route("/", page_response),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.one_model),
                Route("/health", self.health),
                Route("/metrics", self.metrics_page),
                Route("/state", self.state),
            ],
            middleware=[
                Middleware(CountResponses, metrics=self.metrics),
                Middleware(Guard, keys=self.keys, hosts=self.hosts),
            ],
            exception_handlers={HTTPException: _http_error, RequestError: _request_error, Exception: _any_error},
            lifespan=self._lifespan,
        )

    # ---- what is asked of the model

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def _answer(self, request: Request, parse: Callable[..., Ask]) -> Response:
        begin = time.monotonic()
        try:
            ask, request_id = await self._asked(request, parse)
            prompt, ticket = await self._in_time(request, begin, self._submitted(ask, request_id))
            self.metrics.prompt_tokens += len(prompt)
            prefix = "chatcmpl" if ask.is_chat else "cmpl"
            reply = Reply(ask, self.policy, self.model, f"{prefix}-{request_id}", self.encoder.decode)
            watch = Watch(self.metrics, ask, self.policy, begin)
            if ask.stream:
                chunks = self._chunks(ticket, reply, watch)
                response: Response = EventStream(chunks, self.limits.request_s, partial(self._end, ticket))
            else:
                response = await self._whole(request, ticket, reply, watch)
        except RequestError as error:
            self.metrics.disconnects += error.status == GONE
            raise
        response.headers["X-Request-Id"] = request_id
        return response

    async def _submitted(self, ask: Ask, request_id: str) -> tuple[list[int], Ticket]:
        """The prompt's ids and its place in the engine."""
        self.loop.require_place(self.encoder.num_waiting)
        prompt, params = await self.encoder.encode(ask)
        return prompt, await self.loop.submit(request_id, prompt, params)

    async def _in_time(self, request: Request, begin: float, work: Coroutine[Any, Any, Done]) -> Done:
        """What `work` gives. RequestError: 504 the request's time is over, 499 its client has gone."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))]
        try:
            left = begin + self.limits.request_s - time.monotonic()
            done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)  # what was cancelled has given its place back before anybody is told
        if tasks[0] in done:
            return tasks[0].result()
        raise RequestError(GONE, "the client has gone") if done else _out_of_time()

    async def _asked(self, request: Request, parse: Callable[..., Ask]) -> tuple[Ask, str]:
        """The request and its id. RequestError: it is none."""
        body = parse_object(await self._body(request))
        authorization = request.headers.get("authorization")
        salt = self.keys.salt(authorization, Fields(body).text("cache_salt", ""))
        given = request.headers.get("x-request-id", "")
        if given and not _REQUEST_ID.fullmatch(given):
            raise RequestError(400, "X-Request-Id must be 1 to 128 letters, digits and . : - _", code="invalid_id")
        return parse(body, self.policy, self.model, salt), given or secrets.token_hex(12)

    async def _body(self, request: Request) -> bytes:
        """RequestError: 413 too long, 408 too slow, 499 gone."""
        most = self.limits.body_bytes
        too_long = RequestError(413, f"a request's body must be at most {most:,} bytes", code="too_large")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_long
        body = bytearray()

        async def read() -> None:
            async for piece in request.stream():
                body.extend(piece)
                if len(body) > most:
                    raise too_long

        try:
            await asyncio.wait_for(read(), self.limits.body_s)
        except asyncio.TimeoutError:
            raise RequestError(408, "the request's body did not come in time", code="timeout") from None
        except ClientDisconnect:
            raise RequestError(GONE, "the client has gone") from None
        return bytes(body)

    async def _chunks(self, ticket: Ticket, reply: Reply, watch: Watch) -> AsyncIterator[bytes]:
        deadline, sent, outputs = watch.begin + self.limits.request_s, time.monotonic(), []

        def silence_left() -> float:
            return min(sent + self.limits.keep_alive_s, deadline) - time.monotonic()

        try:
            async for events in ticket.events(silence_left):
                if time.monotonic() > deadline:
                    raise _out_of_time()
                for event in events:
                    if event.output is not None:
                        require_good(event.output)
                        outputs.append(event.output)
                    watch.see(event)
                written = await self._written(reply, partial(_joined, reply, events))
                if not written and silence_left() > 0:
                    continue
                yield written or KEEP_ALIVE
                sent = time.monotonic()
            if reply.ask.include_usage:
                yield data(reply.usage_chunk(outputs))
            yield DONE
        except RequestError as error:
            yield data(error.body())

    async def _whole(self, request: Request, ticket: Ticket, reply: Reply, watch: Watch) -> Response:
        async def collected() -> list[RequestOutput]:
            outputs = []
            async for events in ticket.events():
                for event in events:
                    watch.see(event)
                    outputs.extend([event.output] if event.output is not None else [])
            return outputs

        try:
            outputs = await self._in_time(request, watch.begin, collected())
        finally:
            self.loop.cancel(ticket)
        for output in outputs:
            require_good(output)
        return await self._written(reply, lambda: JSONResponse(reply.whole(outputs)))

    async def _written(self, reply: Reply, make: Callable[[], Done]) -> Done:
        """What `make` writes; log-probabilities are so many that it would hold up the event loop."""
        return make() if reply.ask.params.logprobs is None else await self.encoder.write(make)

    def _end(self, ticket: Ticket, is_gone: bool) -> None:
        self.metrics.disconnects += is_gone
        self.loop.cancel(ticket)

    # ---- what is asked about it

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["model"] != self.model:
            raise RequestError(404, f"this server has the model {self.model!r} alone", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """200 while requests are taken; 503 while it shuts down, and when the engine has stopped or does not get on."""
        loop = self.loop
        states = {"stopped": not loop.is_healthy, "draining": loop.is_draining, "stalled": loop.is_stalled}
        status = next((name for name, holds in states.items() if holds), "ok")
        return JSONResponse({"status": status, "open": loop.num_open}, 200 if status == "ok" else 503)

    async def metrics_page(self, request: Request) -> Response:
        loop = self.loop
        text = self.metrics.text(loop.stats, self.policy.stages, num_open=loop.num_open, is_healthy=loop.is_up)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def state(self, request: Request) -> Response:
        """The scheduler's numbers, as engine.stats() has them, for the page and for `mote bench serve`."""
        loop = self.loop
        state = {"stats": loop.stats, "open": loop.num_open, "healthy": loop.is_up, "draining": loop.is_draining}
        return JSONResponse(json.loads(json.dumps({**state, "stages": self.policy.stages}, default=float)))

    def _model(self) -> dict:
        return {
            "id": self.model,
            "object": "model",
            "created": self._begun,
            "owned_by": "mote_ext",
            "mote": self.policy.describe(),
        }

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.loop.start()
        try:
            yield
        finally:
            await self.loop.stop()
            self.encoder.close()


def _joined(reply: Reply, events: Sequence[StageEvent]) -> bytes:
    return b"".join(data(chunk) for event in events for chunk in reply.chunks(event))


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    with suppress(RuntimeError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _out_of_time() -> RequestError:
    return RequestError(504, "the request's time is over; ask for fewer tokens", code="timeout")


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such route, or another method."""
    refused = RequestError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}")
    return JSONResponse(refused.body(), error.status_code, error.headers)


async def _request_error(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _any_error(request: Request, error: Exception) -> Response:
    """A mistake of ours; Starlette raises it again for the log once this is sent."""
    return JSONResponse(RequestError(500, "the server failed; its log says why").body(), 500)
