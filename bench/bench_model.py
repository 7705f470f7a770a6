"""What experts add to decoding a token with a real model: ours against the base and against PEFT, in one run.

    python bench/bench_model.py --json FILE [pytest options]      then bench/report.py makes the table

SmolLM2-135M-Instruct in float32 at batch 1 on the CPU. Every contender decodes the same token on its own cache of 64
tokens, one after the other in every round; medians are compared. ours_disabled is the wrapped model inside
disable_experts(): what the wrapping itself costs; *_skinny are inside skinny_linears(). PEFT's rank 32 has as many
active ranks as a stage and the shared expert of rank 16.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import command
import pytest
import torch
from bench_ops import RANK, cpu_name, measure_on_cpu, race
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mote_ext
from mote_ext.skinny import SkinnyLinears

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import smollm2

NUM_CACHED = 64


@dataclass
class Decoder:
    """One token at a time on a cache that keeps its length."""

    model: torch.nn.Module
    stage: int | None = None

    def __post_init__(self):
        prompt = torch.arange(100, 100 + NUM_CACHED)[None]
        self.token = torch.tensor([[100]])
        self.options = {} if self.stage is None else {"stage_ids": torch.full((1, 1), self.stage)}
        first = {} if self.stage is None else {"stage_ids": torch.full_like(prompt, self.stage)}
        self.cache = self.model(input_ids=prompt, use_cache=True, **first).past_key_values

    def __call__(self):
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, **self.options).logits
        self.cache.crop(-1)
        return logits


def switched(decoder):
    linears = SkinnyLinears(decoder.model)

    def decode():
        with linears.switched_on():
            return decoder()

    return decode


def with_random_experts(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    return model.eval()


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_decode_of_a_model(benchmark, threads, quiet):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    folder = smollm2.convert()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wrapped = mote_ext.MoTEForCausalLM.from_base(
        copy.deepcopy(base), mote_ext.MoTEConfig(r=RANK), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    # A copy too: weights that were mapped from a file lie otherwise in memory, which changes times and bits.
    ours, plain = Decoder(with_random_experts(wrapped), stage=2), Decoder(copy.deepcopy(base))
    contenders = {"ours": ours, "base": plain}
    for rank in (RANK, 2 * RANK):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        contenders[f"peft_rank_{rank}"] = Decoder(with_random_experts(get_peft_model(copy.deepcopy(base), config)))

    def disabled():
        with wrapped.disable_experts():
            return ours()

    contenders["ours_disabled"] = disabled
    for name, decoder in (("ours_skinny", ours), ("base_skinny", plain)):
        contenders[name] = switched(decoder)
    with wrapped.disable_experts():  # without experts it is the base, so it decodes what it should
        assert torch.equal(Decoder(wrapped)(), plain())
    medians = race(benchmark, measure_on_cpu, contenders, budget_s=30)
    torch.set_num_threads(before)
    benchmark.extra_info.update(
        op="model",
        T=1,
        K=0,
        pattern="decode",
        dtype="float32",
        threads=threads,
        device=cpu_name(),
        medians_us={name: round(value * 1e6, 1) for name, value in medians.items()},
        quiet_share=quiet(),
        versions={"torch": torch.__version__, "mote_ext": mote_ext.__version__, "cuda": None},
    )


if __name__ == "__main__":
    command.run(__file__, __doc__)
