"""The next token: stage masks against generate()'s own rules, draws against transformers' processors, and draws that
depend on their request alone."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import ENDS, MARKER_IDS, SAFE, STARTS, UNSAFE, make_config
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mote_ext
from mote_ext import _C, keyed
from mote_ext.engine import sampling
from mote_ext.engine.sampling import FAILED, Sampler, draw
from mote_ext.generation.plan import make_plan
from mote_ext.generation.rules import StageRules

EOS = [2]
SIZE = 700  # more than the candidates that are looked at first
PROMPT = [11, 12, 13]


@dataclass
class Row:
    params: mote_ext.SamplingParams = field(default_factory=mote_ext.SamplingParams)
    seed: int = 0
    number: int = 0
    num_drawn: int = 0
    verdict: tuple = (SAFE, UNSAFE, 0.5)
    ids: tuple = (11, 12, 12)

    def history(self):
        return np.array(self.ids, dtype=np.int64)


def row(**params):
    return Row(mote_ext.SamplingParams(**params))


def make_sampler():
    return Sampler(MARKER_IDS, EOS, torch.device("cpu"))


def plan_of(*rows):
    """rows: (mode, end id, choices)"""
    modes, ends, choices = zip(*rows)
    return SimpleNamespace(modes=np.array(modes, dtype=np.int32), end_ids=np.array(ends), choices=np.array(choices))


def free(count):
    return plan_of(*[(_C.FREE, -1, 0)] * count)


def make_scores(rows=1, size=SIZE, seed=0, spread=3.0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


# ---- stage rules

# What was generated -> what the scheduler says of the next token, by hand.
A, R, C = 0, 2, 3
STATES = {
    "start": ([], (_C.CHOOSE, -1, 1 << A | 1 << R)),
    "open": ([STARTS[A]], (_C.TEXT, -1, 0)),
    "inside": ([STARTS[A], 20], (_C.TEXT, ENDS[A], 0)),
    "between": ([STARTS[A], 20, ENDS[A]], (_C.CHOOSE, -1, 1 << 1 | 1 << R)),
    "verdict": ([STARTS[R], 20, ENDS[R], STARTS[C]], (_C.VERDICT, -1, 0)),
}


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_those_of_generates_rules(seed):
    table = make_config().stage_table
    rules = StageRules(make_plan(make_config(), table, "adaptive", "flag", 60), len(PROMPT), EOS)
    scores = make_scores(len(STATES), size=68, seed=seed)
    scores[:, [*MARKER_IDS, *EOS]] += 9 * (seed % 2)
    scores[0, MARKER_IDS] -= 1e30 if seed == 3 else 0  # the markers must come all the same
    expected = [
        int(rules(torch.tensor([PROMPT + ids]), scores[i : i + 1].clone()).argmax())
        for i, (ids, _) in enumerate(STATES.values())
    ]
    choice = make_sampler().choose(scores.clone(), plan_of(*(said for _, said in STATES.values())), [Row()] * 5)
    assert choice.tokens.tolist() == expected
    drawn = [row(temperature=5.0) for _ in range(5)]
    for number in range(20):
        for one in drawn:
            one.num_drawn = number
        tokens = make_sampler().choose(scores.clone(), plan_of(*(said for _, said in STATES.values())), drawn).tokens
        assert tokens[0] in (STARTS[A], STARTS[R]) and tokens[3] in (STARTS[1], STARTS[R])
        assert tokens[1] not in MARKER_IDS + EOS and tokens[2] not in {*MARKER_IDS, *EOS} - {ENDS[A]}
        assert tokens[4] == expected[4]


def test_without_rules_everything_may_come():
    scores = torch.zeros(2, 68)
    scores[0, MARKER_IDS[3]] = scores[1, EOS[0]] = 1
    assert make_sampler().choose(scores, free(2), [Row(), Row()]).tokens.tolist() == [MARKER_IDS[3], EOS[0]]


def test_a_verdict_is_its_own_requests_threshold():
    scores = torch.zeros(3, 68)
    probability = float(scores[0].softmax(-1)[SAFE])
    rows = [row(temperature=9.0) for _ in range(3)]
    for one, threshold in zip(rows, (probability * 0.99, probability * 1.01, 0.0)):
        one.verdict = (SAFE, UNSAFE, threshold)
    tokens = make_sampler().choose(scores, plan_of(*[(_C.VERDICT, -1, 0)] * 3), rows).tokens
    assert tokens.tolist() == [SAFE, UNSAFE, SAFE]


# ---- drawing


def processed(scores, params):
    """Probabilities by transformers' processors, in its order."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.tensor([Row().history().tolist()]), scores.clone()).softmax(-1)[0]


