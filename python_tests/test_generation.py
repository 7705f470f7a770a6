"""generate(): every path, check and limit; cached decoding against a full forward; roll-back against a fresh start."""

import threading

import pytest
import torch
from closeness import assert_close
from models import (
    ENDS,
    FOUR,
    KINDS,
    MARKER_IDS,
    PAD,
    REFUSAL,
    SAFE,
    STARTS,
    UNSAFE,
    make_base,
    make_model,
    make_prompts,
    make_tokenizer,
    positions_of,
    twin,
)
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

import mote_ext
from mote_ext.generation.request import Request
from mote_ext.generation.rules import StageRules
from mote_ext.inject import experts_of

ANALYSIS, GUIDANCE, RESPONSE, CHECK = range(4)
PATHS = {
    "answer": [RESPONSE],
    "analysis": [ANALYSIS, RESPONSE],
    "full": [ANALYSIS, GUIDANCE, RESPONSE],
    ("guidance", "response"): [GUIDANCE, RESPONSE],
    "guidance": [GUIDANCE, RESPONSE],
}
BATCHES = {"one": {"rows": 1, "padded": False}, "one_padded": {"rows": 1}, "mixed": {"rows": 3}}
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return make_model("llama_tied")


def written(out, row=0, length=9):
    """Generated ids of a row without padding behind the chain's end."""
    ids = out.sequences[row, length:].tolist()
    while ids and ids[-1] == PAD:
        ids.pop()
    return ids


def markers(ids):
    return [token for token in ids if token in MARKER_IDS]


def opened_and_closed(stages):
    return [marker for stage in stages for marker in (STARTS[stage], ENDS[stage])]


def give_verdict(model, safe):
    """The check's probability of "safe" is made certain, one way or the other."""
    model.routing.config.check_threshold = 0.0 if safe else 1.1


# ---- paths


@pytest.mark.parametrize("check", [False, "flag"])
@pytest.mark.parametrize("path", PATHS)
def test_a_path_goes_through_its_stages_in_order(model, path, check):
    out = model.generate(**make_prompts(3), path=path, check=check, **GREEDY)
    stages = PATHS[path] + ([CHECK] if check else [])
    for row in range(3):
        ids = written(out, row)
        assert markers(ids) == opened_and_closed(stages)
        assert ids[0] == STARTS[stages[0]] and ids[-1] == ENDS[stages[-1]] and len(ids) <= 24
        for stage in stages:
            assert ids.index(ENDS[stage]) > ids.index(STARTS[stage]) + 1  # never empty
        assert 2 not in ids  # EOS
    assert out.stages == [[mote_ext.MoTEConfig().stages[s]["name"] for s in stages]] * 3


def test_adaptive_goes_where_the_models_own_marker_says(model):
    prompts = make_prompts(4, padded=False)
    for favoured, stages in ((ANALYSIS, [ANALYSIS, RESPONSE]), (RESPONSE, [RESPONSE])):
        biased = twin(model)
        bias = torch.zeros(68)
        bias[STARTS[favoured]] = bias[STARTS[RESPONSE]] = bias[ENDS[ANALYSIS]] = 1e4
        bias[STARTS[favoured]] += 1e3
        biased.lm_head.register_forward_hook(lambda module, args, logits, bias=bias: logits + bias)
        out = biased.generate(**prompts, **GREEDY)
        for row in range(4):
            assert markers(written(out, row)) == opened_and_closed(stages)


