"""Useful tokens a second of many requests at once: MoTEEngine against what else a user of transformers has, in one run.

    python bench/bench_engine.py --json FILE [pytest options]     then bench/report.py makes the table

SmolLM2-135M-Instruct in float32 on the CPU, with random experts. Two workloads of 32 requests whose prompts have 8 to
160 tokens. mixed: each wants its own number of tokens, 8 to 128, without stages. staged: all go through every stage
with 96 tokens, the best that can happen to a padded batch. Contenders:

    sequential   generate, one request at a time (rate over the first few)
    padded       generate on padded batches, sorted by wanted length, of whichever of 8, 16 and 32 rows is best;
                 padded_32_skinny inside skinny_linears(), which a user of transformers alone does not have
    continuous   transformers' own continuous batching, on the base without experts, which is less to compute, its cache
                 as large as these requests need
Useful is what was asked for: what a padded row computes beyond its own end is not.
"""

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import command
import pytest
import torch
from bench_model import with_random_experts
from bench_ops import RANK, cpu_name
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import mote_ext
from mote_ext import SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import smollm2

NUM_REQUESTS, NUM_SEQUENTIAL, ROUNDS = 32, 3, 2
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}


@dataclass
class Request:
    ids: list
    params: SamplingParams

    @property
    def wanted(self):
        return self.params.max_new_tokens


def make_requests(workload):
    generator = torch.Generator().manual_seed(0)

    def between(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    prompts = [torch.randint(100, 40000, (between(8, 160),), generator=generator).tolist() for _ in range(NUM_REQUESTS)]
    if workload == "staged":
        return [Request(ids, SamplingParams("full", max_new_tokens=96)) for ids in prompts]
    return [Request(ids, SamplingParams(path=None, max_new_tokens=between(8, 128))) for ids in prompts]


def generate(model, requests):
    """Rows of generate() on one padded batch, each cut to what its request wanted."""
    width, most = max(len(r.ids) for r in requests), max(r.wanted for r in requests)
    ids = torch.tensor([[0] * (width - len(r.ids)) + r.ids for r in requests])
    mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in requests])
    path = requests[0].params.path
    out = model.generate(ids, attention_mask=mask, path=path, max_new_tokens=most, **GREEDY)
    return [row[: r.wanted] for row, r in zip(out[:, width:].tolist(), requests)]


def sequential(model, requests):
    return [generate(model, [request])[0] for request in requests[:NUM_SEQUENTIAL]]


def padded(model, requests, size):
    found = {}
    by_length = sorted(range(len(requests)), key=lambda i: requests[i].wanted)
    for begin in range(0, len(requests), size):
        numbers = by_length[begin : begin + size]
        found.update(zip(numbers, generate(model, [requests[i] for i in numbers])))
    return [found[i] for i in range(len(requests))]


def inside_skinny(model, requests):
    with mote_ext.skinny_linears(model):
        return padded(model, requests, len(requests))


def continuous(base, requests):
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128)
    # By default its cache takes what memory there is, and on a CPU it attends over all of it.
    sizes = ContinuousBatchingConfig(num_blocks=2 * NUM_REQUESTS, max_batch_tokens=256)
    batching = base.init_continuous_batching(generation_config=config, continuous_batching_config=sizes)
    batching.start()
    try:
        names = [batching.add_request(r.ids, max_new_tokens=r.wanted) for r in requests]
        found = {}
        while len(found) < len(names):
            result = batching.get_result(timeout=300)
            if result is None:
                raise RuntimeError("continuous batching gave no result in 300 s")
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
    finally:
        batching.stop(block=True)
    return [found[name] for name in names]


def rate(call):
    """(useful tokens a second, rows)"""
    begin = time.perf_counter()
    rows = call()
    return sum(map(len, rows)) / (time.perf_counter() - begin), rows


def make_contenders(workload, requests):
    folder = smollm2.convert()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Copies: weights that were mapped from a file lie otherwise in memory, which changes times and bits.
    base, own = copy.deepcopy(base), copy.deepcopy(base)
    model = mote_ext.MoTEForCausalLM.from_base(own, mote_ext.MoTEConfig(r=RANK), tokenizer=tokenizer)
    with_random_experts(model)
    model.generation_config.eos_token_id = None  # every request gets the length it asked for
    engine = mote_ext.MoTEEngine(model, max_running=NUM_REQUESTS, max_batch_tokens=256)

    def ours():
        engine.reset_cache()
        outputs = engine.generate([r.ids for r in requests], [r.params for r in requests])
        return [output.generated_tokens for output in outputs]

    contenders = {"ours": ours, "sequential": lambda: sequential(model, requests)}
    for size in (8, 16, 32):
        contenders[f"padded_{size}"] = lambda size=size: padded(model, requests, size)
    contenders["padded_32_skinny"] = lambda: inside_skinny(model, requests)
    if workload == "mixed":
        contenders["continuous"] = lambda: continuous(base, requests)
    return contenders, engine


def same_rows(got, expected):
    return sum(a == b for a, b in zip(got, expected))


@pytest.mark.parametrize("workload", ["mixed", "staged"])
def test_useful_tokens_a_second(benchmark, workload, quiet):
    requests = make_requests(workload)
    contenders, engine = make_contenders(workload, requests)
    rows = contenders["ours"]()
    alone = contenders["sequential"]()
    assert rows[:NUM_SEQUENTIAL] == alone and all(len(row) == r.wanted for row, r in zip(rows, requests))
    rates, agreeing = {name: [] for name in contenders}, {}
    before = engine.stats()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            found, got = rate(call)
            rates[name].append(found)
            agreeing[name] = same_rows(got, rows)
    after = engine.stats()
    medians = {name: median(values) for name, values in rates.items()}
    best = max(value for name, value in medians.items() if name not in ("ours", "padded_32_skinny"))
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        op="engine",
        T=NUM_REQUESTS,
        K=0,
        pattern=workload,
        dtype="float32",
        threads=torch.get_num_threads(),
        device=cpu_name(),
        tokens_per_s={name: round(value, 1) for name, value in medians.items()},
        ratio_to_best=round(medians["ours"] / best, 2),
        rows_as_ours=agreeing,  # near ties may fall otherwise; continuous has no experts
        tokens_per_step=round(
            (after["planned_tokens"] - before["planned_tokens"]) / (after["steps"] - before["steps"]), 1
        ),
        quiet_share=quiet(),
        versions={"torch": torch.__version__, "mote_ext": mote_ext.__version__, "cuda": None},
    )
    print(workload, benchmark.extra_info["tokens_per_s"], benchmark.extra_info["ratio_to_best"], agreeing)


if __name__ == "__main__":
    command.run(__file__, __doc__)
