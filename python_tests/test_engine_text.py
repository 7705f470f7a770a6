"""Text while it comes: pieces that add up, whole characters, no half of a stop text, stages kept apart."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_config, make_tokenizer

import mote_ext
from mote_ext.engine.text import StageReader, split_text
from mote_ext.stages import PROMPT

TOKENIZER = make_tokenizer()
TABLE = make_config(marker_ids=None).stage_table
IDS = mote_ext.set_up_tokenizer(TOKENIZER, TABLE)
TABLE = make_config(marker_ids=IDS).stage_table
RESPONSE = TABLE.names[TABLE.response]


def ids_of(text):
    return mote_ext.encode_text(TOKENIZER, text)


def chain(*texts):
    """analysis, guidance, … one text each."""
    return [token for i, text in enumerate(texts) for token in (TABLE.start_id(i), *ids_of(text), TABLE.end_id(i))]


def read(tokens, sizes=(1,), **options):
    """Pieces of a whole run, tokens given in groups of these sizes."""
    reader, pieces, place = StageReader(TOKENIZER, TABLE, **options), [], 0
    for size in itertools.cycle(sizes):
        if place >= len(tokens):
            break
        pieces += reader.take(tokens[place : place + size])
        place += size
    return [*pieces, reader.finish()], reader


def joined(pieces):
    texts = {}
    for stage, text, _ in pieces:
        texts[stage] = texts.get(stage, "") + text
    return {stage: text for stage, text in texts.items() if text}


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_pieces_add_up_to_the_stages_texts(texts, sizes):
    tokens = chain(*texts)
    pieces, _ = read(tokens, sizes)
    expected = [(stage, text) for stage, text in mote_ext.parse_stages(TOKENIZER, tokens) if text]
    assert joined(pieces) == dict(expected)
    assert [pair for pair in split_text(TOKENIZER, tokens, TABLE) if pair[1]] == expected
    assert [token for _, _, ids in pieces for token in ids] == tokens
    assert all("\N{REPLACEMENT CHARACTER}" not in text or any("\N{REPLACEMENT CHARACTER}" in t for t in texts)
               for _, text, _ in pieces)  # fmt: skip


def test_no_piece_holds_half_of_a_character():
    pieces, _ = read(chain("Grüße, 東京 🙂"))
    assert [text for _, text, _ in pieces if text] == list("Grüße, 東京 🙂")


def test_bytes_that_are_no_character_come_out_at_the_end_of_their_stage():
    broken = ids_of("é")[:1]
    tokens = [TABLE.start_id(0), *ids_of("a"), *broken, TABLE.end_id(0), TABLE.start_id(2), *ids_of("b")]
    pieces, _ = read(tokens)
    assert joined(pieces) == {"analysis": "a\N{REPLACEMENT CHARACTER}", "response": "b"}


def test_a_token_belongs_to_the_stage_whose_marker_it_is():
    tokens = chain("a", "b")
    pieces, _ = read(tokens, sizes=[len(tokens)])
    assert [(stage, ids) for stage, _, ids in pieces if ids] == [
        ("analysis", tokens[:3]),
        ("guidance", tokens[3:]),
    ]


STOPS = (("END",), ("aab",), ("\n\n", "\nQ"), ("é!",), ("aa", "aab"))


@settings(deadline=None, max_examples=120)
@given(st.text("ENDab\nQé!", max_size=14), st.sampled_from(STOPS), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_what_stands_before_a_stop_text_is_kept_and_no_half_of_one_is_shown(text, stops, sizes):
    """Whatever has been shown at any time must begin what stands before the first stop text."""
    tokens = chain("x" + stops[0] + "y", "", text)  # in the analysis it means nothing
    pieces, reader = read(tokens, sizes, stop=stops, stop_stage=RESPONSE)
    ends = [text.find(stop) for stop in stops if stop in text]
    expected = text[: min(ends)] if ends else text
    assert reader.stopped == bool(ends)
    assert joined(pieces).get(RESPONSE, "") == expected == reader.stop_text
    assert joined(pieces)["analysis"] == "x" + stops[0] + "y"


def test_without_stages_a_stop_text_counts_anywhere():
    pieces, reader = read(ids_of("one STOP two"), stop=("STOP",))
    assert reader.stopped and joined(pieces) == {PROMPT: "one "} and reader.stop_text == "one "


def test_a_restarted_reader_remembers_nothing():
    reader = StageReader(TOKENIZER, TABLE, ("b",), RESPONSE)
    reader.take([TABLE.start_id(2), *ids_of("ab")])
    assert reader.stopped
    reader.restart()
    pieces = reader.take([TABLE.start_id(2), *ids_of("c")])
    assert not reader.stopped and joined(pieces) == {RESPONSE: "c"}


def test_decoding_is_linear_in_the_tokens(monkeypatch):
    lengths = []
    decode = TOKENIZER.decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids, **kw: (lengths.append(len(ids)), decode(ids, **kw))[1])
    read(chain("a" * 200))
    assert max(lengths) <= 4


@pytest.mark.parametrize("text", ["", "\N{REPLACEMENT CHARACTER}x"])
def test_texts_that_look_unfinished_are_whole_at_the_end(text):
    assert joined(read(chain(text))[0]) == ({"analysis": text} if text else {})
