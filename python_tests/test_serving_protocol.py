"""What the server makes of bodies, policies, headers and events, without HTTP: every refusal names what is wrong."""

import asyncio
import math

import pytest

pytest.importorskip("starlette")

from servers import QUESTION, make_model
from starlette.datastructures import Headers

from mote_ext.engine import RequestOutput, StageEvent, TokenLogprob
from mote_ext.generation.plan import make_plan
from mote_ext.serving.errors import EngineStopped, RequestError
from mote_ext.serving.fields import parse_object
from mote_ext.serving.guard import Guard, Keys
from mote_ext.serving.loop import Ticket
from mote_ext.serving.policy import Policy, legal_paths
from mote_ext.serving.protocol import parse_chat, parse_completion
from mote_ext.serving.replies import Reply, SampleView, answer_end, finish_reason
from mote_ext.stages import RESPONSE, Stage

CONFIG = make_model().routing.config
PLAIN_CHAT = {"messages": QUESTION}


def policy(**options):
    return Policy.of(CONFIG, **options)


def chat(rules=None, **fields):
    return parse_chat({**PLAIN_CHAT, **fields}, rules or policy(), "tiny")


def three_stages():
    config = make_model().routing.config.__class__
    return config(
        stages=[
            {"name": "analysis", "next": ["guidance", "response"]},
            {"name": "guidance", "next": ["response"]},
            {"name": "response", "role": "response"},
        ],
        marker_ids=list(range(300, 306)),
    )


# ---- bodies


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON at character 1"),
        (b"\xff\xfe", "no JSON"),
        (b"[1]", "must be a JSON object, got a list"),
        (b'"a"', "got a text"),
        (b'{"a": NaN}', "no JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
    ids=range(9),
)
def test_a_body_that_is_no_object(body, fragment):
    with pytest.raises(RequestError, match=fragment) as found:
        parse_object(body)
    assert found.value.status == 400


