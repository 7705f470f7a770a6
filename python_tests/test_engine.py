"""MoTEEngine against generate() one request at a time, token for token, with everything switched on that could disturb
it: chunks, shared pages, preemption, roll-back, company."""

import itertools

import pytest
import torch
from closeness import FORWARD, assert_close
from models import ENDS, KINDS, MARKER_IDS, PAD, SAFE, STARTS, make_base, make_model, make_tokenizer, twin

import mote_ext
from mote_ext import SamplingParams
from mote_ext.engine import QueueFull

FOUR = ("llama_tied", "gemma2", "gpt2", "qwen3")  # shared heads, tied; windows and soft cap; Conv1D; normed heads
PATHS = ("answer", "analysis", "full", "adaptive", ("guidance", "response"))
TOTAL = 22
ROOMY = {"num_pages": 400, "page_size": 4, "max_batch_tokens": 256}
TIGHT = {"num_pages": 26, "page_size": 4, "max_batch_tokens": 11, "max_running": 16, "safety_margin": 0.0}


@pytest.fixture(scope="module")
def model():
    return make_model("llama_tied")


def make_prompts(count, seed=0):
    """Of 3 to 30 tokens; every other one begins like the one before it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist()
    prompts = [torch.randint(10, 60, (length,), generator=generator).tolist() for length in lengths]
    for i in range(1, count, 2):
        prompts[i] = prompts[i - 1][:17] + prompts[i]
    return prompts


def every_wish():
    checks = itertools.product(PATHS, (False, "flag", "enforce"))
    wishes = [{"path": path, "check": check} for path, check in checks]
    wishes += [{"path": "escalate"}] * 3 + [{"path": None}, {"path": "full", "stage_max_tokens": {"analysis": 2}}]
    return [SamplingParams(**wish, max_new_tokens=TOTAL) for wish in wishes]


def generated(model, prompt, params, **options):
    """generate() of one request alone."""
    staged = {} if params.path is None else {"check": params.check, "hide": params.hide}
    if params.stage_max_tokens:
        staged["stage_max_tokens"] = params.stage_max_tokens
    return model.generate(
        torch.tensor([prompt]),
        path=params.path,
        max_new_tokens=params.max_new_tokens,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **staged,
        **options,
    )


def assert_same(model, output, expected, params):
    """Ids, stages and report; where an argmax differs the two likeliest must be closer than rounding."""
    length = len(output.prompt_ids)
    tokens = expected.sequences[0, length:].tolist()
    differing = [i for i, (a, b) in enumerate(zip(output.generated_tokens, tokens)) if a != b]
    if differing:
        assert_is_a_near_tie(model, output.prompt_ids + tokens, length + differing[0], output, tokens, differing[0])
        return
    assert output.status == "finished" and output.generated_tokens == tokens
    if params.path is None:
        return
    assert output.stage_ids == expected.stage_ids[0, length:].tolist()
    assert output.stages == expected.stages[0] and output.verdict == expected.verdicts[0]
    assert output.stop_reason == expected.stop_reasons[0] and output.num_generated == expected.num_generated[0]


@torch.no_grad()
def assert_is_a_near_tie(model, ids, place, output, tokens, at):
    plain = model(torch.tensor([ids[:place]])).logits[0, -1].double()
    truth = twin(model).double()(torch.tensor([ids[:place]])).logits[0, -1]
    unit = torch.finfo(torch.float32).eps * truth.abs().max()
    allowed = 2 * (FORWARD * (plain - truth).abs().max() + unit)
    gap = truth[tokens[at]] - truth[output.generated_tokens[at]]
    assert gap <= allowed, f"token {at}: {output.generated_tokens[at]} for {tokens[at]}, {gap:.3g} apart: a wrong route"


def assert_all_pages_are_back(engine):
    stats = engine.stats()
    engine._scheduler.check()
    assert stats["pages_used"] == 0 and stats["num_running"] == stats["num_waiting"] == 0 and not engine.has_work
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]


# ---- parity


def middling_threshold(model, prompts):
    """A probability of "safe" that about half of these answers reach."""
    chains = [generated(model, prompt, SamplingParams("answer", check="flag", max_new_tokens=9)) for prompt in prompts]
    asked = [chain.sequences[0, : chain.sequences[0].tolist().index(STARTS[3]) + 1] for chain in chains]
    with torch.no_grad():
        probabilities = [float(model(ids[None]).logits[0, -1].softmax(-1)[SAFE]) for ids in asked]
    return sorted(probabilities)[len(probabilities) // 2]


@pytest.mark.parametrize("name, kind", [*((name, "whole") for name in FOUR), ("llama", "in_place")])
def test_a_mixed_batch_is_generate_one_at_a_time(name, kind):
    model = make_model(name, kind)
    model.routing.config.check_threshold = middling_threshold(model, make_prompts(5))
    wishes = every_wish()
    prompts = make_prompts(len(wishes))
    expected = [generated(model, prompt, wish) for prompt, wish in zip(prompts, wishes)]
    for sizes in (ROOMY, TIGHT):
        engine = mote_ext.MoTEEngine(model, **sizes)
        for _ in range(2):  # the second time most of every prompt is in the cache
            for output, prompt, of, params in zip(engine.generate(prompts, wishes), prompts, expected, wishes):
                assert output.prompt_ids == prompt
                assert_same(model, output, of, params)
        stats = engine.stats()
        assert stats["prefix_hit_tokens"] > 0 and (stats["preemptions"] > 0) == (sizes is TIGHT)
        assert_all_pages_are_back(engine)
    assert {of.verdicts[0] for of, wish in zip(expected, wishes) if wish.path} == {"safe", "unsafe", None}


@pytest.mark.parametrize("name", FOUR)
def test_rolled_back_it_is_generates_escalation(name):
    model = make_model(name)
    model.routing.config.check_threshold = 1.1
    wishes = [SamplingParams("escalate", max_new_tokens=TOTAL), SamplingParams("full", max_new_tokens=TOTAL)] * 3
    prompts = make_prompts(len(wishes))
    engine = mote_ext.MoTEEngine(model, **TIGHT)
    for output, prompt, params in zip(engine.generate(prompts, wishes), prompts, wishes):
        assert_same(model, output, generated(model, prompt, params), params)
    stats = engine.stats()
    assert stats["rolled_back"] == 3 * 2 and stats["preemptions"] > 0
    assert_all_pages_are_back(engine)


@pytest.mark.parametrize("changes", [
    {"prompt_expert": "none"}, {"prompt_expert": "guidance"}, {"assignment": "shared"}, {"assignment": "random"},
    {"shared_expert": False},
], ids=str)  # fmt: skip
def test_every_way_of_routing_is_generates(changes):
    model = make_model("llama", **changes)
    wishes = every_wish()[::3]
    prompts = make_prompts(len(wishes))
    engine = mote_ext.MoTEEngine(model, **TIGHT)
    for output, params in zip(engine.generate(prompts, wishes), wishes):
        assert_same(model, output, generated(model, output.prompt_ids, params), params)
    assert engine.stats()["stage_mix"]["base"] > 0 or changes != {"prompt_expert": "none"}


def test_a_chain_is_continued_as_generate_continues_it(model):
    prompt = [11, 12, STARTS[0], 20, 21, ENDS[0]]
    params = SamplingParams(path=("guidance", "response"), max_new_tokens=TOTAL, trusted_prompt=True)
    output = mote_ext.MoTEEngine(model, **ROOMY).generate([prompt], params)[0]
    assert_same(model, output, generated(model, prompt, params, trusted_prompt=True), params)


def test_hidden_stages_are_left_out_as_generate_leaves_them_out(model):
    params = SamplingParams(path="full", check="flag", hide=("analysis", "check"), max_new_tokens=TOTAL, logprobs=0)
    output = mote_ext.MoTEEngine(model, **ROOMY).generate([[11, 12, 13]], params)[0]
    assert_same(model, output, generated(model, [11, 12, 13], params), params)
    assert [entry.token_id for entry in output.logprobs] == output.generated_tokens


def test_without_markers_there_is_one_way():
    model = mote_ext.get_mote_model(make_base("llama"), mote_ext.MoTEConfig(r=4)).eval()
    prompts = make_prompts(4)
    engine = mote_ext.MoTEEngine(model, **TIGHT)
    for prompt, output in zip(prompts, engine.generate(prompts, SamplingParams(path=None, max_new_tokens=8))):
        ids = torch.tensor([prompt])
        stages = torch.full_like(ids, -1)
        for _ in range(8):
            token = model(ids, stage_ids=stages).logits[0, -1].argmax().reshape(1, 1)
            ids, stages = torch.cat((ids, token), 1), torch.cat((stages, stages[:, :1]), 1)
            if int(token) == 2:
                break
        assert output.generated_tokens == ids[0, len(prompt) :].tolist()
        assert output.stop_reason == ("prompt:end" if output.generated_tokens[-1] == 2 else "prompt:max_new_tokens")
    with pytest.raises(ValueError, match="marker tokens have no ids"):
        engine.submit(prompts[0], SamplingParams(path="answer"))


def test_a_plain_generate_between_two_steps_is_what_it_was(model):
    params = SamplingParams(path="full", max_new_tokens=10)
    prompts = make_prompts(3)
    expected = generated(model, prompts[2], params).sequences
    engine = mote_ext.MoTEEngine(model, **TIGHT)
    for prompt in prompts[:2]:
        engine.submit(prompt, params)
    outputs = []
    while engine.has_work:
        outputs += [event.output for event in engine.step() if event.output]
        assert torch.equal(generated(model, prompts[2], params).sequences, expected)
    for output in outputs:
        assert_same(model, output, generated(model, output.prompt_ids, params), params)


# ---- what is computed, and what is not


def test_samples_of_a_prompt_share_its_pages(model):
    prompt = make_prompts(1)[0] + list(range(10, 25))
    params = SamplingParams(path="answer", n=4, temperature=1.0, seed=3, max_new_tokens=12)
    engine = mote_ext.MoTEEngine(model, **ROOMY)
    outputs = engine.generate([prompt], params)
    stats = engine.stats()
    assert [output.sample for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.generated_tokens) for output in outputs}) == 4
    assert stats["planned_tokens"] <= len(prompt) + 4 * 12 and stats["copies"] > 0
    assert_all_pages_are_back(engine)


def test_a_sampled_request_gets_the_same_tokens_in_any_company(model):
    sampled = SamplingParams(
        path="adaptive", check="flag", n=2, temperature=0.9, top_p=0.95, seed=7, max_new_tokens=TOTAL
    )
    prompts = make_prompts(8)
    others = [SamplingParams(path="full", temperature=1.0, repetition_penalty=1.2, max_new_tokens=TOTAL)] * 7
    alone = mote_ext.MoTEEngine(model, **ROOMY).generate(prompts[:1], sampled)
    for sizes in (ROOMY, TIGHT):
        engine = mote_ext.MoTEEngine(model, **sizes)
        outputs = engine.generate(prompts, [sampled, *others])[:2]
        assert [o.generated_tokens for o in outputs] == [o.generated_tokens for o in alone]
    free = SamplingParams(path="answer", temperature=1.5, max_new_tokens=TOTAL)
    without_seed = engine.generate(prompts[:1] * 2, free)
    assert without_seed[0].generated_tokens != without_seed[1].generated_tokens


def test_a_prompt_seen_before_is_not_computed_again_unless_salt_or_weights_differ(model):
    model = twin(model)
    prompt = list(range(10, 50))
    params = SamplingParams(path="answer", max_new_tokens=8)
    engine = mote_ext.MoTEEngine(model, **ROOMY)

    def cached(params):
        output = engine.generate([prompt], params)[0]
        assert_same(model, output, generated(model, prompt, params), params)
        return output.num_cached

    assert cached(params) == 0 and cached(params) == 40
    salted = SamplingParams(path="answer", max_new_tokens=8, cache_salt="another key")
    assert cached(salted) == 0 and cached(salted) == 40
    engine.reset_cache()
    assert engine.stats()["pages_cached"] == 0 and cached(params) == 0 and cached(params) == 40
    layer = model.model.base.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.add_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1)))
    assert cached(params) == 0 and cached(params) == 40
    layer.lora_B.data = layer.lora_B.data.clone() * 2
    assert cached(params) == 0


def test_requests_of_a_higher_priority_come_first(model):
    engine = mote_ext.MoTEEngine(model, **{**ROOMY, "max_running": 1})
    ids = [engine.submit([11, 12, 13 + p], SamplingParams("answer", max_new_tokens=6, priority=p)) for p in (0, 2, 1)]
    ended = []
    while engine.has_work:
        ended += [event.request_id for event in engine.step() if event.output]
    assert ended == [ids[1], ids[2], ids[0]]


def test_the_cache_may_have_its_own_dtype(model):
    engine = mote_ext.MoTEEngine(model, **TIGHT, cache_dtype=torch.bfloat16)
    wide = mote_ext.MoTEEngine(model, **TIGHT)
    assert engine.stats()["cache_bytes"] * 2 == wide.stats()["cache_bytes"]
    outputs = engine.generate(make_prompts(6), SamplingParams("full", max_new_tokens=TOTAL))
    assert all(output.status == "finished" for output in outputs)


def test_statistics_add_up(model):
    engine = mote_ext.MoTEEngine(model, **ROOMY)
    outputs = engine.generate(make_prompts(5), SamplingParams("full", max_new_tokens=TOTAL))
    stats = engine.stats()
    assert stats["submitted"] == stats["finished"] == 5
    assert abs(sum(stats["stage_mix"].values()) - 1) < 1e-9 and stats["stage_mix"]["check"] == 0
    # All but what was cached and the last marker of each chain, with the token before it where that was the limit.
    unread = [2 if output.stop_reason == "response:limit" else 1 for output in outputs]
    total = sum(len(o.prompt_ids) + o.num_generated - o.num_cached - n for o, n in zip(outputs, unread))
    assert stats["planned_tokens"] == total == round(stats["tokens_per_step"] * stats["steps"])


# ---- log-probabilities


def test_logprobs_stand_beside_their_tokens(model):
    params = SamplingParams("analysis", check="flag", temperature=1.0, seed=1, logprobs=2, max_new_tokens=TOTAL)
    output = mote_ext.MoTEEngine(model, **TIGHT).generate([[11, 12, 13]], params)[0]
    assert [entry.token_id for entry in output.logprobs] == output.generated_tokens
    ids = torch.tensor([output.prompt_ids + output.generated_tokens])
    with torch.no_grad():
        plain, truth = (m(ids).logits[0, 2:-1].log_softmax(-1) for m in (model, twin(model).double()))
    chosen = [i for i, entry in enumerate(output.logprobs) if entry.logprob is not None]
    forced = {output.generated_tokens[i] for i in range(len(output.logprobs)) if i not in chosen}
    assert forced <= set(MARKER_IDS) and {STARTS[0], STARTS[2], STARTS[3], ENDS[3]} <= forced
    pick = [(i, output.generated_tokens[i]) for i in chosen]
    got = torch.tensor([output.logprobs[i].logprob for i in chosen])
    assert_close("logprobs", got, *(torch.stack([of[i, token] for i, token in pick]) for of in (plain, truth)))
    assert all([token for token, _ in output.logprobs[i].top] == plain[i].topk(2).indices.tolist() for i in chosen)


# ---- events


@pytest.fixture(scope="module")
def speaking():
    """A model whose every token is a byte, and its tokenizer."""
    tokenizer = make_tokenizer()
    base = make_base("llama", vocab_size=300)
    model = make_model(base=base, tokenizer=tokenizer, marker_ids=None, verdict_ids=None, refusal_ids=None)
    return model, tokenizer


def stream(engine, prompt, params):
    events = list(engine.stream(prompt, params))
    assert [event.output is None for event in events] == [True] * (len(events) - 1) + [False]
    assert_all_pages_are_back(engine)
    return events, events[-1].output


def joined(events):
    texts = {}
    for event in events:
        texts[event.stage] = texts.get(event.stage, "") + event.text
    return {stage: text for stage, text in texts.items() if text}


STREAMED = [
    {"path": "full"}, {"path": "adaptive", "check": "flag"}, {"path": "full", "hide": ("analysis", "guidance")},
    {"path": "analysis", "check": "enforce"}, {"path": "escalate"}, {"path": None},
]  # fmt: skip


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("wish", STREAMED, ids=str)
def test_events_say_what_generates_streamer_says(speaking, wish, safe):
    model, tokenizer = speaking
    model.routing.config.check_threshold = 0.0 if safe else 1.1
    prompt = mote_ext.encode_prompt(tokenizer, "Why is the sky blue?")
    params = SamplingParams(**wish, max_new_tokens=40)
    shown = []
    streamer = mote_ext.StageStreamer(tokenizer, shown.append)
    generated(model, prompt, params, streamer=streamer)
    expected = {}
    for piece in shown:
        expected[piece.stage] = expected.get(piece.stage, "") + piece.text
    engine = mote_ext.MoTEEngine(model, tokenizer, **ROOMY)
    events, output = stream(engine, "Why is the sky blue?", params)
    assert joined(events) == expected == {stage: text for stage, text in output.texts if text}
    assert [token for event in events for token in event.token_ids] == output.generated_tokens or not safe
    response = params.path and "response"
    assert output.text == "".join(text for stage, text in output.texts if response in (None, stage))


@pytest.mark.parametrize("path", ["analysis", "escalate"])
def test_nothing_is_shown_before_the_verdict(speaking, path):
    model, tokenizer = speaking
    model.routing.config.check_threshold = 1.1
    engine = mote_ext.MoTEEngine(model, tokenizer, **ROOMY)
    events, output = stream(engine, "x", SamplingParams(path=path, check="enforce", max_new_tokens=40))
    assert [(event.stage, event.text) for event in events] == [("response", model.routing.config.refusal)]
    assert output.stop_reason == "response:refusal" and output.text == model.routing.config.refusal
    assert output.generated_tokens[1:-1] == model.routing.config.refusal_ids


def test_a_cancelled_request_shows_nothing_that_waited_for_a_verdict(speaking):
    model, tokenizer = speaking
    engine = mote_ext.MoTEEngine(model, tokenizer, **ROOMY)
    held = engine.submit("x", SamplingParams("full", check="enforce", max_new_tokens=60))
    open_ = engine.submit("x", SamplingParams("full", max_new_tokens=60))
    events = [event for _ in range(8) for event in engine.step()]
    engine.cancel(held), engine.cancel(open_)
    events += engine.step()
    outputs = {event.request_id: event.output for event in events if event.output}
    assert not engine.has_work and outputs[held].status == outputs[open_].status == "cancelled"
    assert outputs[held].generated_tokens == [] and outputs[held].texts == [] and outputs[held].num_generated > 3
    assert {event.request_id for event in events if event.text} == {open_}
    assert outputs[open_].stop_reason.endswith(":cancelled") and len(outputs[open_].generated_tokens) > 3
    assert_all_pages_are_back(engine)
    with pytest.raises(KeyError):
        engine.cancel(held)


def test_leaving_a_stream_cancels_it_and_others_keep_their_events(speaking):
    model, tokenizer = speaking
    engine = mote_ext.MoTEEngine(model, tokenizer, **ROOMY)
    params = SamplingParams("answer", max_new_tokens=12)
    expected = engine.generate(["another"], params)[0]
    other = engine.submit("another", params)
    for event in engine.stream("x", SamplingParams("full", max_new_tokens=60)):
        if event.stage == "analysis" and event.text:
            break
    events = []
    while engine.has_work:
        events += engine.step()
    assert {event.request_id for event in events} == {other}
    assert [token for event in events for token in event.token_ids] == expected.generated_tokens
    assert joined(events) == {"response": expected.text}
    assert_all_pages_are_back(engine)


@pytest.mark.parametrize("check", [False, "flag", "enforce"])
def test_a_stop_text_ends_the_response_or_cuts_it_until_the_verdict(speaking, check):
    model, tokenizer = speaking
    model.routing.config.check_threshold = 0.0
    engine = mote_ext.MoTEEngine(model, tokenizer, **ROOMY)
    whole = engine.generate(["x"], SamplingParams("analysis", check=check, max_new_tokens=60))[0]
    stop = whole.text[3:5]
    params = SamplingParams("analysis", check=check, stop=(stop, "never"), max_new_tokens=60)
    events, output = stream(engine, "x", params)
    assert output.text == whole.text[: whole.text.index(stop)] == joined(events)["response"]
    assert output.stop_reason == "response:stop" and output.status == "finished"
    assert (output.num_generated < whole.num_generated) == (not check)
    assert output.verdict == whole.verdict and dict(output.texts)["analysis"] == dict(whole.texts)["analysis"]
    quiet = engine.generate(["x"], params)[0]
    same = ("generated_tokens", "texts", "text", "stop_reason", "verdict")
    assert [getattr(quiet, name) for name in same] == [getattr(output, name) for name in same]


# ---- what can never run


def test_requests_that_can_never_run_are_refused_at_once(model):
    engine = mote_ext.MoTEEngine(model, **{**TIGHT, "max_waiting": 3})
    ids = [11, 12, 13]
    for prompt, params, message in (
        ([], {}, "at least one token"),
        ("text", {}, "needs a tokenizer"),
        ([11, 10**6], {}, "must be in 0..59, got 1000000"),
        ([11, -1], {}, "must be in 0..59, got -1"),
        ([0.5, 2], {}, "list of token ids"),
        ([11, STARTS[2]], {}, "control token 64 at .1."),
        ([11] * 200, {"max_new_tokens": 57}, "context of 256 tokens, got 200 . 57"),
        ([11] * 100, {"max_new_tokens": 20}, "pages"),
        (ids, {"path": "sideways"}, "path must be one of"),
        (ids, {"path": "full", "max_new_tokens": 4}, "max_new_tokens must be at least"),
        (ids, {"stage_max_tokens": {"nowhere": 3}}, "stage must be one of"),
        (ids, {"hide": ("nowhere",)}, "stage must be one of"),
        (ids, {"stop": ("x",)}, "stop texts need a tokenizer"),
        (ids, {"n": 17}, "max_running|samples"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, SamplingParams(**{"max_new_tokens": TOTAL, **params}))
    engine.submit(ids, SamplingParams(max_new_tokens=TOTAL), request_id="mine")
    with pytest.raises(ValueError, match="'mine' is in use"):
        engine.submit(ids, SamplingParams(max_new_tokens=TOTAL), request_id="mine")
    with pytest.raises(QueueFull):
        for _ in range(20):
            engine.submit(ids, SamplingParams(max_new_tokens=TOTAL))
    while engine.has_work:
        engine.step()
    assert_all_pages_are_back(engine)


def test_more_requests_than_the_queue_holds_are_generated_all_the_same(model):
    prompts = make_prompts(9)
    params = SamplingParams("answer", max_new_tokens=8)
    engine = mote_ext.MoTEEngine(model, **{**TIGHT, "max_running": 2, "max_waiting": 2})
    for output in engine.generate(prompts, params):
        assert_same(model, output, generated(model, output.prompt_ids, params), params)


def test_a_model_that_is_not_ready_is_refused(model):
    with pytest.raises(ValueError, match="must be a MoTE model"):
        mote_ext.MoTEEngine(make_base("llama"))
    with pytest.raises(ValueError, match="cannot be served"):
        mote_ext.MoTEEngine(make_model("bloom", "in_place"))
    with pytest.raises(ValueError, match="page_size must be at least 1"):
        mote_ext.MoTEEngine(model, page_size=0)
    model = twin(model)
    engine = mote_ext.MoTEEngine(model, **ROOMY)
    engine.submit([11, 12], SamplingParams("answer", max_new_tokens=6))
    model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        engine.step()
    model.eval()
    with model.disable_experts(), pytest.raises(RuntimeError, match="switched off"):
        engine.step()
    outputs = []
    while engine.has_work:
        outputs += [event.output for event in engine.step() if event.output]
    params = SamplingParams("answer", max_new_tokens=6)
    assert_same(model, outputs[0], generated(model, [11, 12], params), params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_leaves_the_model_as_it_was(kind):
    model = make_model("llama", kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = mote_ext.MoTEEngine(model, **ROOMY)
    engine.generate(make_prompts(2), SamplingParams("full", check="flag", max_new_tokens=TOTAL))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.requires_grad for name, p in model.named_parameters() if "lora_" in name} == {True}
    loss = model(torch.tensor([[11, 12, 13]]), labels=torch.tensor([[11, 12, 13]])).loss
    loss.backward()  # nothing of inference is left in what a later training step uses
