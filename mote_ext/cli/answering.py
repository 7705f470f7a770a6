"""One answer of a MoTE model as the command line wants it: what was asked for, what came, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mote_ext.cli.errors import CommandError
from mote_ext.encoding import Messages, encode_prompts
from mote_ext.generation import StageStreamer, StageText
from mote_ext.generation.plan import escalation, make_plan
from mote_ext.skinny import skinny_linears
from mote_ext.stages import PROMPT, StageTable

if TYPE_CHECKING:
    from mote_ext.config import MoTEConfig

Route = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Wishes:
    """What the options ask of every answer.

    path, check, stage_max_tokens: generate's
    hide:     stages that are not shown; they are generated, and counted
    limit:    most tokens of everything
    system:   content of a system message
    sampling: what else goes to transformers' generate
    """

    path: Route = "adaptive"
    check: bool | str = False
    hide: tuple[str, ...] = ()
    stage_max_tokens: dict[str, int] = field(default_factory=dict)
    limit: int = 512
    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def judges_first(self) -> bool:
        """Whether nothing may be shown before the verdict: of a refused answer its analysis is none of the reader's."""
        return self.check == "enforce" or self.path == "escalate"

    def require_sense(self, config: MoTEConfig) -> None:
        """ValueError or CommandError: what this model cannot do, said before its weights are loaded."""
        table = config.stage_table
        for name in self.hide:
            if name not in table.names:
                raise CommandError(f"--hide: stage must be one of {list(table.names)}, got {name!r}")
        if table.marker_ids is None:
            raise CommandError("this model has no markers, so it cannot be asked to answer in stages")
        if isinstance(self.path, str) and self.path not in (names := path_names(table)):
            chain = ",".join(stage.name for stage in table.stages if stage.role != "check")
            raise CommandError(
                f"--path: one of {', '.join(names)}, or stage names such as {chain} expected, got {self.path!r}"
            )
        if self.path is None:
            if self.check or self.stage_max_tokens:
                raise CommandError("--path none has no stage rules, so it takes neither --check nor --stage-max-tokens")
            return
        paths = escalation(table) if self.path == "escalate" else [self.path]
        check = "enforce" if self.path == "escalate" else self.check
        for path in paths:
            make_plan(config, table, path, check, self.limit, self.stage_max_tokens)


def path_names(table: StageTable) -> list[str]:
    """What --path takes beside stage names with commas between them."""
    reasoning = [stage.name for stage in table.stages if stage.role == "reasoning"]
    return list(dict.fromkeys(["adaptive", "answer", *reasoning, "full", "escalate", "none"]))


@dataclass(frozen=True)
class Piece:
    """A stage's text without its markers, and how many tokens it is; what stands outside of stages is "prompt"."""

    stage: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    """What came of one prompt.

    path:   names of the stages gone through
    pieces: what the model answers, stage by stage; of a refused answer the refusal alone
    verdict, stop_reason: as in MoTEGenerateOutput
    generated_tokens: markers included; of "escalate" those of the last attempt
    """

    path: list[str]
    pieces: list[Piece]
    verdict: str | None
    stop_reason: str
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def refused(self) -> bool:
        return self.stop_reason.endswith(":refusal")

    def plain(self, table: StageTable) -> str:
        """The answer alone: the response's text, or all of it where no response was opened."""
        response = table.names[table.response]
        said = [piece.text for piece in self.pieces if piece.stage == response]
        return "".join(said or [piece.text for piece in self.pieces]).strip()

    def to_dict(self, hide: Sequence[str] = ()) -> dict:
        """For JSON, the hidden stages' texts left out."""
        fields = asdict(self)
        return {"stages": [piece for piece in fields.pop("pieces") if piece["stage"] not in hide], **fields}


class Answerer:
    """A model, its tokenizer and what is wished for."""

    def __init__(self, model, tokenizer, wishes: Wishes) -> None:
        self.model, self.tokenizer, self.wishes = model, tokenizer, wishes

    @property
    def table(self) -> StageTable:
        return self.model.routing.table

    @property
    def verdicts(self) -> dict[str, str]:
        """What the check stage writes -> what it means."""
        return dict(zip(self.model.config.verdicts, ("safe", "unsafe")))

    def answer(self, prompt: str | Messages, show: Callable[[StageText], None] | None = None) -> Answer:
        """Answers a text or a conversation; `show` gets the pieces, as they come unless a verdict has to come first."""
        inputs = encode_prompts(self.tokenizer, [prompt], system=self.wishes.system)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        streams = show is not None and not self.wishes.judges_first
        begin = time.perf_counter()
        streamer = self._streamer(show) if streams else None
        with skinny_linears(self.model):
            output = self.model.generate(**inputs, **self._options(), streamer=streamer)
        seconds = time.perf_counter() - begin
        answer = self._answer(output, inputs["input_ids"].shape[1], seconds)
        if show is not None and not streams:
            for piece in answer.pieces:
                if piece.stage not in self.wishes.hide:
                    show(StageText(piece.stage, piece.text))
        return answer

    def _options(self) -> dict:
        wishes = self.wishes
        options = {"path": wishes.path, "max_new_tokens": wishes.limit, "return_dict_in_generate": True}
        if wishes.path is not None:
            options |= {"check": wishes.check, "stage_max_tokens": wishes.stage_max_tokens}
        return options | wishes.sampling

    def _streamer(self, show: Callable[[StageText], None]) -> StageStreamer:
        streamer = StageStreamer(self.tokenizer, show, hide=self.wishes.hide)
        streamer.begin(self.table)  # generate does it too, but not for path=None
        return streamer

    def _answer(self, output, num_prompt: int, seconds: float) -> Answer:
        pieces = split(output.sequences[0, num_prompt:].tolist(), self.table, self.tokenizer)
        if self.wishes.path is None:  # transformers' own output, which knows no stages
            num_generated = output.sequences.shape[1] - num_prompt
            path, verdict, reason = [piece.stage for piece in pieces if piece.stage != PROMPT], None, "eos"
            if num_generated >= self.wishes.limit and int(output.sequences[0, -1]) not in self._eos_ids():
                reason = "max_new_tokens"
        else:
            num_generated = output.num_generated[0]
            path, verdict, reason = output.stages[0], output.verdicts[0], output.stop_reasons[0]
        return Answer(path, pieces, verdict, reason, num_prompt, num_generated, round(seconds, 3))

    def _eos_ids(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return eos if isinstance(eos, list) else [eos]


def split(ids: Sequence[int], table: StageTable, tokenizer) -> list[Piece]:
    """A chain without its prompt as pieces, in order; like mote_ext.parse_stages, with token counts."""
    runs: list[tuple[str, list[int]]] = [(PROMPT, [])]
    for token in ids:
        if token in table.marker_ids:
            stage, ends = divmod(table.marker_ids.index(token), 2)
            runs.append((PROMPT if ends else table.names[stage], []))
        else:
            runs[-1][1].append(token)
    pieces = [Piece(name, tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)) for name, tokens in runs]
    return [piece for piece in pieces if piece.stage != PROMPT or piece.text]