WRONG = [
    ({"messages": None}, "messages must be a list"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": "hi"}, "messages must be a list"),
    ({"messages": ["hi"]}, "messages[0] must be an object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content must be a text"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": 5, "content": "a"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "calls no tools"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images and sound are not read"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "content[0].text must be a text"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0] must be"),
    ({"model": 5}, "model must be a text"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": -1}, "temperature must be a number from 0 to 2"),
    ({"temperature": True}, "temperature must be a number"),
    ({"temperature": math.inf}, "temperature must be"),
    ({"top_p": 0}, "top_p must be above 0"),
    ({"top_p": 1.5}, "top_p must be"),
    ({"top_k": 1.5}, "top_k must be a whole number"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 2048"),
    ({"max_tokens": 2049}, "max_tokens must be a whole number from 1 to 2048"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens must be"),
    ({"n": 0}, "n must be"),
    ({"n": 1000}, "n must be a whole number from 1 to 16"),
    ({"n": True}, "n must be"),
    ({"seed": "x"}, "seed must be"),
    ({"seed": 2**70}, "seed must be"),
    ({"stop": ""}, "stop must be"),
    ({"stop": ["a"] * 5}, "stop must be"),
    ({"stop": [1]}, "stop must be a text"),
    ({"stop": "a" * 300}, "stop must be at most 256 characters"),
    ({"stream": "yes"}, "stream must be true or false"),
    ({"stream_options": 5}, "stream_options must be an object"),
    ({"logprobs": 5}, "logprobs must be true or false"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported here"),
    ({"frequency_penalty": -1}, "frequency_penalty is not supported here"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported here"),
    ({"tools": [{"type": "function"}]}, "tools is not supported here: this model calls no tools"),
    ({"tool_choice": "required"}, "tool_choice is not supported"),
    ({"functions": [{}]}, "functions is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"path": 5}, "path must be a path's name"),
    ({"path": []}, "path must be a path's name"),
    ({"path": [1]}, "path must be a path's name"),
    ({"check": "always"}, "check must be false or one of"),
    ({"check": 1}, "check must be"),
    ({"check": []}, "check must be"),
    ({"stage_max_tokens": 5}, "stage_max_tokens must be an object"),
    ({"stage_max_tokens": {"wisdom": 5}}, "stage_max_tokens must be an object whose keys"),
    ({"stage_max_tokens": {"analysis": 0}}, "analysis must be a whole number"),
]


@pytest.mark.parametrize(("fields", "fragment"), WRONG, ids=[fragment for _, fragment in WRONG])
def test_a_field_that_is_wrong_is_named(fields, fragment):
    with pytest.raises(RequestError) as found:
        chat(**fields)
    assert fragment in found.value.message
    assert found.value.status == 400
    assert set(found.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({}, "prompt must be one text"),
        ({"prompt": ""}, "prompt must be one text"),
        ({"prompt": ["a", "b"]}, "prompt must be one text"),
        ({"prompt": [1, -1]}, "prompt must be token ids"),
        ({"prompt": [1, True]}, "prompt must be one text"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "echo": True}, "echo is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of must equal n"),
        ({"prompt": "a", "logprobs": True}, "logprobs must be a whole number"),
    ],
)
def test_a_completion_that_is_wrong(fields, fragment):
    with pytest.raises(RequestError, match=fragment.replace("(", r"\(")):
        parse_completion(fields, policy(), "tiny")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("chekc", "check"), ("Check", "check"), ("paths", "path"), ("max_stage_tokens", "stage_max_tokens")],
)
def test_a_misspelt_field_of_ours_is_no_silence(name, meant):
    with pytest.raises(RequestError, match=f"did you mean {meant}") as found:
        chat(**{name: "enforce"})
    assert found.value.status == 400
    with pytest.raises(RequestError, match="at most 128 fields"):
        chat(**{f"x{number}": 1 for number in range(200)})


def test_log_probabilities_are_bounded():
    fields = {"logprobs": True, "top_logprobs": 20}
    assert chat(**fields, max_tokens=2048).params.logprobs == 20
    with pytest.raises(RequestError, match="must be at most 65,536, got 16 x 512 x 21"):
        chat(**fields, n=16)


def test_a_refused_path_is_not_repeated_at_length():
    for path in ("x" * 500_000, ["x" * 500_000]):
        with pytest.raises(RequestError, match="path must be one of") as found:
            chat(path=path)
        assert found.value.status == 403 and len(found.value.message) < 300


def test_what_clients_send_along_is_no_error():
    fields = {
        "user": "somebody", "metadata": {"a": 1}, "store": False, "parallel_tool_calls": True, "service_tier": "auto",
        "min_tokens": 5, "reasoning_effort": "low", "prompt_cache_key": "x", "cache_control": {},
        "tools": [], "tool_choice": "none", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
        "response_format": {"type": "text"}, "temperature": None, "stop": None, "n": None, "path": None, "check": None,
    }  # fmt: skip
    ask = chat(**fields)
    assert (ask.path, ask.check, ask.params.temperature, ask.params.n) == ("adaptive", "none", 1.0, 1)


def test_fields_reach_the_engine():
    ask = chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=3, n=2, stop="x", max_tokens=99,
        logprobs=True, top_logprobs=2, path="full", check="flag", stage_max_tokens={"analysis": 9}, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    params = ask.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.repetition_penalty, params.seed, params.n, params.stop) == (1.2, 3, 2, ("x",))
    assert (params.max_new_tokens, params.logprobs, params.path, params.check) == (99, 2, "full", "flag")
    assert params.stage_max_tokens == {"analysis": 9}
    assert ask.stream and ask.include_usage and not params.trusted_prompt
    assert chat(max_completion_tokens=50, max_tokens=60).params.max_new_tokens == 50


def test_messages_keep_roles_and_texts_and_nothing_else():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = chat(
        messages=[
            {"role": "developer", "content": "be short", "name": "x"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "c", "reasoning_content": "d"},
            {"role": "user", "content": ""},
        ]
    )
    assert ask.prompt == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]


def test_another_model_is_not_found():
    with pytest.raises(RequestError, match="no model 'gpt-5'") as found:
        chat(model="gpt-5")
    assert (found.value.status, found.value.code) == (404, "model_not_found")
    assert chat(model="tiny").path == "adaptive"


# ---- the operator's policy


def test_all_paths_of_the_model_are_allowed_by_default():
    assert list(policy().routes) == ["answer", "analysis", "full", "adaptive", "escalate"]
    assert list(Policy.of(three_stages()).routes) == ["answer", "analysis", "full", "adaptive"]
    assert Policy.of(three_stages()).checks == ("none",)


def test_a_path_that_is_not_allowed_names_those_that_are():
    rules = policy(allow_paths=["full", "escalate"])
    assert chat(rules).path == "full"
    for path in ("answer", "adaptive", "nonsense", ["response"], ["guidance", "response"], "none"):
        with pytest.raises(RequestError, match="full.*escalate") as found:
            chat(rules, path=path)
        assert (found.value.status, found.value.code) == (403, "path_not_allowed")
    assert chat(rules, path=["analysis", "guidance", "response"]).path == "full"


def test_a_chain_of_ones_own_and_no_rules():
    rules = policy(allow_paths=["guidance+response", "none"])
    assert chat(rules, path=["guidance", "response"]).params.path == ("guidance", "response")
    free = chat(rules, path="none")
    assert free.params.path is None and free.params.hide == ()
    with pytest.raises(RequestError, match="the path 'none' has no check stage"):
        chat(rules, path="none", check="flag")


@pytest.mark.parametrize("asked", [None, False, True, "none", "flag", "enforce"])
@pytest.mark.parametrize("least", ["none", "flag", "enforce"])
def test_a_client_gets_the_stricter_check(asked, least):
    order = ["none", "flag", "enforce"]
    wanted = {None: "none", False: "none", True: "flag"}.get(asked, asked)
    expected = max(wanted, least, key=order.index)
    ask = chat(policy(min_check=least), check=asked)
    assert ask.check == expected
    assert ask.params.check == (False if expected == "none" else expected)
    assert chat(policy(min_check=least), check=asked, path="escalate").check == "enforce"


@pytest.mark.parametrize("showing", ["always", "safe", "never"])
@pytest.mark.parametrize("check", ["none", "flag", "enforce"])
def test_who_may_see_reasoning(showing, check):
    ask = chat(policy(show_reasoning=showing), check=check)
    hidden = showing == "never" or (showing == "safe" and check == "none")
    assert ask.shows_reasoning == (not hidden)
    assert ask.params.hide == (("analysis", "guidance") if hidden else ())


def test_forced_reasoning_cannot_be_starved():
    rules = policy(allow_paths=["full", "adaptive"], min_stage_tokens=16)
    for path in ("full", "adaptive"):
        with pytest.raises(RequestError, match="stage_max_tokens must leave"):
            chat(rules, path=path, stage_max_tokens={"analysis": 1})
        with pytest.raises(RequestError, match="max_tokens must be at least (\\d+)") as found:
            chat(rules, path=path, max_tokens=20)
        least = int(found.value.message.split("at least ")[1].split()[0])
        assert chat(rules, path=path, max_tokens=least).params.max_new_tokens == least
        with pytest.raises(RequestError):
            chat(rules, path=path, max_tokens=least - 3)
    with pytest.raises(RequestError, match="max_tokens must be at least"):
        chat(policy(allow_paths=["escalate"]), max_tokens=20)
    assert chat(rules, stage_max_tokens={"analysis": 16, "response": 1}).params.stage_max_tokens["response"] == 1
    # Who may go without analysis at all may also have a short one.
    assert chat(policy(), path="full", stage_max_tokens={"analysis": 1}, max_tokens=20).params.max_new_tokens == 20


def lengths(plan):
    """Tokens of each stage of the chain, where every one goes on until it must end."""
    used, stage, found = 0, plan.following[-1][0], {}
    while True:
        used, length = used + 1, 0
        while not plan.must_end(stage, length, used):
            used, length = used + 1, length + 1
        found[plan.table.names[stage]], used = length, used + 1
        if stage == plan.last_stage:
            return found
        stage = plan.choices(stage, used)[0]


@pytest.mark.parametrize("path", ["full", "escalate"])
@pytest.mark.parametrize("fields", [{}, {"stage_max_tokens": {"analysis": 500, "response": 5}}, {"check": "flag"}])
def test_every_forced_stage_has_its_tokens(path, fields):
    rules = policy(allow_paths=[path], min_stage_tokens=16)
    for max_tokens in (*range(40, 80), 400):
        try:
            ask = chat(rules, path=path, max_tokens=max_tokens, **fields)
        except RequestError:
            assert max_tokens < 65
            continue
        params = ask.params
        plan = make_plan(CONFIG, CONFIG.stage_table, "full", params.check, max_tokens, params.stage_max_tokens)
        found = lengths(plan)
        assert found["analysis"] >= 16 and found["guidance"] >= 16 and found["response"] >= min(5, plan.reserve)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"allow_paths": ["fulll"]}, "--allow-paths: .* expected, got 'fulll'"),
        ({"allow_paths": []}, "at least one"),
        ({"allow_paths": ["response+analysis"]}, "must follow the order"),
        ({"allow_paths": ["full"], "default_path": "answer"}, "--default-path"),
        ({"min_check": "flag", "allow_paths": ["none", "full"]}, "no stages and so no check"),
        ({"max_tokens": 5}, "max_new_tokens must be at least"),
        ({"min_check": "often"}, "min_check must be one of"),
    ],
)
def test_a_policy_that_cannot_be(options, fragment):
    with pytest.raises(ValueError, match=fragment):
        policy(**options)


