"""CheckJudge: the check stage of a MoTE model as a judge of replies that somebody else wrote.

P(safe) = probability of the safe verdict behind  question <|response|> reply <|endofresponse|> <|check|>,  from one
forward, as generate(check=…) reads it. On labelled replies that no training saw it says what the check expert learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mote_ext.encoding import encode_prompt, encode_text
from mote_ext.judges.agreement import Pair
from mote_ext.judges.answers import batches_by_length, pad_id_of, padded_on_left


class CheckJudge:
    """Scores replies with a model's check stage.

    model, tokenizer: a MoTE model with a check stage, and its tokenizer
    max_reply_tokens: longer replies are judged by their beginning
    system: content of a system message before each prompt
    done:   called with the number of replies after each batch
    ValueError: the model has no check stage, markers or verdicts.
    """

    name = "check"

    def __init__(
        self,
        model,
        tokenizer,
        *,
        batch_size: int = 16,
        max_reply_tokens: int = 512,
        system: str | None = None,
        done: Callable[[int], object] | None = None,
    ) -> None:
        routing = getattr(model, "routing", None)
        if routing is None or routing.table.check is None or routing.config.verdict_ids is None:
            raise ValueError(
                f"CheckJudge: a MoTE model with a check stage and verdict_ids is needed, got {type(model).__name__} "
                f"with stages {[] if routing is None else list(routing.table.names)}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_reply_tokens = batch_size, max_reply_tokens
        self.system, self.done = system, done

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """P(safe) of each (prompt, response); neither can become a control token."""
        rows = [self._row(prompt, response) for prompt, response in pairs]
        safe = self.model.routing.config.verdict_ids[0]
        found = [0.0] * len(rows)
        was_training = self.model.training
        self.model.eval()
        for batch in batches_by_length([len(row) for row in rows], self.batch_size):
            inputs = padded_on_left([rows[i] for i in batch], pad_id_of(self.tokenizer), self.model.device)
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = self.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
            for i, probability in zip(batch, logits.float().softmax(-1)[:, safe].tolist()):
                found[i] = probability
            if self.done is not None:
                self.done(len(batch))
        self.model.train(was_training)
        return found

    def _row(self, prompt, response: str) -> list[int]:
        table = self.model.routing.table
        reply = encode_text(self.tokenizer, response)[: self.max_reply_tokens]
        question = encode_prompt(self.tokenizer, prompt, system=self.system)
        answer = [table.start_id(table.response), *reply, table.end_id(table.response)]
        return [*question, *answer, table.start_id(table.check)]
