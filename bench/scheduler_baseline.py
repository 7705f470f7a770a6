"""The opponent of bench_scheduler.py: what a decode step costs on the host in a small Python engine.

Our own writing of the data structures and the work of a step as nano-vllm (github.com/GeeeekExplorer/nano-vllm) has
them: a deque of running sequences with a table of blocks each; schedule asks for every one whether it may append and
gives it a block at a boundary (a full block gets a chained hash); prepare_decode makes lists and from them tensors;
postprocess appends the sampled tokens and frees what has finished. Pinned memory, which needs a GPU, is left out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque

import torch


class Sequence:
    def __init__(self, token_ids: list[int], max_tokens: int) -> None:
        self.token_ids = list(token_ids)
        self.last_token = self.token_ids[-1]
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = max_tokens
        self.is_finished = False
        self.block_table: list[int] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    def append_token(self, token: int) -> None:
        self.token_ids.append(token)
        self.last_token = token


class Block:
    def __init__(self, number: int) -> None:
        self.number = number
        self.num_references = 0
        self.hash = -1
        self.token_ids: list[int] = []


class BlockPool:
    """Blocks of KV memory: free, or used by sequences and, once full, known by a hash."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = [Block(number) for number in range(num_blocks)]
        self.by_hash: dict[int, int] = {}
        self.free = deque(range(num_blocks))
        self.used: set[int] = set()

    def hash_of(self, token_ids: list[int], prefix: int) -> int:
        digest = hashlib.blake2b(prefix.to_bytes(8, "little", signed=False), digest_size=8)
        digest.update(array("q", token_ids).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def take(self) -> Block:
        block = self.blocks[self.free.popleft()]
        block.num_references, block.hash, block.token_ids = 1, -1, []
        self.used.add(block.number)
        return block

    def allocate(self, sequence: Sequence) -> None:
        for begin in range(0, len(sequence), self.block_size):
            sequence.block_table.append(self.take().number)
            if begin + self.block_size <= len(sequence):
                self.register(sequence, begin // self.block_size)

    def register(self, sequence: Sequence, place: int) -> None:
        block = self.blocks[sequence.block_table[place]]
        prefix = self.blocks[sequence.block_table[place - 1]].hash if place > 0 else 0
        token_ids = sequence.token_ids[place * self.block_size : (place + 1) * self.block_size]
        block.hash, block.token_ids = self.hash_of(token_ids, prefix), token_ids
        self.by_hash[block.hash] = block.number

    def release(self, sequence: Sequence) -> None:
        for number in reversed(sequence.block_table):
            block = self.blocks[number]
            block.num_references -= 1
            if block.num_references == 0:
                self.used.remove(number)
                self.free.append(number)
        sequence.block_table.clear()

    def can_append(self, sequence: Sequence) -> bool:
        return len(self.free) >= (len(sequence) % self.block_size == 1)

    def may_append(self, sequence: Sequence) -> None:
        if len(sequence) % self.block_size == 1:
            sequence.block_table.append(self.take().number)
        elif len(sequence) % self.block_size == 0:
            self.register(sequence, len(sequence) // self.block_size - 1)


class Scheduler:
    def __init__(self, num_blocks: int, block_size: int, max_running: int, eos_id: int) -> None:
        self.blocks = BlockPool(num_blocks, block_size)
        self.max_running, self.eos_id = max_running, eos_id
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()

    def start(self, sequence: Sequence) -> None:
        """As if its prompt had been computed."""
        self.blocks.allocate(sequence)
        self.running.append(sequence)

    def schedule(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        while self.running and len(scheduled) < self.max_running:
            sequence = self.running.popleft()
            while not self.blocks.can_append(sequence):
                if not self.running:
                    self.preempt(sequence)
                    break
                self.preempt(self.running.pop())
            else:
                self.blocks.may_append(sequence)
                scheduled.append(sequence)
        self.running.extendleft(reversed(scheduled))
        return scheduled

    def preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self.waiting.appendleft(sequence)

    def prepare_decode(self, sequences: list[Sequence]) -> dict[str, torch.Tensor]:
        input_ids, positions, slots, lengths = [], [], [], []
        size = self.blocks.block_size
        for sequence in sequences:
            input_ids.append(sequence.last_token)
            positions.append(len(sequence) - 1)
            lengths.append(len(sequence))
            slots.append(sequence.block_table[-1] * size + (len(sequence) - 1) % size)
        width = max(len(sequence.block_table) for sequence in sequences)
        tables = [sequence.block_table + [-1] * (width - len(sequence.block_table)) for sequence in sequences]
        return {
            "input_ids": torch.tensor(input_ids, dtype=torch.int64),
            "positions": torch.tensor(positions, dtype=torch.int64),
            "slots": torch.tensor(slots, dtype=torch.int32),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "tables": torch.tensor(tables, dtype=torch.int32),
        }

    def postprocess(self, sequences: list[Sequence], token_ids: list[int]) -> None:
        for sequence, token in zip(sequences, token_ids):
            sequence.append_token(token)
            if token == self.eos_id or len(sequence) - sequence.num_prompt_tokens == sequence.max_tokens:
                sequence.is_finished = True
                self.blocks.release(sequence)
                self.running.remove(sequence)