WISHES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_k": 400},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 20.0, "top_p": 0.99},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.7},
    {"temperature": 1.0, "repetition_penalty": 0.5},
    {"temperature": 1.0, "top_k": 100000},
]
GRID = 4000


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_draws_follow_transformers_distribution(wish, monkeypatch):
    """Drawn by an even grid of numbers, a token comes as often as its probability says, to within a step of the grid
    and what a cumulative sum rounds."""
    numbers = iter((np.arange(GRID) + 0.5) / GRID)
    monkeypatch.setattr(keyed, "uniform", lambda *key: next(numbers))
    params = mote_ext.SamplingParams(**wish)
    scores = make_scores()
    scores[0, 11] += 8
    expected = processed(scores, params)
    logits = scores.clone()
    if params.repetition_penalty != 1:
        sampling._penalise(logits[0], Row(params))
    found = np.concatenate([draw(logits.expand(500, -1), [Row(params)] * 500) for _ in range(GRID // 500)])
    shares = torch.bincount(torch.from_numpy(found), minlength=SIZE) / GRID
    assert (shares - expected).abs().max() <= 1.5 / GRID
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_the_same_request_gets_the_same_tokens_in_any_company(wish):
    scores = make_scores(rows=12)
    wishes = [WISHES[i % len(WISHES)] for i in range(12)]
    wishes[7] = wish
    rows = [Row(mote_ext.SamplingParams(**w), seed=i, number=i % 3, num_drawn=5 * i) for i, w in enumerate(wishes)]
    together = make_sampler().choose(scores.clone(), free(12), rows).tokens
    order = np.random.default_rng(0).permutation(12)
    shuffled = make_sampler().choose(scores[torch.from_numpy(order)], free(12), [rows[i] for i in order]).tokens
    alone = [int(make_sampler().choose(scores[i : i + 1].clone(), free(1), [rows[i]]).tokens[0]) for i in range(12)]
    assert together.tolist() == alone
    assert shuffled.tolist() == [alone[i] for i in order]


def test_every_part_of_the_key_changes_the_draw():
    scores = make_scores(spread=0.1)
    keys = [(seed, number, place) for seed in (0, 1) for number in (0, 1) for place in (0, 1)]
    rows = [Row(mote_ext.SamplingParams(temperature=1.0), *key) for key in keys]
    tokens = draw(scores.expand(len(keys), -1), rows)
    assert len(set(tokens.tolist())) == len(keys)
    assert draw(scores, rows[3:4]) == tokens[3]


def test_numbers_at_both_ends_pick_tokens_that_can_come(monkeypatch):
    scores = torch.full((1, SIZE), -torch.inf)
    scores[0, 5:9] = 0.0
    for number, token in ((0.0, 5), (1 - 2**-53, 8)):
        monkeypatch.setattr(keyed, "uniform", lambda *key, number=number: number)
        for wish in ({}, {"top_k": 400}, {"top_p": 0.999}):
            drawn = draw(scores, [row(temperature=1.0, **wish)])[0]
            assert 5 <= drawn <= 8 and (wish or drawn == token)


def test_greedy_takes_the_penalty_into_account():
    scores = torch.zeros(2, SIZE)
    scores[:, 11], scores[:, 30], scores[:, 12] = 3.0, 2.0, -1.0
    rows = [row(), row(repetition_penalty=2.0)]
    assert make_sampler().choose(scores, free(2), rows).tokens.tolist() == [11, 30]


# ---- what goes wrong, and what is reported


@pytest.mark.parametrize("wish", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_row_of_nan_fails_and_its_neighbours_do_not(wish):
    scores = make_scores(rows=4)
    rows = [row(**wish, seed=i) for i in range(4)]
    expected = make_sampler().choose(scores.clone(), free(4), rows).tokens
    scores[1] = torch.nan
    scores[2, 600] = torch.nan
    tokens = make_sampler().choose(scores, free(4), rows).tokens
    assert tokens.tolist() == [expected[0], FAILED, FAILED, expected[3]]


def test_nan_before_a_verdict_or_a_choice_fails():
    scores = torch.full((2, 68), torch.nan)
    plan = plan_of((_C.VERDICT, -1, 0), (_C.CHOOSE, -1, 1 << A | 1 << R))
    assert make_sampler().choose(scores, plan, [Row(), Row()]).tokens.tolist() == [FAILED, FAILED]


def test_logprobs_are_the_models_own():
    scores = make_scores(rows=3, size=68)
    own = scores.log_softmax(-1)
    rows = [row(logprobs=2, temperature=3.0, top_k=4), row(), row(logprobs=0)]
    plan = plan_of((_C.TEXT, -1, 0), (_C.TEXT, -1, 0), (_C.TEXT, ENDS[A], 0))
    choice = make_sampler().choose(scores.clone(), plan, rows)
    assert set(choice.logprobs) == {0, 2}
    for i, found in choice.logprobs.items():
        assert found.token_id == choice.tokens[i] and found.logprob == float(own[i, found.token_id])
    likeliest = own[0].topk(2)
    assert choice.logprobs[0].top == tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist()))
    assert choice.logprobs[2].top == ()


WRONG = {
    "temperature": -0.1, "top_k": 1.5, "top_p": 0.0, "min_p": 1.1, "repetition_penalty": 0, "seed": "1", "n": 0,
    "stop": ("",), "logprobs": -1, "priority": 0.5, "cache_salt": None, "max_new_tokens": 0, "check": "maybe",
    "stage_max_tokens": {"analysis": 1.5}, "response_reserve": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_are_named(name):
    with pytest.raises(ValueError, match=f"SamplingParams: {name} must be"):
        mote_ext.SamplingParams(**{name: WRONG[name]})


def test_without_stages_their_options_mean_nothing():
    with pytest.raises(ValueError, match="path=None has no stages"):
        mote_ext.SamplingParams(path=None, hide=("analysis",))
