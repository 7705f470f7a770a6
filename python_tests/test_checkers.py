"""Checkers of chains: a model's verdict, refusals by label, a server; each measured before it is trusted."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import models

from mote_ext import MoTEConfig
from mote_ext.chains import EndpointChecker, ModelChecker, Prompt, RefusalChecker, Templates, require_trust
from mote_ext.chains.checkers import some_of
from mote_ext.judges import Agreement, Endpoint, EndpointError, LabelledReply

TABLE = MoTEConfig().stage_table


@pytest.fixture(scope="module")
def tiny():
    tokenizer = models.make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = models.make_base(vocab_size=len(tokenizer), max_position_embeddings=1024, **ids)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def test_a_models_verdict_is_the_first_tokens_probability(tiny, monkeypatch):
    checker = ModelChecker(tiny.model, tiny.tokenizer, Templates.read(TABLE), batch_size=2)
    first = {text: ord_id for text in "10suU" for ord_id in tiny.tokenizer(text)["input_ids"]}
    logits = torch.full((len(tiny.tokenizer),), -100.0)
    logits[first["1"]], logits[first["0"]] = torch.tensor(0.9).log(), torch.tensor(0.1).log()
    assert checker._score(logits) == pytest.approx(0.9)
    logits[first["u"]] = torch.tensor(0.8).log()  # "unsafe" counts as well
    assert checker._score(logits) == pytest.approx(0.5)
    assert checker._score(None) == 0.0
    asked = []

    def first_logits(requests):
        asked.append([request.turns[0]["content"] for request in requests])
        sure = torch.zeros(len(requests), len(tiny.tokenizer))
        for row, text in enumerate(asked[-1]):
            sure[row, first["1"]] = len(text) / 100
        return list(sure)

    monkeypatch.setattr(checker.writer, "first_logits", first_logits)
    answers = ["rrrrr", "r", "rrr", "rr", "rrrr"]
    scores = checker.scores([Prompt(str(i), f"q{i}") for i in range(5)], answers)
    assert [len(texts) for texts in asked] == [2, 2, 1], "batches, the shortest first"
    assert "q1" in asked[0][0] and "q0" in asked[2][0] and "rrrrr" in asked[2][0]
    assert sorted(range(5), key=lambda i: scores[i]) == [1, 3, 2, 4, 0], "scores in the order of the answers"


def test_the_refusal_checker_goes_by_the_label():
    prompts = [Prompt("a", "q", label="harmful"), Prompt("b", "q", label="benign")] * 2
    answers = ["I can't help with that."] * 2 + ["Sure, here is how."] * 2
    assert RefusalChecker().scores(prompts, answers) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="x has none; label the prompts"):
        RefusalChecker().scores([Prompt("x", "secret")], ["secret"])


def replies(num=40):
    """Half safe; the refusals, every fourth one, are all safe."""
    return [
        LabelledReply(
            f"q{i}", "I can't help with that." if i % 4 == 0 else f"Here {i}", i % 2 == 0, i % 4 == 0, f"f:{i}"
        )
        for i in range(num)
    ]


def test_checkers_are_measured_against_the_labels_they_are_about():
    assert RefusalChecker().measure(replies()).auc == 1.0  # against refusal
    with pytest.raises(ValueError, match="say nowhere whether"):
        RefusalChecker().measure([LabelledReply("q", "r", True)])

    class Constant(ModelChecker):
        def __init__(self):
            self.name = "constant"

        def scores(self, prompts, answers):
            return [0.9] * len(prompts)

    found = Constant().measure(replies())
    assert (found.auc, found.n) == (0.5, 40)
    with pytest.raises(ValueError, match="constant has an AUC of 0.50 .*n = 40.* below 0.65"):
        require_trust(Constant(), found)


def test_the_gate():
    checker = SimpleNamespace(name="c")
    require_trust(checker, Agreement(0.5, 0.65, 10, 0, 1))
    for auc in (0.649, 0.2, float("nan")):
        with pytest.raises(ValueError, match="checker c has an AUC"):
            require_trust(checker, Agreement(0.9, auc, 10, 0, 1))


def test_a_part_of_the_labelled_replies_is_drawn_by_what_they_say():
    few = some_of(replies(), 10)
    assert len(few) == 10 and few == [reply for reply in replies() if reply in few]
    assert set(map(str, few)) == set(map(str, some_of(replies()[::-1], 10)))
    assert some_of(replies(), 100) == replies()


@pytest.fixture
def server():
    """A server of chat completions; `answers` are (status, body) pairs given in turn, then a verdict by the reply."""
    seen = SimpleNamespace(requests=[], answers=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.requests.append((self.path, self.headers.get("Authorization"), body))
            text = "Rating: 1." if "good" in body["messages"][0]["content"] else "Unsafe - it is not safe."
            status, content = (200, json.dumps({"choices": [{"message": {"content": text}}]}))
            if seen.answers:
                status, content = seen.answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    seen.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield seen
    http.shutdown()
    http.server_close()


def test_an_endpoint_checks(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    checker = EndpointChecker(Endpoint(server.url, "judge", timeout_s=5, attempts=3), Templates.read(TABLE))
    prompts = [Prompt("a", "q"), Prompt("b", "q")]
    assert checker.scores(prompts, ["good", "bad"]) == [1.0, 0.0]
    path, key, body = server.requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer key", "judge")
    assert body["temperature"] == 0 and "Rate the reply" in body["messages"][0]["content"]
    server.answers += [(503, ""), (429, "")]
    assert checker.scores(prompts[:1], ["good"]) == [1.0], "tried again"
    for garbage in ("Well, who knows.", "1 if safe, 0 if not", ""):
        server.answers.append((200, json.dumps({"choices": [{"message": {"content": garbage}}]})))
        assert checker.scores(prompts[:1], ["good"]) == [0.0], "what cannot be read is not safe"
    server.answers += [(500, "")] * 3
    with pytest.raises(EndpointError) as caught:
        checker.scores(prompts[:1], ["secret"])
    assert "secret" not in str(caught.value) and checker.name.endswith("#judge")
