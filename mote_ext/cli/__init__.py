"""The command line: mote chains, train, eval, … A file a command; what they share is in the others.

Nothing heavy is imported before a command needs it, and nothing but main() decides the exit code: 0, 2 for what a
person can put right (one line on stderr, the traceback with --debug), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mote_ext import __version__
from mote_ext.cli import bench, chains, env, eval, generate, inspect, serve, train
from mote_ext.cli.errors import CommandError

COMMANDS = {
    "chains": chains,
    "train": train,
    "eval": eval,
    "generate": generate,
    "serve": serve,
    "bench": bench,
    "inspect": inspect,
    "env": env,
}

FRONT = """\
MoTE: a language model that answers in stages, each stage with a LoRA expert of its own and one expert for all.

    question → analysis → guidance → response → check

commands
  mote chains MODEL PROMPTS --out FILE   have a model write, and check, the chains it will learn from
      mote chains base prompts.jsonl --out chains.jsonl --checker refusal
  mote train CHAINS --base MODEL --out FOLDER   train an expert a stage on them
      mote train chains.jsonl --base base --out my-model
  mote eval MODEL --out FOLDER   refusals and tokens on every path, with a report
      mote eval my-model --out report
  mote generate MODEL [PROMPT]   answer a question; without one, chat
      mote generate my-model "How do plants drink?" --path full
  mote serve MODEL               answer many at once behind OpenAI's HTTP interface, with a page to try it on
      mote serve my-model --min-check enforce
  mote bench serve [URL]         how fast a server answers mixed requests
      mote bench serve --model my-model
  mote inspect MODEL             what is in a model folder, read without loading it
      mote inspect my-model
  mote env                       what is installed and built; paste it into a bug report
      mote env

No MoTE model yet? Put untrained experts on any causal language model to see the stages at work:
      mote generate --base path/of/a/model "How do plants drink?" --path full

`mote COMMAND --help` has every option, with examples. `mote --version` says which version this is.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (sys.argv's by default) and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
        sys.stdout.flush()  # a reader who has gone must be noticed here, not at the interpreter's end
        return 0
    except SystemExit as stop:  # argparse, after --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except (CommandError, ValueError, OSError, ImportError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"mote: {_in_a_line(error)}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> None:
    if not argv:
        print(FRONT, end="")
    elif argv[0] in COMMANDS:
        # Intermixed, so that PROMPT may stand behind options; argparse cannot do that below subparsers.
        COMMANDS[argv[0]].run(_command_parser(argv[0]).parse_intermixed_args(argv[1:]))
    else:
        _front_parser().parse_args(argv)


class _Parser(argparse.ArgumentParser):
    """argparse's, which leaves exits to main()."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


class _FrontParser(_Parser):
    """`mote` without a command: its help is the first screen."""

    def format_help(self) -> str:
        return FRONT


def _front_parser() -> argparse.ArgumentParser:
    parser = _FrontParser(prog="mote", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mote {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=COMMANDS)
    return parser


def _command_parser(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    examples = "\n".join(f"  {line}" for line in command.EXAMPLES.splitlines())
    parser = _Parser(
        prog=f"mote {name}",
        usage=command.USAGE,
        description=f"mote {name}: {command.SUMMARY}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _in_a_line(error: Exception) -> str:
    """The error's text; of a long list its beginning. How to build the module is worth its lines."""
    if isinstance(error, ImportError):
        return str(error).strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    more = f" … and {len(lines) - 2} lines more, see --debug" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + more


def _drop_stdout() -> None:
    """The reader of our pipe has gone (`mote … | head`); Python would complain when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
