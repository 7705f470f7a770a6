"""One chain, and files of chains: one JSON object a line.

    {"prompt": "…", "analysis": "…", "guidance": "…", "response": "…", "check": "safe", "loss_stages": ["response"], …}

The stages' texts stand under the stages' names; the verdict, never free text, under "check". Instead of a prompt a line
may have messages. Every other field is kept as it is. Reasons name fields, types and lengths, never what a text says:
it may be harmful.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mote_ext import jsonl
from mote_ext.chains.fields import kind_of, require_question, require_text
from mote_ext.stages import StageTable

SAFE, UNSAFE = "safe", "unsafe"
VERDICTS = (SAFE, UNSAFE)
MAX_BAD_LINES_SHOWN = 5
_FIELDS = ("id", "prompt", "messages", "check", "loss_stages")


@dataclass(frozen=True)
class Chain:
    """A prompt with the stages of its answer.

    prompt:      the user's message, or None where there are messages
    messages:    [{"role": …, "content": …}, …], the last one not the assistant's, or None where there is a prompt
    texts:       the stages' texts by stage name, the check's left out
    check:       "safe", "unsafe" or None: whether the response is
    loss_stages: names of the stages whose tokens carry loss; None: all that the chain has, of an unsafe one its check
    id:          a name for messages and reports
    meta:        what else its line says: label, source, …
    """

    prompt: str | None = None
    messages: tuple[dict, ...] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    check: str | None = None
    loss_stages: tuple[str, ...] | None = None
    id: str | None = None
    meta: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("messages", "loss_stages"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def from_dict(cls, row: dict, table: StageTable) -> Chain:
        """The chain of one line. A field that is null is as if it was absent. ValueError: validate's reasons."""
        _require_own_names(table)
        given = {name: value for name, value in row.items() if value is not None}
        stages = [name for name in table.names if name in given and name != "check"]
        identity = given.get("id")
        chain = cls(
            prompt=given.get("prompt"),
            messages=given.get("messages"),
            texts={name: given[name] for name in stages},
            check=given.get("check"),
            loss_stages=given.get("loss_stages"),
            id=str(identity) if isinstance(identity, (int, float)) else identity,
            meta={name: value for name, value in row.items() if name not in (*_FIELDS, *stages)},
        )
        chain.validate(table)
        return chain

    def to_dict(self) -> dict:
        """What from_dict reads, without the fields that are None."""
        fields = {"id": self.id, "prompt": self.prompt}
        fields["messages"] = None if self.messages is None else [dict(message) for message in self.messages]
        fields |= {**self.texts, "check": self.check}
        fields["loss_stages"] = None if self.loss_stages is None else list(self.loss_stages)
        return {name: value for name, value in fields.items() if value is not None} | self.meta

    def stages(self, table: StageTable) -> list[int]:
        """Indices of the stages it has, the check included, in the table's order."""
        checked = table.check if self.check is not None else None
        return [stage for stage, name in enumerate(table.names) if name in self.texts or stage == checked]

    def stages_with_loss(self, table: StageTable) -> list[int]:
        """Indices of those of its stages whose tokens carry loss."""
        stages = self.stages(table)
        if self.loss_stages is not None:
            return [stage for stage in stages if table.names[stage] in self.loss_stages]
        return [table.check] if self.check == UNSAFE else stages

    def validate(self, table: StageTable) -> None:
        """ValueError: a field is missing, of the wrong type, empty, spells a marker, or asks for what cannot be."""
        if self.id is not None and not isinstance(self.id, str):
            raise ValueError(f"id must be a text or a number, got {kind_of(self.id)}")
        require_question(self.prompt, self.messages)
        self._validate_texts(table)
        self._validate_check(table)
        self._validate_loss(table)

    def _validate_texts(self, table: StageTable) -> None:
        response = table.names[table.response]
        if response not in self.texts:
            raise ValueError(f"{response} is missing: a chain needs a text for it")
        for name, text in self.texts.items():
            table.index(name)
            require_text(name, text)
            spelled = [marker for marker in table.markers if marker in text]
            if spelled:
                raise ValueError(f"{name} spells the marker {spelled[0]}; a marker stands between texts, never in one")

    def _validate_check(self, table: StageTable) -> None:
        own_name = "check" if table.check is None else table.names[table.check]
        if own_name != "check" and (own_name in self.texts or own_name in self.meta):
            raise ValueError(f"{own_name} is the check stage: its verdict is the field check, safe or unsafe")
        if self.check is None:
            return
        if table.check is None:
            raise ValueError(f"check is given, but the stages {list(table.names)} have none that checks")
        if self.check not in VERDICTS:
            raise ValueError(f'check must be "safe" or "unsafe", got {kind_of(self.check)}')

    def _validate_loss(self, table: StageTable) -> None:
        if self.loss_stages is None:
            return
        if not isinstance(self.loss_stages, tuple) or not all(isinstance(name, str) for name in self.loss_stages):
            raise ValueError(f"loss_stages must be a list of stage names, got {kind_of(self.loss_stages)}")
        unknown = [name for name in self.loss_stages if name not in table.names]
        if unknown:
            shown = [name if re.fullmatch(r"\w{1,40}", name) else "(not a word)" for name in unknown]
            raise ValueError(f"loss_stages must be among {list(table.names)}, got {shown}")
        names = [table.names[stage] for stage in self.stages(table)]
        if not set(self.loss_stages) & set(names):
            raise ValueError(f"loss_stages {list(self.loss_stages)} names no stage of this chain, which has {names}")
        if self.check == UNSAFE and set(self.loss_stages) != {table.names[table.check]}:
            raise ValueError(
                f"loss_stages {list(self.loss_stages)} on an unsafe chain: loss never falls on a rejected response or "
                "what led to it, only on its check"
            )


def read_chains(path: str | os.PathLike, table: StageTable) -> list[Chain]:
    """The chains of a JSONL file, in order. UTF-8, with or without a byte order mark; blank lines are passed over.

    ValueError: "file:line: reason" of the first bad lines, and how many there are; a file without a chain.
    """
    path = Path(path)
    chains, bad = [], []
    for number, line in jsonl.lines(path):
        try:
            chains.append(Chain.from_dict(jsonl.parse(line), table))
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        left = len(bad) - MAX_BAD_LINES_SHOWN
        more = [f"… and {left} more bad lines"] if left > 0 else []
        raise ValueError("\n".join(bad[:MAX_BAD_LINES_SHOWN] + more))
    if not chains:
        raise ValueError(f"{path}:1: the file is empty: expected one chain a line, a JSON object")
    return chains


def _require_own_names(table: StageTable) -> None:
    """ValueError: a stage's text would stand in a field that says something else."""
    for stage in table.stages:
        if stage.name in _FIELDS and (stage.name, stage.role) != ("check", "check"):
            raise ValueError(
                f"stage {stage.name!r} ({stage.role}): a line of chains has a field of this name; rename it"
            )
