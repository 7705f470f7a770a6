"""The paper's comparison and the controls it lacks, on your chains: every baseline, and sweeps of mix and p_dropout.

    python examples/ablation.py chains.jsonl --base MODEL --out build/ablation --seeds 0 1 2
    python examples/ablation.py chains.jsonl --base MODEL --out build/ablation --only mote lora_x2 --mix 0.25 0.75

Each row is a training run of the same chains and seed, judged on the same prompts; what is done already is not done
again. Writes table.md and report.html. Source: MoTE, arXiv 2405.00557, table 4; what it does not control for is in
docs/fidelity.md.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

import mote_ext
from mote_ext.cli.progress import ProgressBar
from mote_ext.evaluation import Evaluation, evaluate, pooled_tokens, write_report
from mote_ext.suites import read_suite
from mote_ext.training import BASELINES, train


@dataclass(frozen=True)
class Variant:
    """A row of the table. name: of the row; baseline: of mote_ext.training.BASELINES"""

    name: str
    baseline: str
    mix: float
    p_dropout: float


def main(argv=None, prompts=None):
    """prompts: {suite: prompts} in place of --suite's"""
    args = parse(argv)
    prompts = prompts or {name: read_suite(name) for name in args.suite}
    evaluations = []
    for seed in args.seeds:
        for variant in variants(args):
            evaluations.append(judged(variant, seed, prompts, args))
    table = table_of(evaluations)
    (args.out / "table.md").write_text(table)
    print(table)
    print(write_report(args.out, evaluations, title="MoTE and what it is compared with"))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="JSONL, a chain a line")
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=BASELINES, default=list(BASELINES), help="baselines (default: all)"
    )
    parser.add_argument("--mix", nargs="*", type=float, default=[0.25, 0.75], help="of the stage's expert, beside 0.5")
    parser.add_argument("--p-dropout", nargs="*", type=float, default=[0.1, 0.3], help="beside 0.5")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--suite", nargs="+", default=["strongreject-small", "benign-edgy"], help="what it is judged on"
    )
    parser.add_argument("--limit", type=int, help="prompts a suite")
    parser.add_argument("--paths", nargs="+", default=["answer", "analysis", "full", "adaptive"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    return parser.parse_args(argv)


def variants(args):
    """Every baseline at the default mix and p_dropout, then MoTE along each sweep."""
    found = [Variant(name, name, 0.5, 0.5) for name in args.only]
    found += [Variant(f"mote, mix {mix:g}", "mote", mix, 0.5) for mix in args.mix]
    return found + [Variant(f"mote, p_dropout {p:g}", "mote", 0.5, p) for p in args.p_dropout]


def judged(variant, seed, prompts, args):
    """The variant's evaluation, trained and judged unless that was done before."""
    folder = args.out / f"{variant.name.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
    if (folder / "results.json").is_file():
        return Evaluation.load(folder)
    print(f"{variant.name}, seed {seed}", file=sys.stderr)
    train(
        args.data,
        args.base,
        folder,
        config=mote_ext.MoTEConfig(r=args.r, lora_alpha=2 * args.r, mix=variant.mix),
        baseline=variant.baseline,
        p_dropout=variant.p_dropout,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        packing=True,
        seed=seed,
        resume=True,
        callbacks=[ProgressBar()],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = mote_ext.MoTEForCausalLM.from_pretrained(folder).to(device).eval()
    evaluation = evaluate(
        model,
        AutoTokenizer.from_pretrained(folder),
        prompts,
        args.paths,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        name=f"{variant.name}, seed {seed}",
    )
    evaluation.save(folder / "results.json")
    return evaluation


def table_of(evaluations):
    """Markdown: refused among harmful and among benign prompts, and mean tokens, a column a path."""
    ways = list(dict.fromkeys(summary.way for e in evaluations for summary in e.summaries()))
    lines = ["| run | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for evaluation in evaluations:
        found = {(summary.label, summary.way): summary for summary in evaluation.summaries()}
        cells = []
        for way in ways:
            pair = [found[label, way] for label in ("harmful", "benign") if (label, way) in found]
            cells.append(" ".join(f"{s.refused}/{s.n}" for s in pair) + f" ({pooled_tokens(pair):.0f})")
        lines.append(f"| {evaluation.name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "harmful refused, benign refused (mean tokens)", ""])


if __name__ == "__main__":
    main()
