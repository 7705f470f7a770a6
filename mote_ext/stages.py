"""Stages, their marker tokens, and the stage every token belongs to.

    text        Q  Q  <|analysis|>  a  <|endofanalysis|>  <|response|>  s  <|endofresponse|>
    stage_ids  -1 -1       0        0         0                1        1         1

A start marker belongs to its own stage, an end marker to the stage it ends; whatever stands outside is prompt, whose id
the model's `prompt_expert` decides (-1 here, the shared expert alone). Stage ids are a function of the token ids and of
nothing else, so they survive beams, roll-backs, packing and any training framework. (In this example the table has two
stages.) Source: MoTE, arXiv 2405.00557, section 3.2 and figure 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

BASE_ONLY = -2  # stage id of a token that only the frozen base processes
SHARED_ONLY = -1  # stage id of a token that the shared expert alone processes
PROMPT = "prompt"  # the name of what belongs to no stage
ROLES = ("reasoning", "response", "check")
_TAKEN = (PROMPT, "shared", "none", "random")  # words of prompt_expert, and of exported folders
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_START_MARKER = re.compile(r"<\|([a-z][a-z0-9_]*)\|>")


@dataclass(frozen=True)
class Stage:
    """A named step of the chain.

    name:  lower-case word; the markers are <|name|> and <|endofname|>, the expert's index is the place in the table
    role:  "reasoning", "response" (the answer; a table has one) or "check" (judges the answer; at most one)
    next:  names of the stages that may follow; after the response also the check, which no transition lists
    words: plain words whose embeddings the marker rows begin with (start marker, end marker)
    """

    name: str
    role: str = "reasoning"
    next: tuple[str, ...] = ()
    words: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _TAKEN or self.name.startswith("endof"):
            raise ValueError(
                f"Stage: name must be a lower-case word, none of {_TAKEN} and not beginning with 'endof', "
                f"got {self.name!r}"
            )
        if self.role not in ROLES:
            raise ValueError(f"Stage {self.name!r}: role must be one of {ROLES}, got {self.role!r}")
        object.__setattr__(self, "next", tuple(self.next))
        words = tuple(self.words)
        object.__setattr__(self, "words", words if all(words) else (f"begin {self.name}", f"end of {self.name}"))

    @property
    def start_marker(self) -> str:
        return f"<|{self.name}|>"

    @property
    def end_marker(self) -> str:
        return f"<|endof{self.name}|>"


ANALYSIS = Stage("analysis", next=("guidance", "response"), words=("question analysis", "analysis finished"))
GUIDANCE = Stage("guidance", next=("response",), words=("answer guidance strategy", "guidance complete, stop"))
RESPONSE = Stage("response", role="response", words=("response to the user", "response end, done"))
CHECK = Stage("check", role="check", words=("safety check verdict", "verdict given, over"))


class StageTable:
    """The stages of a model in the order of their experts, which transitions are legal, and the markers' token ids.

    stages:     Stage objects or their dictionaries; the first stages of a chain are those that nothing leads to, and
                always the response
    marker_ids: start and end id of every stage in turn, [start0, end0, start1, …]; None before a tokenizer is known
    ValueError: no or several response stages, a check that is not the last, a transition that leads nowhere or
    backwards, ids that repeat.
    """

    def __init__(self, stages: Iterable[Stage | dict], marker_ids: Sequence[int] | None = None) -> None:
        self.stages = tuple(stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages)
        self.names = tuple(stage.name for stage in self.stages)
        self._check_stages()
        self.marker_ids = None if marker_ids is None else tuple(int(token) for token in marker_ids)
        self._check_marker_ids()
        self._tensors: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.stages)

    def index(self, name: str) -> int:
        """The stage's number, which is its expert's. ValueError: no stage of this name."""
        if name not in self.names:
            raise ValueError(f"stage must be one of {list(self.names)}, got {name!r}")
        return self.names.index(name)

    @property
    def response(self) -> int:
        return next(i for i, stage in enumerate(self.stages) if stage.role == "response")

    @property
    def check(self) -> int | None:
        return next((i for i, stage in enumerate(self.stages) if stage.role == "check"), None)

    @property
    def markers(self) -> list[str]:
        """The marker strings in the order of marker_ids."""
        return [marker for stage in self.stages for marker in (stage.start_marker, stage.end_marker)]

    def start_id(self, stage: int) -> int:
        return self._ids()[2 * stage]

    def end_id(self, stage: int) -> int:
        return self._ids()[2 * stage + 1]

    def first(self) -> tuple[int, ...]:
        """Stages that may follow the prompt."""
        follow = {name for stage in self.stages for name in stage.next}
        return tuple(
            i for i, s in enumerate(self.stages) if s.role == "response" or (s.role != "check" and s.name not in follow)
        )

    def following(self, stage: int) -> tuple[int, ...]:
        """Stages that may follow this one; the check, which depends on the request, is not among them."""
        return tuple(self.index(name) for name in self.stages[stage].next)

    def to_dicts(self) -> list[dict]:
        return [{**asdict(stage), "next": list(stage.next), "words": list(stage.words)} for stage in self.stages]

    def on(self, device: torch.device) -> Tensor:
        """marker_ids as an int64 tensor there, made once a device."""
        found = self._tensors.get(device)
        if found is None:
            found = self._tensors[device] = torch.tensor(self._ids(), dtype=torch.int64, device=device)
        return found

    def _ids(self) -> tuple[int, ...]:
        if self.marker_ids is None:
            raise ValueError(
                "the marker tokens have no ids yet: pass tokenizer= to from_base or get_mote_model, "
                "or marker_ids= to MoTEConfig"
            )
        return self.marker_ids

    def _check_stages(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"stages: names must differ, got {list(self.names)}")
        roles = [stage.role for stage in self.stages]
        if roles.count("response") != 1 or roles.count("check") > 1:
            raise ValueError(f"stages: exactly one response and at most one check are needed, got roles {roles}")
        if "check" in roles[:-1]:
            raise ValueError(
                f"stages: the check judges the answer, so it must be the last stage, got {list(self.names)}"
            )
        for i, stage in enumerate(self.stages):
            for name in stage.next:
                if name not in self.names or self.names.index(name) <= i:
                    raise ValueError(f"stage {stage.name!r}: next must name stages after it, got {name!r}")
            if stage.role == "reasoning" and not stage.next:
                raise ValueError(f"stage {stage.name!r}: a reasoning stage must lead to another, got next=()")

    def _check_marker_ids(self) -> None:
        ids = self.marker_ids
        if ids is None:
            return
        if len(ids) != 2 * len(self) or len(set(ids)) != len(ids) or min(ids, default=0) < 0:
            raise ValueError(
                f"marker_ids must be {2 * len(self)} different token ids, a start and an end for each of "
                f"{list(self.names)}, got {list(ids)}"
            )


def stage_ids_from_tokens(
    input_ids: Tensor, table: StageTable, *, prompt_id: int | Tensor = -1, position_ids: Tensor | None = None
) -> Tensor:
    """The stage of every token, from the markers before it.

    input_ids:    [B, T]  int64
    prompt_id:    id of tokens outside of stages: an int, or [B, 1] one a row
    position_ids: [B, T] or [1, T]; where it is 0 a new document begins (packing), outside of any stage
    returns:      [B, T]  int32
    Vectorised, without host synchronisation; torch.compile(fullgraph=True) takes it.
    """
    num_tokens = input_ids.shape[1]
    match = input_ids.unsqueeze(-1) == table.on(input_ids.device)  # [B, T, 2S]
    is_marker = match.any(-1)
    marker = match.to(torch.int32).argmax(-1).to(torch.int32)  # its place among the markers, where there is one
    stage, is_end = marker // 2, is_marker & (marker % 2 == 1)

    # What holds from a token on: a marker's stage at the marker itself, the prompt one after an end marker.
    prompt = torch.full_like(input_ids, 0, dtype=torch.int32) + prompt_id
    after_end = torch.nn.functional.pad(is_end, (1, 0))[:, :num_tokens]
    begins = after_end if position_ids is None else after_end | (position_ids == 0)
    holds_from_here = torch.where(is_marker, stage, prompt.to(torch.int32))
    place = torch.arange(num_tokens, device=input_ids.device)
    last_change = torch.where(is_marker | begins, place, -1).cummax(1).values
    ids = holds_from_here.gather(1, last_change.clamp(min=0))
    return torch.where(last_change < 0, prompt.to(torch.int32), ids)


def parse_stages(tokenizer, ids: Tensor | Sequence[int]) -> list[tuple[str, str]]:
    """Splits one sequence of token ids into [(stage name, text), …], in order; text outside of stages is "prompt".

    tokenizer: one whose vocabulary holds the markers (set_up_tokenizer adds them)
    ids:       [T] token ids, such as a row of generate's output
    Markers and other special tokens are left out of the text; an empty piece of prompt is left out altogether.
    """
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if ids and isinstance(ids[0], list):
        raise ValueError(f"parse_stages: ids must be one sequence, got a batch of {len(ids)}; call it a row")
    opens, ends = _markers_of(tokenizer)
    pieces: list[tuple[str, list[int]]] = [(PROMPT, [])]
    for token in ids:
        if token in opens:
            pieces.append((opens[token], []))
        elif token in ends:
            pieces.append((PROMPT, []))
        else:
            pieces[-1][1].append(token)
    texts = [(name, tokenizer.decode(tokens, skip_special_tokens=True)) for name, tokens in pieces]
    return [(name, text) for name, text in texts if name != PROMPT or text]


def _markers_of(tokenizer) -> tuple[dict[int, str], set[int]]:
    """Start marker id → stage name, and the end marker ids, of the pairs in the tokenizer's added vocabulary."""
    added = tokenizer.get_added_vocab()
    opens, ends = {}, set()
    for token, token_id in added.items():
        found = _START_MARKER.fullmatch(token)
        if found and f"<|endof{found[1]}|>" in added:
            opens[token_id] = found[1]
            ends.add(added[f"<|endof{found[1]}|>"])
    if not opens:
        raise ValueError("this tokenizer has no stage markers; mote_ext.set_up_tokenizer adds them")
    return opens, ends


def segments(stage_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal stage as (stage, begin, end)."""
    changes = [i for i, (a, b) in enumerate(pairwise(stage_ids), 1) if a != b]
    bounds = [0, *changes, len(stage_ids)]
    return [(stage_ids[a], a, b) for a, b in pairwise(bounds) if b > a]
