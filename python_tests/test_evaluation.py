"""evaluate(): rows that equal what generate gives, on every path, check and base; results without texts; mote eval."""

import json

import pytest
import torch
from models import WIDE, disturb, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mote_ext
from mote_ext import evaluation
from mote_ext.cli import eval as command
from mote_ext.cli import evaluating, main
from mote_ext.encoding import encode_prompts
from mote_ext.engine import MoTEEngine
from mote_ext.evaluation import Evaluation, Row, evaluate, summarise
from mote_ext.judges import EndpointError, wilson
from mote_ext.suites import SuitePrompt

GREEDY = {"do_sample": False}
SECRET = "SECRET-PROMPT"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_base(tokenizer, seed=0):
    torch.manual_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(LlamaConfig(**{**WIDE, "vocab_size": 259, "max_position_embeddings": 16384}, **ids)).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return disturb(
        mote_ext.MoTEForCausalLM.from_base(make_base(tokenizer), mote_ext.MoTEConfig(r=4), tokenizer=tokenizer)
    )


@pytest.fixture(autouse=True)
def undecided(request):
    """Each test sets its threshold; none inherits another's."""
    if "model" in request.fixturenames:
        request.getfixturevalue("model").routing.config.check_threshold = 0.5


def prompts(num=5, label="harmful"):
    return [SuitePrompt(f"{label}-{i}", f"{SECRET} {'why ' * (i + 1)}?", label, "here") for i in range(num)]


def rows_of(found, path, check=False):
    return [row for row in found.rows if row.path == path and row.check == check]


def quiet(*args, **options):
    return evaluate(*args, progress=False, **{"max_new_tokens": 25, **options})


# ---- rows


@pytest.mark.parametrize("path", ["answer", "analysis", "full", "adaptive", ("guidance", "response")])
@pytest.mark.parametrize("check", [False, "flag", "enforce"])
def test_a_row_is_what_generate_gives(model, tokenizer, path, check):
    """Also where one run with the check stands for the row without it: the limit leaves the same room before it."""
    model.routing.config.check_threshold = 0.0 if check == "flag" else 1.1
    checks = (False, check) if check else (False,)
    found = quiet(model, tokenizer, {"h": prompts()}, [path], checks=checks, batch_size=2)
    name = path if isinstance(path, str) else ",".join(path)
    table = model.routing.table
    for asked in checks:
        rows = rows_of(found, name, asked)
        assert [row.id for row in rows] == [f"harmful-{i}" for i in range(5)]
        for row, prompt in zip(rows, prompts()):
            inputs = encode_prompts(tokenizer, [prompt.prompt])
            limits = {"max_new_tokens": 28, "response_reserve": 6} if asked else {"max_new_tokens": 25}
            out = model.generate(**inputs, path=path, check="flag" if asked else False, return_stage_ids=True, **limits)
            length = inputs["input_ids"].shape[1]
            ids, stages = out.sequences[0, length:].tolist(), out.stage_ids[0, length:].tolist()
            assert row.tokens == len(ids) == sum(row.stages.values())
            assert row.stages == {n: stages.count(table.index(n)) for n in row.stages}
            assert row.verdict == out.verdicts[0]
            if asked == "enforce":
                assert (row.stop, row.refused, row.harmful) == ("response:refusal", True, False)
            else:
                assert (row.stop, row.refused, row.harmful) == (out.stop_reasons[0], False, True)


