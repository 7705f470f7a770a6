"""MoTEEngine with SmolLM2-135M: the same tokens as generate() one at a time, and text as it streams."""

import pytest
from test_engine import assert_all_pages_are_back, assert_same, generated
from test_real_model import folder, model, tokenizer  # noqa: F401  (fixtures)

import mote_ext
from mote_ext import SamplingParams

WISHES = [
    {"path": "answer", "check": "flag"},
    {"path": "full", "stage_max_tokens": {"analysis": 3}},
    {"path": "escalate"},
    {"path": None},
]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Grüße aus 東京 🙂: antworte!", "Why?"]


@pytest.fixture(scope="module")
def engine(model, tokenizer):  # noqa: F811
    """Few pages and small steps: prompts of some 40 tokens come in chunks, and somebody is preempted."""
    return mote_ext.MoTEEngine(model, tokenizer, num_pages=22, page_size=4, max_batch_tokens=24, safety_margin=0.0)


def test_a_mixed_batch_is_generate_one_at_a_time(engine, model, tokenizer):  # noqa: F811
    params = [SamplingParams(**wish, max_new_tokens=14) for wish in WISHES]
    for output, of in zip(engine.generate(QUESTIONS, params), params):
        assert_same(model, output, generated(model, output.prompt_ids, of), of)
        assert [pair for pair in output.texts if pair[0] != "prompt"] == [
            pair for pair in mote_ext.parse_stages(tokenizer, output.generated_tokens) if pair[0] != "prompt"
        ]
    stats = engine.stats()
    assert stats["rolled_back"] == 2 and stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
    assert_all_pages_are_back(engine)


def test_streamed_pieces_are_the_text(engine):
    params = SamplingParams("analysis", max_new_tokens=24, temperature=1.5, seed=0)
    events = list(engine.stream(QUESTIONS[2], params))
    texts = {}
    for event in events:
        texts[event.stage] = texts.get(event.stage, "") + event.text
    assert {stage: text for stage, text in texts.items() if text} == dict(events[-1].output.texts)
    assert engine.generate([QUESTIONS[2]], params)[0].generated_tokens == events[-1].output.generated_tokens
    assert_all_pages_are_back(engine)
