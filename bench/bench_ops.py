"""How much the experts add to a linear: ours against the base product alone and against baselines.py, in one run.

    python bench/bench_ops.py --json FILE [--device cuda] [pytest options]      then bench/report.py makes the table

Every contender runs once a round, one after the other, and medians are compared: what disturbs one disturbs all.
forward and decode: "ours" is the whole mote_linear and "added" is ours minus the base; an opponent is timed for what it
adds to a finished base. training: forward and backward of the experts' part alone, no base on either side.
On a GPU a decode is one graph of many linears with weights of their own, and the L2 is flushed before a large T.
"""

import platform
import time
from dataclasses import asdict, dataclass
from statistics import median

import baselines
import command
import pytest
import torch

import mote_ext

K = N = 4096
RANK, NUM_STAGES = 16, 4
PATTERNS = ("one_stage", "runs", "random")
DECODE_LINEARS = 32  # in one graph: one linear alone is near the resolution of an event
JUDGED_TOKENS = 16


@dataclass(frozen=True)
class Case:
    op: str  # forward, decode, training
    T: int
    pattern: str
    dtype: str
    threads: int = 0  # of the CPU; 0 on a GPU
    K: int = K
    N: int = N
    r: int = RANK
    S: int = NUM_STAGES

    def __str__(self):
        threads = f"-{self.threads}threads" if self.threads else ""
        return f"{self.op}-T{self.T}-K{self.K}-{self.pattern}-{self.dtype}{threads}"

    @property
    def flops(self):
        """Of the experts' part; the backward is the same twice."""
        return (3 if self.op == "training" else 1) * 2 * self.T * (self.K + self.N) * 2 * self.r

    @property
    def bytes(self):
        """Least traffic of a forward: x and y once, the experts in use once."""
        used = 2 if self.pattern == "one_stage" else min(self.T, self.S) + 1
        return (self.K + self.N) * (self.T + used * self.r) * getattr(torch, self.dtype).itemsize


def cpu_cases():
    for threads in (1, 2):
        yield Case("forward", 1, "one_stage", "float32", threads, K=576, N=576)  # decoding with a model of 135M
        for dtype in ("float32", "bfloat16"):
            yield Case("forward", 1, "one_stage", dtype, threads)
            # torch's bfloat16 products take seconds where the processor has none, so their T ends earlier there.
            has_products = dtype == "float32" or multiplies_bfloat16()
            for T in (2, 16, 64, 512, 2048) if has_products else (2, 16, 64):
                for pattern in PATTERNS if threads == 2 else ("random",):
                    yield Case("forward", T, pattern, dtype, threads)
            for T in (64, 512, 2048) if has_products else (64,):
                for pattern in PATTERNS if threads == 2 else ("random",):
                    yield Case("training", T, pattern, dtype, threads)


def cuda_cases():
    for T in (1, 4, 16, 64):
        yield Case("decode", T, "random", "bfloat16")
    for pattern in PATTERNS:
        for T in (256, 1024, 4096, 16384):
            yield Case("forward", T, pattern, "bfloat16")
        yield Case("training", 16384, pattern, "bfloat16")


def pytest_generate_tests(metafunc):
    cases = list(cuda_cases() if metafunc.config.getoption("--device") == "cuda" else cpu_cases())
    chosen = [case for case in cases if f"test_{case.op}" == metafunc.function.__name__]
    metafunc.parametrize("case", chosen, ids=str)


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def threads(case):
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    yield
    torch.set_num_threads(before)


