"""StageRules: the plan of a request as a logits processor of transformers.

A function of the ids and the scores alone, with nothing remembered between calls: beams are reordered, assisted
decoding proposes and takes back, and the rules still hold.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote_ext.generation.plan import START, StagePlan


class StageRules(LogitsProcessor):
    """Leaves possible what the plan allows next, row by row.

    Between stages: start markers of legal stages. Inside one: anything but control tokens, and its own end marker after
    the first token; when its limit is reached the end marker alone. In the check: the verdict the probability of "safe"
    decides. plan: of the request; prompt_length: ids before the first generated one; eos_ids: masked everywhere.
    """

    def __init__(self, plan: StagePlan, prompt_length: int, eos_ids: list[int]) -> None:
        self.plan, self.prompt_length = plan, prompt_length
        self.controls = [*plan.table.marker_ids, *eos_ids]
        self.forces_markers = False  # whether forced.py proposes markers to the loop

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if max(self.plan.table.marker_ids) >= scores.shape[-1]:
            return scores  # an assistant model without markers: what it proposes is judged by ours
        allowed = torch.full_like(scores, -torch.inf)
        for row, (stage, num_in_stage, num_used) in enumerate(self.states(input_ids)):
            tokens = self._allowed(stage, num_in_stage, num_used, scores[row])
            if tokens is not None:
                allowed[row, tokens] = scores[row, tokens].clamp(min=torch.finfo(scores.dtype).min)
                continue
            allowed[row] = scores[row]
            allowed[row, [token for token in self.controls if token < scores.shape[-1]]] = -torch.inf
            if num_in_stage > 0:
                end = self.plan.table.end_id(stage)
                allowed[row, end] = scores[row, end]
        return allowed

    def states(self, input_ids: Tensor) -> list[tuple[int, int, int]]:
        """For each row (stage, tokens in it, tokens generated); between stages the last one with -1 tokens in it."""
        written = input_ids[:, self.prompt_length :]
        num_used = written.shape[1]
        if num_used == 0:
            return [(START, -1, 0)] * len(input_ids)
        match = written.unsqueeze(-1) == self.plan.table.on(written.device)
        place = torch.arange(1, num_used + 1, device=written.device)
        newest = (match.any(-1) * place).max(1).values  # 1-based, 0 for none
        marker = match.to(torch.int32).argmax(-1).gather(1, (newest - 1).clamp(min=0)[:, None])[:, 0]
        states = []
        for last, which in torch.stack((newest, marker), 1).tolist():
            if last == 0:
                states.append((START, -1, num_used))
            else:
                states.append((which // 2, -1 if which % 2 else num_used - last, num_used))
        return states

    def _allowed(self, stage: int, num_in_stage: int, num_used: int, scores: Tensor) -> list[int] | None:
        """Tokens that may come next, or None: the text of the stage."""
        plan, table = self.plan, self.plan.table
        if num_in_stage < 0:
            if not plan.following.get(stage, ()):
                return [table.end_id(stage)]  # the chain is over; batches and beams ask all the same
            return [table.start_id(after) for after in plan.choices(stage, num_used)]
        if plan.verdict_ids is not None and stage == table.check and num_in_stage == 0:
            safe, unsafe = plan.verdict_ids
            probability = scores.float().softmax(-1)[safe]
            return [safe if probability >= plan.check_threshold else unsafe]
        return [table.end_id(stage)] if plan.must_end(stage, num_in_stage, num_used) else None
