"""mote train: chains in, trained experts out, with a bar while it runs and a screen at the end."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mote_ext.cli import folder as folders
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen, table_lines

if TYPE_CHECKING:
    from mote_ext.training import TrainingResult

SUMMARY = "train the experts of a model on chains"
USAGE = "mote train DATA --base MODEL --out DIR [options]"
EXAMPLES = """\
mote train chains.jsonl --base path/of/a/model --out my-model
mote train chains.jsonl --base path/of/a/model --out my-model --epochs 2 --learning-rate 5e-4 --eval-data held-out.jsonl
mote train chains.jsonl --base path/of/a/model --out my-lora --baseline lora_x2
mote train chains.jsonl --base path/of/a/model --out my-model --resume
mote train chains.jsonl --base meta-llama/Llama-3.1-8B-Instruct --out my-model --quantize 4bit --gradient-checkpointing
torchrun --nproc-per-node 4 -m mote_ext.cli train chains.jsonl --base path/of/a/model --out my-model --shard"""

# What argparse calls it -> the field of MoTETrainingArguments.
_FIELDS = {
    "epochs": "num_train_epochs",
    "learning_rate": "learning_rate",
    "marker_learning_rate": "marker_learning_rate",
    "batch_size": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "p_dropout": "p_dropout",
    "compact_positions": "compact_positions",
    "packing": "packing",
    "frozen": "frozen_stages",
    "samples": "num_samples",
    "gradient_checkpointing": "gradient_checkpointing",
    "shard": "shard",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote train. An option without a default here has the library's."""
    parser.add_argument("data", metavar="DATA", help="chains, one JSON object a line")
    parser.add_argument("--base", required=True, metavar="MODEL", help="folder of a causal model, or a hub's name")
    parser.add_argument("--out", required=True, metavar="DIR", help="where checkpoints and the trained experts go")
    parser.add_argument("--eval-data", metavar="FILE", help="chains that are evaluated after each epoch")
    _add_model_options(parser.add_argument_group("experts"))
    _add_training_options(parser.add_argument_group("training"))
    running = parser.add_argument_group("running")
    running.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    running.add_argument("--dtype", choices=folders.DTYPES[:3], default="auto", help="of the base (default: its own)")
    running.add_argument("--quantize", choices=("4bit",), help="load the base quantised (bitsandbytes NF4)")
    running.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    running.add_argument(
        "--shard", action="store_true", default=None, help="spread the model over the processes of torchrun (FSDP2)"
    )
    running.add_argument("--seed", type=int, metavar="N", help="of the experts' start, the order and every draw")
    running.add_argument("--settings", metavar="FILE", help="JSON object of further fields of TrainingArguments")
    running.add_argument("--color", choices=COLOR_MODES, default="auto", help="default %(default)s")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--baseline",
        default="mote",
        metavar="NAME",
        help="mote, or what it is compared with: lora, lora_x2, lora_skipping, lora_matched, no_shared, no_skipping, "
        "random_experts",
    )
    group.add_argument("--r", type=int, metavar="N", help="rank of an expert (default 16)")
    group.add_argument("--alpha", type=float, metavar="A", help="LoRA's alpha (default 2r)")
    group.add_argument("--mix", type=float, metavar="W", help="weight of the stage's expert (default 0.5)")
    group.add_argument(
        "--prompt-expert",
        metavar="WHO",
        help="who sees the question: shared (default), none, a stage's name, or random: a stage drawn in training and "
        "the response at inference, as in the paper",
    )
    group.add_argument("--frozen", nargs="+", metavar="STAGE", help="experts that stay as they are")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=float, metavar="N", help="default 3")
    group.add_argument("--learning-rate", type=float, metavar="R", help="default 2e-4")
    group.add_argument("--marker-learning-rate", type=float, metavar="R", help="of the marker rows (default 4 x)")
    group.add_argument("--batch-size", type=int, metavar="N", help="chains a process and forward (default 4)")
    group.add_argument("--accumulate", type=int, metavar="N", help="forwards an optimiser step (default 4)")
    group.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens of a chain (default 2048)")
    group.add_argument("--packing", action="store_true", default=None, help="a batch in one row without padding")
    group.add_argument("--p-dropout", type=float, metavar="P", help="of a block between stages (default 0.5)")
    group.add_argument("--compact-positions", action="store_true", default=None, help="close up hidden stages")
    group.add_argument("--system", metavar="TEXT", help="a system message before every question")
    group.add_argument("--samples", type=int, metavar="N", help="answers written to a file in each evaluation")


