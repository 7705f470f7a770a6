"""write_report: one HTML page that needs nothing beside it, and the same pictures as PNG files.

Every text that comes from outside (names, ids, notes) is escaped; prompts and answers are not among what it is given.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mote_ext.evaluation.plots import path_colour, plot_safety, plot_stages, plot_training
from mote_ext.evaluation.results import WRAPPED, Evaluation, Summary

CAVEATS = (
    "A refusal is not safety. Refusals are recognised by their words; an answer that is not refused may be harmless, "
    "and a refused one may still hold harm further on.",
    "Each share stands with its 95 % Wilson interval and the number of prompts behind it. Where intervals overlap "
    "widely, the numbers do not say which is better.",
    "How far each judge agrees with people is in the table of judges. A judge that hardly agrees says little.",
    "Tokens are counted as generated, with markers, the check and all attempts of an escalation. Decoding is greedy.",
)
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2937; background: #f7f8fa;
  margin: 0; }
main { max-width: 1180px; margin: 2rem auto; padding: 2rem 2.4rem 3rem; background: #fff; border: 1px solid #e5e7eb;
  border-radius: 10px; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead { color: #4b5563; margin-top: 0; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { padding: .34rem .42rem; text-align: right; border-bottom: 1px solid #eef0f3; white-space: nowrap; }
th { font-weight: 600; color: #4b5563; border-bottom: 2px solid #d1d5db; }
td.text, th.text { text-align: left; }
details td { white-space: normal; }
tr.first td { border-top: 2px solid #d1d5db; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
.range { color: #6b7280; font-size: .88em; }
ul.notes { background: #fdf8ec; border: 1px solid #f0e2bd; border-radius: 8px; padding: .8rem 1rem .8rem 2.1rem; }
pre { font: .86em/1.45 ui-monospace, Menlo, Consolas, monospace; background: #f3f4f6; padding: .8rem 1rem;
  border-radius: 6px; white-space: pre-wrap; }
summary { cursor: pointer; color: #4b5563; }
"""


def write_report(
    out_dir: str | Path,
    evaluations: Sequence[Evaluation],
    training: Mapping[str, str | Path] | None = None,
    agreements: Sequence[Mapping] | None = None,
    title: str = "MoTE: refusals and tokens, path by path",
    notes: Sequence[str] = (),
) -> Path:
    """Writes report.html, safety.png, stages.png and, with training logs, training.png.

    evaluations: one a model; the first is the one the report is about
    training:    {name of a run: metrics.json of mote train, or transformers' trainer_state.json}
    agreements:  rows of judge_agreements; by default those the evaluations hold
    notes:       what a reader must know, above all the rest: whose labels, which model, what is not shown
    returns: the page. ValueError: no evaluations, two of one name, a log without losses. ImportError: no matplotlib.
    """
    if not evaluations or not all(evaluation.rows for evaluation in evaluations):
        raise ValueError("write_report: at least one evaluation with rows is needed")
    names = [evaluation.name for evaluation in evaluations]
    if len(set(names)) != len(names):
        raise ValueError(f"write_report: the evaluations' names must differ, got {names}")
    logs = {name: read_log(path) for name, path in (training or {}).items()}
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        "safety": plot_safety(evaluations, out_dir / "safety.png"),
        "stages": plot_stages(evaluations, out_dir / "stages.png"),
    }
    if logs:
        pictures["training"] = plot_training(logs, out_dir / "training.png")
    if agreements is None:
        agreements = _distinct(row for evaluation in evaluations for row in evaluation.agreements)
    page = out_dir / "report.html"
    page.write_text(_page(title, notes, evaluations, pictures, agreements), encoding="utf-8")
    return page


