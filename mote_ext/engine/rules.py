"""A request's stage rules, as the scheduler counts them: numbers of mote_ext/generation/plan.py, told to the C++ core.

Which stages may follow, the fewest tokens a chain still needs and the limits are StagePlan's; the scheduler applies
them token by token, so that markers without a choice need no forward of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from mote_ext import _C
from mote_ext.config import MoTEConfig
from mote_ext.engine.params import SamplingParams
from mote_ext.generation.plan import START, StagePlan, escalation, make_plan
from mote_ext.stages import StageTable

NO_LIMIT = -1


def plans_of(params: SamplingParams, config: MoTEConfig, table: StageTable) -> list[StagePlan]:
    """The plan of each attempt: one, or those of "escalate"; none with path=None. ValueError: make_plan's."""
    if params.path is None:
        return []
    escalates = params.path == "escalate"
    make = (params.max_new_tokens, params.stage_max_tokens, params.response_reserve)
    paths = escalation(table) if escalates else [params.path]
    return [make_plan(config, table, path, "enforce" if escalates else params.check, *make) for path in paths]


def attempts_of(plans: Sequence[StagePlan], params: SamplingParams, eos_ids: list[int]) -> list[_C.PathRules]:
    """What the scheduler is told of these plans; without any, a free run that ends with an eos id."""
    if not plans:
        return [_C.PathRules.free(params.max_new_tokens, eos_ids)]
    return [path_rules(plan) for plan in plans]


def path_rules(plan: StagePlan) -> _C.PathRules:
    """One plan as numbers; stages that the path does not touch are never asked about."""
    stages = range(len(plan.table))
    touched = [stage for stage in stages if stage in plan.following]
    checks = plan.verdict_ids is not None
    return _C.PathRules(
        following=[_bits(plan.following.get(stage, ())) for stage in (START, *stages)],
        whole=[plan.whole(stage) if stage in touched else 0 for stage in stages],
        tail=[plan.tail(stage) if stage in touched else 0 for stage in stages],
        limits=[plan.limits.get(stage, NO_LIMIT) for stage in stages],
        max_new_tokens=plan.max_new_tokens,
        last_stage=plan.last_stage,
        check_stage=plan.table.check if checks else -1,
        safe_id=plan.verdict_ids[0] if checks else -1,
    )


def _bits(stages: Sequence[int]) -> int:
    return sum(1 << stage for stage in stages)
