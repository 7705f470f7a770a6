"""mote chains: from prompts to chains a model wrote and checked itself. Measures the checker first."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mote_ext.cli import folder as folders
from mote_ext.cli import options
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen

if TYPE_CHECKING:
    from mote_ext.chains import Checker, Prompt, Settings, Summary
    from mote_ext.chains.group import GroupBuilder, GroupResult
    from mote_ext.judges import LabelledReply
    from mote_ext.stages import StageTable

SUMMARY = "build training chains: the model analyses, plans, answers and is checked, the answer first"
USAGE = "mote chains MODEL PROMPTS [PROMPTS …] --out FILE [options]"
EXAMPLES = """\
mote chains base prompts.jsonl --out chains.jsonl --checker refusal
    lines {"prompt": …, "label": "harmful" or "benign"}; killed or stopped, the same command goes on
mote chains base suite:advbench:80 suite:benign-edgy --out chains.jsonl --checker refusal --exemplars safety
    prompts out of installed packages; our examples stand before the requests for analysis and guidance
mote chains base prompts.csv --out chains.jsonl --checker openai:http://localhost:8000/v1#llama-guard
    another model judges; its key, if it wants one, is read from OPENAI_API_KEY
mote chains base hf:owner/name:train --out chains.jsonl --templates my-templates --limit 1000
    my-templates/analysis.txt, guidance.txt, response.txt or check.txt stand in for the package's
mote chains base prompts.jsonl --out chains.jsonl --checker self --force --ray 8
    the paper's way, the model as its own checker, whatever it is worth; eight models on a Ray cluster"""

