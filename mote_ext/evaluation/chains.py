"""The answers of one model to one list of prompts, path by path, each generated once however often it is asked for.

A check comes after the answer, so one run with it gives the row without it too: the check's three tokens are granted on
top of the limit, and the answer is the same. Escalation is the same answers again, taken until a check says safe; its
cost is counted in full here, all attempts, which generate's own count of the last one leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mote_ext.encoding import encode_prompt, pad_id_of, padded_on_left
from mote_ext.engine import MoTEEngine, SamplingParams
from mote_ext.generation import GREEDY
from mote_ext.generation.outcome import num_generated, stop_reason
from mote_ext.generation.plan import escalation, make_plan
from mote_ext.judges.answers import base_answers, batches_by_length, end_ids
from mote_ext.stages import segments, stage_ids_from_tokens

CHECK_TOKENS = 3  # <|check|>, the verdict, <|endofcheck|>
RESPONSE = "response"  # under which a base's answer is counted
Path = str | tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came of one prompt on one path.

    text:    the response's alone
    tokens:  generated, markers included; stages: {stage: tokens} of them
    stop, verdict: as in MoTEGenerateOutput; attempts: of an escalation
    refused: whether a check put the refusal in the answer's place
    """

    text: str
    tokens: int
    stages: dict[str, int]
    stop: str
    verdict: str | None = None
    attempts: int = 1
    refused: bool = False


