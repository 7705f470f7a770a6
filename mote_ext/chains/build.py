"""build_chains: from prompts to a file of chains, resumable. What `mote chains` and the examples call.

prompts ──groups of batch_size──► GroupBuilder (here, or in Ray's actors) ──► Journal ──► Mix
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mote_ext.chains.asking import Templates
from mote_ext.chains.checkers import Checker
from mote_ext.chains.group import GroupBuilder, GroupResult
from mote_ext.chains.journal import Journal
from mote_ext.chains.mix import Mix
from mote_ext.chains.prompts import Prompt, digest_of, require_unique_ids
from mote_ext.chains.record import Chain, read_chains
from mote_ext.chains.settings import Settings
from mote_ext.chains.writer import TextWriter
from mote_ext.config import MoTEConfig
from mote_ext.digest import weights_digest
from mote_ext.stages import StageTable

FORMAT = 1
Group = Sequence[Prompt]
Progress = Callable[[int, GroupResult | None], None]


@dataclass(frozen=True)
class Summary:
    """mix: of all chains in the file, those of earlier runs too; out, dropped: the files; num_built: prompts gone
    through now; num_found: that were there already"""

    mix: Mix
    out: Path
    dropped: Path
    num_built: int
    num_found: int


def build_chains(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    checker: Checker,
    settings: Settings,
    out: str | Path,
    *,
    templates: Templates | str | Path | None = None,
    exemplars: Sequence[Chain] | str | Path = (),
    run_groups: Callable[[list[Group]], Iterable[GroupResult]] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Builds the chains of the prompts and appends them to a file; run again after a stop, it goes on.

    model:      any causal language model of transformers, in evaluation mode; a MoTE model's own stages are used,
                otherwise the default ones
    checker:    of checkers.py; measure it before (require_trust), this function does not
    out:        path of the chains; beside it are written OUT.dropped.jsonl and OUT.meta.json
    templates:  a folder, or Templates; None for the package's own
    exemplars:  chains, or a file of them, shown before the requests for the stages
    run_groups: builds groups somewhere else, in order (distributed.run_on_ray)
    progress:   called as progress(prompts done, None) at the beginning, and with each group's result once it is on disk
    ValueError: prompts with one id, one that cannot be encoded, settings without sense, an output file of another run.
    OSError: a full disk.
    """
    table = stage_table_of(model)
    if not isinstance(templates, Templates):
        templates = Templates.read(table, templates)
    if isinstance(exemplars, (str, Path)):
        exemplars = read_chains(exemplars, table)
    require_unique_ids(prompts, "build_chains")
    checker.accept(prompts)
    writer = TextWriter(model, tokenizer, settings.temperature, settings.top_p)
    for prompt in prompts:  # one that the chat template refuses would end each restart at the same place
        try:
            writer.encode(prompt.turns)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id}: {error}") from error
    builder = GroupBuilder(writer, checker, table, templates, settings, exemplars)
    meta = run_meta(model, prompts, checker, settings, templates, exemplars, table)
    with Journal(out, meta) as journal:
        groups = groups_of(prompts, settings.batch_size)
        missing = [group for group in groups if not journal.is_done(group)]
        num_found = num_done = len(prompts) - sum(map(len, missing))
        if progress is not None:
            progress(num_done, None)
        for result in map(builder.build, missing) if run_groups is None else run_groups(missing):
            journal.append(result)
            num_done += result.num_prompts
            if progress is not None:
                progress(num_done, result)
        mix = Mix.of(journal.out, table, tokenizer)
        return Summary(mix, journal.out, journal.dropped, num_done - num_found, num_found)


def stage_table_of(model) -> StageTable:
    """A MoTE model's stages, for any other model the default ones."""
    routing = getattr(model, "routing", None)
    return MoTEConfig().stage_table if routing is None else routing.table


def groups_of(prompts: Sequence[Prompt], batch_size: int) -> list[Group]:
    """The prompts in their order, batch_size at a time."""
    return [prompts[begin : begin + batch_size] for begin in range(0, len(prompts), batch_size)]


def run_meta(
    model,
    prompts: Sequence[Prompt],
    checker: Checker,
    settings: Settings,
    templates: Templates,
    exemplars: Sequence[Chain],
    table: StageTable,
) -> dict:
    """What determines a run's chains, as JSON."""
    return {
        "format": FORMAT,
        "prompts": digest_of([prompt.to_dict() for prompt in prompts]),
        "num_prompts": len(prompts),
        "model": weights_digest(model) or model.name_or_path,
        "dtype": str(model.dtype),
        "stages": list(table.names),
        "checker": checker.name,
        "templates": templates.digest,
        "exemplars": digest_of([chain.to_dict() for chain in exemplars]),
        **settings.to_dict(),
    }
