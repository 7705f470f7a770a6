"""Stage ids from tokens, the table, and splitting a chain into its stages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ENDS, MARKER_IDS, STARTS, chain, make_tokenizer

import mote_ext
from mote_ext import Stage, StageTable
from mote_ext.config import MoTEConfig

TABLE = MoTEConfig(marker_ids=MARKER_IDS).stage_table


def ids_of(tokens, **options):
    return mote_ext.stage_ids_from_tokens(torch.tensor(tokens), TABLE, **options).tolist()


def by_hand(row, prompt_id, positions=None):
    """The definition, one token after the other."""
    current, found = prompt_id, []
    for place, token in enumerate(row):
        if positions is not None and positions[place] == 0:
            current = prompt_id
        if token in STARTS:
            current = STARTS.index(token)
        found.append(ENDS.index(token) if token in ENDS else current)
        if token in ENDS:
            current = prompt_id
    return found


def test_the_journey_of_eight_tokens():
    table = StageTable([Stage("analysis", next=("response",)), Stage("response", role="response")], [60, 61, 62, 63])
    row = torch.tensor([[10, 11, 60, 12, 61, 62, 13, 63]])
    assert mote_ext.stage_ids_from_tokens(row, table).tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1]]


@given(
    st.lists(st.lists(st.sampled_from([*MARKER_IDS, 1, 2, 3]), min_size=9, max_size=9), min_size=1, max_size=3),
    st.sampled_from([-2, -1, 0, 3]),
    st.booleans(),
)
@settings(deadline=None)
def test_any_tokens_have_the_ids_of_the_definition(rows, prompt_id, packed):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]) if packed else None
    expected = [by_hand(row, prompt_id, positions[0].tolist() if packed else None) for row in rows]
    assert ids_of(rows, prompt_id=prompt_id, position_ids=positions) == expected


def test_prompt_id_may_differ_row_by_row():
    rows = [[1, *chain(0), 1], [1, *chain(0), 1]]
    found = ids_of(rows, prompt_id=torch.tensor([[-2], [3]]))
    assert [row[0] for row in found] == [row[-1] for row in found] == [-2, 3]
    assert found[0][1:-1] == found[1][1:-1] == [0] * 5


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_short_rows(num_tokens):
    assert ids_of([[5] * num_tokens]) == [[-1] * num_tokens]


def test_one_compiled_graph_serves_any_tokens():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda ids: mote_ext.stage_ids_from_tokens(ids, TABLE, prompt_id=-1), fullgraph=True, backend=count
    )
    for seed in range(3):
        row = torch.tensor([chain(0, 1, 2, seed=seed)])
        assert compiled(row).tolist() == ids_of(row.tolist())
    assert len(graphs) == 1


def test_parse_stages_splits_generated_ids():
    tokenizer = make_tokenizer()
    ids = mote_ext.set_up_tokenizer(tokenizer, MoTEConfig().stage_table)
    text = "hi<|analysis|>why<|endofanalysis|><|response|>because<|endofresponse|>"
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row[2] == ids[0]
    stages = [("prompt", "hi"), ("analysis", "why"), ("response", "because")]
    assert mote_ext.parse_stages(tokenizer, row) == stages
    assert mote_ext.parse_stages(tokenizer, torch.tensor([*row, tokenizer.pad_token_id])) == stages
    cut = mote_ext.parse_stages(tokenizer, row[:5])
    assert cut == [("prompt", "hi"), ("analysis", "wh")]
    with pytest.raises(ValueError, match="a row"):
        mote_ext.parse_stages(tokenizer, [row])
    with pytest.raises(ValueError, match="set_up_tokenizer"):
        mote_ext.parse_stages(make_tokenizer(), row)


WRONG_TABLES = [
    ([Stage("a", next=("r",))], None, "response"),
    ([Stage("r", role="response"), Stage("s", role="response")], None, "response"),
    ([Stage("a", next=("b",)), Stage("r", role="response")], None, "'b'"),
    ([Stage("r", role="response"), Stage("a", next=("r",))], None, "after it"),
    ([Stage("a"), Stage("r", role="response")], None, "lead"),
    ([Stage("r", role="response"), Stage("r", role="check")], None, "differ"),
    ([Stage("c", role="check"), Stage("r", role="response")], None, "must be the last stage"),
    ([Stage("r", role="response")], [1], "2 different"),
    ([Stage("r", role="response")], [1, 1], "2 different"),
    ([Stage("r", role="response")], [-1, 1], "2 different"),
]


@pytest.mark.parametrize("stages, ids, message", WRONG_TABLES)
def test_tables_that_mean_nothing_are_refused(stages, ids, message):
    with pytest.raises(ValueError, match=message):
        StageTable(stages, ids)


@pytest.mark.parametrize("name", ["", "Analysis", "prompt", "shared", "none", "random", "endofx", "a|b"])
def test_names_that_cannot_be_markers_are_refused(name):
    with pytest.raises(ValueError, match="name"):
        Stage(name)
