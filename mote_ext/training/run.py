"""train: from a file of chains and a base model to a folder with trained experts, in one call.

What `mote train`, the examples and the demo call. Nothing is printed; callbacks see the progress.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mote_ext import compat
from mote_ext.chains.dataset import ChainDataset
from mote_ext.chains.record import Chain, read_chains
from mote_ext.config import MoTEConfig
from mote_ext.model import MoTEForCausalLM
from mote_ext.training.arguments import MoTETrainingArguments
from mote_ext.training.baselines import apply_baseline
from mote_ext.training.trainer import MoTETrainer

METRICS = "metrics.json"
# The paper's epochs and batch of 16; a LoRA's usual rate (the paper's 2e-5 is for 1,125 steps of a 7B model), and the
# schedule of the recipe the paper builds on (design notes: MATRIX).
DEFAULTS = {
    "num_train_epochs": 3,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 5,
    "logging_first_step": True,
    "save_strategy": "epoch",
    "save_total_limit": 2,
}


@dataclass(frozen=True)
class TrainingResult:
    """folder: the trained experts, with tokenizer and metrics.json. seconds: of this call's steps. tokens: what they
    read, padding not counted. log: transformers' log history. truncation: chains that were shortened or left out."""

    folder: Path
    seconds: float
    tokens: int
    num_chains: int
    num_steps: int
    log: list[dict]
    truncated: int
    skipped: int
    trained_parameters: int


def train(
    data: str | os.PathLike | Sequence[Chain],
    base: str | os.PathLike,
    out: str | os.PathLike,
    *,
    eval_data: str | os.PathLike | Sequence[Chain] | None = None,
    config: MoTEConfig | None = None,
    baseline: str = "mote",
    max_length: int = 2048,
    system: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments,
) -> TrainingResult:
    """Trains experts on chains and writes them to a folder that MoTEForCausalLM.from_pretrained loads.

    data, eval_data: JSONL files of chains, or Chain objects; with eval_data every epoch is evaluated
    base:        folder or name of a causal language model with a tokenizer
    out:         gets checkpoints while it trains, at the end the experts, the tokenizer and metrics.json
    config:      of the experts; default MoTEConfig()
    baseline:    a name of BASELINES, which changes config and p_dropout
    max_length:  tokens of a chain; longer ones are shortened, ones whose question fills it left out
    system:      a system message before every question
    dtype:       of the base: "auto", "float32", "bfloat16"; the experts are float32 over any of them
    quantize:    "4bit": a bitsandbytes NF4 base
    resume:      go on from the last checkpoint in `out`, or begin where there is none
    callbacks:   TrainerCallbacks; nothing else reports progress
    arguments:   fields of MoTETrainingArguments over DEFAULTS
    Under torchrun or accelerate launch every process calls it; the first one writes.
    ValueError: bad data (with file and line), an unknown baseline, a folder in use. ImportError: quantize without its
    package.
    """
    out = Path(out)
    checkpoint = _checkpoint_in(out, resume)
    args = MoTETrainingArguments(output_dir=str(out), **_arguments(arguments, eval_data is not None))
    config, args.p_dropout = apply_baseline(baseline, config or MoTEConfig(), args.p_dropout)
    table = config.stage_table
    chains, eval_chains = _read(data, table), None if eval_data is None else _read(eval_data, table)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = MoTEForCausalLM.from_base(_load_base(base, dtype, quantize), config, tokenizer=tokenizer)

    def dataset(rows: Sequence[Chain]) -> ChainDataset:
        return ChainDataset(rows, tokenizer, model.config, max_length, system, skip_too_long=True)

    train_dataset, eval_dataset = dataset(chains), None if eval_chains is None else dataset(eval_chains)
    for what, made, rows in (("data", train_dataset, chains), ("evaluation data", eval_dataset, eval_chains)):
        if made is not None and not len(made):
            raise ValueError(f"train: no chain of the {what} fits max_length={max_length}; there are {len(rows)}")
    trainer = MoTETrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    began, steps_before = time.perf_counter(), _steps_of(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - began
    trainer.save_model()
    steps = trainer.state.global_step - steps_before
    epochs = (trainer.state.epoch or 0) * steps / max(trainer.state.global_step, 1)
    result = TrainingResult(
        folder=out,
        seconds=seconds,
        tokens=round(epochs * sum(len(sample["input_ids"]) for sample in train_dataset)),
        num_chains=len(train_dataset),
        num_steps=steps,
        log=trainer.state.log_history,
        truncated=train_dataset.truncation.chains,
        skipped=len(train_dataset.truncation.skipped),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    if args.should_save and (steps or not (out / METRICS).is_file()):  # a run that was finished keeps its figures
        settings = {"baseline": baseline, "p_dropout": args.p_dropout, "max_length": max_length, "base": str(base)}
        _write_metrics(out / METRICS, result, {**settings, "learning_rate": args.learning_rate, "seed": args.seed})
    return result


def _checkpoint_in(out: Path, resume: bool) -> str | None:
    """The last whole checkpoint to go on from. ValueError: the folder is in use and resume was not asked for."""
    found = [path for path in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    if not resume and (found or (out / METRICS).is_file()):
        what = "checkpoints of another run; resume it (resume=True, --resume)" if found else "a finished run; resume it"
        raise ValueError(f"{out} holds {what} or name another folder")
    # Its state is what a checkpoint gets last: one without it was being written when its run was killed.
    whole = [path for path in found if (path / TRAINER_STATE_NAME).is_file()]
    return str(max(whole, key=_steps_of)) if whole else None


def _arguments(given: dict, evaluates: bool) -> dict:
    chosen = {**DEFAULTS, "disable_tqdm": True, **({"eval_strategy": "epoch"} if evaluates else {}), **given}
    if "gradient_checkpointing" in chosen:
        chosen[compat.checkpointing_field()] = chosen.pop("gradient_checkpointing")
    if "report_to" not in chosen and find_spec("tensorboard") is not None:
        chosen["report_to"] = ["tensorboard"]
    unknown = sorted(set(chosen) - (set(MoTETrainingArguments.__dataclass_fields__) - {"output_dir"}))
    if unknown:
        raise ValueError(f"train: {unknown} are no arguments of train or fields of MoTETrainingArguments")
    return chosen


def _read(data, table) -> list[Chain]:
    return read_chains(data, table) if isinstance(data, str | os.PathLike) else list(data)


def _load_base(base: str | os.PathLike, dtype: str, quantize: str | None):
    options: dict = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantize is not None:
        if quantize != "4bit":
            raise ValueError(f"train: quantize must be '4bit' or None, got {quantize!r}")
        if find_spec("bitsandbytes") is None:
            raise ImportError("quantize='4bit' needs bitsandbytes: pip install 'mote_ext[integrations]'")
        compute = torch.bfloat16 if options["dtype"] == "auto" else options["dtype"]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    return AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **options)


def _steps_of(checkpoint: str | Path | None) -> int:
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


def _write_metrics(path: Path, result: TrainingResult, settings: dict) -> None:
    facts = {name: value for name, value in asdict(result).items() if name not in ("folder", "log")}
    path.write_text(json.dumps({"settings": settings, **facts, "log": result.log}, indent=1) + "\n")
