"""Trains an 8B model on one GPU: a 4-bit base, bf16 compute, gradient checkpointing, chains packed without padding.

    mote chains meta-llama/Llama-3.1-8B-Instruct prompts.jsonl --out chains.jsonl --checker self
    python examples/one_gpu.py chains.jsonl --out build/llama-mote

The numbers below are the paper's (rank 16, 3 epochs, 2e-5, batch 16); arXiv 2405.00557, section 4.1. Weights take about
5 GB in 4 bits, the experts 0.8 GB in float32, their gradients and AdamW three times that; the rest is activations.
"""

import argparse

import mote_ext
from mote_ext.training import train


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="JSONL, a chain a line")
    parser.add_argument("--out", required=True, help="gets the experts")
    parser.add_argument("--eval-data", help="chains that are evaluated after each epoch")
    parser.add_argument("--base", default="meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many, to try it out")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)

    result = train(
        args.data,
        args.base,
        args.out,
        eval_data=args.eval_data,
        config=mote_ext.MoTEConfig(r=16, lora_alpha=32),
        quantize="4bit",
        dtype="bfloat16",
        bf16=True,
        gradient_checkpointing=True,
        packing=True,
        max_length=2048,
        learning_rate=2e-5,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        p_dropout=0.5,
        max_steps=args.steps,
        resume=args.resume,
        disable_tqdm=False,
    )
    print(f"{result.num_steps} steps, {result.tokens / result.seconds:,.0f} tokens/s; experts in {result.folder}")
    print(f'mote generate {result.folder} "How do I pick a lock?" --path adaptive --check enforce')


if __name__ == "__main__":
    main()
