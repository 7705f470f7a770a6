"""Prompts become token ids in a thread of their own, so that a long one stops neither the event loop nor the engine;
replies with many log-probabilities are written in another."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from mote_ext.encoding import encode_prompt
from mote_ext.engine import SamplingParams
from mote_ext.serving.errors import RequestError
from mote_ext.serving.protocol import Ask

Written = TypeVar("Written")


class Encoder:
    """Token ids of prompts, and texts of ids.

    tokenizer: copied, once for each thread: two must not use one at the same time, and the engine's has the other
    num_waiting: prompts that are being encoded
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self._decoder = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
        self._controls = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._thread = ThreadPoolExecutor(1, "mote-encoder")
        self._writer = ThreadPoolExecutor(1, "mote-writer")
        self._texts: dict[int, str] = {}  # of single tokens
        self.num_waiting = 0

    async def encode(self, ask: Ask) -> tuple[list[int], SamplingParams]:
        """Token ids, and the engine's parameters that say whether these may hold control tokens.

        Text never becomes a control token, and a chat template's own are trusted.
        RequestError 400: messages that the template refuses, control tokens in a client's ids.
        """
        if isinstance(ask.prompt, list) and isinstance(ask.prompt[0], int):
            self._refuse_controls(ask.prompt)
            return ask.prompt, ask.params
        self.num_waiting += 1
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, ask.prompt)
        except ValueError as error:
            raise RequestError(400, str(error).removeprefix("encode_prompt: "), param="messages") from error
        finally:
            self.num_waiting -= 1
        return ids, replace(ask.params, trusted_prompt=True)

    async def write(self, make: Callable[[], Written]) -> Written:
        """What `make` gives, called in the one thread that may call decode()."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, make)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; that of a single one is remembered, for log-probabilities ask for the same ones again."""
        if len(ids) != 1:
            return self._decoder.decode(ids, skip_special_tokens=True)
        if ids[0] not in self._texts:
            self._texts[ids[0]] = self._decoder.decode(ids)
        return self._texts[ids[0]]

    def close(self) -> None:
        for thread in (self._thread, self._writer):
            thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer(prompt, split_special_tokens=True)["input_ids"]
        return encode_prompt(self._tokenizer, prompt)

    def _refuse_controls(self, ids: Sequence[int]) -> None:
        """RequestError 400: a control token, other than the beginning of a text at their beginning."""
        begins = ids[0] == self._tokenizer.bos_token_id
        place = next((i for i, token in enumerate(ids) if token in self._controls and (i or not begins)), None)
        if place is not None:
            raise RequestError(
                400,
                f"prompt must hold no control tokens, got {ids[place]} at [{place}]",
                param="prompt",
                code="control_token",
            )
