"""Stage-wise generation on transformers' own loop: plan.py decides, rules.py masks, staged.py runs, outcome.py
reports."""

from mote_ext.generation.outcome import MoTEGenerateOutput
from mote_ext.generation.staged import StagedGeneration
from mote_ext.generation.streamer import StageStreamer, StageText

# Options of generate without which a model's own generation config decides, or warns of what greedy search ignores.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

__all__ = ["GREEDY", "MoTEGenerateOutput", "StageStreamer", "StageText", "StagedGeneration"]
