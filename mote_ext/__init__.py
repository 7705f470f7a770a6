"""Mixture of insighTful Experts: LoRA experts by reasoning stage, one shared, in kernels for CPU and CUDA.

Importing starts no CUDA context. What is installed and built: python -m mote_ext.env.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mote_ext import _build

try:
    __version__ = version("mote_ext")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0+unknown"

# Python imports this file before mote_ext.env and the command line, which must run where the rest cannot be imported
# (they say why) and answer --help at once.
if not ({"mote_ext.env", "mote_ext.cli"} & set(sys.orig_argv) or Path(sys.argv[0]).name == "mote"):
    _build.require_compiled_module()

    from mote_ext import reference
    from mote_ext.ops import lora_delta, mote_linear
    from mote_ext.skinny import skinny_linears
    from mote_ext.stages import BASE_ONLY, SHARED_ONLY, Stage, StageTable, parse_stages, stage_ids_from_tokens

    if find_spec("transformers") is not None:  # the op alone needs torch alone
        from mote_ext import peft
        from mote_ext.config import MoTEConfig
        from mote_ext.encoding import encode_prompt, encode_prompts, encode_text, mark_generation, set_up_tokenizer
        from mote_ext.engine import MoTEEngine, RequestOutput, SamplingParams, StageEvent
        from mote_ext.generation import MoTEGenerateOutput, StageStreamer, StageText
        from mote_ext.inplace import get_mote_model
        from mote_ext.linear import MoTELinear
        from mote_ext.model import MoTEForCausalLM, MoTEModel

__all__ = [
    "BASE_ONLY",
    "SHARED_ONLY",
    "MoTEConfig",
    "MoTEEngine",
    "MoTEForCausalLM",
    "MoTEGenerateOutput",
    "MoTELinear",
    "MoTEModel",
    "RequestOutput",
    "SamplingParams",
    "Stage",
    "StageEvent",
    "StageStreamer",
    "StageTable",
    "StageText",
    "__version__",
    "encode_prompt",
    "encode_prompts",
    "encode_text",
    "get_mote_model",
    "lora_delta",
    "mark_generation",
    "mote_linear",
    "parse_stages",
    "peft",
    "reference",
    "set_up_tokenizer",
    "skinny_linears",
    "stage_ids_from_tokens",
]
