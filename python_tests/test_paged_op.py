"""ops.paged_attention_ against the formula in float64: odd sizes, poisoned memory, company, threads, and bad input."""

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from closeness import assert_close

from mote_ext import ops

CASES = {  # heads, key heads, key size, value size, page size
    "gqa": (9, 3, 64, 64, 16),
    "one key head": (5, 1, 40, 40, 1),
    "all key heads": (4, 4, 16, 16, 4),
    "many share": (14, 2, 8, 8, 3),
    "odd sizes": (6, 2, 13, 7, 5),
    "values are wider": (2, 1, 3, 130, 16),
    "large pages": (8, 4, 128, 128, 64),
}
OPTIONS = {"plain": {}, "window": {"window": 6}, "cap": {"softcap": 5.0}, "window of one": {"window": 1}}


def make_batch(heads, key_heads, key_size, value_size, page_size, dtype=torch.float32, seed=0):
    """Rows of several tokens over pages in any order; what no row may read is NaN."""
    random = np.random.default_rng(seed)
    counts, more = np.array([1, 3, 1, 4, 2, 1]), np.array([0, 17, 33, 0, 64, 5])
    lengths = counts + more
    width = -(-lengths.max() // page_size)
    tables = random.permutation(len(counts) * width).reshape(len(counts), width).astype(np.int32)
    generator = torch.Generator().manual_seed(seed)
    slots = tables.size * page_size
    keys = torch.full((slots, key_heads, key_size), torch.nan)
    values = torch.full((slots, key_heads, value_size), torch.nan)
    for table, length in zip(tables, lengths):
        at = np.arange(length)
        own = torch.from_numpy(table[at // page_size].astype(np.int64) * page_size + at % page_size)
        keys[own] = torch.randn(length, key_heads, key_size, generator=generator)
        values[own] = torch.randn(length, key_heads, value_size, generator=generator)
    starts = np.cumsum(counts) - counts + 2  # two tokens of nobody
    rows = np.stack((np.arange(len(counts)), starts, counts, lengths), 1)
    return {
        "queries": torch.randn(counts.sum() + 3, heads, key_size, generator=generator),
        "keys": keys.to(dtype),
        "values": values.to(dtype),
        "page_tables": torch.from_numpy(tables),
        "rows": torch.from_numpy(rows.astype(np.int64)),
        "page_size": page_size,
        "scale": key_size**-0.5,
    }


def run(batch, **options):
    queries, values = batch["queries"], batch["values"]
    out = torch.full((queries.shape[0], queries.shape[1], values.shape[2]), torch.nan)
    assert ops.paged_attention_(out, **{**batch, **options}) is out
    return out


def plain(batch, dtype, window=0, softcap=0.0):
    """The formula, token by token."""
    queries, size, share = batch["queries"], batch["page_size"], batch["queries"].shape[1] // batch["keys"].shape[1]
    out = torch.full((queries.shape[0], queries.shape[1], batch["values"].shape[2]), torch.nan, dtype=dtype)
    for table, begin, count, length in batch["rows"].tolist():
        for i in range(count):
            end = length - count + i + 1
            at = torch.arange(max(0, end - window) if window else 0, end)
            slots = batch["page_tables"][table].long()[at // size] * size + at % size
            keys, values = (batch[name][slots].to(dtype).repeat_interleave(share, 1) for name in ("keys", "values"))
            scores = torch.einsum("hd,khd->hk", queries[begin + i].to(dtype), keys) * batch["scale"]
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            out[begin + i] = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_formula(case, dtype, options):
    batch = make_batch(*case, dtype=dtype)
    own, truth = (plain(batch, dtype, **options) for dtype in (torch.float32, torch.float64))
    assert_close("out", run(batch, **options), own, truth)


def test_queries_may_lie_as_transformers_leaves_them():
    batch = make_batch(*CASES["gqa"])
    apart = batch["queries"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart.is_contiguous()
    torch.testing.assert_close(run({**batch, "queries": apart}), run(batch), rtol=0, atol=0, equal_nan=True)


def test_a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads():
    batch = make_batch(*CASES["gqa"])
    together = run(batch)
    for row in batch["rows"]:
        _, begin, count, _ = row.tolist()
        alone = run({**batch, "rows": row[None].clone()})
        assert torch.equal(alone[begin : begin + count], together[begin : begin + count])
        assert alone.isnan().flatten(1).all(1).sum() == len(alone) - count  # and nothing else was written
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            torch.testing.assert_close(run(batch), together, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)


def test_large_scores_and_numbers_that_are_none():
    batch = make_batch(*CASES["gqa"])
    large = {**batch, "queries": batch["queries"] * 1e4}
    assert_close("out", run(large), plain(large, torch.float32), plain(large, torch.float64))
    slot = int(batch["page_tables"][1, 0]) * batch["page_size"]
    for value in (torch.nan, torch.inf):
        batch["keys"][slot, 0] = value  # a key of the second row, which three query heads see
        got = run(batch)
        assert got[3:6, :3].isnan().all() and not got[3:6, 3:].isnan().any() and not got[6:14].isnan().any()


def test_no_rows_write_nothing():
    batch = make_batch(*CASES["gqa"])
    assert run({**batch, "rows": batch["rows"][:0]}).isnan().all()


def test_no_heads_write_nothing():
    batch = make_batch(*CASES["one key head"])
    empty = {**batch, "queries": batch["queries"][:, :0]}
    assert run(empty).shape == (batch["queries"].shape[0], 0, 40)


def test_opcheck():
    batch = make_batch(*CASES["odd sizes"])
    out = torch.zeros(batch["queries"].shape[0], 6, 7)
    tensors = [batch[name] for name in ("queries", "keys", "values", "page_tables", "rows")]
    tensors[1:3] = [tensor.nan_to_num() for tensor in tensors[1:3]]
    torch.library.opcheck(torch.ops.mote_ext.paged_attention_.default, (out, *tensors, 5, 0.5, 0, 0.0))


# ---- what is refused, before memory is touched


def with_row(batch, *row):
    return {"rows": torch.tensor([row])}


def with_page(batch, page):
    tables = batch["page_tables"].clone()
    tables[1, 0] = page
    return {"page_tables": tables}


REFUSED = {
    "queries of another dtype": (lambda b: {"queries": b["queries"].half()}, TypeError, "queries must be Float"),
    "queries without heads": (lambda b: {"queries": b["queries"][0]}, ValueError, "queries must have 3 dimensions"),
    "keys in float64": (lambda b: {"keys": b["keys"].double()}, TypeError, "keys must be float32, float16 or bfloat16"),
    "values of another dtype": (lambda b: {"values": b["values"].half()}, TypeError, "values must be Float"),
    "keys in steps": (lambda b: {"keys": b["keys"].repeat(2, 1, 1)[::2]}, ValueError, "keys must be contiguous"),
    "another key size": (lambda b: {"keys": b["keys"][..., :8].clone()}, ValueError, "H a multiple of H'"),
    "heads that do not divide": (lambda b: {"queries": b["queries"][:, :8]}, ValueError, "H a multiple of H'"),
    "tables of int64": (lambda b: {"page_tables": b["page_tables"].long()}, TypeError, "page_tables must be Int"),
    "rows of three": (lambda b: {"rows": b["rows"][:, :3].clone()}, ValueError, r"rows \[·, 4\]"),
    "a window before the first key": (lambda b: {"window": -1}, ValueError, "window and softcap must be at least 0"),
    "a cap below zero": (lambda b: {"softcap": -1.0}, ValueError, "window and softcap must be at least 0"),
    "a gradient": (lambda b: {"queries": b["queries"].requires_grad_()}, RuntimeError, "has no gradient"),
    "no page size": (lambda b: {"page_size": 0}, ValueError, "positive page_size"),
    "a token behind the batch": (lambda b: with_row(b, 0, 15, 1, 1), ValueError, "row 0 is not in the batch"),
    "a token before it": (lambda b: with_row(b, 0, -1, 1, 1), ValueError, "row 0 is not in the batch"),
    "no tokens": (lambda b: with_row(b, 0, 0, 0, 1), ValueError, "row 0 is not in the batch"),
    "fewer keys than tokens": (lambda b: with_row(b, 0, 0, 3, 2), ValueError, "row 0 is not in the batch"),
    "no such table": (lambda b: with_row(b, 6, 0, 1, 1), ValueError, "row 0 is not in the batch"),
    "more keys than pages": (lambda b: with_row(b, 0, 0, 1, 2000), ValueError, "row 0 is not in the batch"),
    "a page beyond the memory": (lambda b: with_page(b, 10**6), ValueError, "a page 1000000 that does not exist"),
    "a page before it": (lambda b: with_page(b, -1), ValueError, "a page -1 that does not exist"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_named(change, error, message):
    batch = make_batch(*CASES["gqa"])
    out = torch.zeros(batch["queries"].shape[0], 9, 64)
    with pytest.raises(error, match=f"paged_attention_.*{message}"):
        ops.paged_attention_(out, **{**batch, **change(batch)})
    assert not out.any()


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
def test_no_tangent_is_dropped(name):
    batch = make_batch(*CASES["gqa"])
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="paged_attention_ has no forward-mode gradient"):
        batch[name] = fwAD.make_dual(batch[name], torch.ones_like(batch[name]))
        run(batch)


@pytest.mark.parametrize("out", [torch.zeros(15, 9, 63), torch.zeros(15, 9, 64).half(), torch.zeros(15, 64, 9).mT])
def test_an_out_that_does_not_fit(out):
    with pytest.raises((ValueError, TypeError), match="paged_attention_: out must"):
        ops.paged_attention_(out, **make_batch(*CASES["gqa"]))
