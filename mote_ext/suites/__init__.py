"""Prompt sets by name, from packages that pip installs; jailbreak wrappers; the check that two sets share nothing."""

from mote_ext.suites.overlaps import Overlap, overlaps, similarity, without_overlaps
from mote_ext.suites.registry import BENIGN, HARMFUL, SUITES, Suite, SuitePrompt, read_suite
from mote_ext.suites.wrappers import Wrapper, read_wrappers, wrapped

__all__ = [
    "BENIGN",
    "HARMFUL",
    "SUITES",
    "Overlap",
    "Suite",
    "SuitePrompt",
    "Wrapper",
    "overlaps",
    "read_suite",
    "read_wrappers",
    "similarity",
    "without_overlaps",
    "wrapped",
]
