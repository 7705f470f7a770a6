"""Whether two prompt sets share prompts: equal after normalising, or nearly, by the words and letters they share.

similarity(a, b) = max( |W(a) ∩ W(b)| / |W(a) ∪ W(b)| ,  |C(a) ∩ C(b)| / |C(a) ∪ C(b)| )
W = word triples, C = five-letter pieces (Jaccard). Plain sets and an inverted index, so that a thousand prompts against
a thousand take seconds. It finds copies, re-orderings and small edits; a paraphrase in other words it does not find.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

WORDS, LETTERS = 3, 5
_NO_WORD = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Overlap:
    """Two prompts that are (nearly) the same. a, b: their ids; similarity: 1.0 for equal after normalising"""

    a: str
    b: str
    similarity: float


def normalised(text: str) -> str:
    """Lower case, one blank between words, no punctuation and no accents of encoding."""
    return " ".join(_NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())


def similarity(a: str, b: str) -> float:
    """0..1, the larger of the two Jaccard indices; 1.0 for equal after normalising."""
    a, b = normalised(a), normalised(b)
    if a == b:
        return 1.0
    return max(_jaccard(_word_pieces(a), _word_pieces(b)), _jaccard(_letter_pieces(a), _letter_pieces(b)))


def overlaps(a: Sequence, b: Sequence, threshold: float = 0.6) -> list[Overlap]:
    """Pairs of one prompt of a and one of b whose similarity reaches the threshold, the most similar first.

    a, b: things with `id` and `prompt` (SuitePrompt), or plain texts, whose id is their place
    threshold: 1.0 finds equal prompts alone
    ValueError: a threshold outside of (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"overlaps: threshold must be in (0, 1], got {threshold}")
    ours, theirs = _named(a), _named(b)
    found = []
    for name, text in ours:
        if not text:
            continue
        found += [Overlap(name, other, 1.0) for other, same in theirs if same == text]
    if threshold < 1:
        known = {(pair.a, pair.b) for pair in found}
        best: dict[tuple[str, str], float] = {}
        for pieces in (_word_pieces, _letter_pieces):
            for pair, value in _near(ours, theirs, pieces, threshold):
                if pair not in known:
                    best[pair] = max(best.get(pair, 0.0), value)
        found += [Overlap(*pair, value) for pair, value in best.items()]
    return sorted(found, key=lambda pair: (-pair.similarity, pair.a, pair.b))


def without_overlaps(prompts: Sequence, others: Sequence, threshold: float = 0.6) -> list:
    """The prompts that overlap with none of the others."""
    hit = {pair.a for pair in overlaps(prompts, others, threshold)}
    return [prompt for (name, _), prompt in zip(_named(prompts), prompts) if name not in hit]


def _near(ours, theirs, pieces, threshold: float):
    """((id, id), Jaccard index) of the pairs that reach the threshold by these pieces."""
    index, sizes = defaultdict(list), []
    for number, (_, text) in enumerate(theirs):
        found = pieces(text)
        sizes.append(len(found))
        for piece in found:
            index[piece].append(number)
    for name, text in ours:
        found = pieces(text)
        shared = Counter(number for piece in found for number in index.get(piece, ()))
        for number, count in shared.items():
            value = count / (len(found) + sizes[number] - count)
            if value >= threshold:
                yield (name, theirs[number][0]), value


def _named(prompts: Sequence) -> list[tuple[str, str]]:
    return [
        (str(number), normalised(prompt)) if isinstance(prompt, str) else (prompt.id, normalised(prompt.prompt or ""))
        for number, prompt in enumerate(prompts)
    ]


def _word_pieces(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def _letter_pieces(text: str) -> set[str]:
    return {text[i : i + LETTERS] for i in range(len(text) - LETTERS + 1)}


def _jaccard(a: set, b: set) -> float:
    union = len(a | b)
    return len(a & b) / union if union else 0.0
