"""Any order of operations on the scheduler, against a memory that holds fingerprints and a list of requests.

Hypothesis draws the operations and, when one goes wrong, finds the shortest way there. csrc/engine/fuzz.cpp does the
same a hundred times as often, without a way to shrink. Checked after every operation: free + used + cached = all pages,
the scheduler's own invariants, no plan over budget, no request lost; at every step, that every row reads what it should
(fake_memory.py); in the end, that all finish within a number of steps bounded by their tokens.
"""

import numpy as np
import pytest
from fake_memory import MARKER_IDS, SAFE, UNSAFE, WORD, FakeMemory, free, make_scheduler, rules_of, submit
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mote_ext import _C

pytestmark = pytest.mark.timeout(900)  # most of it only when something fails and is shrunk

# Few tokens, so that prefixes are alike.
PROMPTS = st.builds(
    lambda common, length, own: ([WORD] * 9 if common else [1, 2, 1, 1, 2, 1, 2, 2, 1])[:length] + own,
    st.booleans(),
    st.integers(0, 9),
    st.lists(st.integers(1, 2), min_size=1, max_size=6),
)
ATTEMPTS = st.sampled_from(
    [
        [free(5, eos=(2,))],
        [free(14)],
        [rules_of("answer", total=9)],
        [rules_of("full", total=16, analysis=2)],
        [rules_of("adaptive", "flag", total=18)],
        [rules_of("answer", "enforce", total=9), rules_of(("analysis", "response"), "enforce", total=13)],
    ]
)
MOST_GENERATED = 18 + 13


