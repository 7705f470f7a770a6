"""What test_distributed.py launches with torchrun or accelerate: the same training in several processes.

distributed_program.py FOLDER SCENARIO …       writes FOLDER/SCENARIO.json and the trained experts beside it
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models import make_base, make_model
from test_training import make_trainer, samples, step_logs, values
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import TrainerCallback

from mote_ext import compat
from mote_ext.training.experts import local_part

GLOBAL_BATCH = 4


class Gradients(TrainerCallback):
    """Notes which trained parameters and gradients are not DTensors when the optimiser steps."""

    def __init__(self):
        self.whole = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.whole = sorted(
            n for n, p in trained.items() if not (isinstance(p, DTensor) and isinstance(p.grad, DTensor))
        )


def train(folder, kind="whole", dtype=torch.float32, resume=None, recompute=False, **changes):
    """A training whose global batch does not depend on the number of processes; (trainer, model, gradients)."""
    torch.manual_seed(0)
    model = make_model(base=make_base("llama_tied").to(dtype), kind=kind, zero=True)
    gradients = Gradients()
    trainer = make_trainer(
        model,
        folder,
        samples(8),
        eval_data=samples(3),
        callbacks=[gradients],
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        **{compat.checkpointing_field(): recompute},
        **{"eval_strategy": "epoch", "save_strategy": "epoch", "num_samples": 1, "sample_max_tokens": 6, **changes},
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer, model, gradients


def run(folder, scenario):
    options = {
        "ddp": {},
        "ddp_accumulated": {"gradient_accumulation_steps": 2},
        "fsdp": {"shard": True},
        "fsdp_in_place": {"shard": True, "kind": "in_place", "recompute": True, "frozen_stages": ("analysis",)},
        "fsdp_bfloat16": {"shard": True, "dtype": torch.bfloat16},
        "launched": {},
    }[scenario]
    trainer, model, gradients = train(folder / scenario, **options)
    found = {
        "processes": trainer.args.world_size,
        "logs": step_logs(trainer),
        "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "sharded": sum(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "without_shards": gradients.whole,
        "dtypes": sorted({str(p.dtype) for p in model.parameters() if isinstance(p, DTensor)}),
    }
    if scenario in ("ddp", "fsdp"):
        checkpoint = str(folder / scenario / "checkpoint-2")
        _, resumed, _ = train(folder / f"{scenario}_resumed", resume=checkpoint, **options)
        pairs = zip(values(model).values(), values(resumed).values())
        found["resumed_is_the_same"] = all(torch.equal(_local(a), _local(b)) for a, b in pairs)
    if scenario == "fsdp":
        found["parts"] = parts_of_a_stack()
    if dist.get_rank() == 0:
        (folder / f"{scenario}.json").write_text(json.dumps(found))


def parts_of_a_stack():
    """Whether local_part says where this process's experts begin, in a stack that is cut expert by expert."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    stack = torch.arange(20.0).reshape(5, 2, 2)
    part, first = local_part(distribute_tensor(stack, mesh, [Shard(0)]))
    right = torch.tensor(torch.equal(part, stack[first : first + len(part)]) and 0 < len(part) < 5)
    dist.all_reduce(right, op=dist.ReduceOp.MIN)
    return bool(right)


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def run_command(folder):
    """mote train in every process."""
    import argparse

    from mote_ext.cli import train as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args((folder / "command.txt").read_text().split()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        if name == "command":
            run_command(Path(sys.argv[1]))
        else:
            run(Path(sys.argv[1]), name)
    dist.barrier()  # nobody tears down what another process still uses
    dist.destroy_process_group()
