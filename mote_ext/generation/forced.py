"""ForcedMarkers: an end marker and the one start marker that may follow it go through the model in one forward."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from mote_ext.generation.rules import StageRules


class ForcedMarkers(CandidateGenerator):
    """Proposes the next token where the rules leave one choice between stages; transformers' assisted loop verifies it.

    Without a proposal that loop does a plain step, so all others cost what they always do. rules: of the request.
    """

    requires_model_outputs = False

    def __init__(self, rules: StageRules) -> None:
        self.rules = rules

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        stage, num_in_stage, num_used = self.rules.states(input_ids)[0]
        following = self.rules.plan.following.get(stage, ())
        if num_in_stage >= 0 or not following or num_used == 0:
            return input_ids, None
        choices = self.rules.plan.choices(stage, num_used)
        if len(choices) != 1:
            return input_ids, None
        marker = input_ids.new_full((1, 1), self.rules.plan.table.start_id(choices[0]))
        return torch.cat((input_ids, marker), dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to learn: the proposal is certain."""
