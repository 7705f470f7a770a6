"""A MoTE model of every architecture and both kinds: what its user's model was, plus experts routed token by token."""

import copy

import pytest
import torch
from closeness import assert_close
from models import (
    ARCHITECTURES,
    FOUR,
    KINDS,
    MARKER_IDS,
    VOCABULARY,
    chain,
    disturb,
    make_base,
    make_config,
    make_model,
    make_prompts,
    make_tokenizer,
    twin,
)
from torch import nn

import mote_ext
from mote_ext.inject import experts_of

PROMPT = [11, 12, 13]
ROW = torch.tensor([PROMPT + chain(0, 2)])
ROW_IDS = [-1] * 3 + [0] * 5 + [2] * 5


class Recorder:
    """The stage ids each MoTELinear saw, call by call, recomputations included."""

    def __init__(self, model):
        self.seen = {name: [] for name, _ in experts_of(model)}
        for name, layer in experts_of(model):
            layer.register_forward_pre_hook(self._hook(name))

    def _hook(self, name):
        def record(layer, args):
            self.seen[name].append(layer.context.ids_for(args[0]).reshape(-1).tolist())

        return record

    def assert_saw(self, *calls):
        assert self.seen
        for name, seen in self.seen.items():
            assert seen == list(calls), name


def all_in(stage, ids):
    return torch.full_like(ids, stage)


# ---- the identities


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_untrained_it_is_the_base_bit_for_bit(name, kind):
    base, inputs = make_base(name), make_prompts()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 3}
    expected_logits, expected = base(**inputs).logits, base.generate(**inputs, **options)
    model = make_model(name, kind, base=base, zero=True)
    logits = model(**inputs).logits
    assert torch.equal(logits[..., :VOCABULARY], expected_logits)
    assert logits.shape[-1] == VOCABULARY + len(MARKER_IDS)
    assert torch.equal(model.generate(**inputs, **options, path=None), expected)
    with disturb(model).disable_experts():
        labelled = model(**inputs, labels=inputs["input_ids"])
        assert torch.equal(labelled.logits, expected_logits) and labelled.loss.isfinite()
        assert torch.equal(model.generate(**inputs, **options, path=None), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOUR)
def test_all_tokens_in_one_stage_are_a_plain_lora_of_the_summed_weight(name, kind):
    model, inputs = make_model(name, kind), make_prompts(padded=False)
    ids = inputs["input_ids"]
    merged = {}
    for dtype in (torch.float32, torch.float64):
        plain = twin(model).to(dtype)
        with torch.no_grad():
            for _, layer in experts_of(plain):
                delta = sum(
                    layer.scales[e].to(dtype) * layer.lora_B[e] @ layer.lora_A[e] for e in (1, layer.num_stages)
                )
                weight = layer.base_layer.weight
                weight += delta if isinstance(layer.base_layer, nn.Linear) else delta.T
                layer.lora_B.zero_()
        merged[dtype] = plain(ids, stage_ids=all_in(-1, ids)).logits
    got = model(ids, stage_ids=all_in(1, ids)).logits
    assert_close("logits", got.detach(), merged[torch.float32].detach(), merged[torch.float64].detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOUR)
def test_every_layer_sees_each_tokens_stage(name, kind):
    model = make_model(name, kind)
    recorder = Recorder(model)
    model(ROW)
    assert model.last_stage_ids.tolist() == [ROW_IDS]
    model(ROW, stage_ids=all_in(1, ROW))
    recorder.assert_saw(ROW_IDS, [1] * ROW.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FOUR)
def test_gradient_checkpointing_changes_no_bit_and_recomputes_with_the_same_ids(name, kind, reentrant):
    """Two forwards before one backward: the recomputation of the first must not see the ids of the second."""
    other = torch.tensor([PROMPT + chain(1, 3)])
    gradients = []
    for checkpointed in (False, True):
        model = make_model(name, kind).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        recorder = Recorder(model)
        loss = model(ROW, labels=ROW).loss + 2 * model(other, labels=other).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        other_ids = [-1] * 3 + [1] * 5 + [3] * 5
        if checkpointed:
            for seen in recorder.seen.values():
                assert sorted(seen) == sorted([ROW_IDS, other_ids] * 2)
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][parameter]), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_multiplies_itself_is_what_the_model_computes(kind):
    """TRL runs the backbone and multiplies by the head's weight; the stages and the markers must be in both."""
    model = make_model("llama_tied", kind)
    hidden = model.base_model(input_ids=ROW).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    expected = model(ROW).logits
    assert model.last_stage_ids.tolist() == [ROW_IDS]
    double = twin(model).double()(ROW).logits.detach()
    assert_close("logits", logits.detach(), expected.detach(), double)
    got, want = (torch.autograd.grad(each.square().sum(), model.get_input_embeddings().rows)[0]
                 for each in (logits, expected))  # fmt: skip
    assert want.abs().max() > 0 and torch.allclose(got, want, rtol=1e-3)


