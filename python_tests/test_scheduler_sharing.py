"""What the scheduler shares and takes: prefixes, who is admitted and who yields, samples of one prompt, roll-backs."""

import numpy as np
import pytest
from fake_memory import (
    ENDS,
    OTHER,
    STARTS,
    WORD,
    finish_all,
    free,
    hits_of,
    make_scheduler,
    row_of,
    rules_of,
    sampled,
    step,
    submit,
    tokens_of,
    word_for,
)

ANALYSIS, GUIDANCE, RESPONSE, CHECK = range(4)


# ---- prefixes


@pytest.mark.parametrize(("length", "found"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_full_pages_of_a_prefix_are_found_and_a_token_is_left(length, found):
    scheduler = make_scheduler()
    submit(scheduler, 1, 11, free(1))
    step(scheduler)
    assert hits_of(scheduler, 2, length) == scheduler.num_cached(2) == found
    assert scheduler.stats()["prefix_hit_tokens"] == found


def test_generated_tokens_are_found_too_with_their_stages():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, rules_of("answer", total=12))
    while scheduler.has_work:
        if scheduler.stats()["steps"] == 8:
            chain = scheduler.tokens(1)
        step(scheduler)
    assert hits_of(scheduler, 2, chain) == 8
    assert hits_of(scheduler, 3, chain, stage_ids=[-1] * len(chain)) == 0, "the same tokens of another stage"


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({"experts": 1, "prompt_id": -2}, {"experts": 2, "prompt_id": -2}, 8),  # the base alone: for all experts
        ({"experts": 1}, {"experts": 2}, 0),
        ({"experts": 1}, {"experts": 1}, 8),
        ({"salt": 1}, {"salt": 2}, 0),
        ({"salt": 1}, {"salt": 1}, 8),
        ({"prompt_id": -2}, {"prompt_id": -1}, 0),
        (
            {"experts": 1, "stage_ids": [-2] * 7 + [-1] * 4},
            {"experts": 2, "stage_ids": [-2] * 7 + [-1] * 4},
            4,  # the second page holds a token of an expert
        ),
    ],
    ids=str,
)
def test_what_is_shared_depends_on_experts_stages_and_salt(first, second, found):
    scheduler = make_scheduler()
    submit(scheduler, 1, 11, free(1), **first)
    step(scheduler)
    assert hits_of(scheduler, 2, 11, free(1), **second) == found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, 4),
        ({"prompt": [1, 2, 3, 5, 9]}, 0),
        ({"salt": 1}, 0),
        ({"experts": 1}, 0),
        ({"experts": 1, "prompt_id": -2}, 0),
        ({"stage_ids": [-1, -1, -1, 0, -1]}, 0),
    ],
    ids=str,
)
def test_colliding_keys_find_nothing_wrong(change, found):
    scheduler = make_scheduler(_key_bits=0)
    submit(scheduler, 1, [1, 2, 3, 4, 9], free(1))
    step(scheduler)
    second = {"prompt": [1, 2, 3, 4, 9], **change}
    assert hits_of(scheduler, 2, second.pop("prompt"), free(1), **second) == found


def test_a_page_behind_another_prefix_is_another_page():
    scheduler = make_scheduler(_key_bits=0)
    submit(scheduler, 1, [1] * 4 + [2] * 4 + [3], free(1))
    step(scheduler)  # its second page has pushed the first one out: they have the same key
    assert hits_of(scheduler, 2, [2] * 4 + [3], free(1)) == 0


def test_no_prefix_is_shared_when_that_is_off():
    scheduler = make_scheduler(share_prefixes=False)
    submit(scheduler, 1, 11, free(1))
    step(scheduler)
    assert hits_of(scheduler, 2, 11) == 0 and scheduler.stats()["pages_cached"] == 0


def test_the_same_prompt_computed_twice_is_kept_once():
    scheduler = make_scheduler()
    submit(scheduler, 1, 9), submit(scheduler, 2, 9)
    step(scheduler)
    plan, _ = step(scheduler)
    assert row_of(plan, 1).table[:2] == row_of(plan, 2).table[:2]
    assert scheduler.stats()["pages_used"] == 2 + 2, "two shared, and one each"