def make_problem(case, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype, num_experts = getattr(torch, case.dtype), case.S + 1

    def uniform(*shape, size):
        return ((torch.rand(*shape, generator=generator) * 2 - 1) * size).to(dtype).to(device)

    token = torch.arange(case.T)
    ids = {
        "one_stage": torch.ones_like(token),
        "runs": token * case.S // case.T,
        "random": torch.randint(0, case.S, (case.T,), generator=generator),
    }[case.pattern]
    return baselines.Problem(
        x=uniform(case.T, case.K, size=1),
        weight=uniform(case.N, case.K, size=case.K**-0.5),
        lora_A=uniform(num_experts, case.r, case.K, size=case.K**-0.5),
        lora_B=uniform(num_experts, case.N, case.r, size=case.r**-0.5),
        stage_ids=ids.to(device, torch.int32),
        scales=torch.full((num_experts,), 0.5, device=device),
    )


def experts_of(problem):
    return problem.lora_A, problem.lora_B, problem.stage_ids, problem.scales


def ours(problem):
    return mote_ext.mote_linear(problem.x, problem.weight, None, *experts_of(problem))


def judge(problem):
    """Our rows are close to the truth (a row does not depend on its neighbours), and so is each opponent's delta."""
    from closeness import assert_close

    rows = torch.arange(0, len(problem.x), max(1, len(problem.x) // JUDGED_TOKENS), device=problem.x.device)
    x, ids = problem.x[rows], problem.stage_ids[rows]
    arguments = x, problem.weight, None, problem.lora_A, problem.lora_B, ids, problem.scales
    plain = mote_ext.reference.mote_linear(*arguments)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    truth = mote_ext.reference.mote_linear(*wide[:6], problem.scales)
    assert_close("mote_linear", ours(problem)[rows], plain, truth)


def judge_opponents(problem, opponents):
    """Each computes the same thing. A sanity check, not a judgement: their rounding is not ours to judge."""
    delta = mote_ext.lora_delta(problem.x, *experts_of(problem))
    for opponent in opponents:
        got = opponent(problem.x, torch.zeros_like(delta), opponent.leaves)
        error = (got - delta).double().norm() / delta.double().norm()
        assert error <= torch.finfo(delta.dtype).eps ** 0.5, f"{opponent.name} computes something else: {error:.2g}"


def measure_on_cpu(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class MeasureOnGpu:
    """Seconds between two events around the function, with the L2 full of something else before."""

    def __init__(self):
        num_bytes = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(num_bytes, dtype=torch.int8, device="cuda")

    def __call__(self, function):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def race(benchmark, measure, contenders, budget_s=1.0):
    """{name: median seconds}. All run once a round; the first is what pytest-benchmark keeps the statistics of."""
    first, *others = contenders
    seconds = {name: [] for name in contenders}
    for _ in range(2):  # to warm up, and to see how long a round takes
        round_s = sum(measure(function) for function in contenders.values())
    num_rounds = int(min(max(budget_s / round_s, 9), 200))

    def run_others():
        for name in others:
            seconds[name].append(measure(contenders[name]))

    benchmark.pedantic(
        lambda: seconds[first].append(measure(contenders[first])), setup=run_others, rounds=num_rounds, iterations=1
    )
    return {name: median(values) for name, values in seconds.items()}


def record(benchmark, case, device, medians, quiet_share=None):
    benchmark.extra_info.update(
        asdict(case),
        device=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        medians_us={name: round(value * 1e6, 2) for name, value in medians.items()},
        flops=case.flops,
        bytes=case.bytes,
        quiet_share=quiet_share,
        versions={"torch": torch.__version__, "mote_ext": mote_ext.__version__, "cuda": torch.version.cuda},
    )


def multiplies_bfloat16():
    """Whether the processor does, and torch lets its kernels (ATEN_CPU_CAPABILITY)."""
    has_instruction = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return has_instruction and torch.backends.cpu.get_cpu_capability() == "AVX512"


def cpu_name():
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}{' with bfloat16' if multiplies_bfloat16() else ''})"


@torch.inference_mode()
def test_forward(benchmark, case, device, quiet):
    problem = make_problem(case, device)
    opponents = baselines.opponents(problem)
    judge(problem)
    judge_opponents(problem, opponents)
    y = torch.zeros(case.T, case.N, dtype=problem.x.dtype, device=device)
    contenders = {"ours": lambda: ours(problem), "base": lambda: baselines.base(problem)}
    for opponent in opponents:
        contenders[opponent.name] = lambda o=opponent: o(problem.x, y, o.leaves)
    measure = MeasureOnGpu() if device == "cuda" else measure_on_cpu
    medians = race(benchmark, measure, contenders)
    record(benchmark, case, device, medians, quiet())


def test_training(benchmark, case, device, quiet):
    problem = make_problem(case, device)
    opponents = baselines.opponents(problem)
    x = problem.x.requires_grad_()
    with torch.no_grad():
        judge_opponents(problem, opponents)
    dy = torch.rand(case.T, case.N, device=device).to(x.dtype)
    y = torch.zeros_like(dy)  # stands for a finished base, which an opponent adds onto
    leaves = [problem.lora_A.requires_grad_(), problem.lora_B.requires_grad_()]

    def train_ours():
        torch.autograd.grad(mote_ext.lora_delta(x, *experts_of(problem)), [x, *leaves], dy)

    def train(opponent):
        # PEFT's experts without tokens are not in the graph at all.
        given = opponent(x, y.detach(), opponent.leaves)
        torch.autograd.grad(given, [x, *opponent.leaves], dy, allow_unused=True)

    contenders = {"ours": train_ours}
    for opponent in opponents:
        for leaf in opponent.leaves:
            leaf.requires_grad_()
        contenders[opponent.name] = lambda o=opponent: train(o)
    measure = MeasureOnGpu() if device == "cuda" else measure_on_cpu
    medians = race(benchmark, measure, contenders)
    record(benchmark, case, device, medians, quiet())


@torch.inference_mode()
def test_decode(benchmark, case, device):
    problems = [make_problem(case, device, seed) for seed in range(DECODE_LINEARS)]
    judge(problems[0])
    y = torch.zeros(case.T, case.N, dtype=problems[0].x.dtype, device=device)
    contenders = {"ours": captured(ours, problems), "base": captured(baselines.base, problems)}
    for kind in (baselines.PeftLoop, baselines.MaskedDense):
        pairs = [(problem, kind(problem)) for problem in problems]
        contenders[kind.name] = captured(lambda pair: pair[1](pair[0].x, y, pair[1].leaves), pairs)

    def measure(replay):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / DECODE_LINEARS

    record(benchmark, case, device, race(benchmark, measure, contenders, budget_s=0.02))


def captured(function, arguments):
    """A function that replays function(argument) for every argument as one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for argument in arguments:
            function(argument)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for argument in arguments:
            function(argument)
    return graph.replay


if __name__ == "__main__":
    command.run(__file__, __doc__)
