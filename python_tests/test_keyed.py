"""Keyed randomness: the same on every machine and in every process, and spread as random numbers are."""

import subprocess
import sys

import torch

from mote_ext import keyed


def test_a_key_means_the_same_number_everywhere():
    # Written down once: a change here is another draw for every resumed run.
    assert keyed.bits("skip", 0, 1, 2, "response", "analysis") == 0xB8B7ED4BC55896A5
    code = "from mote_ext import keyed; print(keyed.bits('skip', 0, 1, 2, 'response', 'analysis'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == keyed.bits("skip", 0, 1, 2, "response", "analysis")


def test_neighbouring_keys_are_independent():
    draws = torch.tensor([[keyed.uniform(seed, row) for row in range(300)] for seed in range(4)])
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(1) - 0.5).abs().max() < 0.06  # 3.6 standard deviations of a mean of 300
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.25
    assert keyed.bits(1, 23) != keyed.bits(12, 3) and keyed.bits("1") != keyed.bits(1)


def test_integers_fill_their_range():
    counts = torch.bincount(torch.tensor([keyed.integer(5, "stage", i) for i in range(1000)]), minlength=5)
    assert len(counts) == 5 and counts.min() > 150


def test_a_generator_belongs_to_its_key_and_leaves_torchs_alone():
    before = torch.get_rng_state()
    first = torch.rand(3, generator=keyed.generator("a", 1))
    assert torch.equal(first, torch.rand(3, generator=keyed.generator("a", 1)))
    assert not torch.equal(first, torch.rand(3, generator=keyed.generator("a", 2)))
    assert torch.equal(before, torch.get_rng_state())
