"""The command line of a bench: pytest over its one file, results as JSON."""

import argparse
import sys

import pytest


def run(file: str, description: str) -> None:
    """Ends the process with pytest's exit code. What it does not know goes to pytest."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where pytest-benchmark writes what report.py reads")
    chosen, pytest_options = parser.parse_known_args()
    options = [file, "-q", "--benchmark-json", chosen.json, "--timeout", "0"]
    sys.exit(pytest.main(options + pytest_options))