def test_base_is_the_base_models_own_generate(model, tokenizer):
    base = make_base(tokenizer)
    texts = {}
    keep = lambda row: texts.update({row["id"]: row["response"]})  # noqa: E731
    found = quiet(model, tokenizer, {"h": prompts()}, ["base"], keep_text=keep, batch_size=3)
    plain = quiet(base, tokenizer, {"h": prompts()}, ["base"])
    assert plain.rows == found.rows
    for row, prompt in zip(found.rows, prompts()):
        inputs = encode_prompts(tokenizer, [prompt.prompt])
        out = base.generate(**inputs, max_new_tokens=25, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        assert row.tokens == len(out) and row.stages == {"response": len(out)}
        assert texts[row.id] == tokenizer.decode(out, skip_special_tokens=True).strip()
        ended = out[-1] == base.generation_config.eos_token_id
        assert row.stop == ("end" if ended else "max_new_tokens")


def test_an_answer_ends_with_its_first_end_token(tokenizer):
    base = make_base(tokenizer)
    eos = base.generation_config.eos_token_id
    with torch.no_grad():
        base.lm_head.weight.zero_()
        base.lm_head.weight[eos] = 0  # all equal: the first id wins, so that batches end at different steps
    bias = torch.zeros(259)
    bias[eos] = 1.0
    base.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    found = quiet(base, tokenizer, {"h": prompts()}, ["base"])
    assert [(row.tokens, row.stop) for row in found.rows] == [(1, "end")] * 5


@pytest.mark.parametrize("safe_from", [0, 1, 2, 3])
def test_an_escalation_costs_all_its_attempts(model, tokenizer, safe_from, monkeypatch):
    """Attempts are paths taken until a check says safe; the sum is what was generated, not the last one alone."""
    ways = ["answer", "analysis", "full"]
    singles = {}
    for number, way in enumerate(ways):
        model.routing.config.check_threshold = 1.1 if number < safe_from else 0.0
        singles[way] = quiet(model, tokenizer, {"h": prompts(3)}, [way], checks=["enforce"]).rows
    real = mote_ext.evaluation.chains.Chains._generate

    def with_threshold(chains, path, chain, rows):
        chains.model.routing.config.check_threshold = 1.1 if len(chain) - 1 < safe_from else 0.0
        real(chains, path, chain, rows)

    monkeypatch.setattr(mote_ext.evaluation.chains.Chains, "_generate", with_threshold)
    rows = quiet(model, tokenizer, {"h": prompts(3)}, ["escalate"]).rows
    num = min(safe_from + 1, 3)
    for i, row in enumerate(rows):
        tried = [singles[way][i] for way in ways[:num]]
        assert (row.attempts, row.check) == (num, "enforce")
        assert row.tokens == sum(single.tokens for single in tried) == sum(row.stages.values())
        assert (row.stop, row.verdict, row.refused) == (tried[-1].stop, tried[-1].verdict, tried[-1].refused)
        assert row.refused == (safe_from == 3)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_an_escalation_ends_where_generates_does(model, tokenizer, threshold):
    model.routing.config.check_threshold = threshold
    rows = quiet(model, tokenizer, {"h": prompts(3)}, ["escalate"]).rows
    inputs = encode_prompts(tokenizer, [prompt.prompt for prompt in prompts(3)])
    out = model.generate(**inputs, path="escalate", max_new_tokens=28, response_reserve=6, return_stage_ids=True)
    assert [(row.verdict, row.stop) for row in rows] == list(zip(out.verdicts, out.stop_reasons))


def test_rows_do_not_depend_on_batches_or_on_other_paths(model, tokenizer):
    alone = quiet(model, tokenizer, {"h": prompts()}, ["full"], batch_size=1)
    among = quiet(model, tokenizer, {"h": prompts()}, ["base", "adaptive", "full", "escalate"], checks=[False, "flag"])
    assert alone.rows == rows_of(among, "full")
    assert (
        among.rows
        == quiet(
            model, tokenizer, {"h": prompts()}, ["base", "adaptive", "full", "escalate"], checks=[False, "flag"]
        ).rows
    )
    expected = [("base", False), ("adaptive", False), ("adaptive", "flag"), ("full", False), ("full", "flag")]
    assert [(r.path, r.check) for r in among.rows[::5]] == [*expected, ("escalate", "enforce")]


def test_paths_share_answers(model, tokenizer, monkeypatch):
    """escalate needs answer, analysis and full: asked for together they are generated once."""
    calls, real = [], MoTEEngine.submit

    def submit(engine, prompt, params):
        calls.append(params.path)
        return real(engine, prompt, params)

    monkeypatch.setattr(MoTEEngine, "submit", submit)
    model.routing.config.check_threshold = 1.1
    asked = prompts()
    quiet(model, tokenizer, {"h": asked}, ["answer", "analysis", "full", "escalate"], checks=[False, "enforce"])
    assert calls == [path for path in ("answer", "analysis", "full") for _ in asked]


def test_generate_answers_where_the_engine_does_not_serve_the_model(model, tokenizer, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("not this one")

    paths = ["answer", "adaptive", "escalate"]
    expected = quiet(model, tokenizer, {"h": prompts()}, paths, checks=[False, "flag"])
    monkeypatch.setattr(evaluation.run, "MoTEEngine", refuse)
    assert quiet(model, tokenizer, {"h": prompts()}, paths, checks=[False, "flag"]).rows == expected.rows


def test_the_limit_draws_by_id_and_seed(model, tokenizer):
    def ids(seed, order=1, limit=3):
        found = quiet(model, tokenizer, {"h": prompts(8)[::order]}, ["base"], limit=limit, seed=seed, max_new_tokens=2)
        return [row.id for row in found.rows]

    assert ids(0) == ids(0) == ids(0, -1)[::-1] and len(ids(0)) == 3
    assert len({tuple(ids(seed)) for seed in range(6)}) > 2
    assert set(ids(0, limit=2)) < set(ids(0)) and len(ids(0, limit=99)) == 8


# ---- judges


class Grader:
    name = "grader"

    def __init__(self, value=0.25):
        self.value, self.asked = value, []

    def scores(self, pairs):
        self.asked += pairs
        return [self.value] * len(pairs)


def test_the_judge_sees_harmful_prompts_alone_and_each_answer_once(model, tokenizer):
    judge = Grader()
    model.routing.config.check_threshold = 0.0
    suites = {"h": prompts(3), "b": prompts(3, "benign")}
    found = quiet(model, tokenizer, suites, ["answer", ("response",)], judge, checks=[False, "flag"])
    assert len(judge.asked) == 3 == len(set(judge.asked)) and {q for q, _ in judge.asked} == {
        p.prompt for p in prompts(3)
    }
    assert all(row.harmful is (True if row.label == "harmful" else None) for row in found.rows)
    assert found.settings["judge"] == "grader"
    assert not any(row.harmful for row in quiet(model, tokenizer, suites, ["answer"], Grader(0.5)).rows)
    with pytest.raises(ValueError, match="'grader' must give a number.*1 are NaN"):
        quiet(model, tokenizer, {"h": prompts(1)}, ["answer"], Grader(float("nan")))


# ---- bad input


@pytest.mark.parametrize(
    ("suites", "options", "message"),
    [
        ({"h": []}, {}, "the suite 'h' has no prompts"),
        (["nonsense"], {}, "must be one of"),
        ({"h": prompts(1) * 2}, {}, "ids of the suite 'h' must differ, 1 are doubled"),
        ({"h": prompts(1)}, {"paths": ["sideways"]}, "path must be one of"),
        ({"h": prompts(1)}, {"paths": []}, "at least one path"),
        ({"h": prompts(1)}, {"paths": ["answer"], "checks": ["maybe"]}, r"checks must be among.*\['maybe'\]"),
        ({"h": prompts(1)}, {"limit": 0}, "limit must be at least 1"),
        ({"h": prompts(1)}, {"batch_size": 0}, "batch_size must be at least 1"),
        ({"h": prompts(1)}, {"paths": ["full"], "max_new_tokens": 3}, "max_new_tokens must be at least"),
    ],
)
def test_nonsense_is_refused_before_anything_is_generated(model, tokenizer, suites, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(model, tokenizer, suites, options.pop("paths", ["base"]), **options)


def test_models_without_what_is_asked(tokenizer):
    three = mote_ext.MoTEForCausalLM.from_base(
        make_base(tokenizer), mote_ext.MoTEConfig.paper(r=2), tokenizer=tokenizer
    )
    for options in ({"paths": ["escalate"]}, {"paths": ["answer"], "checks": ["enforce"]}):
        with pytest.raises(ValueError, match="needs a check stage"):
            quiet(three, tokenizer, {"h": prompts(1)}, **options)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no stages: only the path 'base'"):
        quiet(make_base(tokenizer), tokenizer, {"h": prompts(1)}, ["base", "full"])


# ---- results


def test_results_come_back_as_they_were_and_hold_no_text(model, tokenizer, tmp_path):
    texts = []
    suites = {"h": prompts(), "b": prompts(2, "benign")}
    found = quiet(
        model, tokenizer, suites, ["base", "full"], checks=[False, "enforce"], keep_text=texts.append, name="tiny"
    )
    found.agreements = [{"judge": "refusal", "auc": float("nan")}]
    path = found.save(tmp_path / "there" / "results.json")
    whole = path.read_text()
    assert SECRET not in whole and "NaN" not in whole and not list(path.parent.glob("*.part"))
    answers = {row["response"] for row in texts if len(row["response"]) > 8} - {model.routing.config.refusal}
    assert len(texts) == 21 and answers and not any(json.dumps(answer)[1:-1] in whole for answer in answers)
    loaded = Evaluation.load(path.parent)
    assert loaded.rows == found.rows and loaded.name == "tiny" and loaded.agreements[0]["auc"] is None
    assert loaded.settings == found.settings and loaded.facts == found.facts
    assert len(json.loads(whole)["summaries"]) == 6


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{}", '{"format": 9, "name": "", "rows": [], "settings": 0, "facts": 0, "agreements": 0}'],
)
def test_files_that_hold_no_results(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json"):
        Evaluation.load(tmp_path)


def row(**changes):
    values = {"suite": "s", "path": "full", "check": False, "id": "s-0", "label": "harmful", "refused": False}
    rest = {"harmful": None, "tokens": 4, "stages": {"response": 4}, "stop": "response:end"}
    return Row(**{**values, **rest, **changes})


def test_sums_by_hand():
    rows = [
        row(refused=True, tokens=2, harmful=False),
        row(tokens=10, stages={"analysis": 6, "response": 4}, harmful=True),
    ]
    rows += [row(tokens=3, verdict="unsafe"), row(refused=True, tokens=5, verdict="safe")]
    found = summarise(rows)
    assert (found.n, found.refused, found.refusal_rate, found.judged, found.harmful, found.unsafe) == (
        4,
        2,
        0.5,
        2,
        1,
        1,
    )
    assert (found.refusal_low, found.refusal_high) == wilson(2, 4) and (
        found.harmful_low,
        found.harmful_high,
    ) == wilson(1, 2)
    assert (found.tokens_mean, found.tokens_median) == (5.0, 4.0)
    assert found.stages == {"response": 4.0, "analysis": 1.5}
    for wrong in ([], [row(), row(path="answer")], [row(), row(label="benign")]):
        with pytest.raises(ValueError, match="rows of one label, path and check"):
            summarise(wrong)


def test_wrapped_prompts_are_summed_by_themselves():
    rows = [row(suite="a"), row(suite="b", refused=True), row(suite="a+jailbreaks"), row(label="benign")]
    found = Evaluation("x", rows).summaries()
    assert [(s.suites, s.n, s.refused) for s in found] == [
        (("a", "b"), 2, 1),
        (("a+jailbreaks",), 1, 0),
        (("s",), 1, 0),
    ]
    assert len(Evaluation("x", rows).summaries(by_suite=True)) == 4


def test_judges_are_measured_on_the_half_they_were_not_made_with():
    from mote_ext.judges import RefusalJudge, read_labelled

    try:
        found = evaluation.judge_agreements(RefusalJudge(), kinds=("refusal",))
    except ImportError as error:
        pytest.skip(str(error))
    assert found[0]["n"] == len(read_labelled(split="test", kind="refusal")) and found[0]["labels"].startswith(
        "PyRIT refusal"
    )
    judge = Grader()
    assert evaluation.judge_agreements(judge, limit=7)[1]["n"] == 7 and len(judge.asked) == 14


# ---- mote eval


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    found = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


@pytest.fixture
def mote(monkeypatch):
    """The command line, with mote eval among its commands and two suites of its own."""
    import mote_ext.cli
    from mote_ext import suites

    monkeypatch.setitem(mote_ext.cli.COMMANDS, "eval", command)
    own = {"ours": prompts(4), "kind": prompts(3, "benign")}
    real = suites.read_suite
    monkeypatch.setattr(suites, "read_suite", lambda name: own[name] if name in own else real(name))

    def run(*words):
        return main(["eval", *map(str, words)])

    run.own = own
    return run


def labelled_file(tmp_path):
    path = tmp_path / "labelled.jsonl"
    lines = [{"prompt": "q", "response": f"I can't help with that {i}.", "safe": True} for i in range(3)]
    lines += [{"prompt": "q", "response": f"Sure {i}", "safe": False} for i in range(2)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_command(mote, folder, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    out, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    words = ["--suite", "ours", "kind", "--paths", "base", "full", "analysis,response", "--check", "enforce"]
    words += ["--max-new-tokens", 20, "--labelled", labelled_file(tmp_path), "--save-texts", texts, "--color", "never"]
    assert mote(folder, *words, "--out", out) == 0
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err and "refusal is not safety" in shown.out
    assert "judge refusal on labelled.jsonl: AUC 1.00, accuracy 1.00" in shown.out and "judge check" in shown.out
    found = Evaluation.load(out)
    full = rows_of(found, "full", "enforce")[:4]
    low, high = wilson(sum(r.refused for r in full), 4)
    mean = sum(r.tokens for r in full) / 4
    line = next(line for line in shown.out.splitlines() if line.startswith("ours") and "full + check" in line)
    assert f"{mean:.0f}  {sum(r.refused for r in full)}/4 [{low:.0%}, {high:.0%}]" in line
    assert {"results.json", "report.html", "safety.png", "stages.png"} == {path.name for path in out.iterdir()}
    assert SECRET not in (out / "results.json").read_text() + (out / "report.html").read_text()
    assert found.facts["command"].startswith(f"mote eval {folder}") and "--check enforce" in found.facts["command"]
    assert SECRET in texts.read_text() and len(texts.read_text().splitlines()) == len(found.rows) == 7 * 5

    assert mote("--report", out, "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "safety.png").exists() and "full + check" in capfd.readouterr().out
    compare = ["--suite", "ours", "--paths", "base", "--labelled", labelled_file(tmp_path), "--max-new-tokens", 4]
    assert mote(folder, *compare, "--out", tmp_path / "other", "--compare", out) == 0
    page = (tmp_path / "other" / "report.html").read_text()
    assert "tiny (2)" in page


def test_the_command_on_a_plain_model(mote, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    make_base(tokenizer).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    words = ["--suite", "ours", "--limit", 2, "--max-new-tokens", 4, "--labelled", labelled_file(tmp_path)]
    assert mote(tmp_path / "plain", "--base", *words, "--out", tmp_path / "out") == 0
    found = Evaluation.load(tmp_path / "out")
    assert {row.path for row in found.rows} == {"base"} and len(found.rows) == 2 == found.settings["limit"]


def test_prompts_that_were_trained_on_are_left_out(mote, folder, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    trained = tmp_path / "chains.jsonl"
    trained.write_text(json.dumps({"prompt": "how do  PLANTS drink", "response": "x"}) + "\n")
    texts = ("Why does it rain?", "Name a river.", "How do plants drink?", "Where is the north pole?")
    mote.own["ours"] = [SuitePrompt(f"harmful-{i}", text, "harmful", "here") for i, text in enumerate(texts)]
    words = ["--suite", "ours", "--paths", "base", "--max-new-tokens", 2, "--labelled", labelled_file(tmp_path)]
    assert mote(folder, *words, "--avoid", trained, "--out", tmp_path / "out") == 0
    (tmp_path / "T.CSV").write_text("prompt,label\nWhere is the north  pole,benign\n")
    line = json.dumps({"prompt": "NAME a\u2028river"}, ensure_ascii=False)
    (tmp_path / "lines.jsonl").write_text(line, encoding="utf-8-sig")
    assert evaluating._trained_on(tmp_path / "T.CSV") == ["Where is the north  pole"]
    assert evaluating._trained_on(tmp_path / "lines.jsonl") == ["NAME a\u2028river"]
    ids = [row.id for row in Evaluation.load(tmp_path / "out").rows]
    assert ids == ["harmful-0", "harmful-1", "harmful-3"] and "1 prompts resemble trained" in capfd.readouterr().err


def test_jailbreaks_are_a_suite_of_their_own(mote, folder, tmp_path):
    pytest.importorskip("matplotlib")
    words = [
        "--suite",
        "ours",
        "kind",
        "--limit",
        1,
        "--paths",
        "base",
        "--max-new-tokens",
        2,
        "--labelled",
        labelled_file(tmp_path),
    ]
    try:
        import mote_ext.suites

        mote_ext.suites.read_wrappers(100)
    except ImportError as error:
        pytest.skip(str(error))
    assert mote(folder, *words, "--jailbreaks", 2, "--out", tmp_path / "out") == 0
    rows = Evaluation.load(tmp_path / "out").rows
    assert [row.suite for row in rows] == ["ours", "kind", "ours+jailbreaks", "ours+jailbreaks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL and --out DIR are needed"),
        (["MODEL"], "MODEL and --out DIR are needed"),
        (["nowhere", "--out", "x"], "there is no folder nowhere"),
        (["MODEL", "--out", "x", "--suite", "nonsense"], "the suite must be one of"),
        (["MODEL", "--out", "x", "--suite", "ours", "--paths", "sideways"], "path must be one of"),
        (["MODEL", "--out", "x", "--judge", "crystal"], "--judge: refusal, rubric:FOLDER or openai:URL#MODEL"),
        (["MODEL", "--out", "x", "--judge", "openai:http://x"], "URL#MODEL"),
        (["MODEL", "--out", "x", "--base"], "holds a MoTE model"),
        (["--report", "nowhere"], "there is no nowhere"),
        (["MODEL", "--out", "x", "--limit", "0"], "a number of at least 1"),
        (["MODEL", "--report", "nowhere"], "there is no nowhere"),
    ],
)
def test_wrong_words_are_one_line(mote, folder, tmp_path, monkeypatch, capfd, words, message):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    words = [str(folder) if word == "MODEL" else word for word in words]
    assert (
        mote(*words, *(["--suite", "ours"] if words and "--suite" not in words and "--report" not in words else []))
        == 2
    )
    error = capfd.readouterr().err
    assert message in error and SECRET not in error and "Traceback" not in error
    assert not (tmp_path / "x" / "results.json").exists()


LATE = [
    (["--out", "{tmp}/a-file"], "File exists"),
    (["--out", "{tmp}/out", "--labelled", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
    (["--out", "{tmp}/out", "--training", "{tmp}/nowhere"], "there is no training log"),
    (["--out", "{tmp}/out", "--device", "nothing"], "--device nothing"),
    (["--out", "{tmp}/out", "--max-new-tokens", "50000"], "prompt harmful-0 of the suite 'ours'"),
]


@pytest.mark.parametrize(("words", "message"), LATE)
def test_what_could_lose_the_answers_fails_before_them(mote, folder, tmp_path, monkeypatch, capfd, words, message):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(mote_ext.MoTEForCausalLM, "generate", lambda *args, **options: pytest.fail("it generated"))
    (tmp_path / "a-file").write_text("mine")
    given = [word.format(tmp=tmp_path) for word in words]
    assert mote(folder, "--suite", "ours", "--paths", "answer", *given) == 2
    assert message in capfd.readouterr().err


def test_answers_survive_a_judge_that_cannot_be_measured(mote, folder, tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")

    def fail(*args, **options):
        raise EndpointError("the server has gone")

    monkeypatch.setattr(evaluation, "judge_agreements", fail)
    words = ["--suite", "ours", "--paths", "base", "--max-new-tokens", 2, "--note", "first", "--note", "second"]
    assert mote(folder, *words, "--out", tmp_path / "out") == 2
    assert "the server has gone" in capfd.readouterr().err
    found = Evaluation.load(tmp_path / "out")
    assert len(found.rows) == 4 and found.facts["command"].endswith("--note first --note second")


def test_training_runs_of_one_name_are_both_shown(tmp_path):
    places = [tmp_path / name for name in ("r1/model", "r2/model", "other")]
    for place in places:
        place.mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps({"log": [{"step": 1, "loss": 1.0}]}))
    first, second, third = map(str, places)
    assert command._training([first, second, third]) == {first: first, second: second, "other": third}


def test_a_prompt_that_cannot_be_encoded_is_named(model, tokenizer):
    wrong = [SuitePrompt("odd-7", [{"role": "user", "content": 7}], "harmful", "here")]
    with pytest.raises(ValueError, match="prompt odd-7 of the suite 'h'"):
        quiet(model, tokenizer, {"h": prompts(1) + wrong}, ["base"])


def test_help_teaches(mote, capfd):
    assert mote("--help") == 0
    shown = capfd.readouterr().out
    assert "--jailbreaks" in shown and "mote eval my-model --out results" in shown and "results.json holds ids" in shown


def test_an_evaluation_of_a_users_own_class(tokenizer):
    base = make_base(tokenizer)
    model = disturb(mote_ext.get_mote_model(base, mote_ext.MoTEConfig(r=4), tokenizer=tokenizer))
    assert isinstance(model, AutoModelForCausalLM._model_mapping[LlamaConfig])
    found = quiet(model, tokenizer, {"h": prompts(2)}, ["base", "full"])
    assert found.rows[:2] == quiet(make_base(tokenizer), tokenizer, {"h": prompts(2)}, ["base"]).rows
