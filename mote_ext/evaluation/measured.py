"""How far the judges of an evaluation agree with people, as rows of a table that stands beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mote_ext import keyed
from mote_ext.judges.agreement import Judge, measure
from mote_ext.judges.labelled import read_labelled

HALF = "test"  # the half that the refusal judge was not made with


def judge_agreements(
    judge: Judge,
    *,
    name: str | None = None,
    kinds: Sequence[str] = ("refusal", "harm"),
    path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[dict]:
    """[{"judge", "labels", "accuracy", "auc", "n", "low", "high", "base_rate"}, …], a row a set of labels.

    kinds: of PyRIT's labelled replies, their held-out half; path: a file of one's own instead (all of it)
    limit: most replies a set, drawn by (seed, response), for judges that are slow
    ValueError, ImportError: as read_labelled.
    """
    name = name or getattr(judge, "name", type(judge).__name__)
    if path is not None:
        sets = {str(Path(path).name): read_labelled(path)}
    else:
        sets = {f"PyRIT {kind}, held-out half": read_labelled(split=HALF, kind=kind) for kind in kinds}
    found = []
    for labels, replies in sets.items():
        few = keyed.draw(replies, limit, lambda reply: ("agreement", seed, reply.prompt, reply.response))
        found.append({"judge": name, "labels": labels, **asdict(measure(judge, few))})
    return found
