"""mote inspect: what is in a MoTE folder, and which experts each token of a text goes through. Loads no model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mote_ext.cli import folder as folders
from mote_ext.cli.errors import CommandError
from mote_ext.cli.screen import COLOR_MODES, Screen, stage_colours, table_lines

if TYPE_CHECKING:
    from mote_ext.cli.census import Census
    from mote_ext.config import MoTEConfig

SUMMARY = "what is in a model folder, or which experts a text goes through; loads no model"
USAGE = "mote inspect MODEL [options]"
EXAMPLES = """\
mote inspect my-model
mote inspect my-adapter --json
mote inspect my-model --text "Why?<|analysis|>a question<|endofanalysis|><|response|>Because.<|endofresponse|>"
mote inspect my-model --ids 12,99,49152,7"""
TRUSTED = (
    "markers in this text count, as in a chain of the model's own; in a prompt of mote generate they are plain text"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of mote inspect."""
    parser.add_argument("model", metavar="MODEL", help="a MoTE folder, full or with the experts alone, or a hub's name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", help="show this text's tokens with their stages and experts; markers in it count")
    what.add_argument("--ids", type=_ids, metavar="ID,ID,…", help="the same for token ids")
    parser.add_argument(
        "--color", choices=COLOR_MODES, default="auto", help="auto: on a terminal, unless NO_COLOR is set"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """The folder's tables, or with --text and --ids the tokens' one."""
    folder = folders.find_folder(args.model)
    config = folders.read_config(folder)
    screen = Screen(sys.stdout, args.color)
    if args.text is not None or args.ids is not None:
        rows = token_rows(folder, config, args.text, args.ids)
        if args.json:
            print(json.dumps({"model": str(folder), "tokens": rows}, ensure_ascii=False, indent=2))
        else:
            _show_tokens(screen, config, rows, remark=TRUSTED if args.text is not None else None)
        return
    from mote_ext.cli.census import take_census

    census = take_census(folder, config)
    if args.json:
        print(json.dumps(describe(folder, config, census), ensure_ascii=False, indent=2))
    else:
        _show_folder(screen, folder, config, census)


def describe(folder: Path, config: MoTEConfig, census: Census) -> dict:
    """Everything mote inspect knows of a folder, for JSON."""
    base = config.base_config
    return {
        "model": str(folder),
        "kind": "adapter" if census.is_adapter else "full",
        "base": {
            "name": config.base_model_name_or_path,
            "revision": config.base_revision,
            "digest": config.base_digest,
            "model_type": None if base is None else base.model_type,
            "vocab_size": config.base_vocab_size,
        },
        "experts": {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "mix": config.mix,
            "shared_expert": config.shared_expert,
            "prompt_expert": config.prompt_expert,
        },
        "targets": [asdict(kind) for kind in census.kinds],
        "stages": stage_rows(config, census),
        "parameters": {
            "experts": census.experts,
            "an_expert": census.an_expert,
            "markers": census.markers,
            "trained": census.trained,
            "all": census.everything,
            "trained_percent": _percent(census),
        },
    }


def stage_rows(config: MoTEConfig, census: Census) -> list[dict]:
    """A dictionary an expert, the shared one last: number, role, transitions, markers and their ids, parameters."""
    table = config.stage_table
    rows = []
    for i, stage in enumerate(table.stages):
        start, end = (None, None) if table.marker_ids is None else (table.start_id(i), table.end_id(i))
        rows.append(
            {
                "expert": i,
                "stage": stage.name,
                "role": stage.role,
                "next": list(stage.next),
                "start_marker": stage.start_marker,
                "start_id": start,
                "end_marker": stage.end_marker,
                "end_id": end,
                "parameters": census.an_expert if config.num_stage_experts else 0,
            }
        )
    if config.shared_expert:
        nothing = dict.fromkeys(("start_marker", "start_id", "end_marker", "end_id"))
        shared = {"expert": config.num_stage_experts, "stage": "shared", "role": "every token", "next": [], **nothing}
        rows.append({**shared, "parameters": census.an_expert})
    return rows


def token_rows(folder: Path, config: MoTEConfig, text: str | None, ids: list[int] | None) -> list[dict]:
    """A dictionary a token: position, id, token, stage id, stage name, names of the experts that see it."""
    import torch

    from mote_ext.stages import BASE_ONLY, PROMPT, stage_ids_from_tokens

    table = config.stage_table
    if table.marker_ids is None:
        raise CommandError("this model has no markers, so its tokens do not tell their stages")
    tokenizer = None
    if text is not None or folders.has_tokenizer(folder):
        tokenizer = folders.load_tokenizer(folder, config)
    if text is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise CommandError("there are no tokens in an empty text")
    if (largest := max(ids)) >= config.vocab_size:
        raise CommandError(f"--ids: token ids must be below {config.vocab_size}, got {largest}")
    row = torch.tensor([ids])
    stage_ids = stage_ids_from_tokens(row, table, prompt_id=config.prompt_id(training=False))[0].tolist()
    inside = stage_ids_from_tokens(row, table, prompt_id=BASE_ONLY)[0].tolist()
    return [
        {
            "position": position,
            "id": token,
            "token": None if tokenizer is None else _token_text(tokenizer, token),
            "stage_id": stage,
            "stage": PROMPT if within == BASE_ONLY else table.names[within],
            "experts": _experts_of(stage, config),
        }
        for position, (token, stage, within) in enumerate(zip(ids, stage_ids, inside))
    ]


def _token_text(tokenizer, token: int) -> str:
    """The token's text; of a part of a character the vocabulary's own spelling."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "\N{REPLACEMENT CHARACTER}" in text else text


def _experts_of(stage: int, config: MoTEConfig) -> list[str]:
    """Names of the experts that run for a stage id; none for the base alone."""
    from mote_ext.stages import BASE_ONLY

    if stage >= 0 and config.assignment == "random":
        return ["drawn"] + ["shared"] * config.shared_expert
    own = [config.stages[stage]["name"]] if stage >= 0 and config.num_stage_experts else []
    return own + (["shared"] if config.shared_expert and stage != BASE_ONLY else [])


def _show_folder(screen: Screen, folder: Path, config: MoTEConfig, census: Census) -> None:
    kind = "experts and markers alone, to be put onto their base" if census.is_adapter else "the whole model"
    screen.line(f"{folder}: {kind}", "bold")
    screen.line()
    for name, value in _facts(config):
        screen.line(f"{name:<9} {value}")
    _show_table(screen, "injected", ("target", "layers", "in", "out", "rank", "parameters"), _target_cells(census))
    header = ("expert", "name", "role", "may be followed by", "opens with", "id", "ends with", "id", "parameters")
    _show_table(screen, "experts", header, _stage_cells(screen, config, census))
    screen.line()
    screen.line(_totals(config, census))


def _facts(config: MoTEConfig) -> list[tuple[str, str]]:
    base = config.base_config
    known = [config.base_model_name_or_path or "not recorded"]
    if base is not None:
        known += [base.model_type, f"{config.base_vocab_size:,} tokens"]
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    mix = f"mix {config.mix:g} (the shared one {1 - config.mix:g})" if config.shared_expert else "no shared expert"
    mix = "the shared one alone" if config.assignment == "shared" else mix
    mix += ", drawn for each token" if config.assignment == "random" else ""
    return [
        ("base", ", ".join(known)),
        ("revision", config.base_revision or "not recorded"),
        ("digest", config.base_digest or "not recorded"),
        ("experts", f"rank {config.r}, alpha {config.lora_alpha:g} (scale {scale:g}), {mix}"),
        ("prompt", f"seen by {_prompt_expert(config)}"),
    ]


def _prompt_expert(config: MoTEConfig) -> str:
    if config.prompt_expert == "none":
        return "the base alone"
    if config.prompt_expert == "shared":
        return "the shared expert"
    return f"the expert of {config.prompt_expert}" + (" and the shared one" if config.shared_expert else "")


def _target_cells(census: Census) -> list[tuple]:
    return [tuple(asdict(kind).values()) for kind in census.kinds]


def _stage_cells(screen: Screen, config: MoTEConfig, census: Census) -> list[tuple]:
    colours = stage_colours(config.stage_table)
    return [
        (
            row["expert"],
            screen.paint(row["stage"], *colours.get(row["stage"], ())),
            row["role"],
            ", ".join(row["next"]) or "-",
            *(_plain(row[name]) for name in ("start_marker", "start_id", "end_marker", "end_id")),
            row["parameters"],
        )
        for row in stage_rows(config, census)
    ]


def _plain(value: str | int | None) -> str:
    """An id is no quantity: its digits are not grouped."""
    return "-" if value is None else str(value)


def _totals(config: MoTEConfig, census: Census) -> str:
    percent = _percent(census)
    share = "of an unknown base" if percent is None else f"of {census.everything:,}, {percent:.4f} %"
    rows = f"{census.markers:,} in marker rows{'' if config.train_markers else ' (frozen)'}"
    return f"trained  {census.trained:,} parameters {share}: {census.experts:,} in experts, {rows}"


def _percent(census: Census) -> float | None:
    return 100 * census.trained / census.everything if census.everything else None


def _show_tokens(screen: Screen, config: MoTEConfig, rows: list[dict], remark: str | None) -> None:
    colours = stage_colours(config.stage_table)
    cells = [
        (
            _plain(row["position"]),
            _plain(row["id"]),
            "?" if row["token"] is None else repr(row["token"]),
            _plain(row["stage_id"]),
            row["stage"],
            " + ".join(row["experts"]) or "base alone",
        )
        for row in rows
    ]
    header, *lines = table_lines(("position", "id", "token", "stage id", "stage", "experts"), cells)
    screen.line(header, "dim")
    for row, line in zip(rows, lines):
        screen.line(line, *colours.get(row["stage"], ()))
    if remark is not None:
        Screen(sys.stderr, "always" if screen.coloured else "never").line(remark, "dim")


def _show_table(screen: Screen, title: str, header: tuple, rows: list[tuple]) -> None:
    first, *lines = table_lines(header, rows)
    screen.line()
    screen.line(title, "bold")
    screen.line(f"  {first}", "dim")
    for line in lines:
        screen.line(f"  {line}")


def _ids(text: str) -> list[int]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items or not all(item.isdecimal() for item in items):
        raise argparse.ArgumentTypeError(f"token ids with commas between them expected, got {text!r}")
    return [int(item) for item in items]
