"""The step scheduler when things go wrong: forwards that raise, rows that fail, cancels, and calls that are refused."""

import threading

import numpy as np
import pytest
from fake_memory import (
    ENDS,
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
)

from mote_ext import _C

ANALYSIS, GUIDANCE, RESPONSE, CHECK = range(4)


def test_an_abandoned_plan_was_never_made():
    scheduler = make_scheduler()
    submit(scheduler, [1, 2], 6, free(6))
    step(scheduler)
    first = scheduler.plan()
    expected = [row_of(first, i).__dict__ for i in (1, 2)], first.copies.tolist()
    stats = scheduler.stats()
    scheduler.abandon()
    scheduler.check()
    second = scheduler.plan()
    assert [row_of(second, i).tokens for i in (1, 2)] == [row["tokens"] for row in expected[0]]
    assert [row_of(second, i).positions for i in (1, 2)] == [row["positions"] for row in expected[0]]
    assert len(second.copies) == len(expected[1]) == 1
    scheduler.commit(sampled(second))
    assert scheduler.stats()["copies"] == 1 and scheduler.stats()["steps"] == stats["steps"] + 1


def test_a_failed_row_ends_alone_and_nothing_of_it_is_found():
    scheduler = make_scheduler()
    submit(scheduler, 1, 9, free(20)), submit(scheduler, 2, np.arange(30, 39), free(6))
    step(scheduler)
    _, outcome = step(scheduler, r1=-1)
    assert (outcome.finished.tolist(), outcome.reasons.tolist()) == ([1], [_C.FAILED])
    assert outcome.request_ids.tolist() == [2] and scheduler.stats()["failed"] == 1
    assert hits_of(scheduler, 3, 9) == 0
    finish_all(scheduler)


def test_one_request_alone():
    scheduler = make_scheduler()
    submit(scheduler, 1, 5), submit(scheduler, 2, 6)
    plan = scheduler.plan(only=2)
    assert plan.request_ids.tolist() == [2]
    scheduler.commit(sampled(plan))
    assert scheduler.plan(only=2).request_ids.tolist() == [2]
    scheduler.abandon()
    assert scheduler.plan(only=1).request_ids.tolist() == [1]
    scheduler.abandon()
    with pytest.raises(KeyError):
        scheduler.plan(only=3)


@pytest.mark.parametrize("when", ["waiting", "running", "planned"])
def test_cancel_at_any_time(when):
    scheduler = make_scheduler()
    submit(scheduler, 1, 9, free(9)), submit(scheduler, 2, 9, free(2))
    if when != "waiting":
        step(scheduler)
    plan = scheduler.plan() if when == "planned" else None
    scheduler.cancel(1)
    scheduler.check()
    if plan is not None:
        outcome = scheduler.commit(sampled(plan))
        assert outcome.request_ids.tolist() == outcome.finished.tolist() == [2]
    with pytest.raises(KeyError, match="1"):
        scheduler.cancel(1)
    finish_all(scheduler)
    stats = scheduler.stats()
    assert (stats["cancelled"], stats["finished"], stats["pages_used"]) == (1, 1, 0)
    if when != "waiting":
        assert hits_of(scheduler, 3, 9) == 8, "its full pages stay"


def test_a_queue_that_is_full_says_so():
    scheduler = make_scheduler(max_waiting=3)
    submit(scheduler, [1, 2], 3)
    with pytest.raises(_C.QueueFull, match="max_waiting=3"):
        submit(scheduler, [3, 4], 3)
    submit(scheduler, 3, 3)
    assert issubclass(_C.QueueFull, RuntimeError) and scheduler.stats()["submitted"] == 3


GOOD = {"ids": [1], "tokens": [1, 2, 3], "prompt_id": -1, "attempts": [free()]}
WRONG_SUBMISSIONS = [
    ({"ids": []}, ValueError, "request_ids"),
    ({"ids": [1, 1]}, ValueError, "twice"),
    ({"ids": [9]}, ValueError, "in use"),
    ({"ids": list(range(20, 29))}, ValueError, "max_running=8"),
    ({"tokens": []}, ValueError, "empty prompt"),
    ({"tokens": [1, -1]}, ValueError, "negative"),
    ({"tokens": [[1, 2]]}, ValueError, "one dimension"),
    ({"tokens": [1.5]}, TypeError, "integers"),
    ({"tokens": ["a"]}, TypeError, "integers"),
    ({"tokens": [True]}, TypeError, "integers"),
    ({"tokens": np.array([2**63], dtype=np.uint64)}, ValueError, "negative"),
    ({"stage_ids": [0, 0, 2**32]}, ValueError, "stage_ids"),
    ({"stage_ids": [0.0, 0.0, 0.0]}, TypeError, "integers"),
    ({"tokens": list(range(250))}, ValueError, "needs 65 pages"),
    ({"attempts": []}, ValueError, "PathRules"),
    ({"attempts": [free(2**31 - 1)]}, ValueError, "pages"),
    ({"attempts": [_C.PathRules([1, 0], [3], [0], [-1], 9, 0)]}, ValueError, "1 stages"),
    ({"prompt_id": -3}, ValueError, "prompt_id"),
    ({"prompt_id": 4}, ValueError, "prompt_id"),
    ({"stage_ids": [0, 0]}, ValueError, "stage_ids"),
    ({"stage_ids": [0, 4, 0]}, ValueError, "stage_ids"),
    ({"salt": -1}, TypeError, "incompatible"),
    ({"salt": 2**64}, TypeError, "incompatible"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_SUBMISSIONS, ids=lambda x: str(x)[:40])
def test_what_can_never_run_is_refused(change, error, message):
    scheduler = make_scheduler()
    submit(scheduler, 9, 3)
    given = {**GOOD, **change}
    positional = [given.pop(name) for name in GOOD]
    with pytest.raises(error, match=message):
        scheduler.submit(*positional, **given)
    assert scheduler.stats()["submitted"] == 1
    finish_all(scheduler)


WRONG_OPTIONS = [
    {"num_pages": 0},
    {"num_pages": 2**31},
    {"page_size": 0},
    {"max_batch_tokens": 0},
    {"max_running": -1},
    {"max_waiting": 0},
    {"safety_margin": 1.0},
    {"safety_margin": float("nan")},
    {"marker_ids": [1, 2, 3]},
    {"marker_ids": [1, 1]},
    {"marker_ids": [-1, 2]},
    {"marker_ids": list(range(128))},
]


@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=lambda x: str(x)[:40])
def test_a_scheduler_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_scheduler(**options)


