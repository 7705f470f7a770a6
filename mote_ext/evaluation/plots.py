"""The pictures of a report: refusals against tokens a path (the paper's figure 6), stage lengths, training curves.

A path has one colour in all of them, a model one marker shape; the bars are Wilson intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mote_ext.evaluation.results import BASE, WRAPPED, Evaluation, Summary
from mote_ext.suites import BENIGN, HARMFUL

PATH_COLOURS = {
    BASE: "#6b7280",
    "answer": "#0072b2",
    "analysis": "#d98e00",
    "full": "#00896b",
    "adaptive": "#b8559a",
    "escalate": "#c8461e",
}
STAGE_COLOURS = {"analysis": "#e9b44c", "guidance": "#9b72aa", "response": "#4a8fbf", "check": "#c65f5f"}
_MORE_COLOURS = ("#3f8f3f", "#8c6d31", "#5254a3", "#17a2a2", "#a55194")
_SHAPES = "osD^vPX*"
# Where a label may stand beside its point, in points to the right and up, the nearest first.
_PLACES = [
    (right * side, up) for right, up in ((11, 9), (11, -9), (12, 0), (11, 20), (11, -20), (22, 30)) for side in (1, -1)
]
_INK, _PALE = "#1f2937", "#e5e7eb"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": _INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _PALE,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "text.color": _INK,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def require_matplotlib():
    """matplotlib, drawing without a screen. ImportError: it is not installed, with the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'mote_ext[report]'") from None
    return matplotlib


def plot_safety(evaluations: Sequence[Evaluation], path: str | Path) -> Path:
    """Share of refusals against mean tokens: harmful requests, wrapped ones if there are any, and harmless ones."""
    panels = [
        (HARMFUL, "", "Harmful requests", "refused (higher is better)"),
        (HARMFUL, WRAPPED, "Harmful requests in jailbreaks", "refused (higher is better)"),
        (BENIGN, "", "Harmless requests", "refused (lower is better)"),
    ]
    panels = [panel for panel in panels if any(_points(evaluation, *panel[:2]) for evaluation in evaluations)]
    with _figure(1, max(1, len(panels)), (6.0 * max(1, len(panels)), 4.9), path) as (figure, axes):
        for axis, (label, wrapping, title, meaning) in zip(axes, panels):
            _safety_panel(axis, evaluations, label, wrapping)
            num = max(point.n for evaluation in evaluations for point in _points(evaluation, label, wrapping))
            axis.set_title(f"{title} (n = {num})")
            axis.set_ylabel(meaning)
        _legends(figure, axes[0], evaluations)
    return Path(path)


def plot_stages(evaluations: Sequence[Evaluation], path: str | Path) -> Path:
    """Mean tokens a stage, stacked, for each model and path; harmful and harmless requests side by side."""
    labels = [label for label in (HARMFUL, BENIGN) if any(_points(e, label, "") for e in evaluations)]
    bars = [
        (evaluation.name, way)
        for evaluation in evaluations
        for way in dict.fromkeys(s.way for label in labels for s in _points(evaluation, label, ""))
    ]
    height = 1.5 + 0.34 * max(len(bars), 2)
    with _figure(1, max(1, len(labels)), (12.0, height), path, sharey=True) as (figure, axes):
        names = _stage_names(evaluations)
        for axis, label in zip(axes, labels):
            found = {(e.name, s.way): s for e in evaluations for s in _points(e, label, "")}
            _stage_panel(axis, bars, found, names)
            axis.set_title({HARMFUL: "Harmful requests", BENIGN: "Harmless requests"}[label])
            axis.set_xlabel("mean tokens a prompt, markers included")
        several = len(evaluations) > 1
        axes[0].set_yticks(range(len(bars)), [f"{name}: {way}" if several else way for name, way in bars])
        axes[0].invert_yaxis()
        handles, shown = axes[0].get_legend_handles_labels()
        figure.legend(handles, shown, loc="outside lower center", ncols=max(1, len(shown)))
    return Path(path)


def plot_training(logs: Mapping[str, Sequence[Mapping]], path: str | Path) -> Path:
    """Loss against steps, in all and a stage; logs: {run: transformers' log history}."""
    with _figure(1, max(1, len(logs)), (6.0 * max(1, len(logs)), 4.2), path) as (_, axes):
        for axis, (name, log) in zip(axes, logs.items()):
            curves = _curves(log)
            for curve, points in curves.items():
                stage = curve.removeprefix("loss/")
                colour = STAGE_COLOURS.get(stage, _INK if curve == "loss" else "#9ca3af")
                style = {"lw": 2.2, "marker": "o" if len(points) < 3 else None, "color": colour}
                axis.plot(*zip(*points), label={"loss": "all", "eval_loss": "held out"}.get(curve, stage), **style)
            axis.set_title(name)
            axis.set_xlabel("optimiser step")
            axis.set_ylabel("loss a token (nats)")
            axis.set_ylim(bottom=0)
            if curves:
                axis.legend()
    return Path(path)


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float], path: str | Path, **options):
    """A figure in the report's style, without the state of pyplot, saved at the end."""
    matplotlib = require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)[0]
        yield figure, list(axes)
        figure.savefig(path, dpi=130)


def _points(evaluation: Evaluation, label: str, wrapping: str) -> list[Summary]:
    """A point a path; a check that only flags changes nothing that is drawn."""
    return [
        summary
        for summary in evaluation.summaries()
        if summary.label == label
        and summary.check != "flag"
        and all(s.endswith(WRAPPED) for s in summary.suites) == bool(wrapping)
    ]


def path_colour(path: str) -> str:
    """The path's colour; one of the user's own gets the same every time."""
    return PATH_COLOURS.get(path) or _MORE_COLOURS[sum(map(ord, path)) % len(_MORE_COLOURS)]


