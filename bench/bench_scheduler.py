"""Host cost of a whole decode step: our scheduler's plan and commit against scheduler_baseline.py, in one run.

    python bench/bench_scheduler.py --json FILE [pytest options]      then bench/report.py makes the table

256 requests decode, 4,096 wait, nobody finishes: a step is plan() with every array taken as numpy, and commit() with
what it says; the opponent's is schedule, prepare_decode (tensors) and postprocess on sequences of the same lengths and
blocks of the same size. Runs of steps alternate, the first ones of a run are left out; the median and the 99th
percentile are reported. In decode_step_cold 64 MB are written before each step, of ours and theirs, because between two
steps of an engine a model has been through the caches. In an admission step one request finishes in every step and the
next one, whose prompt shares half of its pages with others, is admitted and prefilled; there is no opponent in it,
since that one never mixes prefill and decode.
"""

import random
import time
from dataclasses import dataclass
from statistics import median

import command
import numpy as np
import pytest
import torch
from bench_ops import cpu_name
from scheduler_baseline import Scheduler, Sequence

import mote_ext
from mote_ext import _C

NUM_RUNNING, NUM_WAITING = 256, 4096
MARKER_IDS = [90000 + i for i in range(8)]
RESPONSE = 2
WORD, EOS = 11, 2
SAMPLED = np.full(2 * NUM_RUNNING, WORD)  # what a model made of every row
RUNS, STEPS, WARM_UP = 20, 25, 5  # runs of either side, steps of a run, of which the first are left out
COLD = np.zeros(1 << 23)  # twice what the caches hold
ARRAYS = [name for name in dir(_C.Plan) if not name.startswith("_") and name != "num_tokens"]
OUTCOMES = [name for name in dir(_C.Outcome) if not name.startswith("_")]


@dataclass(frozen=True)
class Case:
    op: str  # decode_step, decode_step_cold, admission_step
    page_size: int

    def __str__(self):
        return f"{self.op}-page{self.page_size}"


def answer_rules(max_new_tokens):
    """Prompt, response, end."""
    following = [1 << RESPONSE, 0, 0, 0, 0]
    whole = [3 if stage == RESPONSE else 0 for stage in range(4)]
    return _C.PathRules(following, whole, [0] * 4, [-1] * 4, max_new_tokens, RESPONSE)


def lengths_of(count):
    """Prompts of 128 to 384 tokens, the same for both sides."""
    generator = random.Random(0)
    return [generator.randrange(128, 385) for _ in range(count)]


