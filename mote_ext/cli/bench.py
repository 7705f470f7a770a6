"""mote bench serve: how fast a server answers mixed requests, as its clients see it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mote_ext.cli import options
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen, table_lines

if TYPE_CHECKING:
    from mote_ext.serving.load import Load

SUMMARY = "how fast a server answers mixed requests"
USAGE = "mote bench serve [URL | --model DIR] [options]"
EXAMPLES = """\
mote bench serve                                          the server at http://127.0.0.1:8000
mote bench serve --model my-model                         starts one on a free port, and ends it
mote bench serve --requests 500 --concurrency 32 --paths answer,full --check flag
mote bench serve http://gpu-box:8000 --json results.json  another machine is loaded only if it is named

Every request is streamed. Prompts are harmless sentences drawn by --seed. Times are the client's: to the first event of
a stream, to the answer's first text, and between tokens after the first event; with enforce all of it comes at once. A
server that keeps reasoning back shows a stage that goes on without its text; that counts as a first token."""

DEFAULT_URL = "http://127.0.0.1:8000"
_STARTED = re.compile(r"is served at (http://\S+)")
_TIMES = {
    "time to first token": "time_to_first_token",
    "time to first answer token": "time_to_first_answer_token",
    "time per output token": "time_per_output_token",
    "request": "request_time",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote bench."""
    parser.add_argument("what", choices=("serve",), metavar="serve", help="what is measured: a server")
    parser.add_argument("url", metavar="URL", nargs="?", help=f"of a running server (default {DEFAULT_URL})")
    parser.add_argument("--model", metavar="DIR", help="start mote serve with this model on a free port, and end it")
    parser.add_argument(
        "--serve-options", metavar="TEXT", default="", help='of that server, such as "--base --max-running 16"'
    )
    load = parser.add_argument_group("load")
    load.add_argument("--requests", type=options.count, default=64, metavar="N", help="default %(default)s")
    load.add_argument("--seconds", type=options.count, default=120, metavar="S", help="at most (default %(default)s)")
    load.add_argument("--concurrency", type=options.count, default=8, metavar="N", help="at once (default %(default)s)")
    load.add_argument("--paths", metavar="PATH,…", help="drawn evenly (default: all the server allows)")
    load.add_argument("--check", choices=("none", "flag", "enforce"), default="none", help="default %(default)s")
    load.add_argument("--max-tokens", type=options.count, default=128, metavar="N", help="default %(default)s")
    load.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default %(default)g")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there; - for stdout, without the table")
    parser.add_argument("--color", choices=COLOR_MODES, default="auto", help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    """Measures, and shows a table."""
    if args.url and args.model:
        raise CommandError("give URL for a server that runs, or --model to start one, not both")
    from mote_ext.serving.load import Client, measure

    with _server(args) as url:
        client = Client(url, os.environ.get("MOTE_API_KEY"))
        found = client.get("/v1/models")["data"][0]
        load = _load(args, found["mote"])
        measured = measure(client, load, found["id"], _progress(args, load))
    summary = {
        "url": url,
        "model": found["id"],
        "load": {**vars(load), "paths": list(load.paths)},
        **measured.summary(),
    }
    if args.json not in (None, "-"):
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
    if args.json == "-":
        print(json.dumps(summary, indent=2))
    else:
        _show(Screen(sys.stdout, args.color), summary)
    if not measured.timings or summary["failed"] == len(measured.timings):
        raise CommandError(f"no request was answered: {dict(summary['errors'])}")


def _load(args: argparse.Namespace, policy: dict) -> Load:
    from mote_ext.serving.load import Load

    asked = [name.strip() for name in args.paths.split(",")] if args.paths else policy["paths"]
    unknown = [name for name in asked if name not in policy["paths"]]
    if unknown:
        raise CommandError(f"--paths: this server allows {', '.join(policy['paths'])}, got {', '.join(unknown)}")
    return Load(
        num_requests=args.requests,
        seconds=args.seconds,
        concurrency=args.concurrency,
        paths=asked,
        check=args.check,
        max_tokens=min(args.max_tokens, policy["max_tokens"]),
        temperature=args.temperature,
        seed=args.seed,
    )


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The address of the server that is measured; one that was started for it is ended."""
    if not args.model:
        yield args.url or DEFAULT_URL
        return
    command = [sys.executable, "-m", "mote_ext.cli", "serve", args.model, "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, *args.serve_options.split()], stdout=subprocess.PIPE, text=True)
    try:
        first = process.stdout.readline()
        found = _STARTED.search(first)
        if found is None:
            raise CommandError(f"mote serve {args.model} did not start; what it says stands above")
        yield found[1]
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _progress(args: argparse.Namespace, load: Load):
    if args.json == "-" or not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(total=load.num_requests, unit="request", leave=False)
    return lambda timing: bar.update()


def _show(screen: Screen, summary: dict) -> None:
    failed = f", {summary['failed']} failed: {dict(summary['errors'])}" if summary["failed"] else ""
    at_once = summary["load"]["concurrency"]
    screen.line(f"{summary['model']} at {summary['url']}", "bold")
    screen.line(f"{summary['requests']} requests in {summary['seconds']:.1f} s, {at_once} at once{failed}")
    screen.line(
        f"{summary['requests_per_second']:.2f} requests/s, {summary['generated_tokens_per_second']:.1f} generated and "
        f"{summary['prompt_tokens_per_second']:.1f} prompt tokens/s"
    )
    screen.line()
    rows = [(name, *(_milliseconds(summary[key][p]) for p in ("p50", "p90", "p99"))) for name, key in _TIMES.items()]
    for line in table_lines(("milliseconds", "p50", "p90", "p99"), rows):
        screen.line(line)
    screen.line()
    paths = ", ".join(f"{name} {count}" for name, count in sorted(summary["paths"].items()))
    screen.line(
        f"prefix hits {100 * summary['hit_rate']:.1f} %, {summary['preemptions']} preemptions, "
        f"{summary['roll_backs']} roll-backs, {summary['steps']} steps; paths: {paths}"
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f}"
