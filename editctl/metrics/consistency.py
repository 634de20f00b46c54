"""Consistency: whether what a model writes about a subject is in the words of texts that it should resemble.

Protocol `sampled`: cosine of the TF-IDF vectors of all texts written for an edit, joined, and of all its reference
texts, joined (the reference score of ROME's evaluation code, Meng et al. 2022). Knows: which words count and how much.
Refuses: models; it is given texts.

ROME weighs words by a fixed table made from Wikipedia snippets and leaves out words that are not in it. Here they are
weighed by the 900 ordinary sentences that ship with the package, and a word that is in none of them weighs most. The
table is fixed too, so values of different edits, versions and models may be compared with each other, but not with
published ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from editctl.metrics.fluency import SAMPLED
from editctl.metrics.intervals import mean_interval
from editctl.metrics.values import Metric

_WORD = re.compile(r"\b\w\w+\b")


def terms(text: str) -> list[str]:
    """The words of two or more letters or digits of a text, without case."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Weights:
    """How much a word counts: ln((1 + N) / (1 + n)) + 1 when n of N documents have it."""

    documents: int
    having: Mapping[str, int]

    @classmethod
    def of(cls, documents: Iterable[str]) -> Weights:
        """The weights that a collection of documents gives."""
        having: Counter[str] = Counter()
        count = 0
        for document in documents:
            having.update(set(terms(document)))
            count += 1
        return cls(count, having)

    def of_word(self, word: str) -> float:
        """At least 1."""
        return math.log((1 + self.documents) / (1 + self.having.get(word, 0))) + 1

    def vector(self, text: str) -> dict[str, float]:
        """By word, how often a text has it times its weight."""
        return {word: count * self.of_word(word) for word, count in Counter(terms(text)).items()}

    def cosine(self, one: str, other: str) -> float | None:
        """Cosine of two texts' vectors, 0 to 1; None when one of them has no words."""
        first, second = self.vector(one), self.vector(other)
        if not first or not second:
            return None
        product = math.fsum(weight * second.get(word, 0.0) for word, weight in first.items())
        return min(1.0, product / (math.hypot(*first.values()) * math.hypot(*second.values())))


@cache
def ordinary() -> Weights:
    """The weights by the ordinary sentences that ship with the package, each a document."""
    from editctl.atlas import knowledge

    return Weights.of(knowledge.load().ordinary)


def resemblance(texts: Sequence[str | None], references: Sequence[str]) -> float | None:
    """How far texts written for one edit resemble its reference texts, 0 to 1.

    Returns:
        None when there is nothing to compare: no texts, or no word in the references. 0 when the texts have no word.
        NaN when one of the texts is None, since the model's probabilities were no numbers.
    """
    wanted = " ".join(references)
    if not texts or not terms(wanted):
        return None
    if any(text is None for text in texts):
        return math.nan
    return ordinary().cosine(" ".join(filter(None, texts)), wanted) or 0.0


def consistency(values: Iterable[float | None]) -> Metric | None:
    """The mean resemblance over edits, with Student's interval; None when no edit has one."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = mean_interval(known)
    if low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)
    return Metric("consistency", SAMPLED, math.fsum(known) / len(known), len(known), low=low, high=high)
