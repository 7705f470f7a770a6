"""Answers of the model to a few questions of the evaluation data, written to a file in each evaluation.

They go to a file and never to the terminal: what a model writes to a harmful question may be harmful.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from mote_ext.stages import parse_stages

if TYPE_CHECKING:
    from mote_ext.training.trainer import MoTETrainer


class SampleWriter(TrainerCallback):
    """Writes output_dir/samples/step-N.jsonl, a line an answer: {"row", "stages": [[name, text], …], "tokens"}.

    num_samples: the first rows of the evaluation data, whose question is what stands before the first start marker
    max_tokens:  of each answer; the likeliest token is taken, so nothing is drawn. Processes of a sharded model all
                 generate the same, one writes
    """

    def __init__(self, trainer: MoTETrainer, num_samples: int, max_tokens: int) -> None:
        self.trainer, self.num_samples, self.max_tokens = trainer, num_samples, max_tokens

    @torch.no_grad()
    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """After each evaluation, on the model as it is now."""
        trainer = self.trainer
        data = trainer.eval_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        lines = [self._answer(data[i], i) for i in range(min(self.num_samples, len(data)))]
        if args.should_save:
            path = Path(args.output_dir) / "samples" / f"step-{state.global_step}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path.write_text(text, encoding="utf-8")

    def _answer(self, sample: dict, index: int) -> dict:
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        question = self._question(list(sample["input_ids"]))
        ids = torch.tensor([question], device=model.device)
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_tokens,
            do_sample=False,
        )[0, len(question) :].tolist()
        line = {"row": sample.get("row", index), "tokens": answer}
        return line if tokenizer is None else {**line, "stages": parse_stages(tokenizer, answer)}

    def _question(self, ids: list[int]) -> list[int]:
        markers = set(self.trainer.model.routing.table.marker_ids)
        return ids[: next((i for i, token in enumerate(ids) if token in markers), len(ids))]
