"""mote serve: a model behind OpenAI's HTTP interface, with a page to try it on. Options become Policy and Limits."""

from __future__ import annotations

import argparse
import ipaddress
import json
import shlex
import sys
from typing import TYPE_CHECKING

from mote_ext.cli import folder as folders
from mote_ext.cli import options
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen

if TYPE_CHECKING:
    from mote_ext.serving.app import Server
    from mote_ext.serving.policy import Policy

SUMMARY = "answer many requests at once, behind OpenAI's HTTP interface"
USAGE = "mote serve MODEL [options]"
EXAMPLES = """\
mote serve my-model                                       then open http://127.0.0.1:8000
mote serve my-model --min-check enforce                   no unsafe answer leaves this server
mote serve my-model --allow-paths full,escalate --default-path full
mote serve my-model --show-reasoning always --port 9000 --pages 4096
mote serve my-model --host 0.0.0.0 --api-key-file keys.txt --allow-host chat.example.org
MOTE_API_KEY=a-long-secret mote serve my-model
mote serve --base path/of/a/plain/model                   untrained experts, to see the stages at work

Clients: base_url http://127.0.0.1:8000/v1, any API key where the server has none. Their bodies may also hold "path",
"check" and "stage_max_tokens" (OpenAI's Python client: extra_body={"path": "full"}). The first SIGTERM or Ctrl-C lets
what runs finish, the second stops at once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote serve."""
    parser.add_argument("model", metavar="MODEL", help="a MoTE folder, full or with the experts alone, or a hub's name")
    parser.add_argument("--base", action="store_true", help="MODEL is a plain checkpoint: put untrained experts on it")
    parser.add_argument("--name", metavar="NAME", help="of the model, as clients ask for it (default: its folder's)")
    _add_policy_options(parser.add_argument_group("policy: what a client may ask for"))
    _add_network_options(parser.add_argument_group("network"))
    _add_limit_options(parser.add_argument_group("limits"))
    running = parser.add_argument_group("engine")
    running.add_argument("--pages", type=options.count, metavar="N", help="of the cache (default: what memory allows)")
    running.add_argument(
        "--page-size", type=options.count, default=16, metavar="N", help="tokens (default %(default)s)"
    )
    running.add_argument(
        "--max-batch-tokens", type=options.count, default=512, metavar="N", help="of a forward (default %(default)s)"
    )
    running.add_argument("--dtype", choices=folders.DTYPES, default="auto", help="of the base (default: its own)")
    running.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    running.add_argument("--color", choices=COLOR_MODES, default="auto", help="default %(default)s")


def _add_policy_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allow-paths",
        type=_names,
        metavar="PATH,…",
        help="answer, analysis, full, adaptive, escalate (default: all the model has), stages joined by +, or none (no "
        "stage rules)",
    )
    group.add_argument("--default-path", metavar="PATH", help="of a request that names none (default adaptive)")
    group.add_argument(
        "--min-check",
        choices=("none", "flag", "enforce"),
        default="none",
        help="every answer is judged at least so: flag reports the verdict; enforce sends nothing before it, and a "
        "refusal in an unsafe answer's place (default %(default)s)",
    )
    group.add_argument(
        "--show-reasoning",
        choices=("always", "safe", "never"),
        default="safe",
        help="safe (default): the stages before the answer are sent once its check says safe, and never without one; "
        "always: as they come, unless the check is enforced",
    )
    group.add_argument(
        "--min-stage-tokens",
        type=options.count,
        default=16,
        metavar="N",
        help="fewest tokens a client may leave a stage of reasoning that its path forces on it (default %(default)s)",
    )


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (default %(default)s)")
    group.add_argument("--port", type=_port, default=8000, metavar="N", help="0: a free one (default %(default)s)")
    group.add_argument(
        "--api-key-file", metavar="FILE", help="keys that may ask, one a line; MOTE_API_KEY is another such key"
    )
    group.add_argument("--no-auth", action="store_true", help="listen beyond this machine without a key all the same")
    group.add_argument(
        "--allow-host",
        action="append",
        type=_host_name,
        default=[],
        metavar="NAME",
        help="a name this server is reached by, as a proxy's",
    )


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-tokens", type=options.count, default=2048, metavar="N", help="of one answer (%(default)s)"
    )
    group.add_argument(
        "--max-running", type=options.count, default=64, metavar="N", help="samples at once (%(default)s)"
    )
    group.add_argument(
        "--max-queue", type=options.count, default=256, metavar="N", help="requests that wait before 429 (%(default)s)"
    )
    group.add_argument(
        "--max-body-kb", type=options.count, default=1024, metavar="N", help="KiB of a request (%(default)s)"
    )
    group.add_argument(
        "--request-timeout", type=_seconds, default=600.0, metavar="S", help="seconds of a request (%(default)g)"
    )
    group.add_argument(
        "--drain-timeout", type=_seconds, default=30.0, metavar="S", help="seconds to finish at the end (%(default)g)"
    )


def run(args: argparse.Namespace) -> None:
    """Serves until a signal."""
    from mote_ext.serving import require_packages

    require_packages()
    from mote_ext.serving import run as running
    from mote_ext.serving.guard import Keys

    keys = Keys.read(args.api_key_file)
    notices = Screen(sys.stderr, args.color)
    if not _is_loopback(args.host):
        _require_keys(args, keys, notices)
    bound = _listen(args)
    server = _load(args, keys, notices)
    address = _address(*bound.getsockname()[:2])
    screen = Screen(sys.stdout, args.color)
    running.run(server, bound, drain_s=args.drain_timeout, on_start=lambda: _show(screen, args, server, address))
    notices.line("stopped", "dim")


