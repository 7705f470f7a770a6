"""Jailbreak wrappers around requests, on demand: PyRIT's templates (MIT), most of them collected in the wild.

A template is text with the slot {{ prompt }}. The slot is replaced and nothing is evaluated: a template language would
run what strangers wrote. Which templates a request gets is keyed by the seed and the request's id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mote_ext import keyed
from mote_ext.suites.packages import package_file

PYRIT = "pyrit==1.1.0"
FOLDER = "pyrit/datasets/jailbreak/templates"
_SLOT = re.compile(r"\{\{\s*prompt\s*\}\}")
_RAW = re.compile(r"\{%-?\s*(?:end)?raw\s*-?%\}")  # around text that is to be taken as it stands
_LOGIC = re.compile(r"\{\{|\{%")


@dataclass(frozen=True)
class Wrapper:
    """A template. id: its file below the templates' folder, without .yaml; text: with one or more {{ prompt }}"""

    id: str
    text: str

    def around(self, prompt: str) -> str:
        return _SLOT.sub(lambda slot: prompt, self.text)


def read_wrappers(max_chars: int | None = None) -> list[Wrapper]:
    """All templates with the one slot and nothing else to fill in, in order of their ids.

    max_chars: longer ones are left out (half of them have more than 1,900 characters); None for all
    ImportError: the pyrit package is not there, with the pip command.
    """
    return [
        wrapper for wrapper in _all(package_file(PYRIT, FOLDER)) if max_chars is None or len(wrapper.text) <= max_chars
    ]


@cache
def _all(folder: Path) -> tuple[Wrapper, ...]:
    """Read once: 655 files take seconds."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    wrappers = []
    for path in sorted(folder.rglob("*.yaml")):
        template = yaml.load(path.read_bytes(), loader)
        text = _RAW.sub("", template["value"])
        filled = _SLOT.sub("", text)
        if template.get("parameters") == ["prompt"] and filled != text and not _LOGIC.search(filled):
            wrappers.append(Wrapper(str(path.relative_to(folder).with_suffix("")), text))
    return tuple(wrappers)


def wrapped(prompts: Sequence, num_wrappers: int = 1, max_chars: int | None = 2000, seed: int = 0) -> list:
    """Each prompt in `num_wrappers` different templates; ids get "+" and the template's id.

    prompts: SuitePrompt rows, or anything with id, prompt and source that dataclasses.replace takes
    ValueError: fewer templates of that length than asked for. ImportError: as read_wrappers.
    """
    templates = read_wrappers(max_chars)
    if not 1 <= num_wrappers <= len(templates):
        raise ValueError(
            f"wrapped: num_wrappers must be in 1..{len(templates)}, the templates of at most {max_chars} characters, "
            f"got {num_wrappers}"
        )
    found = []
    for prompt in prompts:
        ranked = sorted(templates, key=lambda template: keyed.bits("wrapper", seed, prompt.id, template.id))
        for template in ranked[:num_wrappers]:
            changes = {"id": f"{prompt.id}+{template.id}", "prompt": template.around(prompt.prompt)}
            found.append(replace(prompt, **changes, source=f"{prompt.source} in {PYRIT}/{template.id}"))
    return found
