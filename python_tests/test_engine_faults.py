"""What goes wrong in one request ends that request: each fault is injected into a batch, whose other requests must get
exactly the tokens they get without it, and every page must come back."""

from functools import partial

import pytest
import torch
from models import make_base, make_model, make_tokenizer
from test_engine import TIGHT, assert_all_pages_are_back, make_prompts

import mote_ext
from mote_ext import SamplingParams
from mote_ext.engine import sampling

SIZES = (TIGHT, {"num_pages": 300, "page_size": 16, "max_batch_tokens": 256})
BAD = 1  # the token that brings the fault with it; nobody generates it
WISHES = [
    SamplingParams("full", check="flag", max_new_tokens=20),
    SamplingParams("answer", max_new_tokens=14, temperature=1.0, seed=4, n=2),
    SamplingParams("escalate", max_new_tokens=20),
    SamplingParams(path=None, max_new_tokens=9),
]


@pytest.fixture
def model():
    return make_model("llama_tied")


def prompts_without_bad(count=8):
    prompts = make_prompts(count)
    assert not any(BAD in prompt for prompt in prompts)
    return prompts


def wishes(count):
    return [WISHES[i % len(WISHES)] for i in range(count)]


def tokens_of(outputs):
    return [output.generated_tokens for output in outputs]


def with_bad_ones(prompts):
    """A bad request behind each second one: its own prompt, and one that shares a prefix with its neighbour."""
    mixed = []
    for i, prompt in enumerate(prompts):
        mixed.append(prompt)
        if i % 2:
            mixed.append(prompt[: max(2, len(prompt) - 3)] + [BAD, 12, 13])
    return mixed


def assert_only_the_bad_ones_fail(model, inject, error, sizes):
    """inject() makes the model fail on BAD, which the others must not feel."""
    prompts = prompts_without_bad()
    expected = mote_ext.MoTEEngine(model, **sizes).generate(prompts, wishes(len(prompts)))
    assert not any(BAD in output.generated_tokens for output in expected)
    mixed = with_bad_ones(prompts)
    found = wishes(len(prompts))
    bad = SamplingParams("answer", n=2, max_new_tokens=14)
    params = [bad if BAD in prompt else found.pop(0) for prompt in mixed]
    engine = mote_ext.MoTEEngine(model, **sizes)
    inject()
    for _ in range(2):
        outputs = engine.generate(mixed, params)
        failed = [output for output in outputs if BAD in output.prompt_ids]
        assert len(failed) == 2 * params.count(bad) == 8
        assert all(output.status == "failed" and error in output.error for output in failed)
        assert all(output.stop_reason == "prompt:failed" for output in failed)
        assert tokens_of(o for o in outputs if BAD not in o.prompt_ids) == tokens_of(expected)
        assert_all_pages_are_back(engine)


# ---- in the model


@pytest.mark.parametrize("sizes", SIZES, ids=["tight", "roomy"])
def test_nan_in_one_request_is_its_own(model, sizes):
    """Its keys and values are NaN too, in pages that others get afterwards."""

    def poison(module, args, embedded):
        return embedded.masked_fill((args[0] == BAD)[..., None], torch.nan)

    inject = partial(model.get_input_embeddings().register_forward_hook, poison)
    assert_only_the_bad_ones_fail(model, inject, "logits are no numbers", sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=["tight", "roomy"])
def test_a_forward_that_raises_ends_only_whose_alone_raises(model, sizes):
    def refuse(module, args, kwargs):
        if (kwargs["input_ids"] == BAD).any():
            raise torch.OutOfMemoryError("out of memory, said the test")

    inject = partial(model.model.register_forward_pre_hook, refuse, with_kwargs=True)
    assert_only_the_bad_ones_fail(model, inject, "OutOfMemoryError: out of memory, said the test", sizes)


def test_a_batch_too_large_for_memory_is_computed_one_by_one(model):
    prompts = prompts_without_bad()
    expected = mote_ext.MoTEEngine(model, **SIZES[1]).generate(prompts, wishes(len(prompts)))
    largest = 60

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].numel() > largest:
            raise torch.OutOfMemoryError("too many tokens at once")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    engine = mote_ext.MoTEEngine(model, **SIZES[1])
    outputs = engine.generate(prompts, wishes(len(prompts)))
    assert all(output.status == "finished" for output in outputs) and tokens_of(outputs) == tokens_of(expected)
    assert_all_pages_are_back(engine)


@pytest.mark.parametrize("place", ["forward", "sampling", "retry"])
def test_an_interrupt_loses_nothing(model, place, monkeypatch):
    """Ctrl-C in the middle of a step, and the loop goes on where it was."""
    prompts = prompts_without_bad()
    expected = mote_ext.MoTEEngine(model, **TIGHT).generate(prompts, wishes(len(prompts)))
    engine = mote_ext.MoTEEngine(model, **TIGHT)
    calls = iter(range(10**6))

    def interrupt(*args, **kwargs):
        number = next(calls)
        if place == "retry" and number % 7 == 2:
            raise RuntimeError("so that requests are tried one by one")
        if number % 7 == 3:
            raise KeyboardInterrupt

    if place == "sampling":
        monkeypatch.setattr(
            sampling.Sampler, "_mask", lambda *args, of=sampling.Sampler._mask: (interrupt(), of(*args))
        )
    else:
        model.model.register_forward_pre_hook(interrupt)
    ids = [engine.submit(prompt, params) for prompt, params in zip(prompts, wishes(len(prompts)))]
    outputs, interrupts = {}, 0
    while engine.has_work:
        try:
            events = engine.step()
        except KeyboardInterrupt:
            interrupts += 1
            continue
        outputs.update({(event.request_id, event.sample): event.output for event in events if event.output})
    assert interrupts > 3
    found = [outputs[request_id, n] for request_id, of in zip(ids, wishes(len(prompts))) for n in range(of.n)]
    assert tokens_of(found) == tokens_of(expected)
    assert_all_pages_are_back(engine)


