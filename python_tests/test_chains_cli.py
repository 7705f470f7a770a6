"""mote chains in process on a tiny model: its screens, its gate, its errors, and that no text of a chain is shown."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import models

import mote_ext
from mote_ext.chains import Chain, read_chains
from mote_ext.cli import COMMANDS, chains, main

TABLE = mote_ext.MoTEConfig().stage_table
SECRET = "an unspeakable question"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders "base" and "mote", prompts, and replies with labels."""
    root = tmp_path_factory.mktemp("chains")
    tokenizer = models.make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    base = models.make_base(vocab_size=len(tokenizer), max_position_embeddings=1024, **ids)
    for name in ("base", "mote"):
        (root / name).mkdir()
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model = mote_ext.MoTEForCausalLM.from_base(base, mote_ext.MoTEConfig(r=4), tokenizer=tokenizer)
    model.save_pretrained(root / "mote")
    tokenizer.save_pretrained(root / "mote")
    rows = [{"prompt": f"{SECRET} {i}", "label": ("harmful", "benign")[i % 2]} for i in range(10)]
    (root / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "unlabelled.csv").write_text("prompt\na\n")
    replies = [
        {"prompt": "q", "response": ("I can't help with that.", "Sure.")[i % 2] + f" {i}", "safe": i % 2 == 0}
        for i in range(20)
    ]
    (root / "replies.jsonl").write_text("\n".join(json.dumps({**row, "refusal": row["safe"]}) for row in replies))
    return SimpleNamespace(root=root)


@pytest.fixture
def mote(made, tmp_path, monkeypatch, capsys):
    """Runs mote chains; gives the exit code, the output, the notices, and the lines of --out."""
    monkeypatch.setitem(COMMANDS, "chains", chains)

    def run(*args, model="base", labelled=True):
        out = tmp_path / "out.jsonl"
        given = ["chains", str(made.root / model), *map(str, args), "--out", str(out), "--max-tokens"]
        given += ["analysis=4,guidance=3,response=5"]
        given += ["--labelled", str(made.root / "replies.jsonl")] if labelled else []
        code = main(given)
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err, "no prompt is shown"
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return SimpleNamespace(code=code, out=shown.out, err=shown.err, rows=rows, path=out)

    return run


def test_a_run_shows_the_checkers_agreement_a_bar_and_the_mix(mote, made):
    found = mote(made.root / "p.jsonl", "--checker", "refusal")
    assert found.code == 0, found.err
    assert "checker refusal against human labels: AUC 1.00" in found.err and "n = 20" in found.err
    assert "10/10" in found.err
    assert "the paper's" in found.out and "28.5 %" in found.out and "mean tokens a stage" in found.out
    # The model's babble never refuses: benign prompts are answered at once, harmful ones dropped.
    assert [row["id"] for row in found.rows if row["check"] == "safe"] == [f"p-{i}" for i in range(1, 10, 2)]
    read = read_chains(found.path, TABLE)
    assert all(isinstance(chain, Chain) and chain.meta["source"] == "p" for chain in read)
    again = mote(made.root / "p.jsonl", "--checker", "refusal")
    assert again.code == 0 and "10 prompts were done before" in again.out and again.rows == found.rows


def test_a_checker_that_knows_nothing_needs_force(mote, made):
    found = mote(made.root / "p.jsonl", "--labelled-rows", "12")
    assert found.code == 2 and not found.rows
    assert "checker self has an AUC of" in found.err and "n = 12" in found.err and "--force" in found.err
    forced = mote(made.root / "p.jsonl", "--force", "--no-rejected", "--limit", "6")
    assert forced.code == 0 and "--force: checker self has an AUC" in forced.err
    assert all("/rejected-" not in row["id"] for row in forced.rows)


def test_without_labelled_replies_it_says_how_to_get_them(mote, made, monkeypatch):
    def nothing(path=None, **kwargs):
        raise ImportError("pip install --no-deps pyrit==0")

    monkeypatch.setattr("mote_ext.judges.read_labelled", nothing)
    found = mote(made.root / "p.jsonl", labelled=False)
    assert found.code == 2 and "pip install --no-deps pyrit==0" in found.err and "--labelled FILE" in found.err
    assert mote(made.root / "p.jsonl", "--force", "--limit", "2", labelled=False).code == 0


def test_a_mote_folder_and_another_model_as_checker(mote, made):
    other = f"model:{made.root / 'base'}"
    found = mote(made.root / "p.jsonl", "--checker", other, "--force", "--limit", "3", model="mote")
    assert found.code == 0, found.err
    assert f"checker {other}" in found.err
    assert json.loads(found.path.with_name("out.jsonl.meta.json").read_text())["checker"] == other


