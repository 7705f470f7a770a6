"""One training step of a real model: MoTE against PEFT with one LoRA of the same active rank, in one run.

    python bench/bench_training.py --json FILE [pytest options]      then bench/report.py makes the table

SmolLM2-135M-Instruct in float32 on the CPU: forward, backward and AdamW on four chains of 160 tokens, the loss on what
follows the question. PEFT's rank 32 is what is active for a token of MoTE at rank 16: its stage's expert and the shared
one. ours_skipping adds the step-skipping mask; ours_all_logits is our model with the loss of transformers, as any other
trainer runs it. Activations are counted, not guessed: what autograd saves for the backward pass, parameters left out.
"""

import copy
import sys
from pathlib import Path

import command
import pytest
import torch
from bench_ops import RANK, cpu_name, measure_on_cpu, race
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mote_ext
from mote_ext.chains import StepSkipping
from mote_ext.training.loss import NO_LOSS, labelled_losses, loss_columns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import smollm2

BATCH, LENGTH, QUESTION = 4, 160, 40


def make_batch(model):
    """Chains of analysis, guidance and response of random words behind a question."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (BATCH, LENGTH), generator=generator)
    table = model.routing.table
    for stage, (first, last) in enumerate(((QUESTION, 80), (80, 120), (120, LENGTH))):
        ids[:, first], ids[:, last - 1] = table.start_id(stage), table.end_id(stage)
    labels = ids.clone()
    labels[:, :QUESTION] = NO_LOSS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def without_markers(batch):
    """The same for a model that has no rows for markers: another token in their places."""
    plain = {name: value.clone() for name, value in batch.items()}
    for name in ("input_ids", "labels"):
        plain[name][plain[name] > 49000] = 999
    return plain


class Step:
    """A training step, again and again on the same batch."""

    def __init__(self, model, batch, loss):
        self.model, self.batch, self.loss = model.train(), batch, loss
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0)

    def __call__(self):
        loss = self.loss(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def saved_bytes(self):
        """What autograd keeps between the forward and the backward pass, each piece of memory once."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(self.model, self.batch)
        total = sum(saved.values())
        del loss
        return total

    def state_bytes(self):
        """Trained parameters, their gradients and AdamW's two moments."""
        return 4 * sum(parameter.nbytes for parameter in self.trained)


def plain_loss(model, batch):
    return model(**batch).loss


def skipping_loss(model, batch):
    """What MoTETrainer computes with step skipping; its mask is made anew in each step."""
    skipping = StepSkipping(model.routing.table, p_dropout=0.5)
    rows = torch.arange(BATCH)[:, None]
    return trainer_loss(model, skipping.inputs(model, {**batch, "rows": rows}, epoch=0))


def trainer_loss(model, batch):
    """What MoTETrainer computes: logits of the columns with labels alone."""
    labels, columns = batch["labels"], loss_columns(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    _, losses, targets = labelled_losses(model, inputs, labels, columns)
    return losses.sum() / (targets != NO_LOSS).sum()


@pytest.mark.parametrize("threads", [1, 2])
def test_training_step_of_a_model(benchmark, threads, quiet):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    folder = smollm2.convert()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = mote_ext.MoTEForCausalLM.from_base(
        copy.deepcopy(base), mote_ext.MoTEConfig(r=RANK), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    batch = make_batch(wrapped)
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=2 * RANK, lora_alpha=RANK, target_modules="all-linear"))
    contenders = {
        "ours": Step(wrapped, batch, trainer_loss),
        "ours_skipping": Step(copy.deepcopy(wrapped), batch, skipping_loss),
        "ours_all_logits": Step(copy.deepcopy(wrapped), batch, plain_loss),
        f"peft_rank_{2 * RANK}": Step(peft, without_markers(batch), plain_loss),
    }
    # The loss that is timed is the ordinary one.
    assert torch.allclose(trainer_loss(wrapped, batch), plain_loss(wrapped, batch), rtol=1e-5)
    activations = {name: step.saved_bytes() for name, step in contenders.items()}
    medians = race(benchmark, measure_on_cpu, contenders, budget_s=90)
    torch.set_num_threads(before)
    benchmark.extra_info.update(
        op="training_step",
        T=BATCH * LENGTH,
        K=0,
        pattern="chains",
        dtype="float32",
        threads=threads,
        device=cpu_name(),
        medians_us={name: round(value * 1e6, 1) for name, value in medians.items()},
        activation_bytes=activations,
        state_bytes={name: step.state_bytes() for name, step in contenders.items()},
        quiet_share=quiet(),
        versions={"torch": torch.__version__, "mote_ext": mote_ext.__version__, "cuda": None},
    )


if __name__ == "__main__":
    command.run(__file__, __doc__)
