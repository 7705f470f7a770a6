"""How a model is asked for a stage: text templates that a user can replace, and examples shown before the question.

A template is a text file named after its stage. Sections are separated by blank lines; a section with a slot that has
no value is left out, so that response.txt serves answers with and without an analysis. Slots are {prompt} and the
stages' names. They are filled in one pass: a slot spelled inside of a prompt or an analysis stays as it is.
What the templates ask for follows MoTE, arXiv 2405.00557, figure 2; the wording is our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mote_ext.chains.prompts import Prompt, digest_of
from mote_ext.chains.record import UNSAFE, Chain
from mote_ext.stages import StageTable

TEMPLATES = Path(__file__).parent / "templates"
EXEMPLARS = Path(__file__).parent / "exemplars"
PROMPT_SLOT = "prompt"
CHECK_TEMPLATE, ANSWER_SLOT = "check", "response"
_SLOT = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Templates:
    """texts: template name (a stage's name, or "check") -> the file's text"""

    texts: Mapping[str, str]

    @classmethod
    def read(cls, table: StageTable, folder: str | Path | None = None) -> Templates:
        """The templates of a table's stages and of the check: the folder's, and what it does not have ours.

        ValueError: a stage without a template, a text file that belongs to no stage, an unknown or a missing slot.
        """
        stages = [stage.name for stage in table.stages if stage.role != "check"]
        names = [*stages, CHECK_TEMPLATE]
        # Ours are not checked: with another table, sections about stages it does not have are left out.
        found = {
            name: (TEMPLATES / f"{name}.txt").read_text() for name in names if (TEMPLATES / f"{name}.txt").is_file()
        }
        if folder is not None:
            found |= {path.stem: _read(path, stages) for path in _template_files(folder, names)}
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"templates: the stages {missing} have none; put {missing[0]}.txt into a folder and name the folder"
            )
        return cls(found)

    def render(self, name: str, prompt: str, texts: Mapping[str, str]) -> str:
        """The request for a stage. texts: what is written so far by stage name; others' slots drop their sections."""
        values = {PROMPT_SLOT: prompt, **texts}
        sections = []
        for section in _BLANK_LINE.split(self.texts[name].strip()):
            if all(slot in values for slot in _SLOT.findall(section)):
                sections.append(_SLOT.sub(lambda slot: values[slot[1]], section))
        return "\n\n".join(sections)

    @property
    def digest(self) -> str:
        return digest_of(dict(self.texts))


def exemplar_turns(
    templates: Templates, exemplars: Sequence[Chain], stage: str, given: Sequence[str], label: str | None
) -> list[dict]:
    """Examples as turns of a conversation: the request for a stage as the user's, what an example has there as the
    assistant's.

    given: names of the stages whose texts the request holds; an example without one of them is passed over
    label: of the prompt; examples of the same label are shown, all of them to a prompt without one
    """
    turns = []
    for chain in exemplars:
        of_another = label is not None and chain.meta.get("label") != label
        if of_another or chain.check == UNSAFE or any(name not in chain.texts for name in (*given, stage)):
            continue
        question = Prompt("exemplar", chain.prompt, chain.messages).text
        request = templates.render(stage, question, {name: chain.texts[name] for name in given})
        turns += [{"role": "user", "content": request}, {"role": "assistant", "content": chain.texts[stage]}]
    return turns


def _template_files(folder: str | Path, names: Sequence[str]) -> list[Path]:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"templates: there is no folder {folder}")
    files = sorted(folder.glob("*.txt"))
    strange = [path for path in files if path.stem not in names]
    if strange:
        raise ValueError(f"{strange[0]}: a template is named after its stage, one of {list(names)}")
    return files


def _read(path: Path, stages: Sequence[str]) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8") from None
    checks = path.stem == CHECK_TEMPLATE
    needed = [PROMPT_SLOT, ANSWER_SLOT] if checks else [PROMPT_SLOT]
    allowed = needed if checks else [PROMPT_SLOT, *stages[: stages.index(path.stem)]]
    slots = _SLOT.findall(text)
    unknown = [slot for slot in slots if slot not in allowed]
    if unknown:
        raise ValueError(f"{path}: the slots {{{'}, {'.join(allowed)}}} have values there, got {{{unknown[0]}}}")
    missing = [slot for slot in needed if slot not in slots]
    if missing:
        raise ValueError(f"{path}: the slot {{{missing[0]}}} is missing")
    return text
