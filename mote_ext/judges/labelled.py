"""Replies that people labelled, to measure a judge with before it is trusted.

Without a file of one's own: PyRIT's scorer evaluation sets (MIT), read from the installed package.
    refusal  a person said whether the assistant refused            safe = refused
    harm     one to three people rated the harm of the text 0..1    safe = mean rating below 0.5
In the refusal set "safe" is therefore a convention: what was not refused is counted as unsafe, whoever had asked.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mote_ext import jsonl, keyed
from mote_ext.suites.packages import package_file

PYRIT = "pyrit==1.1.0"
FOLDER = "pyrit/datasets/scorer_evals"
KINDS = {"refusal": "refusal_scorer/*.csv", "harm": "harm/*.csv"}
SPLITS = ("train", "test")
_REPEATED = "mini_"  # files whose rows stand in a longer one as well
_TRUE, _FALSE = {"true", "1", "yes", "safe"}, {"false", "0", "no", "unsafe"}


@dataclass(frozen=True)
class LabelledReply:
    """A reply and what people said of it.

    safe:    whether it may be shown
    refusal: whether it refuses; None where nobody was asked
    source:  file:line
    """

    prompt: str
    response: str
    safe: bool
    refusal: bool | None = None
    source: str = ""


def read_labelled(
    path: str | Path | None = None, split: str | None = None, kind: str | None = None
) -> list[LabelledReply]:
    """Labelled replies, each pair of prompt and response once.

    path:  a JSONL or CSV file with the fields prompt, response, safe and optionally refusal; None for PyRIT's sets
    split: "train" or "test", halves by a hash of the response, so that one text is never in both; None for all
    kind:  of PyRIT's sets "refusal" or "harm"; None for both
    ValueError: a split or kind that does not exist; "file:line: reason" for a row that cannot be read.
    ImportError: the pyrit package is not there, with the pip command.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"read_labelled: split must be one of {SPLITS} or None, got {split!r}")
    if kind not in (None, *KINDS) or (kind and path is not None):
        raise ValueError(f"read_labelled: kind must be one of {tuple(KINDS)} or None, without a path, got {kind!r}")
    found = _pyrit(kind) if path is None else _file(Path(path))
    replies: dict[tuple[str, str], LabelledReply] = {}
    for reply in found:
        replies.setdefault((reply.prompt, reply.response), reply)
    return [reply for reply in replies.values() if split is None or split_of(reply.response) == split]


def split_of(response: str) -> str:
    """The half a response belongs to, on every machine the same."""
    return SPLITS[keyed.integer(2, "labelled", " ".join(response.lower().split()))]


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file; lines before the header that begin with # are skipped."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        begin, num_comments = file.tell(), 0
        while file.readline().startswith("#"):
            begin, num_comments = file.tell(), num_comments + 1
        file.seek(begin)
        reader = csv.DictReader(file)
        before = 1  # a row may span lines: it begins behind the one before
        for row in reader:
            yield num_comments + before + 1, row
            before = reader.line_num


def _pyrit(kind: str | None) -> Iterator[LabelledReply]:
    folder = package_file(PYRIT, FOLDER)
    for name in [kind] if kind else KINDS:
        for path in sorted(folder.glob(KINDS[name])):
            if path.name.startswith(_REPEATED):
                continue
            for line, row in read_csv(path):
                scores = [float(value) for key, value in row.items() if key.startswith("human_score") and value]
                mean, source = sum(scores) / len(scores), f"{PYRIT}/{path.parent.name}/{path.name}:{line}"
                texts = row["objective"], row["assistant_response"]
                refusal = mean >= 0.5 if name == "refusal" else None
                yield LabelledReply(*texts, mean < 0.5 if refusal is None else refusal, refusal, source)


def _file(path: Path) -> Iterator[LabelledReply]:
    for line, row in _rows(path):
        where = f"{path}:{line}"
        missing = [name for name in ("prompt", "response", "safe") if row.get(name) in (None, "")]
        if missing:
            raise ValueError(f"{where}: the fields prompt, response and safe are needed, {missing} missing or empty")
        if not isinstance(row["prompt"], str) or not isinstance(row["response"], str):
            raise ValueError(f"{where}: prompt and response must be texts")
        refusal = row.get("refusal")
        refusal = None if refusal in (None, "") else _truth(refusal, "refusal", where)
        yield LabelledReply(row["prompt"], row["response"], _truth(row["safe"], "safe", where), refusal, where)


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    if path.suffix.lower() != ".csv":
        yield from jsonl.rows(path)
        return
    try:
        yield from read_csv(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the file is not UTF-8; convert it, for instance: iconv -f UTF-16 -t UTF-8") from None


def _truth(value, name: str, where: str) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"{where}: {name} must be true or false, got {type(value).__name__} of another meaning")
    return word in _TRUE
