"""mote serve and mote bench serve as commands: what they refuse, the first screen, SIGTERM, a small soak, numbers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from servers import QUESTION, joined, make_model, running, sse, tokenizer, wait_for
from soak_server import served, soak

import mote_ext.serving
from mote_ext.cli import main
from mote_ext.serving.load import Client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder `mote serve` can load."""
    made = tmp_path_factory.mktemp("served") / "my-model"
    make_model(check_threshold=0.0).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def mote(capsys, monkeypatch):
    """Runs a command line in process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("MOTE_API_KEY", raising=False)

    def run(*argv):
        capsys.readouterr()
        return main([str(item) for item in argv]), *capsys.readouterr()

    return run


# ---- mote serve


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file or MOTE_API_KEY, or say --no-auth"),
        (["--host", "256.0.0.1", "--no-auth"], "cannot listen at 256.0.0.1"),
        (["--port", "70000"], "a port from 0 to 65535 expected"),
        (["--allow-paths", "shortcut"], "--allow-paths: answer, analysis, full, adaptive, escalate"),
        (["--allow-paths", "full", "--default-path", "answer"], "--default-path: one of the allowed paths"),
        (["--min-check", "flag", "--allow-paths", "none"], "no stages and so no check"),
        (["--request-timeout", "0"], "a number of seconds above 0"),
        (["--max-tokens", "4"], "max_new_tokens must be at least"),
        (["--base"], "holds a MoTE model already"),
        (["--api-key-file", "no-such-file"], "no-such-file"),
        (["--api-key-file", "/dev/null"], "--api-key-file /dev/null holds no key"),
        (["--allow-host", "chat.example.org:443"], "a name without scheme or port"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(mote, folder, options, fragment):
    port = [] if "--port" in options else ["--port", "0"]
    code, out, err = mote("serve", folder, *port, *options)
    assert code == 2 and out == "" and fragment in err
    assert err.strip().splitlines()[-1].startswith("mote: ")


def test_a_port_that_is_taken(mote, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = mote("serve", folder, "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen at 127.0.0.1 port" in err


def test_missing_packages_are_named(mote, folder, monkeypatch):
    monkeypatch.setattr(mote_ext.serving, "find_spec", lambda name: None)
    code, _, err = mote("serve", folder)
    assert code == 2 and "pip install 'mote_ext[serve]'" in err


def test_the_package_and_the_help_need_no_server_packages():
    code = (
        "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None\n"
        "sys.orig_argv.append('mote_ext.cli')\n"  # the package's own __init__ stands aside
        "import mote_ext.serving, mote_ext.cli\n"
        "sys.exit(mote_ext.cli.main(['serve', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout


def test_sigterm_lets_what_runs_finish(folder):
    with served(folder, "--max-tokens", "1500", "--drain-timeout", "60") as (port, process):
        screen = "".join(process.stdout.readline() for _ in range(14))
        assert "analysis → guidance → response → check" in screen and "adaptive (default)" in screen
        assert "once the check says safe" in screen and "none: whoever reaches the address may ask" in screen
        assert re.search(r"\d+ pages of 16 tokens", screen) and f"curl http://127.0.0.1:{port}/v1/chat" in screen
        client = Client(f"http://127.0.0.1:{port}")
        connection = client._connect()
        body = {"messages": QUESTION, "stream": True, "max_tokens": 1200, "path": "answer", "temperature": 1.0}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        first = reply.readline()
        process.send_signal(signal.SIGTERM)

        def is_draining():
            try:
                client.get("/health")
            except ConnectionError as error:
                return "503" in str(error)

        wait_for(is_draining)
        assert client.ask({**body, "path": "answer"}).error == "HTTP 503"
        assert joined(sse(first + reply.read()), "content")
        connection.close()
        assert process.wait(30) == 0


STUCK = """
import sys, threading
import servers
from mote_ext.serving import run

server = servers.make_server()
stuck = threading.Event()

def step():
    stuck.set()
    threading.Event().wait()

server.loop.engine.step = step
bound = run.listen("127.0.0.1", 0)