def test_only_legal_transitions_are_possible(model):
    """Sampled at a high temperature, a chain still follows the table."""
    table = model.routing.table
    torch.manual_seed(0)
    out = model.generate(
        **make_prompts(32, padded=False),
        **{**GREEDY, "do_sample": True, "max_new_tokens": 60},
        temperature=10.0,
        top_k=0,
        check="flag",
        stage_max_tokens={"analysis": 4},
    )
    seen = set()
    for names in out.stages:
        places = [table.index(name) for name in names]
        assert places[0] in table.first() and places[-2:] == [RESPONSE, CHECK]
        assert all(b in table.following(a) for a, b in zip(places[:-2], places[1:-1]))
        seen.add(tuple(names))
    assert len(seen) == 3


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name, kind", [*((name, "whole") for name in FOUR), ("mistral", "in_place")])
def test_cached_decoding_is_a_full_forward_with_the_same_ids(name, batch, kind, monkeypatch):
    """On every path, judged together: the plain program is the same generation on the reference's operation."""
    model, prompts = make_model(name, kind), make_prompts(**BATCHES[batch])

    def generated(path):
        out = model.generate(**prompts, path=path, check="flag", **GREEDY, output_logits=True)
        return out, torch.stack(out.raw.logits, 1)

    found = []
    for path in ("answer", "analysis", "full", "adaptive", ("guidance", "response")):
        out, steps = generated(path)
        with monkeypatch.context() as patch:
            for call in ("mote_linear", "lora_delta"):
                patch.setattr(mote_ext.ops, call, getattr(mote_ext.reference, call))
            patch.setattr(
                mote_ext.ops,
                "lora_add_",
                lambda y, *rest, **options: y + mote_ext.reference.lora_delta(*rest, **options),
            )
            plain_out, plain = generated(path)
        assert torch.equal(plain_out.sequences, out.sequences)
        ids = out.raw.sequences
        mask = torch.nn.functional.pad(prompts["attention_mask"], (0, ids.shape[1] - 9), value=1)
        full = twin(model).double()(ids, attention_mask=mask, position_ids=positions_of(mask), stage_ids=out.stage_ids)
        found.append((steps, plain, full.logits[:, -steps.shape[1] - 1 : -1].detach()))
    assert_close("logits", *(torch.cat(tensors, dim=1) for tensors in zip(*found)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_layer_sees_each_tokens_stage_step_by_step(batch, kind):
    model, prompts = make_model(kind=kind), make_prompts(**BATCHES[batch])
    seen = {name: [] for name, _ in experts_of(model)}
    for name, layer in experts_of(model):
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen[name].append(layer.context.ids_for(args[0]).clone())
        )
    out = model.generate(**prompts, path="full", check="flag", **GREEDY)
    for ids in seen.values():
        ids = torch.cat(ids, 1)
        assert torch.equal(ids, out.stage_ids[:, : ids.shape[1]]) and ids.shape[1] >= out.stage_ids.shape[1] - 2


# ---- limits


def test_the_total_is_kept_and_the_answer_is_not_cut_off(model):
    for path, stages in PATHS.items():
        for total in (12, 17, 40):
            out = model.generate(**make_prompts(), path=path, **{**GREEDY, "max_new_tokens": total}, response_reserve=4)
            for row in range(2):
                ids = written(out, row)
                assert len(ids) <= total and markers(ids) == opened_and_closed(stages)
                assert total - ids.index(STARTS[RESPONSE]) - 2 >= 4  # room for the answer


def test_stage_limits_are_kept(model):
    limits = {"analysis": 2, "guidance": 3, "response": 5}
    out = model.generate(**make_prompts(), path="full", **{**GREEDY, "max_new_tokens": 60}, stage_max_tokens=limits)
    for row in range(2):
        ids = written(out, row)
        lengths = [ids.index(ENDS[s]) - ids.index(STARTS[s]) - 1 for s in (ANALYSIS, GUIDANCE, RESPONSE)]
        assert all(length <= limit for length, limit in zip(lengths, limits.values()))
        assert out.stop_reasons[row] == ("response:limit" if lengths[-1] == 5 else "response:end")


def test_the_stop_reason_names_the_stage():
    model = make_model()
    ending = twin(model)
    bias = torch.zeros(68)
    bias[ENDS[RESPONSE]] = 1e4
    ending.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    prompts = make_prompts(1, padded=False)
    assert ending.generate(**prompts, path="answer", **GREEDY).stop_reasons == ["response:end"]
    assert ending.generate(**prompts, path="answer", check="flag", **GREEDY).stop_reasons == ["check:end"]
    assert model.generate(**prompts, path="answer", **GREEDY).stop_reasons[0] in ("response:limit", "response:end")
    give_verdict(model, safe=False)
    assert model.generate(**prompts, path="answer", check="enforce", **GREEDY).stop_reasons == ["response:refusal"]


# ---- check


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 50.0}])
@pytest.mark.parametrize("safe", [True, False])
def test_the_verdict_is_the_probability_against_the_threshold(safe, options):
    model = make_model()
    torch.manual_seed(0)
    out = model.generate(**make_prompts(), path="answer", check="flag", **{**GREEDY, **options})
    logits = model(
        out.sequences,
        attention_mask=torch.nn.functional.pad(
            make_prompts()["attention_mask"], (0, out.sequences.shape[1] - 9), value=1
        ),
    ).logits
    probabilities = []
    for row in range(2):
        place = out.sequences[row].tolist().index(STARTS[CHECK])
        probabilities.append(logits[row, place].softmax(-1)[SAFE].item())
    model.routing.config.check_threshold = min(probabilities) * 0.9 if safe else max(probabilities) * 1.1
    torch.manual_seed(0)
    out = model.generate(**make_prompts(), path="answer", check="flag", **{**GREEDY, **options})
    for row in range(2):
        ids = written(out, row)
        assert ids[ids.index(STARTS[CHECK]) + 1] == (SAFE if safe else UNSAFE)
    assert out.verdicts == ["safe" if safe else "unsafe"] * 2