def test_the_tail_that_was_used_longest_ago_goes_first():
    scheduler = make_scheduler(num_pages=8)
    for number, begin in ((1, 0), (2, 20)):
        submit(scheduler, number, np.arange(begin, begin + 13), free(1))
        step(scheduler)
    assert scheduler.stats()["pages_cached"] == 6
    submit(scheduler, 3, [60] * 13, free(1))  # four pages, of which two are free
    step(scheduler)
    assert scheduler.stats()["evictions"] == 2
    assert hits_of(scheduler, 4, np.arange(13), free(1)) == 4, "the head of the older one is left"
    assert scheduler.stats()["evictions"] == 4
    assert hits_of(scheduler, 5, np.arange(20, 33), free(1)) == 4, "the next were the tails of the other one"


def test_dropping_the_cache_also_drops_what_runs():
    scheduler = make_scheduler()
    submit(scheduler, 1, 9, free(1))
    submit(scheduler, 2, np.arange(30, 39), free(9))
    step(scheduler)
    scheduler.drop_cache()
    assert scheduler.stats()["pages_cached"] == 0
    finish_all(scheduler)
    assert scheduler.stats()["pages_cached"] == 0, "computed by the experts of before"
    assert hits_of(scheduler, 3, 9) == 0 and hits_of(scheduler, 4, np.arange(30, 39)) == 0
    assert hits_of(scheduler, 5, 9) == 8


# ---- admission, order and preemption


@pytest.mark.parametrize(("pages", "admitted"), [(3, True), (4, False)])
def test_pages_are_reserved_and_a_margin_left(pages, admitted):
    scheduler = make_scheduler(num_pages=10, safety_margin=0.2)
    submit(scheduler, 1, 16, free(8))  # 4 of 10 pages, and one more for its next token
    submit(scheduler, 2, np.arange(4 * pages) + 20, free(4))  # 3 and that one and 2 of margin are 6
    submit(scheduler, 3, np.arange(4) + 40, free(4))
    plan = scheduler.plan()
    assert sorted(plan.request_ids) == ([1, 2] if admitted else [1]), "nobody overtakes: 3 waits although it would fit"


def test_alone_a_request_needs_no_margin():
    scheduler = make_scheduler(num_pages=4, safety_margin=0.9)
    submit(scheduler, 1, 14, free(2))
    assert scheduler.plan() is not None


def test_the_longest_prefix_goes_first_until_others_have_waited_enough():
    scheduler = make_scheduler(max_running=1, max_passed_over=2)
    submit(scheduler, 0, 9, free(1))
    step(scheduler)
    submit(scheduler, 1, [45] * 9, free(1))
    for number in (2, 3, 4):
        submit(scheduler, number, 9, free(1))
    order = [step(scheduler)[0].request_ids.tolist()[0] for _ in range(4)]
    assert order == [2, 3, 1, 4]


def test_priority_comes_before_everything():
    scheduler = make_scheduler(max_running=1)
    for number, priority in enumerate([0, 5, -1, 5]):
        submit(scheduler, number, 3, free(1), priority=priority)
    assert [step(scheduler)[0].request_ids.tolist()[0] for _ in range(4)] == [1, 3, 0, 2]


def test_a_preempted_request_returns_through_its_own_pages():
    scheduler = make_scheduler(num_pages=9)
    submit(scheduler, 1, 12, free(12)), submit(scheduler, 2, np.arange(30, 42), free(20))
    tokens = {1: [], 2: []}
    preempted = []
    for _ in range(60):
        if not scheduler.has_work:
            break
        plan, outcome = step(scheduler)
        preempted += [(i, scheduler.stats()["steps"]) for i in plan.preempted.tolist()]
        for request_id in outcome.request_ids.tolist():
            tokens[request_id] += tokens_of(outcome, request_id)
        if preempted and 2 in plan.request_ids and 2 not in plan.preempted and len(preempted) == 1:
            row = row_of(plan, 2)
            assert row.positions[0] >= 12, "its prompt and more is found again"
            preempted.append("returned")
    assert preempted[0][0] == 2 and "returned" in preempted, "the younger one with more to come yields"
    assert len(tokens[1]) == 12 and len(tokens[2]) == 20


