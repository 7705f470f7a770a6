"""Attention over pages: logits of flat batches in any chunks and pages against the model's own, and what is refused."""

import numpy as np
import pytest
import torch
from closeness import assert_close
from models import ARCHITECTURES, KINDS, VOCABULARY, make_model, make_prompts, twin

from mote_ext import compat
from mote_ext.engine import attention, forward
from mote_ext.engine.cache import LayerShape, PagedCache, default_num_pages, page_bytes
from mote_ext.engine.forward import PagedModel
from mote_ext.engine.probe import ProbePlan, probe, served_length

CPU = torch.device("cpu")
SERVED = [name for name in ARCHITECTURES if name != "bloom"]
VARIED = ("llama", "mistral", "gemma2", "gpt2")  # shared heads; sliding window; soft cap; Conv1D and learned positions


def run_in_chunks(model, tokens, stages, page_size, seed, with_kernel=False):
    """Logits of every token of several sequences, their chunks of random sizes mixed at random over random pages that
    were NaN before. with_kernel: short rows by our own attention, not by SDPA"""
    random = np.random.default_rng(seed)
    pages_each = -(-max(map(len, tokens)) // page_size)
    tables = random.permutation(len(tokens) * pages_each + 3)[: len(tokens) * pages_each].reshape(len(tokens), -1)
    probed = probe(model, page_size, model.dtype, CPU)
    assert probed.kernel is not None or model.dtype == torch.float64
    cache = PagedCache(probed.shapes, tables.max() + 4, page_size, model.dtype, CPU)
    for tensors in (cache.keys, cache.values):
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
    paged = PagedModel(model, cache, probed.kernel if with_kernel else None)
    done, got = [0] * len(tokens), [[] for _ in tokens]
    while any(n < len(t) for n, t in zip(done, tokens)):
        rows = []
        for i in random.permutation(len(tokens)):
            size = min(int(random.choice([0, 1, 1, 2, 3, 9])), len(tokens[i]) - done[i])
            if size:
                rows.append((i, done[i], done[i] + size))
                done[i] += size
        if rows:
            logits, batch = paged(make_plan(rows, tokens, stages, tables, page_size))
            assert set(batch.calls.values()) == {1}
            for (i, *_), part in zip(rows, logits.split([end - begin for _, begin, end in rows])):
                got[i].append(part)
    return [torch.cat(parts) for parts in got]


def make_plan(rows, tokens, stages, tables, page_size):
    places = [np.arange(begin, end) for _, begin, end in rows]
    return ProbePlan(
        token_ids=np.concatenate([tokens[i][begin:end] for i, begin, end in rows]),
        positions=np.concatenate(places),
        stage_ids=np.concatenate([stages[i][begin:end] for i, begin, end in rows]).astype(np.int32),
        slots=np.concatenate(
            [tables[row[0], p // page_size] * page_size + p % page_size for row, p in zip(rows, places)]
        ),
        query_starts=np.cumsum([0, *map(len, places)]).astype(np.int32),
        lengths=np.array([end for *_, end in rows], dtype=np.int32),
        page_tables=tables[[row[0] for row in rows]].astype(np.int32),
        logits_at=np.arange(sum(map(len, places))),
        copies=np.empty((0, 2), dtype=np.int32),
    )


def make_sequences(lengths, seed=0):
    random = np.random.default_rng(seed)
    tokens = [random.integers(1, VOCABULARY, length) for length in lengths]
    return tokens, [random.integers(-2, 4, length) for length in lengths]


@torch.no_grad()
def own_logits(model, tokens, stages):
    rows = [{"input_ids": torch.tensor(t)[None], "stage_ids": torch.tensor(s)[None]} for t, s in zip(tokens, stages)]
    return torch.cat([model(**row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", VARIED)
def test_chunks_and_pages_do_not_change_the_logits(name, page_size, with_kernel):
    model = make_model(name)
    model.set_attn_implementation("eager")  # under "sdpa" transformers 5.17 leaves out Gemma 2's soft cap
    tokens, stages = make_sequences([1, 5, 23, 40, 12, 31])
    got = torch.cat(run_in_chunks(model, tokens, stages, page_size, page_size, with_kernel))
    truth = own_logits(twin(model).double(), tokens, stages)
    assert_close(name, got, own_logits(model, tokens, stages), truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SERVED)
def test_the_probe_accepts_what_can_be_served(name, kind, poisoned_memory):
    model = make_model(name, kind)
    assert len(probe(model, 4, torch.float32, CPU).shapes) == model.config.get_text_config().num_hidden_layers


def test_the_probe_refuses_attention_of_ones_own():
    with pytest.raises(ValueError, match="MoTEBloomForCausalLM cannot be served.*called for layers"):
        probe(make_model("bloom", "in_place"), 4, torch.float32, CPU)


def unmasked(group, *args):
    mask_keys(group, *args)
    group.mask = None


def without_window(group, batch, begin, counts, lengths, window, dtype):
    mask_keys(group, batch, begin, counts, lengths, None, dtype)


def first_page_always(group, batch, rows, window, dtype):
    initialise(group, batch, rows, window, dtype)
    group.pages[:] = group.pages[0]


mask_keys, initialise = attention.RowGroup._mask_keys, attention.RowGroup.__init__
MISTAKES = {"_mask_keys": (unmasked, without_window), "__init__": (first_page_always,)}


@pytest.mark.parametrize("method, mistake", [(m, mistake) for m, found in MISTAKES.items() for mistake in found])
def test_the_probe_notices_wrong_attention(method, mistake, monkeypatch):
    model = make_model("mistral")
    monkeypatch.setattr(attention.RowGroup, method, mistake)
    with pytest.raises(ValueError, match="differ by"):
        probe(model, 4, torch.float32, CPU)


def test_keywords_that_would_change_the_result_are_refused():
    module = torch.nn.Module()
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="does not hand on"):
        attention.attend(module, q, q, q, None)
    with pytest.raises(ValueError, match="attends with .'s_aux'., which this does not apply"):
        attention.attend(module, q, q, q, None, s_aux=q, **{attention.BATCH: object()})
    with pytest.raises(ValueError, match="attends with .'attention_mask'."):
        attention.attend(module, q, q, q, q, **{attention.BATCH: object()})


# ---- the model between two steps


def implementations(model):
    return [config._attn_implementation for config in compat.attention_configs(model)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_implementation_is_never_left_switched(kind, error, monkeypatch):
    model = make_model("gemma3", kind)
    before, prompts = implementations(model), make_prompts()
    assert attention.NAME not in before
    expected = model.generate(**prompts, path="answer", max_new_tokens=6, do_sample=False)
    tokens, stages = make_sequences([9])
    run_in_chunks(model, tokens, stages, 4, seed=0)
    assert implementations(model) == before
    assert torch.equal(model.generate(**prompts, path="answer", max_new_tokens=6, do_sample=False), expected)

    def interrupted(*args, **kwargs):
        assert set(implementations(model)) == {attention.NAME}
        raise error("in the middle of a forward")

    monkeypatch.setattr(attention.PagedCache, "write", interrupted)
    cache = PagedCache({}, 4, 16, torch.float32, CPU)
    plan = make_plan([(0, 0, 9)], tokens, stages, np.array([[2]]), 16)
    with pytest.raises(error):
        PagedModel(model, cache)(plan)
    assert implementations(model) == before
    assert torch.equal(model.generate(**prompts, path="answer", max_new_tokens=6, do_sample=False), expected)


def test_every_forward_switches_and_a_plain_one_between_does_not_see_it(monkeypatch):
    """Without the switch the plain attention would answer, so the test of logits above could not fail."""
    model = make_model()
    monkeypatch.setattr(forward, "NAME", "sdpa")
    tokens, stages = make_sequences([9, 7])
    with pytest.raises(ValueError, match="called for layers"):
        run_in_chunks(model, tokens, stages, 4, seed=0)


# ---- pages


def filled_cache(num_pages=5, page_size=4, dtype=torch.float32):
    cache = PagedCache({0: LayerShape(2, 3, 5), 1: LayerShape(1, 4, 4)}, num_pages, page_size, dtype, CPU)
    for tensors in (cache.keys, cache.values):
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape))
    return cache


def test_copied_pages_are_whole_and_others_stay():
    cache = filled_cache()
    before = {layer: tensor.clone() for layer, tensor in cache.values.items()}
    cache.copy_pages(torch.tensor([1, 3]), torch.tensor([4, 0]))
    for layer, tensor in cache.values.items():
        expected = before[layer].clone()
        expected[16:20], expected[0:4] = before[layer][4:8], before[layer][12:16]
        assert torch.equal(tensor, expected)


def test_the_cache_stores_its_own_dtype_and_knows_its_size():
    cache = filled_cache(dtype=torch.bfloat16)
    key = torch.randn(2, 2, 3)
    cache.write(0, torch.tensor([5, 9]), key, torch.randn(2, 2, 5))
    assert torch.equal(cache.keys[0][[5, 9]], key.bfloat16())
    keys, values = cache.read(0, torch.tensor([2, 1]), torch.float32)
    assert keys.dtype == torch.float32 and torch.equal(keys[1], cache.keys[0][9].float())
    assert cache.num_bytes() == 6 * page_bytes(cache.shapes, 4, torch.bfloat16) == 6 * 4 * (16 + 8) * 2  # one is spare
    assert default_num_pages(1 << 20, CPU, most=10) == 10
    assert default_num_pages(1 << 28, CPU, most=10) == 4


def test_the_length_is_the_trained_one_where_rotations_change_behind_it():
    class Config:
        max_position_embeddings = 4096
        rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 1024}

        @classmethod
        def get_text_config(cls):
            return cls

    assert served_length(Config) == 1024
    Config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    assert served_length(Config) == 4096
    Config.max_position_embeddings = None
    assert served_length(Config) is None
