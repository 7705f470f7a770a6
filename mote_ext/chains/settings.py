"""Settings of a run of chain building, and what of them a restart must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from mote_ext.chains.prompts import LABELS, UNLABELLED
from mote_ext.stages import StageTable

MAX_TOKENS = {"analysis": 96, "guidance": 96, "response": 192}
DEFAULT_MAX_TOKENS = 96  # of a stage of another name


@dataclass(frozen=True)
class Settings:
    """How chains are built.

    batch_size:    prompts that go through the model together; groups are fixed, so that a restart forms the same
    temperature:   0 takes the likeliest token (and then one attempt, for all would be equal)
    top_p:         share of the likeliest tokens that are drawn from
    max_tokens:    stage name -> most tokens of its text, for stages whose default does not fit
    attempts:      how often the longest way is tried before a prompt is dropped
    seed:          of the draws
    keep_rejected: whether answers judged unsafe are kept as chains that train the check alone
    start:         label (or "unlabelled") -> how many stages of reasoning stand before the first answer. 0, as in the
                   paper: none. With a checker that lets every benign answer through, none would ever have any
    ValueError: a value that cannot mean anything, with its name.
    """

    batch_size: int = 16
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 2
    seed: int = 0
    keep_rejected: bool = True
    start: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"Settings: {name} must be {expected}, got {getattr(self, name)!r}")

        require(self.batch_size >= 1, "batch_size", "at least 1")
        require(0 <= self.temperature < float("inf"), "temperature", "0 or more")
        require(0 < self.top_p <= 1, "top_p", "in 0..1 without 0")
        require(self.attempts >= 1, "attempts", "at least 1")
        require(all(limit >= 1 for limit in self.max_tokens.values()), "max_tokens", "at least 1 for each stage")
        require(set(self.start) <= {*LABELS, UNLABELLED}, "start", f"by label, among {(*LABELS, UNLABELLED)}")
        require(all(number >= 0 for number in self.start.values()), "start", "0 or more stages")

    def require_stages(self, table: StageTable) -> None:
        """ValueError: a limit of a stage the table does not have, or of the check; a start behind the last stage."""
        written = [stage.name for stage in table.stages if stage.role != "check"]
        for name in self.max_tokens:
            if name not in written:
                raise ValueError(f"max_tokens: the stage must be one of {written}, got {name!r}")
        if any(number >= len(written) for number in self.start.values()):
            raise ValueError(f"start: there are {len(written) - 1} stages before the answer, got {dict(self.start)}")

    def limit(self, stage: str) -> int:
        """Most tokens of a stage's text."""
        return self.max_tokens.get(stage, MAX_TOKENS.get(stage, DEFAULT_MAX_TOKENS))

    def to_dict(self) -> dict:
        return {**asdict(self), "max_tokens": dict(self.max_tokens), "start": dict(self.start)}
