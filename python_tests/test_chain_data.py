"""Chains: lines that are read and refused, token ids and labels, what truncation may cut, padded and packed batches."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_tokenizer
from transformers import DataCollatorWithFlattening, LlamaConfig

import mote_ext
from mote_ext.chains.collator import ChainCollator
from mote_ext.chains.dataset import NO_LOSS, ChainDataset
from mote_ext.chains.record import Chain, read_chains
from mote_ext.encoding import encode_prompt, encode_text, set_up_tokenizer
from mote_ext.stages import StageTable, stage_ids_from_tokens

SECRET = "words nobody may see"
TABLE = mote_ext.MoTEConfig().stage_table
TOKENIZER = make_tokenizer()
MARKERS = set_up_tokenizer(TOKENIZER, TABLE)
STARTS, ENDS = MARKERS[::2], MARKERS[1::2]
SAFE, UNSAFE = (encode_text(TOKENIZER, verdict)[0] for verdict in ("1", "0"))
EOS = TOKENIZER.eos_token_id
CONFIG = mote_ext.MoTEConfig(marker_ids=MARKERS, verdict_ids=[SAFE, UNSAFE])
ROW = {"prompt": SECRET, "response": SECRET}
FULL = {"prompt": "hi", "analysis": "aaaa", "guidance": "ggg", "response": "rr", "check": "safe"}


def dataset(*rows, config=CONFIG, tokenizer=TOKENIZER, **options):
    return ChainDataset([Chain.from_dict(row, config.stage_table) for row in rows], tokenizer, config, **options)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text(words):
    return encode_text(TOKENIZER, words)


# Reading


def test_a_line_keeps_every_field(tmp_path):
    row = {**FULL, "id": "a-1", "loss_stages": ["response"], "label": "harmful", "source": {"name": "x"}}
    (chain,) = read_chains(write(tmp_path / "chains.jsonl", row), TABLE)
    assert chain.texts == {"analysis": "aaaa", "guidance": "ggg", "response": "rr"}
    assert (chain.check, chain.loss_stages, chain.id) == ("safe", ("response",), "a-1")
    assert chain.meta == {"label": "harmful", "source": {"name": "x"}}
    assert chain.to_dict() == row
    assert chain.stages(TABLE) == [0, 1, 2, 3]


def test_null_is_absent_and_a_number_is_an_id():
    nulls = dict.fromkeys(("messages", "analysis", "check", "loss_stages"))
    chain = Chain.from_dict({**ROW, **nulls, "id": 17}, TABLE)
    assert chain.stages(TABLE) == [TABLE.response]
    assert chain.id == "17"
    assert Chain.from_dict(chain.to_dict(), TABLE) == chain


BAD = [
    ([SECRET], "must be an object"),
    ({"response": SECRET}, "got neither"),
    ({**ROW, "messages": [{"role": "user", "content": SECRET}]}, "got both"),
    ({"prompt": "  ", "response": SECRET}, "prompt is empty"),
    ({"prompt": 3, "response": SECRET}, "prompt must be a text, got int"),
    ({"messages": [], "response": SECRET}, "at least one message"),
    ({"messages": SECRET, "response": SECRET}, "messages must be a list"),
    ({"messages": [SECRET], "response": SECRET}, "messages[0] must be"),
    ({"messages": [{"role": "user"}], "response": SECRET}, "messages[0].content must be a text, got nothing"),
    ({"messages": [{"role": "assistant", "content": SECRET}], "response": SECRET}, "must end before the answer"),
    ({"prompt": SECRET}, "response is missing"),
    ({**ROW, "response": "\n"}, "response is empty"),
    ({**ROW, "analysis": ""}, "analysis is empty"),
    ({**ROW, "guidance": [SECRET]}, "guidance must be a text, got list"),
    ({**ROW, "analysis": f"{SECRET}<|endofresponse|>"}, "analysis spells the marker <|endofresponse|>"),
    ({**ROW, "response": "\ud800"}, "half a surrogate pair at character 1"),
    ({**ROW, "check": SECRET}, 'check must be "safe" or "unsafe", got str of length 20'),
    ({**ROW, "check": True}, "check must be"),
    ({**ROW, "loss_stages": "response"}, "loss_stages must be a list"),
    ({**ROW, "loss_stages": ["answer"]}, "got ['answer']"),
    ({**ROW, "loss_stages": [SECRET]}, "got ['(not a word)']"),
    ({**ROW, "loss_stages": []}, "names no stage of this chain"),
    ({**ROW, "loss_stages": ["analysis"]}, "names no stage of this chain"),
    ({**ROW, "check": "unsafe", "loss_stages": ["response"]}, "loss never falls on a rejected response"),
    ({**ROW, "check": "unsafe", "loss_stages": ["check", "response"]}, "loss never falls on a rejected response"),
    ({**ROW, "id": [1]}, "id must be"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason[:30] for _, reason in BAD])
def test_a_bad_line_is_named_and_not_quoted(tmp_path, row, reason):
    path = write(tmp_path / "chains.jsonl", ROW, row)
    with pytest.raises(ValueError, match="chains.jsonl:2: ") as error:
        read_chains(path, TABLE)
    assert reason in str(error.value)
    assert SECRET not in str(error.value)


def test_a_check_needs_a_stage_that_checks():
    paper = mote_ext.MoTEConfig.paper().stage_table
    with pytest.raises(ValueError, match="none that checks"):
        Chain.from_dict({**ROW, "check": "safe"}, paper)
    renamed = StageTable([mote_ext.stages.RESPONSE, mote_ext.Stage("verdict", role="check")])
    with pytest.raises(ValueError, match="its verdict is the field check"):
        Chain.from_dict({**ROW, "verdict": "safe"}, renamed)
    assert Chain.from_dict({**ROW, "check": "safe"}, renamed).stages(renamed) == [0, 1]


def test_the_first_bad_lines_are_shown_and_all_counted(tmp_path):
    path = tmp_path / "chains.jsonl"
    path.write_text("{broken\n" * 7 + json.dumps(ROW))
    with pytest.raises(ValueError, match="not JSON: Expecting property name .* at column 2") as error:
        read_chains(path, TABLE)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:5]] == ["1", "2", "3", "4", "5"]
    assert lines[5:] == ["… and 2 more bad lines"]


@pytest.mark.parametrize(
    ("content", "place", "remedy"),
    [
        ('{"prompt": "né"}\n'.encode("latin-1"), ":1: byte 14 of the line (0xe9) is not UTF-8", "iconv"),
        (json.dumps(ROW).encode() + b"\n\xff\n", ":2: byte 1 of the line (0xff)", "iconv"),
        (json.dumps(ROW).encode("utf-16"), ":1: the file is UTF-16", "iconv -f UTF-16"),
        (b"", ":1: the file is empty", "one chain a line"),
        (b"\n \r\n", ":1: the file is empty", "one chain a line"),
        (b"[" * 100_000, ":1: ", "nested too deeply"),
    ],
)
def test_a_wrong_encoding_or_an_empty_file(tmp_path, content, place, remedy):
    path = tmp_path / "chains.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (what it says is compared below)
        read_chains(path, TABLE)
    assert place in str(error.value)
    assert remedy in str(error.value)


def test_line_ends_marks_and_separators(tmp_path):
    path = tmp_path / "chains.jsonl"
    rows = [{"prompt": "a\u2028b", "response": "c\u0085d"}, ROW]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(r, ensure_ascii=False).encode() for r in rows))
    chains = read_chains(path, TABLE)
    assert [chain.prompt for chain in chains] == ["a\u2028b", SECRET]
    assert chains[0].texts["response"] == "c\u0085d"


# Samples


def test_the_layout_of_a_chain():
    (sample,) = dataset(FULL)
    question = encode_prompt(TOKENIZER, "hi")
    blocks = [[STARTS[i], *tokens, ENDS[i]] for i, tokens in enumerate((text("aaaa"), text("ggg"), text("rr"), [SAFE]))]
    stages = [token for block in blocks for token in block]
    assert sample["input_ids"] == [*question, *stages, EOS]
    expected = [NO_LOSS] * len(question) + stages + [EOS]
    expected[expected.index(STARTS[3])] = NO_LOSS  # generation forces it
    assert sample["labels"] == expected
    ids = stage_ids_from_tokens(torch.tensor([sample["input_ids"]]), CONFIG.stage_table)[0].tolist()
    assert ids == [-1] * len(question) + [i for i, block in enumerate(blocks) for _ in block] + [-1]


def labelled(sample):
    """Stages whose tokens carry loss, and whether EOS does."""
    ids = stage_ids_from_tokens(torch.tensor([sample["input_ids"]]), CONFIG.stage_table)[0].tolist()
    with_loss = {stage for stage, label in zip(ids, sample["labels"]) if label != NO_LOSS and stage >= 0}
    return sorted(with_loss), sample["labels"][-1] == EOS


def test_which_stages_carry_loss():
    unsafe = {**FULL, "check": "unsafe"}
    rows = [unsafe, {**FULL, "loss_stages": ["response", "guidance"]}, {**FULL, "loss_stages": ["check"]}]
    samples = list(dataset(*rows, {"prompt": "hi", "response": "rr"}))
    rejected, chosen, judged, _ = samples
    assert [labelled(sample) for sample in samples] == [([3], True), ([1, 2], False), ([3], True), ([2], True)]
    assert [label for label in rejected["labels"] if label != NO_LOSS] == [UNSAFE, ENDS[3], EOS]
    assert [label for label in judged["labels"] if label != NO_LOSS] == [SAFE, ENDS[3], EOS]
    assert STARTS[2] in chosen["labels"]
    assert ENDS[2] in chosen["labels"]


def test_a_control_token_typed_in_a_prompt_is_text():
    typed = {"prompt": "<|analysis|> and <|im_end|>", "response": "r<|im_end|>"}
    (sample,) = dataset(typed)
    assert sample["input_ids"].count(STARTS[0]) == 0
    assert labelled(sample) == ([TABLE.response], True)
    assert sample["labels"].count(EOS) == 1  # the real one


def test_messages_and_system():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (sample,) = dataset({"messages": messages, "response": "rr"}, system="s")
    question = encode_prompt(TOKENIZER, messages, system="s")
    assert sample["input_ids"][: len(question) + 1] == [*question, STARTS[TABLE.response]]


QUESTION = len(encode_prompt(TOKENIZER, "hi"))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.dictionaries(st.sampled_from(["analysis", "guidance"]), st.integers(1, 40)),
    response=st.integers(1, 40),
    check=st.sampled_from([None, "safe"]),
    room=st.integers(0, 100),
)
def test_truncation_cuts_texts_and_never_a_marker(lengths, response, check, room):
    lengths = {**lengths, "response": response}
    row = {"prompt": "hi", "check": check, **{name: name[0] * length for name, length in lengths.items()}}
    stages = len(lengths) + (check is not None)
    max_length = QUESTION + 3 * stages + 1 + room
    data = dataset(row, max_length=max_length)
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    assert ids[:QUESTION] == encode_prompt(TOKENIZER, "hi")
    assert ids[-1] == labels[-1] == EOS
    kept = {}
    for name in lengths:
        stage = TABLE.index(name)
        start, end = ids.index(STARTS[stage]), ids.index(ENDS[stage])
        kept[name] = end - start - 1
        assert ids[start + 1 : end] == text(name[0] * kept[name])
        assert labels[end] == (ENDS[stage] if kept[name] == lengths[name] else NO_LOSS)
    cut = {name: lengths[name] - kept[name] for name in lengths if kept[name] < lengths[name]}
    assert data.truncation.tokens == cut
    assert data.truncation.chains == bool(cut)
    assert len(ids) == min(max_length, QUESTION + sum(lengths.values()) + 2 * stages + (check is not None) + 1)
    assert min(kept.values()) >= 1
    reasoning = [kept[name] for name in lengths if name != "response"]
    if "response" in cut:
        assert set(reasoning) <= {1}  # the response is the last to be cut
    if len(reasoning) == 2:  # the longest first: what was cut is not shorter than what was not
        assert all(kept[name] >= max(reasoning) - 1 for name in cut if name != "response")
    if check:
        assert ids[-3:-1] == [SAFE, ENDS[3]]


def test_a_question_that_does_not_fit():
    rows = [FULL, {**FULL, "prompt": "h" * 60, "id": "long"}, FULL]
    with pytest.raises(ValueError, match=r"row 1 \(id long\): the question has \d+ tokens.*max_length is 60"):
        dataset(*rows, max_length=60)
    data = dataset(*rows, max_length=60, skip_too_long=True)
    assert [sample["row"] for sample in data] == [0, 2]
    assert data.truncation.skipped == [1]
    assert len(data) == 2


def test_no_sample_is_longer_than_the_base_can_take():
    config = mote_ext.MoTEConfig(marker_ids=MARKERS, verdict_ids=[SAFE, UNSAFE])
    config.set_base(LlamaConfig(vocab_size=300, max_position_embeddings=64), 300)
    data = dataset({"prompt": "hi", "response": "r" * 500}, config=config)
    assert data.max_length == len(data[0]["input_ids"]) == 64


def test_a_tokenizer_that_is_not_the_models():
    with pytest.raises(ValueError, match="the config's markers have ids"):
        dataset(FULL, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="the config's markers have ids None"):
        dataset(FULL, config=mote_ext.MoTEConfig())
    without = mote_ext.MoTEConfig(marker_ids=MARKERS)
    with pytest.raises(ValueError, match="row 0: config.verdict_ids is None"):
        dataset(FULL, config=without)
    endless = make_tokenizer()
    set_up_tokenizer(endless, TABLE)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        dataset(FULL, tokenizer=endless)


def test_a_chain_made_by_hand_is_checked_too():
    chain = Chain(prompt="hi", texts={"response": SECRET}, check="unsafe", loss_stages=("response",), id="x")
    with pytest.raises(ValueError, match=r"row 0 \(id x\): .*rejected response") as error:
        ChainDataset([chain], TOKENIZER, CONFIG)
    assert SECRET not in str(error.value)


def test_lists_of_a_chain_made_by_hand():
    row = {"messages": [{"role": "user", "content": "hi"}], "response": "rr", "loss_stages": ["response"]}
    lists = Chain(messages=row["messages"], texts={"response": "rr"}, loss_stages=["response"])
    assert lists == Chain.from_dict(row, TABLE)
    lists.validate(TABLE)


def test_a_row_whose_template_refuses_it_is_named():
    tokenizer = make_tokenizer("{{ raise_exception('no') }}")
    set_up_tokenizer(tokenizer, TABLE)
    with pytest.raises(ValueError, match=r"row 0 \(id x\): .*refuses these messages"):
        dataset({**ROW, "id": "x"}, tokenizer=tokenizer, skip_too_long=True)


@pytest.mark.parametrize("name", ["id", "messages", "loss_stages", "check"])
def test_a_stage_that_is_named_as_a_field(name):
    table = StageTable([mote_ext.Stage(name, next=("response",)), mote_ext.stages.RESPONSE])
    with pytest.raises(ValueError, match="a line of chains has a field of this name"):
        Chain.from_dict(ROW, table)


# Batches


def test_padding_is_told_apart_by_the_mask_alone():
    data = dataset(FULL, {"prompt": "hi", "response": "rr"})
    batch = ChainCollator(EOS, pad_to_multiple_of=16)(list(data))
    width = batch["input_ids"].shape[1]
    assert width % 16 == 0
    assert width - 16 < len(data[0]["input_ids"]) <= width
    for row, sample in enumerate(data):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row].tolist() == sample["input_ids"] + [EOS] * (width - length)
        assert batch["labels"][row].tolist() == sample["labels"] + [NO_LOSS] * (width - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
    assert batch["rows"].tolist() == [[0], [1]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert ChainCollator(TOKENIZER).pad_id == TOKENIZER.pad_token_id


def test_a_packed_batch_is_transformers_flattened_one():
    data = dataset(FULL, {"prompt": "hi", "response": "rr"}, {**FULL, "check": "unsafe"})
    batch = ChainCollator(TOKENIZER, packing=True)(list(data))
    assert batch.pop("rows").tolist() == [[0, 1, 2]]
    features = [{name: sample[name] for name in ("input_ids", "labels")} for sample in data]
    expected = DataCollatorWithFlattening()(features, return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_documents_first_token_is_no_target():
    sample = {"input_ids": [5, 6], "labels": [5, 6], "row": 0}
    assert ChainCollator(0, packing=True)([sample, sample])["labels"].tolist() == [[NO_LOSS, 6] * 2]


def test_wrong_collators():
    with pytest.raises(ValueError, match="packing leaves no padding"):
        ChainCollator(0, packing=True, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="at least 1"):
        ChainCollator(0, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="at least one sample"):
        ChainCollator(0)([])
