"""Step skipping: what is hidden is hidden and nothing else is, on every attention, padded and packed, beside sliding
windows; the draws; compact positions.
"""

import importlib

import pytest
import torch
from models import ARCHITECTURES, ENDS, KINDS, MARKER_IDS, PAD, STARTS, chain, make_base, make_model, twin
from transformers import AutoModelForCausalLM, JambaConfig, MambaConfig

import mote_ext
from mote_ext import keyed
from mote_ext.chains.attention_mask import AttentionForm
from mote_ext.chains.block_mask import StepSkipping

ANALYSIS, GUIDANCE, RESPONSE, CHECK = range(4)
TABLE = mote_ext.MoTEConfig(marker_ids=MARKER_IDS).stage_table
EOS = 2
QUESTION = [11, 12, 13, 14]
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
BY_THE_2D_MASK = "bloom"
EXACT = {"atol": 2e-5, "rtol": 1e-5}  # float32, other orders of summation


def make(name="llama", implementation="sdpa", kind="whole", **changes):
    """A model of this attention; the class may lack it, in which case the test does not apply."""
    try:
        return make_model(name, kind, base=make_base(name, attn_implementation=implementation, **changes))
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"{name} has no {implementation}")


@pytest.fixture(autouse=True)
def _flex_attention_uncompiled(monkeypatch):
    """On a CPU each of its compilations takes seconds, and some fail; one test below compiles it."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.compiler.set_stance("force_eager"):
        yield


def block(stage, *tokens):
    return [STARTS[stage], *tokens, ENDS[stage]]


def full_chain(analysis=(21, 22, 23), question=QUESTION):
    return [*question, *block(ANALYSIS, *analysis), *chain(GUIDANCE, RESPONSE, CHECK), EOS]


def padded(*rows, first_row=0, side="right"):
    width = max(len(row) for row in rows)
    fill = [[PAD] * (width - len(row)) for row in rows]
    join = (lambda row, pad: row + pad) if side == "right" else (lambda row, pad: pad + row)
    return {
        "input_ids": torch.tensor([join(row, pad) for row, pad in zip(rows, fill)]),
        "attention_mask": torch.tensor([join([1] * len(row), [0] * len(pad)) for row, pad in zip(rows, fill)]),
        "rows": torch.arange(first_row, first_row + len(rows))[:, None],
    }


def packed(*rows, first_row=0):
    return {
        "input_ids": torch.tensor([sum(rows, [])]),
        "position_ids": torch.tensor([[place for row in rows for place in range(len(row))]]),
        "rows": torch.arange(first_row, first_row + len(rows))[None],
    }


def run(model, batch, hidden=None, **options):
    """Logits [B, T, V]: with `hidden`, the blocks of all chains or a list for each, else without step skipping."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "rows"}
    with torch.no_grad():
        if hidden is not None:
            hidden = hidden if isinstance(hidden[0], list) else [hidden] * batch["rows"].numel()
            inputs = StepSkipping(TABLE, 0.5, **options).masked(model, AttentionForm.of(model), inputs, hidden)
        return model(**inputs, use_cache=False).logits  # with a cache transformers sees no documents


def text_of(ids, stage):
    """Where a stage's block stands in a chain of token ids, its markers included."""
    return slice(ids.index(STARTS[stage]), ids.index(ENDS[stage]) + 1)


BOTH_FROM_ANALYSIS = [(GUIDANCE, ANALYSIS), (RESPONSE, ANALYSIS), (CHECK, ANALYSIS)]


# Nothing is hidden, nothing changes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mask_that_hides_nothing_changes_nothing(name, implementation, kind):
    model = make(name, implementation, kind)
    short = [31, 32, *chain(RESPONSE, CHECK), EOS]
    batch = padded(full_chain(), short)
    if name == BY_THE_2D_MASK:
        with pytest.raises(ValueError, match="ALiBi"):
            StepSkipping(TABLE, 0.5).inputs(model, batch, 0)
        return
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(run(model, batch, [[], []])[there], run(model, batch)[there], **EXACT)
    if name == "opt":
        return  # transformers' OPT looks for no documents; with a mask it is kept from mixing them, as tested below
    both = packed(full_chain(), short)
    torch.testing.assert_close(run(model, both, [[], []]), run(model, both), **EXACT)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_flex_attention_computes_what_the_dense_mask_does(name):
    batches = padded(full_chain(), [31, 32, *chain(RESPONSE)]), packed(full_chain(), full_chain((24,)))
    dense, flex = make(name, "eager"), make(name, "flex_attention")
    hidden = [[(RESPONSE, ANALYSIS), (CHECK, GUIDANCE)], []]
    for batch in batches:
        there = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        got, expected = (run(model, batch, hidden)[there] for model in (flex, dense))
        torch.testing.assert_close(got, expected, **EXACT)
        assert not torch.allclose(got, run(flex, batch, [[], []])[there], atol=1e-2)