def test_enforce_replaces_an_unsafe_answer_and_keeps_a_safe_one(model):
    model = twin(model)
    flagged = model.generate(**make_prompts(), path="analysis", check="flag", **GREEDY)
    give_verdict(model, safe=True)
    kept = model.generate(**make_prompts(), path="analysis", check="enforce", **GREEDY)
    assert kept.verdicts == ["safe"] * 2
    assert [written(kept, r)[:-3] for r in range(2)] == [written(flagged, r)[:-3] for r in range(2)]
    give_verdict(model, safe=False)
    refused = model.generate(**make_prompts(), path="analysis", check="enforce", **GREEDY)
    assert refused.verdicts == ["unsafe"] * 2
    assert all(written(refused, row) == [STARTS[RESPONSE], *REFUSAL, ENDS[RESPONSE]] for row in range(2))


# ---- escalate


def attempts_of(model):
    """What transformers' generate gives in each attempt, from here on."""
    attempts, run = [], model._run

    def recorded(*args, **kwargs):
        attempts.append(run(*args, **kwargs))
        return attempts[-1]

    model._run = recorded
    return attempts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FOUR, "gemma3", "qwen2"])
def test_a_rolled_back_generation_is_a_fresh_one(name, kind):
    """Nothing is safe: after two roll-backs the last attempt must be what "full" gives from scratch, to the logits."""
    model, prompts = make_model(name, kind), make_prompts(3)
    give_verdict(model, safe=False)
    attempts = attempts_of(model)
    out = model.generate(**prompts, path="escalate", **GREEDY, output_logits=True)
    last = attempts[2]
    fresh = model.generate(**prompts, path="full", check="flag", **GREEDY, output_logits=True)
    assert fresh.stages == [["analysis", "guidance", "response", "check"]] * 3 and out.verdicts == ["unsafe"] * 3
    assert torch.equal(last.sequences, fresh.raw.sequences)
    for step, expected in zip(last.logits, fresh.raw.logits):
        assert torch.allclose(step, expected, atol=1e-4)
    assert out.raw is None and out.stages == [["response"]] * 3
    assert all(written(out, row) == [STARTS[RESPONSE], *REFUSAL, ENDS[RESPONSE]] for row in range(3))


def test_only_unsafe_rows_go_on():
    model, prompts = make_model(), make_prompts(4)

    def probability(path):
        out = model.generate(**prompts, path=path, check="flag", **GREEDY, output_logits=True)
        found = []
        for row in range(4):
            place = written(out, row).index(STARTS[CHECK])
            found.append(out.raw.logits[place][row].softmax(-1)[SAFE].item())
        return found

    first = probability("answer")
    threshold = sorted(first)[1] * 0.5 + sorted(first)[2] * 0.5
    model.routing.config.check_threshold = threshold
    attempts = attempts_of(model)
    out = model.generate(**prompts, path="escalate", **GREEDY)
    assert [len(attempt.sequences) for attempt in attempts][:2] == [4, 2]
    for row in range(4):
        if first[row] >= threshold:
            assert out.stages[row] == ["response", "check"] and out.verdicts[row] == "safe"
        else:
            assert out.stages[row][0] == "analysis" or out.stop_reasons[row] == "response:refusal"