def _require_keys(args: argparse.Namespace, keys, notices: Screen) -> None:
    if not keys and not args.no_auth:
        raise CommandError(
            f"--host {args.host} can be reached from other machines: give --api-key-file or MOTE_API_KEY, or say "
            "--no-auth if whoever reaches it may ask"
        )
    who = "whoever has a key" if keys else "WHOEVER REACHES IT"
    notices.line(
        f"warning: listening at {args.host}, beyond this machine: {who} may ask, and what is asked and answered goes "
        "unencrypted; put a proxy with TLS before it",
        "bold",
        "red",
    )


def _listen(args: argparse.Namespace):
    """The socket, before the model is loaded: a port that is taken is known at once."""
    from mote_ext.serving import run as running

    try:
        return running.listen(args.host, args.port)
    except OSError as error:
        raise CommandError(f"cannot listen at {args.host} port {args.port}: {error.strerror or error}") from error


def _load(args: argparse.Namespace, keys, notices: Screen) -> Server:
    """Model, engine and policy; what can be refused is refused before the weights are read."""
    folder = folders.find_folder(args.model)
    model_type = folders.read_model_type(folder)
    if args.base and model_type == "mote":
        raise CommandError(f"{folder} holds a MoTE model already; leave --base out")
    config = None if args.base else folders.read_config(folder)
    if config is not None:
        folders.require_base(folder, config)
        _policy(args, config)
    tokenizer = folders.load_tokenizer(folder, config)
    loading = {"dtype": args.dtype, "device": args.device}
    if args.base:
        model = folders.load_model(folder, **loading, tokenizer=tokenizer)
        notices.line(f"untrained experts on {folder}: stages mean nothing to it yet", "dim")
    else:
        model = folders.load_model(folder, **loading)
    from mote_ext.engine import MoTEEngine
    from mote_ext.serving.app import Limits, Server

    engine = MoTEEngine(
        model,
        tokenizer,
        num_pages=args.pages,
        page_size=args.page_size,
        max_batch_tokens=args.max_batch_tokens,
        max_running=args.max_running,
        max_waiting=args.max_queue,
    )
    limits = Limits(
        body_bytes=args.max_body_kb * 1024,
        request_s=args.request_timeout,
        max_open=args.max_running + args.max_queue,
    )
    policy = _policy(args, model.routing.config)
    name = args.name or folder.resolve().name
    return Server(engine, tokenizer, policy, model=name, keys=keys, limits=limits, hosts=[args.host, *args.allow_host])


def _policy(args: argparse.Namespace, config) -> Policy:
    from mote_ext.serving.policy import Policy

    if config.marker_ids is None:
        raise CommandError("this model has no markers, so it cannot be asked to answer in stages")
    return Policy.of(
        config,
        allow_paths=args.allow_paths,
        default_path=args.default_path,
        min_check=args.min_check,
        show_reasoning=args.show_reasoning,
        max_tokens=args.max_tokens,
        min_stage_tokens=args.min_stage_tokens,
    )


def _show(screen: Screen, args: argparse.Namespace, server: Server, address: str) -> None:
    """The first screen. Its first line is read by `mote bench serve --model`."""
    policy, stats = server.policy, server.loop.stats
    pages = stats["pages_total"]
    model = server.loop.engine.model
    paths = [f"{name} (default)" if name == policy.default_path else name for name in policy.routes]
    least = "not required" if policy.min_check == "none" else f"{policy.min_check} at least"
    shown = {"always": "as it comes", "safe": "once the check says safe; never without a check", "never": "never"}
    rows = [
        (
            "model",
            f"{server.model}: {' → '.join(policy.stages)}; {str(model.dtype).removeprefix('torch.')} on {model.device}",
        ),
        ("paths", ", ".join(paths)),
        ("check", f"{least}; clients may ask for {', '.join(policy.checks)}"),
        ("reasoning", f"sent {shown[policy.show_reasoning]}"),
        ("cache", f"{pages:,} pages of {args.page_size} tokens = {pages * args.page_size:,} tokens"),
        ("at once", f"{args.max_running} samples, {args.max_queue} requests waiting"),
        ("keys", f"{len(server.keys)}" if server.keys else "none: whoever reaches the address may ask"),
    ]
    screen.line(f"{server.model} is served at {address}", "bold")
    screen.line("the same address in a browser is a page to try it on, /metrics is for Prometheus", "dim")
    screen.line()
    for name, value in rows:
        screen.line(f"{name:<10} {value}")
    screen.line()
    screen.line(curl(address, server.model, policy, bool(server.keys)))
    screen.line()
    screen.line("Ctrl-C lets what runs finish, and stops", "dim")


def curl(address: str, model: str, policy: Policy, has_keys: bool) -> str:
    """A command to paste into a shell."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "How do plants drink?"}],
        "path": policy.default_path,
        "check": policy.checks[min(1, len(policy.checks) - 1)],
        "max_tokens": policy.default_tokens,
    }
    key = ' -H "Authorization: Bearer $MOTE_API_KEY"' if has_keys else ""
    return (
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
    )


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _host_name(text: str) -> str:
    if not text or any(sign in text for sign in ":/ "):
        raise argparse.ArgumentTypeError(f"a name without scheme or port expected, got {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port from 0 to 65535 expected, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 expected, got {text!r}")
    return value
