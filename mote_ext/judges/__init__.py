"""Judges of replies, and how far each agrees with people: refusal by words, a rubric, the model's own check."""

from mote_ext.judges.agreement import Agreement, Judge, agreement, auc, measure, wilson
from mote_ext.judges.check import CheckJudge
from mote_ext.judges.endpoint import Endpoint, EndpointError
from mote_ext.judges.labelled import LabelledReply, read_labelled
from mote_ext.judges.refusal import RefusalJudge, is_refusal
from mote_ext.judges.rubric import RubricJudge, endpoint_writer, model_writer, parse_rubric
from mote_ext.judges.verdict import parse_verdict

__all__ = [
    "Agreement",
    "CheckJudge",
    "Endpoint",
    "EndpointError",
    "Judge",
    "LabelledReply",
    "RefusalJudge",
    "RubricJudge",
    "agreement",
    "auc",
    "endpoint_writer",
    "is_refusal",
    "measure",
    "model_writer",
    "parse_rubric",
    "parse_verdict",
    "read_labelled",
    "wilson",
]
