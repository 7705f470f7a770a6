"""mote generate: one answer, streamed stage by stage, or a chat. Options become Wishes; answering.py does the rest."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from mote_ext.cli import folder as folders
from mote_ext.cli import options
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen, StageScreen

if TYPE_CHECKING:
    from mote_ext.cli.answering import Answer, Answerer, Route, Wishes

SUMMARY = "answer a question stage by stage, or chat"
USAGE = "mote generate MODEL [PROMPT] [options]"
EXAMPLES = """\
mote generate my-model                                    a chat
mote generate my-model "How do plants drink?"
mote generate my-model "How do plants drink?" --path full --stage-max-tokens analysis=64,guidance=48
mote generate my-model "How do I pick a lock?" --check=enforce
mote generate my-model "Write a haiku" --path analysis,response --hide analysis --sample --seed 1
echo "How do plants drink?" | mote generate my-model --json
mote generate --base path/of/a/plain/model "Hello" --path full"""

PATHS = """\
adaptive (default: the model opens stages itself), answer (the response alone), analysis, full, escalate (answer and
check; while the answer is unsafe, a longer path), stage names with commas between them, or none (no stage rules)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote generate."""
    parser.add_argument("model", metavar="MODEL", help="a MoTE folder, full or with the experts alone, or a hub's name")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; without one, stdin's, or a chat")
    parser.add_argument("--base", action="store_true", help="MODEL is a plain checkpoint: put untrained experts on it")

    stages = parser.add_argument_group("stages")
    stages.add_argument("--path", type=parse_path, default="adaptive", metavar="PATH", help=PATHS)
    stages.add_argument(
        "--check",
        nargs="?",
        const="flag",
        default=False,
        type=_check,
        metavar="flag|enforce",
        help="judge the answer in the check stage; enforce also refuses in an unsafe answer's place",
    )
    stages.add_argument(
        "--hide", nargs="+", action="extend", type=_stage, default=[], metavar="STAGE", help="stages that are not shown"
    )
    stages.add_argument(
        "--stage-max-tokens",
        type=options.limits,
        default={},
        metavar="STAGE=N,…",
        help="most tokens between a stage's markers",
    )
    stages.add_argument(
        "--max-new-tokens",
        type=options.count,
        default=512,
        metavar="N",
        help="most tokens of everything (default %(default)s)",
    )
    stages.add_argument("--system", metavar="TEXT", help="a system message")

    sampling = parser.add_argument_group("sampling (default: the likeliest token)")
    sampling.add_argument(
        "--sample", action="store_true", help="draw tokens, with the settings below or the model's own"
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="below 1 more certain (draws, as --sample)")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="of the likeliest tokens this share (draws, as --sample)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same draws every time")

    running = parser.add_argument_group("running and showing")
    running.add_argument("--dtype", choices=folders.DTYPES, default="auto", help="of the base (default: its own)")
    running.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    running.add_argument(
        "--color", choices=COLOR_MODES, default="auto", help="auto: on a terminal, unless NO_COLOR is set"
    )
    running.add_argument("--json", action="store_true", help="one JSON object instead of a stream")


def run(args: argparse.Namespace) -> None:
    """One answer, or a chat where there is neither a prompt nor a pipe."""
    chats = args.prompt is None and sys.stdin.isatty()
    if chats and args.json:
        raise CommandError("--json answers one prompt: give PROMPT, or pipe it in")
    prompt = None if chats else _prompt(args)
    notices = Screen(sys.stderr, args.color)
    answerer = _load(args, notices)
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    if chats:
        from mote_ext.cli.chat import Chat

        Chat(answerer, Screen(sys.stdout, args.color), notices).run()
    elif args.json:
        answer = answerer.answer(prompt)
        print(json.dumps({"prompt": prompt, **answer.to_dict(answerer.wishes.hide)}, ensure_ascii=False, indent=2))
    else:
        show_answer(answerer, prompt, Screen(sys.stdout, args.color), notices)


def show_answer(answerer: Answerer, prompt, screen: Screen, notices: Screen) -> Answer:
    """Streams the answer onto the screen, and a line about it among the notices."""
    stages = StageScreen(screen, answerer.table, answerer.verdicts)
    try:
        answer = answerer.answer(prompt, stages)
    finally:
        stages.end()
    notices.line(summary(answer, timed=answerer.wishes.path != "escalate"), "dim")
    return answer


def summary(answer: Answer, timed: bool = True) -> str:
    """Path with tokens a stage, tokens per second, verdict, stop reason. timed: whether every token is counted."""
    if answer.refused:
        way = [" → ".join(answer.path), "refused"]
    else:
        names = {"prompt": "outside of stages"}
        way = [
            " → ".join(f"{names.get(piece.stage, piece.stage)} {piece.tokens}" for piece in answer.pieces) or "nothing"
        ]
    rate = f", {answer.generated_tokens / answer.seconds:.1f} tokens/s" if timed and answer.seconds else ""
    parts = [*way, f"{answer.generated_tokens} tokens in {answer.seconds:.1f} s{rate}"]
    parts += [f"verdict {answer.verdict}"] if answer.verdict else []
    return " · ".join([*parts, f"stop {answer.stop_reason}"])


def parse_path(text: str) -> Route:
    """generate's path from what is typed: "none" is None, commas make a tuple."""
    if text == "none":
        return None
    return tuple(filter(None, _names(text))) if "," in text else text


