"""GroupBuilder: the chains of a few prompts that go through the model together.

    answer, check → safe: done
    else analysis, answer, check → safe: done
    else guidance, answer, check → safe: done        (this last step `attempts` times, then the prompt is dropped)

The prompts of a group that need a step take it as one batch. Source: MoTE, arXiv 2405.00557, section 3.1, read as an
algorithm; a first answer is to the bare question. What becomes of prompts that never get a safe answer is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mote_ext.chains.asking import Templates, exemplar_turns
from mote_ext.chains.checkers import THRESHOLD, Checker
from mote_ext.chains.prompts import REJECTED, UNLABELLED, Prompt
from mote_ext.chains.record import SAFE, UNSAFE, Chain
from mote_ext.chains.settings import Settings
from mote_ext.chains.writer import Request, TextWriter
from mote_ext.stages import StageTable


@dataclass(frozen=True)
class GroupResult:
    """chains: rows for the output, each prompt's rejected answers before its chain; dropped: rows of prompts without a
    chain {"id", "dropped": true, "reason", …}; num_prompts: of the group"""

    chains: list[dict]
    dropped: list[dict]
    num_prompts: int


@dataclass
class _Row:
    """A prompt under way. texts: stage name -> text; draws: stage name -> how often it was drawn"""

    prompt: Prompt
    start: int
    texts: dict[str, str] = field(default_factory=dict)
    draws: Counter = field(default_factory=Counter)
    rejected: list[dict[str, str]] = field(default_factory=list)
    reason: str = "no answer was judged safe"
    is_open: bool = True
    is_safe: bool = False

    def drop(self, reason: str) -> None:
        self.is_open, self.reason = False, reason


class GroupBuilder:
    """Builds chains, group by group; a group's result depends on its prompts and the settings alone.

    writer:    of the stages' texts
    checker:   of the answers
    table:     the stages; one without a check gives chains without a verdict, and no rejected rows
    exemplars: chains that are shown before a request; the bare question of a first answer is asked without
    """

    def __init__(
        self,
        writer: TextWriter,
        checker: Checker,
        table: StageTable,
        templates: Templates,
        settings: Settings,
        exemplars: Sequence[Chain] = (),
    ) -> None:
        settings.require_stages(table)
        self.writer, self.checker, self.table, self.templates = writer, checker, table, templates
        self.settings, self.exemplars = settings, tuple(exemplars)
        self.reasoning = [stage.name for stage in table.stages if stage.role == "reasoning"]
        self.response = table.names[table.response]
        self.check = None if table.check is None else table.names[table.check]
        self._markers = table.markers
        self._shown: dict[tuple, list[dict]] = {}

    def build(self, prompts: Sequence[Prompt]) -> GroupResult:
        """The chains of these prompts."""
        rows = [_Row(prompt, self.settings.start.get(prompt.label or UNLABELLED, 0)) for prompt in prompts]
        longest = len(self.reasoning)
        for step in range(longest + 1):
            self._take(rows, step)
        if self.settings.temperature > 0:
            for _ in range(1, self.settings.attempts):
                self._take(rows, longest)
        chains = [line for row in rows for line in self._lines(row)]
        dropped = [self._dropped(row) for row in rows if not row.is_safe]
        return GroupResult(chains, dropped, len(rows))

    def _take(self, rows: Sequence[_Row], step: int) -> None:
        """The step-th stage of reasoning, then an answer with all of them and its check, for the rows still open."""
        if step:
            self._reason(rows, self.reasoning[step - 1], self.reasoning[: step - 1])
        answering = [row for row in rows if row.is_open and row.start <= step]
        self._write(answering, self.response, self.reasoning[:step])
        answered = [row for row in answering if self.response in row.texts]
        scores = self.checker.scores([row.prompt for row in answered], [row.texts[self.response] for row in answered])
        for row, score in zip(answered, scores):
            row.is_safe = score >= THRESHOLD  # NaN is not
            row.is_open = not row.is_safe
            if row.is_open:
                row.rejected.append(dict(row.texts))

    def _reason(self, rows: Sequence[_Row], stage: str, given: Sequence[str]) -> None:
        """A text of a reasoning stage for each open row; one that comes out empty is drawn again, then the row ends."""
        waiting = [row for row in rows if row.is_open]
        for _ in range(self.settings.attempts if self.settings.temperature > 0 else 1):
            self._write(waiting, stage, given)
            waiting = [row for row in waiting if row.is_open and stage not in row.texts]
        for row in waiting:
            row.drop(f"{stage} came out empty")

    def _write(self, rows: Sequence[_Row], stage: str, given: Sequence[str]) -> None:
        """One draw of a stage's text for each row, in one batch; an empty one is none."""
        requests = [self._request(row, stage, given) for row in rows]
        for row, written in zip(rows, self.writer.write(requests, self.settings.limit(stage))):
            row.draws[stage] += 1
            row.texts.pop(stage, None)
            if written is None:
                row.drop(f"the request for {stage} is longer than the model's context")
            elif written.text and not any(marker in written.text for marker in self._markers):
                row.texts[stage] = written.text

    def _request(self, row: _Row, stage: str, given: Sequence[str]) -> Request:
        key = (self.settings.seed, row.prompt.id, stage, row.draws[stage])
        if stage == self.response and not given:
            return Request(tuple(row.prompt.turns), 0, key)
        shown = self._shown_before(stage, tuple(given), row.prompt.label)
        text = self.templates.render(stage, row.prompt.text, {name: row.texts[name] for name in given})
        return Request((*shown, {"role": "user", "content": text}), len(shown), key)

    def _shown_before(self, stage: str, given: tuple[str, ...], label: str | None) -> list[dict]:
        key = (stage, given, label)
        if key not in self._shown:
            self._shown[key] = exemplar_turns(self.templates, self.exemplars, stage, given, label)
        return self._shown[key]

    def _lines(self, row: _Row) -> list[dict]:
        """Its rejected answers, where they are kept, and its chain, where it has one."""
        lines = []
        if self.check is not None and self.settings.keep_rejected:
            for number, texts in enumerate(row.rejected, 1):
                identity = f"{row.prompt.id}{REJECTED}{number}"
                lines.append(self._line(row, identity, texts, {"check": UNSAFE, "loss_stages": [self.check]}))
        if row.is_safe:
            verdict = {} if self.check is None else {"check": SAFE}
            lines.append(self._line(row, row.prompt.id, row.texts, verdict))
        return lines

    def _line(self, row: _Row, identity: str, texts: dict[str, str], verdict: dict) -> dict:
        asked = row.prompt.to_dict()
        meta = {name: asked.pop(name) for name in ("label", "source") if name in asked}
        ordered = {name: texts[name] for name in (*self.reasoning, self.response) if name in texts}
        return {**asked, "id": identity, **ordered, **verdict, **meta}

    def _dropped(self, row: _Row) -> dict:
        told = {"id": row.prompt.id, "dropped": True, "reason": row.reason, "rejected": len(row.rejected)}
        return told if row.prompt.label is None else {**told, "label": row.prompt.label}
