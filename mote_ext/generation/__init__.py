"""Stage-wise generation on transformers' own loop: plan.py decides, rules.py masks, staged.py runs, outcome.py
reports."""

from mote_ext.generation.outcome import MoTEGenerateOutput
from mote_ext.generation.staged import StagedGeneration
from mote_ext.generation.streamer import StageStreamer, StageText

__all__ = ["MoTEGenerateOutput", "StageStreamer", "StageText", "StagedGeneration"]
