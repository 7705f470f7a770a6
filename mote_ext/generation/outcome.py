"""What came of a generation, read off its token ids: stages, verdicts, why it stopped, and what it did with the
answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from mote_ext.generation.plan import StagePlan
from mote_ext.stages import StageTable, segments, stage_ids_from_tokens

UNFINISHED = "max_new_tokens"


@dataclass
class MoTEGenerateOutput(ModelOutput):
    """generate's output with return_dict_in_generate=True; a row is a sequence, B of them.

    sequences:      [B, T] prompt and chain, padded on the right
    stage_ids:      [B, T] int32, the stage each token was processed by; padding counts as prompt
    stages:         per row the names of the stages gone through; of a refused answer the response alone
    verdicts:       per row "safe", "unsafe" or, without a check, None
    stop_reasons:   per row "<stage>:<why>": the last stage, and "end" (its end marker), "limit" (its marker was forced
                    by a limit or the reserve), "refusal" (the answer was replaced) or "max_new_tokens"
    num_generated:  per row the tokens generated, markers and what was withheld included; of "escalate" the last try
    stage_logprobs: with return_stage_logprobs, per row {stage: (sum of log-probabilities, tokens)} of the model's own
                    distribution, markers included
    raw:            what transformers' generate returned (scores, logits, past_key_values, …); None when something was
                    withheld: with hide, check="enforce" or path="escalate"
    """

    sequences: Tensor | None = None
    stage_ids: Tensor | None = None
    stages: list | None = None
    verdicts: list | None = None
    stop_reasons: list | None = None
    num_generated: list | None = None
    stage_logprobs: list | None = None
    raw: ModelOutput | None = None


def verdicts_of(sequences: Tensor, prompt_length: int, plan: StagePlan) -> list[str | None]:
    """The verdict of each row; whatever follows the check's marker but the safe token is "unsafe"."""
    if plan.verdict_ids is None:
        return [None] * len(sequences)
    opens, safe = plan.table.start_id(plan.table.check), plan.verdict_ids[0]
    found = []
    for row in sequences[:, prompt_length:].tolist():
        place = row.index(opens) + 1 if opens in row else len(row)
        found.append("safe" if place < len(row) and row[place] == safe else "unsafe")
    return found


def padded_behind_end(sequences: Tensor, prompt_length: int, end_id: int, pad_id: int) -> Tensor:
    """pad_id behind each row's end marker: beam search fills with the marker, its "EOS", when pad_id is 0."""
    ended = (sequences == end_id).long()
    ended[:, :prompt_length] = 0
    behind = (ended.cumsum(1) - ended) > 0
    return sequences.masked_fill(behind, pad_id)


def stages_of(row: list[int], table: StageTable) -> list[str]:
    """Names of the stages a row of generated ids opened, in order."""
    opens = {table.start_id(i): name for i, name in enumerate(table.names)}
    return [opens[token] for token in row if token in opens]


def num_generated(row: list[int], plan: StagePlan) -> int:
    """Generated ids of a row without the padding behind its last end marker."""
    end = plan.table.end_id(plan.last_stage)
    return row.index(end) + 1 if end in row else len(row)


def stop_reason(row: list[int], plan: StagePlan) -> str:
    """Why this row of generated ids (padding included) ended, and in which stage; see MoTEGenerateOutput."""
    table = plan.table
    opened = stages_of(row, table)
    if not opened:
        return f"prompt:{UNFINISHED}"
    response = table.names[table.response]
    end = table.end_id(plan.last_stage)
    if end not in row:
        return f"{opened[-1]}:{UNFINISHED}"
    begin = row.index(table.start_id(table.response))
    num_used = row.index(table.end_id(table.response))
    cut = plan.must_end(table.response, num_used - begin - 1, num_used)
    return f"{response}:{'limit' if cut else 'end'}" if opened[-1] == response else f"{opened[-1]}:end"


def replace_answers(
    sequences: Tensor, unsafe: list[int], prompt_length: int, plan: StagePlan, refusal_ids: list[int], pad_id: int
) -> Tensor:
    """The rows numbered in `unsafe` become prompt, response marker, refusal, end marker."""
    table = plan.table
    answer = [table.start_id(table.response), *refusal_ids, table.end_id(table.response)]
    rows = [row[prompt_length:].tolist() for row in sequences]
    for number in unsafe:
        rows[number] = answer
    return _joined(sequences[:, :prompt_length], rows, pad_id)


def without_stages(
    sequences: Tensor, prompt_length: int, table: StageTable, hide: Collection[str], pad_id: int
) -> Tensor:
    """The sequences less the tokens of these stages, markers included."""
    hidden = {table.index(name) for name in hide}
    ids = stage_ids_from_tokens(sequences[:, prompt_length:], table)
    rows = []
    for tokens, stages in zip(sequences[:, prompt_length:].tolist(), ids.tolist()):
        rows.append([token for token, stage in zip(tokens, stages) if stage not in hidden])
    return _joined(sequences[:, :prompt_length], rows, pad_id)


def padded_on_right(pieces: list[Tensor], pad_id: int) -> Tensor:
    """Rows of different lengths as one batch, padded on the right."""
    width = max(len(piece) for piece in pieces)
    return torch.stack([torch.nn.functional.pad(piece, (0, width - len(piece)), value=pad_id) for piece in pieces])


def stage_sums(logprobs: Tensor, stage_ids: list[int], table: StageTable) -> dict[str, tuple[float, int]]:
    """{stage: (sum, tokens)} over the runs of one row; logprobs [T] belongs to stage_ids token by token."""
    sums: dict[str, tuple[float, int]] = {}
    for stage, begin, end in segments(stage_ids):
        if stage < 0:
            continue
        total, count = sums.get(table.names[stage], (0.0, 0))
        sums[table.names[stage]] = (total + logprobs[begin:end].sum().item(), count + end - begin)
    return sums


def _joined(prompts: Tensor, rows: list[list[int]], pad_id: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    padded = [row + [pad_id] * (width - len(row)) for row in rows]
    written = torch.tensor(padded, dtype=prompts.dtype, device=prompts.device).reshape(len(rows), width)
    return torch.cat((prompts, written), dim=1)