def first_to_yield(scheduler, moved_on=()):
    """Steps until pages are taken from somebody. moved_on: requests whose stages before the response end at once."""
    while True:
        plan = scheduler.plan()
        if plan.preempted.size:
            return plan.preempted.tolist()[0]
        rows = zip(plan.logits_requests, plan.modes, plan.end_ids, plan.choices)
        ends = {request_id: end for request_id, _, end, _ in rows if request_id in moved_on and end in ENDS[:RESPONSE]}
        scheduler.commit(sampled(plan, **{f"r{request_id}": end for request_id, end in ends.items()}))


@pytest.mark.parametrize(
    ("others", "victim"),
    [
        ([{}, {}], 2),  # all the same: the youngest
        ([{"total": 40}, {}], 1),  # the one with most to come
        ([{"priority": 0}, {"priority": 1}], 1),  # the lowest priority
        ([{"path": "answer"}, {}], 2),  # in its last stage: soon done
        ([{}, {"path": "answer"}], 1),
        ([{}, {"moved_on": True}], 1),
    ],
    ids=str,
)
def test_who_yields(others, victim):
    scheduler = make_scheduler(num_pages=12)
    submit(scheduler, 0, 8, rules_of("full", total=20), priority=2)
    for number, other in enumerate(others, 1):
        rules = rules_of(other.get("path", "full"), total=other.get("total", 20))
        submit(scheduler, number, np.arange(8) + 40 * number, rules, priority=other.get("priority", 0))
    moved_on = {number for number, other in enumerate(others, 1) if "moved_on" in other}
    assert first_to_yield(scheduler, moved_on) == victim


def test_the_first_never_yields():
    scheduler = make_scheduler(num_pages=12)
    for number, total in enumerate([40, 20, 20]):
        submit(scheduler, number, np.arange(8) + 40 * number, rules_of("full", total=total))
    assert first_to_yield(scheduler) == 2, "although the first has most to come"


def test_the_last_stage_yields_last_however_long_answers_are():
    scheduler = make_scheduler(num_pages=9)
    submit(scheduler, 9, 8, rules_of("answer", total=24))  # what is expected of a response from now on
    finish_all(scheduler, word_for)
    scheduler.drop_cache()
    for number, (path, total) in enumerate([("full", 28), ("answer", 28), ("full", 10)]):
        submit(scheduler, number, np.arange(8) + 40 * number, rules_of(path, total=total))
    assert first_to_yield(scheduler) == 2


# ---- forks


def test_samples_share_the_prompt_and_copy_what_they_write():
    scheduler = make_scheduler()
    submit(scheduler, [1, 2, 3], 6, free(4))
    plan, outcome = step(scheduler, r1=10, r2=11, r3=12)
    assert plan.request_ids.tolist() == [1] and plan.num_tokens == 6, "computed once"
    assert plan.logits_at.tolist() == [5, 5, 5] and plan.logits_requests.tolist() == [1, 2, 3]
    assert outcome.request_ids.tolist() == [1, 2, 3] and outcome.tokens.tolist() == [10, 11, 12]
    plan, _ = step(scheduler)
    rows = [row_of(plan, i) for i in (1, 2, 3)]
    assert [row.tokens for row in rows] == [[10], [11], [12]]
    assert len({row.table[0] for row in rows}) == 1 and len({row.table[1] for row in rows}) == 3
    assert len(plan.copies) == 2, "the last one writes in place"
    assert {int(page) for page in plan.copies[:, 0]} <= {row.table[1] for row in rows}
    finish_all(scheduler)
    assert scheduler.stats()["copies"] == 2 and scheduler.stats()["finished"] == 3