def test_the_question_is_computed_once():
    model, prompts = make_model(), make_prompts(2)
    give_verdict(model, safe=False)
    fed = []
    next(experts_of(model))[1].register_forward_pre_hook(lambda layer, args: fed.append(args[0].shape[1]))
    model.generate(**prompts, path="escalate", **GREEDY)
    assert fed[0] == 9 and max(fed[1:]) == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_beams": 2}, "beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "several sequences"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"cache_implementation": "static"}, "a static cache"),
        ({"use_cache": False}, "use_cache"),
    ],
)
def test_escalate_refuses_what_cannot_be_rolled_back(model, options, reason):
    with pytest.raises(ValueError, match=reason):
        model.generate(**make_prompts(1), path="escalate", **{**GREEDY, **options})


# ---- transformers' ways of decoding


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"assistant": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_however_it_is_decoded_the_greedy_tokens_are_the_same(model, options):
    options = dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = make_base("llama_tied", seed=1, vocab_size=68)
    for path in ("full", "answer"):
        prompts = make_prompts(1, padded=False)
        expected = model.generate(**prompts, path=path, check="flag", **GREEDY)
        got = model.generate(**prompts, path=path, check="flag", **GREEDY, **options)
        assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_follow_the_rules(model, options):
    out = model.generate(**make_prompts(), path="full", check="flag", **{**GREEDY, **options})
    for row in range(len(out.sequences)):
        assert markers(written(out, row)) == opened_and_closed([ANALYSIS, GUIDANCE, RESPONSE, CHECK])


def test_beams_score_with_the_right_experts(model):
    """The score of a beam is the sum of its tokens' log-probabilities under their own stages."""
    prompts = make_prompts(1, padded=False)
    out = model.generate(
        **prompts, path="answer", **{**GREEDY, "max_new_tokens": 6}, num_beams=3, output_scores=True, length_penalty=0.0
    )
    ids = out.sequences
    logprobs = model(ids, stage_ids=out.stage_ids).logits.log_softmax(-1)
    request = Request(model, ids[:, :9], "answer", False, (), False, {"max_new_tokens": 6})
    rules = StageRules(request.plan("answer", False, {}), 9, [2])
    total = 0.0
    for place in range(10, ids.shape[1]):
        allowed = rules(ids[:, :place], logprobs[:, place - 1].clone())
        total += allowed[0, ids[0, place]].item()
    assert abs(out.raw.sequences_scores[0].item() - total) < 1e-3


def test_a_forced_marker_goes_through_with_the_one_before_it(model):
    fed = []
    counted = twin(model)
    next(experts_of(counted))[1].register_forward_pre_hook(lambda layer, args: fed.append(args[0].shape[1]))
    out = counted.generate(**make_prompts(1, padded=False), path="full", check="flag", **GREEDY)
    assert fed[0] == 10  # the question and the first marker
    assert fed.count(2) == 3  # end of analysis + guidance, of guidance + response, of response + check
    assert sum(fed) == 9 + len(written(out)) - 1


def test_hidden_stages_are_left_out(model):
    shown = model.generate(**make_prompts(), path="full", check="flag", **GREEDY)
    hidden = model.generate(**make_prompts(), path="full", check="flag", **GREEDY, hide=["analysis", "check"])
    for row in range(2):
        ids = written(shown, row)
        start, end = ids.index(ENDS[ANALYSIS]) + 1, ids.index(STARTS[CHECK])
        assert written(hidden, row) == ids[start:end]
    assert hidden.stages == shown.stages


def test_logprobs_a_stage_are_those_of_a_full_forward(model):
    options = {**GREEDY, "return_dict_in_generate": False}
    out = model.generate(**make_prompts(), path="analysis", **options, return_stage_logprobs=True)
    ids = model.generate(**make_prompts(), path="analysis", **options)
    assert torch.equal(ids, out.sequences)
    again = model.generate(**make_prompts(), path="analysis", **options, return_stage_ids=True)
    assert torch.equal(again.stage_ids, out.stage_ids)
    mask = torch.nn.functional.pad(make_prompts()["attention_mask"], (0, out.sequences.shape[1] - 9), value=1)
    logprobs = model(
        out.sequences, attention_mask=mask, position_ids=positions_of(mask), stage_ids=out.stage_ids
    ).logits.log_softmax(-1)
    for row in range(2):
        sums = {"analysis": [0.0, 0], "response": [0.0, 0]}
        for place in range(9, 9 + len(written(out, row))):
            name = model.routing.table.names[out.stage_ids[row, place]]
            sums[name][0] += logprobs[row, place - 1, out.sequences[row, place]].item()
            sums[name][1] += 1
        for name, (total, count) in out.stage_logprobs[row].items():
            assert count == sums[name][1] and abs(total - sums[name][0]) < 1e-3