def _safety_panel(axis, evaluations: Sequence[Evaluation], label: str, wrapping: str) -> None:
    from matplotlib.ticker import PercentFormatter

    texts = []
    for number, evaluation in enumerate(evaluations):
        points = _points(evaluation, label, wrapping)
        line = [
            (p.tokens_mean, p.refusal_rate) for p in points if p.path in ("answer", "analysis", "full") and not p.check
        ]
        if len(line) > 1:
            axis.plot(*zip(*sorted(line)), color="#9ca3af", lw=1.2, ls=_line(number), zorder=1)
        for point in points:
            share, colour = point.refusal_rate, path_colour(point.path)
            away = [[share - point.refusal_low], [point.refusal_high - share]]
            hollow = point.check == "enforce" and point.path != "escalate"
            axis.errorbar(
                point.tokens_mean, share, yerr=away, fmt=_shape(number), ms=8, color=colour, capsize=3,
                lw=1.1, mfc="white" if hollow else colour, mew=1.8, alpha=0.95, zorder=3,
            )  # fmt: skip
            ends = point.refusal_low, point.refusal_high
            texts.append((point.tokens_mean, share, "" if hollow else point.path, colour, ends))
    axis.set_ylim(-0.04, 1.04)
    axis.set_xlim(0, 1.14 * max(text[0] for text in texts))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("mean tokens a prompt, markers included")
    if len(evaluations) == 1:
        _place_labels(axis, texts)


def _place_labels(axis, texts: Sequence[tuple]) -> None:
    """Each label beside its point, at the place where it covers least: labels, points, intervals, the panel's edge."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    axis.figure.draw_without_rendering()
    renderer = axis.figure.canvas.get_renderer()
    panel = axis.get_window_extent(renderer)
    taken = [Bbox([axis.transData.transform((x, y))] * 2).padded(8) for x, y, *_ in texts]
    bars = [Bbox(axis.transData.transform([(x, low), (x, high)])).padded(3) for x, *_, (low, high) in texts]
    halo = [withStroke(linewidth=3, foreground="white")]
    for x, y, text, colour, _ in texts:
        if not text:
            continue
        best = None
        for right, up in _PLACES:
            label = axis.annotate(
                text, (x, y), (right, up), textcoords="offset points", ha="left" if right > 0 else "right", va="center",
                color=colour, fontsize=9, path_effects=halo, zorder=4,
            )  # fmt: skip
            box = label.get_window_extent(renderer)
            outside = box.x0 < panel.x0 or box.x1 > panel.x1 or box.y0 < panel.y0 or box.y1 > panel.y1 + box.height
            cost = sum(box.overlaps(other) for other in taken) + 0.5 * sum(map(box.overlaps, bars)) + 2 * outside
            if best is not None and cost >= best[0]:
                label.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (cost, label, box)
        taken.append(best[2])


def _legends(figure, axis, evaluations: Sequence[Evaluation]) -> None:
    """The paths' colours below the panels; the models' shapes, of several, in the first."""
    from matplotlib.lines import Line2D

    paths = dict.fromkeys(row.path for evaluation in evaluations for row in evaluation.rows)
    handles = [Line2D([], [], color=path_colour(name), marker="o", ls="", ms=8, label=name) for name in paths]
    if any(row.check == "enforce" and row.path != "escalate" for e in evaluations for row in e.rows):
        ring = {"marker": "o", "mfc": "white", "mew": 1.8, "ls": "", "ms": 8}
        handles.append(Line2D([], [], color=_INK, label="hollow: check enforced", **ring))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, max(1, len(handles))))
    if len(evaluations) > 1:
        shapes = [
            Line2D([], [], color="#9ca3af", mfc=_INK, mec=_INK, label=evaluation.name, marker=_shape(n), ls=_line(n))
            for n, evaluation in enumerate(evaluations)
        ]
        axis.legend(handles=shapes, loc="best", frameon=True, framealpha=0.85, edgecolor=_PALE)


def _shape(number: int) -> str:
    return _SHAPES[number % len(_SHAPES)]


def _line(number: int) -> str:
    return ("-", "--", ":", "-.")[number % 4]


def _stage_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """In the order of a chain, as far as it is known."""
    seen = dict.fromkeys(name for evaluation in evaluations for row in evaluation.rows for name in row.stages)
    known = [name for name in STAGE_COLOURS if name in seen]
    return [name for name in seen if name not in known and name != "prompt"] + known


def _stage_panel(axis, bars: Sequence[tuple[str, str]], found: Mapping, names: Sequence[str]) -> None:
    begins = [0.0] * len(bars)
    for number, name in enumerate(names):
        widths = [found[bar].stages.get(name, 0.0) if bar in found else 0.0 for bar in bars]
        colour = STAGE_COLOURS.get(name, _MORE_COLOURS[number % len(_MORE_COLOURS)])
        axis.barh(range(len(bars)), widths, left=begins, color=colour, height=0.68, label=name)
        begins = [begin + width for begin, width in zip(begins, widths)]
    for place, end in enumerate(begins):
        axis.annotate(f"{end:.0f}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, 1.1 * max([*begins, 1.0]))
    axis.grid(axis="y", visible=False)


def _curves(log: Sequence[Mapping]) -> dict[str, list[tuple[float, float]]]:
    """{"loss" | "loss/<stage>" | "eval_loss": [(step, value), …]} of a log history."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        for key, value in entry.items():
            if (key in ("loss", "eval_loss") or key.startswith("loss/")) and isinstance(value, int | float):
                curves.setdefault(key, []).append((entry["step"], value))
    return curves
