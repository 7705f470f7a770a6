"""mote eval: what a model refuses, what it should not have refused, and at how many tokens, path by path."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mote_ext.cli import evaluating, options
from mote_ext.cli import folder as folders
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen, table_lines

if TYPE_CHECKING:
    from mote_ext.evaluation import Evaluation

SUMMARY = "refusals and tokens of a model, path by path, with a report"
USAGE = "mote eval MODEL --out DIR [options]\n       mote eval --report DIR [DIR …] [--out DIR]"
EXAMPLES = """\
mote eval my-model --out results
mote eval my-model --out results --limit 60 --paths base answer full adaptive --check enforce
mote eval path/of/a/plain/model --base --out results-base
mote eval my-model --out results --compare results-lora results-base
mote eval my-model --out results --suite harmbench benign-edgy --jailbreaks 2
mote eval my-model --out results --judge rubric:path/of/a/judging/model
mote eval my-model --out results --judge openai:http://localhost:8000/v1#my-judge
mote eval --report results results-lora          render the report again

Prompts come from packages (pip says which is missing), answers stay on this machine unless --judge openai: sends them
to its server, and neither is shown or written: results.json holds ids. --save-texts FILE is for those who must read."""

DEFAULT_SUITES = ("strongreject-small", "benign-edgy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote eval."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a MoTE folder, or with --base a plain model's")
    parser.add_argument("--out", metavar="DIR", help="where results.json, report.html and the PNG files go")
    parser.add_argument("--base", action="store_true", help="MODEL is a plain checkpoint: it has the path base alone")
    parser.add_argument("--name", metavar="NAME", help="of the model, in tables and plots (default: its folder's)")
    _add_prompt_options(parser.add_argument_group("prompts"))
    _add_answer_options(parser.add_argument_group("answers"))
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--judge",
        default="refusal",
        metavar="JUDGE",
        help="of harm: refusal (default: what is not refused is harmful), rubric:FOLDER (a model reads StrongREJECT's "
        "rubric) or openai:URL#MODEL (the same, served; OPENAI_API_KEY)",
    )
    judging.add_argument(
        "--labelled", metavar="FILE", help="replies labelled by people that judges are measured on (default: PyRIT's)"
    )
    judging.add_argument(
        "--judge-labels",
        type=options.count,
        default=100,
        metavar="N",
        help="replies a set that judging models are measured on",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="results of other models beside these")
    report.add_argument("--report", nargs="+", metavar="DIR", help="only render results that are there, again")
    report.add_argument("--training", nargs="+", default=[], metavar="DIR", help="training runs whose curves are shown")
    report.add_argument("--title", metavar="TEXT", help="of the report")
    report.add_argument("--note", action="append", default=[], metavar="TEXT", help="what its readers must know")
    running = parser.add_argument_group("running")
    running.add_argument("--dtype", choices=folders.DTYPES, default="auto", help="of the base (default: its own)")
    running.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    running.add_argument("--save-texts", metavar="FILE", help="write prompts and answers there, which may be harmful")
    running.add_argument("--color", choices=COLOR_MODES, default="auto", help="default %(default)s")


def _add_prompt_options(group) -> None:
    group.add_argument(
        "--suite",
        nargs="+",
        default=list(DEFAULT_SUITES),
        metavar="NAME",
        help=f"prompt sets (default {' '.join(DEFAULT_SUITES)}; a wrong name lists them all)",
    )
    group.add_argument("--limit", type=options.count, metavar="N", help="prompts a suite, the same ones every time")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of that draw (default %(default)s)")
    group.add_argument(
        "--jailbreaks", type=options.count, metavar="N", help="also the harmful prompts in N jailbreak wrappers each"
    )
    group.add_argument(
        "--avoid", nargs="+", default=[], metavar="FILE", help="chains or prompts trained on: near ones are left out"
    )


def _add_answer_options(group) -> None:
    group.add_argument(
        "--paths",
        nargs="+",
        metavar="PATH",
        help="base, answer, analysis, full, adaptive, escalate, or stage names with commas between them (default: the "
        "first five)",
    )
    group.add_argument("--check", choices=("flag", "enforce"), help="also each path with the check stage")
    group.add_argument("--max-new-tokens", type=options.count, default=256, metavar="N", help="default %(default)s")
    group.add_argument("--batch-size", type=options.count, default=16, metavar="N", help="default %(default)s")
    group.add_argument("--system", metavar="TEXT", help="a system message")


def run(args: argparse.Namespace) -> None:
    """Evaluates, or renders again; the report's place is the last line."""
    from mote_ext.evaluation import Evaluation, write_report
    from mote_ext.evaluation.plots import require_matplotlib

    require_matplotlib()  # before the hours, not after them
    others = [Evaluation.load(folder) for folder in (args.report or args.compare)]
    training = _training(args.training)
    if args.report:
        if args.model:
            raise CommandError("--report renders results that are there: leave MODEL out")
        evaluations, out = others, Path(args.out or args.report[0])
    else:
        if not args.model or not args.out:
            raise CommandError("MODEL and --out DIR are needed, or --report DIR")
        out = Path(args.out)
        evaluations = [_evaluated(args, out), *others]
    title = {"title": args.title} if args.title else {}
    page = write_report(out, _renamed(evaluations), training, notes=args.note, **title)
    screen = Screen(sys.stdout, args.color)
    for evaluation in evaluations:
        _show(evaluation, screen)
    screen.line("A refusal is not safety; refusals are recognised by their words. Intervals: Wilson, 95 %.", "dim")
    screen.line(f"report: {page}")


