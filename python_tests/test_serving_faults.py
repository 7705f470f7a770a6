"""Faults a server meets, over real HTTP: malformed and hostile requests, clients that leave, a broken engine, the end.

That request fails with a clear error, all others finish, all pages come back.
"""

import http.client
import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")

from servers import QUESTION, GatedEngine, client, joined, make_model, running, sse, tokenizer, wait_for

from mote_ext.serving.app import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY, OTHER = "first-long-secret", "second-long-secret"


@pytest.fixture(scope="module")
def safe():
    """Every verdict is safe."""
    with running(make_model(check_threshold=0.0)) as server:
        yield server


# ---- faults of clients


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": NaN}', b"[" * 50_000], ids=range(6))
def test_malformed_json(safe, body):
    status, _, data = safe.call("POST", CHAT, body)
    assert status == 400 and json.loads(data)["error"]["code"] == "invalid_json"
    safe.wait_until_idle()


def test_ids_with_controls_are_refused(safe):
    markers = safe.engine.model.routing.table.marker_ids
    controls = [*markers, tokenizer().eos_token_id]
    for control in controls:
        status, found = safe.post(TEXT, {"prompt": [10, control, 11], "max_tokens": 40})
        assert status == 400 and str(control) in found["error"]["message"]
    status, found = safe.post(TEXT, {"prompt": [10, 100_000], "max_tokens": 40})
    assert status == 400 and "100000" in found["error"]["message"]
    assert safe.post(TEXT, {"prompt": [tokenizer().bos_token_id, 10], "max_tokens": 40})[0] == 200
    safe.wait_until_idle()


def test_what_can_never_run_is_refused(safe):
    words = "word " * 2000
    status, found = safe.post(CHAT, {"messages": [{"role": "user", "content": words}], "max_tokens": 60})
    assert status == 400 and found["error"]["message"]
    status, found = safe.post(CHAT, {"messages": QUESTION, "path": "full", "check": "flag", "max_tokens": 4})
    assert status == 400 and "max_new_tokens must be at least" in found["error"]["message"]
    safe.wait_until_idle()


def test_a_body_too_long():
    with running(limits={"body_bytes": 1000}) as server:
        long = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]})
        assert server.call("POST", CHAT, long)[0] == 413
        pieces = iter([long[:600].encode(), long[600:].encode()])
        assert server.call("POST", CHAT, pieces)[0] == 413  # chunked: no length is told beforehand
        assert server.chat(path="answer")


def test_a_body_that_never_comes():

    with running(limits={"body_s": 0.3}) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in raw.recv(100)
        server.chat(path="answer")


def test_pages_of_other_origins_get_nothing(safe):
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        status, answered, _ = safe.call("POST", CHAT, {"messages": QUESTION}, headers)
        assert status == 403 and "access-control-allow-origin" not in {name.lower() for name in answered}
    assert safe.call("POST", CHAT, {"messages": QUESTION}, host="rebound.example")[0] == 403
    assert safe.call("OPTIONS", CHAT, headers={"Origin": "https://evil.example"})[0] == 403
    assert safe.call("GET", "/state", headers={"Origin": safe.url})[0] == 200


def test_a_wrong_key():
    with running(keys=[KEY, OTHER]) as server:
        for headers in ({}, {"Authorization": "Bearer wrong-long-secret"}):
            status, answered, data = server.call("POST", CHAT, {"messages": QUESTION}, headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
            assert json.loads(data)["error"]["code"] == "invalid_api_key"
            assert server.call("GET", "/metrics", headers=headers)[0] == 401
        assert server.call("GET", "/health")[0] == 200
        made = client(server, OTHER).chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40)
        assert made.choices


