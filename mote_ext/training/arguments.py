"""MoTETrainingArguments: transformers' TrainingArguments and what only a model with stages needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

MARKER_RATE = 4.0  # of learning_rate; a choice: rows that begin as means of words have further to go than experts


@dataclass
class MoTETrainingArguments(TrainingArguments):
    """Fields beyond TrainingArguments, whose own keep their meaning (weight_decay is 0 by default there too).

    p_dropout:            probability of each droppable block of attention between stages (step skipping); 0 for none
    compact_positions:    position ids close up where a stage is fully hidden (see chains.StepSkipping)
    marker_learning_rate: of the marker rows; default 4 × learning_rate
    frozen_stages:        stage names, and "shared": experts that stay bit for bit as they are
    packing:              the default collator puts a batch into one row without padding
    num_samples:          answers generated in each evaluation, to the first questions of the evaluation data
    sample_max_tokens:    tokens each; they are written to output_dir/samples, never to the terminal
    shard:                FSDP2: parameters, gradients and optimiser states spread over the processes. Set by
                          `accelerate launch` with an FSDP configuration
    seed:                 also of the keyed draws of step skipping and of random prompt experts
    """

    p_dropout: float = field(default=0.5, metadata={"help": "Probability of dropping each block between stages."})
    compact_positions: bool = field(default=False, metadata={"help": "Close up positions of fully hidden stages."})
    marker_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the marker rows; default 4 x learning_rate."}
    )
    frozen_stages: list[str] = field(default_factory=list, metadata={"help": "Experts that are not trained."})
    packing: bool = field(default=False, metadata={"help": "Pack each batch into one row without padding."})
    num_samples: int = field(default=0, metadata={"help": "Answers generated in each evaluation."})
    sample_max_tokens: int = field(default=128, metadata={"help": "Most tokens of each of them."})
    shard: bool = field(default=False, metadata={"help": "Shard everything over the processes (FSDP2)."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Reads the loss back at every step."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Samples have a `row` beside the inputs."})

    def __post_init__(self) -> None:
        frozen = self.frozen_stages
        self.frozen_stages = [frozen] if isinstance(frozen, str) else list(frozen)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # stacked experts all have a gradient, zeros where no token was
        if self.fsdp:
            raise ValueError("MoTETrainingArguments: fsdp must be left out, shard=True is FSDP2 for fp32 experts")
        if self.label_smoothing_factor:
            raise ValueError(
                f"MoTETrainingArguments: label_smoothing_factor must be 0, got {self.label_smoothing_factor}; the loss "
                "is the cross-entropy of the labelled tokens alone"
            )
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            self.shard = True
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate takes the processes of torchrun for single ones
            self.dataloader_pin_memory = False  # torch warns of it on a CPU, every epoch
        super().__post_init__()
        if not 0 <= self.p_dropout <= 1:
            raise ValueError(f"MoTETrainingArguments: p_dropout must be in 0..1, got {self.p_dropout}")
        if self.marker_learning_rate is None:
            self.marker_learning_rate = MARKER_RATE * self.learning_rate

    @property
    def place_model_on_device(self) -> bool | None:
        """Trainer's; a model that is to be sharded goes onto the device layer by layer, as parts."""
        return False if self.shard else super().place_model_on_device
