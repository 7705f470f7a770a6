"""MoTETrainer on tiny models of both kinds: what is learnt, what stays, what is logged, and resuming to the bit."""

import json

import pytest
import torch
from models import KINDS, VOCABULARY, WHOLE_BLOCKS, chain, make_base, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, TrainerCallback

import mote_ext
from mote_ext import compat
from mote_ext.chains.collator import ChainCollator
from mote_ext.inject import experts_of
from mote_ext.training import MoTETrainer, MoTETrainingArguments
from mote_ext.training.experts import expert_names, gradient_norms
from mote_ext.training.loss import loss_columns, token_losses

EOS = 2
PATHS = ((0, 2), (0, 1, 2), (2,))


def samples(count=6, paths=PATHS):
    """Chains of random tokens behind questions that differ, one path after the other."""
    rows = []
    for row in range(count):
        question, blocks = [10 + row, 11, 12 + row % 3], chain(*paths[row % len(paths)], seed=row)
        labels = [-100] * len(question) + blocks + [EOS]
        rows.append({"input_ids": question + blocks + [EOS], "labels": labels, "row": row})
    return rows


def make_trainer(model, folder, data=None, *, eval_data=None, collator=None, callbacks=(), tokenizer=None, **changes):
    chosen = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,  # the tests' models are too small for anything else
        **changes,
    }
    trainer = MoTETrainer(
        model,
        MoTETrainingArguments(output_dir=str(folder), **chosen),
        train_dataset=samples() if data is None else data,
        eval_dataset=eval_data,
        data_collator=ChainCollator(0) if collator is None else collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fresh(kind="whole", name="llama_tied", **changes):
    """An untrained model; the same at every call."""
    torch.manual_seed(0)
    return make_model(name, kind, zero=True, **changes)


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different


def step_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- what is learnt, and what stays


@pytest.mark.parametrize("kind", KINDS)
def test_it_overfits_and_then_writes_what_it_was_trained_on(kind, tmp_path):
    data = samples(3, paths=((0, 1, 2),))
    torch.manual_seed(0)
    # Logits of the usual start are too small to be certain of anything, and the head is frozen.
    base = make_base("llama_tied", initializer_range=0.3)
    model = make_model(base=base, kind=kind, zero=True, r=8)
    trainer = make_trainer(model, tmp_path, data, max_steps=100, per_device_train_batch_size=3)
    trainer.train()
    assert step_logs(trainer)[-1]["loss"] < 0.1
    for sample in data:
        question = torch.tensor([sample["input_ids"][:3]])
        written = model.eval().generate(question, path="full", do_sample=False, max_new_tokens=40)
        assert written[0].tolist() == sample["input_ids"][:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_without_tokens_and_the_base_keep_every_bit(kind, tmp_path):
    model = fresh(kind)
    before = values(model)
    make_trainer(model, tmp_path, samples(paths=((0, 2),))).train()
    seen, unseen = {0, 2, 4}, {1, 3}
    for name, after in values(model).items():
        if name.endswith(("lora_A", "lora_B")):
            assert all(torch.equal(after[e], before[name][e]) for e in unseen), name
            assert all(not torch.equal(after[e], before[name][e]) for e in seen), name
        else:
            assert torch.equal(after, before[name]) != name.endswith(".rows"), name


@pytest.mark.parametrize("frozen", [("analysis",), ("response", "shared")])
def test_frozen_experts_keep_every_bit(frozen, tmp_path):
    """Against weight decay as well, and against the momentum of a run in which they were trained."""
    model = fresh()
    options = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    make_trainer(model, tmp_path, max_steps=3, **options).train()
    before, indices = values(model), [expert_names(model).index(name) for name in frozen]
    trainer = make_trainer(model, tmp_path, max_steps=6, frozen_stages=frozen, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    for name, after in values(model).items():
        if name.endswith(("lora_A", "lora_B")):
            for expert in (0, 1, 2, 4):  # the check has no tokens
                assert torch.equal(after[expert], before[name][expert]) == (expert in indices), (name, expert)
    logs = step_logs(trainer)[-1]
    assert all(logs[f"grad_norm/{name}"] == 0 for name in frozen) and logs["grad_norm/markers"] > 0


def test_markers_have_a_rate_of_their_own(tmp_path):
    trainer = make_trainer(fresh(name="llama"), tmp_path, learning_rate=1e-3, weight_decay=0.1)
    trainer.create_optimizer()
    *experts, markers = trainer.optimizer.param_groups
    embedding, head = trainer.model.get_input_embeddings(), trainer.model.get_output_embeddings()
    assert [id(p) for p in markers["params"]] == [id(embedding.rows), id(head.rows)]
    assert (markers["lr"], markers["weight_decay"]) == (4e-3, 0.0)
    assert sum(len(group["params"]) for group in experts) == 28 and experts[0]["lr"] == 1e-3
    assert experts[0]["weight_decay"] == 0.1
    assert MoTETrainingArguments(output_dir=str(tmp_path), marker_learning_rate=0.5).marker_learning_rate == 0.5


# ---- the loss


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own_and_so_are_its_gradients(kind, packing, tmp_path):
    model = fresh(kind).train()
    batch = ChainCollator(0, packing=packing)(samples(4))
    batch.pop("rows")
    plain = model(**batch, use_cache=False).loss  # with a cache transformers does not see that documents are packed
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer = make_trainer(model, tmp_path, p_dropout=0.0)
    columns = loss_columns(batch["labels"])
    assert 0 < len(columns) < batch["labels"].shape[1] - 1
    loss = trainer.compute_loss(model, {**batch, "loss_columns": columns})
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_logits_are_made_of_the_labelled_columns_alone(tmp_path):
    model, shapes = fresh(), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(list(output.shape)))
    make_trainer(model, tmp_path, samples(2, paths=((2,),)), max_steps=1, p_dropout=0.0).train()
    assert shapes == [[2, 6, VOCABULARY + 8]]  # marker, three tokens, marker, EOS; the question has no column


def test_a_step_is_the_mean_over_all_its_tokens_however_it_is_cut(tmp_path):
    """Accumulated micro batches of unequal length weigh by their tokens."""
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3), (1, 6)):
        model = fresh()
        trainer = make_trainer(
            model,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
        )
        trainer.train()
        found.append(([entry["loss"] for entry in step_logs(trainer)], values(model)))
    for losses, weights in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_costs_nothing(tmp_path):
    data = [{**sample, "labels": [-100] * len(sample["labels"])} for sample in samples(2)]
    model = fresh()
    before = values(model)
    make_trainer(model, tmp_path, data, max_steps=1).train()
    assert_same(values(model), before)


