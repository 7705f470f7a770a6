"""Reading JSONL: one JSON object a line, UTF-8 with or without a byte order mark, blank lines passed over.

Reasons name the file, the line and the column, never what a line says: it may be harmful.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line. ValueError: "file:line: reason" of the first bad one."""
    for number, line in lines(path):
        try:
            yield number, parse(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; only a line feed ends one, as JSON allows the other separators in a text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                require_narrow(path, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def require_narrow(path: Path, data: bytes) -> None:
    """ValueError: a file that begins like this is UTF-16."""
    if data.startswith(_WIDE_MARKS):
        raise ValueError(f"{path}:1: the file is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")


def parse(line: bytes) -> dict:
    """The object of one line. ValueError: why it is none, without the place."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8; convert the file, for "
            "instance: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"the line must be an object {{…}}, got {type(row).__name__}")
    return row
