"""MoTETrainer: transformers' Trainer for a MoTE model of either kind.

What is added: step skipping and prompt experts by keyed draws, a loss over the labelled columns alone, marker rows at a
learning rate of their own, frozen experts, loss, token share and gradient norm of every stage in the logs, and
checkpoints that hold the experts alone and resume bit for bit. Methods of Trainer that begin with an underscore are
overridden where it has no other place for this: reading a checkpoint, and the optimiser's state of a sharded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from mote_ext import compat, keyed
from mote_ext.capabilities import MoTECapabilities
from mote_ext.chains.attention_mask import PackingProbe
from mote_ext.chains.block_mask import StepSkipping, sent
from mote_ext.chains.collator import ChainCollator
from mote_ext.chains.dataset import NO_LOSS
from mote_ext.checkpoint import load_experts, mote_config_of, require_same_run
from mote_ext.stages import stage_ids_from_tokens
from mote_ext.training import sharding
from mote_ext.training.arguments import MoTETrainingArguments
from mote_ext.training.experts import FrozenExperts, gradient_norms, marker_parameters
from mote_ext.training.loss import COLUMNS, ROWS, AnnotatingCollator, StageLosses, labelled_losses, stage_sums
from mote_ext.training.samples import SampleWriter


class MoTETrainer(Trainer):
    """Arguments as Trainer's.

    model:            MoTEForCausalLM or a model of get_mote_model; a quantised base too (one process, or DDP)
    args:             MoTETrainingArguments
    train_dataset, eval_dataset: ChainDataset, or any with items {"input_ids", "labels", "row"}
    processing_class: the tokenizer
    data_collator:    default ChainCollator(tokenizer, packing=args.packing); another one's batches need "rows" for step
                      skipping. Evaluations are padded: a packing ChainCollator packs in training alone
    TypeError: not a MoTE model. ValueError: frozen_stages names no expert; no collator and no tokenizer;
    dispatch_batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: MoTETrainingArguments,
        *,
        data_collator: Callable | None = None,
        processing_class=None,
        **kwargs,
    ) -> None:
        if not isinstance(model, MoTECapabilities):
            raise TypeError(
                f"MoTETrainer: model must be a MoTE model, made by MoTEForCausalLM or get_mote_model, got "
                f"{type(model).__name__}"
            )
        if data_collator is None:
            if processing_class is None:
                raise ValueError("MoTETrainer: pass processing_class=tokenizer, or data_collator=")
            data_collator = ChainCollator(processing_class, packing=args.packing)
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "MoTETrainer: accelerator_config.dispatch_batches must be left out; it cuts a batch's tensors by rows, "
                "and the loss's columns have none"
            )
        args.accelerator_config.dispatch_batches = False  # None would be True for an IterableDataset
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel's threads would share one stage context: several GPUs are torchrun's
        with compat.trainable_on_a_quantised_base(model):
            super().__init__(
                model, args, AnnotatingCollator(data_collator), processing_class=processing_class, **kwargs
            )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the number of targets, whatever forward takes
        table = model.routing.table
        self.skipping = StepSkipping(table, args.p_dropout, args.seed, args.compact_positions)
        self._packing = PackingProbe()
        self._losses = {mode: StageLosses(table) for mode in ("train", "eval")}
        self._norms: dict[str, Tensor] = {}
        self._frozen = FrozenExperts(model, args.frozen_stages) if args.frozen_stages else None
        if self._frozen is not None:
            self.add_callback(self._frozen)
        if args.num_samples and self.eval_dataset is not None:
            self.add_callback(SampleWriter(self, args.num_samples, args.sample_max_tokens))

    # ---- the step

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Sum of the labelled tokens' losses over num_items_in_batch, the number of targets of the whole step.

        returns: a scalar, and with return_outputs the model's outputs, whose logits are those of the labelled columns
        """
        batch = dict(inputs)
        labels, columns = batch.pop("labels"), batch.pop(COLUMNS, None)
        if columns is None or (return_outputs and not self._loss_alone):
            columns = torch.arange(labels.shape[1] - 1, device=labels.device)
        batch = self._routed(batch, model.training)
        outputs, losses, targets = labelled_losses(model, batch, labels, columns)
        self._note(model.training, losses, targets, columns, inputs)
        if num_items_in_batch is None:
            loss = losses.sum() / (targets != NO_LOSS).sum().clamp(min=1)
        else:
            loss = losses.sum() / torch.as_tensor(num_items_in_batch, device=losses.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP and FSDP average over the processes
        return (loss, outputs) if return_outputs else loss

    def _note(self, training: bool, losses: Tensor, targets: Tensor, columns: Tensor, inputs: dict) -> None:
        """Adds up the losses by stage; in an evaluation those of all processes, rows that fill up a batch left out."""
        table, given = self.model.routing.table, {name: inputs.get(name) for name in ("position_ids", "stage_ids")}
        sums = stage_sums(losses, targets, columns, inputs["input_ids"], table, **given)
        self._losses["train" if training else "eval"].add(sums if training else self.gather_function(sums))

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Trainer's; once the gradients of an optimiser step are complete, frozen experts lose theirs."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self._frozen is not None:
                self._frozen.zero_gradients()
            if self._logs_this_step():
                scaler = self.accelerator.scaler
                self._norms = gradient_norms(self.model, 1.0 if scaler is None else scaler.get_scale())
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's; where logits are wanted they are made of all columns but the last."""
        self._loss_alone = prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    _loss_alone = False

    def _routed(self, batch: dict, training: bool) -> dict:
        """The batch as the model takes it: prompt experts drawn, attention between stages dropped."""
        rows = batch.pop(ROWS, None)
        config = mote_config_of(self.model)
        drawn = training and config.train_prompt_expert == "random" and "stage_ids" not in batch
        skips = training and self.args.p_dropout > 0 and len(self.skipping.pairs) > 0
        if not skips and "position_ids" in batch and "attention_mask" not in batch:
            self._packing.require(self.model)
        if not (drawn or skips):
            return batch
        if rows is None:
            wanted = "step skipping" if skips else "random prompt experts"
            change = "p_dropout=0" if skips else "the configuration's train_prompt_expert to another value"
            raise ValueError(
                f"MoTETrainer: {wanted} are drawn by row, and the batch has no rows; let the collator pass the samples"
                f"' numbers on as `rows`, or set {change}"
            )
        epoch = int(self.state.epoch or 0)
        if drawn:
            batch["stage_ids"] = self._drawn_stage_ids(batch, rows, epoch)
        if skips:
            batch = self.skipping.inputs(self.model, {**batch, "rows": torch.tensor(rows)}, epoch)
        return batch

    def _drawn_stage_ids(self, batch: dict, rows: list[list[int]], epoch: int) -> Tensor:
        """[B, T]: stage ids with the prompt of each row, in a packed batch of each document, in a stage of its own."""
        table, positions, ids = self.model.routing.table, batch.get("position_ids"), batch["input_ids"]
        stages = [[keyed.integer(len(table), "prompt", self.args.seed, epoch, row) for row in line] for line in rows]
        prompt = sent(stages, torch.int32, ids.device)
        if prompt.shape[1] > 1:
            prompt = prompt.gather(1, (positions == 0).cumsum(1) - 1)
        return stage_ids_from_tokens(ids, table, prompt_id=prompt, position_ids=positions)

    # ---- the optimiser, one process or several

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; a sharded model is not wrapped again."""
        if not self.args.shard:
            super().create_accelerator_and_postprocess()
            return
        with sharding.without_accelerates_own():
            super().create_accelerator_and_postprocess()
        sharding.leave_sharded_models_alone(self.accelerator)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's, the marker rows in a group of their own: marker_learning_rate and no weight decay."""
        if self.args.shard:
            if self.optimizer is not None and not sharding.is_sharded(self.model):
                raise ValueError(
                    "MoTETrainer: optimizers= holds parameters that sharding replaces, so it would train nothing; "
                    "leave it out, or call shard_for_training before the optimiser is made"
                )
            sharding.shard_for_training(self.model, device_type=self.args.device.type)
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            markers = {id(parameter): parameter for parameter in marker_parameters(self.model)}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in markers]
            if markers:
                own = {"lr": self.args.marker_learning_rate, "weight_decay": 0.0}
                optimizer.add_param_group({"params": list(markers.values()), **own})
        return self.optimizer

    # ---- evaluations

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's, padded."""
        with self._padded():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """Trainer's, padded."""
        with self._padded():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _padded(self) -> Iterator[None]:
        """Inside, a packing ChainCollator pads: samples that several processes get twice, to fill up the last batch,
        can be left out of the losses by rows alone."""
        given = self.data_collator
        collator = getattr(given, "collator", None)
        if isinstance(collator, ChainCollator) and collator.packing:
            self.data_collator = AnnotatingCollator(ChainCollator(collator.pad_id))
        try:
            yield
        finally:
            self.data_collator = given

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; a step's logs get loss/STAGE, tokens/STAGE and grad_norm/EXPERT: the loss of a target, the
        share of the targets and the norm before clipping."""
        if "loss" in logs:
            sums = self._losses["train"].take(lambda tensor: self.accelerator.reduce(tensor, "sum"))
            total = sum(count for _, count in sums.values())
            for name, (loss, count) in sums.items():
                logs[f"loss/{name}"], logs[f"tokens/{name}"] = loss / count, count / total
            logs.update({f"grad_norm/{name}": norm.item() for name, norm in self._norms.items()})
            self._norms = {}
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Trainer's; PREFIX_loss is the mean over all targets, however batched, and PREFIX_loss/STAGE a stage's."""
        self._losses["eval"].take()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._losses["eval"].take()
        for name, (loss, count) in sums.items():
            output.metrics[f"{metric_key_prefix}_loss/{name}"] = loss / count
        if sums:
            losses, counts = zip(*sums.values())
            output.metrics[f"{metric_key_prefix}_loss"] = sum(losses) / sum(counts)
        return output

    def _logs_this_step(self) -> bool:
        """Whether the optimiser step that is due may be logged: the callbacks decide only after it."""
        if self.args.logging_strategy != "steps":
            return self.args.logging_strategy != "no"
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (self.args.logging_first_step and step == 1)

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter folder and the tokenizer, of a sharded model too; for every process to call."""
        directory, writes = output_dir or self.args.output_dir, self.args.should_save
        self.model.save_pretrained(directory, adapter_only=True, is_main_process=writes)
        if writes and self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        require_same_run(mote_config_of(self.model), resume_from_checkpoint)
        load_experts(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_experts(self.model, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.gathered_optimizer_state(self.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharding.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        sharding.spread_optimizer_state(self.model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