def test_an_interrupted_generate_leaves_nothing_behind(model):
    engine = mote_ext.MoTEEngine(model, **TIGHT)
    prompts = prompts_without_bad()
    calls = iter(range(10**6))

    def interrupt(*args, **kwargs):
        if next(calls) == 9:
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(interrupt)
    other = engine.submit(prompts[0], SamplingParams("answer", max_new_tokens=8))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, wishes(len(prompts)))
    handle.remove()
    events = []
    while engine.has_work:
        events += engine.step()
    assert {event.request_id for event in events} == {other} and events[-1].output.status == "finished"
    assert_all_pages_are_back(engine)


# ---- in a request's own text


@pytest.fixture(scope="module")
def speaking():
    tokenizer = make_tokenizer()
    base = make_base("llama", vocab_size=300)
    return make_model(base=base, tokenizer=tokenizer, marker_ids=None, verdict_ids=None, refusal_ids=None), tokenizer


def run_streamed(engine, prompts, params):
    ids = [engine.submit(prompt, of) for prompt, of in zip(prompts, params)]
    outputs, texts = {}, dict.fromkeys(ids, "")
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.text
            if event.output:
                outputs[event.request_id] = event.output
    return [outputs[request_id] for request_id in ids], [texts[request_id] for request_id in ids]


@pytest.mark.parametrize("place", ["decode", "stop", "at_the_end"])
def test_an_exception_in_one_requests_text_is_its_own(speaking, place, monkeypatch):
    model, tokenizer = speaking
    prompts = ["one", "two", "three", "four"]
    params = [SamplingParams("analysis", max_new_tokens=40)] * 4
    params[2] = SamplingParams("analysis", max_new_tokens=40, stop=("never said",))
    expected, texts = run_streamed(mote_ext.MoTEEngine(model, tokenizer, **TIGHT), prompts, params)

    class Broken(str):
        def startswith(self, *args):
            raise UnicodeError("this stop text cannot be compared")

    class BrokenDecoder:
        def __init__(self, times):
            self.times = times

        def __call__(self, *args, **kwargs):
            self.times -= 1
            if self.times < 0:
                raise UnicodeError("this text cannot be decoded")
            return tokenizer.decode(*args, **kwargs)

    engine = mote_ext.MoTEEngine(model, tokenizer, **TIGHT)
    submit = engine.submit

    def submit_one_broken(prompt, of):
        request_id = submit(prompt, of)
        if prompt == "three":
            reader = engine._samples[engine._requests[request_id][0]]._reader
            if place == "stop":
                reader._stop = (Broken("never said"),)
            else:
                reader.tokenizer = type("T", (), {"decode": BrokenDecoder(9 if place == "decode" else 10**6)})
            if place == "at_the_end":
                monkeypatch.setattr(reader, "finish", BrokenDecoder(0))
        return request_id

    monkeypatch.setattr(engine, "submit", submit_one_broken)
    outputs, found = run_streamed(engine, prompts, params)
    assert outputs[2].status == "failed" and "UnicodeError: this" in outputs[2].error
    for i in (0, 1, 3):
        assert outputs[i].status == "finished" and outputs[i].generated_tokens == expected[i].generated_tokens
        assert found[i] == texts[i] and outputs[i].texts == expected[i].texts
    assert_all_pages_are_back(engine)


def test_what_fails_says_so_and_keeps_what_it_had(model):
    calls = iter(range(10**6))

    def refuse(*args, **kwargs):
        if next(calls) >= 6:
            raise RuntimeError("the device is gone")

    engine = mote_ext.MoTEEngine(model, **TIGHT)
    model.model.register_forward_pre_hook(refuse)
    output = engine.generate([[11, 12, 13]], SamplingParams("full", max_new_tokens=20))[0]
    assert output.status == "failed" and output.error == "RuntimeError: the device is gone"
    assert len(output.generated_tokens) >= 5 and output.stop_reason == f"{output.stages[-1]}:failed"
    assert_all_pages_are_back(engine)


def test_a_thousand_requests_with_random_ends_lose_nothing(model):
    """Cancelled at any time, failing, refused and finished, mixed: afterwards the engine is as it was."""
    generator = torch.Generator().manual_seed(0)
    engine = mote_ext.MoTEEngine(model, **{**TIGHT, "max_batch_tokens": 64, "num_pages": 60})
    outputs, unfinished, submitted = [], [], 0
    prompts = make_prompts(60)
    while submitted < 300 or engine.has_work:
        if submitted < 300:
            for _ in range(int(torch.randint(0, 4, (1,), generator=generator))):
                prompt = prompts[submitted % 60]
                params = WISHES[submitted % 4]
                submitted += 1
                if submitted % 20 == 0:
                    with pytest.raises(ValueError):
                        engine.submit([10**7], params)
                else:
                    unfinished.append(engine.submit(prompt[:12], params))
        if unfinished and float(torch.rand(1, generator=generator)) < 0.2:
            request_id = unfinished.pop(int(torch.randint(0, len(unfinished), (1,), generator=generator)))
            engine.cancel(request_id)
        for event in engine.step():
            if event.output:
                outputs.append(event.output)
                if not engine.is_unfinished(event.request_id) and event.request_id in unfinished:
                    unfinished.remove(event.request_id)
        engine._scheduler.check()
    assert {output.status for output in outputs} == {"finished", "cancelled"}
    names = [(output.request_id, output.sample) for output in outputs]
    assert len(set(names)) == len(names) >= 285
    assert not engine._samples and not engine._requests
    assert_all_pages_are_back(engine)
