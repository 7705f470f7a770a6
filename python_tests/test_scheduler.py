"""The step scheduler, by its plans: what is computed when, where it is kept, what is shared, who waits, who yields."""

import numpy as np
import pytest
from fake_memory import (
    ENDS,
    EOS,
    SAFE,
    STARTS,
    UNSAFE,
    WORD,
    end_for,
    finish_all,
    free,
    make_scheduler,
    plan_of,
    row_of,
    rules_of,
    sampled,
    step,
    submit,
    tokens_of,
    word_for,
)

from mote_ext import _C
from mote_ext.engine.rules import path_rules
from mote_ext.generation.plan import START

ANALYSIS, GUIDANCE, RESPONSE, CHECK = range(4)


# ---- one plan


def test_a_plan_is_one_flat_batch():
    scheduler = make_scheduler()
    submit(scheduler, 7, [1, 2, 3, 4, 5], rules_of("answer"))
    submit(scheduler, 8, [9, 9], free(), prompt_id=-2)
    plan = scheduler.plan()
    assert plan.request_ids.tolist() == [8, 7], "rows stand in the order of their first token's stage"
    assert plan.token_ids.tolist() == [9, 9, 1, 2, 3, 4, 5, STARTS[RESPONSE]]
    assert plan.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert plan.stage_ids.tolist() == [-2, -2, -1, -1, -1, -1, -1, RESPONSE]
    assert plan.query_starts.tolist() == [0, 2, 8] and plan.lengths.tolist() == [2, 6]
    assert plan.page_tables.tolist() == [[2, 0], [0, 1]] and plan.num_tokens == 8
    assert plan.slots.tolist() == [8, 9, 0, 1, 2, 3, 4, 5]
    assert plan.logits_at.tolist() == [1, 7] and plan.logits_requests.tolist() == [8, 7]
    assert plan.modes.tolist() == [_C.FREE, _C.TEXT] and plan.end_ids.tolist() == [-1, -1]
    assert plan.copies.shape == (0, 2) and plan.preempted.tolist() == []
    dtypes = {name: getattr(plan, name).dtype.name for name in ("token_ids", "stage_ids", "slots", "page_tables")}
    assert dtypes == {"token_ids": "int64", "stage_ids": "int32", "slots": "int64", "page_tables": "int32"}


def test_arrays_stay_as_they_are_while_they_are_held():
    scheduler = make_scheduler()
    submit(scheduler, 1, 6, free(20))
    held = []
    for _ in range(8):
        plan = scheduler.plan()
        outcome = scheduler.commit(sampled(plan))
        held.append((plan.positions, plan.positions.copy(), outcome.tokens, outcome.tokens.copy()))
        del plan, outcome
    assert all(np.array_equal(now, then) for row in held for now, then in (row[:2], row[2:]))


def test_the_batch_is_ordered_by_stage():
    scheduler = make_scheduler()
    for number, path in enumerate(["full", "answer", "full", "answer"]):
        submit(scheduler, number, 3, rules_of(path))
    step(scheduler)
    assert scheduler.plan().stage_ids.tolist() == [ANALYSIS, ANALYSIS, RESPONSE, RESPONSE]


# ---- paths and markers


def test_markers_without_a_choice_are_never_sampled():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, rules_of("full", total=30, analysis=2))
    _, outcome = step(scheduler)
    assert tokens_of(outcome, 1) == [STARTS[ANALYSIS], WORD], "the opening is reported with the first commit"
    _, outcome = step(scheduler)
    assert tokens_of(outcome, 1) == [WORD, ENDS[ANALYSIS], STARTS[GUIDANCE]], "the limit ends the stage"
    plan, outcome = step(scheduler)
    assert row_of(plan, 1).tokens == [WORD, ENDS[ANALYSIS], STARTS[GUIDANCE]], "one forward for all three"
    assert row_of(plan, 1).stage_ids == [ANALYSIS, ANALYSIS, GUIDANCE]
    assert plan.logits_at.tolist() == [2] and plan.end_ids.tolist() == [-1], "an empty stage may not end"
    plan, outcome = step(scheduler, r1=ENDS[GUIDANCE])
    assert plan.end_ids.tolist() == [ENDS[GUIDANCE]]
    assert tokens_of(outcome, 1) == [ENDS[GUIDANCE], STARTS[RESPONSE]]
    step(scheduler)
    _, outcome = step(scheduler, r1=ENDS[RESPONSE])
    assert (outcome.finished.tolist(), outcome.reasons.tolist()) == ([1], [_C.ENDED])
    assert not scheduler.has_work and scheduler.stats()["pages_used"] == 0