def test_flex_attention_compiled():
    batch = padded(full_chain())
    model, skipping = make("llama", "flex_attention"), StepSkipping(TABLE, 1)
    inputs = skipping.inputs(model, batch, 0)
    torch.compiler.reset()
    with torch.no_grad(), torch.compiler.set_stance("default"):
        got = model(**inputs).logits
    torch.compiler.reset()
    torch.testing.assert_close(got, run(make(), batch, list(skipping.pairs)), **EXACT)


# What is hidden is hidden


@pytest.mark.parametrize("batched", (padded, packed))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "whole"), ("llama", "in_place"), ("gpt2", "whole"), ("gemma2", "in_place"), ("opt", "in_place")],
)
def test_later_logits_do_not_depend_on_a_fully_hidden_stage(name, kind, implementation, batched):
    model = make(name, implementation, kind)
    other = [31, 32, *chain(RESPONSE), EOS]
    chains = [full_chain(text) for text in ((21, 22, 23), (41, 42, 43))]
    behind = slice(chains[0].index(STARTS[GUIDANCE]), len(chains[0]))  # EOS too
    hidden = [[*BOTH_FROM_ANALYSIS], []]
    one, two = (run(model, batched(ids, other), hidden)[0, behind] for ids in chains)
    assert torch.equal(one, two)
    one, two = (run(model, batched(ids, other), [[], []])[0, behind] for ids in chains)
    assert (one - two).abs().amax(-1).min() > 1e-4  # visible: every later token sees the change


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pair", [(late, early) for late in range(1, 4) for early in range(min(late, 2))])
def test_each_block_by_itself_in_one_layer(pair, implementation):
    """With one layer nothing reaches a token by a detour, so a block can be seen alone."""
    late, early = pair
    model = make("llama", implementation, num_hidden_layers=1)
    one, two = full_chain(), full_chain()
    place = one.index(STARTS[early]) + 1
    two[place] = 45
    changed = (run(model, padded(one), [[pair]]) - run(model, padded(two), [[pair]]))[0].abs().amax(-1) > 0
    expected = torch.arange(len(one)) >= place
    expected[text_of(one, late)] = False
    if late == CHECK:
        expected[-1] = False  # EOS sees what the last stage sees
    assert changed.tolist() == expected.tolist()


def test_a_hidden_stages_markers_are_hidden_with_it():
    model = make(num_hidden_layers=1)
    one, two = full_chain(), full_chain()
    two[text_of(one, ANALYSIS).start] = 45  # given as stage ids, the block stays analysis
    ids = torch.tensor([one])
    explicit = mote_ext.stages.stage_ids_from_tokens(ids, TABLE)
    form, skipping = AttentionForm.of(model), StepSkipping(TABLE, 0.5)
    inputs = skipping.masked(model, form, {"input_ids": ids}, [[(RESPONSE, ANALYSIS)]])
    with torch.no_grad():
        logits = [model(**{**inputs, "input_ids": torch.tensor([c]), "stage_ids": explicit}).logits for c in (one, two)]
    changed = (logits[0] - logits[1])[0].abs().amax(-1) > 0
    assert changed[text_of(one, GUIDANCE)].all()
    assert not changed[text_of(one, RESPONSE)].any()


def test_analysis_leaks_through_guidance():
    model = make()
    chains = [full_chain(text) for text in ((21, 22, 23), (41, 42, 43))]
    response = text_of(chains[0], RESPONSE)
    leaky, tight = [(RESPONSE, ANALYSIS)], [(RESPONSE, ANALYSIS), (GUIDANCE, ANALYSIS)]
    one, two = (run(model, padded(ids), [leaky])[0, response] for ids in chains)
    assert not torch.allclose(one, two, atol=1e-4)
    one, two = (run(model, padded(ids), [tight])[0, response] for ids in chains)
    assert torch.equal(one, two)


