"""The mix of a file of chains: how many prompts took which way, beside the paper's, and how long the stages are."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from mote_ext.chains.prompts import REJECTED, UNLABELLED
from mote_ext.encoding import encode_text
from mote_ext.stages import StageTable

PAPER = (28.5, 10.1, 61.4)  # percent of its 6,000 chains with no, one and two stages of reasoning (section 3.1)


@dataclass(frozen=True)
class Mix:
    """ways: label -> name of the way -> chains; rejected, dropped: label -> rows; mean_tokens: stage -> of the chains;
    names: of the ways, from the shortest"""

    ways: dict[str, Counter]
    rejected: Counter
    dropped: Counter
    mean_tokens: dict[str, float]
    names: list[str]

    @classmethod
    def of(cls, out: str | Path, table: StageTable, tokenizer) -> Mix:
        """Of the files of a run (journal.py)."""
        out = Path(out)
        reasoning = reasoning_names(table)
        names = way_names(table)
        ways, rejected = defaultdict(Counter), Counter()
        lengths = defaultdict(list)
        for row in _rows(out):
            label = row.get("label", UNLABELLED)
            if is_rejected(row):
                rejected[label] += 1
                continue
            ways[label][way_of(row, table)] += 1
            for name in (*reasoning, table.names[table.response]):
                if name in row:
                    lengths[name].append(len(encode_text(tokenizer, row[name])))
        dropped = Counter(row.get("label", UNLABELLED) for row in _rows(out.with_name(out.name + ".dropped.jsonl")))
        means = {name: sum(found) / len(found) for name, found in lengths.items()}
        return cls(dict(ways), rejected, dropped, means, names)

    @property
    def num_chains(self) -> int:
        return sum(sum(ways.values()) for ways in self.ways.values())

    def lines(self) -> list[str]:
        """A table for the terminal: a row a label, counts and percent of each way, the paper's below."""
        labels = sorted({*self.ways, *self.rejected, *self.dropped})
        rows = [("", "chains", *self.names, "rejected", "dropped")]
        total = sum(self.ways.values(), Counter())
        for label in labels:
            rows.append(
                (label, *self._cells(self.ways.get(label, Counter()), self.rejected[label], self.dropped[label]))
            )
        if len(labels) != 1:
            rows.append(("all", *self._cells(total, self.rejected.total(), self.dropped.total())))
        if len(self.names) == len(PAPER):
            rows.append(("the paper's", "6000", *(f"{percent} %" for percent in PAPER), "-", "-"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows
        ]
        means = ", ".join(f"{name} {mean:.0f}" for name, mean in self.mean_tokens.items())
        return [*(line.rstrip() for line in lines), f"mean tokens a stage: {means or 'none'}"]

    def _cells(self, ways: Counter, rejected: int, dropped: int) -> list[str]:
        chains = ways.total()
        shares = [f"{ways[name]} ({100 * ways[name] / chains:.1f} %)" if chains else "0" for name in self.names]
        return [str(chains), *shares, str(rejected), str(dropped)]


def way_names(table: StageTable) -> list[str]:
    """What the ways with 0, 1, … stages of reasoning are called: answer, the last stage of each, full."""
    reasoning = reasoning_names(table)
    names = ["answer", *reasoning]
    return [*names[:-1], "full"] if len(reasoning) > 1 else names


def way_of(row: dict, table: StageTable) -> str:
    """The way a chain's line went."""
    return way_names(table)[sum(name in row for name in reasoning_names(table))]


def is_rejected(row: dict) -> bool:
    """Whether a line is an answer that was not let through."""
    return REJECTED in row["id"]


def reasoning_names(table: StageTable) -> list[str]:
    return [stage.name for stage in table.stages if stage.role == "reasoning"]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
