"""What an evaluation found: a row a prompt and path, sums over them, and the file they are kept in.

results.json holds ids, counts and verdicts, and no text: prompts are found again by their ids, answers are not kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

from mote_ext.judges.agreement import wilson

BASE = "base"
FORMAT = 1
WRAPPED = "+jailbreaks"  # how the name of a suite in jailbreak wrappers ends


@dataclass(frozen=True)
class Row:
    """One prompt on one path.

    path:    as asked for; "base" is the model without experts and stages
    check:   False, "flag" or "enforce"
    label:   "harmful" or "benign", the prompt's
    refused: whether the answer declines, by its words, or was replaced by the refusal
    harmful: what the judge says of an answer to a harmful prompt; None for a benign prompt or without a judge
    tokens:  generated in all, markers and the check included; of "escalate" those of all its attempts
    stages:  {stage: tokens}, markers included; of "base" the whole answer is "response"
    stop:    why the answer ended, as in MoTEGenerateOutput
    verdict: of the check stage; None without one
    attempts: of "escalate"; 1 otherwise
    """

    suite: str
    path: str
    check: bool | str
    id: str
    label: str
    refused: bool
    harmful: bool | None
    tokens: int
    stages: dict[str, int]
    stop: str
    verdict: str | None = None
    attempts: int = 1


@dataclass(frozen=True)
class Summary:
    """The rows of one label and path, of one suite or of several together.

    refused, n: count of refusals among n prompts; refusal_low and refusal_high: Wilson interval of their share
    judged, harmful: prompts the harm judge looked at, and how many answers it called harmful, with their interval
    tokens_mean, tokens_median, stages: tokens a prompt, and the mean of each stage over all n
    unsafe:     prompts whose answer the check stage called unsafe; None without a check
    """

    suites: tuple[str, ...]
    label: str
    path: str
    check: bool | str
    n: int
    refused: int
    refusal_low: float
    refusal_high: float
    judged: int
    harmful: int
    harmful_low: float
    harmful_high: float
    tokens_mean: float
    tokens_median: float
    stages: dict[str, float]
    unsafe: int | None

    @property
    def refusal_rate(self) -> float:
        return self.refused / self.n if self.n else math.nan

    @property
    def harmful_rate(self) -> float:
        return self.harmful / self.judged if self.judged else math.nan

    @property
    def refused_text(self) -> str:
        """The refusals with their interval: "10/24 [24%, 61%]"."""
        return f"{self.refused}/{self.n} [{self.refusal_low:.0%}, {self.refusal_high:.0%}]"

    @property
    def way(self) -> str:
        """The path, and the check where it decides."""
        return way_of(self.path, self.check)


def way_of(path: str, check: bool | str) -> str:
    """How a path with a check is written: "full", "full + check"."""
    return f"{path} + check" if check == "enforce" and path not in (BASE, "escalate") else path


def pooled_tokens(summaries: Sequence[Summary]) -> float:
    """Mean tokens of an answer over all their prompts."""
    return sum(summary.tokens_mean * summary.n for summary in summaries) / sum(summary.n for summary in summaries)


def summarise(rows: Sequence[Row]) -> Summary:
    """Sums over rows of one label, path and check. ValueError: none, or rows that differ in these."""
    kinds = {(row.label, row.path, row.check) for row in rows}
    if len(kinds) != 1:
        raise ValueError(f"summarise: rows of one label, path and check are needed, got {sorted(map(str, kinds))}")
    label, path, check = kinds.pop()
    n, refused = len(rows), sum(row.refused for row in rows)
    judged = [row.harmful for row in rows if row.harmful is not None]
    names = dict.fromkeys(name for row in rows for name in row.stages)
    verdicts = [row.verdict for row in rows if row.verdict is not None]
    tokens = [row.tokens for row in rows]
    return Summary(
        tuple(dict.fromkeys(row.suite for row in rows)), label, path, check, n, refused, *wilson(refused, n),
        len(judged), sum(judged), *wilson(sum(judged), len(judged)), fmean(tokens), float(median(tokens)),
        {name: sum(row.stages.get(name, 0) for row in rows) / n for name in names},
        verdicts.count("unsafe") if verdicts else None,
    )  # fmt: skip


@dataclass
class Evaluation:
    """The rows of one model, and how they came about.

    name:       of the model, as tables and plots show it
    rows:       in the order of suites, paths and prompts
    settings:   what was asked for: limits, judge, seed, batch size, …
    facts:      date, hardware, versions, command, seconds
    agreements: [{"judge", "labels", accuracy, auc, n, low, high, base_rate}, …] of the judges with people
    """

    name: str
    rows: list[Row]
    settings: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    agreements: list[dict] = field(default_factory=list)

    def summaries(self, *, by_suite: bool = False) -> list[Summary]:
        """One a label, path and check, and with by_suite one a suite besides, in the order of the rows."""
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            key = (row.suite if by_suite else wrapping_of(row.suite), row.label, row.path, row.check)
            groups.setdefault(key, []).append(row)
        return [summarise(rows) for rows in groups.values()]

    def save(self, path: str | Path) -> Path:
        """Writes results.json whole or not at all."""
        path = Path(path)
        whole = {
            "format": FORMAT,
            "name": self.name,
            "settings": self.settings,
            "facts": self.facts,
            "agreements": self.agreements,
            "summaries": [asdict(summary) for summary in self.summaries(by_suite=True)],
            "rows": [asdict(row) for row in self.rows],
        }
        text = json.dumps(_without_nan(whole), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """From results.json, or from the folder it lies in. ValueError: no such file, or something else."""
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in found["rows"]]
            fields = {name: found[name] for name in ("name", "settings", "facts", "agreements")}
        except FileNotFoundError:
            raise ValueError(f"there is no {path}; `mote eval MODEL --out DIR` writes one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of mote eval: {type(error).__name__}") from None
        if found.get("format") != FORMAT:
            raise ValueError(f"{path}: format {FORMAT} expected, got {found.get('format')!r}")
        return cls(rows=rows, **fields)


def wrapping_of(suite: str) -> str:
    """Plain and jailbreak-wrapped prompts are never summed up together."""
    return WRAPPED if suite.endswith(WRAPPED) else ""


def _without_nan(value):
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