def make_scheduler(page_size, totals):
    """All submitted, the first NUM_RUNNING prefilled. totals: most tokens to generate, one a request."""
    num_pages = NUM_RUNNING * (-(-(384 + max(totals)) // page_size) + 2)
    scheduler = _C.StepScheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_batch_tokens=2048,
        max_running=NUM_RUNNING,
        max_waiting=NUM_RUNNING + NUM_WAITING,
        marker_ids=MARKER_IDS,
    )
    shared = np.arange(64)  # half of the shortest prompt
    for number, (length, total) in enumerate(zip(lengths_of(len(totals)), totals)):
        prompt = np.concatenate((shared, np.arange(length - len(shared)) + 100 * number + 1000))
        scheduler.submit([number], prompt, -1, [answer_rules(total)])
    return scheduler


def step(scheduler):
    """One step as an engine takes it; how many tokens it planned."""
    plan = scheduler.plan()
    arrays = {name: getattr(plan, name) for name in ARRAYS}
    outcome = scheduler.commit(SAMPLED[: len(arrays["logits_at"])])
    for name in OUTCOMES:
        getattr(outcome, name)
    return plan.num_tokens


class TheirSteps:
    """The opponent with the same sequences: as many blocks, as long, as many waiting."""

    def __init__(self, page_size, scheduler):
        num_blocks = NUM_RUNNING * (-(-(384 + 2 * RUNS * STEPS) // page_size) + 2)
        self.scheduler = Scheduler(num_blocks, page_size, NUM_RUNNING, EOS)
        for number in range(NUM_RUNNING):
            self.scheduler.start(Sequence(scheduler.tokens(number).tolist(), max_tokens=10 * RUNS * STEPS))
        self.scheduler.waiting.extend(Sequence([WORD] * 128, 1) for _ in range(NUM_WAITING))

    def __call__(self):
        sequences = self.scheduler.schedule()
        tensors = self.scheduler.prepare_decode(sequences)
        self.scheduler.postprocess(sequences, [WORD] * len(sequences))
        return tensors


def assert_same_step(plan, tensors):
    """Both planned the same tokens at the same positions."""
    order = np.argsort(plan.request_ids)
    assert np.array_equal(plan.lengths[order], tensors["lengths"].numpy())
    assert np.array_equal(plan.positions[order], tensors["positions"].numpy())


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run_of(function, cold):
    """Seconds of each step of a run."""
    seconds = []
    for _ in range(STEPS):
        if cold:
            np.add(COLD, 1, out=COLD)
        seconds.append(seconds_of(function))
    return seconds[WARM_UP:]


def percentile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


def record(benchmark, case, seconds, quiet_share, **more):
    benchmark.extra_info.update(
        op=case.op,
        T=NUM_RUNNING,
        K=0,
        page_size=case.page_size,
        pattern=f"{NUM_RUNNING} running, {NUM_WAITING} waiting",
        dtype="none",
        threads=1,
        device=cpu_name(),
        medians_us={name: round(median(values) * 1e6, 1) for name, values in seconds.items()},
        p99_us={name: round(percentile(values, 0.99) * 1e6, 1) for name, values in seconds.items()},
        quiet_share=quiet_share,
        versions={"torch": torch.__version__, "mote_ext": mote_ext.__version__, "cuda": None},
        **more,
    )


DECODES = [Case(op, size) for op in ("decode_step", "decode_step_cold") for size in (16, 256)]


@pytest.mark.parametrize("case", DECODES, ids=str)
def test_decode_step(benchmark, case, quiet):
    scheduler = make_scheduler(case.page_size, [10 * RUNS * STEPS] * (NUM_RUNNING + NUM_WAITING))
    while step(scheduler) != NUM_RUNNING:
        pass
    theirs = TheirSteps(case.page_size, scheduler)
    plan = scheduler.plan()
    assert_same_step(plan, theirs())
    scheduler.commit(np.full(NUM_RUNNING, WORD))

    cold = case.op == "decode_step_cold"
    seconds = {"ours": [], "nano_vllm_style": []}
    benchmark.pedantic(
        lambda: seconds["ours"].extend(run_of(lambda: step(scheduler), cold)),
        setup=lambda: seconds["nano_vllm_style"].extend(run_of(theirs, cold)),
        rounds=RUNS,
        iterations=1,
    )
    stats = scheduler.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["preemptions"]) == (NUM_RUNNING, NUM_WAITING, 0)
    record(benchmark, case, seconds, quiet())


@pytest.mark.parametrize("case", [Case("admission_step", 16)], ids=str)
def test_admission_step(benchmark, case, quiet):
    # The running finish one after the other, one a step.
    totals = [64 + number for number in range(NUM_RUNNING + NUM_WAITING)]
    scheduler = make_scheduler(case.page_size, totals)
    while scheduler.stats()["num_waiting"] == NUM_WAITING or scheduler.stats()["finished"] < 20:
        step(scheduler)
    seconds, tokens = {"ours": []}, []
    before = scheduler.stats()["finished"]
    benchmark.pedantic(
        lambda: seconds["ours"].append(seconds_of(lambda: tokens.append(step(scheduler)))), rounds=200, iterations=1
    )
    admitted = scheduler.stats()["finished"] - before
    assert admitted >= 150 and max(tokens) > NUM_RUNNING
    record(benchmark, case, seconds, quiet(), tokens_a_step=round(sum(tokens) / len(tokens)))


if __name__ == "__main__":
    command.run(__file__, __doc__)
