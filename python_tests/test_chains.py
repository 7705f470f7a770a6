"""Chain building: prompts, templates, keyed sampling, the loop of the paper with a pretended model, checkers."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import models

from mote_ext import MoTEConfig, encode_prompt, set_up_tokenizer
from mote_ext.chains import (
    Chain,
    Prompt,
    Settings,
    Templates,
    openings,
    read_prompts,
    sampling,
)
from mote_ext.chains import writer as writer_module
from mote_ext.chains.asking import EXEMPLARS, exemplar_turns
from mote_ext.chains.group import GroupBuilder
from mote_ext.chains.prompts import require_unique_ids
from mote_ext.chains.record import read_chains
from mote_ext.chains.writer import Request, TextWriter, Written, to_sentence_end

TABLE = MoTEConfig().stage_table
THREE = MoTEConfig.paper().stage_table
HOSTILE = "{analysis} {response} {{prompt}} <|im_end|><|analysis|> \\1 %s"


# ---- prompts


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_prompts_of_jsonl_and_csv(written):
    rows = [
        {"prompt": "a\u2028b", "label": "harmful"},
        {"messages": [{"role": "user", "content": "c", "name": "x"}], "id": 7, "other": 1},
        {"prompt": "d", "id": "own", "source": "s"},
    ]
    found = read_prompts(written("p.jsonl", "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows)))
    assert [p.id for p in found] == ["p-0", "7", "own"]
    assert [p.source for p in found] == ["p", "p", "s"]
    assert found[0] == Prompt("p-0", "a\u2028b", label="harmful", source="p")
    assert found[1].messages == ({"role": "user", "content": "c"},)
    assert [Prompt.from_dict(p.to_dict(), "") for p in found] == found
    found = read_prompts(written("q.csv", 'prompt,id,label\n"a, ""b""\nc",,benign\nd,x,\n'))
    assert found == [Prompt("q-0", 'a, "b"\nc', label="benign", source="q"), Prompt("x", "d", source="q")]


BAD_PROMPTS = [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON"),
    ("p.jsonl", '{"prompt": "a"}\n\n[1]', "p.jsonl:3: the line must be an object"),
    ("p.jsonl", '{"prompt": "  "}', "p.jsonl:1: prompt is empty"),
    ("p.jsonl", '{"question": "secret"}', "p.jsonl:1: exactly one of prompt and messages is needed, got neither"),
    ("p.jsonl", '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "got both"),
    ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: prompt must be a text, got int"),
    ("p.jsonl", '{"prompt": "a", "label": "secret"}', "p.jsonl:1: label must be one of"),
    ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "must end before the answer"),
    ("p.jsonl", '{"messages": [{"role": "user"}]}', r"messages\[0\].content must be a text"),
    ("p.jsonl", '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "prompts 1 and 2 have the same id 'x'"),
    ("p.jsonl", '{"prompt": "a", "id": "x/rejected-1"}', "p.jsonl:1: id must not hold"),
    ("p.jsonl", '{"prompt": "a \\ud800"}', "p.jsonl:1: prompt holds half a surrogate pair"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', r"p.jsonl:2: byte 13 of the line \(0xe9\) is not UTF-8"),
    ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
    ("p.jsonl", "\n", "holds no prompts"),
    ("p.csv", "text,id\na,b\n", "p.csv:1: the first line must name the columns, among them prompt; it has 2 others"),
    ("p.csv", "a secret,harmful\nanother,benign\n", "p.csv:1: the first line must name the columns"),
    ("p.csv", 'prompt,label\n"a\nb",benign\nc,neither\n', "p.csv:4: label"),
    ("p.csv", "prompt\na, b\n", "p.csv:2: more fields than the header"),
    ("p.txt", "a", "read from a .jsonl or .csv file"),
]


@pytest.mark.parametrize("name, content, message", BAD_PROMPTS)
def test_bad_prompts_are_named_by_file_and_line_and_never_shown(written, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(written(name, content))
    assert "secret" not in str(caught.value)


def test_prompts_of_suites_and_data_sets(monkeypatch, written):
    suite = [SimpleNamespace(id=f"s-{i}", prompt=f"p{i}", label="benign", source="package") for i in range(50)]
    monkeypatch.setattr("mote_ext.suites.read_suite", lambda name: suite)
    assert [p.id for p in read_prompts("suite:s")] == [s.id for s in suite]
    drawn = [p.id for p in read_prompts("suite:s:10")]
    assert len(drawn) == 10 and drawn != [s.id for s in suite[:10]]
    assert set(drawn) < {p.id for p in read_prompts("suite:s:20")}, "a larger draw holds the smaller one"
    with pytest.raises(ValueError, match="suite:NAME:N"):
        read_prompts("suite:s:none")
    pytest.importorskip("datasets")
    folder = written("train.jsonl", '{"prompt": "a", "label": null}\n{"prompt": "b", "label": "benign"}\n').parent
    found = read_prompts(f"hf:{folder}:train")
    assert [(p.prompt, p.label) for p in found] == [("a", None), ("b", "benign")]
    assert found[1].id == f"{folder.name}-1"


# ---- templates


def test_a_template_fills_once_and_drops_sections_without_values(written):
    written("analysis.txt", "Q: {prompt}\n\nSay {not a slot} {}.")
    folder = written("response.txt", "Q: {prompt}\n \nA: {analysis}\nG: {guidance}\n\n\nBecause {analysis}.\n").parent
    templates = Templates.read(TABLE, folder)
    assert templates.render("analysis", HOSTILE, {}) == f"Q: {HOSTILE}\n\nSay {{not a slot}} {{}}."
    assert templates.render("response", "x", {}) == "Q: x"
    assert templates.render("response", "x", {"analysis": HOSTILE}) == f"Q: x\n\nBecause {HOSTILE}."
    both = templates.render("response", "x", {"analysis": "{guidance}", "guidance": "{prompt}"})
    assert both == "Q: x\n\nA: {guidance}\nG: {prompt}\n\nBecause {guidance}."
    assert "Rate the reply" in templates.render("check", "x", {"response": "y"}), "what the folder lacks is ours"
    assert templates.digest != Templates.read(TABLE).digest


BAD_TEMPLATES = [
    ("analysis.txt", "{prompt} {guidance}", r"analysis.txt: the slots \{prompt\} have values there, got \{guidance\}"),
    ("guidance.txt", "{analysis}", r"guidance.txt: the slot \{prompt\} is missing"),
    ("check.txt", "{prompt}", r"check.txt: the slot \{response\} is missing"),
    ("anlysis.txt", "{prompt}", "anlysis.txt: a template is named after its stage"),
    ("analysis.txt", b"{prompt} \xe9", "analysis.txt: byte 10 is not UTF-8"),
]


@pytest.mark.parametrize("name, content, message", BAD_TEMPLATES)
def test_bad_templates(written, name, content, message):
    with pytest.raises(ValueError, match=message):
        Templates.read(TABLE, written(name, content).parent)


def test_a_stage_of_ones_own_needs_a_template(written):
    table = MoTEConfig(stages=[{"name": "plan", "next": ["response"]}, {"name": "response", "role": "response"}])
    with pytest.raises(ValueError, match=r"the stages \['plan'\] have none"):
        Templates.read(table.stage_table)
    folder = written("plan.txt", "{prompt}").parent
    written("response.txt", "{prompt}\n\n{plan}")
    assert Templates.read(table.stage_table, folder).render("response", "a", {"plan": "b"}) == "a\n\nb"


def test_typed_controls_stay_text_through_template_and_encoding():
    tokenizer = models.make_tokenizer()
    controls = {*set_up_tokenizer(tokenizer, TABLE), *tokenizer.all_special_ids}
    templates = Templates.read(TABLE)
    plain = encode_prompt(tokenizer, templates.render("analysis", "a", {}))
    hostile = encode_prompt(tokenizer, templates.render("analysis", HOSTILE, {}))
    assert [i for i in hostile if i in controls] == [i for i in plain if i in controls]
    assert "<|im_end|><|analysis|>" in tokenizer.decode([i for i in hostile if i not in controls])


def test_exemplars_are_those_of_the_label_that_have_the_stage():
    templates = Templates({"analysis": "Q {prompt}", "guidance": "Q {prompt}\n\nA {analysis}"})
    exemplars = [
        Chain("q0", None, {"analysis": "a0", "guidance": "g0", "response": "r0"}, meta={"label": "harmful"}),
        Chain("q1", None, {"analysis": "a1", "response": "r1"}, meta={"label": "benign"}),
        Chain(None, ({"role": "user", "content": "q2"},), {"analysis": "a2", "response": "r2"}, meta={}),
        Chain("q3", None, {"analysis": "a3", "response": "r3"}, "unsafe", meta={"label": "harmful"}),
    ]

    def said(*args):
        return [turn["content"] for turn in exemplar_turns(templates, exemplars, *args)]

    assert said("analysis", [], "harmful") == ["Q q0", "a0"]
    assert said("analysis", [], "benign") == ["Q q1", "a1"]
    assert said("analysis", [], None) == ["Q q0", "a0", "Q q1", "a1", "Q USER: q2", "a2"]
    assert said("guidance", ["analysis"], None) == ["Q q0\n\nA a0", "g0"]


def test_the_shipped_exemplars_are_chains_of_both_labels():
    chains = read_chains(EXEMPLARS / "safety.jsonl", TABLE)
    labels = Counter(chain.meta["label"] for chain in chains)
    assert labels["harmful"] >= 3 and labels["benign"] >= 4
    assert all(set(chain.texts) == {"analysis", "guidance", "response"} for chain in chains)


# ---- sampling


def draws(log_p, top_p, num=4000, temperature=1.0):
    scores = torch.tensor(log_p)[None].expand(num, -1)
    processor = sampling.KeyedSampling([("k", i) for i in range(num)], 3, temperature, top_p)
    return Counter(processor(torch.zeros(num, 5, dtype=torch.int64), scores).argmax(1).tolist())


def test_draws_follow_the_probabilities_and_the_nucleus():
    p = [0.5, 0.3, 0.15, 0.05]
    log_p = torch.tensor(p).log().tolist()
    found = draws(log_p, 1.0)
    assert [found[i] / 4000 for i in range(4)] == pytest.approx(p, abs=0.03)
    found = draws(log_p, 0.7)  # 0.5 alone does not reach it, 0.8 does
    assert set(found) == {0, 1} and found[0] / 4000 == pytest.approx(0.625, abs=0.03)
    assert set(draws(log_p, 0.01)) == {0}
    colder = draws(log_p, 1.0, temperature=0.5)
    assert colder[0] / 4000 == pytest.approx(0.25 / 0.365, abs=0.03)


@pytest.mark.parametrize("num_candidates", [2, 8, 10**6])
def test_the_nucleus_does_not_depend_on_how_many_candidates_are_looked_at(monkeypatch, num_candidates):
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", num_candidates)
    log_p = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    values, tokens = sampling.nucleus(log_p, 0.8)
    for row in range(7):
        inside = set(tokens[row][values[row] > -torch.inf].tolist())
        ordered, order = log_p[row].exp().sort(descending=True)
        expected = order[: int((ordered.cumsum(0) < 0.8).sum()) + 1].tolist()
        assert inside == set(expected)


def test_each_position_draws_apart():
    processor = sampling.KeyedSampling([("a",), ("b",)], 3, 1.0, 1.0)
    drawn = [processor(torch.zeros(2, 3 + n, dtype=torch.int64), torch.zeros(2, 50)).argmax(1) for n in range(8)]
    assert len({int(row[0]) for row in drawn}) > 4 and len({int(row[1]) for row in drawn}) > 4
    assert [int(row[0]) for row in drawn] != [int(row[1]) for row in drawn]


def test_noise_depends_on_key_and_token_and_on_nothing_else():
    tokens = torch.tensor([[5, 7, 9], [9, 5, 1]])
    noise = sampling.gumbel([11, 11], tokens)
    assert noise[0, 0] == noise[1, 1] and noise[0, 2] == noise[1, 0]
    assert noise.unique().numel() == 4
    assert not torch.equal(noise, sampling.gumbel([12, 2**64 - 1], tokens))
    many = sampling.gumbel(range(2000), torch.arange(50).expand(2000, 50))
    assert float(many.mean()) == pytest.approx(0.5772, abs=0.02) and float(many.var()) == pytest.approx(1.645, abs=0.05)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = models.make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = models.make_base(vocab_size=len(tokenizer), max_position_embeddings=1024, **ids)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def conversations(shared=True):
    one = ({"role": "user", "content": "hello there, how are you today?"}, {"role": "assistant", "content": "fine"})
    two = (*one, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "so so"})
    asked = [(one, "What is it?"), (two, "And?"), (one, "A longer question, my friend."), (two, HOSTILE)]
    return [
        Request((*turns, {"role": "user", "content": text}), len(turns) if shared else 0, ("seed", i))
        for i, (turns, text) in enumerate(asked)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "mote"])
def test_a_text_does_not_depend_on_its_batch_or_on_shared_openings(tiny, kind, temperature):
    model, tokenizer = tiny.model, tiny.tokenizer
    if kind == "mote":
        tokenizer = models.make_tokenizer()
        base = models.make_base(vocab_size=len(tokenizer), max_position_embeddings=1024)
        model = models.make_model(base=base, tokenizer=tokenizer, marker_ids=None, verdict_ids=None)
    writer = TextWriter(model, tokenizer, temperature, 0.9)
    alone = [writer.write([request], 10)[0] for request in conversations(shared=False)]
    assert not writer._openings.get("()")
    assert writer.write(conversations(), 10) == alone
    assert writer.write(conversations()[::-1], 10) == alone[::-1]
    assert sorted(len(opening.ids) for opening in writer._openings.values() if opening) == [62, 96]
    logits = zip(writer.first_logits(conversations()), writer.first_logits(conversations(shared=False)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in logits)
    if temperature:
        other = TextWriter(model, tokenizer, temperature, 0.9)
        changed = [Request(r.turns, r.num_shared, ("other", i)) for i, r in enumerate(conversations())]
        assert all(a != b for a, b in zip(other.write(changed, 10), alone))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "bloom", "opt"])
def test_other_architectures_write_the_same_in_a_batch(name):
    tokenizer = models.make_tokenizer()
    sizes = {"gpt2": {"n_positions": 512}, "bloom": {}}.get(name, {"max_position_embeddings": 512})
    model = models.make_base(name, vocab_size=len(tokenizer), **sizes)
    writer = TextWriter(model, tokenizer, 1.0, 0.9)
    alone = [writer.write([request], 6)[0] for request in conversations(shared=False)]
    assert writer.write(conversations(), 6) == alone


def test_a_layer_with_room_holds_what_transformers_layer_holds():
    from transformers.cache_utils import DynamicLayer

    make = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, length, 4, generator=make) for length in (5, 2, 1, 1)]
    theirs, ours = DynamicLayer(), openings.RoomyLayer(parts[0], -parts[0], room=4)
    theirs.update(parts[0], -parts[0])
    for part in parts[1:]:
        for expected, got in zip(theirs.update(part, -part), ours.update(part, -part)):
            assert torch.equal(expected, got)
        assert theirs.get_seq_length() == ours.get_seq_length()


def test_eos_of_the_generation_config_ends_a_text_and_long_requests_are_refused(tiny):
    writer = TextWriter(tiny.model, tiny.tokenizer)
    free = writer.write(conversations()[:1], 8)[0]
    assert free.cut and free.num_tokens == 8
    drawn = tiny.model.generate(
        torch.tensor([encode_prompt(tiny.tokenizer, list(conversations()[0].turns))]), do_sample=False, max_new_tokens=8
    )[0, -8:].tolist()
    tiny.model.generation_config.eos_token_id = [tiny.tokenizer.eos_token_id, drawn[3]]
    try:
        stopped = TextWriter(tiny.model, tiny.tokenizer).write(conversations()[:1], 8)[0]
    finally:
        tiny.model.generation_config.eos_token_id = tiny.tokenizer.eos_token_id
    assert not stopped.cut and stopped.num_tokens == drawn.index(drawn[3])
    long = Request(({"role": "user", "content": "x" * 1010},))
    assert [w is None for w in writer.write([long, *conversations()[:1]], 20)] == [True, False]
    assert [logits is None for logits in writer.first_logits([Request(({"role": "user", "content": "x" * 1030},))])]


CUTS = [
    ("One. Two. Thr", "One. Two."),
    ("One! (Two.) thr", "One! (Two.)"),
    ("No end here", "No end here"),
    ("It costs 3.50 euro", "It costs 3.50 euro"),
    ("First.\n1. Do this\n2. Do th", "First.\n1. Do this"),
    ("全部。还有", "全部。"),
    ("", ""),
]


@pytest.mark.parametrize("text, expected", CUTS)
def test_a_text_that_the_limit_ends_is_cut_behind_a_sentence(text, expected):
    assert to_sentence_end(text) == expected


def test_only_a_text_that_the_limit_ends_is_cut(tiny):
    writer = TextWriter(tiny.model, tiny.tokenizer)
    ids = tiny.tokenizer("One. Two")["input_ids"]
    assert writer._text(ids, len(ids)) == Written("One.", len(ids), True)
    assert writer._text([*ids, writer.eos_ids[0]], len(ids) + 1) == Written("One. Two", len(ids), False)


def test_a_tokenizer_without_a_chat_template_gets_one_text(tiny):
    tokenizer = models.make_tokenizer(chat_template=None)
    found = TextWriter(tiny.model, tokenizer).write(conversations(), 4)
    assert all(isinstance(written, Written) for written in found)


# ---- the loop


class PretendedWriter:
    """Writes "STAGE-N" for the n-th request of a stage of a prompt; `empty` holds the texts that come out empty."""

    def __init__(self, empty=()):
        self.calls, self.requests, self.empty = [], [], set(empty)

    def write(self, requests, max_tokens):
        if requests:
            self.calls.append([f"{request.key[1]}:{request.key[2]}" for request in requests])
            self.requests += requests
        texts = [f"{request.key[2]}-{request.key[3] + 1}" for request in requests]
        return [Written("" if text in self.empty else text, 3, False) for text in texts]


class PretendedChecker:
    """Safe are the answers whose "ID:RESPONSE" is listed."""

    name = "pretended"

    def __init__(self, safe=()):
        self.safe, self.seen = set(safe), []

    def scores(self, prompts, answers):
        asked = [f"{prompt.id}:{answer}" for prompt, answer in zip(prompts, answers)]
        self.seen += asked
        return [1.0 if one in self.safe else 0.2 for one in asked]


def build(prompts, safe=(), empty=(), table=TABLE, exemplars=(), **settings):
    writer, checker = PretendedWriter(empty), PretendedChecker(safe)
    builder = GroupBuilder(writer, checker, table, Templates.read(table), Settings(**settings), exemplars)
    return builder.build(prompts), writer, checker


def test_the_loop_stops_at_the_first_safe_answer_and_asks_nothing_more():
    prompts = [Prompt(name, f"question {name}", label="harmful") for name in "abcd"]
    safe = ["a:response-1", "b:response-2", "c:response-3"]
    result, writer, checker = build(prompts, safe)
    assert writer.calls == [
        ["a:response", "b:response", "c:response", "d:response"],
        ["b:analysis", "c:analysis", "d:analysis"],
        ["b:response", "c:response", "d:response"],
        ["c:guidance", "d:guidance"],
        ["c:response", "d:response"],
        ["d:guidance"],
        ["d:response"],
    ]
    assert len(checker.seen) == 4 + 3 + 2 + 1
    kept = {row["id"]: row for row in result.chains if row["check"] == "safe"}
    assert [[stage for stage in ("analysis", "guidance", "response") if stage in kept[name]] for name in "abc"] == [
        ["response"],
        ["analysis", "response"],
        ["analysis", "guidance", "response"],
    ]
    assert kept["c"]["response"] == "response-3" and kept["c"]["prompt"] == "question c"
    assert result.dropped == [
        {"id": "d", "dropped": True, "reason": "no answer was judged safe", "rejected": 4, "label": "harmful"}
    ]
    bare, analysed = writer.requests[0], writer.requests[7]
    assert bare.turns == ({"role": "user", "content": "question a"},)
    assert "analysis-1" in analysed.turns[0]["content"] and "guidance" not in analysed.turns[0]["content"]


def test_rejected_answers_are_chains_that_train_the_check_alone():
    result, _, _ = build([Prompt("a", "q", label="harmful", source="s"), Prompt("b", "q")], ["a:response-3"])
    rejected = [row for row in result.chains if row["id"].startswith("a/")]
    assert rejected == [
        {
            "id": "a/rejected-1",
            "prompt": "q",
            "response": "response-1",
            "check": "unsafe",
            "loss_stages": ["check"],
            "label": "harmful",
            "source": "s",
        },
        {
            "id": "a/rejected-2",
            "prompt": "q",
            "analysis": "analysis-1",
            "response": "response-2",
            "check": "unsafe",
            "loss_stages": ["check"],
            "label": "harmful",
            "source": "s",
        },
    ]
    chains = [Chain.from_dict(row, TABLE) for row in result.chains]
    for chain in chains:
        lossy = [TABLE.names[stage] for stage in chain.stages_with_loss(TABLE)]
        assert lossy == ["check"] if chain.check == "unsafe" else lossy[-2:] == ["response", "check"]
    ids = [row["id"] for row in result.chains]
    assert ids == ["a/rejected-1", "a/rejected-2", "a", *(f"b/rejected-{n}" for n in range(1, 5))]
    assert ids[:2] != [row["id"] for row in build([Prompt("a", "q")], keep_rejected=False)[0].chains]


def test_a_table_without_a_check_gives_chains_without_verdicts():
    result, _, _ = build([Prompt("a", "q"), Prompt("b", "q")], ["a:response-2"], table=THREE)
    assert [sorted(row) for row in result.chains] == [["analysis", "id", "prompt", "response"]]
    assert [row["id"] for row in result.dropped] == ["b"]
    Chain.from_dict(result.chains[0], THREE)


def test_attempts_redraw_the_last_step_and_a_certain_model_is_asked_once():
    _, writer, _ = build([Prompt("a", "q")], attempts=4)
    assert writer.calls[5:] == [["a:guidance"], ["a:response"]] * 3
    assert len({request.key for request in writer.requests}) == len(writer.requests), "every draw has a key of its own"
    _, writer, _ = build([Prompt("a", "q")], attempts=4, temperature=0)
    assert len(writer.calls) == 5


def test_empty_texts_are_failed_attempts():
    result, writer, checker = build([Prompt("a", "q")], ["a:response-2"], empty=["response-1", "analysis-1"])
    assert writer.calls == [["a:response"], ["a:analysis"], ["a:analysis"], ["a:response"]]
    assert checker.seen == ["a:response-2"], "an empty answer is not checked, and no chain"
    assert [row["id"] for row in result.chains] == ["a"]
    result, _, _ = build([Prompt("a", "q")], empty=["analysis-1", "analysis-2"])
    assert result.dropped[0]["reason"] == "analysis came out empty"
    assert [row["id"] for row in result.chains] == ["a/rejected-1"]


def test_start_puts_reasoning_before_the_first_answer():
    prompts = [Prompt("h", "q", label="harmful"), Prompt("b", "q", label="benign"), Prompt("u", "q")]
    safe = [f"{name}:response-1" for name in "hbu"]
    result, writer, _ = build(prompts, safe, start={"benign": 2, "unlabelled": 1})
    assert writer.calls == [
        ["h:response"],
        ["b:analysis", "u:analysis"],
        ["u:response"],
        ["b:guidance"],
        ["b:response"],
    ]
    assert [len(row) - len({"label"} & set(row)) for row in result.chains] == [4, 6, 5]


def test_exemplars_stand_before_templates_and_never_before_the_bare_question():
    exemplars = read_chains(EXEMPLARS / "safety.jsonl", TABLE)
    _, writer, _ = build([Prompt("a", "q", label="harmful")], exemplars=exemplars)
    shown = {request.key[2]: request for request in writer.requests if len(request.turns) > 1}
    assert writer.requests[0].turns == ({"role": "user", "content": "q"},)
    assert set(shown) == {"analysis", "guidance", "response"}
    assert all(request.num_shared == 6 == len(request.turns) - 1 for request in shown.values())


def test_a_conversation_is_asked_as_it_is_and_as_one_text():
    messages = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    )
    result, writer, _ = build([Prompt("a", None, messages)], ["a:response-2"])
    assert writer.requests[0].turns == messages
    assert "USER: one\nASSISTANT: two\nUSER: three" in writer.requests[1].turns[0]["content"]
    assert result.chains[1]["messages"] == [dict(message) for message in messages]


BAD_SETTINGS = [
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"temperature": -1}, "temperature must be 0 or more"),
    ({"temperature": float("nan")}, "temperature must be 0 or more"),
    ({"top_p": 0}, "top_p must be"),
    ({"attempts": 0}, "attempts must be"),
    ({"max_tokens": {"analysis": 0}}, "max_tokens must be"),
    ({"max_tokens": {"check": 4}}, "max_tokens: the stage must be one of"),
    ({"start": {"odd": 1}}, "start must be by label"),
    ({"start": {"benign": 3}}, "start: there are 2 stages before the answer"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_settings_without_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings).require_stages(TABLE)


def test_ids_must_differ_across_sources():
    with pytest.raises(ValueError, match="PROMPTS: prompts 1 and 3 have the same id 'a'"):
        require_unique_ids([Prompt("a", "x"), Prompt("b", "x"), Prompt("a", "y")], "PROMPTS")


def test_openings_are_shared_from_a_length_on(tiny, monkeypatch):
    monkeypatch.setattr(writer_module, "MIN_SHARED_TOKENS", 80)
    writer = TextWriter(tiny.model, tiny.tokenizer)
    writer.write(conversations(), 2)
    assert sorted(opening is None for opening in writer._openings.values()) == [False, True]