def test_the_model_chooses_where_the_path_does_not():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, rules_of("adaptive"))
    plan, outcome = step(scheduler, r1=STARTS[ANALYSIS])
    assert plan.modes.tolist() == [_C.CHOOSE] and plan.choices.tolist() == [1 << ANALYSIS | 1 << RESPONSE]
    step(scheduler)
    step(scheduler, r1=ENDS[ANALYSIS])
    plan, outcome = step(scheduler, r1=STARTS[RESPONSE])
    assert plan.choices.tolist() == [1 << GUIDANCE | 1 << RESPONSE] and row_of(plan, 1).stage_ids == [ANALYSIS]


def test_without_a_path_eos_or_the_total_ends():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, free(3))
    submit(scheduler, 2, 3, free(3, eos=(EOS, 4)))
    _, outcome = step(scheduler, r2=4)
    assert (outcome.finished.tolist(), outcome.reasons.tolist()) == ([2], [_C.EOS])
    step(scheduler, r1=STARTS[GUIDANCE])
    plan, outcome = step(scheduler)
    assert row_of(plan, 1).stage_ids == [GUIDANCE], "a marker the model made opens its stage all the same"
    assert (outcome.finished.tolist(), outcome.reasons.tolist()) == ([1], [_C.TOTAL])


def test_the_check_ends_after_its_verdict():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, rules_of("answer", "flag"))
    step(scheduler)
    step(scheduler, end_for)
    plan, outcome = step(scheduler, r1=UNSAFE)
    assert row_of(plan, 1).tokens == [ENDS[RESPONSE], STARTS[CHECK]] and plan.modes.tolist() == [_C.VERDICT]
    assert tokens_of(outcome, 1) == [UNSAFE, ENDS[CHECK]] and outcome.finished.tolist() == [1]
    assert outcome.rolled_back.size == 0, "there is no other attempt"


def test_unsafe_answers_are_tried_again_from_the_prompt():
    scheduler = make_scheduler()
    attempts = [rules_of("answer", "enforce"), rules_of(("analysis", "response"), "enforce")]
    submit(scheduler, 1, 6, *attempts)
    step(scheduler), step(scheduler, end_for)
    _, outcome = step(scheduler, r1=UNSAFE)
    assert (outcome.rolled_back.tolist(), outcome.attempts.tolist()) == ([1], [1])
    assert tokens_of(outcome, 1) == [STARTS[ANALYSIS]], "what was appended after the roll-back"
    plan, _ = step(scheduler)
    assert row_of(plan, 1).positions == [6], "nothing of the prompt is computed again"
    for _ in range(3):
        step(scheduler, end_for)
    _, outcome = step(scheduler, r1=UNSAFE)
    assert outcome.finished.tolist() == [1] and outcome.rolled_back.size == 0, "that was the last attempt"
    assert scheduler.stats()["rolled_back"] == 1 and scheduler.stats()["stage_tokens"][1] == 6


PATHS = ["answer", "analysis", "full", ("guidance", "response"), "adaptive"]


@pytest.mark.parametrize("check", [False, "flag"])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_rules_are_those_of_the_stage_plan(path, check):
    for total, reserve, limits in ((40, 1, {}), (25, 9, {"analysis": 3}), (16, 4, {"response": 2, "guidance": 5})):
        plan = plan_of(path, check, total, reserve, **limits)
        rules = path_rules(plan)
        for stage, following in plan.following.items():
            for used in range(total + 3):
                if following:
                    assert rules.choices(stage, used) == sorted(plan.choices(stage, used))
                for in_stage in range(8):
                    expected = stage != START and plan.must_end(stage, in_stage, used)
                    assert expected == (stage != START and rules.must_end(stage, in_stage, used))


@pytest.mark.parametrize("check", [False, "flag"])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_chain_that_never_ends_by_itself_fits_into_its_total(path, check):
    scheduler, plan = make_scheduler(), plan_of(path, check, total=26, reserve=6)
    submit(scheduler, 1, 3, path_rules(plan))
    generated = []
    while scheduler.has_work:
        _, outcome = step(scheduler)
        generated += tokens_of(outcome, 1)
    assert generated[-1] == ENDS[plan.last_stage] and len(generated) == 26
    assert outcome.reasons.tolist() == [_C.ENDED]
    response = generated[generated.index(STARTS[RESPONSE]) + 1 : generated.index(ENDS[RESPONSE])]
    assert len(response) >= 6, "the reserve is the response's"


# ---- stage ids