# ---- logs


def test_the_logs_of_the_stages_add_up(tmp_path):
    trainer = make_trainer(fresh(), tmp_path, eval_data=samples(3), eval_strategy="epoch", max_grad_norm=0.1)
    trainer.train()
    for entry in step_logs(trainer):
        stages = [key.removeprefix("loss/") for key in entry if key.startswith("loss/")]
        assert set(stages) <= {"analysis", "guidance", "response"} and len(stages) >= 2
        total = sum(entry[f"loss/{name}"] * entry[f"tokens/{name}"] for name in stages)
        assert total == pytest.approx(entry["loss"], rel=1e-5)
        assert sum(entry[f"tokens/{name}"] for name in stages) == pytest.approx(1)
        norms = [entry[f"grad_norm/{name}"] ** 2 for name in [*expert_names(trainer.model), "markers"]]
        assert sum(norms) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-4) and entry["grad_norm/check"] == 0
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3 and all(f"eval_loss/{name}" in evaluations[-1] for name in ("analysis", "response"))


def test_what_a_stage_is_logged_with_is_its_tokens_loss(tmp_path):
    model = fresh()
    data = samples(2, paths=((0, 2),))
    trainer = make_trainer(model, tmp_path, data, max_steps=1, p_dropout=0.0)
    losses = []
    with torch.no_grad():
        for sample in data:
            ids = torch.tensor([sample["input_ids"]])
            targets = torch.tensor([sample["labels"]])[:, 1:]
            losses.append(token_losses(model.train()(ids).logits[:, :-1], targets)[0, 2:])
    trainer.train()
    entry = step_logs(trainer)[0]
    assert entry["loss/analysis"] == pytest.approx(torch.cat([row[:5] for row in losses]).mean().item(), rel=1e-4)
    assert entry["loss/response"] == pytest.approx(torch.cat([row[5:] for row in losses]).mean().item(), rel=1e-4)
    assert entry["tokens/analysis"] == pytest.approx(5 / 11)  # EOS is the response's


def test_the_norm_of_an_experts_gradient():
    model = fresh().train()
    batch = ChainCollator(0)(samples(3))
    batch.pop("rows")
    model(**batch).loss.backward()
    found = gradient_norms(model)
    for expert, name in enumerate(expert_names(model)):
        parts = [p.grad[expert].flatten() for _, layer in experts_of(model) for p in (layer.lora_A, layer.lora_B)]
        torch.testing.assert_close(found[name], torch.cat(parts).norm())
    torch.testing.assert_close(found["markers"], model.get_input_embeddings().rows.grad.norm())