# ---- the forward's arguments


@pytest.mark.parametrize("kind", KINDS)
def test_logits_to_keep_as_number_and_as_indices(kind):
    model = make_model(kind=kind)
    logits = model(ROW).logits
    for kept, expected in ((1, logits[:, -1:]), (4, logits[:, -4:]), (torch.tensor([2, 5]), logits[:, [2, 5]])):
        got = model(ROW, logits_to_keep=kept).logits
        assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_it_cannot_know_are_asked_for(kind):
    model = make_model(kind=kind)
    cache = model(ROW, use_cache=True).past_key_values
    token = torch.tensor([[11]])
    with pytest.raises(ValueError, match="past_key_values.*stage_ids"):
        model(token, past_key_values=cache)
    assert model(token, past_key_values=cache, stage_ids=torch.tensor([[2]])).logits.shape[1] == 1
    embeds = model.get_input_embeddings()(ROW)
    with pytest.raises(ValueError, match="inputs_embeds.*stage_ids"):
        model(inputs_embeds=embeds)
    explicit = model(inputs_embeds=embeds, stage_ids=torch.tensor([ROW_IDS])).logits
    assert torch.equal(explicit, model(ROW).logits)
    with pytest.raises(ValueError, match=r"stage_ids must be \[1, 13\]"):
        model(ROW, stage_ids=torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"stage_ids\[0, 0\] is 4"):
        model(ROW, stage_ids=all_in(4, ROW))


def test_a_layer_outside_of_a_forward_refuses():
    model = make_model()
    name, layer = next(experts_of(model))
    with pytest.raises(RuntimeError, match="no stage ids"):
        layer(torch.ones(1, 3, layer.in_features))
    with pytest.raises(ValueError, match=r"x has \[1, 3\] tokens"):
        layer.context.run(torch.zeros(1, 4, dtype=torch.int32), layer, torch.ones(1, 3, layer.in_features))


def test_packed_documents_start_outside_of_any_stage():
    model = make_model()
    packed = torch.tensor([[11, *chain(0)[:-1], 12, 13, *chain(2)]])
    positions = torch.tensor([[*range(5), *range(7)]])
    model(packed, position_ids=positions)
    assert model.last_stage_ids.tolist() == [[-1] + [0] * 4 + [-1, -1] + [2] * 5]


@pytest.mark.parametrize(
    "options, prompt_id",
    [
        ({}, -1),
        ({"prompt_expert": "none"}, -2),
        ({"prompt_expert": "guidance"}, 1),
        ({"shared_expert": False}, -2),
    ],
)
def test_the_prompt_goes_where_the_configuration_says(options, prompt_id):
    model = make_model(**options)
    model(ROW)
    assert model.last_stage_ids.tolist() == [[prompt_id] * 3 + ROW_IDS[3:]]


def test_a_random_prompt_expert_depends_on_the_row_alone():
    model = make_model(train_prompt_expert="random").train()
    rows = make_prompts(rows=40, padded=False)["input_ids"]
    model(rows)
    drawn = model.last_stage_ids[:, 0].tolist()
    assert set(drawn) == {0, 1, 2, 3} and model.last_stage_ids.eq(model.last_stage_ids[:, :1]).all()
    model(torch.nn.functional.pad(rows[5:6], (4, 0)), attention_mask=torch.tensor([[0] * 4 + [1] * 9]))
    assert model.last_stage_ids[0, -1].item() == drawn[5]
    model.eval()(rows)
    assert model.last_stage_ids.eq(-1).all()


