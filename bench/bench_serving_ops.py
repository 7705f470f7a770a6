"""The two operations of decoding on the CPU, each against what torch has for it, in one run.

    python bench/bench_serving_ops.py --json FILE [pytest options]      then bench/report.py makes the table

skinny_linear: rows of x with every weight of SmolLM2-135M once, the head included; against F.linear.
paged_attention: one query token a row over keys in pages of 16, on the caches of 30 layers in turn; against gathering
the pages and scaled_dot_product_attention. Lengths are 20 to 280, as in bench_engine.py, or 1,000 to 2,000.
Weights and caches are far larger than the processor's caches, as in a model. Contenders run alternately, medians are
compared.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import command
import numpy as np
import pytest
import torch
from bench_ops import cpu_name, measure_on_cpu, race
from torch.nn import functional as F

import mote_ext
from mote_ext import ops
from mote_ext.engine.attention import PagedBatch, attend_by_groups
from mote_ext.engine.cache import LayerShape, PagedCache
from mote_ext.engine.kernels import kernels_for

LAYERS, PAGE = 30, 16
WEIGHTS = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]  # [N, K] of a layer
HEAD = (49152, 576)
HEADS = {"9 of 3 heads of 64": (9, LayerShape(3, 64, 64)), "32 of 8 heads of 128": (32, LayerShape(8, 128, 128))}


@dataclass(frozen=True)
class Linears:
    rows: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Attention:
    rows: int
    lengths: tuple[int, int]
    heads: str

    @property
    def num_layers(self):
        return LAYERS if self.lengths[1] < 1000 else 4


LINEARS = [Linears(rows) for rows in (1, 2, 4, 8, 16, 32, 64)] + [Linears(rows, "bfloat16") for rows in (1, 8)]
ATTENTIONS = [
    Attention(1, (200, 280), "9 of 3 heads of 64"),
    Attention(8, (20, 280), "9 of 3 heads of 64"),
    Attention(32, (20, 280), "9 of 3 heads of 64"),
    Attention(8, (1000, 2000), "9 of 3 heads of 64"),
    Attention(8, (1000, 2000), "32 of 8 heads of 128"),
]


def record(benchmark, quiet, op, pattern, rows, dtype, contenders, times=1):
    medians = race(benchmark, measure_on_cpu, contenders, budget_s=10)
    benchmark.extra_info.update(
        op=op,
        pattern=pattern,
        T=rows,
        K=0,
        dtype=dtype,
        threads=torch.get_num_threads(),
        device=cpu_name(),
        medians_us={name: round(value * 1e6 / times, 1) for name, value in medians.items()},
        quiet_share=quiet(),
        versions={"torch": torch.__version__, "mote_ext": mote_ext.__version__, "cuda": None},
    )
    print(op, pattern, rows, dtype, benchmark.extra_info["medians_us"])


@pytest.mark.parametrize("case", LINEARS, ids=str)
@torch.inference_mode()
def test_skinny_linear(benchmark, case, quiet):
    dtype = getattr(torch, case.dtype)
    weights = [torch.randn(size).mul_(0.05).to(dtype) for size in [*WEIGHTS * LAYERS, HEAD]]
    given = {size: torch.randn(case.rows, size).to(dtype) for size in (576, 1536)}

    def through(linear):
        return lambda: [linear(given[weight.shape[1]], weight) for weight in weights][-1]

    contenders = {"ours": through(ops.skinny_linear), "F.linear": through(F.linear)}
    torch.testing.assert_close(*(call() for call in contenders.values()), rtol=2e-2, atol=2e-2)
    record(benchmark, quiet, "skinny_linear", "every weight of SmolLM2-135M", case.rows, case.dtype, contenders)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
@torch.inference_mode()
def test_paged_attention(benchmark, case, quiet):
    num_heads, shape = HEADS[case.heads]
    random = np.random.default_rng(0)
    lengths = random.integers(*case.lengths, case.rows)
    tables = random.permutation(case.rows * -(-lengths.max() // PAGE)).reshape(case.rows, -1).astype(np.int32)
    shapes, cpu = dict.fromkeys(range(case.num_layers), shape), torch.device("cpu")
    cache = PagedCache(shapes, tables.size, PAGE, torch.float32, cpu)
    for layer in shapes:
        cache.keys[layer].normal_(), cache.values[layer].normal_()
    starts, rows = np.arange(case.rows + 1, dtype=np.int32), np.arange(case.rows)
    plan = SimpleNamespace(query_starts=starts, lengths=lengths.astype(np.int32), page_tables=tables, slots=rows)
    queries, scale = torch.randn(case.rows, num_heads, shape.key_size), shape.key_size**-0.5
    kernel = kernels_for(cpu, torch.float32, torch.float32)[0]

    def ours():
        batch = PagedBatch(plan, cache, kernel)
        return [kernel(queries, layer, batch, scale, None, None) for layer in shapes][-1]

    def gathered():
        batch = PagedBatch(plan, cache)
        sizes = queries, shape.value_size
        return [attend_by_groups(*sizes, layer, batch, scale, None, None) for layer in shapes][-1]

    torch.testing.assert_close(ours(), gathered(), rtol=1e-4, atol=1e-4)
    pattern = f"{case.heads}, {case.lengths[0]} to {case.lengths[1]} keys"
    contenders = {"ours": ours, "gathered": gathered}
    record(benchmark, quiet, "paged_attention", pattern, case.rows, "float32", contenders, case.num_layers)


if __name__ == "__main__":
    command.run(__file__, __doc__)
