"""Serving many requests at once: a scheduler that knows stages and pages (C++), a paged cache, and the loop of three
verbs between them: plan, forward, commit."""

import torch  # noqa: F401  (mote_ext._C is linked against its libraries)

from mote_ext._C import QueueFull
from mote_ext.engine.engine import MoTEEngine
from mote_ext.engine.outputs import RequestOutput, StageEvent, TokenLogprob
from mote_ext.engine.params import SamplingParams

__all__ = ["MoTEEngine", "QueueFull", "RequestOutput", "SamplingParams", "StageEvent", "TokenLogprob"]