def test_markers_may_be_spare_rows_of_the_base():
    """Some models have more rows than their tokenizer has tokens."""
    model = make_model(marker_ids=[50, 51, 20, 21, 59, 58, 60, 61])
    row = torch.tensor([[11, 59, 12, 58, 50, 13]])
    logits = model(row).logits
    assert model.last_stage_ids.tolist() == [[-1, 2, 2, 2, 0, 0]] and logits.shape[-1] == VOCABULARY + 2
    hidden = model.base_model(row).last_hidden_state
    assert torch.allclose(hidden @ model.get_output_embeddings().weight.T, logits, atol=1e-5)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(row)[0, 1], embedding.rows[4]) and torch.equal(embedding.weight[59], embedding.rows[4])


@pytest.mark.parametrize("kind", KINDS)
def test_without_experts_markers_can_neither_be_read_nor_written(kind):
    model = make_model(kind=kind)
    with model.disable_experts():
        assert model(ROW[:, :3]).logits.shape[-1] == VOCABULARY
        with pytest.raises(IndexError):
            model(ROW)
        with pytest.raises(ValueError, match="disable_experts"):
            model.generate(ROW[:, :3], path="answer")
    assert model(ROW).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_compiled_graph_serves_any_stages(kind):
    model = make_model(kind=kind)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for seed in range(3):
        row = torch.tensor([PROMPT + chain(seed, seed + 1, seed=seed)])
        assert torch.allclose(compiled(row, use_cache=False).logits, model(row).logits, atol=1e-5)
    assert len(graphs) == 1


def test_a_copy_routes_by_itself():
    model = make_model()
    copied = twin(model)
    copied(ROW)
    assert copied.last_stage_ids.tolist() == [ROW_IDS] and model.last_stage_ids is None
    assert next(experts_of(copied))[1].context is copied.routing.context is not model.routing.context


def test_two_forwards_at_once_are_refused():
    """Two threads on one model would read each other's ids, which nothing else would show."""
    model = make_model()
    inner = []

    def intrude(layer, args):
        if not inner:
            inner.append(True)
            with pytest.raises(RuntimeError, match="one forward at a time"):
                model(ROW + 0, stage_ids=all_in(1, ROW))

    next(experts_of(model))[1].register_forward_pre_hook(intrude)
    expected = make_model()(ROW).logits
    assert torch.equal(model(ROW).logits, expected) and inner


