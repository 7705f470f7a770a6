"""mote env: what is installed, what was built, and why not. Runs where the rest of mote_ext cannot be imported."""

from __future__ import annotations

import argparse

SUMMARY = "what is installed and built, and why not; paste it into a bug report"
USAGE = "mote env"
EXAMPLES = "mote env"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None but those that every command has."""


def run(args: argparse.Namespace) -> None:
    """Prints mote_ext.env's report."""
    from mote_ext import env

    env.main()
