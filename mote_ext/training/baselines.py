"""What MoTE is compared with: the paper's comparison and the controls it lacks, each a change of two settings.

    mote             an expert a stage at `mix`, a shared one at 1 - mix, step skipping
    lora             one LoRA of rank r sees every token            lora_x2       of rank 2r: MoTE's active rank
    lora_skipping    lora with step skipping                        lora_matched  of rank (S + 1) r: MoTE's parameters
    no_shared        stage experts alone, with weight 1             no_skipping   MoTE without step skipping
    random_experts   a token's expert is drawn from its id, not its stage

Stages, markers, data and generation rules are the same in all. Where the rank changes, alpha changes with it, so that
the scale of a LoRA, alpha / r or with use_rslora alpha / √r, is what was asked for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mote_ext.config import MoTEConfig


@dataclass(frozen=True)
class Baseline:
    """summary: a line. changes: of the MoTEConfig. ranks: how many times r, given the configuration. skips: whether the
    step-skipping mask is used."""

    summary: str
    changes: dict = field(default_factory=dict)
    ranks: Callable[[MoTEConfig], int] = lambda config: 1
    skips: bool = True


_ONE_LORA = {
    "assignment": "shared",
    "shared_expert": True,
    "prompt_expert": "shared",
    "train_prompt_expert": "shared",
}

BASELINES = {
    "mote": Baseline("an expert for each stage and a shared one, with step skipping"),
    "lora": Baseline("one LoRA of rank r for all tokens", _ONE_LORA, skips=False),
    "lora_x2": Baseline("one LoRA of rank 2r: as many active parameters", _ONE_LORA, lambda config: 2, skips=False),
    "lora_skipping": Baseline("one LoRA of rank r, with step skipping", _ONE_LORA),
    "lora_matched": Baseline(
        "one LoRA of rank (S + 1) r: as many parameters", _ONE_LORA, lambda config: config.num_stages + 1, skips=False
    ),
    "no_shared": Baseline("stage experts alone", {"shared_expert": False}),
    "no_skipping": Baseline("MoTE without step skipping", skips=False),
    "random_experts": Baseline("experts drawn token by token instead of by stage", {"assignment": "random"}),
}


def apply_baseline(name: str, config: MoTEConfig, p_dropout: float) -> tuple[MoTEConfig, float]:
    """(configuration, p_dropout) of a baseline; the ones given are MoTE's and stay as they are.

    Without a shared expert a prompt_expert of "shared" becomes "none". ValueError: no such baseline; too large a rank.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline must be one of {list(BASELINES)}, got {name!r}")
    baseline = BASELINES[name]
    times = baseline.ranks(config)
    alpha = config.lora_alpha * (math.sqrt(times) if config.use_rslora else times)
    values = {**own_values(config), **baseline.changes, "r": config.r * times, "lora_alpha": alpha}
    if not values["shared_expert"]:
        for field_name in ("prompt_expert", "train_prompt_expert"):
            if values[field_name] == "shared":
                values[field_name] = None  # the configuration's own default without a shared expert
    return MoTEConfig(**values), p_dropout if baseline.skips else 0.0


def own_values(config: MoTEConfig) -> dict:
    """The fields of a MoTEConfig that are not transformers'."""
    return {name: copy.deepcopy(getattr(config, name)) for name in MoTEConfig.__annotations__ if hasattr(config, name)}