def test_stage_ids_follow_the_markers_or_what_is_given():
    scheduler = make_scheduler()
    prompt = [1, STARTS[0], 2, ENDS[0], 3, ENDS[2], 4, STARTS[1], 5]
    submit(scheduler, 1, prompt, free(), prompt_id=-2)
    submit(scheduler, 2, prompt, free(), stage_ids=[0, 1, 2, 3, -1, -2, 0, 1, 2])
    plan, _ = step(scheduler)
    assert row_of(plan, 1).stage_ids == [-2, 0, 0, 0, -2, 2, -2, 1, 1]
    assert row_of(plan, 2).stage_ids == [0, 1, 2, 3, -1, -2, 0, 1, 2]
    plan, _ = step(scheduler)
    assert row_of(plan, 1).stage_ids == row_of(plan, 2).stage_ids == [1], "the stage is still open"
    assert scheduler.stage_ids(1).tolist()[-2:] == [1, 1]


# ---- chunks and the budget


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    scheduler = make_scheduler(max_batch_tokens=9)
    submit(scheduler, 1, 3, free(9))
    step(scheduler)
    submit(scheduler, 2, 21, free())
    chunks = [(row_of(plan, 1).positions, row_of(plan, 2).positions) for plan, _ in (step(scheduler) for _ in range(3))]
    assert [first for first, _ in chunks] == [[3], [4], [5]], "the decode is in every step"
    assert [rows[0] for _, rows in chunks] == [0, 8, 16] and chunks[-1][1][-1] == 20
    plan, _ = step(scheduler)
    assert plan.num_tokens == 2


@pytest.mark.parametrize(
    ("budget", "change", "ends"),
    [
        (16, 14, 14),  # a change of stage in the last quarter
        (16, 12, 12),
        (16, 11, 16),  # too early: the end of a page, which is the budget's
        (15, 5, 12),  # no change: the end of a page
        (7, 3, 7),  # no end of a page in the last quarter either
    ],
)
def test_a_chunk_is_cut_at_a_stage_or_a_page(budget, change, ends):
    scheduler = make_scheduler(max_batch_tokens=budget)
    submit(scheduler, 1, 30, stage_ids=[-1] * change + [2] * (30 - change))
    plan = scheduler.plan()
    assert plan.num_tokens == ends and plan.logits_at.size == 0
    outcome = scheduler.commit([])
    assert outcome.request_ids.size == 0
    assert row_of(scheduler.plan(), 1).positions[0] == ends


# ---- numbers


def test_the_check_ends_whatever_its_limit():
    scheduler = make_scheduler()
    rules = _C.PathRules([4, 0, 0, 8, 0], [0, 0, 6, 3], [0, 0, 3, 0], [-1] * 4, 20, CHECK, CHECK, SAFE)
    submit(scheduler, 1, 3, rules)
    for _ in range(3):
        _, outcome = step(scheduler, end_for)
    assert tokens_of(outcome, 1) == [SAFE, ENDS[CHECK]] and outcome.finished.tolist() == [1]


def test_stats_count():
    scheduler = make_scheduler()
    submit(scheduler, 1, 6, rules_of("answer", total=6))
    submit(scheduler, 2, 6, free(2), prompt_id=-2)
    finish_all(scheduler, word_for)
    stats = scheduler.stats()
    assert stats["stage_tokens"] == [7, 6, 0, 0, 4, 0], "base only, shared only, then the stages"
    assert stats["planned_tokens"] == sum(stats["stage_tokens"]) and stats["steps"] == 4
    assert stats["submitted"] == stats["finished"] == 2 and stats["prefix_query_tokens"] == 13
    assert stats["pages_total"] == stats["pages_free"] + stats["pages_cached"] == 64


def test_smallest_scheduler_and_no_markers():
    scheduler = make_scheduler(num_pages=4, page_size=1, max_batch_tokens=1, max_running=1, marker_ids=[])
    submit(scheduler, 1, [8, 8], free(2)), submit(scheduler, 2, [8, 8], free(2))
    assert finish_all(scheduler) <= 12 and scheduler.stats()["stage_tokens"] == [0, 5]


def test_the_widest_table_of_stages():
    markers = list(range(1000, 1126))
    scheduler = make_scheduler(marker_ids=markers)
    following = [0] * 64
    following[0] = (1 << 63) - 1
    rules = _C.PathRules(following, [3] * 63, [0] * 63, [-1] * 63, 9, 62)
    submit(scheduler, 1, 3, rules)
    plan, _ = step(scheduler, r1=markers[2 * 62])
    assert plan.choices.tolist() == [(1 << 63) - 1] and plan.modes.tolist() == [_C.CHOOSE]
    finish_all(scheduler)
