"""StageStreamer: text as it is generated, labelled by stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from queue import Queue

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mote_ext.stages import PROMPT, StageTable


@dataclass(frozen=True)
class StageText:
    """A piece of text and the name of its stage."""

    stage: str
    text: str


class StageStreamer(BaseStreamer):
    """Give it to generate(streamer=…), and take StageText pieces from a callback or, in another thread, by iterating.

    tokenizer: the model's
    callback:  called with each StageText; None collects them for iteration
    hide:      names of stages that are not shown
    One sequence at a time. With check="enforce" everything is held back until the verdict, as generate arranges: what
    was shown cannot be recalled.
    """

    def __init__(
        self, tokenizer, callback: Callable[[StageText], None] | None = None, *, hide: tuple[str, ...] = ()
    ) -> None:
        if isinstance(hide, str):
            raise TypeError(f"StageStreamer: hide must be a tuple of stage names, got the text {hide!r}")
        self.tokenizer, self._always_hidden = tokenizer, frozenset(hide)
        self._queue: Queue[StageText | None] = Queue()
        self._callback = callback or self._queue.put
        self._iterable = callback is None
        self.begin(None)

    def begin(self, table: StageTable | None, hold: bool = False, hide: Collection[str] = ()) -> None:
        """generate calls it: the stages, whether text waits for release() or discard(), what is hidden."""
        self._table, self._hold, self._hidden = table, hold, self._always_hidden | frozenset(hide)
        for name in self._hidden if table else ():
            table.index(name)  # raises on a stage there is not
        self._held: list[StageText] = []
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """generate calls it before each of transformers' loops, which put the prompt first."""
        self._expects_prompt = True
        self._open(PROMPT)

    def put(self, value: Tensor) -> None:
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(f"StageStreamer: one sequence at a time, got a batch of {value.shape[0]}")
        tokens = value.reshape(-1).tolist()
        if self._expects_prompt:
            self._expects_prompt = False
            tokens = tokens[-1:] if self._table and tokens and tokens[-1] in self._table.marker_ids else []
        for token in tokens:
            self._take(token)

    def end(self) -> None:
        """transformers calls it after each of its loops; generate calls finish() after the last one."""
        self._flush()

    def finish(self) -> None:
        self._flush()
        if self._iterable:
            self._queue.put(None)

    def release(self) -> None:
        """Shows what was held back."""
        held, self._held = self._held, []
        for piece in held:
            self._callback(piece)

    def discard(self, replacement: StageText | None = None) -> None:
        """Forgets what was held back; shows `replacement` in its place."""
        self._held = []
        if replacement is not None:
            self._callback(replacement)

    def __iter__(self) -> Iterator[StageText]:
        while (piece := self._queue.get()) is not None:
            yield piece

    def _open(self, stage: str) -> None:
        self._stage, self._tokens, self._shown = stage, [], ""

    def _take(self, token: int) -> None:
        markers = self._table.marker_ids if self._table else ()
        if token in markers:
            self._flush()
            place = markers.index(token)
            self._open(PROMPT if place % 2 else self._table.names[place // 2])
            return
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
            self._show(text)

    def _flush(self) -> None:
        if self._tokens:
            self._show(self.tokenizer.decode(self._tokens, skip_special_tokens=True))
        self._tokens = []
        self._shown = ""

    def _show(self, text: str) -> None:
        piece, self._shown = text[len(self._shown) :], text
        if not piece or self._stage in self._hidden:
            return
        if self._hold:
            self._held.append(StageText(self._stage, piece))
        else:
            self._callback(StageText(self._stage, piece))