@pytest.mark.parametrize("early", ["question", RESPONSE])
def test_the_question_and_the_response_are_never_hidden(early):
    model, skipping = make(), StepSkipping(TABLE, 1)
    assert skipping.drawn(0, 0) == list(skipping.pairs)
    assert set(skipping.pairs) == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)}
    one, two = full_chain(), full_chain()
    place = 1 if early == "question" else one.index(STARTS[RESPONSE]) + 1
    two[place] = 45
    with torch.no_grad():
        logits = [model(**skipping.inputs(model, padded(ids), 0)).logits[0] for ids in (one, two)]
    changed = (logits[0] - logits[1]).abs().amax(-1) > 0
    assert changed.tolist() == [at >= place for at in range(len(one))]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_window_stays_in_force(name, implementation):
    """A one-layer model sees its window back and no further, with or without something hidden."""
    changes = {} if name == "mistral" else {"layer_types": ["sliding_attention"]}
    model = make(name, implementation, num_hidden_layers=1, **changes)
    ids = [*QUESTION, *block(ANALYSIS, *range(20, 24)), *block(GUIDANCE, 30, 31), *block(RESPONSE, *range(33, 41))]
    for place in (2, 6, 18):
        other = [45 if at == place else token for at, token in enumerate(ids)]
        for hidden in ([], [(RESPONSE, GUIDANCE)]):
            logits = [run(model, padded(tokens), [hidden])[0] for tokens in (ids, other)]
            changed = (logits[0] - logits[1]).abs().amax(-1) > 0
            assert changed.tolist() == [0 <= at - place < 8 for at in range(len(ids))]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("compact", [False, True])
def test_packed_and_padded_agree(name, compact):
    model = make(name, "eager")
    rows = [full_chain(), [31, 32, *chain(ANALYSIS, RESPONSE), EOS], full_chain((24,), [15])]
    hidden = [[(RESPONSE, ANALYSIS), (CHECK, GUIDANCE)], [(RESPONSE, ANALYSIS)], BOTH_FROM_ANALYSIS]
    together = run(model, packed(*rows), hidden, compact_positions=compact)[0]
    for side in ("right", "left"):
        batch = padded(*rows, side=side)
        alone = run(model, batch, hidden, compact_positions=compact)[batch["attention_mask"].bool()]
        torch.testing.assert_close(together, alone, **EXACT)


# Compact positions


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_fully_hidden_stage_with_compact_positions_is_as_if_it_was_absent(name, implementation):
    model = make(name, implementation)
    with_analysis = full_chain()
    analysis = text_of(with_analysis, ANALYSIS)
    without = with_analysis[: analysis.start] + with_analysis[analysis.stop :]
    expected = run(model, padded(without))[0, analysis.start :]
    got = run(model, padded(with_analysis), [BOTH_FROM_ANALYSIS], compact_positions=True)[0, analysis.stop :]
    torch.testing.assert_close(got, expected, **EXACT)
    spread = run(model, padded(with_analysis), [BOTH_FROM_ANALYSIS])[0, analysis.stop :]
    assert not torch.allclose(spread, expected, atol=1e-3)


def positions(hidden, *rows, batched=padded):
    model, skipping = make(), StepSkipping(TABLE, 0.5, compact_positions=True)
    batch = batched(*rows)
    del batch["rows"]
    return skipping.masked(model, AttentionForm.of(model), batch, hidden)["position_ids"]


def test_which_positions_close_up():
    ids = [11, 12, *chain(ANALYSIS, GUIDANCE, RESPONSE, length=1), EOS]
    straight = list(range(12))
    both = [(1, 0), (2, 0), (2, 1)]
    assert positions([[]], ids)[0].tolist() == straight
    assert positions([[(2, 0)]], ids)[0].tolist() == straight  # guidance still sees analysis
    assert positions([[(1, 0), (2, 0)]], ids)[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]
    assert positions([[(2, 1)]], ids)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    assert positions([both], ids)[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5]
    # The check, which this chain lacks, does not have to be cut off from analysis.
    assert positions([both, both], ids, ids, batched=packed)[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5] * 2


