"""Prompts that chains are built from: a JSONL or CSV file, an installed suite, or a data set of the `datasets` library.

    read_prompts("prompts.jsonl")        {"prompt": …} or {"messages": […]}, and optionally id, label, source
    read_prompts("prompts.csv")          columns prompt, and optionally id, label, source
    read_prompts("suite:advbench:100")   100 of a suite's prompts, drawn by their ids
    read_prompts("hf:owner/name:train")  the split of a data set with a column prompt or messages

Reasons name the file, the line and the field, never what a prompt says.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mote_ext import jsonl, keyed
from mote_ext.chains.fields import require_question, require_text

LABELS = ("harmful", "benign")
UNLABELLED = "unlabelled"
FIELDS = ("id", "prompt", "messages", "label", "source")
REJECTED = "/rejected-"  # id of a rejected answer: that of its prompt, this, and its number
Numbered = Iterator[tuple[str, dict]]  # where a row stands, and the row


@dataclass(frozen=True)
class Prompt:
    """What a chain answers.

    id:       names it in the output, in journals and in keyed draws; unique in a run
    prompt:   the user's message, or None where there are messages
    messages: [{"role": …, "content": …}, …] that end before the answer, or None
    label:    "harmful", "benign" or None: what its source says of it
    source:   where it is from, or None
    """

    id: str
    prompt: str | None = None
    messages: tuple[dict, ...] | None = None
    label: str | None = None
    source: str | None = None

    @classmethod
    def from_dict(cls, row: dict, default_id: str, default_source: str | None = None) -> Prompt:
        """The prompt of a row; fields that are null or an empty column are as if absent. ValueError: why it is none."""
        given = {name: row[name] for name in FIELDS if row.get(name) not in (None, "", [])}
        require_question(given.get("prompt"), given.get("messages"))
        label = given.get("label")
        if label not in (None, *LABELS):
            raise ValueError(
                f"label must be one of {LABELS} or left out, got a {type(label).__name__} of another value"
            )
        identity, source = given.get("id", default_id), given.get("source", default_source)
        identity = str(identity) if isinstance(identity, int) else identity
        require_text("id", identity)
        if REJECTED in identity:
            raise ValueError(f"id must not hold {REJECTED}, which names an answer that was rejected")
        if source is not None:
            require_text("source", source)
        turns = given.get("messages")
        messages = turns and tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
        return cls(identity, given.get("prompt"), messages, label, source)

    def to_dict(self) -> dict:
        """Its fields without those that are None."""
        messages = None if self.messages is None else [dict(message) for message in self.messages]
        fields = {"id": self.id, "prompt": self.prompt, "messages": messages}
        fields |= {"label": self.label, "source": self.source}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def turns(self) -> list[dict]:
        """It as messages."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.messages]

    @property
    def text(self) -> str:
        """It as one text; a conversation turn by turn, "USER: …" and "ASSISTANT: …"."""
        if self.messages is None:
            return self.prompt
        return "\n".join(f"{message['role'].upper()}: {message['content']}" for message in self.messages)


def read_prompts(spec: str | Path) -> list[Prompt]:
    """The prompts of one source, in its order; a missing id becomes NAME-INDEX, which stays the same.

    spec: see the top of this file
    ValueError: "file:line: reason", an id twice, an empty source. ImportError: a package of the suite or `datasets` is
    missing, with the command that installs it. OSError: no such file.
    """
    text = str(spec)
    if text.startswith("suite:"):
        name, rows = text.split(":")[1], _suite_rows(text)
    elif text.startswith("hf:"):
        name, rows = text.split(":")[1].rstrip("/").split("/")[-1], _dataset_rows(text)
    else:
        path = Path(text).expanduser()
        name, rows = path.stem, _file_rows(path)
    prompts = []
    for index, (where, row) in enumerate(rows):
        try:
            prompts.append(Prompt.from_dict(row, f"{name}-{index}", name))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not prompts:
        raise ValueError(f"{text} holds no prompts")
    require_unique_ids(prompts, text)
    return prompts


def require_unique_ids(prompts: Sequence[Prompt], where: str) -> None:
    """ValueError: an id that names two prompts."""
    seen: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        if prompt.id in seen:
            raise ValueError(
                f"{where}: prompts {seen[prompt.id] + 1} and {index + 1} have the same id {prompt.id!r}; each prompt "
                "needs one of its own"
            )
        seen[prompt.id] = index


def digest_of(value) -> str:
    """sha256 of what is said in JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_rows(path: Path) -> Numbered:
    kinds = {".jsonl": _jsonl_rows, ".json": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in kinds:
        raise ValueError(
            f"{path}: prompts are read from a .jsonl or .csv file, suite:NAME[:N] or hf:DATASET[:SPLIT], got a file "
            f"ending in {path.suffix or 'nothing'}"
        )
    return kinds[path.suffix.lower()](path)


def _jsonl_rows(path: Path) -> Numbered:
    return ((f"{path}:{number}", row) for number, row in jsonl.rows(path))


def _csv_rows(path: Path) -> Numbered:
    reader = csv.DictReader(io.StringIO(_text_of(path), newline=""))
    before = 1  # a row may span lines: it begins behind the one before
    try:
        if "prompt" not in (reader.fieldnames or ()):
            others = len(reader.fieldnames or ())  # their names may be a prompt, in a file without a header
            raise ValueError(
                f"{path}:1: the first line must name the columns, among them prompt; it has {others} others"
            )
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}:{before + 1}: more fields than the header has; a comma needs quotes around it"
                )
            yield f"{path}:{before + 1}", row
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    jsonl.require_narrow(path, data)
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file, for instance: "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def _suite_rows(spec: str) -> Numbered:
    from mote_ext.suites import read_suite

    _, name, *rest = spec.split(":")
    if len(rest) > 1 or (rest and not (rest[0].isdecimal() and int(rest[0]))):
        raise ValueError(f"a suite is written suite:NAME or suite:NAME:N, such as suite:advbench:100, got {spec!r}")
    rows = list(read_suite(name))
    if rest:  # suites are sorted by topic: their first N would be of one
        rows = keyed.draw(rows, int(rest[0]), lambda row: ("suite", name, row.id))
    for row in rows:
        yield row.id, {"id": row.id, "prompt": row.prompt, "label": row.label, "source": row.source}


def _dataset_rows(spec: str) -> Numbered:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"{spec} needs the datasets library: pip install 'mote_ext[data]'") from None
    _, name, *rest = spec.split(":")
    if not name or len(rest) > 1:
        raise ValueError(f"a data set is written hf:DATASET or hf:DATASET:SPLIT, got {spec!r}")
    split = rest[0] if rest else "train"
    for index, row in enumerate(load_dataset(name, split=split)):
        yield f"hf:{name}:{split} row {index}", row
