"""The scheduler's counts, and what they come to for people."""

from __future__ import annotations

from collections.abc import Sequence

from mote_ext.engine.cache import PagedCache


def readable(counts: dict, cache: PagedCache, stages: Sequence[str]) -> dict:
    """The counts, and

    tokens_per_step: tokens of a forward in the mean
    hit_rate:        share of prompt tokens that were in the cache when a request was first admitted
    stage_mix:       {"base", "shared" or a stage: share of all tokens}
    page_size, cache_bytes: of the paged cache
    """
    planned = max(1, sum(counts["stage_tokens"]))
    names = ("base", "shared", *stages)
    return {
        **counts,
        "tokens_per_step": counts["planned_tokens"] / max(1, counts["steps"]),
        "hit_rate": counts["prompt_hit_tokens"] / max(1, counts["prompt_tokens"]),
        "stage_mix": {name: count / planned for name, count in zip(names, counts["stage_tokens"])},
        "page_size": cache.page_size,
        "cache_bytes": cache.num_bytes(),
    }