def read_log(path: str | Path) -> list[dict]:
    """The log history in a metrics.json or trainer_state.json, or in the folder of one. ValueError: there is none."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("metrics.json", "trainer_state.json") if (path / name).is_file()]
        path = found[0] if found else path / "metrics.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        log = whole.get("log", whole.get("log_history"))
    except FileNotFoundError:
        raise ValueError(f"there is no training log {path}") from None
    except (ValueError, AttributeError):
        log = None
    if not isinstance(log, list) or not any("loss" in entry for entry in log):
        raise ValueError(f"{path} holds no training log with losses (metrics.json or trainer_state.json expected)")
    return log


def _page(title, notes, evaluations, pictures: Mapping[str, Path], agreements) -> str:
    first = evaluations[0]
    lead = " · ".join(str(part) for part in (first.name, first.facts.get("date"), first.facts.get("hardware")) if part)
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>', _notes([*notes, *CAVEATS])]
    parts += ["<h2>Refusals against tokens</h2>", _picture(pictures["safety"], "refusals against mean tokens")]
    parts += ["<h2>Numbers</h2>", _numbers(evaluations)]
    parts += ["<h2>Judges beside people</h2>", _agreements(agreements)]
    parts += ["<h2>Stage lengths</h2>", _picture(pictures["stages"], "mean tokens of each stage")]
    if "training" in pictures:
        parts += ["<h2>Training</h2>", _picture(pictures["training"], "loss against steps")]
    parts += ["<h2>How it was made</h2>", *map(_making, evaluations)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    head += f"<style>{_CSS}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _notes(notes: Sequence[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _picture(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def _numbers(evaluations: Sequence[Evaluation]) -> str:
    rows, before = [], None
    for evaluation in evaluations:
        for summary in evaluation.summaries(by_suite=True):
            group = (evaluation.name, summary.suites)
            rows.append(_number_row(evaluation.name, summary, first=group != before))
            before = group
    heads = (
        ("model", "suite", "path"),
        ("n", "refused", "", "judged harmful", "", "mean tokens", "median", "check: unsafe"),
    )
    return _table(heads, rows)


def _number_row(name: str, summary: Summary, first: bool) -> str:
    kind = "wrapped" if summary.suites[0].endswith(WRAPPED) else summary.label
    dot = f'<span class="dot" style="background:{path_colour(summary.path)}"></span>'
    way = summary.way if summary.check != "flag" else f"{summary.path} (flagged)"
    texts = [
        escape(name),
        f"{escape(', '.join(summary.suites))} <span class=range>{escape(kind)}</span>",
        dot + escape(way),
    ]
    low, high = summary.refusal_low, summary.refusal_high
    numbers = [f"{summary.n}", f"{summary.refused} = {summary.refusal_rate:.0%}", _range(low, high)]
    if summary.judged:
        numbers += [
            f"{summary.harmful} = {summary.harmful_rate:.0%}",
            _range(summary.harmful_low, summary.harmful_high),
        ]
    else:
        numbers += ["", ""]
    numbers += [f"{summary.tokens_mean:.1f}", f"{summary.tokens_median:.0f}"]
    numbers.append("" if summary.unsafe is None else str(summary.unsafe))
    return _row(texts, numbers, "first" if first else "")


def _agreements(agreements: Sequence[Mapping]) -> str:
    if not agreements:
        return "<p>No judge was measured: the numbers above are the judges' own.</p>"
    rows = []
    for found in agreements:
        area = found.get("auc")
        numbers = [
            "" if area is None or area != area else f"{area:.2f}",
            f"{found['accuracy']:.2f}",
            _range(found["low"], found["high"]),
            escape(str(found["n"])),
            f"{found['base_rate']:.0%}",
        ]
        rows.append(_row([escape(str(found["judge"])), escape(str(found["labels"]))], numbers))
    heads = ("judge", "labelled replies"), ("AUC", "accuracy", "", "n", "safe by people")
    return _table(heads, rows) + (
        "<p>AUC 0.5 is a coin. PyRIT's people also call an answer beside the question a refusal, which no list of "
        "words can see; its harm labels grade texts of which few are refusals.</p>"
    )


def _making(evaluation: Evaluation) -> str:
    facts = {**evaluation.facts, **evaluation.settings}
    command = facts.pop("command", None)
    lines = "".join(
        _row([escape(str(key)), escape(value if isinstance(value, str) else json.dumps(value))], [])
        for key, value in facts.items()
    )
    shown = f"<pre>{escape(str(command))}</pre>" if command else ""
    return f"<details open><summary>{escape(evaluation.name)}</summary>{shown}<table>{lines}</table></details>"


def _table(heads: tuple[Sequence[str], Sequence[str]], rows: Sequence[str]) -> str:
    texts, numbers = heads
    head = "".join(f'<th class="text">{name}</th>' for name in texts) + "".join(f"<th>{name}</th>" for name in numbers)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(texts: Sequence[str], numbers: Sequence[str], kind: str = "") -> str:
    cells = "".join(f'<td class="text">{text}</td>' for text in texts) + "".join(f"<td>{n}</td>" for n in numbers)
    return f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>"


def _range(low: float, high: float) -> str:
    return f'<span class="range">[{low:.2f}, {high:.2f}]</span>'


def _distinct(rows) -> list[Mapping]:
    found: dict[str, Mapping] = {}
    for row in rows:
        found.setdefault(json.dumps(row, sort_keys=True), row)
    return list(found.values())