def test_a_backbone_called_by_position_routes_too():
    backbone = make_model(kind="in_place").model
    row = torch.tensor([[11, *chain(0)[:-1], 12]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0]])
    backbone(row, None, positions)
    assert backbone.routing.last_stage_ids.tolist() == [[-1, 0, 0, 0, 0, -1]]
    cache = backbone(row, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="stage_ids"):
        backbone(torch.tensor([[12]]), None, None, cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_counts_the_markers(name, kind):
    model = make_model(name, kind)
    logits = model(ROW).logits
    expected = nn.functional.cross_entropy(logits[0, :-1].float(), ROW[0, 1:])
    assert torch.allclose(model(ROW, labels=ROW).loss, expected)


def test_verdicts_are_told_apart_by_one_token():
    base = make_base("llama_tied", vocab_size=300)
    with pytest.raises(ValueError, match="differ in exactly one token"):
        mote_ext.MoTEForCausalLM.from_base(
            base, mote_ext.MoTEConfig(r=4, verdicts=("safe", "severe")), tokenizer=make_tokenizer()
        )
    with pytest.raises(ValueError, match="two different token ids"):
        make_config(verdict_ids=[5, 5])


# ---- wrapping


@pytest.mark.parametrize("name", FOUR)
def test_in_place_it_stays_what_it_was(name):
    base = make_base(name)
    kind, state = type(base), {key: value.clone() for key, value in base.state_dict().items()}
    model = mote_ext.get_mote_model(base, make_config())
    assert model is base and isinstance(model, kind)
    kept = {key.replace(".base_layer", "").replace(".base.", "."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_only_experts_and_markers_are_trained(kind):
    model = make_model(kind=kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith((".lora_A", ".lora_B", ".rows")) for name in trained) and len(trained) == 2 * 14 + 2
    fixed = make_model(kind=kind, train_markers=False)
    assert not any(n.endswith("rows") for n, p in fixed.named_parameters() if p.requires_grad)


def test_trainable_parameters_are_printed(capsys):
    make_model().print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: ")


TARGETS = [
    ("all-linear", None, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    (["q_proj", "mlp.up_proj"], None, ["q_proj", "up_proj"]),
    (r"layers\.1\..*(q|k)_proj", None, ["q_proj", "k_proj"]),
    ("all-linear", ["down_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]),
]


@pytest.mark.parametrize("targets, exclude, expected", TARGETS)
def test_targets_are_what_was_asked_for(targets, exclude, expected):
    model = make_model(target_modules=targets, exclude_modules=exclude)
    found = [name for name, _ in experts_of(model)]
    assert {name.rpartition(".")[2] for name in found} == set(expected)
    assert not isinstance(model.get_output_embeddings(), mote_ext.MoTELinear)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"target_modules": ["q_proj", "c_attn"]},
            r"target_modules \['c_attn'\] match no linear layer.*layers\.\*\.mlp",
        ),
        ({"target_modules": "q_proj"}, "match no linear layer"),
        ({"exclude_modules": ["nothing"]}, r"exclude_modules \['nothing'\]"),
        ({"exclude_modules": ".*"}, "leaves no linear layer"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_what_there_is(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(ValueError, match="has experts already"):
        mote_ext.get_mote_model(make_model(kind="in_place"), make_config())
    with pytest.raises(ValueError, match="tokenizer="):
        mote_ext.MoTEForCausalLM.from_base(make_base(), mote_ext.MoTEConfig())
    with pytest.raises(ValueError, match="no language-model head"):
        mote_ext.get_mote_model(make_base().model, make_config())
    with pytest.raises(ValueError, match="base_config is None"):
        mote_ext.MoTEForCausalLM(mote_ext.MoTEConfig())

    class Doubled(type(make_base())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 2
            return outputs

    base = make_base()
    base.__class__ = Doubled
    expected = base(ROW[:, :3]).logits
    with pytest.raises(ValueError, match="Doubled changes its logits"):
        mote_ext.MoTEForCausalLM.from_base(base, make_config())
    assert torch.equal(base(ROW[:, :3]).logits, expected)  # whole again
    assert torch.equal(mote_ext.get_mote_model(base, make_config())(ROW[:, :3]).logits[..., :VOCABULARY], expected)


def test_without_markers_ids_are_explicit():
    model = mote_ext.get_mote_model(make_base(), make_config(marker_ids=None))
    assert model(ROW[:, :3], stage_ids=torch.tensor([[0, 1, 2]])).logits.shape[-1] == VOCABULARY
    with pytest.raises(ValueError, match="no ids yet"):
        model(ROW[:, :3])


def test_markers_start_apart_from_each_other_and_never_win():
    tokenizer = make_tokenizer()
    base = make_base("llama_tied", vocab_size=300)
    model = mote_ext.MoTEForCausalLM.from_base(base, mote_ext.MoTEConfig(r=4), tokenizer=tokenizer)
    rows = torch.nn.functional.normalize(model.get_input_embeddings().rows.detach(), dim=-1)
    assert (rows @ rows.T - torch.eye(8)).max() < 0.95
    logits = model(torch.randint(0, 250, (4, 30))).logits
    ids = list(model.config.marker_ids)
    others = [i for i in range(logits.shape[-1]) if i not in ids and i < 300]
    assert (logits[..., ids].amax(-1) <= logits[..., others].amax(-1)).all()
    assert [tokenizer.decode([token]) for token in model.config.verdict_ids] == ["1", "0"]
    assert tokenizer.decode(model.config.refusal_ids) == model.config.refusal


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 0}, "r must be in 1..256, got 0"),
        ({"mix": 2.0}, "mix"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"prompt_expert": "random"}, "prompt_expert must be one of"),
        ({"shared_expert": False, "prompt_expert": "shared"}, "prompt_expert"),
        ({"train_prompt_expert": "nobody"}, "train_prompt_expert"),
        ({"marker_ids": [1, 2]}, "marker_ids must be 8"),
        ({"check_threshold": 1.5}, "check_threshold"),
    ],
)
def test_configurations_without_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_the_papers_preset():
    config = mote_ext.MoTEConfig.paper(r=8)
    assert [stage["name"] for stage in config.stages] == ["analysis", "guidance", "response"]
    assert (config.r, config.mix, config.shared_expert) == (8, 0.5, True)
    assert config.prompt_id(training=True) is None and config.prompt_id(training=False) == 2
    assert copy.deepcopy(config).to_dict() == config.to_dict()