def run(args: argparse.Namespace) -> None:
    """Trains and shows what came of it. Under torchrun the first process alone shows anything."""
    from mote_ext import _build

    _build.require_compiled_module()
    import torch
    from transformers.utils import logging

    from mote_ext.allocator import keep_freed_memory
    from mote_ext.cli.progress import ProgressBar
    from mote_ext.training import train

    if not torch.cuda.is_available():
        keep_freed_memory()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shows = int(os.environ.get("RANK", "0")) == 0
    settings = _settings(args)
    # A hub's name is recorded as it is with the experts, not as the folder it was fetched into.
    base = args.base if folders.is_hub_name(args.base) else str(folders.find_folder(args.base))
    result = train(
        args.data,
        base,
        args.out,
        eval_data=args.eval_data,
        config=_config(args),
        baseline=args.baseline,
        max_length=args.max_length,
        system=args.system,
        dtype=args.dtype,
        quantize=args.quantize,
        resume=args.resume,
        callbacks=[ProgressBar()] if shows else [],
        **settings,
    )
    if shows:
        _show(Screen(sys.stdout, args.color), args, result)


def _settings(args: argparse.Namespace) -> dict:
    """Fields of MoTETrainingArguments: those of --settings, and over them what the command line says."""
    from mote_ext.training import train

    settings = {}
    if args.settings:
        try:
            settings = json.loads(Path(args.settings).read_text())
        except ValueError as error:
            raise CommandError(f"{args.settings} is no JSON: {error}") from error
        if not isinstance(settings, dict):
            raise CommandError(f"{args.settings}: an object of TrainingArguments' fields expected")
        taken = sorted({"output_dir", *inspect.signature(train).parameters} & set(settings))
        if taken:
            raise CommandError(f"{args.settings}: {', '.join(taken)} cannot be set there, but by mote train's options")
    given = {field: getattr(args, option) for option, field in _FIELDS.items()}
    return {**settings, **{field: value for field, value in given.items() if value is not None}}


def _config(args: argparse.Namespace):
    from mote_ext.config import MoTEConfig

    rank = 16 if args.r is None else args.r
    changes = {"r": rank, "lora_alpha": 2.0 * rank if args.alpha is None else args.alpha}
    if args.mix is not None:
        changes["mix"] = args.mix
    if args.prompt_expert == "random":
        changes.update(train_prompt_expert="random", prompt_expert="response")
    elif args.prompt_expert is not None:
        changes["prompt_expert"] = args.prompt_expert
    if args.seed is not None:
        changes["seed"] = args.seed
    return MoTEConfig(**changes)


def _show(screen: Screen, args: argparse.Namespace, result: TrainingResult) -> None:
    rate = result.tokens / result.seconds if result.seconds else 0.0
    screen.line()
    screen.line(f"{args.baseline} trained on {result.num_chains:,} chains: {result.folder}", "bold")
    for number, what in ((result.truncated, "shortened"), (result.skipped, "left out, the question fills max-length")):
        if number:
            screen.line(f"{number:,} chains were {what}", "yellow")
    screen.line(
        f"{result.num_steps:,} steps in {result.seconds:,.1f} s, {result.tokens:,} tokens, {rate:,.0f} tokens/s, "
        f"{result.trained_parameters:,} parameters trained"
    )
    rows = loss_rows(result.log)
    if rows:
        screen.line()
        for line in table_lines(("loss of a token", "first", "last", "evaluation"), rows):
            screen.line(line)
    screen.line()
    screen.line(f'next: mote generate {result.folder} "a question" --path full', "dim")


def loss_rows(log: list[dict]) -> list[tuple[str, str, str, str]]:
    """(stage, first loss, last loss, evaluation's) from a log history, and the whole chain's at the end."""
    names = list(dict.fromkeys(key.partition("/")[2] for entry in log for key in entry if key.startswith("loss/")))

    def ends(key: str) -> tuple[str, str]:
        values = [entry[key] for entry in log if key in entry]
        return (f"{values[0]:.3f}", f"{values[-1]:.3f}") if values else ("-", "-")

    rows = [(name, *ends(f"loss/{name}"), ends(f"eval_loss/{name}")[1]) for name in names]
    return [*rows, ("whole chain", *ends("loss"), ends("eval_loss")[1])] if names else []