def test_a_sample_can_go_before_the_fork():
    scheduler = make_scheduler(max_batch_tokens=4)
    submit(scheduler, [1, 2, 3], 6, free(2))
    step(scheduler)
    scheduler.cancel(1)
    plan = scheduler.plan()
    assert plan.request_ids.tolist() == [2] and plan.positions.tolist() == [4, 5]
    scheduler.cancel(3)
    outcome = scheduler.commit([WORD, OTHER])
    assert outcome.request_ids.tolist() == [2] and outcome.tokens.tolist() == [WORD]
    finish_all(scheduler)
    assert scheduler.stats()["cancelled"] == 2 and scheduler.stats()["finished"] == 1


# ---- roll-back


def test_roll_back_to_a_stage_boundary_computes_nothing_again():
    scheduler = make_scheduler()
    submit(scheduler, 1, 5, rules_of("full"))
    for _ in range(3):
        step(scheduler)
    step(scheduler, r1=ENDS[ANALYSIS])
    for _ in range(2):
        step(scheduler)
    tokens = scheduler.tokens(1).tolist()
    boundary = tokens.index(STARTS[GUIDANCE])
    scheduler.roll_back(1, boundary)
    assert scheduler.tokens(1).tolist() == tokens[: boundary + 1], "the marker without a choice is back at once"
    plan, outcome = step(scheduler)
    assert row_of(plan, 1).positions == [boundary] and row_of(plan, 1).stage_ids == [GUIDANCE]
    assert tokens_of(outcome, 1) == [STARTS[GUIDANCE], WORD]


def test_roll_back_without_a_forced_token_computes_the_last_one_again():
    scheduler = make_scheduler()
    submit(scheduler, 1, 5, free(20))
    for _ in range(6):
        step(scheduler)
    scheduler.roll_back(1, 9)
    plan, _ = step(scheduler, r1=OTHER)
    assert row_of(plan, 1).positions == [8] and row_of(plan, 1).tokens == [WORD]
    assert scheduler.tokens(1).tolist()[5:] == [WORD] * 4 + [OTHER]


def test_roll_back_into_a_page_that_another_one_reads():
    scheduler = make_scheduler()
    submit(scheduler, [1, 2], 5, free(20))
    for _ in range(2):
        step(scheduler)
    shared = row_of(scheduler.plan(), 1).table[0]
    scheduler.abandon()
    scheduler.roll_back(1, 5)
    scheduler.roll_back(2, 5)
    plan, _ = step(scheduler)
    rows = [row_of(plan, i) for i in (1, 2)]
    assert {row.table[0] for row in rows} == {shared} and all(row.positions == [4] for row in rows)
    # page 0 is full and shared; the prompt's last token lies in page 1, which each has for itself by now
    assert rows[0].table[1] != rows[1].table[1]


def test_roll_back_into_a_cached_page_keeps_it_for_others():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, free(30))
    for _ in range(8):
        step(scheduler)  # pages 0 and 1 are full
    chain = scheduler.tokens(1).tolist()
    assert hits_of(scheduler, 2, chain[:9]) == 8
    scheduler.roll_back(1, 6)
    plan, _ = step(scheduler, r1=OTHER)
    assert len(plan.copies) == 1 and row_of(plan, 1).table[1] != row_of(plan, 2).table[1]
    step(scheduler, r1=OTHER), step(scheduler, r1=OTHER)
    assert hits_of(scheduler, 3, chain[:9]) == 8
    assert hits_of(scheduler, 4, [*chain[:6], OTHER, OTHER, WORD]) == 8, "what replaced it is found as well"


def test_what_was_written_over_is_not_found():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, free(30))
    for _ in range(8):
        step(scheduler)
    chain = scheduler.tokens(1).tolist()
    scheduler.roll_back(1, 6)
    for _ in range(4):
        step(scheduler, r1=OTHER)
    assert hits_of(scheduler, 2, chain) == 4


def test_pages_behind_one_that_is_written_again_are_found_again():
    scheduler = make_scheduler()
    submit(scheduler, 1, 3, free(30))
    for _ in range(12):
        step(scheduler)
    chain = scheduler.tokens(1).tolist()
    scheduler.roll_back(1, 6)  # into the second of three full pages
    for _ in range(9):
        step(scheduler)
    assert scheduler.tokens(1).tolist() == chain
    assert hits_of(scheduler, 2, chain) == 12
