"""write_report: a page with the numbers, escaped and whole in itself; pictures that open; training logs."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest

from mote_ext.evaluation import Evaluation, Row, write_report
from mote_ext.evaluation.report import read_log
from mote_ext.judges import wilson

pytest.importorskip("matplotlib")
from matplotlib.image import imread  # noqa: E402

EVIL = '<script>alert("x")</script>&'


def rows(path, refused, n=20, label="harmful", suite="hard", check=False, tokens=40):
    stages = {"analysis": tokens // 2, "response": tokens - tokens // 2}
    found = []
    for i in range(n):
        harmful = i >= refused if label == "harmful" else None
        rest = [tokens, stages, "response:end", "safe" if check else None]
        found.append(Row(suite, path, check, f"{suite}-{i}", label, i < refused, harmful, *rest))
    return found


@pytest.fixture
def evaluation():
    found = (
        rows("base", 1) + rows("answer", 7) + rows("full", 13, tokens=91) + rows("full", 17, check="enforce", tokens=94)
    )
    found += rows("base", 0, 11, "benign", "kind") + rows("full", 3, 11, "benign", "kind", tokens=77)
    agreements = [
        {
            "judge": "refusal",
            "labels": "PyRIT",
            "accuracy": 0.7179,
            "auc": 0.7786,
            "n": 78,
            "low": 0.61,
            "high": 0.81,
            "base_rate": 0.64,
        }
    ]
    return Evaluation("ours", found, {"seed": 5}, {"command": "mote eval x", "date": "2026-01-02"}, agreements)


class Page(HTMLParser):
    """Tags opened and closed, rows of tables, pictures, text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.pictures, self.tags, self.text = [], [], [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        for name, value in attributes:
            assert not name.startswith("on") and (name not in ("src", "href") or value.startswith("data:"))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_has_the_numbers(evaluation, tmp_path):
    path = write_report(tmp_path / "out", [evaluation], notes=["Labels came from the prompts' sources."])
    assert path == tmp_path / "out" / "report.html"
    page = Page(path.read_text())
    low, high = wilson(13, 20)
    expected = [
        "20",
        "13 = 65%",
        f"[{low:.2f}, {high:.2f}]",
        "7 = 35%",
        "[{:.2f}, {:.2f}]".format(*wilson(7, 20)),
        "91.0",
        "91",
        "",
    ]
    assert ["ours", "hard harmful", "full", *expected] in page.rows
    assert [
        "ours",
        "kind benign",
        "full",
        "11",
        "3 = 27%",
        "[{:.2f}, {:.2f}]".format(*wilson(3, 11)),
        "",
        "",
        "77.0",
        "77",
        "",
    ] in page.rows
    assert any(r[2:5] == ["full + check", "20", "17 = 85%"] and r[-1] == "0" for r in page.rows if len(r) > 5)
    assert ["refusal", "PyRIT", "0.78", "0.72", "[0.61, 0.81]", "78", "64%"] in page.rows
    text = " ".join(page.text)
    for part in ("mote eval x", "2026-01-02", "Labels came from", "A refusal is not safety", "Wilson", "ours"):
        assert part in text
    assert re.search(r"seed.*5", text)


def test_pictures_open_and_are_in_the_page(evaluation, tmp_path):
    path = write_report(tmp_path, [evaluation])
    embedded = [base64.b64decode(src.split(",")[1]) for src in Page(path.read_text()).pictures]
    for name, data in zip(("safety.png", "stages.png"), embedded):
        assert (tmp_path / name).read_bytes() == data
        pixels = imread(io.BytesIO(data))
        assert pixels.shape[0] > 200 and pixels.shape[1] > 800 and pixels.std() > 0.01
    assert len(embedded) == 2 and not (tmp_path / "training.png").exists()


def test_what_comes_from_outside_is_escaped(evaluation, tmp_path):
    evaluation.name = EVIL
    evaluation.facts["command"] = evaluation.settings["x"] = EVIL
    evaluation.agreements[0] |= {"judge": EVIL, "labels": EVIL}
    found = [Row(**{**vars(row), "suite": EVIL, "id": EVIL, "path": EVIL}) for row in evaluation.rows[:20]]
    evaluation.rows = found + evaluation.rows[20:]
    evaluation.rows += [Row(**{**vars(row), "suite": "other", "label": EVIL}) for row in found[:2]]
    evaluation.agreements[0]["n"] = EVIL
    path = write_report(tmp_path, [evaluation], title=EVIL, notes=[EVIL])
    page = Page(path.read_text())
    assert "script" not in page.tags and EVIL in "".join(page.text)


def test_several_models_and_jailbreaks_and_one_label(evaluation, tmp_path):
    other = Evaluation("theirs", rows("answer", 2) + rows("answer", 1, suite="hard+jailbreaks"))
    path = write_report(tmp_path, [evaluation, other])
    page = Page(path.read_text())
    assert ["theirs", "hard+jailbreaks wrapped", "answer", "20", "1 = 5%"] in [row[:5] for row in page.rows]
    write_report(tmp_path / "one", [Evaluation("benign", rows("base", 0, 3, "benign"))])
    assert "No judge was measured" in (tmp_path / "one" / "report.html").read_text()


def test_training_curves_from_both_kinds_of_log(evaluation, tmp_path):
    log = [
        {"step": 1, "loss": 3.0, "loss/response": 2.0},
        {"step": 2, "loss": 2.0, "loss/response": 1.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"log": log}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert read_log(run) == read_log(tmp_path / "trainer_state.json") == log
    write_report(tmp_path / "out", [evaluation], {"a": run, "b": tmp_path / "trainer_state.json"})
    assert imread(tmp_path / "out" / "training.png").std() > 0.01


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"log": [{"step": 1}]}', '{"log_history": 3}'])
def test_a_log_that_is_none(evaluation, tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="holds no training log"):
        write_report(tmp_path / "out", [evaluation], {"a": tmp_path / "metrics.json"})
    with pytest.raises(ValueError, match="there is no training log"):
        read_log(tmp_path / "nowhere.json")
    assert not (tmp_path / "out").exists()


def test_nothing_to_report(evaluation, tmp_path):
    for wrong in ([], [Evaluation("x", [])]):
        with pytest.raises(ValueError, match="at least one evaluation with rows"):
            write_report(tmp_path, wrong)
    with pytest.raises(ValueError, match="names must differ"):
        write_report(tmp_path, [evaluation, evaluation])


def test_without_matplotlib_the_extra_is_named(evaluation, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mote_ext\[report\]'"):
        write_report(tmp_path, [evaluation])


def test_pictures_are_the_same_every_time(evaluation, tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, [evaluation])
    assert (tmp_path / "a" / "safety.png").read_bytes() == (tmp_path / "b" / "safety.png").read_bytes()