class Scheduling(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(8, 24),
        page_size=st.integers(1, 5),
        budget=st.integers(1, 40),
        running=st.integers(1, 6),
        key_bits=st.sampled_from([64, 64, 1, 0]),
        margin=st.sampled_from([0.0, 0.2]),
    )
    def start(self, num_pages, page_size, budget, running, key_bits, margin):
        self.scheduler = make_scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_batch_tokens=budget,
            max_running=running,
            max_waiting=12,
            safety_margin=margin,
            max_passed_over=1,
            _key_bits=key_bits,
        )
        self.num_pages, self.budget = num_pages, budget
        self.memory = FakeMemory(num_pages, page_size)
        self.origin, self.prompts, self.groups, self.alive, self.forked = {}, {}, {}, {}, set()
        self.options, self.seen = {}, []  # seen: sequences as they once were, and how they were submitted
        self.plan, self.raises, self.num_ids = None, None, 0

    # ---- operations

    @rule(
        prompt=PROMPTS,
        attempts=ATTEMPTS,
        samples=st.sampled_from([1, 1, 1, 2, 3]),
        prompt_id=st.sampled_from([-1, -1, -1, -2, 0]),
        salt=st.sampled_from([0, 0, 0, 1]),
        experts=st.sampled_from([0, 0, 1]),
        priority=st.sampled_from([0, 0, 0, 1]),
        explicit=st.none() | st.lists(st.integers(-2, 3), min_size=15, max_size=15),
    )
    def submit(self, prompt, attempts, samples, prompt_id, salt, experts, priority, explicit):
        stage_ids = None if explicit is None else explicit[: len(prompt)]
        options = {"prompt_id": prompt_id, "stage_ids": stage_ids, "salt": salt, "experts": experts}
        self._submit(prompt, attempts, samples, priority=priority, **options)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), attempts=ATTEMPTS, own=st.lists(st.integers(1, 2), min_size=1, max_size=2))
    def submit_what_was_computed(self, data, attempts, own):
        tokens, options = data.draw(st.sampled_from(self.seen))
        self._submit(tokens + own, attempts, 1, **options)

    @precondition(lambda self: self.plan is None)
    @rule(
        alone=st.booleans(), raises=st.sampled_from([None, None, None, "before copies", "after copies"]), data=st.data()
    )
    def make_plan(self, alone, raises, data):
        only = data.draw(st.sampled_from(sorted(self.alive))) if alone and self.alive else None
        self._plan(only, raises)

    @precondition(lambda self: self.plan is not None)
    @rule(data=st.data(), fails=st.integers(0, 15))
    def close_plan(self, data, fails):
        def choose(mode, end_id, choices):
            if mode == _C.CHOOSE:
                open_now = [stage for stage in range(4) if choices >> stage & 1]
                return MARKER_IDS[2 * data.draw(st.sampled_from(open_now))]
            if mode == _C.VERDICT:
                return data.draw(st.sampled_from([SAFE, UNSAFE]))
            ends = [int(end_id)] if end_id >= 0 else []
            return data.draw(st.sampled_from([1, 2, WORD, *ends]))

        self._close(choose, failing=fails)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        others = [i for i in self.groups[request_id] if i in self.alive and i > request_id]
        if others and request_id not in self.forked:
            self.memory.fork(request_id, others[0])  # which is the first of the samples now
        self.scheduler.cancel(request_id)
        del self.alive[request_id]

    @precondition(lambda self: self.alive and self.plan is None)
    @rule(data=st.data())
    def roll_back(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        tokens = self.scheduler.tokens(request_id)
        to = data.draw(st.integers(self.prompts[request_id], len(tokens)))
        self.scheduler.roll_back(request_id, to)
        self.memory.forget(request_id, to)
        del self.alive[request_id][to:]

    @rule()
    def retrain(self):
        self.scheduler.drop_cache()
        self.memory.generation += 1

    # ---- what must hold

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert stats["pages_free"] + stats["pages_used"] + stats["pages_cached"] == self.num_pages
        assert stats["num_running"] + stats["num_waiting"] == len(self.alive)
        ended = stats["finished"] + stats["cancelled"] + stats["failed"]
        assert stats["submitted"] == self.num_ids == ended + len(self.alive)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        if self.plan is not None:
            self._close(self._last_token)
        most = 10 + sum(4 * (len(tokens) + MOST_GENERATED) for tokens in self.alive.values())
        while self.scheduler.has_work:
            most -= 1
            assert most >= 0, "a request starves"
            self._plan(None, None)
            assert self.plan is not None, "there is work, but no plan"
            self._close(self._last_token)
            self.nothing_is_lost()
        assert not self.alive and self.scheduler.stats()["pages_used"] == 0

    # ---- how

    def _submit(self, prompt, attempts, samples, **options):
        ids = list(range(self.num_ids, self.num_ids + samples))
        try:
            submit(self.scheduler, ids, prompt, *attempts, **options)
        except (_C.QueueFull, ValueError):  # too many samples or pages for this scheduler
            return
        self.num_ids += samples
        for request_id in ids:
            self.options[request_id] = {**options, "stage_ids": None, "priority": 0}
            self.origin[request_id] = options["salt"], options["experts"]
            self.alive[request_id] = list(prompt)
            self.prompts[request_id] = len(prompt)
            self.groups[request_id] = ids

    def _plan(self, only, raises):
        self.plan, self.raises = self.scheduler.plan(only=only), raises
        if self.plan is None:
            assert only is not None or not self.scheduler.has_work
            return
        assert self.plan.num_tokens <= self.budget and len(set(self.plan.slots.tolist())) == self.plan.num_tokens
        firsts = self.plan.stage_ids[self.plan.query_starts[:-1]]
        assert (np.diff(firsts) >= 0).all()
        for request_id in self.plan.preempted.tolist():
            self.memory.forget(request_id)
        if raises is None:
            self.memory.run(self.plan, self.scheduler, self.origin)
        else:
            self.memory.raises(self.plan, self.scheduler, self.origin, raises == "after copies")

    def _close(self, choose, failing=15):
        plan, self.plan = self.plan, None
        if self.raises is not None:
            self.scheduler.abandon()
            return
        rows = zip(plan.modes, plan.end_ids, plan.choices)
        tokens = [-1 if failing == i + 10 else choose(*row) for i, row in enumerate(rows)]
        ends = plan.query_starts[1:] - 1
        for request_id, at in zip(plan.logits_requests.tolist(), plan.logits_at):
            leader = int(plan.request_ids[np.searchsorted(ends, at)])
            self.memory.fork(leader, request_id)
            self.forked.add(request_id)
        outcome = self.scheduler.commit(tokens)
        for request_id in outcome.rolled_back.tolist():
            prompt = self.prompts[request_id]
            self.memory.forget(request_id, prompt)
            del self.alive[request_id][prompt:]
        begin = 0
        for request_id, count in zip(outcome.request_ids.tolist(), outcome.counts.tolist()):
            self.alive[request_id] += outcome.tokens[begin : begin + count].tolist()
            begin += count
            self.seen = [*self.seen[-9:], (self.alive[request_id][:24], self.options[request_id])]
        for request_id in outcome.finished.tolist():
            del self.alive[request_id]
        for request_id, known in self.alive.items():
            assert self.scheduler.tokens(request_id).tolist()[: len(known)] == known

    @staticmethod
    def _last_token(mode, end_id, choices):
        if mode == _C.CHOOSE:
            return MARKER_IDS[2 * (int(choices).bit_length() - 1)]
        return SAFE if mode == _C.VERDICT else int(end_id) if end_id >= 0 else WORD


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
