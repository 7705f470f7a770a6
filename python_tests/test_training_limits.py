"""What a training must not do silently: packed documents that see each other, columns that are cut, folders that are
overwritten or resumed from halves, baselines of another scale.
"""

import json

import pytest
import torch
from models import make_base, make_model, make_tokenizer
from test_training import fresh, make_trainer, samples, step_logs
from transformers import HfArgumentParser

import mote_ext
from mote_ext.chains.block_mask import Layout
from mote_ext.chains.collator import ChainCollator
from mote_ext.chains.record import Chain
from mote_ext.inject import experts_of
from mote_ext.training import MoTETrainer, MoTETrainingArguments, apply_baseline, train
from mote_ext.training.loss import COLUMNS, AnnotatingCollator, loss_columns

PACKED = ChainCollator(0, packing=True)


# ---- packed rows


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_packing_is_refused_where_documents_see_each_other(name, tmp_path):
    trainer = make_trainer(make_model(name), tmp_path, collator=PACKED, p_dropout=0.0, max_steps=1)
    with pytest.raises(ValueError, match="does not separate packed documents: .* Set packing=False"):
        trainer.train()
    make_trainer(make_model(name), tmp_path, p_dropout=0.0, max_steps=1).train()


@pytest.mark.parametrize("kind", ["whole", "in_place"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox_fused_qkv"])
def test_packing_is_taken_where_they_do_not(name, kind, tmp_path):
    model, forwards = make_model(name, kind), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    trainer = make_trainer(model, tmp_path, collator=PACKED, p_dropout=0.0, max_steps=2)
    trainer.train()
    assert len(forwards) == 3 + 2  # tried once


@pytest.mark.parametrize("name", ["llama_tied", "opt", "bloom"])
def test_evaluations_are_padded(name, tmp_path):
    found = []
    for packing in (False, True):
        collator = ChainCollator(0, packing=packing)
        trainer = make_trainer(make_model(name), tmp_path, eval_data=samples(5), collator=collator, p_dropout=0.0)
        shapes = [batch["input_ids"].shape for batch in trainer.get_eval_dataloader()]
        found.append((shapes, trainer.evaluate()["eval_loss"]))
        assert [len(batch["input_ids"]) for batch in trainer.get_test_dataloader(samples(2))] == [2]
        assert trainer.data_collator.collator is collator
    assert found[0] == found[1]


def test_packed_batches_whose_rows_do_not_match():
    def one_row_more(rows):
        batch = PACKED(rows)
        return {**batch, "rows": torch.cat((batch["rows"], batch["rows"]), 1)}

    with pytest.raises(ValueError, match=r"has 2 documents .*, its rows name 4"):
        AnnotatingCollator(one_row_more)(samples(2))


@pytest.mark.parametrize("packing", [False, True])
def test_a_mask_is_made_without_reading_from_the_device(packing):
    """A meta tensor has no values, so whoever reads one fails."""
    batch = ChainCollator(0, packing=packing)(samples(3))
    meta = {name: tensor.to("meta") for name, tensor in batch.items() if name != "rows"}
    layout = Layout.of(make_model().routing.table, meta, [[], [(2, 0)], []])
    assert layout.concealed.shape == batch["input_ids"].shape


# ---- batches


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(samples())


def test_a_stream_of_samples_is_trained_on_as_it_is(tmp_path):
    trainer, seen = make_trainer(fresh(), tmp_path, Stream(), max_steps=2), []
    compute_loss = trainer.compute_loss

    def noted(model, inputs, *args, **kwargs):
        seen.append((len(inputs["input_ids"]), torch.equal(inputs[COLUMNS], loss_columns(inputs["labels"]))))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    trainer.train()
    assert seen == [(2, True)] * 2
    with pytest.raises(ValueError, match="dispatch_batches must be left out"):
        make_trainer(fresh(), tmp_path, accelerator_config={"dispatch_batches": True})


def test_an_optimiser_made_before_sharding_is_refused(tmp_path):
    model = fresh()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    args = MoTETrainingArguments(output_dir=str(tmp_path), shard=True, report_to=[], use_cpu=True)
    assert args.place_model_on_device is False
    trainer = MoTETrainer(model, args, data_collator=ChainCollator(0), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="holds parameters that sharding replaces"):
        trainer.create_optimizer()


def test_half_precision_gradients_are_logged_unscaled(tmp_path):
    trainer = make_trainer(fresh(), tmp_path, max_steps=1, fp16=True)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a CPU has none, and nothing unscales
    trainer.train()
    (entry,) = step_logs(trainer)
    norms = [value for name, value in entry.items() if name.startswith("grad_norm/")]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(entry["grad_norm"] / 1024, rel=1e-3)


# ---- arguments


def test_arguments_that_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0, got 0.1"):
        MoTETrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)
    assert MoTETrainingArguments(output_dir=str(tmp_path), frozen_stages="response").frozen_stages == ["response"]
    line = ["--output_dir", str(tmp_path), "--frozen_stages", "analysis", "guidance"]
    (parsed,) = HfArgumentParser(MoTETrainingArguments).parse_args_into_dataclasses(line)
    assert parsed.frozen_stages == ["analysis", "guidance"]


@pytest.mark.parametrize("name", ["lora", "lora_x2", "lora_matched"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_baselines_scale_is_what_was_asked_for(name, use_rslora):
    given = mote_ext.MoTEConfig(r=4, lora_alpha=12, use_rslora=use_rslora, marker_ids=list(range(60, 68)))
    config, _ = apply_baseline(name, given, 0.5)
    _, layer = next(experts_of(mote_ext.MoTEForCausalLM.from_base(make_base(), config)))
    assert layer.expert_scales() == pytest.approx([12 / (2 if use_rslora else 4)])


def test_one_lora_sees_the_question_too():
    config, _ = apply_baseline("lora", mote_ext.MoTEConfig(shared_expert=False), 0.5)
    assert (config.prompt_expert, config.train_prompt_expert) == ("shared", "shared")


# ---- folders


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two folders with bases of other weights."""
    folder, tokenizer = tmp_path_factory.mktemp("bases"), make_tokenizer()
    for seed in (0, 5):
        make_base(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / str(seed))
        tokenizer.save_pretrained(folder / str(seed))
    return folder


@pytest.fixture
def train_into(bases):
    def call(out, base="0", config=None, **arguments):
        chains = [Chain(prompt=f"q{i}", texts={"response": "yes"}) for i in range(4)]
        chosen = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 128,
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": [],
        }
        config = config or mote_ext.MoTEConfig(r=2)
        return train(chains, bases / base, out, config=config, **{**chosen, **arguments})

    return call


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(train_into, tmp_path):
    train_into(tmp_path, max_steps=3)
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert train_into(tmp_path, max_steps=3, resume=True).num_steps == 1
    for number in (2, 3):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train_into(tmp_path)


def test_a_finished_run_keeps_its_folder_and_its_figures(train_into, tmp_path):
    train_into(tmp_path / "a", save_strategy="no")
    with pytest.raises(ValueError, match="holds a finished run"):
        train_into(tmp_path / "a", save_strategy="no")
    train_into(tmp_path / "b")
    before = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert before["num_steps"] == 2 and before["tokens"] > 0
    assert train_into(tmp_path / "b", resume=True).num_steps == 0
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == before


def test_a_run_goes_on_with_what_it_was_begun_with(train_into, tmp_path):
    train_into(tmp_path / "a")
    options = {"max_steps": 3, "resume": True}
    with pytest.raises(ValueError, match="the run was begun with base_digest="):
        train_into(tmp_path / "a", base="5", **options)
    with pytest.raises(ValueError, match="the run was begun with prompt_expert='shared', now it is 'none'"):
        train_into(tmp_path / "a", config=mote_ext.MoTEConfig(r=2, prompt_expert="none"), **options)
    train_into(tmp_path / "a", config=mote_ext.MoTEConfig(r=2, seed=1), **options)  # nothing is drawn by it
    train_into(tmp_path / "b", baseline="random_experts")
    with pytest.raises(ValueError, match="the run was begun with seed=0, now it is 1"):
        train_into(tmp_path / "b", baseline="random_experts", config=mote_ext.MoTEConfig(r=2, seed=1), **options)


def test_what_cannot_be_evaluated_or_named(train_into, tmp_path):
    with pytest.raises(ValueError, match="no chain of the evaluation data fits max_length=128; there are 1"):
        train_into(tmp_path, eval_data=[Chain(prompt="q" * 500, texts={"response": "r"})])
    with pytest.raises(ValueError, match=r"\['output_dir'\] are no arguments"):
        train_into(tmp_path, output_dir="elsewhere")