CHECKERS = """\
who judges answers: self (the model, asked), model:FOLDER (another model), refusal (by the prompts' labels: a refusal
of a harmful one is safe, of a benign one it is not), openai:URL#MODEL (a server). Default %(default)s"""
START = """\
stages of reasoning before the first answer: answer (none, the default), the last one's name, or full (all of them, of
whichever table the model has); for one label, LABEL=WAY, as in benign=full,harmful=answer"""
SHIPPED_EXEMPLARS = ("safety",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote chains."""
    parser.add_argument("model", metavar="MODEL", help="folder of any causal language model, or a hub's name")
    parser.add_argument(
        "prompts", metavar="PROMPTS", nargs="+", help="a .jsonl or .csv file, suite:NAME[:N] or hf:DATASET[:SPLIT]"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the chains, one JSON object a line")
    parser.add_argument("--limit", type=options.count, metavar="N", help="the first N prompts alone")

    checking = parser.add_argument_group("checking")
    checking.add_argument("--checker", default="self", metavar="WHO", help=CHECKERS)
    checking.add_argument(
        "--labelled", metavar="FILE", help="replies with human labels, .jsonl or .csv (default: the pyrit package's)"
    )
    checking.add_argument(
        "--labelled-rows", type=options.count, default=200, metavar="N", help="most of them used (default %(default)s)"
    )
    checking.add_argument("--force", action="store_true", help="run although the checker cannot be trusted")
    checking.add_argument("--no-rejected", action="store_true", help="leave out answers judged unsafe")

    asking = parser.add_argument_group("asking")
    asking.add_argument("--templates", metavar="DIR", help="texts that stand in for the package's")
    asking.add_argument("--exemplars", metavar="FILE", help="chains shown before requests, or the word safety: ours")
    asking.add_argument("--start", type=_start, default={}, metavar="WAY", help=START)
    asking.add_argument("--attempts", type=options.count, default=2, metavar="N", help="of the longest way (default 2)")
    asking.add_argument(
        "--max-tokens",
        type=options.limits,
        default={},
        metavar="STAGE=N,…",
        help="most tokens of a stage's text (default analysis=96,guidance=96,response=192)",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0: the likeliest (default 0.7)")
    sampling.add_argument("--top-p", type=float, default=0.9, metavar="P", help="default 0.9")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw (default 0)")

    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size", type=options.count, default=16, metavar="N", help="prompts at a time (default 16)"
    )
    running.add_argument("--dtype", choices=folders.DTYPES, default="auto", help="of the model (default: its own)")
    running.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    running.add_argument(
        "--ray", type=options.count, metavar="N", help="on N actors of Ray, each with a model of its own"
    )
    running.add_argument("--color", choices=COLOR_MODES, default="auto", help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    """Reads the prompts, measures the checker, builds the chains, and shows their mix. No text of them is shown."""
    from mote_ext import _build

    _build.require_compiled_module()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    notices, screen = Screen(sys.stderr, args.color), Screen(sys.stdout, args.color)
    prompts = _prompts(args)
    try:
        summary = _build_chains(args, prompts, notices)
    except KeyboardInterrupt:
        notices.line(f"\nstopped; what is built is in {args.out}, and the same command goes on", "dim")
        raise
    _show(screen, summary)


def load_builder(args: argparse.Namespace) -> GroupBuilder:
    """What builds groups, from the options alone; Ray's actors call it too."""
    from mote_ext.chains.asking import Templates
    from mote_ext.chains.build import stage_table_of
    from mote_ext.chains.group import GroupBuilder
    from mote_ext.chains.record import read_chains
    from mote_ext.chains.writer import TextWriter

    settings = _settings(args)
    model, tokenizer = _load(args.model, args)
    table = stage_table_of(model)
    settings = replace(settings, start=_lengths(args.start, table))
    templates = Templates.read(table, args.templates)
    checker = _checker(args, model, tokenizer, templates)
    exemplars = () if args.exemplars is None else read_chains(_exemplar_file(args.exemplars), table)
    writer = TextWriter(model, tokenizer, settings.temperature, settings.top_p)
    return GroupBuilder(writer, checker, table, templates, settings, exemplars)


def _build_chains(args: argparse.Namespace, prompts: list[Prompt], notices: Screen) -> Summary:
    from mote_ext.chains.build import build_chains
    from mote_ext.chains.distributed import run_on_ray

    builder = load_builder(args)
    _measure(args, builder.checker, notices)
    with _Bar(len(prompts), builder.table) as bar:
        return build_chains(
            builder.writer.model,
            builder.writer.tokenizer,
            prompts,
            builder.checker,
            builder.settings,
            args.out,
            templates=builder.templates,
            exemplars=builder.exemplars,
            run_groups=None
            if args.ray is None
            else lambda groups: run_on_ray(partial(load_builder, args), groups, args.ray),
            progress=bar.show,
        )


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    from mote_ext.chains.prompts import read_prompts, require_unique_ids

    prompts = [prompt for spec in args.prompts for prompt in read_prompts(spec)]
    require_unique_ids(prompts, "PROMPTS")
    return prompts[: args.limit]


def _settings(args: argparse.Namespace) -> Settings:
    from mote_ext.chains.settings import Settings

    return Settings(
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        attempts=args.attempts,
        seed=args.seed,
        keep_rejected=not args.no_rejected,
    )


def _load(name: str, args: argparse.Namespace) -> tuple:
    return folders.load_any(folders.find_folder(name), dtype=args.dtype, device=args.device)


def _checker(args: argparse.Namespace, model, tokenizer, templates) -> Checker:
    from mote_ext.chains.checkers import KINDS, EndpointChecker, ModelChecker, RefusalChecker
    from mote_ext.judges import Endpoint

    kind, _, rest = args.checker.partition(":")
    if args.checker == "self":
        return ModelChecker(model, tokenizer, templates, batch_size=args.batch_size)
    if args.checker == "refusal":
        return RefusalChecker()
    if kind == "model" and rest:
        return ModelChecker(*_load(rest, args), templates, args.checker, args.batch_size)
    if kind == "openai":
        return EndpointChecker(Endpoint.parse(rest), templates)
    raise CommandError(f"--checker: one of {', '.join(KINDS)} expected, got {args.checker!r}")


def _measure(args: argparse.Namespace, checker: Checker, notices: Screen) -> None:
    """Shows the checker's agreement with people. CommandError: too little of it, or nothing to measure it with."""
    from mote_ext.chains.checkers import require_trust, some_of

    try:
        replies = some_of(_labelled(args, checker), args.labelled_rows)
        notices.line(f"measuring the checker {checker.name} on {len(replies)} labelled replies", "dim")
        found = checker.measure(replies)
        notices.line(f"checker {checker.name} against human labels: {found.line()}")
        require_trust(checker, found)
    except (ImportError, ValueError) as error:
        if not args.force:
            raise CommandError(f"{error} (--force runs it all the same)") from error
        notices.line(f"--force: {error}", "yellow")


def _labelled(args: argparse.Namespace, checker: Checker) -> list[LabelledReply]:
    from mote_ext.judges import read_labelled

    if args.labelled is not None:
        return read_labelled(args.labelled)
    try:
        return read_labelled(split="test", kind="refusal" if checker.name == "refusal" else "harm")
    except ImportError as error:
        raise ImportError(
            f"a checker is measured before it is trusted, and there are no labelled replies: {error}; or give "
            "--labelled FILE with the fields prompt, response, safe (and refusal)"
        ) from None


class _Bar:
    """A bar over prompts with the mix beside it. A context manager."""

    def __init__(self, num_prompts: int, table: StageTable) -> None:
        from tqdm import tqdm

        self.table, self.counts = table, Counter()
        self.bar = tqdm(total=num_prompts, desc="Chains", unit="prompt", file=sys.stderr)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def show(self, num_done: int, result: GroupResult | None) -> None:
        """build_chains' progress."""
        from mote_ext.chains.mix import is_rejected, way_of

        if result is None:
            self.bar.initial = self.bar.n = num_done
            self.bar.refresh()
        else:
            self.counts.update("rejected" if is_rejected(row) else way_of(row, self.table) for row in result.chains)
            self.counts["dropped"] += len(result.dropped)
            self.bar.set_postfix(self.counts, refresh=False)
        self.bar.update(num_done - self.bar.n)


def _show(screen: Screen, summary: Summary) -> None:
    screen.line(f"{summary.out}: {summary.mix.num_chains} chains", "bold")
    if summary.num_found:
        screen.line(f"{summary.num_found} prompts were done before", "dim")
    for line in summary.mix.lines():
        screen.line(line)
    if summary.mix.dropped:
        screen.line(f"prompts without a chain, and why: {summary.dropped}", "dim")


def _exemplar_file(name: str) -> str:
    if name not in SHIPPED_EXEMPLARS:
        return name
    from mote_ext.chains.asking import EXEMPLARS

    return str(EXEMPLARS / f"{name}.jsonl")


def _start(text: str) -> dict[str, str]:
    from mote_ext.chains.prompts import LABELS, UNLABELLED

    labels = (*LABELS, UNLABELLED)
    pairs = options.pairs(text, "LABEL=WAY", "benign=full") if "=" in text else [(label, text) for label in labels]
    for label, _ in pairs:
        if label not in labels:
            raise argparse.ArgumentTypeError(f"a way, or LABEL=WAY with a label among {labels} expected, got {text!r}")
    return dict(pairs)


def _lengths(start: dict[str, str], table: StageTable) -> dict[str, int]:
    """Label -> how many stages of reasoning the way of --start has in this table."""
    from mote_ext.chains.mix import way_names

    ways = way_names(table)
    for way in start.values():
        if way not in ways:
            raise CommandError(f"--start: a way among {tuple(ways)} expected, got {way!r}")
    return {label: ways.index(way) for label, way in start.items()}