# ---- streaming


def text_model():
    tokenizer = make_tokenizer()
    base = make_base("llama_tied", vocab_size=300)
    model = mote_ext.MoTEForCausalLM.from_base(base, mote_ext.MoTEConfig(r=4), tokenizer=tokenizer).eval()
    return model, tokenizer, mote_ext.encode_prompts(tokenizer, ["hello"])


def test_streamed_text_is_labelled_and_complete():
    model, tokenizer, prompts = text_model()
    pieces = []
    streamer = mote_ext.StageStreamer(tokenizer, pieces.append, hide=("guidance",))
    ids = model.generate(**prompts, path="full", check="flag", max_new_tokens=40, do_sample=False, streamer=streamer)
    streamed = {}
    for piece in pieces:
        streamed[piece.stage] = streamed.get(piece.stage, "") + piece.text
    stages = dict(mote_ext.parse_stages(tokenizer, ids[0, prompts["input_ids"].shape[1] :]))
    assert streamed == {name: text for name, text in stages.items() if name != "guidance" and text}
    assert len(pieces) > 3


def test_a_streamer_can_be_read_from_another_thread():
    model, tokenizer, prompts = text_model()
    streamer = mote_ext.StageStreamer(tokenizer)
    options = {"path": "answer", "max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs={**prompts, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert pieces and {piece.stage for piece in pieces} == {"response"}


@pytest.mark.parametrize("path", ["analysis", "escalate"])
def test_an_enforced_answer_is_not_shown_before_its_verdict(path):
    model, tokenizer, prompts = text_model()
    for safe in (True, False):
        give_verdict(model, safe)
        pieces = []
        streamer = mote_ext.StageStreamer(tokenizer, pieces.append)
        ids = model.generate(
            **prompts, path=path, check="enforce", max_new_tokens=40, do_sample=False, streamer=streamer
        )
        streamed = {}
        for piece in pieces:
            streamed[piece.stage] = streamed.get(piece.stage, "") + piece.text
        expected = dict(mote_ext.parse_stages(tokenizer, ids[0, prompts["input_ids"].shape[1] :]))
        assert list(streamed.items()) == list(expected.items())
        if not safe:
            assert streamed == {"response": model.config.refusal} and len(pieces) == 1


# ---- hostile calls


def test_what_is_withheld_is_nowhere_in_the_result(model):
    model = twin(model)
    give_verdict(model, safe=False)
    refused = model.generate(**make_prompts(), path="full", check="enforce", **GREEDY)
    assert refused.raw is None and refused.stages == [["response"]] * 2
    assert model.generate(**make_prompts(), path="full", hide=["analysis"], **GREEDY).raw is None


def test_a_streamer_refuses_to_hide_what_there_is_not(model):
    with pytest.raises(TypeError, match="tuple of stage names"):
        mote_ext.StageStreamer(make_tokenizer(), print, hide="analysis")
    streamer = mote_ext.StageStreamer(make_tokenizer(), print, hide=("analisys",))
    with pytest.raises(ValueError, match="analisys"):
        model.generate(**make_prompts(1), path="answer", max_new_tokens=12, streamer=streamer)


@pytest.mark.parametrize("path", ["answer", None, "wrong"])
def test_iterating_a_streamer_always_ends(path):
    model, tokenizer, prompts = text_model()
    streamer = mote_ext.StageStreamer(tokenizer)
    try:
        model.generate(**prompts, path=path, max_new_tokens=12, do_sample=False, streamer=streamer)
    except ValueError:
        return  # refused before anything is streamed
    assert list(streamer)


@pytest.mark.parametrize("options", [{"min_length": 30}, {"min_new_tokens": 5}])
def test_limits_of_a_generation_config_are_seen(model, options):
    prompts = make_prompts(1)
    with pytest.raises(ValueError, match="min_new_tokens"):
        model.generate(**prompts, generation_config=GenerationConfig(**options, pad_token_id=PAD), path="answer")
    out = model.generate(prompts["input_ids"], GenerationConfig(max_length=20, pad_token_id=PAD), path="full")
    assert out.shape[1] <= 20
    with pytest.raises(ValueError, match="max_new_tokens must be at least"):
        model.generate(**prompts, path="answer", max_new_tokens=0)


def test_padding_is_inferred_as_transformers_infers_it(model):
    prompts = make_prompts()
    expected = model.generate(**prompts, path="answer", **GREEDY, output_logits=True)
    got = model.generate(prompts["input_ids"], path="answer", **GREEDY, output_logits=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.raw.logits, expected.raw.logits))


