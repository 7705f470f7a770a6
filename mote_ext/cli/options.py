"""Types of options that several commands have, for argparse."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 expected, got {text!r}")
    return int(text)


def limits(text: str) -> dict[str, int]:
    """ "analysis=64,guidance=32": most tokens of stages."""
    return {name: count(number) for name, number in pairs(text, "stage=number", "analysis=64")}


def pairs(text: str, what: str, example: str) -> list[tuple[str, str]]:
    """ "name=value,…", which an error calls `what`."""
    found = [item.strip().partition("=")[::2] for item in text.split(",")]
    if not all(name and value for name, value in found):
        raise argparse.ArgumentTypeError(f"{what} expected, such as {example}, commas between several; got {text!r}")
    return found