def test_a_policy_beyond_the_model():
    with pytest.raises(ValueError, match="no check stage"):
        Policy.of(three_stages(), min_check="flag")
    with pytest.raises(ValueError, match="--allow-paths"):
        Policy.of(three_stages(), allow_paths=["escalate"])
    with pytest.raises(RequestError, match="this model has no check stage"):
        chat(Policy.of(three_stages()), check="flag")


def test_a_table_of_two_stages_has_its_own_paths():
    config = CONFIG.__class__(stages=[Stage("plan", next=("response",)), RESPONSE], marker_ids=[300, 301, 302, 303])
    assert legal_paths(config) == ["answer", "plan", "full", "adaptive"]


# ---- who may ask


def admitted(path="/v1/models", keys=(), hosts=(), **headers):
    """The status a request gets from the guard, 200 if it may pass."""
    guard = Guard(None, Keys(keys), hosts)
    names = {name.replace("_", "-"): value for name, value in {"host": "127.0.0.1:8000", **headers}.items()}
    try:
        guard.require_admission(path, Headers(names))
    except RequestError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:80", "localhost:9", "[::1]:8", "a.localhost", "192.168.1.5:8"]
)
def test_addresses_and_localhost_are_this_server(host):
    assert admitted(host=host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "localhost.evil.example", "127.0.0.1.evil.example", "[bad"]
)
def test_other_names_are_not(host):
    assert admitted(host=host) == 403