def test_start_and_exemplars(mote, made):
    found = mote(made.root / "p.jsonl", "--checker", "refusal", "--start", "benign=full", "--exemplars", "safety")
    assert found.code == 0, found.err
    assert all({"analysis", "guidance"} <= set(row) for row in found.rows if row["label"] == "benign")


def test_full_is_every_stage_of_reasoning_of_a_models_own_table(made):
    names = ("analysis", "guidance", "draft")
    stages = [{"name": name, "next": [*names[i + 1 : i + 2], "response"]} for i, name in enumerate(names)]
    stages += [{"name": "response", "role": "response"}, {"name": "check", "role": "check"}]
    table = mote_ext.MoTEConfig(stages=stages).stage_table
    assert chains._lengths(chains._start("benign=full,harmful=guidance"), table) == {"benign": 3, "harmful": 2}
    assert set(chains._lengths(chains._start("full"), table).values()) == {3}
    assert set(chains._lengths(chains._start("full"), TABLE).values()) == {2}


ERRORS = [
    (["nowhere.jsonl"], "nowhere.jsonl"),
    (["{root}/p.jsonl", "{root}/p.jsonl"], "the same id 'p-0'"),
    (["{root}/p.jsonl", "--checker", "nobody"], "--checker: one of self, model:FOLDER, refusal, openai:URL#MODEL"),
    (["{root}/p.jsonl", "--checker", "openai:localhost"], "an endpoint is written URL#MODEL"),
    (["{root}/p.jsonl", "--start", "soon"], "--start: a way among ('answer', 'analysis', 'full') expected, got 'soon'"),
    (["{root}/p.jsonl", "--start", "odd=full"], "with a label among"),
    (["{root}/p.jsonl", "--limit", "0"], "--limit: a number of at least 1 expected"),
    (["{root}/p.jsonl", "--templates", "nowhere"], "there is no folder nowhere"),
    (["{root}/p.jsonl", "--exemplars", "nowhere.jsonl"], "nowhere.jsonl"),
    (["{root}/p.jsonl", "--top-p", "0"], "top_p must be"),
    (["{root}/unlabelled.csv", "--checker", "refusal"], "unlabelled-0 has none; label the prompts"),
    (["suite:none-of-this-name"], "none-of-this-name"),
]


@pytest.mark.parametrize("args, message", ERRORS)
def test_errors_in_a_line(mote, made, args, message):
    found = mote(*(arg.format(root=made.root) for arg in args))
    assert found.code == 2 and message in found.err and not found.rows
    said = [line for line in found.err.splitlines() if line.startswith("mote: ")]
    assert len(said) == 1 and "Traceback" not in found.err


def test_an_endpoint_that_is_not_there_is_one_line(mote, made, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    found = mote(made.root / "p.jsonl", "--checker", "openai:http://127.0.0.1:9/v1#m")
    assert found.code == 2 and "gave no answer in" in found.err


@pytest.mark.parametrize("settings", [{"output_dir": "x"}, {"max_length": 64}, {"arguments": 1}])
def test_training_settings_that_are_options_are_refused(made, tmp_path, capsys, settings):
    (tmp_path / "s.json").write_text(json.dumps(settings))
    words = ["train", "c.jsonl", "--base", made.root / "base", "--out", tmp_path / "o", "--settings"]
    assert main([*map(str, words), str(tmp_path / "s.json")]) == 2
    assert f"s.json: {next(iter(settings))} cannot be set there" in capsys.readouterr().err


def test_a_base_that_is_no_hub_name_is_a_folder(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mote_ext.training.train", lambda data, base, *args, **options: pytest.fail(f"it took {base}"))
    assert main(["train", "c.jsonl", "--base", "./nowhere/x", "--out", str(tmp_path / "o")]) == 2
    assert "there is no folder ./nowhere/x" in capsys.readouterr().err


def test_a_changed_setting_is_refused(mote, made):
    mote(made.root / "p.jsonl", "--checker", "refusal", "--limit", "4")
    found = mote(made.root / "p.jsonl", "--checker", "refusal", "--limit", "4", "--seed", "3")
    assert found.code == 2 and "seed was 0, is 3" in found.err


def test_help_teaches(mote, capsys):
    assert main(["chains", "--help"]) == 0
    text = capsys.readouterr().out
    assert "suite:advbench:80" in text and "OPENAI_API_KEY" in text and "--force" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_ctrl_c_says_that_the_run_goes_on(mote, made, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mote_ext.chains.build.build_chains", interrupt)
    found = mote(made.root / "p.jsonl", "--checker", "refusal")
    assert found.code == 130 and "the same command goes on" in found.err
