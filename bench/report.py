"""Makes one small result file of a bench run, and tables and a plot of result files.

    python bench/report.py collect --bench RAW.json --out bench/results/DEVICE.json   condenses what bench_ops.py wrote
    python bench/report.py table bench/results/*.json   markdown to the terminal
    python bench/report.py table FILE --readme README.md --plot docs/bench-cpu.png   and into the README and a picture

A result file holds the medians of every contender in every case, the versions, the command and the date; the tables
say for each target whether it held. Nothing here measures: that is bench_ops.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DECODE_RATIO = 1.15  # of a whole model's time for a token over its base's, on a CPU
STEP_RATIO, ACTIVATION_RATIO = 1.10, 1.05  # of a training step over PEFT's with one LoRA of the same active rank
TRAINING_SHARE = 0.5  # of the added time of a PEFT-style loop; and never slower than masked dense
OURS_TOO = "_skinny"  # shown beside the opponents, but not one
ENGINE_RATIO = 1.5  # of useful tokens a second over the best opponent's
STEP_US, STEP_SPEEDUP = 60, 10  # of the scheduler's decode step, and times less than the opponent's
# Benches that fill a result file of their own, by the op of their first case.
OTHER_BENCHES = {
    "model": "bench_model.py",
    "training_step": "bench_training.py",
    "decode_step": "bench_scheduler.py",
    "engine": "bench_engine.py",
    "skinny_linear": "bench_serving_ops.py",
}
MARKERS = "<!-- bench:{kind}:begin -->", "<!-- bench:{kind}:end -->"


def forward_target(T: int) -> float:
    """Most that the experts may add to the base linear on a CPU, as a share of it."""
    return 0.15 if T == 1 else 0.25 if T < 512 else 0.12


# ---- collect


def collect(bench: Path, out: Path, steps: Path | None) -> None:
    result = {"steps": read_steps(steps) if steps else {}, "cases": []}
    if bench.exists():
        raw = json.loads(bench.read_text())
        cases = [entry["extra_info"] for entry in raw["benchmarks"]]
        result |= {
            "date": raw["datetime"][:10],
            "device": cases[0]["device"],
            "versions": cases[0]["versions"],
            "command": command_of(cases[0]),
            "cases": [{k: v for k, v in case.items() if k not in ("device", "versions")} for case in cases],
        }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{out}: {len(result['cases'])} cases")


def command_of(case: dict) -> str:
    if case["op"] in OTHER_BENCHES:
        return f"python bench/{OTHER_BENCHES[case['op']]}"
    return f"python bench/bench_ops.py --device {'cuda' if case['threads'] == 0 else 'cpu'}"


def read_steps(path: Path) -> dict:
    """The outcomes that bench/on_gpu.sh writes: name, exit code, seconds on a line."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {name: {"exit_code": int(code), "seconds": int(seconds)} for name, code, seconds in rows}


# ---- table


def group(cases: list[dict], op: str, *keys: str) -> dict:
    """{key values: {(pattern, threads): medians}} for the cases of one op, in the order of the file."""
    grouped: dict = {}
    for case in cases:
        if case["op"] == op:
            row = grouped.setdefault(tuple(case[key] for key in keys), {})
            row[case["pattern"], case["threads"]] = case["medians_us"]
    return grouped


def added_share(medians: dict) -> float:
    return medians["ours"] / medians["base"] - 1


def cell(values: list[float], text: str) -> str:
    return " / ".join(text.format(value) for value in values) if values else "-"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def forward_table(cases: list[dict]) -> str:
    rows = []
    for (dtype, K, T), medians in group(cases, "forward", "dtype", "K", "T").items():
        shares = {key: added_share(value) for key, value in medians.items()}
        cells = [
            cell([shares[pattern, threads] for threads in (1, 2) if (pattern, threads) in shares], "{:+.1%}")
            for pattern in ("one_stage", "runs", "random")
        ]
        target = forward_target(T)
        worst = max(shares.values())
        verdict = "held" if worst <= target else f"**missed**, worst {worst:.1%}"
        bases = [medians[key]["base"] / 1e3 for key in sorted(medians, key=lambda key: key[1])]
        base = f"{bases[0]:.2f} / {bases[-1]:.2f}"
        rows.append([dtype, str(K), str(T), base, *cells, f"≤ {target:.0%} {verdict}" if K == 4096 else "none"])
    header = ["dtype", "K = N", "T", "base, ms", "one_stage", "runs", "random", "target"]
    return markdown(header, rows)


