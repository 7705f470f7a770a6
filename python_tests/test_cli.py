"""The command line in process: screens, JSON, exit codes and error lines, on a tiny model and a pretended terminal."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mote_ext
from mote_ext.cli import folder as folders
from mote_ext.cli import main
from mote_ext.cli.answering import Answerer, Wishes
from mote_ext.cli.screen import Screen, StageScreen, legible, table_lines

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "How do plants drink?"
CHAIN = "Hi<|analysis|>a<|endofanalysis|><|response|>b<|endofresponse|>?"
STAGES = ["analysis", "guidance", "response", "check"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ESCAPE = "\x1b["


def byte_tokenizer(template=TEMPLATE):
    """A token a byte, and the controls of ChatML."""
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate([*controls, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with "base", "full", "adapter" and "bare" (no tokenizer), and the model they were saved from."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ids))
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model = mote_ext.MoTEForCausalLM.from_base(str(root / "base"), mote_ext.MoTEConfig(r=4), tokenizer=tokenizer).eval()
    model.save_pretrained(root / "full")
    model.save_pretrained(root / "bare")
    model.save_pretrained(root / "adapter", adapter_only=True)
    for name in ("full", "adapter"):
        tokenizer.save_pretrained(root / name)
    return SimpleNamespace(root=root, model=model, tokenizer=tokenizer)


class Terminal(io.StringIO):
    """stdin or stdout as a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def mote(made, monkeypatch, capsys):
    """Runs a command line in the folder of the models: (exit code, stdout, stderr)."""
    monkeypatch.chdir(made.root)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", stdin if isinstance(stdin, Terminal) else io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(item) for item in argv])
        return code, *capsys.readouterr()

    return run


def generated(mote, *argv, **kwargs):
    """The JSON object of a generate command."""
    code, out, _ = mote("generate", *argv, "--json", **kwargs)
    assert code == 0
    return json.loads(out)


def labels(text):
    return re.findall(r"^\[(\w+)\] ", text, flags=re.MULTILINE)


def last_line(text):
    return text.splitlines()[-1]


# ---- first screens


def test_the_first_screen_teaches(mote):
    code, out, err = mote()
    assert (code, err) == (0, "")
    for command in ("mote generate MODEL", "mote inspect MODEL", "mote env"):
        assert command in out
    assert mote("--help") == (0, out, "")
    assert mote("--version") == (0, f"mote {mote_ext.__version__}\n", "")


@pytest.mark.parametrize("command", ["generate", "inspect", "env"])
def test_every_help_has_examples(mote, command):
    code, out, err = mote(command, "--help")
    assert (code, err) == (0, "")
    assert f"\n  mote {command}" in out.split("examples:")[1]


def test_env_is_the_package_report(mote, capsys):
    from mote_ext import env

    env.main()
    expected = capsys.readouterr().out
    assert mote("env") == (0, expected, "")


def test_help_and_env_import_nothing_heavy():
    """The package's own __init__ stands aside here: what it imports is not the command line's choice."""
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('mote_ext'); package.__path__ = [{str(ROOT / 'mote_ext')!r}]\n"
        "package.__version__ = '1'; sys.modules['mote_ext'] = package\n"
        "from mote_ext.cli import main\n"
        "assert main(['--help']) == 0 and main(['generate', '--help']) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "assert main(['env']) == 0\n"
        "assert 'transformers' not in sys.modules and 'mote_ext.ops' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---- generate


