"""From tokens to text while they come: stage by stage, whole characters only, and an eye on stop texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from mote_ext.stages import PROMPT, StageTable

HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet


class Piece(NamedTuple):
    """Text and tokens of one stage in one step."""

    stage: str
    text: str
    token_ids: list[int]


class StageReader:
    """The text of one sample as its tokens arrive.

    tokenizer: decodes, None for pieces without text; table: of the markers, or None
    stop:      texts to look for; stop_stage: in which stage, None for all text
    stopped:   a stop text was found; from then on the rest of that stage gives no text
    stop_text: of that stage, what stands before the stop text
    """

    def __init__(
        self, tokenizer, table: StageTable | None, stop: Collection[str] = (), stop_stage: str | None = None
    ) -> None:
        self.tokenizer, self.table = tokenizer, table
        self._stop, self._stop_stage = tuple(stop), stop_stage
        self._markers = table.marker_ids if table is not None and table.marker_ids is not None else ()
        self.restart()

    def restart(self) -> None:
        """Forgets everything: the chain begins again."""
        self.stopped, self.stop_text = False, ""
        self._open(PROMPT)

    def take(self, tokens: Sequence[int]) -> list[Piece]:
        """The pieces that these tokens complete, one for each stage they touch."""
        pieces: list[Piece] = []
        for token in tokens:
            if token not in self._markers:
                self._add(pieces, self._decoded(token), token)
                continue
            place = self._markers.index(token)
            if place % 2:  # an end marker belongs to the stage it ends
                self._add(pieces, self._rest(), token)
                self._open(PROMPT)
            else:
                self._add(pieces, self._rest(), None)
                self._open(self.table.names[place // 2])
                self._add(pieces, "", token)
        return pieces

    def finish(self) -> Piece:
        """What was waiting for the rest of a character or of a stop text."""
        return Piece(self.stage, self._rest(), [])

    def _open(self, stage: str) -> None:
        self.stage, self._tokens, self._begin, self._shown = stage, [], 0, 0
        self._waiting = ""
        self._looks = bool(self._stop) and self._stop_stage in (None, stage)

    def _add(self, pieces: list[Piece], text: str, token: int | None) -> None:
        if pieces and pieces[-1].stage == self.stage:
            pieces[-1] = Piece(self.stage, pieces[-1].text + text, pieces[-1].token_ids)
        elif text or token is not None:
            pieces.append(Piece(self.stage, text, []))
        if token is not None:
            pieces[-1].token_ids.append(token)

    def _decoded(self, token: int) -> str:
        """The text this token completes. Decoding from one token back keeps it linear in the tokens: a decoder treats
        the first token of a text specially, so that one is decoded with and without what follows."""
        self._tokens.append(token)
        before = self._decode(self._begin, self._shown)
        text = self._decode(self._begin, len(self._tokens))
        if text.endswith(HALF) or len(text) <= len(before):
            return ""
        self._begin, self._shown = self._shown, len(self._tokens)
        return self._before_stop(text[len(before) :])

    def _rest(self) -> str:
        text = ""
        if self._shown < len(self._tokens):
            before = self._decode(self._begin, self._shown)
            text = self._decode(self._begin, len(self._tokens))[len(before) :]
            self._shown = len(self._tokens)
        text, waiting = self._before_stop(text), self._waiting
        self._waiting = ""
        self.stop_text += waiting
        return text + waiting

    def _decode(self, begin: int, end: int) -> str:
        if self.tokenizer is None or begin >= end:
            return ""
        return self.tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True)

    def _before_stop(self, text: str) -> str:
        """What of `text` may be shown: nothing of a stop text, nor of what may become one."""
        if not self._looks:
            return text
        if self.stopped:
            return ""
        text, self._waiting = self._waiting + text, ""
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        else:
            kept = len(text) - _beginning_of(self._stop, text)
            text, self._waiting = text[:kept], text[kept:]
        self.stop_text += text
        return text


def _beginning_of(stops: Sequence[str], text: str) -> int:
    """Length of the longest end of `text` that one of `stops` begins with."""
    longest = min(max(map(len, stops)) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def split_text(tokenizer, tokens: Sequence[int], table: StageTable | None) -> list[tuple[str, str]]:
    """[(stage, text), …] of a whole chain; text outside of stages is "prompt", and left out where it is empty."""
    markers = table.marker_ids if table is not None and table.marker_ids is not None else ()
    runs: list[tuple[str, list[int]]] = [(PROMPT, [])]
    for token in tokens:
        if token in markers:
            place = markers.index(token)
            runs.append((PROMPT if place % 2 else table.names[place // 2], []))
        else:
            runs[-1][1].append(token)
    texts = [(name, tokenizer.decode(run, skip_special_tokens=True) if run else "") for name, run in runs]
    return [(name, text) for name, text in texts if name != PROMPT or text]