def training_table(cases: list[dict]) -> str:
    rows = []
    for (dtype, T), medians in group(cases, "training", "dtype", "T").items():
        cells = []
        worst = dict.fromkeys(("peft_loop", "masked_dense"), 0.0)
        for pattern in ("one_stage", "runs", "random"):
            ratios = []
            for threads in (1, 2):
                if found := medians.get((pattern, threads)):
                    pair = {name: found["ours"] / found[name] for name in worst}
                    worst = {name: max(worst[name], pair[name]) for name in worst}
                    ratios.append(f"{pair['peft_loop']:.2f}, {pair['masked_dense']:.2f}")
            cells.append(" / ".join(ratios))
        missed = [
            f"{name} {worst[name]:.2f}"
            for name, limit in (("peft_loop", TRAINING_SHARE), ("masked_dense", 1.0))
            if worst[name] > limit
        ]
        rows.append([dtype, str(T), *cells, f"**missed**, worst {', '.join(missed)}" if missed else "held"])
    return markdown(["dtype", "T", "one_stage", "runs", "random", f"≤ {TRAINING_SHARE} and ≤ 1"], rows)


def model_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        medians = case["medians_us"]
        ratios = {name: value / medians["base"] for name, value in medians.items()}
        verdict = "held" if ratios["ours"] <= DECODE_RATIO else "**missed**"
        names = ("peft_rank_16", "peft_rank_32", "ours_disabled", "ours_skinny", "base_skinny")
        opponents = [f"{ratios[name]:.2f} ×" for name in names]
        ours = f"{ratios['ours']:.3f} × (≤ {DECODE_RATIO} {verdict})"
        rows.append([str(case["threads"]), f"{medians['base'] / 1e3:.1f}", ours, *opponents])
    wrapped = ["MoTE, rank 16 + 16", "PEFT rank 16", "PEFT rank 32", "MoTE, disabled"]
    skinny = ["MoTE, skinny linears", "base, skinny linears"]
    return markdown(["threads", "base, ms a token", *wrapped, *skinny], rows)


def step_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        medians, activations, states = case["medians_us"], case["activation_bytes"], case["state_bytes"]
        opponent = next(name for name in medians if name.startswith("peft"))

        def ratio(values: dict, limit: float, name: str = "ours", opponent: str = opponent) -> str:
            found = values[name] / values[opponent]
            return f"{found:.2f} × (≤ {limit:.2f} {'held' if found <= limit else '**missed**'})"

        rows.append(
            [
                str(case["threads"]),
                f"{medians[opponent] / 1e6:.2f}",
                ratio(medians, STEP_RATIO),
                ratio(medians, STEP_RATIO, "ours_skipping"),
                ratio(activations, ACTIVATION_RATIO),
                f"{states['ours'] / 1e6:.0f} / {states[opponent] / 1e6:.0f}",
            ]
        )
    header = ["threads", "PEFT rank 32, s", "MoTE, rank 16 + 16", "with step skipping", "activations", "states, MB"]
    return markdown(header, rows)


def scheduler_table(cases: list[dict]) -> str:
    """One line a bench of the scheduler; an admission has no opponent, and the target in µs is of warm caches."""
    rows = []
    for case in cases:
        ours, *opponents = case["medians_us"].values()
        verdicts = ["-", "-"]
        if opponents:
            ratio = opponents[0] / ours
            speed = f"(≥ {STEP_SPEEDUP} {'held' if ratio >= STEP_SPEEDUP else '**missed**'})"
            verdicts[1] = f"{opponents[0]:.0f}, {ratio:.1f} × {speed}"
        if case["op"] == "decode_step":
            verdicts[0] = f"≤ {STEP_US} {'held' if ours <= STEP_US else '**missed**'}"
        tokens = str(case.get("tokens_a_step", case["T"]))
        numbers = [f"{ours:.1f}", f"{case['p99_us']['ours']:.1f}"]
        rows.append([case["op"].replace("_", " "), str(case["page_size"]), tokens, *numbers, *verdicts])
    header = ["step", "page, tokens", "tokens a step", "median, µs", "99 %, µs", "target", "nano-vllm style, µs"]
    return markdown(header, rows)


def engine_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        rates = {name: value for name, value in case["tokens_per_s"].items() if not name.endswith(OURS_TOO)}
        ours, *opponents = rates.values()
        names = list(rates)[1:]
        best = max(range(len(names)), key=opponents.__getitem__)
        verdict = "held" if ours / opponents[best] >= ENGINE_RATIO else "**missed**"
        others = ", ".join(f"{name} {value:.1f}" for name, value in list(case["tokens_per_s"].items())[1:])
        ratio = f"{ours / opponents[best]:.2f} × {names[best]} (≥ {ENGINE_RATIO} {verdict})"
        rows.append([case["pattern"], str(case["threads"]), f"{ours:.1f}", others, ratio])
    return markdown(["requests", "threads", "ours, tokens/s", "opponents, tokens/s", "over the best"], rows)


def serving_ops_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        (_, ours), (name, opponent) = case["medians_us"].items()
        operation = case["op"].replace("_", " ")
        times = [f"{ours / 1e3:.2f}", f"{opponent / 1e3:.2f} ({name})", f"{opponent / ours:.2f} ×"]
        rows.append([operation, case["pattern"], case["dtype"], str(case["T"]), *times])
    return markdown(["operation", "on", "dtype", "rows", "ours, ms", "torch's, ms", "speed-up"], rows)