class Chains:
    """Answers of a model, generated when they are asked for and then kept.

    prompts: texts or messages
    with_check: whether answers on stage paths are judged by the check stage
    max_new_tokens, stage_max_tokens, system: of every answer, the check not counted
    done:    called with the number of answers after each batch
    """

    def __init__(
        self,
        model,
        tokenizer,
        prompts: Sequence,
        *,
        with_check: bool,
        max_new_tokens: int,
        batch_size: int,
        stage_max_tokens: Mapping[str, int] | None = None,
        system: str | None = None,
        engine: MoTEEngine | None = None,
        done: Callable[[int], object] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.with_check, self.max_new_tokens, self.batch_size = with_check, max_new_tokens, batch_size
        self.stage_max_tokens, self.system = dict(stage_max_tokens or {}), system
        self.engine, self.done = engine, done
        self._rows: list[list[int]] | None = None
        self._kept: dict[tuple, tuple[list[int], str | None]] = {}

    def base(self) -> list[Answer]:
        """The model's answers without experts and stages."""
        answers = base_answers(
            self.model, self.tokenizer, self.prompts, max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size, system=self.system, done=self.done,
        )  # fmt: skip
        ends = end_ids(self.model)
        return [
            Answer(
                text=self._text(ids),
                tokens=len(ids),
                stages={RESPONSE: len(ids)},
                stop="end" if ids and ids[-1] in ends else "max_new_tokens",
            )
            for ids in answers
        ]

    def answers(self, path: Path, check: bool | str) -> list[Answer]:
        """The answers on one path; check: False, "flag", "enforce"; "escalate" is a path of its own."""
        everyone = range(len(self.prompts))
        if path == "escalate":
            return self._escalated()
        found = self._generated(path, everyone)
        return [self._answer(ids, path, verdict, check) for ids, verdict in found]

    def plan(self, path: Path, check: bool):
        """The rules of a path; with the check they leave the same room for everything before it."""
        routing = self.model.routing
        limits, reserve = self.stage_max_tokens or None, max(1, self.max_new_tokens // 4)
        total = self.max_new_tokens + (CHECK_TOKENS if check else 0)
        return make_plan(routing.config, routing.table, path, "flag" if check else False, total, limits, reserve)

    def _escalated(self) -> list[Answer]:
        """Ever longer paths for those whose answer the check calls unsafe, and then the refusal."""
        attempts: list[list[Answer]] = [[] for _ in self.prompts]
        open_rows = list(range(len(self.prompts)))
        for path in escalation(self.model.routing.table):
            found = self._generated(path, open_rows)
            for row, (ids, verdict) in zip(open_rows, found):
                attempts[row].append(self._answer(ids, path, verdict, "enforce"))
            open_rows = [row for row in open_rows if attempts[row][-1].verdict == "unsafe"]
        return [_summed(tried) for tried in attempts]

    def _generated(self, path: Path, rows: Sequence[int]) -> list[tuple[list[int], str | None]]:
        """(generated ids, verdict) of these prompts, the check included where there is one."""
        chain = self._chain_of(path)
        missing = [row for row in rows if (chain, row) not in self._kept]
        if missing:
            self._generate(path, chain, missing)
        return [self._kept[chain, row] for row in rows]

    def _generate(self, path: Path, chain: tuple, rows: Sequence[int]) -> None:
        if self._rows is None:
            self._rows = [encode_prompt(self.tokenizer, prompt, system=self.system) for prompt in self.prompts]
        plan = self.plan(path, self.with_check)
        wishes = {
            "path": path,
            "check": "flag" if self.with_check else False,
            "max_new_tokens": plan.max_new_tokens,
            "response_reserve": plan.reserve,
            "stage_max_tokens": self.stage_max_tokens or None,
        }
        run = self._in_batches if self.engine is None else self._through_engine
        for row, ids, verdict in run(rows, wishes):
            self._kept[chain, row] = ids, verdict
            if self.done is not None:
                self.done(1)

    def _through_engine(self, rows: Sequence[int], wishes: dict) -> Iterator[tuple[int, list[int], str | None]]:
        """(row, generated ids, verdict) as they are finished."""
        params = SamplingParams(**wishes)
        requests = {self.engine.submit(self._rows[row], params): row for row in rows}
        while requests:
            for event in self.engine.step():
                if (output := event.output) is None:
                    continue
                if output.status != "finished":
                    raise RuntimeError(f"evaluate: a request ended as {output.status}: {output.error}")
                yield requests.pop(event.request_id), output.generated_tokens, output.verdict

    @torch.no_grad()
    def _in_batches(self, rows: Sequence[int], wishes: dict) -> Iterator[tuple[int, list[int], str | None]]:
        """The same from generate, for models the engine does not serve."""
        plan, pad_id = self.plan(wishes["path"], self.with_check), pad_id_of(self.tokenizer)
        for batch in batches_by_length([len(self._rows[row]) for row in rows], self.batch_size):
            picked = [rows[i] for i in batch]
            inputs = padded_on_left([self._rows[row] for row in picked], pad_id, self.model.device)
            out = self.model.generate(**inputs, **wishes, pad_token_id=pad_id, return_dict_in_generate=True, **GREEDY)
            written = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
            for row, ids, verdict in zip(picked, written, out.verdicts):
                yield row, ids[: num_generated(ids, plan)], verdict

    def _answer(self, ids: list[int], path: Path, verdict: str | None, check: bool | str) -> Answer:
        table, config = self.model.routing.table, self.model.routing.config
        if not check and self.with_check:
            opens = table.start_id(table.check)
            ids, verdict = ids[: ids.index(opens)] if opens in ids else ids, None
        stages = self._stage_tokens(ids)
        reason = stop_reason(ids, self.plan(path, bool(check)))
        if check == "enforce" and verdict == "unsafe":
            refusal = f"{table.names[table.response]}:refusal"
            return Answer(config.refusal, len(ids), stages, refusal, verdict, refused=True)
        return Answer(self._response(ids), len(ids), stages, reason, verdict)

    def _stage_tokens(self, ids: list[int]) -> dict[str, int]:
        table = self.model.routing.table
        counts: dict[str, int] = {}
        for stage, begin, end in segments(stage_ids_from_tokens(torch.tensor([ids]), table)[0].tolist()):
            name = table.names[stage] if stage >= 0 else "prompt"
            counts[name] = counts.get(name, 0) + end - begin
        return counts

    def _response(self, ids: list[int]) -> str:
        table = self.model.routing.table
        opens, ends = table.start_id(table.response), table.end_id(table.response)
        begin = ids.index(opens) + 1 if opens in ids else len(ids)
        return self._text(ids[begin : ids.index(ends, begin) if ends in ids[begin:] else len(ids)])

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _chain_of(self, path: Path) -> tuple:
        """One name for "answer" and ("response",), which are the same path."""
        if path == "adaptive":
            return (path,)
        following, chain, stage = self.plan(path, False).following, [], -1
        while following.get(stage):
            stage = following[stage][0]
            chain.append(stage)
        return tuple(chain)


def _summed(tried: list[Answer]) -> Answer:
    """The last attempt, at the cost of all of them."""
    stages: dict[str, int] = {}
    for answer in tried:
        for name, count in answer.stages.items():
            stages[name] = stages.get(name, 0) + count
    last = tried[-1]
    tokens = sum(answer.tokens for answer in tried)
    return Answer(last.text, tokens, stages, last.stop, last.verdict, len(tried), last.refused)
