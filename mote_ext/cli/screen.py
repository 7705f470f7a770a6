"""What a terminal shows: colours when they are wanted, stages as they stream, tables."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from mote_ext.generation import StageText
    from mote_ext.stages import StageTable

COLOR_MODES = ("auto", "always", "never")
_CODES = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}
_REASONING = ("cyan", "blue", "magenta")
_NUMBER = re.compile("-?[0-9,]*")
_ESCAPE = re.compile("\x1b\\[[0-9]*m")
# Text of a model must not steer the terminal: an escape character is shown as its picture.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Screen:
    """A stream and whether it takes colours.

    mode: "auto" (a terminal, and NO_COLOR is unset), "always" or "never"
    """

    def __init__(self, stream: TextIO, mode: str = "auto") -> None:
        self.stream = stream
        plain = os.environ.get("NO_COLOR", "") != "" or os.environ.get("TERM") == "dumb"
        self.coloured = mode == "always" or (mode == "auto" and stream.isatty() and not plain)

    def paint(self, text: str, *styles: str) -> str:
        """The text in these styles (bold, dim or a colour), or as it is."""
        if not self.coloured or not styles or not text:
            return text
        return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"

    def write(self, text: str, *styles: str) -> None:
        """Writes at once, so that a stream is seen as it comes."""
        self.stream.write(self.paint(text, *styles))
        self.stream.flush()

    def line(self, text: str = "", *styles: str) -> None:
        self.write(text, *styles)
        self.write("\n")


class StageScreen:
    """Shows StageText pieces: a label where a stage begins, and its text in the stage's colour.

    Give it to a StageStreamer as callback; call end() after the last piece. Text outside of stages has no label.
    verdicts: what the check stage writes -> the word that is shown
    """

    def __init__(self, screen: Screen, table: StageTable, verdicts: Mapping[str, str]) -> None:
        self.screen, self.table, self.verdicts = screen, table, verdicts
        self.colours = stage_colours(table)
        self._stage: str | None = None
        self._text_begun = False

    def __call__(self, piece: StageText) -> None:
        colours = self.colours.get(piece.stage, ())
        if piece.stage != self._stage:
            self._open(piece.stage, colours)
        text = piece.text if self._text_begun else piece.text.lstrip()
        if self.table.check is not None and piece.stage == self.table.names[self.table.check]:
            text = self.verdicts.get(text, text)
        if text:
            self._text_begun = True
            self.screen.write(legible(text), *colours)

    def end(self) -> None:
        """Ends the last line."""
        if self._stage is not None:
            self.screen.line()
        self._stage = None

    def _open(self, stage: str, colours: tuple[str, ...]) -> None:
        if self._stage is not None:
            self.screen.write("\n\n")
        self._stage, self._text_begun = stage, False
        if stage in self.table.names:
            self.screen.write(f"[{stage}]", "bold", *colours)
            self.screen.write(" ")


def stage_colours(table: StageTable) -> dict[str, tuple[str, ...]]:
    """Stage name -> styles: the response green, the check yellow, the reasoning stages in turn."""
    reasoning = [stage.name for stage in table.stages if stage.role == "reasoning"]
    colours = {name: (_REASONING[i % len(_REASONING)],) for i, name in enumerate(reasoning)}
    roles = {"response": ("green",), "check": ("yellow",)}
    return colours | {stage.name: roles[stage.role] for stage in table.stages if stage.role in roles}


def legible(text: str) -> str:
    """The text with control characters shown instead of obeyed."""
    return text.translate(_CONTROLS)


def table_lines(header: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    """Aligned columns, numbers to the right and integers with thousands apart; the first line is the header."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    right = [all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(header))]
    widths = [max(map(_width, column)) for column in zip(header, *cells)]
    return ["  ".join(map(_padded, line, widths, right)).rstrip() for line in (header, *cells)]


def _padded(cell: str, width: int, right: bool) -> str:
    blanks = " " * (width - _width(cell))
    return blanks + cell if right else cell + blanks


def _width(text: str) -> int:
    """Columns of a terminal: an ideograph takes two."""
    plain = _ESCAPE.sub("", text)
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in plain)
