"""Decode steps on a GPU as CUDA graphs: the forward of rows of one token, recorded for a size and replayed.

A decode step is some thousand small kernels, which take the host longer to launch than the GPU to run. Rows and pages
are rounded up to powers of two, so that a few graphs serve all batches. What is missing is padding: tokens of the base
alone, whose keys go to the cache's spare page. Attention gathers pages and masks what is not there, for its shapes must
not depend on lengths. Called by forward.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mote_ext.engine.cache import PagedCache
from mote_ext.stages import BASE_ONLY

Run = Callable[[], Tensor]


class DecodeInputs:
    """What a recorded forward reads, at places that stay: R rows of one token and at most P pages.

    token_ids, positions, slots, lengths int64 [R], stage_ids int32 [R], pages int64 [R * P], logits_at int64 [R]
    """

    def __init__(self, num_rows: int, num_pages: int, cache: PagedCache) -> None:
        self.R, self.P, self.cache = num_rows, num_pages, cache
        sizes = dict.fromkeys(("token_ids", "positions", "stage_ids", "slots", "lengths"), num_rows)
        for name, size in {**sizes, "pages": num_rows * num_pages}.items():
            dtype = torch.int32 if name == "stage_ids" else torch.int64
            setattr(self, name, torch.zeros(size, dtype=dtype, device=cache.device))
        self.logits_at = torch.arange(num_rows, device=cache.device)

    def fill(self, plan) -> None:
        """plan: of at most R rows; rows beyond them see one key of the spare page and change nothing."""
        num_rows, size, spare = len(plan.lengths), self.cache.page_size, self.cache.num_pages
        columns = np.arange(self.P)
        exist = columns < -(-plan.lengths // size)[:, None]
        # A row's first page again where it has no more: never another request's, and full of numbers.
        pages = np.full((self.R, self.P), spare, dtype=np.int64)
        table = plan.page_tables[:, : self.P]
        pages[:num_rows] = plan.page_tables[:, :1]
        pages[:num_rows, : table.shape[1]] = np.where(exist[:, : table.shape[1]], table, table[:, :1])
        self._put("pages", pages.reshape(-1), self.R * self.P, spare)
        self._put("slots", plan.slots, self.R, spare * size)
        self._put("lengths", plan.lengths, self.R, 1)
        self._put("stage_ids", plan.stage_ids, self.R, BASE_ONLY)
        self._put("token_ids", plan.token_ids, self.R, 0)
        self._put("positions", plan.positions, self.R, 0)

    def _put(self, name: str, values: np.ndarray, count: int, padding: int) -> None:
        place = getattr(self, name)
        whole = np.full(count, padding, dtype=np.int32 if place.dtype == torch.int32 else np.int64)
        whole[: len(values)] = values
        place.copy_(torch.from_numpy(whole))


class DecodeBatch:
    """Stands for a PagedBatch in attention.attend: one group of rows, masked by the lengths on the device."""

    kernel = None  # SDPA: the others take lengths from the host

    def __init__(self, inputs: DecodeInputs) -> None:
        self.inputs, self.cache, self.slots = inputs, inputs.cache, inputs.slots
        self.calls: dict[int, int] = {}
        self.windows: set[int] = set()
        self._groups: dict[tuple, DecodeRows] = {}

    def groups(self, window: int | None, dtype: torch.dtype) -> list[DecodeRows]:
        if (window, dtype) not in self._groups:
            self._groups[window, dtype] = DecodeRows(self.inputs, window, dtype)
        return [self._groups[window, dtype]]


class DecodeRows:
    """Stands for a RowGroup: the whole batch in its order, a query token a row."""

    tokens = places = picked = None
    causal, Q = False, 1

    def __init__(self, inputs: DecodeInputs, window: int | None, dtype: torch.dtype) -> None:
        self.pages, self.R = inputs.pages, inputs.R
        self.L = inputs.P * inputs.cache.page_size
        keys, lengths = torch.arange(self.L, device=inputs.lengths.device), inputs.lengths[:, None]
        sees = keys < lengths
        if window is not None:
            sees = sees & (keys >= lengths - window)
        self._mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, -torch.inf)

    def folded_mask(self, share: int, dtype: torch.dtype) -> Tensor:
        return self._mask[:, None, None].to(dtype)


class CudaRecorder:
    """Records what runs on the current device as a CUDA graph; all graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool = None

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """What replays run(), and the tensor its result is in afterwards."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()
        return graph.replay, result


def recorder_for(device: torch.device) -> CudaRecorder | None:
    return CudaRecorder() if device.type == "cuda" else None


class DecodeReplay:
    """Logits of decode steps by replaying.

    forward:  (DecodeInputs, DecodeBatch) -> logits [R, V']
    recorder: run -> (replay, result), see CudaRecorder
    """

    def __init__(self, forward: Callable[[DecodeInputs, DecodeBatch], Tensor], cache: PagedCache, recorder) -> None:
        self._forward, self._cache, self._recorder = forward, cache, recorder
        self._recorded: dict[tuple[int, int], tuple[DecodeInputs, Callable[[], None], Tensor]] = {}

    def forget(self) -> None:
        """Weights may lie elsewhere now."""
        self._recorded.clear()

    def __call__(self, plan) -> Tensor | None:
        """Logits [L, V'] of the plan; None: it is not one of decoding alone, or this model cannot be recorded."""
        if self._recorder is None or len(plan.slots) != len(plan.lengths):
            return None
        num_pages = -(-int(plan.lengths.max()) // self._cache.page_size)
        size = _rounded_up(len(plan.lengths)), _rounded_up(num_pages)
        if size not in self._recorded and not self._record(size, plan):
            return None
        inputs, replay, logits = self._recorded[size]
        inputs.fill(plan)
        replay()
        return logits.index_select(0, torch.from_numpy(plan.logits_at.copy()).to(logits.device))

    def _record(self, size: tuple[int, int], plan) -> bool:
        inputs = DecodeInputs(*size, self._cache)
        inputs.fill(plan)

        def run() -> Tensor:
            return self._forward(inputs, DecodeBatch(inputs))

        try:
            expected = run().clone()  # what has to be set up once is set up here
            replay, logits = self._recorder(run)
            replay()
            torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
        except (RuntimeError, AssertionError) as error:
            warnings.warn(
                f"MoTEEngine: decode steps of this model cannot be replayed as CUDA graphs and are launched one by "
                f"one: {error}",
                stacklevel=2,
            )
            self._recorder = None
            return False
        self._recorded[size] = inputs, replay, logits
        return True


def _rounded_up(number: int) -> int:
    return 1 << (number - 1).bit_length()
