"""Evaluation of a model path by path: refusals of harmful requests and of harmless ones, tokens, and a report of it."""

from mote_ext.evaluation.measured import judge_agreements
from mote_ext.evaluation.report import write_report
from mote_ext.evaluation.results import BASE, Evaluation, Row, Summary, pooled_tokens, summarise
from mote_ext.evaluation.run import DEFAULT_PATHS, evaluate

__all__ = [
    "BASE",
    "DEFAULT_PATHS",
    "Evaluation",
    "Row",
    "Summary",
    "evaluate",
    "judge_agreements",
    "pooled_tokens",
    "summarise",
    "write_report",
]