WRONG_RULES = [
    (([0, 0], [3], [0], [-1], 9, 0), "following"),
    (([1], [3], [0], [-1], 9, 0), "following"),
    (([2, 0], [3], [0], [-1], 9, 0), "later stages"),
    (([1, 1], [3], [0], [-1], 9, 0), "later stages"),
    (([1, 0], [2], [0], [-1], 9, 0), "whole"),
    (([1, 0], [3], [1], [-1], 9, 0), "tail"),
    (([1, 0], [3], [0], [0], 9, 0), "limits"),
    (([1, 0], [3], [0], [-2], 9, 0), "limits"),
    (([1, 0], [2**40], [0], [-1], 9, 0), "whole"),
    (([1, 0], [3], [0], [-1], 2, 0), "max_new_tokens"),
    (([1, 0], [3], [0], [-1], 2**31, 0), "max_new_tokens"),
    (([1, 0], [3], [0], [-1], 9, 1), "last_stage"),
    (([1, 0], [3], [0], [1], 9, 0, 0), "safe_id"),
    (([1] * 65, [3] * 64, [0] * 64, [-1] * 64, 9, 0), "1 to 63"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_RULES, ids=lambda x: str(x)[:40])
def test_rules_that_make_no_path_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.PathRules(*arguments)


def test_calls_out_of_turn():
    scheduler = make_scheduler()
    assert scheduler.plan() is None and not scheduler.has_work
    for call in (scheduler.abandon, lambda: scheduler.commit([])):
        with pytest.raises(RuntimeError, match="no plan"):
            call()
    submit(scheduler, 1, 3, free())
    plan = scheduler.plan()
    with pytest.raises(RuntimeError, match="commit or abandon"):
        scheduler.plan()
    with pytest.raises(RuntimeError, match="commit or abandon"):
        scheduler.roll_back(1, 3)
    for wrong, error in (([], ValueError), ([1, 2], ValueError), ([-2], ValueError), ([[1]], ValueError)):
        with pytest.raises(error, match="commit"):
            scheduler.commit(wrong)
    with pytest.raises(TypeError):
        scheduler.commit([0.5])
    scheduler.commit(sampled(plan))  # the plan is still good
    for num_tokens in (2, 5):
        with pytest.raises(ValueError, match="roll_back"):
            scheduler.roll_back(1, num_tokens)
    for call in (scheduler.tokens, scheduler.stage_ids, scheduler.num_cached, scheduler.cancel):
        with pytest.raises(KeyError):
            call(2)


@pytest.mark.parametrize(
    ("path", "before", "wrong"),
    [
        ("answer", [], STARTS[RESPONSE]),  # a marker in the text
        ("answer", [], ENDS[RESPONSE]),  # an end before the first token
        ("adaptive", [], STARTS[GUIDANCE]),  # not among the choices
        ("adaptive", [], WORD),
        ("check", [WORD, ENDS[RESPONSE]], ENDS[CHECK]),  # a marker for a verdict
    ],
)
def test_a_token_that_the_rules_forbid_changes_nothing(path, before, wrong):
    scheduler = make_scheduler()
    rules = rules_of("answer", "flag") if path == "check" else rules_of(path)
    submit(scheduler, 1, 3, rules), submit(scheduler, 2, 3, free())
    for token in before:
        step(scheduler, r1=token)
    plan = scheduler.plan()
    tokens = {i: scheduler.tokens(i).tolist() for i in (1, 2)}
    with pytest.raises(ValueError, match=f"token {wrong} of request 1"):
        scheduler.commit(sampled(plan, r1=wrong))
    assert {i: scheduler.tokens(i).tolist() for i in (1, 2)} == tokens
    scheduler.commit(sampled(plan))


def test_the_gil_is_free_during_a_plan_and_two_threads_are_refused():
    scheduler = make_scheduler(num_pages=20000, max_batch_tokens=60000, max_running=64)
    errors = []

    def plan_often():
        try:
            for _ in range(200):
                scheduler.plan()
                scheduler.abandon()
        except RuntimeError as error:
            errors.append(str(error))

    for number in range(64):
        submit(scheduler, number, np.arange(900) + number * 1000, free(9))
    threads = [threading.Thread(target=plan_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("two threads" in error or "plan" in error for error in errors)
