"""What tests of the scheduler stand on: rules and schedulers of four stages, and KV memory without a model.

FakeMemory holds a fingerprint in every slot in place of keys and values. The fingerprint of a token stands for all that
these depend on: the tokens and stage ids up to it, the experts as they were then, and the salt, over which nothing may
be shared. run() does what a forward does with a plan: the copies, the writes, and the reading of every row's whole
history through its page table. What is shared, evicted, copied or rolled back wrongly is read as another fingerprint.
"""

from types import SimpleNamespace

import numpy as np

from mote_ext import _C
from mote_ext.engine.rules import path_rules
from mote_ext.generation.plan import make_plan
from mote_ext.stages import ANALYSIS, CHECK, GUIDANCE, RESPONSE, StageTable

MARKER_IDS = list(range(100, 108))
STARTS, ENDS = MARKER_IDS[::2], MARKER_IDS[1::2]
TABLE = StageTable([ANALYSIS, GUIDANCE, RESPONSE, CHECK], MARKER_IDS)
SAFE, UNSAFE, WORD, OTHER = 5, 6, 50, 51
EOS = 2
_CONFIG = SimpleNamespace(verdict_ids=(SAFE, UNSAFE), check_threshold=0.5)


def plan_of(path, check=False, total=40, reserve=1, **limits):
    """The StagePlan of a request. limits: stage=tokens"""
    return make_plan(_CONFIG, TABLE, path, check, total, limits, reserve)


def rules_of(path, check=False, total=40, reserve=1, **limits):
    return path_rules(plan_of(path, check, total, reserve, **limits))


def free(total=8, eos=(EOS,)):
    return _C.PathRules.free(total, list(eos))


def make_scheduler(**options):
    defaults = {
        "num_pages": 64,
        "page_size": 4,
        "max_batch_tokens": 64,
        "max_running": 8,
        "max_waiting": 64,
        "marker_ids": MARKER_IDS,
        "safety_margin": 0.0,
    }
    return _C.StepScheduler(**{**defaults, **options})


def submit(scheduler, request_id, prompt, *attempts, prompt_id=-1, **options):
    """prompt: tokens, or how many; request_id: one or a list of samples."""
    ids = request_id if isinstance(request_id, list) else [request_id]
    tokens = np.arange(prompt) % 40 if isinstance(prompt, int) else np.array(prompt, dtype=np.int64)
    scheduler.submit(ids, tokens, prompt_id, list(attempts or (free(),)), **options)


def word_for(mode, end_id, choices):
    """A token for a row of logits: text goes on, the first stage opens, the verdict is safe."""
    if mode == _C.CHOOSE:
        return STARTS[(int(choices) & -int(choices)).bit_length() - 1]
    return SAFE if mode == _C.VERDICT else WORD


def end_for(mode, end_id, choices):
    """The same, but text ends as soon as it may."""
    return end_id if mode == _C.TEXT and end_id >= 0 else word_for(mode, end_id, choices)


def sampled(plan, choose=word_for, **by_id):
    """[L] tokens for a plan; by_id: {"r3": token} for the logits of request 3."""
    rows = zip(plan.logits_requests, plan.modes, plan.end_ids, plan.choices)
    return np.array([by_id.get(f"r{i}", choose(*row)) for i, *row in rows], dtype=np.int64)


def step(scheduler, choose=word_for, **by_id):
    """plan, commit; both."""
    plan = scheduler.plan()
    outcome = scheduler.commit(sampled(plan, choose, **by_id))
    scheduler.check()
    return plan, outcome


def finish_all(scheduler, choose=end_for, most_steps=1000):
    """Steps until there is nothing to do; how many."""
    for number in range(most_steps):
        if not scheduler.has_work:
            return number
        step(scheduler, choose)
    raise AssertionError(f"work is left after {most_steps} steps")


def row_of(plan, request_id):
    """One row of a plan: tokens, positions, stage ids, its pages."""
    row = plan.request_ids.tolist().index(request_id)
    begin, end = plan.query_starts[row : row + 2]
    return SimpleNamespace(
        tokens=plan.token_ids[begin:end].tolist(),
        positions=plan.positions[begin:end].tolist(),
        stage_ids=plan.stage_ids[begin:end].tolist(),
        slots=plan.slots[begin:end].tolist(),
        length=int(plan.lengths[row]),
        table=plan.page_tables[row].tolist(),
    )


def tokens_of(outcome, request_id):
    """What an outcome says was appended to a request."""
    row = outcome.request_ids.tolist().index(request_id)
    begin = int(outcome.counts[:row].sum())
    return outcome.tokens[begin : begin + outcome.counts[row]].tolist()


def hits_of(scheduler, request_id, *arguments, **options):
    """How many tokens of a request are found in the cache when it is admitted; it is left running."""
    submit(scheduler, request_id, *arguments, **options)
    plan, _ = step(scheduler)
    return row_of(plan, request_id).positions[0]


class FakeMemory:
    def __init__(self, num_pages, page_size):
        self.page_size = page_size
        self.slots = np.zeros(num_pages * page_size, dtype=np.int64)
        self.written = {}  # id -> fingerprints of its leading tokens
        self.generation = 0  # of the experts

    def forget(self, request_id, num_tokens=0):
        del self.written.setdefault(request_id, [])[num_tokens:]

    def fork(self, leader, request_id):
        self.written[request_id] = list(self.written.get(leader, []))

    def run(self, plan, scheduler, origin):
        """origin: id -> (salt, experts) of the requests."""
        self._copy(plan)
        rows = [row_of(plan, request_id) for request_id in plan.request_ids.tolist()]
        for request_id, row in zip(plan.request_ids.tolist(), rows):
            self.note_hits(request_id, row, scheduler, origin)
            written = self.written[request_id]
            for slot in row.slots:
                written.append(self._next(request_id, len(written), scheduler, origin))
                self.slots[slot] = written[-1]
        for request_id, row in zip(plan.request_ids.tolist(), rows):
            expected = self.written[request_id]
            place = np.arange(row.length)
            found = self.slots[np.array(row.table)[place // self.page_size] * self.page_size + place % self.page_size]
            assert found.tolist() == expected, f"request {request_id} reads what is not its own"

    def raises(self, plan, scheduler, origin, with_copies):
        """The forward stops in the middle: what it has written is anything."""
        for request_id in plan.request_ids.tolist():
            self.note_hits(request_id, row_of(plan, request_id), scheduler, origin)
        if with_copies:
            self._copy(plan)
        self.slots[plan.slots] = -1

    def note_hits(self, request_id, row, scheduler, origin):
        """What stands before a row and was not computed by it was found in the cache."""
        written = self.written.setdefault(request_id, [])
        del written[row.positions[0] :]
        while len(written) < row.positions[0]:
            written.append(self._next(request_id, len(written), scheduler, origin))

    def _copy(self, plan):
        pages = self.slots.reshape(-1, self.page_size)
        pages[plan.copies[:, 1]] = pages[plan.copies[:, 0]]

    def _next(self, request_id, place, scheduler, origin):
        salt, experts = origin[request_id]
        written = self.written[request_id]
        token, stage_id = (int(a[place]) for a in (scheduler.tokens(request_id), scheduler.stage_ids(request_id)))
        experts = None if stage_id == -2 else (experts, self.generation)
        return hash((written[-1] if written else ("salt", salt), token, stage_id, experts))
