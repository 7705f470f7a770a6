"""Chains as training samples: token ids and labels.

    ids     question  <|analysis|> a <|endofanalysis|>  <|response|> s <|endofresponse|>  EOS
    labels   -100           loss, if the stage carries loss         …                   the last stage's

Blocks follow each other in the table's order without a separator. The check's text is one verdict token; its start
marker never carries loss, since generation forces it. Source of the layout: MoTE, arXiv 2405.00557, section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.utils.data import Dataset
from tqdm import tqdm

from mote_ext.chains.record import SAFE, Chain
from mote_ext.config import MoTEConfig, context_length
from mote_ext.encoding import encode_prompt, encode_text

NO_LOSS = -100
ROWS_WITHOUT_BAR = 1000  # fewer are tokenised in a second or two


@dataclass
class Truncation:
    """What did not fit.

    chains:  how many were shortened
    tokens:  how many tokens were cut, by stage name
    skipped: rows of the chains that were left out, whose question alone fills the context
    """

    chains: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    skipped: list[int] = field(default_factory=list)


class ChainDataset(Dataset):
    """Chains of one file or several, tokenised once.

    chains:     Chain objects; a sample's `row` is its chain's place in this sequence
    tokenizer:  with the model's markers
    config:     the model's MoTEConfig (model.routing.config)
    max_length: tokens of a sample, at most the base's context. A longer chain loses the ends of its texts, first of the
                longest reasoning stages, then of the response; never of the question, never a marker, and a text keeps
                at least one token. The end marker behind a cut text carries no loss: it is not where the text ends
    system:     content of a system message before every question
    skip_too_long: leave out, and count, a chain whose question does not fit; otherwise it is an error
    item:       {"input_ids": list[int], "labels": list[int] (-100: no loss), "row": int}
    ValueError: a chain the stages do not allow, a tokenizer that is not the model's, a question that is too long.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        tokenizer,
        config: MoTEConfig,
        max_length: int = 2048,
        system: str | None = None,
        skip_too_long: bool = False,
    ) -> None:
        self.table = config.stage_table
        self.max_length = min(max_length, context_length(config) or max_length)
        self.system = system
        self.truncation = Truncation()
        self._tokenizer, self._verdict_ids = tokenizer, config.verdict_ids
        self._check_tokenizer()
        self._samples: list[dict] = []
        bar = tqdm(chains, "Tokenising chains", unit="chain", disable=True if len(chains) <= ROWS_WITHOUT_BAR else None)
        for row, chain in enumerate(bar):
            try:
                sample = self._encode(chain, row)
            except TooLongError as error:
                if not skip_too_long:
                    raise ValueError(f"ChainDataset: {_name(row, chain)}: {error}") from None
                self.truncation.skipped.append(row)
                continue
            except ValueError as error:
                raise ValueError(f"ChainDataset: {_name(row, chain)}: {error}") from error
            self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict:
        return self._samples[index]

    def __iter__(self) -> Iterator[dict]:
        return iter(self._samples)

    def _encode(self, chain: Chain, row: int) -> dict:
        """The sample of one chain, shortened where it has to be."""
        chain.validate(self.table)
        messages = None if chain.messages is None else list(chain.messages)
        question = encode_prompt(self._tokenizer, messages or chain.prompt, system=self.system)
        stages = chain.stages(self.table)
        texts = {stage: self._text_ids(chain, stage) for stage in stages}
        lengths = self._fitting_lengths(len(question), {stage: len(ids) for stage, ids in texts.items()})
        cut = {stage for stage in stages if lengths[stage] < len(texts[stage])}
        if cut:
            self.truncation.chains += 1
            self.truncation.tokens.update({self.table.names[s]: len(texts[s]) - lengths[s] for s in sorted(cut)})
        ids, labels, with_loss = list(question), [NO_LOSS] * len(question), chain.stages_with_loss(self.table)
        for stage in stages:
            block = [self.table.start_id(stage), *texts[stage][: lengths[stage]], self.table.end_id(stage)]
            ids += block
            targets = list(block) if stage in with_loss else [NO_LOSS] * len(block)
            if stage == self.table.check:
                targets[0] = NO_LOSS
            if stage in cut:
                targets[-1] = NO_LOSS
            labels += targets
        ids.append(self._tokenizer.eos_token_id)
        labels.append(self._tokenizer.eos_token_id if stages[-1] in with_loss else NO_LOSS)
        return {"input_ids": ids, "labels": labels, "row": row}

    def _text_ids(self, chain: Chain, stage: int) -> list[int]:
        if stage != self.table.check:
            return encode_text(self._tokenizer, chain.texts[self.table.names[stage]])
        if self._verdict_ids is None:
            raise ValueError("config.verdict_ids is None: pass tokenizer= where the model is made, or verdict_ids=")
        return [self._verdict_ids[0] if chain.check == SAFE else self._verdict_ids[1]]

    def _fitting_lengths(self, question: int, lengths: dict[int, int]) -> dict[int, int]:
        """Tokens each stage's text may keep. TooLongError: not even one each."""
        fixed = question + 2 * len(lengths) + 1  # markers, EOS
        room = self.max_length - fixed
        if room < len(lengths):
            raise TooLongError(
                f"the question has {question} tokens, with markers and one token a stage the chain "
                f"{fixed + len(lengths)}; max_length is {self.max_length}. Raise it where the base's context allows, "
                "or pass skip_too_long=True"
            )
        reasoning = {s: n for s, n in lengths.items() if self.table.stages[s].role == "reasoning"}
        others = {s: n for s, n in lengths.items() if s not in reasoning}
        kept = _even(reasoning, max(room - sum(others.values()), len(reasoning)))
        room -= sum(kept.values())
        response = self.table.response
        others[response] = min(others[response], room - (len(others) - 1))  # beside the verdict's one token
        return kept | others

    def _check_tokenizer(self) -> None:
        ids = self._tokenizer.convert_tokens_to_ids(self.table.markers)
        expected = self.table.marker_ids and list(self.table.marker_ids)
        if ids != expected:
            raise ValueError(
                f"ChainDataset: the config's markers have ids {expected}, in this tokenizer {ids}; take the config of "
                "a model made with tokenizer=, and the tokenizer that was saved with it"
            )
        if self._tokenizer.eos_token_id is None:
            raise ValueError("ChainDataset: the tokenizer has no eos_token, with which every chain ends; set one")


class TooLongError(ValueError):
    """A chain that does not fit although every text was cut to one token."""


def _even(lengths: dict[int, int], room: int) -> dict[int, int]:
    """The lengths with the longest cut down until they sum to at most `room`, none below 1."""
    if sum(lengths.values()) <= room:
        return dict(lengths)
    level = max(n for n in range(1, room + 1) if sum(min(m, n) for m in lengths.values()) <= room)
    kept = {stage: min(length, level) for stage, length in lengths.items()}
    left = room - sum(kept.values())
    for stage, length in lengths.items():
        if left and length > level:
            kept[stage] += 1
            left -= 1
    return kept


def _name(row: int, chain: Chain) -> str:
    return f"row {row}" if chain.id is None else f"row {row} (id {chain.id})"