def test_explicit_stages_of_the_prompt(model):
    prompts = make_prompts(1, padded=False)
    given = torch.full_like(prompts["input_ids"], 1)
    for path in ("answer", "adaptive"):
        for chunk in (None, 4):
            seen = []
            recorded = twin(model)
            next(experts_of(recorded))[1].register_forward_pre_hook(
                lambda layer, args, seen=seen: seen.extend(layer.context.ids_for(args[0]).reshape(-1).tolist())
            )
            recorded.generate(**prompts, path=path, stage_ids=given, prefill_chunk_size=chunk, **GREEDY)
            assert seen[:9] == [1] * 9 and set(seen[9:]) <= {0, 1, 2} and seen[9] != 1
    for wrong in (given[:, :3], torch.cat((given, given), 1)):
        with pytest.raises(ValueError, match="one id a token of the prompt"):
            model.generate(**prompts, path="answer", stage_ids=wrong, max_new_tokens=12)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_with_their_stages(kind):
    model = make_model(kind=kind)
    ids = make_prompts(1, padded=False)["input_ids"]
    options = {"path": None, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)[:, 9:]
    embeds = model.get_input_embeddings()(ids)
    stages = torch.full_like(ids, -1)
    assert torch.equal(model.generate(inputs_embeds=embeds, stage_ids=stages, **options), expected)
    with pytest.raises(ValueError, match="pass stage_ids"):
        model.generate(inputs_embeds=embeds, **options)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_chain_is_continued_on_its_own_cache(model, rows):
    prompts = make_prompts(rows, padded=False)
    first = model.generate(**prompts, path=None, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, first.sequences[:, :2]), dim=1)
    options = {"path": "answer", "max_new_tokens": 12, "do_sample": False, "trusted_prompt": True}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=first.past_key_values, **options), expected)


WRONG = [
    ({"path": "fastest"}, "path must be one of.*adaptive.*fastest"),
    ({"path": ("response", "analysis")}, "must follow the order"),
    ({"path": ("analysis",)}, "end with 'response'"),
    ({"path": ("analysis", "check")}, "end with 'response'"),
    ({"path": ("thought", "response")}, "thought"),
    ({"path": ()}, "must follow the order"),
    ({"check": "maybe"}, "check must be one of"),
    ({"path": None, "check": "flag"}, "give a path"),
    ({"path": None, "hide": ["analysis"], "stage_max_tokens": {"analysis": 3}}, "'stage_max_tokens', 'hide'"),
    ({"path": "full", "max_new_tokens": 7}, "max_new_tokens must be at least"),
    ({"stage_max_tokens": {"thought": 3}}, "thought"),
    ({"stage_max_tokens": {"analysis": 0}}, "at least 1"),
    ({"hide": ["thought"]}, "thought"),
    ({"min_new_tokens": 5}, "min_new_tokens"),
    ({"check": "enforce", "streamer": TextStreamer(make_tokenizer())}, "StageStreamer"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_calls(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**make_prompts(1), **{"max_new_tokens": 24, "do_sample": False, **options})


def test_a_three_stage_model_has_no_check():
    table = mote_ext.MoTEConfig.paper().stages
    model = make_model(stages=table, marker_ids=MARKER_IDS[:6])
    with pytest.raises(ValueError, match="needs a check stage"):
        model.generate(**make_prompts(1), path="answer", check="flag", max_new_tokens=24)
    with pytest.raises(ValueError, match="needs a check stage"):
        model.generate(**make_prompts(1), path="escalate", max_new_tokens=24)
    assert model.generate(**make_prompts(1), path="full", max_new_tokens=24).shape[1] > 9


def test_a_stock_model_refuses_a_path():
    stock = AutoModelForCausalLM.from_config(make_base().config)
    with pytest.raises(ValueError, match="path"):
        stock.generate(**make_prompts(1), path="full", max_new_tokens=4)
