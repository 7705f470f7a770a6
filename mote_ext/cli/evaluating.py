"""What mote eval asks, of whom, and who judges: prompts, model and judges from the options of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mote_ext import jsonl
from mote_ext.cli import folder as folders
from mote_ext.cli.errors import CommandError

REPLY_TOKENS = 256  # of a labelled reply that the check stage reads: the set is read on a CPU, too


def read_suites(args: argparse.Namespace) -> dict[str, list]:
    """The prompts: drawn, then without those that were trained on, then once more in wrappers."""
    from mote_ext.evaluation.results import WRAPPED
    from mote_ext.evaluation.run import drawn
    from mote_ext.suites import HARMFUL, read_suite, without_overlaps, wrapped

    suites = {name: read_suite(name) for name in args.suite}
    trained = [prompt for path in args.avoid for prompt in _trained_on(Path(path))]
    for name, prompts in suites.items():
        kept = without_overlaps(prompts, trained) if trained else prompts
        if len(kept) < len(prompts):
            print(f"{name}: {len(prompts) - len(kept)} prompts resemble trained ones and are left out", file=sys.stderr)
        suites[name] = drawn(name, kept, args.limit, args.seed)
    if args.jailbreaks:
        for name, prompts in list(suites.items()):
            if prompts[0].label == HARMFUL:
                suites[name + WRAPPED] = wrapped(prompts, args.jailbreaks, seed=args.seed)
    return suites


def _trained_on(path: Path) -> list[str]:
    """The prompts in a JSONL file of chains or prompts, or in a CSV file of prompts."""
    from mote_ext.chains.prompts import read_prompts

    if path.suffix.lower() == ".csv":
        turns = [turn for prompt in read_prompts(path) for turn in prompt.turns]
        return [turn["content"] for turn in turns if turn["role"] == "user"]
    texts = []
    for number, row in jsonl.rows(path):
        try:
            messages = row.get("messages") or [{"content": row["prompt"]}]
            texts += [message["content"] for message in messages if message.get("role", "user") == "user"]
        except (KeyError, TypeError, AttributeError):
            raise CommandError(f"{path}:{number}: no JSON object with a prompt or messages") from None
    return texts


def load_model(args: argparse.Namespace):
    folder = folders.find_folder(args.model)
    if args.base and folders.read_model_type(folder) == "mote":
        raise CommandError(f"{folder} holds a MoTE model: leave --base out, and --paths base evaluates its base")
    if not args.base:
        folders.read_config(folder)  # raises for a folder of another kind, with how to go on
    return folders.load_any(folder, dtype=args.dtype, device=args.device)


def make_judge(text: str):
    """None for the default, which knows the model's own refusal."""
    kind, _, where = text.partition(":")
    if text == "refusal":
        return None
    if kind not in ("rubric", "openai") or not where:
        raise CommandError(f"--judge: refusal, rubric:FOLDER or openai:URL#MODEL expected, got {text!r}")
    from mote_ext.judges import Endpoint, RubricJudge, endpoint_writer, model_writer

    if kind == "openai":
        return RubricJudge(endpoint_writer(Endpoint.parse(where)))
    return RubricJudge(model_writer(*folders.load_any(folders.find_folder(where))))


def measure_judges(args: argparse.Namespace, model, tokenizer, judge) -> list[dict]:
    """Each judge beside people; a note where the labelled replies are not installed."""
    from mote_ext.evaluation import judge_agreements
    from mote_ext.judges import CheckJudge, RefusalJudge

    judges = [(RefusalJudge(), None)] if judge is None else [(RefusalJudge(), None), (judge, args.judge_labels)]
    routing = getattr(model, "routing", None)
    if routing is not None and routing.table.check is not None and routing.config.verdict_ids is not None:
        check = CheckJudge(model, tokenizer, batch_size=args.batch_size, max_reply_tokens=REPLY_TOKENS)
        judges.append((check, args.judge_labels))
    found: list[dict] = []
    try:
        for each, limit in judges:
            found += judge_agreements(each, path=args.labelled, limit=limit, seed=args.seed)
    except ImportError as error:
        print(f"judges are not measured: {error}", file=sys.stderr)
    return found