def test_the_operators_names_are():
    assert admitted(host="Chat.Example.org", hosts=["chat.example.org"]) == 200
    assert admitted(host="other.example.org", hosts=["chat.example.org"]) == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "https://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:8001"}, 403),
        ({"origin": "http://localhost:8000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_origins_are_refused(headers, status):
    assert admitted(**headers) == status


def test_keys():
    keys = ["first-secret", "second-secret"]
    assert admitted(keys=keys) == 401
    for given, status in {
        "Bearer first-secret": 200, "bearer second-secret": 200, "Bearer first-secre": 401, "Bearer ": 401,
        "first-secret": 401, "Basic first-secret": 401, "Bearer third-secret": 401, "Bearer \xff\xfe": 401,
    }.items():  # fmt: skip
        assert admitted(keys=keys, authorization=given) == status
    assert [admitted(path, keys=keys) for path in ("/", "/health", "/metrics", "/state")] == [200, 200, 401, 401]
    for key in ("short", "with a blank in it", "snowman-\N{SNOWMAN}"):
        with pytest.raises(ValueError, match="API key 1 must be"):
            Keys([key])


def test_keys_come_from_the_environment_and_a_file(tmp_path, monkeypatch):
    file = tmp_path / "keys.txt"
    file.write_text("# team a\nfirst-secret\n\n  second-secret  \n")
    monkeypatch.setenv("MOTE_API_KEY", "third-secret")
    keys = Keys.read(str(file))
    assert len(keys) == 3
    assert all(keys.admits(f"Bearer {name}-secret") for name in ("first", "second", "third"))


def test_keys_that_were_meant_and_are_none(tmp_path, monkeypatch):
    file = tmp_path / "keys.txt"
    monkeypatch.delenv("MOTE_API_KEY", raising=False)
    assert not Keys.read(None)
    for text in ("", "\n  \n", "# a-commented-secret\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="--api-key-file .*keys.txt holds no key"):
            Keys.read(str(file))
    monkeypatch.setenv("MOTE_API_KEY", "")
    with pytest.raises(ValueError, match="MOTE_API_KEY holds no key"):
        Keys.read(None)


def test_salts_differ_by_key_and_cannot_be_chosen():
    keys = Keys(["first-secret", "second-secret"])
    first, second = keys.salt("Bearer first-secret"), keys.salt("Bearer second-secret")
    assert first != second and "secret" not in first
    assert keys.salt("Bearer second-secret", asked=first) not in (first, second)
    assert keys.salt("bearer first-secret") == first
    assert Keys().salt(None) == Keys().salt("Bearer whatever") == ""


# ---- what a client sees


def output(**fields):
    return RequestOutput(**{"request_id": "a", "sample": 0, "prompt_ids": [1, 2, 3], **fields})


def event(stage, text, done=None):
    return StageEvent("a", 0, stage, text, [1], done)


CHAIN = [("analysis", "harm?"), ("guidance", "no"), ("response", "Hi"), ("check", "1")]


def seen(verdict, check, showing):
    """(content, reasoning) of the streamed pieces, and of the whole."""
    rules = policy(show_reasoning=showing)
    view = SampleView(chat(rules, check=check), rules)
    done = output(texts=CHAIN, verdict=verdict, stop_reason="check:end")
    pieces = [piece for stage, text in CHAIN for piece in view.take(event(stage, text))]
    pieces += view.take(event("prompt", "", done))
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    reasoning = [piece.text for piece in pieces if piece.kind == "reasoning_content"]
    return (content, "\n".join(reasoning) or None), view.whole(done)


@pytest.mark.parametrize(
    ("verdict", "check", "showing", "shown"),
    [
        ("safe", "flag", "safe", True),
        ("unsafe", "flag", "safe", False),
        (None, "flag", "safe", False),
        (None, "none", "safe", False),
        (None, "none", "always", True),
        ("unsafe", "flag", "always", True),
        ("safe", "flag", "never", False),
    ],
)
def test_reasoning_is_seen_where_the_verdict_allows(verdict, check, showing, shown):
    streamed, whole = seen(verdict, check, showing)
    assert streamed == whole == ("Hi", "harm?\nno" if shown else None)


def test_reasoning_that_is_always_shown_comes_as_it_is_written():
    rules = policy(show_reasoning="always")
    view = SampleView(chat(rules, check="flag"), rules)
    kinds = [piece.kind for stage, text in CHAIN for piece in view.take(event(stage, text))]
    assert kinds == ["reasoning_content", "reasoning_content", "content", "held"]


def test_kept_back_reasoning_is_announced_once_a_stage_and_comes_last():
    rules = policy()
    view = SampleView(chat(rules, check="flag"), rules)
    kinds = [piece.kind for stage, text in CHAIN for _ in range(2) for piece in view.take(event(stage, text))]
    assert kinds == ["held", "held", "content", "content", "held"]
    last = view.take(event("prompt", "", output(texts=CHAIN, verdict="safe")))
    assert [(piece.kind, piece.stage) for piece in last] == [("reasoning_content", "analysis")] * 2 + [
        ("reasoning_content", "guidance")
    ] * 2


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("response:end", "stop"), ("check:end", "stop"), ("response:stop", "stop"), ("prompt:end", "stop"),
        ("response:limit", "length"), ("response:max_new_tokens", "length"), ("response:refusal", "content_filter"),
    ],
)  # fmt: skip
def test_finish_reasons(reason, expected):
    assert finish_reason(answer_end(output(stop_reason=reason), chat(), policy())) == expected


def test_a_cut_answer_is_cut_whatever_the_check_says_after_it():
    ask = chat(check="flag", path="answer", max_tokens=40, stage_max_tokens={"response": 9})
    for num_tokens, num_generated, expected in ((8, 13, "end"), (9, 14, "limit"), (8, 40, "limit")):
        stages = [2] * (num_tokens + 2) + [3] * 3
        done = output(stop_reason="check:end", verdict="safe", stage_ids=stages, num_generated=num_generated)
        assert answer_end(done, ask, policy()) == expected


def test_logprobs_are_of_the_answer_alone():
    rules = policy()
    rows = [TokenLogprob(i, -float(i), ((i, -0.5),)) for i in range(7)]
    rows[3] = TokenLogprob(3, None)  # a forced marker
    end = TokenLogprob(CONFIG.marker_ids[5], -0.1)  # a chosen one
    rows.insert(6, end)
    done = output(logprobs=rows, stage_ids=[0, 0, 1, 2, 2, 2, 2, 3], texts=CHAIN, verdict="safe")
    reply = Reply(chat(rules, logprobs=True, top_logprobs=1), rules, "tiny", "x", lambda ids: f"<{ids[0]}>")
    found = reply.whole([done])["choices"][0]["logprobs"]["content"]
    assert [(row["token"], row["logprob"]) for row in found] == [("<4>", -4.0), ("<5>", -5.0)]
    assert found[0]["top_logprobs"][0]["logprob"] == -0.5


def test_logprobs_end_where_a_stop_text_cut():
    rules = policy()
    rows = [TokenLogprob(token, -1.0) for token in (CONFIG.marker_ids[4], *range(6))]
    done = output(logprobs=rows, stage_ids=[2] * 7, text="abc", stop_reason="response:stop", verdict="safe")
    reply = Reply(chat(rules, logprobs=True), rules, "tiny", "x", lambda ids: "abcdef"[: len(ids)])
    assert len(reply.whole([done])["choices"][0]["logprobs"]["content"]) == 3


def test_an_error_is_seen_by_who_was_not_waiting_for_it():
    async def read():
        ticket = Ticket("a", "a#0", 1)
        ticket._fail(EngineStopped())
        return [events async for events in ticket.events()]

    with pytest.raises(EngineStopped):
        asyncio.run(read())