def say():
    stuck.wait()
    print("stuck", flush=True)

threading.Thread(target=say, daemon=True).start()
run.run(server, bound, drain_s=float(sys.argv[1]), on_start=lambda: print(bound.getsockname()[1], flush=True))
"""


@pytest.mark.parametrize(("drain_s", "second"), [(0.2, None), (60, signal.SIGTERM), (60, signal.SIGINT)])
def test_a_step_that_never_ends_holds_up_no_end(drain_s, second):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", STUCK, str(drain_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        try:
            client = Client(f"http://127.0.0.1:{int(process.stdout.readline())}")
            asking = threading.Thread(
                target=client.ask, args=({"messages": QUESTION, "stream": True, "path": "answer"},)
            )
            asking.start()
            assert process.stdout.readline() == "stuck\n"
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            if second is not None:
                time.sleep(0.5)
                process.send_signal(second)
            assert process.wait(25) == 1
            assert time.monotonic() - begin < (15 if second is None else 5)
            asking.join()
        finally:
            process.kill()


def test_a_small_soak_loses_nothing(folder):
    result = soak(folder, 100, concurrency=12, seconds=120)
    assert result["requests"] == 100 and result["wrong"] == []
    assert result["lost"] == result["failed"] == result["changed"] == result["exit code"] == 0
    assert result["malformed"] > 0 and result["cancelled"] > 0 and result["pages came back"]


# ---- mote bench serve


def test_bench_measures_a_server(mote, tmp_path):
    with running(make_model(check_threshold=0.0)) as server:
        file = tmp_path / "numbers.json"
        code, out, err = mote("bench", "serve", server.url, "--requests", 10, "--max-tokens", 48, "--json", file)
        assert code == 0, err
        numbers = json.loads(file.read_text())
        assert (numbers["requests"], numbers["failed"]) == (10, 0)
        assert sum(numbers["paths"].values()) == 10 and len(numbers["paths"]) > 1
        times = [numbers[name]["p50"] for name in ("time_to_first_token", "time_to_first_answer_token", "request_time")]
        assert 0 < times[0] <= times[1] <= times[2]
        assert numbers["generated_tokens_per_second"] > 0 and 0 < numbers["hit_rate"] < 1
        assert re.search(r"time per output token\s+[\d.]+\s+[\d.]+\s+[\d.]+", out) and "preemptions" in out


def test_bench_starts_and_ends_its_own_server(mote, folder):
    command = ["bench", "serve", "--model", folder, "--requests", 6, "--max-tokens", 40, "--paths", "answer,full"]
    code, out, err = mote(*command, "--check", "flag", "--json", "-")
    assert code == 0, err
    numbers = json.loads(out)
    assert numbers["failed"] == 0 and set(numbers["paths"]) <= {"answer", "full"}
    with pytest.raises(ConnectionError):
        Client(numbers["url"]).get("/health")


def test_bench_is_bounded_in_time_and_says_what_failed(mote):
    with running() as server:
        code, out, _ = mote("bench", "serve", server.url, "--requests", 100_000, "--seconds", 1, "--json", "-")
        numbers = json.loads(out)
        assert code == 0 and 0 < numbers["requests"] < 100_000 and numbers["seconds"] < 30
        assert mote("bench", "serve", server.url, "--paths", "shortcut")[0] == 2
    code, _, err = mote("bench", "serve", "http://127.0.0.1:9")
    assert code == 2 and "cannot be reached" in err
    assert mote("bench", "serve", "http://127.0.0.1:9", "--model", "x")[0] == 2
    assert mote("bench", "serve", "not-an-address")[0] == 2


def test_bench_without_a_single_answer_is_an_error(mote):
    with running(limits={"max_open": 0}) as server:
        code, out, err = mote("bench", "serve", server.url, "--requests", 3)
    assert code == 2 and "HTTP 429" in err and "3 failed" in out


def test_threads_of_a_stopped_server_are_gone():
    with running() as server:
        server.chat(path="answer")
        assert any(thread.name == "mote-engine" for thread in threading.enumerate())
        ours = server.loop._thread
    assert not ours.is_alive()