def test_compact_positions_of_a_question_of_one_token():
    """No later token gets position 0, at which a document would begin, for transformers and for the stage scan."""
    model, skipping = make(), StepSkipping(TABLE, 1, compact_positions=True)
    ids = full_chain(question=[11])
    with torch.no_grad():
        inputs = skipping.inputs(model, padded(ids), 0)
        model(**inputs)
    assert (inputs["position_ids"] == 0).sum() == 1
    expected = mote_ext.stages.stage_ids_from_tokens(torch.tensor([ids]), TABLE)
    assert torch.equal(model.last_stage_ids, expected)


# Draws


def test_draws_depend_on_seed_epoch_and_row_alone():
    skipping = StepSkipping(TABLE, 0.5, seed=3)
    names = TABLE.names
    for row in range(20):
        expected = [
            (late, early)
            for late, early in skipping.pairs
            if keyed.uniform("skip", 3, 7, row, names[late], names[early]) < 0.5
        ]
        assert skipping.drawn(7, row) == expected
    model = make()
    chains = [full_chain((20 + i,) * (i + 1)) for i in range(5)]
    batch = padded(*chains)
    mixed = padded(*(chains[i] for i in (3, 1, 4, 0)))
    mixed["rows"] = torch.tensor([[3], [1], [4], [0]])
    with torch.no_grad():
        straight, other = (model(**skipping.inputs(model, b, 7)).logits for b in (batch, mixed))
        whole = packed(*chains)
        together = model(**skipping.inputs(model, whole, 7)).logits[0].split([len(ids) for ids in chains])
    for place, row in enumerate((3, 1, 4, 0)):
        there = slice(0, len(chains[row]))
        torch.testing.assert_close(other[place, there], straight[row, there], **EXACT)
        torch.testing.assert_close(together[row], straight[row, there], **EXACT)
    drawn = {tuple(StepSkipping(TABLE, 0.5, seed).drawn(epoch, 0)) for seed in range(4) for epoch in range(4)}
    assert len(drawn) > 4


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_each_block_is_drawn_as_often_as_asked_and_by_itself(p):
    skipping, rows = StepSkipping(TABLE, p), 2000
    drawn = [skipping.drawn(0, row) for row in range(rows)]
    within = 4 * (p * (1 - p) / rows) ** 0.5
    for pair in skipping.pairs:
        assert abs(sum(pair in blocks for blocks in drawn) / rows - p) < within
    one, two = (2, 0), (2, 1)
    assert abs(sum(one in blocks and two in blocks for blocks in drawn) / rows - p * p) < within


def test_without_dropout_the_batch_is_as_it_was():
    batch = padded(full_chain())
    inputs = StepSkipping(TABLE, 0).inputs(make("bloom", "eager"), batch, 0)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert all(inputs[name] is batch[name] for name in inputs)
    assert "rows" in batch


# Training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_gradients_under_checkpointing_and_none_from_what_is_hidden(implementation, reentrant):
    model = make("llama", implementation).train()
    ids = full_chain()
    batch = padded(ids, [31, 32, *chain(RESPONSE)])
    form, skipping = AttentionForm.of(model), StepSkipping(TABLE, 0.5)
    del batch["rows"]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, text_of(ids, RESPONSE)] = batch["input_ids"][0, text_of(ids, RESPONSE)]
    inputs = skipping.masked(model, form, batch, [[(GUIDANCE, ANALYSIS), (RESPONSE, ANALYSIS)], []])

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    experts = [grad for name, grad in plain.items() if "lora_" in name]
    assert all(not grad[ANALYSIS].any() for grad in experts)  # the loss is the response's, which sees none of it
    assert all(torch.isfinite(grad).all() and grad[GUIDANCE].any() for grad in experts[:4])


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_bfloat16(implementation):
    model = make("gemma2", "eager") if implementation == "eager" else make("llama", "sdpa")
    model.to(torch.bfloat16)
    chains = [full_chain(text) for text in ((21, 22, 23), (41, 42, 43))]
    behind = slice(chains[0].index(STARTS[GUIDANCE]), None)
    one, two = (run(model, padded(ids), [BOTH_FROM_ANALYSIS])[0, behind] for ids in chains)
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, two)
    assert AttentionForm.of(model).dtype == torch.bfloat16
    StepSkipping(TABLE, 0.5).inputs(model, padded(*chains), 0)  # the trial passes in this precision