def test_keys_share_no_prefix():
    words = [{"role": "user", "content": "the same long question " * 8}]
    with running(keys=[KEY, OTHER]) as server:

        def cached(key, **fields):
            body = {"messages": words, "max_tokens": 40, "path": "answer", **fields}
            status, found = server.post(CHAT, body, Authorization=f"Bearer {key}")
            assert status == 200
            return found["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached(KEY) == 0
        assert cached(KEY) > 100
        assert cached(OTHER) == 0
        assert cached(OTHER, cache_salt=server.server.keys.salt(f"Bearer {KEY}")) == 0
        assert cached(KEY, cache_salt="mine") == 0


def test_duplicate_ids():
    with running(engine_class=GatedEngine) as server:
        server.engine.steps_left = 0
        connection, _ = server.begin()
        status, found = server.post(CHAT, {"messages": QUESTION}, X_Request_Id="bad id\N{SNOWMAN}".encode())
        assert status == 400

        first = threading.Thread(target=server.post, args=(CHAT, {"messages": QUESTION}), kwargs={"X_Request_Id": "a"})
        first.start()
        wait_for(lambda: server.loop.num_open == 2)
        status, found = server.post(CHAT, {"messages": QUESTION}, X_Request_Id="a")
        assert (status, found["error"]["code"]) == (409, "duplicate_id")
        server.engine.steps_left = None
        first.join()
        connection.close()
        assert server.post(CHAT, {"messages": QUESTION, "max_tokens": 40}, X_Request_Id="a")[0] == 200
        server.wait_until_idle()


def test_a_full_queue():
    with running(engine_class=GatedEngine, limits={"max_open": 3}) as server:
        server.engine.steps_left = 0
        begun = [server.begin() for _ in range(3)]
        status, headers, data = server.call("POST", CHAT, {"messages": QUESTION})
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(data)["error"]["code"] == "queue_full"
        assert server.get("/health")[0] == 200
        server.engine.steps_left = None
        for connection, reply in begun:
            assert sse(reply.read())
            connection.close()
        server.chat(path="answer")
        server.wait_until_idle()


def test_the_engines_own_queue_is_bounded_too():
    with running(engine_class=GatedEngine, engine={"max_running": 1, "max_waiting": 1}) as server:
        server.engine.steps_left = 1
        begun = [server.begin()]
        wait_for(lambda: server.engine.steps_left == 0)
        begun.append(server.begin())
        assert server.call("POST", CHAT, {"messages": QUESTION})[0] == 429
        server.engine.steps_left = None
        assert all(sse(reply.read()) for _, reply in begun)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_is_cancelled(streams):

    with running(engine_class=GatedEngine) as server:
        server.engine.steps_left = 2
        body = json.dumps({"messages": QUESTION, "stream": streams, "max_tokens": 400, "path": "full"}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(head.encode() + body)
            wait_for(lambda: server.engine.steps_left == 0)
            assert server.loop.num_open == 1
        wait_for(lambda: server.loop.num_open == 0)
        server.engine.steps_left = None
        server.wait_until_idle()
        assert server.loop.stats["cancelled"] == 1
        assert server.server.metrics.disconnects == 1
        server.chat(path="answer")


def test_a_client_that_does_not_read_holds_up_nobody(safe):
    """A slow reader's events wait for it; all others go on, and what it reads late is whole."""
    fields = {"path": "full", "check": "flag", "temperature": 1.0, "seed": 4, "max_tokens": 400}
    connection, reply = safe.begin(**fields)
    assert safe.chat(path="answer")
    safe_text = safe.chat(**fields)["choices"][0]["message"]["content"]
    pieces = []
    while piece := reply.read(64):
        pieces.append(piece)
        time.sleep(0.0005)
    connection.close()
    assert joined(sse(b"".join(pieces)), "content") == safe_text
    safe.wait_until_idle()


def test_a_request_out_of_time():
    with running(engine_class=GatedEngine, limits={"request_s": 0.5, "keep_alive_s": 0.05}) as server:
        server.engine.steps_left = 0
        status, found = server.post(CHAT, {"messages": QUESTION})
        assert (status, found["error"]["code"]) == (504, "timeout")
        metrics = server.server.metrics
        assert metrics.responses == {("chat", 504): 1} and metrics.disconnects == 0
        _, reply = server.begin()
        last = [part for part in reply.read().decode().split("\n\n") if part.startswith("data: ")][-1]
        assert json.loads(last[6:])["error"]["code"] == "timeout"
        server.engine.steps_left = None
        server.wait_until_idle()


# ---- faults of the engine


class StuckEngine(GatedEngine):
    """Its step goes on until `free` is set."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.free = threading.Event()

    def step(self):
        self.free.wait(30)
        return super().step()


def test_a_step_that_does_not_end_is_told():
    with running(engine_class=StuckEngine, limits={"request_s": 0.5, "stall_s": 3}) as server:
        begin = time.monotonic()
        for _ in range(2):  # the second one before the engine has so much as looked at it
            status, found = server.post(CHAT, {"messages": QUESTION})
            assert (status, found["error"]["code"]) == (504, "timeout")
        assert time.monotonic() - begin < 10 and server.loop.num_open == 0
        wait_for(lambda: server.get("/health") == (503, {"status": "stalled", "open": 0}))
        status, found = server.post(CHAT, {"messages": QUESTION})
        assert (status, found["error"]["code"]) == (503, "engine_stalled")
        assert b"mote_up 0" in server.call("GET", "/metrics")[2]
        server.engine.free.set()
        wait_for(lambda: server.get("/health")[0] == 200)
        server.server.limits = Limits()  # on a busy machine an answer takes longer than half a second
        assert server.chat(path="answer")["usage"]


def test_a_client_that_leaves_before_it_is_taken_on_keeps_no_place():
    with running(engine_class=StuckEngine) as server:
        connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(2)]
        for connection in connections:
            connection.request("POST", CHAT, json.dumps({"messages": QUESTION}))
        wait_for(lambda: server.loop.num_open == 2)
        for connection in connections:
            connection.close()
        wait_for(lambda: server.server.metrics.disconnects == 2)
        assert server.loop.num_open == 0
        server.engine.free.set()
        server.wait_until_idle()


def test_an_exception_in_the_engines_thread_fails_all_and_hangs_nobody():
    openai = pytest.importorskip("openai")
    with running(engine_class=GatedEngine) as server:
        server.engine.steps_left = 1
        connection, reply = server.begin(max_tokens=400, path="full")
        wait_for(lambda: server.engine.steps_left == 0)
        server.engine.failure = RuntimeError("a bolt of lightning")
        events = reply.read().decode()
        connection.close()
        assert "engine_stopped" in events and "lightning" not in events and "[DONE]" not in events
        assert server.get("/health") == (503, {"status": "stopped", "open": 0})
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            client(server).chat.completions.create(model="tiny", messages=QUESTION)
        assert b"mote_up 0" in server.call("GET", "/metrics")[2]
        assert server.get("/state")[1]["healthy"] is False


def test_a_request_that_fails_fails_alone():
    with running(engine_class=GatedEngine) as server:
        good = {"path": "full", "temperature": 1.0, "seed": 9, "max_tokens": 80}
        reference = server.chat(**good)["choices"][0]["message"]
        server.engine.steps_left = 0
        connection, reply = server.begin(**good)
        bad_connection, bad = server.begin(path="answer", n=1, max_tokens=300)
        wait_for(lambda: len(server.engine._samples) == 2)
        broken = list(server.engine._samples.values())[-1]
        broken.take = lambda *_: 1 / 0
        server.engine.steps_left = None
        assert joined(sse(reply.read()), "content") == reference["content"]
        failed = bad.read().decode()
        assert "request_failed" in failed and "[DONE]" not in failed
        connection.close(), bad_connection.close()
        server.wait_until_idle()
        assert server.get("/health")[0] == 200


# ---- the end


def test_draining_finishes_what_runs_and_takes_nothing_on():
    with running(engine_class=GatedEngine) as server:
        server.engine.steps_left = 1
        connection, reply = server.begin(max_tokens=80, path="full", temperature=0)
        wait_for(lambda: server.engine.steps_left == 0)
        server.loop._asyncio.call_soon_threadsafe(server.uvicorn.begin_to_drain)
        wait_for(lambda: server.loop.is_draining)
        status, headers, _ = server.call("POST", CHAT, {"messages": QUESTION})
        assert (status, headers["retry-after"]) == (503, "5")
        assert server.get("/health") == (503, {"status": "draining", "open": 1})
        server.engine.steps_left = None
        assert joined(sse(reply.read()), "content")
        connection.close()
        wait_for(lambda: server.uvicorn.should_exit)


def test_draining_does_not_wait_for_ever():
    with running(engine_class=GatedEngine, drain_s=0.3) as server:
        server.engine.steps_left = 0
        _, reply = server.begin()
        server.loop._asyncio.call_soon_threadsafe(server.uvicorn.begin_to_drain)
        assert '"code":"stopping"' in reply.read().decode()
        wait_for(lambda: server.uvicorn.should_exit)