def _load(args: argparse.Namespace, notices: Screen) -> Answerer:
    """The model and its tokenizer; what can be refused is refused before the weights are read."""
    folder = folders.find_folder(args.model)
    model_type = folders.read_model_type(folder)
    if args.base and model_type == "mote":
        raise CommandError(f"{folder} holds a MoTE model already; leave --base out")
    config = None if args.base else folders.read_config(folder)
    from mote_ext.cli.answering import Answerer

    wishes = _wishes(args)
    if config is not None:
        folders.require_base(folder, config)
        wishes.require_sense(config)
    tokenizer = folders.load_tokenizer(folder, config)
    options = {"dtype": args.dtype, "device": args.device}
    if args.base:
        model = folders.load_model(folder, **options, tokenizer=tokenizer)
        notices.line(f"untrained experts on {folder}: stages mean nothing to it yet", "dim")
        wishes.require_sense(model.config)
    else:
        model = folders.load_model(folder, **options)
    return Answerer(model, tokenizer, wishes)


def _wishes(args: argparse.Namespace) -> Wishes:
    from mote_ext.cli.answering import Wishes

    return Wishes(
        path=args.path,
        check=args.check,
        hide=tuple(name for text in args.hide for name in _names(text)),
        stage_max_tokens=args.stage_max_tokens,
        limit=args.max_new_tokens,
        system=args.system,
        sampling=_sampling(args),
    )


def _sampling(args: argparse.Namespace) -> dict:
    asked = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    if args.sample or asked:
        return {"do_sample": True, **asked}
    from mote_ext.generation import GREEDY

    return GREEDY


def _prompt(args: argparse.Namespace) -> str:
    prompt = sys.stdin.read().rstrip("\n") if args.prompt is None else args.prompt
    if not prompt.strip():
        raise CommandError("the prompt is empty")
    return prompt


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _stage(text: str) -> str:
    if " " in text.strip():  # argparse gave --hide what was meant as the prompt
        raise argparse.ArgumentTypeError(f"stage names expected, got {text!r}; put the prompt before --hide")
    return text


def _check(text: str) -> str:
    if text not in ("flag", "enforce"):
        hint = "; put the prompt before --check, or write --check=flag" if " " in text else ""
        raise argparse.ArgumentTypeError(f"flag or enforce expected, got {text!r}{hint}")
    return text
