"""Journal: chains on disk, group by group, so that a run killed at any moment goes on without losing or doubling a row.

    OUT                 chains, one JSON object a line; a group is appended by one write and synchronised
    OUT.dropped.jsonl   prompts without a chain, appended after their group's chains
    OUT.meta.json       what the run was started with; a restart with something else is refused

A group is done when each of its prompts has a line in one of the two files. Any other group is built again, which gives
the same lines (keyed draws, fixed groups), and of these the ones that are not there are appended. What a kill can leave
half written is the last line of a file; it is cut off when the file is opened.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mote_ext.chains.group import GroupResult
from mote_ext.chains.prompts import Prompt


class Journal:
    """The files of a run, open for appending and locked against a second writer. A context manager.

    out:  path of the chains
    meta: JSON object of what determines them
    ValueError: another run writes there; the file is no journal, or one of another run: what differs; prompts that were
    dropped stand beside no chains, left over from a run whose file was removed.
    OSError: the folder cannot be written to.
    """

    def __init__(self, out: str | Path, meta: dict) -> None:
        self.out = Path(out).expanduser()
        self.dropped = self.out.with_name(self.out.name + ".dropped.jsonl")
        self.meta_path = self.out.with_name(self.out.name + ".meta.json")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.out.exists() and _has_content(self.dropped):
            raise ValueError(
                f"{self.out} is gone, {self.dropped.name} is not, and its prompts would count as done: bring the one "
                "back, or remove the other"
            )
        self._files = [_AppendedFile(self.out)]
        try:
            self._files[0].lock()
            self._compare(json.loads(json.dumps(meta)))
            self._files.append(_AppendedFile(self.dropped))
            self._ids = set().union(*(file.recover() for file in self._files))
            _synchronise_folder(self.out.parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Gives the files and the lock back."""
        for file in self._files:
            file.close()

    def is_done(self, prompts: Sequence[Prompt]) -> bool:
        """Whether every prompt has its line."""
        return all(prompt.id in self._ids for prompt in prompts)

    def append(self, result: GroupResult) -> None:
        """Writes the lines of a group that are not there yet. OSError: the disk is full; what was there is whole."""
        for file, rows in zip(self._files, (result.chains, result.dropped)):
            missing = [row for row in rows if row["id"] not in self._ids]
            if missing:
                file.append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in missing).encode())
                self._ids |= {row["id"] for row in missing}

    def _compare(self, meta: dict) -> None:
        """Against the file's header; writes it for a run that begins."""
        if not self.meta_path.exists():
            left = [path for path in (self.out, self.dropped) if _has_content(path)]
            if left:
                raise ValueError(
                    f"{left[0]} exists and there is no {self.meta_path.name} beside it, so it is no run that could go "
                    "on; name another file"
                )
            return self._write_meta(meta)
        try:
            before = json.loads(self.meta_path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{self.meta_path} is damaged; name another output file") from None
        different = [
            f"{name} was {_short(before.get(name))}, is {_short(meta.get(name))}"
            for name in dict.fromkeys([*before, *meta])
            if before.get(name) != meta.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.out} was begun with other settings: {'; '.join(different)}. Go on with the old ones, or name "
                "another output file"
            )

    def _write_meta(self, meta: dict) -> None:
        """All of it or nothing: written beside, then renamed."""
        part = self.meta_path.with_name(self.meta_path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.meta_path)


class _AppendedFile:
    """A file of lines that grows at its end alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another run; wait for it or name another file") from None

    def recover(self) -> set[str]:
        """The ids of its lines. A last line without its end is cut off.

        ValueError: a line that is none of a journal's, with its number.
        """
        with self.path.open("rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)
            os.fsync(self._descriptor)
        ids = set()
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                ids.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}:{number}: not a line of a journal; name another output file") from None
        return ids

    def append(self, data: bytes) -> None:
        """One write, then synchronised; of a write that fails nothing stays."""
        before = self.size()
        try:
            written = os.write(self._descriptor, data)
            while written < len(data):  # a disk that fills up takes a part, and refuses the next
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: what is written stays valid; make room and run the same again",
                str(self.path),
            ) from error


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _synchronise_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