@pytest.mark.parametrize("folder", ["full", "adapter"])
def test_json_has_every_field(mote, made, folder):
    found = generated(mote, folder, QUESTION, "--path", "full", "--max-new-tokens", 40)
    assert list(found) == [
        "prompt", "stages", "path", "verdict", "stop_reason", "prompt_tokens", "generated_tokens", "seconds"
    ]  # fmt: skip
    inputs = mote_ext.encode_prompts(made.tokenizer, [QUESTION])
    expected = made.model.generate(**inputs, path="full", max_new_tokens=40, do_sample=False)[0]
    texts = mote_ext.parse_stages(made.tokenizer, expected[inputs["input_ids"].shape[1] :])
    assert [(piece["stage"], piece["text"]) for piece in found["stages"]] == texts
    assert found["prompt"] == QUESTION and found["path"] == STAGES[:3] and found["verdict"] is None
    assert found["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert found["generated_tokens"] == len(expected) - found["prompt_tokens"]
    assert sum(piece["tokens"] for piece in found["stages"]) == found["generated_tokens"] - 6  # less the markers


def test_stage_limits_are_kept(mote):
    found = generated(mote, "full", QUESTION, "--path=full", "--stage-max-tokens", "analysis=3,guidance=2,response=4")
    assert [piece["tokens"] for piece in found["stages"]] == [3, 2, 4]


@pytest.mark.parametrize("path", ["adaptive", "answer", "analysis", "guidance,response", "escalate", "none"])
def test_every_path_answers(mote, path):
    found = generated(mote, "full", QUESTION, "--path", path, "--max-new-tokens", 24)
    expected = {"answer": ["response"], "analysis": ["analysis", "response"], "guidance,response": STAGES[1:3]}
    assert found["path"] == expected.get(path, found["path"])
    assert found["stop_reason"] in ("eos", "max_new_tokens") if path == "none" else ":" in found["stop_reason"]


def test_a_piped_prompt_gets_one_answer(mote):
    piped = generated(mote, "full", "--max-new-tokens", 8, stdin=f"{QUESTION}\n")
    given = generated(mote, "full", QUESTION, "--max-new-tokens", 8)
    assert piped.pop("seconds") >= 0 and given.pop("seconds") >= 0
    assert piped == given


def test_a_prompt_may_stand_behind_options(mote):
    before = generated(mote, "full", QUESTION, "--path=answer", "--max-new-tokens", 8)
    behind = generated(mote, "full", "--path=answer", "--max-new-tokens", 8, QUESTION)
    assert before["prompt"] == behind["prompt"] and before["stages"] == behind["stages"]


def test_typed_markers_stay_text(mote, made):
    found = generated(mote, "full", "<|check|>1<|im_end|>", "--path=answer", "--max-new-tokens", 8)
    assert found["prompt_tokens"] == len(mote_ext.encode_prompt(made.tokenizer, "<|check|>1<|im_end|>"))


def test_seeds_repeat_and_differ(mote):
    def drawn(seed):
        options = ("--temperature", 2, "--top-p", 0.9, "--seed", seed, "--max-new-tokens", 24)
        return generated(mote, "full", QUESTION, *options)["stages"]

    assert drawn(1) == drawn(1) != drawn(2)


def test_stages_stream_with_labels_and_a_last_line(mote):
    code, out, err = mote("generate", "full", QUESTION, "--path=full", "--check", "--max-new-tokens", 32)
    assert code == 0 and ESCAPE not in out
    assert labels(out) == STAGES
    assert re.search(r"^\[check\] (safe|unsafe)$", out, flags=re.MULTILINE)
    assert re.fullmatch(
        r"analysis \d+ → guidance \d+ → response \d+ → check 1 · 32 tokens in [\d.]+ s, [\d.]+ tokens/s · "
        r"verdict (un)?safe · stop check:end",
        last_line(err),
    )


def test_hidden_stages_are_absent(mote):
    options = ("full", QUESTION, "--path=full", "--max-new-tokens", 32, "--hide", "analysis", "guidance")
    code, out, err = mote("generate", *options)
    assert code == 0 and labels(out) == ["response"]
    assert last_line(err).startswith("analysis ")  # that it took time is no secret
    found = generated(mote, *options)
    assert [piece["stage"] for piece in found["stages"]] == ["response"]
    assert found["path"] == STAGES[:3]
    assert labels(mote("generate", *options[:-3], "--hide=analysis,response")[1]) == ["guidance"]


@pytest.fixture
def judged(made, monkeypatch):
    """Makes every verdict the one given, whatever the model thinks."""

    def judge(verdict):
        threshold = 0.0 if verdict == "safe" else 1.0
        load = folders.load_model

        def load_judging(*args, **kwargs):
            model = load(*args, **kwargs)
            model.config.check_threshold = threshold
            return model

        monkeypatch.setattr(folders, "load_model", load_judging)

    return judge


@pytest.mark.parametrize("option", ["--check=enforce", "--path=escalate"])
def test_of_an_unsafe_answer_the_refusal_alone_is_shown(mote, judged, option):
    judged("unsafe")
    options = ("full", QUESTION, "--path=full", option, "--max-new-tokens", 32)
    code, out, err = mote("generate", *options)
    assert (code, out) == (0, f"[response] {mote_ext.MoTEConfig.refusal}\n")
    assert " · refused · " in last_line(err) and "verdict unsafe · stop response:refusal" in last_line(err)
    found = generated(mote, *options)
    assert [(piece["stage"], piece["text"]) for piece in found["stages"]] == [("response", mote_ext.MoTEConfig.refusal)]
    assert (found["verdict"], found["stop_reason"], found["path"]) == ("unsafe", "response:refusal", ["response"])


def test_a_safe_answer_is_shown_in_order(mote, judged):
    judged("safe")
    code, out, err = mote("generate", "full", QUESTION, "--path=analysis", "--check=enforce", "--max-new-tokens", 32)
    assert code == 0 and labels(out) == ["analysis", "response", "check"]
    assert "verdict safe" in last_line(err)


def test_untrained_experts_on_a_plain_base(mote):
    code, out, err = mote("generate", "--base", "base", QUESTION, "--path=full", "--max-new-tokens", 16)
    assert code == 0 and labels(out) == STAGES[:3]
    assert "untrained experts on base" in err


# ---- colours


@pytest.mark.parametrize(
    "mode, terminal, no_color, coloured",
    [
        ("auto", True, None, True),
        ("auto", True, "1", False),
        ("auto", False, None, False),
        ("never", True, None, False),
        ("always", False, "1", True),
    ],
)
def test_when_there_are_colours(monkeypatch, mode, terminal, no_color, coloured):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    screen = Screen(Terminal() if terminal else io.StringIO(), mode)
    screen.line("text", "bold", "green")
    assert screen.stream.getvalue() == ("\x1b[1;32mtext\x1b[0m\n" if coloured else "text\n")


def test_colours_tell_stages_apart(mote):
    code, out, err = mote("generate", "full", QUESTION, "--path=full", "--color=always", "--max-new-tokens", 16)
    opened = re.findall(r"\x1b\[([0-9;]+)m\[(\w+)\]\x1b\[0m ", out)
    assert code == 0 and [stage for _, stage in opened] == STAGES[:3]
    assert len({codes for codes, _ in opened}) == 3
    assert err.splitlines()[-1].startswith("\x1b[2m") and err.endswith("\x1b[0m\n")


def test_text_cannot_steer_the_terminal(made):
    screen = Screen(io.StringIO())
    show = StageScreen(screen, made.model.routing.table, {})
    for text in ("\n ", "ab\x1b[2J", "c\nd"):
        show(mote_ext.StageText("response", text))
    show.end()
    assert screen.stream.getvalue() == "[response] ab␛[2Jc\nd\n"
    assert legible("\x07\x9b\x7f\tü") == "␇\ufffd␡\tü"


def test_tables_are_aligned():
    lines = table_lines(("name", "n"), [("漢字", 1), ("\x1b[1mb\x1b[0m", 12345)])
    assert lines == ["name       n", "漢字       1", "\x1b[1mb\x1b[0m     12,345"]


# ---- chat


def test_a_chat_remembers_plain_answers(mote, monkeypatch):
    asked = []
    answer = Answerer.answer

    def recorded(self, prompt, show=None):
        asked.append((self.wishes.path, prompt))
        return answer(self, prompt, show)

    monkeypatch.setattr(Answerer, "answer", recorded)
    typed = "/help\none\n/path full\n/path\ntwo\n/path nonsense\n/what\n\n/reset\n/path none\nthree\n/quit\nfour\n"
    code, out, err = mote("generate", "full", "--path=answer", "--max-new-tokens", 16, stdin=Terminal(typed))
    assert code == 0
    assert [path for path, _ in asked] == ["answer", "full", None]
    first, second, third = (messages for _, messages in asked)
    assert first == [{"role": "user", "content": "one"}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert f"[response] {legible(second[1]['content'])}" in out
    assert third == [{"role": "user", "content": "three"}]
    assert labels(out.replace("you> ", "")) == ["response", *STAGES[:3]]
    for remark in ("/reset ", "path full", "--path: one of", "there is no /what", "forgotten"):
        assert remark in err


def test_a_chat_ends_with_stdin_and_survives_ctrl_c(mote, monkeypatch):
    def stopped(self, prompt, show=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "answer", stopped)
    code, _, err = mote("generate", "full", stdin=Terminal("one\n"))
    assert code == 0 and "stopped; this turn is forgotten" in err


def test_without_a_chat_template_questions_stand_alone(mote, made, monkeypatch):
    load = folders.load_tokenizer

    def without_template(*args):
        tokenizer = load(*args)
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr(folders, "load_tokenizer", without_template)
    code, out, err = mote("generate", "full", "--path=answer", "--max-new-tokens=8", stdin=Terminal("one\ntwo\n"))
    assert code == 0 and "every question stands alone" in err
    assert labels(out.replace("you> ", "")) == ["response"] * 2


# ---- inspect


@pytest.mark.parametrize("folder", ["full", "adapter"])
def test_inspect_counts_what_the_model_has(mote, made, folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)  # no weights are loaded
    code, out, _ = mote("inspect", folder, "--json")
    found = json.loads(out)
    model, config = made.model, made.model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters = found["parameters"]
    assert code == 0 and found["kind"] == folder
    assert (parameters["trained"], parameters["all"]) == (trained, total)
    assert parameters["trained_percent"] == pytest.approx(100 * trained / total)
    assert parameters["experts"] == 5 * parameters["an_expert"]
    assert parameters["markers"] == trained - parameters["experts"]
    assert found["base"] == {
        "name": config.base_model_name_or_path,
        "revision": None,
        "digest": config.base_digest,
        "model_type": "llama",
        "vocab_size": 259,
    }
    assert len(found["targets"]) == 7 and sum(kind["parameters"] for kind in found["targets"]) == parameters["experts"]
    down = {"target": "layers.*.mlp.down_proj", "count": 2, "num_in": 48, "num_out": 32, "rank": 4, "parameters": 3200}
    assert down in found["targets"]
    assert [row["stage"] for row in found["stages"]] == [*STAGES, "shared"]
    ids = [row[name] for row in found["stages"][:4] for name in ("start_id", "end_id")]
    assert ids == config.marker_ids
    assert found["stages"][0]["next"] == ["guidance", "response"]


@pytest.mark.parametrize("folder", ["full", "adapter", "bare"])
def test_inspect_shows_tables(mote, made, folder):
    code, out, err = mote("inspect", folder)
    assert (code, err) == (0, "") and ESCAPE not in out
    for shown in (
        "layers.*.self_attn.q_proj",
        "<|endofguidance|>",
        "guidance, response",
        made.model.config.base_digest,
    ):
        assert shown in out
    assert last_line(out).startswith("trained  19,072 parameters of 51,168, 37.2733 %: ")


def test_inspect_follows_every_token(mote, made):
    code, out, _ = mote("inspect", "full", "--text", CHAIN, "--json")
    rows = json.loads(out)["tokens"]
    ids = made.tokenizer(CHAIN, add_special_tokens=False)["input_ids"]
    assert code == 0 and [row["id"] for row in rows] == ids
    assert [row["position"] for row in rows] == list(range(9))
    assert [row["stage_id"] for row in rows] == [-1, -1, 0, 0, 0, 2, 2, 2, -1]
    assert [row["stage"] for row in rows] == ["prompt"] * 2 + ["analysis"] * 3 + ["response"] * 3 + ["prompt"]
    assert [row["experts"] for row in rows[1:3]] == [["shared"], ["analysis", "shared"]]
    assert [row["token"] for row in rows[:4]] == ["H", "i", "<|analysis|>", "a"]
    assert json.loads(mote("inspect", "full", "--ids", ",".join(map(str, ids)), "--json")[1])["tokens"] == rows


def test_inspect_shows_tokens_and_says_that_markers_count(mote):
    code, out, err = mote("inspect", "adapter", "--text", CHAIN)
    assert code == 0 and "markers in this text count" in err
    assert len(out.splitlines()) == 10
    assert re.fullmatch(r" +2  259  '<\|analysis\|>' +0  analysis  analysis \+ shared", out.splitlines()[3])
    code, out, err = mote("inspect", "bare", "--ids", "40,259")
    assert (code, err) == (0, "") and re.search(r"259  \? +0  analysis", out)


# ---- errors: one line, exit code 2


@pytest.mark.parametrize(
    "argv, line",
    [
        (["speak"], "argument COMMAND: invalid choice: 'speak'"),
        (["generate"], "the following arguments are required: MODEL (see mote generate --help)"),
        (["generate", "nowhere", "x"], "there is no folder nowhere"),
        (["generate", "full/config.json", "x"], "full/config.json is a file; MODEL is the folder it lies in"),
        (["generate", ".", "x"], ". holds no model: there is no config.json"),
        (["generate", "base", "x"], "base holds a plain llama model, not MoTE; `mote generate --base` puts"),
        (["generate", "--base", "full", "x"], "full holds a MoTE model already; leave --base out"),
        (["generate", "bare", "x"], "bare has no tokenizer; put one there: tokenizer.save_pretrained('bare')"),
        (["generate", "full", " "], "the prompt is empty"),
        (["generate", "full"], "the prompt is empty"),
        (
            ["generate", "full", "x", "--path", "y"],
            "--path: one of adaptive, answer, analysis, guidance, full, escalate",
        ),
        (["generate", "full", "x", "--path", "analysis,guidance"], "generate: a path of stage names must follow"),
        (["generate", "full", "x", "--path", "none", "--check"], "--path none has no stage rules"),
        (["generate", "full", "x", "--hide", "y"], f"--hide: stage must be one of {STAGES}, got 'y'"),
        (
            ["generate", "full", "--hide", "check", "a question"],
            "argument --hide: stage names expected, got 'a question'; put",
        ),
        (
            ["generate", "full", "--check", "a question"],
            "argument --check: flag or enforce expected, got 'a question'; put",
        ),
        (
            ["generate", "full", "x", "--stage-max-tokens", "analysis"],
            "argument --stage-max-tokens: stage=number expected",
        ),
        (["generate", "full", "x", "--stage-max-tokens", "y=3"], f"stage must be one of {STAGES}, got 'y'"),
        (
            ["generate", "full", "x", "--max-new-tokens", "0"],
            "argument --max-new-tokens: a number of at least 1 expected",
        ),
        (
            ["generate", "full", "x", "--path=full", "--max-new-tokens", "3"],
            "generate: max_new_tokens must be at least",
        ),
        (["generate", "full", "x", "--device", "toaster"], "--device toaster: "),
        (["inspect", "nowhere"], "there is no folder nowhere"),
        (["inspect", "base"], "base holds a plain llama model"),
        (["inspect", "bare", "--text", "x"], "bare has no tokenizer"),
        (["inspect", "full", "--text", ""], "there are no tokens in an empty text"),
        (["inspect", "full", "--ids", "1,x"], "argument --ids: token ids with commas between them expected"),
        (["inspect", "full", "--ids", "1,999"], "--ids: token ids must be below 267, got 999"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(mote, argv, line):
    code, out, err = mote(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith(f"mote: {line}")


def test_json_is_not_for_chats(mote):
    code, out, err = mote("generate", "full", "--json", stdin=Terminal("x\n"))
    assert (code, out, err) == (2, "", "mote: --json answers one prompt: give PROMPT, or pipe it in\n")


def test_debug_shows_the_traceback(mote):
    code, _, err = mote("inspect", "nowhere", "--debug")
    assert code == 2 and err.startswith("Traceback") and last_line(err) == "mote: there is no folder nowhere"


def test_a_damaged_folder_is_one_line(mote, made, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (made.root / "adapter").iterdir():
        (damaged / path.name).write_bytes(
            path.read_bytes()[:200] if path.suffix == ".safetensors" else path.read_bytes()
        )
    for command in (["inspect", damaged], ["generate", damaged, "x"]):
        code, out, err = mote(*command)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "damaged" in err.removeprefix(f"mote: {damaged}")
    (damaged / "mote_experts.safetensors").unlink()
    assert "no weights" in mote("inspect", damaged)[2]


def test_a_base_that_has_gone_is_said(mote, made, tmp_path):
    for path in (made.root / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"/base", b"/gone"))
    code, out, err = mote("generate", tmp_path, "x")
    assert (code, out) == (2, "") and err.startswith(f"mote: the base of {tmp_path} is not here: ")
    assert mote("inspect", tmp_path)[0] == 0


def test_a_tokenizer_of_another_model_is_refused(mote, made, tmp_path):
    for path in (made.root / "bare").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_tokenizer().save_pretrained(tmp_path)
    code, out, err = mote("generate", tmp_path, "x")
    assert (code, out) == (2, "") and "<|analysis|> is None there, 259 in config.json" in err


@pytest.mark.parametrize(
    "path, check, holds",
    [("full", False, False), ("full", "flag", False), ("full", "enforce", True), ("escalate", False, True)],
)
def test_what_is_judged_first_is_not_streamed(path, check, holds):
    assert Wishes(path=path, check=check).judges_first is holds