def test_tensorboard_has_every_curve(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(fresh(), tmp_path, report_to=["tensorboard"], eval_data=samples(3), eval_strategy="epoch")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    for name in ("loss", "tokens", "grad_norm"):
        assert [event.step for event in events.Scalars(f"train/{name}/response")] == list(range(1, 10))
    written = [event.value for event in events.Scalars("train/loss/analysis")]
    assert written == pytest.approx([e["loss/analysis"] for e in step_logs(trainer) if "loss/analysis" in e])
    assert len(events.Scalars("eval/loss/guidance")) == 3


def test_samples_are_written_to_a_file_and_nowhere_else(tmp_path, capsys):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = mote_ext.MoTEForCausalLM.from_base(
        make_base("llama_tied", vocab_size=300), mote_ext.MoTEConfig(r=4), tokenizer=tokenizer
    )
    table = model.routing.table
    data = [{"input_ids": [20, 21, table.start_id(2), 30, table.end_id(2), 0], "row": 0}]
    data[0]["labels"] = [-100, -100, *data[0]["input_ids"][2:]]
    options = {"num_samples": 2, "sample_max_tokens": 12, "eval_strategy": "epoch", "num_train_epochs": 2}
    make_trainer(model, tmp_path, data, eval_data=data, tokenizer=tokenizer, **options).train()
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step-1.jsonl", "step-2.jsonl"]
    (line,) = [json.loads(line) for line in files[1].read_text().splitlines()]
    expected = model.eval().generate(torch.tensor([[20, 21]]), max_new_tokens=12, do_sample=False)[0, 2:].tolist()
    assert line["tokens"] == expected and line["stages"] == [
        list(s) for s in mote_ext.parse_stages(tokenizer, expected)
    ]
    assert capsys.readouterr().out == ""


# ---- draws


class Draws(TrainerCallback):
    """Notes (epoch, rows) of every call of StepSkipping.inputs."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, args, state, control, **kwargs):
        inputs = self.trainer.skipping.inputs

        def noted(model, batch, epoch):
            self.calls.append((epoch, sorted(batch["rows"].flatten().tolist())))
            return inputs(model, batch, epoch)

        self.trainer.skipping.inputs = noted


def test_the_epoch_of_the_draws_is_the_micro_steps_own(tmp_path):
    """Also with an incomplete last accumulation, and from the first micro step of a resumed run on."""
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    calls = {}
    for resumed in (False, True):
        draws = Draws()
        trainer = make_trainer(fresh(), tmp_path, callbacks=[draws], **options)
        draws.trainer = trainer
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumed else None)
        calls[resumed] = draws.calls
    assert [epoch for epoch, _ in calls[False]] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch in range(3):
        rows = [row for e, rows in calls[False] if e == epoch for row in rows]
        assert sorted(rows) == list(range(6))
    assert calls[True] == calls[False][5:]


def test_random_prompt_experts_are_drawn_by_row_and_epoch(tmp_path):
    model = fresh(train_prompt_expert="random")
    seen = {}
    draws = Draws()
    trainer = make_trainer(model, tmp_path, num_train_epochs=6, callbacks=[draws], per_device_train_batch_size=1)
    draws.trainer = trainer
    model.model.base.register_forward_hook(
        lambda *_: seen.setdefault(len(draws.calls), []).append(model.last_stage_ids[0].tolist())
    )
    trainer.train()
    drawn = {}
    for call, (epoch, (row,)) in enumerate(draws.calls, 1):
        ids = seen[call][-1]
        assert len(set(ids[:3])) == 1 and 0 <= ids[0] < 4 and ids[3] == PATHS[row % 3][0]
        drawn[epoch, row] = ids[0]
    assert len(drawn) == 36 and set(drawn.values()) == {0, 1, 2, 3}
    assert len({tuple(drawn[epoch, row] for row in range(6)) for epoch in range(6)}) == 6
    packed = ChainCollator(0, packing=True)(samples(3))
    ids = trainer._drawn_stage_ids(packed, packed["rows"].tolist(), 2)[0]
    begins = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert [ids[b : b + 3].tolist() for b in begins] == [[drawn[2, row]] * 3 for row in range(3)]


def test_skipping_changes_training_and_not_evaluation(tmp_path):
    logs = []
    for p_dropout in (0.0, 1.0):
        trainer = make_trainer(fresh(), tmp_path, eval_data=samples(), p_dropout=p_dropout, max_steps=1)
        logs.append((trainer.evaluate()["eval_loss"], trainer.train().training_loss))
    assert logs[0][0] == logs[1][0] and logs[0][1] != logs[1][1]


# ---- checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(kind, tmp_path):
    """Step skipping, accumulation, dropout of the experts' input, a drawn prompt expert, and a mid-epoch checkpoint."""
    options = {
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "cosine",
    }
    changes = {"lora_dropout": 0.1, "train_prompt_expert": "random"}
    model = fresh(kind, **changes)
    trainer = make_trainer(model, tmp_path, **options)
    trainer.train()
    expected, losses = values(model), [entry["loss"] for entry in step_logs(trainer)]
    for step in (2, 3):
        other = make_model("llama_tied", kind, seed=5, base=None, **changes)  # experts and markers far from those saved
        resumed = make_trainer(other, tmp_path / "again", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(values(other), expected)
        assert [entry["loss"] for entry in step_logs(resumed)] == losses


def test_a_checkpoint_is_an_adapter_folder_without_pickled_weights(tmp_path):
    model = fresh("in_place")
    make_trainer(model, tmp_path, save_strategy="epoch").train()
    names = {path.name for path in (tmp_path / "checkpoint-9").iterdir()}
    assert {"mote_experts.safetensors", "mote_config.json", "trainer_state.json", "optimizer.pt"} <= names
    assert not names & {"model.safetensors", "training_args.bin", "pytorch_model.bin"}
    loaded = mote_ext.MoTEForCausalLM.from_pretrained(tmp_path / "checkpoint-9", base=make_base("llama_tied"))
    ids = torch.tensor([samples(1)[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_comes_back(kind, tmp_path):
    model = fresh(kind)
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "learning_rate": 0.05, "num_train_epochs": 6}
    unlike = samples(6, paths=((1, 2),))
    trainer = make_trainer(model, tmp_path, eval_data=unlike, load_best_model_at_end=True, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best != max(losses), "the last is the best; the test shows nothing"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    make_trainer(fresh(), tmp_path, save_strategy="epoch", max_steps=3).train()
    with pytest.raises(ValueError, match="saved with mix=0.5, the configuration says 0.25"):
        make_trainer(fresh(mix=0.25), tmp_path).train(resume_from_checkpoint=True)


# ---- other ways to compute the same


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind, tmp_path):
    found = []
    for recompute in (False, True):
        model = fresh(kind)
        trainer = make_trainer(model, tmp_path, **{compat.checkpointing_field(): recompute})
        trainer.train()
        found.append(values(model))
    assert_same(*found)


def test_packed_batches_are_padded_ones(tmp_path):
    """Each document of a packed row is trained as if it stood alone, blocks hidden from it included."""
    found = []
    for packing in (False, True):
        model = fresh()
        trainer = make_trainer(model, tmp_path, collator=ChainCollator(0, packing=packing))
        trainer.train()
        found.append([entry["loss"] for entry in step_logs(trainer)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16(autocast, tmp_path):
    base = make_base("llama_tied") if autocast else make_base("llama_tied").to(torch.bfloat16)
    model = make_model(base=base, zero=True)
    trainer = make_trainer(model, tmp_path, bf16=autocast, num_train_epochs=10)
    trainer.train()
    logs = step_logs(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.3
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_quantised_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_base("llama_tied", **WHOLE_BLOCKS).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    torch.manual_seed(0)
    model = make_model(base=base, kind=kind, zero=True)
    trainer = make_trainer(model, tmp_path, save_strategy="epoch", num_train_epochs=10)
    trainer.train()
    logs = step_logs(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.3
    assert (tmp_path / "checkpoint-30" / "mote_experts.safetensors").is_file()
    resumed = make_trainer(model, tmp_path, num_train_epochs=10)
    after = values(model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert_same(values(model), after)


# ---- wrong calls


def test_wrong_calls(tmp_path):
    with pytest.raises(TypeError, match="must be a MoTE model, made by MoTEForCausalLM or get_mote_model, got Llama"):
        make_trainer(make_base("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"frozen_stages must be experts of this model, .*got \['answer'\]"):
        make_trainer(fresh(), tmp_path, frozen_stages=("answer",))
    with pytest.raises(ValueError, match="pass processing_class=tokenizer, or data_collator="):
        MoTETrainer(fresh(), MoTETrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="p_dropout must be in 0..1"):
        MoTETrainingArguments(output_dir=str(tmp_path), p_dropout=2.0)
    with pytest.raises(ValueError, match="the batch has no rows"):

        def without_rows(rows):
            batch = ChainCollator(0)(rows)
            del batch["rows"]
            return batch

        make_trainer(fresh(), tmp_path, collator=without_rows).train()
