"""MoTEConfig: everything about a MoTE model that is not a weight, saved as its config.json.

Names are PEFT's where the meaning is PEFT's. Used by inject.py and model.py.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mote_ext.stages import ANALYSIS, BASE_ONLY, CHECK, GUIDANCE, RESPONSE, SHARED_ONLY, Stage, StageTable

MAX_RANK = 256
ASSIGNMENTS = ("stage", "shared", "random")
REFUSAL = "I can't help with that. If you tell me what you are trying to achieve, I may be able to help another way."


class MoTEConfig(PreTrainedConfig):
    """What is injected where, the stages, and how a chain is generated. Keyword arguments only.

    r, lora_alpha, use_rslora, lora_dropout: as in PEFT; one rank for all experts
    shared_expert:       whether one more expert sees every token
    mix:                 weight of the stage's expert; the shared one has 1 - mix (paper: 0.5); alone it has 1
    assignment:          which expert a token of a stage goes to: "stage", its stage's; the others are controls to
                         compare with: "shared", there are no stage experts, only the shared one with weight 1 (plain
                         LoRA); "random", one drawn from the token's id and `seed`. Stages, markers and generation are
                         the same in all three
    target_modules:      "all-linear", a list of name endings, or a regular expression over whole names
    exclude_modules:     likewise; the output head is never a target
    stages:              Stage objects or dictionaries, in the order of their experts
    prompt_expert:       who sees tokens outside of stages: "shared", "none" or a stage's name; default "shared",
                         without a shared expert "none"
    train_prompt_expert: the same in training mode; also "random": one stage a row, drawn from its tokens and `seed`
    seed:                of these draws
    train_markers:       whether the marker rows are trained
    marker_ids:          token ids of the markers, filled in from the tokenizer
    verdict_ids:         token ids that mean safe and unsafe after the check's start marker, filled in likewise
    refusal_ids:         token ids of the answer that replaces an unsafe one, filled in likewise
    refusal, verdicts:   the texts those ids come from
    check_threshold:     an answer is safe when the safe verdict's probability reaches it
    base_config:         configuration of the base, its vocabulary counted with the markers
    base_vocab_size:     rows of the base's own embedding
    base_model_name_or_path, base_revision, base_digest: which base the experts belong to
    ValueError: a value that cannot mean anything, with its name.
    Source: MoTE, arXiv 2405.00557, sections 3.2 and 4.1; paper() has its choices.
    """

    model_type = "mote"
    sub_configs = {"base_config": AutoConfig}
    has_no_defaults_at_init = True  # there is no default base

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    shared_expert: bool = True
    mix: float = 0.5
    assignment: str = "stage"
    target_modules: Any = "all-linear"
    exclude_modules: Any = None
    stages: Any = None
    prompt_expert: str | None = None
    train_prompt_expert: str | None = None
    seed: int = 0
    train_markers: bool = True
    marker_ids: Any = None
    verdict_ids: Any = None
    refusal_ids: Any = None
    verdicts: Any = ("1", "0")
    refusal: str = REFUSAL
    check_threshold: float = 0.5
    base_config: Any = None
    base_vocab_size: int | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_digest: str | None = None

    def __post_init__(self, **kwargs) -> None:
        if isinstance(self.base_config, dict):
            self.base_config = AutoConfig.for_model(**self.base_config)
        stages = (ANALYSIS, GUIDANCE, RESPONSE, CHECK) if self.stages is None else self.stages
        self.stages = StageTable(stages).to_dicts()
        for name in ("marker_ids", "verdict_ids", "refusal_ids", "verdicts"):
            value = getattr(self, name)
            setattr(self, name, value if value is None else list(value))
        if self.prompt_expert is None:
            self.prompt_expert = "shared" if self.shared_expert else "none"
        if self.train_prompt_expert is None:
            self.train_prompt_expert = self.prompt_expert
        if self.base_config is not None:
            kwargs.setdefault("tie_word_embeddings", self.base_config.tie_word_embeddings)
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(token, getattr(self.base_config, token, None))
        self._check_values()
        super().__post_init__(**kwargs)

    @classmethod
    def paper(cls, **changes) -> MoTEConfig:
        """The paper's choices: three trained stages, rank 16, a shared expert at 0.5; the prompt is seen by a random
        expert in training. Which expert sees it at inference the paper leaves open: here the response's."""
        chosen = {
            "stages": [ANALYSIS, GUIDANCE, RESPONSE],
            "prompt_expert": "response",
            "train_prompt_expert": "random",
        }
        return cls(**{**chosen, **changes})

    @property
    def stage_table(self) -> StageTable:
        """A new StageTable of these stages and marker ids."""
        return StageTable((Stage(**stage) for stage in self.stages), self.marker_ids)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_stage_experts(self) -> int:
        """S of the layers: a stage's expert each, or none."""
        return 0 if self.assignment == "shared" else self.num_stages

    @property
    def num_experts(self) -> int:
        """E of the layers."""
        return self.num_stage_experts + self.shared_expert

    @property
    def vocab_size(self) -> int | None:
        """Columns of the logits: the base's rows and the markers."""
        return None if self.base_config is None else self.base_config.get_text_config().vocab_size

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The base's: layer counts, heads and special tokens are asked of it by generation, TRL and serving engines."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(*args, **kwargs)

    def prompt_id(self, training: bool) -> int | None:
        """Stage id of tokens outside of stages; None when it is drawn row by row."""
        expert = self.train_prompt_expert if training else self.prompt_expert
        if expert == "random":
            return None
        return {"shared": SHARED_ONLY, "none": BASE_ONLY}.get(expert, self._stage_index(expert))

    def original_base_config(self) -> PreTrainedConfig:
        """The base's configuration as its own checkpoint has it, without the markers."""
        config = copy.deepcopy(self.base_config)
        if self.base_vocab_size is not None:
            config.get_text_config().vocab_size = self.base_vocab_size
        return config

    def set_base(self, base_config: PreTrainedConfig, base_vocab_size: int) -> None:
        """Records the base and counts the markers into its vocabulary."""
        self.base_config = copy.deepcopy(base_config)
        self.base_vocab_size = base_vocab_size
        text = self.base_config.get_text_config()
        text.vocab_size = max([base_vocab_size, *(token + 1 for token in self.marker_ids)])
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, token, getattr(text, token, None))

    def _stage_index(self, name: str) -> int | None:
        names = [stage["name"] for stage in self.stages]
        return names.index(name) if name in names else None

    def _check_values(self) -> None:
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"MoTEConfig: {name} must be {expected}, got {getattr(self, name)!r}")

        names = [stage["name"] for stage in self.stages]
        require(1 <= self.r <= MAX_RANK, "r", f"in 1..{MAX_RANK}")
        require(0 < self.lora_alpha < math.inf, "lora_alpha", "positive and finite")
        require(0 <= self.mix <= 1, "mix", "in 0..1")
        require(self.assignment in ASSIGNMENTS, "assignment", f"one of {list(ASSIGNMENTS)}")
        require(self.assignment != "shared" or self.shared_expert, "shared_expert", "True with assignment='shared'")
        require(0 <= self.lora_dropout < 1, "lora_dropout", "in 0..1 without 1")
        require(0 <= self.check_threshold <= 1, "check_threshold", "in 0..1")
        who = ["none", *names] + (["shared"] if self.shared_expert else [])
        require(self.prompt_expert in who, "prompt_expert", f"one of {who}")
        require(self.train_prompt_expert in [*who, "random"], "train_prompt_expert", f"one of {[*who, 'random']}")
        ids = self.verdict_ids
        require(ids is None or (len(ids) == 2 and ids[0] != ids[1]), "verdict_ids", "two different token ids")
        self.stage_table  # noqa: B018  (raises on wrong marker ids)


def context_length(config: PreTrainedConfig) -> int | None:
    """Most positions a model of this configuration has; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


AutoConfig.register("mote", MoTEConfig, exist_ok=True)
