"""Trains an 8B model on several GPUs with FSDP2: base, experts, gradients and optimiser states spread over them.

    torchrun --nproc_per_node 8 examples/several_gpus.py chains.jsonl --out OUT
    accelerate launch --config_file examples/launch/fsdp2.yaml examples/several_gpus.py chains.jsonl --out OUT

Every process runs this file. The base is in bfloat16 and the experts are float32, each in units of their own
(mote_ext.training.sharding); --ddp keeps a whole copy on every GPU instead, which is quicker where it fits.
"""

import argparse
import os

import mote_ext
from mote_ext.training import train


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="JSONL, a chain a line")
    parser.add_argument("--out", required=True, help="gets the experts")
    parser.add_argument("--base", default="meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--ddp", action="store_true", help="a copy of everything on every GPU")
    parser.add_argument("--dtype", default="bfloat16", help="of the base")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many, to try it out")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)

    result = train(
        args.data,
        args.base,
        args.out,
        config=mote_ext.MoTEConfig(r=16, lora_alpha=32),
        shard=not args.ddp,
        dtype=args.dtype,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=True,
        max_length=2048,
        learning_rate=2e-5,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,  # times 8 processes: the paper's batch of 16
        p_dropout=0.5,
        max_steps=args.steps,
        resume=args.resume,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{result.num_steps} steps in {result.seconds:,.0f} s; experts in {result.folder}")


if __name__ == "__main__":
    main()
