"""Training: MoTETrainer on transformers' Trainer, the baselines it is compared with, sharding, and one call for all."""

from mote_ext.training.arguments import MoTETrainingArguments
from mote_ext.training.baselines import BASELINES, Baseline, apply_baseline
from mote_ext.training.run import TrainingResult, train
from mote_ext.training.sharding import shard_for_training
from mote_ext.training.trainer import MoTETrainer

__all__ = [
    "BASELINES",
    "Baseline",
    "MoTETrainer",
    "MoTETrainingArguments",
    "TrainingResult",
    "apply_baseline",
    "shard_for_training",
    "train",
]
