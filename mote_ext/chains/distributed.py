"""The groups of a run on Ray Data's actors, each with a model of its own; the output is that of a run without Ray.

Groups, keys of draws and the order of writing are the same. The arithmetic is where devices and numbers of threads are:
an actor takes the number of threads of the process that started it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from mote_ext.chains.group import GroupBuilder, GroupResult
from mote_ext.chains.prompts import Prompt


def run_on_ray(
    make_builder: Callable[[], GroupBuilder], groups: Sequence[Sequence[Prompt]], num_actors: int
) -> Iterator[GroupResult]:
    """The results of the groups, in order, as they come.

    make_builder: called once in each actor, so it must be picklable and load the model itself
    num_actors:   actors; each takes a GPU where the cluster has any, else a CPU
    ImportError: Ray is not installed, with the extra that has it.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("chains on several actors need Ray: pip install 'mote_ext[ray]'") from None
    if not groups:
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = [{"group": json.dumps([prompt.to_dict() for prompt in group])} for group in groups]
    gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(make_builder, torch.get_num_threads()),
        batch_size=1,
        concurrency=num_actors,
        **gpus,
    )
    for row in results.iter_rows():
        yield GroupResult(**json.loads(row["result"]))


class _Actor:
    """One model; map_batches gives it a group at a time."""

    def __init__(self, make_builder: Callable[[], GroupBuilder], num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.builder = make_builder()

    def __call__(self, batch: dict) -> dict:
        prompts = [Prompt.from_dict(row, row["id"]) for row in json.loads(batch["group"][0])]
        return {"result": [json.dumps(asdict(self.builder.build(prompts)))]}
