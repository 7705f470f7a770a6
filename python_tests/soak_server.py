"""A soak of `mote serve`: thousands of mixed requests to a real process on loopback, some cancelled, some malformed.

    python python_tests/soak_server.py --requests 2000

Counts what was lost (no end came), failed (another status than it must be) or changed (the same greedy request answered
otherwise), and the process's memory at a quarter of the requests and at the end. Bounded in number and time. Everything
is drawn by keys, so a run can be repeated. Exit code 1: something was lost, failed or changed, or a page stayed out.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mote_ext import keyed
from mote_ext.serving.load import Load

MALFORMED = [
    b"", b"{", b"[]", b"\xff\xfe", b'{"messages": 5}', b'{"messages": []}', b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"[" * 5000,
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "path": "full", "check": "flag"}',
    b'{"messages": [{"role": "user", "content": "a"}], "stage_max_tokens": {"wisdom": 3}}',
]  # fmt: skip
PATHS = ("answer", "analysis", "full", "adaptive", "escalate")
CHECKS = ("none", "none", "flag", "enforce")


class Soak:
    """Sends request after request and keeps count."""

    def __init__(self, port, pid, num_requests, seed):
        self.port, self.pid, self.num_requests, self.seed = port, pid, num_requests, seed
        self.counts, self.memory, self.answers, self.wrong = Counter(), {}, {}, []
        self._lock = threading.Lock()

    def run(self, concurrency, seconds):
        end = time.monotonic() + seconds
        numbers = iter(range(self.num_requests))

        def work():
            while time.monotonic() < end:
                with self._lock:
                    number = next(numbers, None)
                    if number in (self.num_requests // 4, self.num_requests // 2):
                        self.memory[number] = resident(self.pid)
                if number is None:
                    return
                kind, note = self.one(number)
                with self._lock:
                    self.counts[kind] += 1
                    if kind in ("lost", "failed", "changed"):
                        self.wrong.append((number, kind, note))

        with ThreadPoolExecutor(concurrency) as pool:
            for worker in [pool.submit(work) for _ in range(concurrency)]:
                worker.result()
        self.memory[sum(self.counts.values())] = resident(self.pid)

    def one(self, number):
        """(what became of it, a note) of request `number`."""
        draw = keyed.uniform("soak", self.seed, number)
        if draw < 0.05:
            status, _ = self.send(MALFORMED[number % len(MALFORMED)])
            return ("malformed", "") if status == 400 else ("failed", f"HTTP {status} for a malformed body")
        body = self.body(number)
        data = json.dumps(body).encode()
        try:
            if draw < 0.15:
                return self.leave(data, after=keyed.integer(30, "leave", self.seed, number)), ""
            status, reply = self.send(data)
            for _ in range(100):
                if status != 429:
                    break
                with self._lock:
                    self.counts["asked again after 429"] += 1
                time.sleep(0.1)
                status, reply = self.send(data)
        except (OSError, http.client.HTTPException) as error:
            return "lost", type(error).__name__
        if status != 200:
            return "failed", f"HTTP {status}: {reply[:200]!r}"
        return self.judged(body, reply)

    def body(self, number):
        """Of few different questions, so that greedy ones come up again, with other requests around them."""
        key = ("soak body", self.seed, number)
        again = keyed.integer(60, *key, "question")
        body = Load(paths=PATHS, max_tokens=96, seed=self.seed).body(again, "tiny")
        body["check"] = CHECKS[keyed.integer(len(CHECKS), self.seed, again, "check")]
        if keyed.uniform(*key, "greedy") < 0.5:
            body["temperature"] = 1.0
            body["seed"] = keyed.integer(2**31, *key, "draws")
            body["n"] = 1 + keyed.integer(3, *key, "n")
            if keyed.uniform(*key, "stop") < 0.3:
                body["stop"] = ["e", "zz"]
            body["logprobs"] = keyed.uniform(*key, "logprobs") < 0.2
        if keyed.uniform(*key, "stream") < 0.5:
            del body["stream"], body["stream_options"]
        return body

    def judged(self, body, reply):
        try:
            answers = streamed(reply) if body.get("stream") else whole(reply)
        except (ValueError, KeyError, AssertionError) as error:
            return "lost", f"{type(error).__name__}: {error}"
        if len(answers) != body.get("n", 1):
            return "lost", f"{len(answers)} samples of {body.get('n', 1)}"
        if body["temperature"] == 0:
            key = json.dumps({name: value for name, value in body.items() if not name.startswith("stream")})
            with self._lock:
                first = self.answers.setdefault(key, answers)
            if first != answers:
                return "changed", f"{first} and then {answers}"
        return "answered", ""

    def send(self, data):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def leave(self, data, after):
        """Closes the connection after so many lines of the reply, or before it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
            if after > 3 and b'"stream": true' in data:
                reply = connection.getresponse()
                for _ in range(after):
                    reply.readline()
            else:
                time.sleep(after * 0.01)
        finally:
            connection.close()
        return "cancelled"

    def settled(self, seconds=60.0):
        """The scheduler's counts once nothing is open any more; None: it never came to that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            connection.request("GET", "/state")
            state = json.loads(connection.getresponse().read())
            connection.close()
            stats = state["stats"]
            if state["open"] == 0 and stats["num_running"] == stats["num_waiting"] == stats["pages_used"] == 0:
                return stats
            time.sleep(0.1)
        return None


def streamed(reply):
    """[(content, finish reason)] of a stream. AssertionError: it has no end."""
    events = [part for part in reply.decode().split("\n\n") if part.startswith("data: ")]
    assert events and events[-1] == "data: [DONE]", f"the stream ended with {events[-1:]}"
    texts, reasons = {}, {}
    for event in events[:-1]:
        for choice in json.loads(event[6:])["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    return [(texts[i], reasons[i]) for i in sorted(texts)]


def whole(reply):
    choices = json.loads(reply)["choices"]
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]


def resident(pid):
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@contextmanager
def served(folder, *options):
    """(port, process) of a `mote serve` with this model folder."""
    command = [sys.executable, "-m", "mote_ext.cli", "serve", str(folder), "--port", "0", "--name", "tiny", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert address, "mote serve did not start"
        yield int(address[1]), process
    finally:
        process.terminate()
        process.wait(60)


def soak(folder, num_requests, *, concurrency=16, seconds=1800.0, seed=0, options=()):
    """Runs it: what came of it, as a dictionary. The server keeps few pages, so that requests are preempted."""
    with served(folder, "--pages", "64", "--max-running", "16", "--max-queue", "32", *options) as (port, process):
        running = Soak(port, process.pid, num_requests, seed)
        begin = time.monotonic()
        running.run(concurrency, seconds)
        stats = running.settled()
        result = {
            "requests": sum(n for kind, n in running.counts.items() if not kind.startswith("asked")),
            **{
                kind: running.counts[kind]
                for kind in ("answered", "malformed", "cancelled", "lost", "failed", "changed")
            },
            "asked again after 429": running.counts["asked again after 429"],
            "seconds": round(time.monotonic() - begin, 1),
            "MiB after requests": {number: round(size, 1) for number, size in running.memory.items()},
            "MiB when settled": round(resident(process.pid), 1),
            "pages came back": stats is not None,
            "stats": stats and {name: stats[name] for name in ("preemptions", "rolled_back", "cancelled", "evictions")},
            "wrong": running.wrong[:10],
        }
    result["exit code"] = process.returncode
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1800.0, help="at most")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import servers

    with tempfile.TemporaryDirectory() as folder:
        servers.make_model().save_pretrained(folder)
        servers.tokenizer().save_pretrained(folder)
        result = soak(folder, args.requests, concurrency=args.concurrency, seconds=args.seconds, seed=args.seed)
    print(json.dumps(result, indent=2))
    good = result["lost"] == result["failed"] == result["changed"] == result["exit code"] == 0
    sys.exit(0 if good and result["pages came back"] else 1)


if __name__ == "__main__":
    main()