def gpu_table(result: dict) -> str:
    rows = []
    for case in result["cases"]:
        medians = case["medians_us"]
        base = medians.get("base", 0.0)
        added = medians["ours"] - base
        others = ", ".join(f"{name} {value:.1f}" for name, value in medians.items() if name not in ("ours", "base"))
        rows.append([case["op"], str(case["T"]), case["pattern"], f"{base:.1f}", f"{added:.1f}", others])
    return markdown(["op", "T", "pattern", "base, µs", "added, µs", "opponents, µs"], rows)


def describe(result: dict) -> str:
    versions = result["versions"]
    busy = [case["quiet_share"] for case in result["cases"] if case.get("quiet_share")]
    text = f"`{result['command']}` on {result['device']}, torch {versions['torch']}, {result['date']}."
    if busy and min(busy) < 0.95:
        text += f" The cores were not quiet throughout: a spin got {min(busy):.0%} of them at the worst moment."
    return text


def report(result: dict) -> str:
    if not result["cases"]:
        return "No bench ran."
    if result["cases"][0]["op"] == "model":
        return f"{describe(result)}\n\n{model_table(result['cases'])}"
    if result["cases"][0]["op"] == "training_step":
        return f"{describe(result)}\n\n{step_table(result['cases'])}"
    if result["cases"][0]["op"] == "decode_step":
        text = f"Host time of one step of the scheduler, {result['cases'][0]['pattern']}:"
        return f"{describe(result)}\n\n{text}\n\n{scheduler_table(result['cases'])}"
    if result["cases"][0]["op"] == "engine":
        return f"{describe(result)}\n\n{engine_table(result['cases'])}"
    if result["cases"][0]["op"] == "skinny_linear":
        return f"{describe(result)}\n\n{serving_ops_table(result['cases'])}"
    if not result["cases"][0]["threads"]:
        return f"{describe(result)}\n\n{gpu_table(result)}"
    return "\n\n".join(
        [
            describe(result),
            "What the experts add to the base linear (r = 16, 4 stages + shared), with 1 / 2 threads; medians:",
            forward_table(result["cases"]),
            "Forward + backward of the experts alone: our time over that of a PEFT-style loop, and over masked dense; "
            "1 / 2 threads:",
            training_table(result["cases"]),
        ]
    )


def kind_of(result: dict) -> str:
    case = result["cases"][0]
    return case["op"] if case["op"] in OTHER_BENCHES else "cpu" if case["threads"] else "gpu"


def put_between_markers(readme: Path, kind: str, text: str) -> None:
    begin, end = (marker.format(kind=kind) for marker in MARKERS)
    content = readme.read_text()
    if begin not in content or end not in content:
        sys.exit(f"report.py: {readme} must hold the lines '{begin}' and '{end}'")
    head, rest = content.split(begin)
    readme.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def plot(result: dict, path: Path) -> None:
    """The added share over T, a line for each pattern, a panel for each dtype; the target as a step."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("report.py: --plot needs matplotlib: pip install 'mote_ext[bench]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in result["cases"] if case["op"] == "forward" and case["K"] == 4096 and case["threads"] == 2]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 3.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        for pattern in ("one_stage", "runs", "random"):
            line = [case for case in cases if (case["dtype"], case["pattern"]) == (dtype, pattern)]
            points = sorted((case["T"], 100 * added_share(case["medians_us"])) for case in line)
            axis.plot(*zip(*points), marker="o", label=pattern)
        ticks = sorted({case["T"] for case in cases if case["dtype"] == dtype})
        targets = [100 * forward_target(T) for T in ticks]
        axis.step(ticks, targets, where="post", color="0.6", linestyle="--", label="target")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_title(f"{dtype}, 2 threads, K = N = 4096")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("added to the base linear, %")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="condense a run into a result file")
    collecting.add_argument("--bench", type=Path, required=True, help="what bench_ops.py --json wrote")
    collecting.add_argument("--steps", type=Path, help="what on_gpu.sh recorded of its steps")
    collecting.add_argument("--out", type=Path, required=True)
    tables = commands.add_parser("table", help="print tables of result files")
    tables.add_argument("results", type=Path, nargs="+")
    tables.add_argument("--readme", type=Path, help="write the tables between its markers")
    tables.add_argument("--plot", type=Path, help="draw the forward of the last file")
    arguments = parser.parse_args()

    if arguments.command == "collect":
        return collect(arguments.bench, arguments.out, arguments.steps)
    for path in arguments.results:
        result = json.loads(path.read_text())
        text = report(result)
        print(text)
        if arguments.readme and result["cases"]:
            put_between_markers(arguments.readme, kind_of(result), text)
        if arguments.plot and result["cases"]:
            plot(result, arguments.plot)


if __name__ == "__main__":
    main()
