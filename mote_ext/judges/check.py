"""CheckJudge: the check stage of a MoTE model as a judge of replies that somebody else wrote.

P(safe) = probability of the safe verdict behind  question <|response|> reply <|endofresponse|> <|check|>,  from one
forward, as generate(check=…) reads it. On labelled replies that no training saw it says what the check expert learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mote_ext.config import context_length
from mote_ext.encoding import encode_prompt, encode_text, pad_id_of, padded_on_left
from mote_ext.judges.agreement import Pair
from mote_ext.judges.answers import batches_by_length


class CheckJudge:
    """Scores replies with a model's check stage.

    model, tokenizer: a MoTE model with a check stage, and its tokenizer
    max_reply_tokens: longer replies, and those longer than the model's context, are judged by their beginning
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
        """P(safe) of each (prompt, response); neither can become a control token.

        0 where the prompt alone fills the model's context: what cannot be read is not safe.
        """
        rows = [self._row(prompt, response) for prompt, response in pairs]
        read = [i for i, row in enumerate(rows) if row is not None]
        safe = self.model.routing.config.verdict_ids[0]
        found = [0.0] * len(rows)
        was_training = self.model.training
        self.model.eval()
        for places in batches_by_length([len(rows[i]) for i in read], self.batch_size):
            batch = [read[place] for place in places]
            inputs = padded_on_left([rows[i] for i in batch], pad_id_of(self.tokenizer), self.model.device)
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = self.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
            for i, probability in zip(batch, logits.float().softmax(-1)[:, safe].tolist()):
                found[i] = probability
            if self.done is not None:
                self.done(len(batch))
        self.model.train(was_training)
        return found

    def _row(self, prompt, response: str) -> list[int] | None:
        table, context = self.model.routing.table, context_length(self.model.config)
        question = encode_prompt(self.tokenizer, prompt, system=self.system)
        room = self.max_reply_tokens if context is None else min(self.max_reply_tokens, context - len(question) - 3)
        if room < 0:
            return None
        reply = encode_text(self.tokenizer, response)[:room]
        answer = [table.start_id(table.response), *reply, table.end_id(table.response)]
        return [*question, *answer, table.start_id(table.check)]
