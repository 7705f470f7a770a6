"""Decode steps that are recorded and replayed: the same tokens, whatever is padded, and what cannot be recorded.

A CUDA graph runs the same kernels at the same places again. On a machine without a GPU a recorder that runs the same
forward on the same tensors again stands for it, and shows all but the capture itself.
"""

import pytest
import torch
from models import make_model
from test_engine import FOUR, ROOMY, TIGHT, assert_same, every_wish, generated, make_prompts

import mote_ext
from mote_ext import SamplingParams
from mote_ext.engine import engine as engine_module
from mote_ext.engine.replay import CudaRecorder, DecodeInputs


class Repeat:
    """Records by remembering, replays by running again."""

    def __init__(self):
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run):
        self.num_recorded += 1
        result = torch.full_like(run(), torch.nan)  # a capture computes nothing

        def replay():
            self.num_replayed += 1
            result.copy_(run())

        return replay, result


def make_engine(monkeypatch, model, recorder, **options):
    monkeypatch.setattr(engine_module, "recorder_for", lambda device: recorder)
    return mote_ext.MoTEEngine(model, **options)


@pytest.fixture(scope="module")
def model():
    return make_model("llama_tied")


@pytest.mark.parametrize("options", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", FOUR)
def test_all_paths_token_for_token(monkeypatch, name, options):
    model, recorder = make_model(name), Repeat()
    engine = make_engine(monkeypatch, model, recorder, **options)
    wishes = every_wish()
    prompts = make_prompts(len(wishes))
    for prompt, params, output in zip(prompts, wishes, engine.generate(prompts, wishes)):
        assert_same(model, output, generated(model, prompt, params), params)
    assert 0 < recorder.num_recorded < 15 and recorder.num_recorded < recorder.num_replayed
    assert engine.stats()["pages_used"] == 0


def test_samples_of_one_prompt_and_rows_that_are_padding(monkeypatch, model):
    params = SamplingParams(path="full", n=3, temperature=1.0, seed=4, max_new_tokens=20)
    prompts = make_prompts(2)
    recorder = Repeat()
    found = make_engine(monkeypatch, model, recorder, **ROOMY).generate(prompts, params)
    expected = make_engine(monkeypatch, model, None, **ROOMY).generate(prompts, params)
    assert [output.generated_tokens for output in found] == [output.generated_tokens for output in expected]
    assert recorder.num_replayed > 5


def test_what_padding_is(monkeypatch, model):
    engine = make_engine(monkeypatch, model, None, **ROOMY)
    for prompt in make_prompts(3):
        engine.submit(prompt, SamplingParams(path=None, max_new_tokens=8))
    engine.step()
    plan, cache = engine._scheduler.plan(), engine._cache
    inputs = DecodeInputs(4, 16, cache)
    for _ in range(2):  # filled again: nothing of before is left
        inputs.fill(plan)
        pages = inputs.pages.view(4, 16)
        for row, length in enumerate(plan.lengths):
            count = -(-length // cache.page_size)
            own = torch.from_numpy(plan.page_tables[row, :count].astype("int64"))
            assert torch.equal(pages[row, :count], own) and (pages[row, count:] == own[0]).all()
        assert (pages[3] == cache.num_pages).all() and inputs.lengths[3] == 1
        assert inputs.slots[3] == cache.num_pages * cache.page_size and inputs.stage_ids[3] == mote_ext.BASE_ONLY
        assert inputs.token_ids[:3].tolist() == plan.token_ids.tolist()
        for name in ("token_ids", "positions", "stage_ids", "slots", "lengths", "pages"):
            place = getattr(inputs, name).data_ptr()
            getattr(inputs, name).fill_(7)
            assert getattr(inputs, name).data_ptr() == place
    engine._scheduler.abandon()


def raising(run):
    raise RuntimeError("operation not permitted when stream is capturing")


def wrong(run):
    result = run() + 1
    return (lambda: None), result


@pytest.mark.parametrize("recorder", [raising, wrong])
def test_what_cannot_be_recorded_is_launched_as_before(monkeypatch, model, recorder):
    engine = make_engine(monkeypatch, model, recorder, **ROOMY)
    params, (prompt, _) = SamplingParams(path="full", max_new_tokens=12), make_prompts(2)
    with pytest.warns(UserWarning, match="cannot be replayed as CUDA graphs"):
        (output,) = engine.generate([prompt], params)
    assert_same(model, output, generated(model, prompt, params), params)
    (again,) = engine.generate([prompt], params)  # and no second warning
    assert again.generated_tokens == output.generated_tokens


def test_weights_that_lie_elsewhere_are_recorded_again(monkeypatch):
    model, recorder = make_model("llama_tied"), Repeat()
    engine = make_engine(monkeypatch, model, recorder, **ROOMY)
    params, (prompt, _) = SamplingParams(path="full", max_new_tokens=12), make_prompts(2)
    engine.generate([prompt], params)
    before = recorder.num_recorded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    (output,) = engine.generate([prompt], params)
    assert recorder.num_recorded > before
    assert_same(model, output, generated(model, prompt, params), params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_on_a_card(recwarn):
    model = make_model("llama_tied").cuda()
    engine = mote_ext.MoTEEngine(model, **ROOMY)
    assert isinstance(engine._paged._replay._recorder, CudaRecorder)
    wishes = every_wish()
    prompts = make_prompts(len(wishes))
    found = engine.generate(prompts, wishes)
    assert not [warning for warning in recwarn if "CUDA graphs" in str(warning.message)]
    assert engine._paged._replay._recorded
    engine._paged._replay._recorder = None
    engine.reset_cache()
    expected = engine.generate(prompts, wishes)
    assert [output.generated_tokens for output in found] == [output.generated_tokens for output in expected]
