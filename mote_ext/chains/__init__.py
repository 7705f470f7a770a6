"""Chains: built from prompts by the model itself, kept one a line, and made into batches for training."""

from mote_ext.chains.asking import Templates
from mote_ext.chains.block_mask import StepSkipping
from mote_ext.chains.build import Summary, build_chains
from mote_ext.chains.checkers import (
    Checker,
    EndpointChecker,
    ModelChecker,
    RefusalChecker,
    require_trust,
)
from mote_ext.chains.collator import ChainCollator
from mote_ext.chains.dataset import ChainDataset
from mote_ext.chains.mix import Mix
from mote_ext.chains.prompts import Prompt, read_prompts
from mote_ext.chains.record import Chain, read_chains
from mote_ext.chains.settings import Settings

__all__ = [
    "Chain",
    "ChainCollator",
    "ChainDataset",
    "Checker",
    "EndpointChecker",
    "Mix",
    "ModelChecker",
    "Prompt",
    "RefusalChecker",
    "Settings",
    "StepSkipping",
    "Summary",
    "Templates",
    "build_chains",
    "read_chains",
    "read_prompts",
    "require_trust",
]
