"""TRL's SFTTrainer calls the backbone and multiplies by the head itself; the stages must be right all the same."""

import pytest
import torch
from models import CHAT, make_base, make_tokenizer

import mote_ext
from mote_ext.inject import experts_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEXTS = [
    "hi<|analysis|>why<|endofanalysis|><|response|>because<|endofresponse|>",
    "what<|response|>this<|endofresponse|>",
    "so<|analysis|>a<|endofanalysis|><|guidance|>b<|endofguidance|><|response|>c<|endofresponse|>",
    "and<|response|>that<|endofresponse|>",
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["whole", "in_place"])
def test_every_layer_sees_the_stages_of_the_tokens_it_is_trained_on(kind, checkpointing, packing, tmp_path):
    tokenizer = make_tokenizer(CHAT)
    base = make_base("llama_tied", vocab_size=300)
    wrap = mote_ext.MoTEForCausalLM.from_base if kind == "whole" else mote_ext.get_mote_model
    model = wrap(base, mote_ext.MoTEConfig(r=4), tokenizer=tokenizer)
    inputs, seen = [], {name: [] for name, _ in experts_of(model)}
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    for name, layer in experts_of(model):
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen[name].append(layer.context.ids_for(args[0]).reshape(-1).tolist())
        )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        packing=packing,
        max_length=64,
        gradient_checkpointing=checkpointing,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    trainer.train()

    table, expected = model.routing.table, []
    for ids in inputs:
        # Packed documents begin with their first letter; none of them begins inside a stage.
        found = mote_ext.stage_ids_from_tokens(ids, table)
        expected.append(found.reshape(-1).tolist())
    assert {s for row in expected for s in row} >= {-1, 0, 2}
    for calls in seen.values():
        assert sorted(calls) == sorted(expected * (2 if checkpointing else 1))
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved and all(n.endswith((".lora_A", ".lora_B", ".rows")) for n in moved)
    assert sum(n.endswith("lora_B") for n in moved) == len(seen)
