"""What an engine refuses or notices: weights that change, windows in masks alone, numbers that cannot be, streams that
are let go, a step that was interrupted."""

import pytest
import torch
from models import disturb, make_model
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import mote_ext
from mote_ext import MoTEEngine, SamplingParams

PROMPT = list(range(11, 20))
SMALL = {"num_pages": 100, "page_size": 4}


@pytest.fixture
def model():
    return disturb(make_model("llama_tied"), seed=3).eval()


def answer(engine, **wishes):
    return engine.generate([PROMPT], SamplingParams(**{"path": "answer", "max_new_tokens": 12, **wishes}))[0]


def replace_tensors(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def replace_parameters(model, other):
    for layer, theirs in zip(model.modules(), other.modules()):
        if hasattr(layer, "lora_A"):
            layer.lora_A = torch.nn.Parameter(theirs.lora_A.detach().clone())
            layer.lora_B = torch.nn.Parameter(theirs.lora_B.detach().clone())


def write_in_place(model, other):
    with torch.no_grad():
        for parameter, theirs in zip(model.parameters(), other.parameters()):
            parameter.copy_(theirs)


def change_the_routing(model, other):
    model.routing.config.assignment = "shared"


@pytest.mark.parametrize("change", [replace_tensors, replace_parameters, write_in_place, change_the_routing])
def test_pages_of_other_weights_are_not_found(model, change):
    engine = MoTEEngine(model, **SMALL)
    answer(engine)
    assert answer(engine).num_cached == 8
    change(model, disturb(make_model("llama_tied"), seed=7))
    got, fresh = answer(engine), answer(MoTEEngine(model, **SMALL))
    assert got.num_cached == 0 and got.generated_tokens == fresh.generated_tokens


def test_a_window_that_stands_in_the_mask_alone_is_refused():
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
        num_key_value_heads=2, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        use_sliding_window=True, sliding_window=32, max_window_layers=0, layer_types=["sliding_attention"] * 2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    settings = mote_ext.MoTEConfig(r=4, target_modules=["q_proj"], marker_ids=list(range(64, 72)), verdict_ids=[1, 2])
    model = mote_ext.MoTEForCausalLM.from_base(base, settings)
    with pytest.raises(ValueError, match=r"masks have the windows \[32\], its attention layers name \[\]"):
        MoTEEngine(model, **SMALL)


@pytest.mark.parametrize("total", [4, 5, 6, 12])
def test_log_probabilities_belong_to_their_tokens(model, total):
    """With little room the rules force the first marker of an adaptive path too."""
    out = answer(MoTEEngine(model, **SMALL), path="adaptive", max_new_tokens=total, logprobs=100)
    assert [each.token_id for each in out.logprobs] == out.generated_tokens
    assert any(each.logprob is not None for each in out.logprobs)


def test_numbers_that_cannot_be(model):
    with pytest.raises(ValueError, match="cache_dtype must be a floating-point dtype"):
        MoTEEngine(model, **SMALL, cache_dtype=torch.int32)
    engine = MoTEEngine(model, **SMALL, max_waiting=2, max_running=8)
    with pytest.raises(ValueError, match="n must be at most max_running and max_waiting, 2 here, got 3"):
        answer(engine, n=3)
    with pytest.raises(ValueError, match=r"fit into the cache of 80 tokens, got 9 \+ 72; .* more num_pages"):
        answer(MoTEEngine(model, num_pages=20, page_size=4), max_new_tokens=72)
    with pytest.raises(ValueError, match="temperature must be 0 or"):
        SamplingParams(temperature=1e-40)
    assert engine.stats()["submitted"] == 0


def test_a_name_that_is_taken_is_passed_over(model):
    engine = MoTEEngine(model, **SMALL)
    wishes = SamplingParams(path="answer", max_new_tokens=12)
    engine.submit(PROMPT, wishes, request_id="request-2")
    assert engine.submit(PROMPT, wishes) == "request-3"
    assert answer(engine).status == "finished"


def test_an_end_of_sequence_id_beyond_the_vocabulary_is_passed_over(model):
    model.generation_config.eos_token_id = [2, 5000]
    assert answer(MoTEEngine(model, **SMALL)).status == "finished"


def test_events_without_a_tokenizer_know_their_stages(model):
    engine = MoTEEngine(model, **SMALL)
    wishes = {"path": "full", "max_new_tokens": 30, "hide": ("analysis",)}
    events = list(engine.stream(PROMPT, SamplingParams(**wishes)))
    assert {event.stage for event in events if event.token_ids} == {"guidance", "response"}
    shown = [token for event in events for token in event.token_ids]
    assert shown == events[-1].output.generated_tokens


@pytest.mark.parametrize("let_go", [lambda events: events.close(), lambda events: next(events) and events.close()])
def test_a_stream_that_is_closed_cancels_its_request(model, let_go):
    engine = MoTEEngine(model, **SMALL)
    let_go(engine.stream(PROMPT, SamplingParams(path="answer", max_new_tokens=12)))
    assert not engine.has_work and engine.stats()["pages_used"] == 0


def test_counts_say_how_requests_ended(model):
    engine = MoTEEngine(model, **SMALL, max_running=2)
    for path in ("answer", "full", "analysis"):
        answer(engine, path=path)
    engine.submit(PROMPT, SamplingParams(path="answer", max_new_tokens=12), request_id="gone")
    engine.cancel("gone")
    engine.step()
    found = engine.stats()
    assert (found["finished"], found["cancelled"], found["failed"]) == (3, 1, 0)
    assert found["hit_rate"] == pytest.approx(2 * 8 / (3 * 9))


@pytest.mark.parametrize("place", ["plan", "commit"])
def test_a_step_that_was_interrupted_between_its_verbs_fails_its_requests(model, place):
    """Not lost without a word, and the engine goes on."""

    class Interrupting:
        def __init__(self, scheduler):
            self.scheduler, self.interrupts = scheduler, True

        def __getattr__(self, name):
            method = getattr(self.scheduler, name)
            if name != place or not self.interrupts:
                return method

            def interrupted(*args, **kwargs):
                self.interrupts = False
                method(*args, **kwargs)
                raise KeyboardInterrupt

            return interrupted

    engine = MoTEEngine(model, **SMALL)
    expected = answer(engine).generated_tokens
    engine._scheduler = Interrupting(engine._scheduler)
    engine.submit(PROMPT, SamplingParams(path="answer", max_new_tokens=12), request_id="hit")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    outputs = [event.output for event in engine.step()]
    assert [(out.request_id, out.status) for out in outputs] == [("hit", "failed")]
    assert "interrupted" in outputs[0].error
    assert answer(engine).generated_tokens == expected and engine.stats()["pages_used"] == 0