def test_a_random_prompt_expert_is_drawn_as_without_a_mask():
    model = make_model(train_prompt_expert="random").train()
    short = [31, 32, *chain(RESPONSE)]
    for batch in (padded(full_chain(), short), packed(full_chain(), short)):
        inputs = StepSkipping(TABLE, 0.5).inputs(model, batch, 0)
        del batch["rows"]
        routed = []
        for given in (batch, inputs):
            model(**given)
            routed.append(model.last_stage_ids.clone())
        assert torch.equal(*routed)


def test_a_plain_base_takes_the_mask_too():
    base = make_base("llama", vocab_size=70)
    chains = [full_chain(text) for text in ((21, 22, 23), (41, 42, 43))]
    behind = slice(chains[0].index(STARTS[GUIDANCE]), None)
    skipping = StepSkipping(TABLE, 1)
    with torch.no_grad():
        one, two = (base(**skipping.inputs(base, padded(ids), 0)).logits[0, behind] for ids in chains)
    assert torch.equal(one, two)


# Refusals


class Deaf(torch.nn.Module):
    """Attention as it is with some models: whatever the mask says, everything earlier is seen."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, attention_mask=None, **kwargs):
        return self.attention(*args, attention_mask=None, **kwargs)


def test_a_model_that_does_not_follow_the_mask_is_found_out():
    model = twin(make())
    layer = model.model.base.layers[1]
    layer.self_attn = Deaf(layer.self_attn)
    model.train()
    with pytest.raises(ValueError, match="LlamaModel with sdpa sees what the mask hides"):
        StepSkipping(TABLE, 0.5).inputs(model, padded(full_chain()), 0)
    assert all(module.training for module in model.modules())


def test_the_trial_leaves_no_trace_and_is_made_once(monkeypatch):
    model = make().train()
    model.model.base.norm.eval()
    model(input_ids=torch.tensor([QUESTION]))
    newest, modes = model.last_stage_ids, [module.training for module in model.modules()]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    skipping = StepSkipping(TABLE, 0.5)
    state = torch.random.get_rng_state()
    for _ in range(2):
        skipping.inputs(model, padded(full_chain()), 0)
    assert len(calls) == 3
    assert model.last_stage_ids is newest
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "LlamaModel runs flash_attention_2"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, r"kind \['chunked_attention'\]"),
        ({"attention_chunk_size": 4}, r"kind \['chunked_attention'\]"),
        ({"alibi": True}, "LlamaModel builds its ALiBi"),
    ],
)
def test_attentions_that_take_no_such_mask(change, reason):
    model = make()
    for name, value in change.items():
        setattr(model.model.base.config, name, value)
    with pytest.raises(ValueError, match=reason):
        StepSkipping(TABLE, 0.5).inputs(model, padded(full_chain()), 0)


def test_recurrent_layers_are_refused():
    sizes = {"vocab_size": 70, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**sizes, state_size=4)).eval()
    with pytest.raises(ValueError, match="MambaModel"):
        StepSkipping(TABLE, 0.5).inputs(mamba, padded(full_chain()), 0)
    options = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 1, "use_mamba_kernels": False}
    jamba = AutoModelForCausalLM.from_config(JambaConfig(**sizes, **options, attn_layer_offset=1)).eval()
    with pytest.raises(ValueError, match="JambaModel"):
        StepSkipping(TABLE, 0.5).inputs(jamba, padded(full_chain()), 0)


def test_wrong_batches_and_options():
    model, skipping = make(), StepSkipping(TABLE, 0.5)
    batch = padded(full_chain(), full_chain())
    with pytest.raises(ValueError, match='no "rows"'):
        skipping.inputs(model, {"input_ids": batch["input_ids"]}, 0)
    with pytest.raises(ValueError, match="has 2 sequences, its rows name 3"):
        skipping.inputs(model, {**batch, "rows": torch.arange(3)[:, None]}, 0)
    both = packed(full_chain(), full_chain())
    with pytest.raises(ValueError, match=r"has 2 documents .*, its rows name 1"):
        skipping.inputs(model, {**both, "rows": torch.zeros(1, 1, dtype=torch.int64)}, 0)
    with pytest.raises(ValueError, match="attention_mask must be"):
        skipping.inputs(model, {**batch, "attention_mask": torch.ones(2, 1, 4, 4)}, 0)
    with pytest.raises(ValueError, match=r"p_dropout must be in 0\.\.1, got 1\.5"):
        StepSkipping(TABLE, 1.5)
    with pytest.raises(ValueError, match="no marker ids"):
        StepSkipping(mote_ext.MoTEConfig().stage_table, 0.5)
