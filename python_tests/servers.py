"""Servers for tests: a tiny model with a tokenizer, and mote serve's application on loopback, uvicorn in a thread."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from functools import cache

import models
import pytest

import mote_ext
from mote_ext.engine import MoTEEngine
from mote_ext.serving.app import Limits, Server
from mote_ext.serving.guard import Keys
from mote_ext.serving.policy import Policy
from mote_ext.serving.run import listen, make_uvicorn

QUESTION = [{"role": "user", "content": "How do plants drink?"}]


@cache
def tokenizer():
    return models.make_tokenizer()


def make_model(**config):
    """A tiny model whose every byte is a token; check_threshold 0 makes every verdict safe, 1 every one unsafe."""
    controls = {name: getattr(tokenizer(), name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocabulary = len(models.make_tokenizer())  # of one without markers, which the first model adds to the shared one
    base = models.make_base("llama", vocab_size=vocabulary, max_position_embeddings=2048, **controls)
    config = mote_ext.MoTEConfig(**{"r": 4, "refusal": "I cannot help with that.", **config})
    model = mote_ext.MoTEForCausalLM.from_base(base, config, tokenizer=tokenizer())
    return models.disturb(model.eval())


class Running:
    """A server that answers at `url`."""

    def __init__(self, server, port, uvicorn):
        self.server, self.uvicorn, self.port = server, uvicorn, port
        self.url = f"http://127.0.0.1:{port}"
        self.loop, self.engine = server.loop, server.loop.engine

    def call(self, method, path, body=None, headers=None, host=None):
        """(status, headers, body) of one request; a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body) if isinstance(body, dict) else body
        headers = {**({"Content-Type": "application/json"} if body is not None else {}), **(headers or {})}
        if host is not None:
            headers["Host"] = host
        try:
            connection.request(method, path, data, headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def post(self, path, body, **headers):
        """(status, object) of a JSON request."""
        status, _, data = self.call("POST", path, body, {name.replace("_", "-"): v for name, v in headers.items()})
        return status, json.loads(data)

    def chat(self, **fields):
        """The object of a chat completion that must be answered."""
        status, found = self.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 60, **fields})
        assert status == 200, found
        return found

    def get(self, path, **headers):
        status, _, data = self.call("GET", path, headers={name.replace("_", "-"): v for name, v in headers.items()})
        return status, json.loads(data)

    def begin(self, **fields):
        """A streamed chat that has begun: its connection and its response, unread."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"messages": QUESTION, "max_tokens": 60, "stream": True, **fields}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def wait_until_idle(self, seconds=20):
        """Until no request is open, and every page is back: what is not used is cached or free."""
        wait_for(lambda: self.loop.num_open == 0 and not self.engine.has_work, seconds)
        wait_for(lambda: self.loop.stats["num_running"] == self.loop.stats["num_waiting"] == 0, seconds)
        assert self.loop.stats["pages_used"] == 0


def wait_for(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def make_server(model=None, *, engine_class=MoTEEngine, engine=None, policy=None, keys=(), limits=None, hosts=()):
    model = make_model() if model is None else model
    engine = engine_class(model, tokenizer(), **{"num_pages": 512, "max_running": 32, **(engine or {})})
    rules = Policy.of(model.routing.config, **{"max_tokens": 512, **(policy or {})})
    return Server(
        engine, tokenizer(), rules, model="tiny", keys=Keys(keys), limits=Limits(**(limits or {})), hosts=hosts
    )


@contextmanager
def running(*args, drain_s=5.0, **options):
    """A server for the time of a with block."""
    server = make_server(*args, **options)
    bound = listen("127.0.0.1", 0)
    uvicorn = make_uvicorn(server, drain_s)
    thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_for(lambda: uvicorn.started or not thread.is_alive())
        yield Running(server, bound.getsockname()[1], uvicorn)
    finally:
        uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class GatedEngine(MoTEEngine):
    """Steps only while `gate` is set, and raises `failure` in a step when there is one."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate, self.failure, self.steps_left = threading.Event(), None, None

    def step(self):
        if self.failure is not None:
            raise self.failure
        if self.steps_left is not None:
            if self.steps_left == 0:
                self.gate.wait(0.01)
                return []
            self.steps_left -= 1
        return super().step()


def client(server, key="none"):
    """OpenAI's own Python client; skips the test where it is not installed."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def sse(data):
    """The objects of a stream; its end must be there."""
    events = [part for part in data.decode().split("\n\n") if part]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event[6:]) for event in events[:-1] if event.startswith("data: ")]


def joined(chunks, field, sample=0):
    """The deltas of one field of a streamed chat, put together."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == sample]
    return "".join(choice["delta"].get(field) or "" for choice in choices)
