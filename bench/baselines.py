"""What else computes y + Σ_e scales[e] · B[e] A[e] x: the opponents of bench_ops.py, each as its users write it.

    peft_loop      expert after expert: index its rows, two products, scale, index_add (PEFT's mixed batches)
    masked_dense   all experts for all tokens in two products, the inactive ones masked out between them
    grouped        sort the tokens by stage, torch's grouped_mm over the segments, back through the inverse permutation

Each adds onto the y it is given, in place where its users do. Everything that depends on the ids alone (row lists,
mask, permutation) is made once, outside the timing, and so is each opponent's own layout of the experts: none of them
gets that for free in a model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Problem:
    """One linear and its experts. The tensors an opponent differentiates are x and its own two layouts of A and B."""

    x: Tensor  # [T, K]
    weight: Tensor  # [N, K]
    lora_A: Tensor  # [E, r, K], the shared expert last
    lora_B: Tensor  # [E, N, r]
    stage_ids: Tensor  # [T] int32 in [0, S)
    scales: Tensor  # [E] float32

    @property
    def num_stages(self):
        return self.lora_A.shape[0] - 1


def base(problem):
    return F.linear(problem.x, problem.weight)


class PeftLoop:
    name = "peft_loop"

    def __init__(self, problem):
        self.leaves = [t.detach().clone() for pair in zip(problem.lora_A, problem.lora_B) for t in pair]
        rows = [(problem.stage_ids == stage).nonzero().squeeze(1) for stage in range(problem.num_stages)]
        everyone = len(problem.stage_ids)
        # An expert that all tokens use is not indexed; one that none uses is left out.
        self.rows = [None if len(r) == everyone else r for r in rows] + [None]
        self.scales = problem.scales.tolist()

    def __call__(self, x, y, leaves):
        for expert, rows in enumerate(self.rows):
            A, B, scale = leaves[2 * expert], leaves[2 * expert + 1], self.scales[expert]
            if rows is None:
                y = y.add_(F.linear(F.linear(x, A), B) * scale)
            elif len(rows):
                y = y.index_add_(0, rows, F.linear(F.linear(x[rows], A), B) * scale)
        return y


class MaskedDense:
    name = "masked_dense"

    def __init__(self, problem):
        num_experts, rank, num_in = problem.lora_A.shape
        stacked_B = problem.lora_B.permute(0, 2, 1).reshape(num_experts * rank, -1)
        self.leaves = [problem.lora_A.reshape(num_experts * rank, num_in).clone(), stacked_B.clone()]
        active = problem.stage_ids[:, None] == torch.arange(num_experts, device=problem.x.device)
        active[:, -1] = True
        self.mask = (active * problem.scales).to(problem.x.dtype).repeat_interleave(rank, dim=1)

    def __call__(self, x, y, leaves):
        stacked_A, stacked_B = leaves
        return y.addmm_(F.linear(x, stacked_A) * self.mask, stacked_B)


class Grouped:
    name = "grouped_mm"

    def __init__(self, problem):
        self.leaves = [problem.lora_A.clone(), problem.lora_B.clone()]
        self.order = torch.sort(problem.stage_ids, stable=True).indices
        counts = torch.bincount(problem.stage_ids, minlength=problem.num_stages)
        self.ends = counts.cumsum(0).to(torch.int32)
        self.scales = problem.scales[:-1][problem.stage_ids[self.order].long(), None].to(problem.x.dtype)
        self.shared_scale = problem.scales[-1].item()

    def __call__(self, x, y, leaves):
        lora_A, lora_B = leaves
        z = F.grouped_mm(x[self.order], lora_A[:-1].transpose(1, 2), offs=self.ends) * self.scales
        y = y.index_add_(0, self.order, F.grouped_mm(z, lora_B[:-1].transpose(1, 2), offs=self.ends))
        return y.add_(F.linear(F.linear(x, lora_A[-1]), lora_B[-1]) * self.shared_scale)


class Compiled:
    """Another opponent, through torch.compile."""

    def __init__(self, opponent):
        self.name = f"compiled_{opponent.name}"
        self.leaves = opponent.leaves
        self.call = torch.compile(opponent, dynamic=False)

    def __call__(self, x, y, leaves):
        return self.call(x, y, leaves)


def opponents(problem):
    """Those that work on this device and dtype with this torch."""
    chosen = [PeftLoop(problem), MaskedDense(problem)]
    if _has_grouped_mm(problem):
        chosen.append(Grouped(problem))
    if problem.x.is_cuda:
        chosen.append(Compiled(MaskedDense(problem)))
    return chosen


def _has_grouped_mm(problem):
    """grouped_mm exists since torch 2.10 and refuses some devices and dtypes; asking it is the only way to know."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        grouped = Grouped(problem)
        grouped(problem.x, torch.zeros_like(base(problem)), grouped.leaves)
    except (RuntimeError, NotImplementedError):
        return False
    return True