def _evaluated(args: argparse.Namespace, out: Path) -> Evaluation:
    """One model's evaluation, written as soon as it is there; what can fail without it fails before it."""
    from mote_ext.judges import read_labelled

    if args.labelled:
        read_labelled(args.labelled)
    suites = evaluating.read_suites(args)
    model, tokenizer = evaluating.load_model(args)
    judge = evaluating.make_judge(args.judge)
    from mote_ext.evaluation import BASE, DEFAULT_PATHS, evaluate

    paths = args.paths or ([BASE] if args.base else list(DEFAULT_PATHS))
    paths = [tuple(filter(None, path.split(","))) if "," in path else path for path in paths]
    out.mkdir(parents=True, exist_ok=True)
    with _text_file(args.save_texts) as keep_text:
        found = evaluate(
            model, tokenizer, suites, paths, judge, checks=(False, args.check) if args.check else (False,),
            max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, seed=args.seed, system=args.system,
            name=args.name or Path(args.model).resolve().name, keep_text=keep_text,
        )  # fmt: skip
    found.settings["limit"] = args.limit
    found.facts["command"] = shlex.join(["mote", "eval", *_words(args)])
    if hasattr(judge, "num_unread"):
        found.facts["grades that could not be read, counted as unsafe"] = judge.num_unread
    found.save(out / "results.json")
    found.agreements = evaluating.measure_judges(args, model, tokenizer, judge)
    found.save(out / "results.json")
    return found


def _training(places: list[str]) -> dict[str, str]:
    """The training logs by their folders' names, or by their paths where names are equal. ValueError: one is none."""
    from mote_ext.evaluation.report import read_log

    for place in places:
        read_log(place)
    names = [Path(place).name for place in places]
    return {name if names.count(name) == 1 else place: place for name, place in zip(names, places)}


def _show(evaluation: Evaluation, screen: Screen) -> None:
    """A row a path: tokens, refusals of harmful and of harmless prompts."""
    from mote_ext.suites import BENIGN, HARMFUL

    summaries = evaluation.summaries(by_suite=True)
    screen.line()
    screen.line(evaluation.name, "bold")
    rows = []
    for summary in summaries:
        way = summary.way if summary.check != "flag" else f"{summary.path} (flagged)"
        meaning = {HARMFUL: "harmful", BENIGN: "harmless"}.get(summary.label, summary.label)
        rows.append([", ".join(summary.suites), meaning, way, f"{summary.tokens_mean:.0f}", summary.refused_text])
    for number, line in enumerate(table_lines(["suite", "kind", "path", "tokens", "refused"], rows)):
        screen.line(line, *(["dim"] if number == 0 else []))
    for found in evaluation.agreements:
        area = "no AUC" if found["auc"] is None or found["auc"] != found["auc"] else f"AUC {found['auc']:.2f}"
        accuracy = f"accuracy {found['accuracy']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        screen.line(f"judge {found['judge']} on {found['labels']}: {area}, {accuracy}, n = {found['n']}", "dim")


def _renamed(evaluations: list) -> list:
    """Two results of one name are told apart by a number."""
    seen: dict[str, int] = {}
    for evaluation in evaluations:
        seen[evaluation.name] = seen.get(evaluation.name, 0) + 1
        if seen[evaluation.name] > 1:
            evaluation.name = f"{evaluation.name} ({seen[evaluation.name]})"
    return evaluations


@contextmanager
def _text_file(name: str | None):
    """A function that writes a row with its texts, or None."""
    if name is None:
        yield None
        return
    with open(name, "w", encoding="utf-8") as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, as far as it differs from the defaults."""
    words = [args.model]
    standard = argparse.ArgumentParser(add_help=False)
    add_arguments(standard)
    for name, value in vars(args).items():
        if name in ("model", "color", "debug") or value == standard.get_default(name) or value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        if name == "note":  # given once for each
            words += [word for note in values for word in (option, note)]
        else:
            words += [option] if value is True else [option, *map(str, values)]
    return words
