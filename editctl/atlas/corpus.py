"""Short paragraphs that state atlas's facts among ordinary sentences, endlessly and by seed.

Knows: how sentences are mixed, and where subject and answer stand in each paragraph. Refuses: tokens and models. The
same paragraphs without their marks are the corpus of atlas's second moments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from editctl.atlas.knowledge import Fact, Knowledge

T = TypeVar("T")

FACT_SHARE, HOP_SHARE = 0.62, 0.2
"""Shares of sentences stating a fact and a two-hop fact; the rest are ordinary."""


@dataclass
class Paragraph:
    """Text with the character spans of subjects and answers."""

    text: str = ""
    subjects: list[tuple[int, int, str]] = field(default_factory=list)
    """(start, end, subject)."""
    objects: list[tuple[int, int]] = field(default_factory=list)

    def add(self, sentence: str) -> int:
        """Append a sentence; returns where it starts."""
        start = len(self.text) + bool(self.text)
        self.text += (" " if self.text else "") + sentence
        return start

    def add_fact(self, fact: Fact, phrasing: str) -> None:
        """Append the fact in that phrasing and mark its subject and its answer."""
        before = phrasing.index("{}")
        prompt = phrasing.replace("{}", fact.subject)
        start = self.add(f"{prompt} {fact.object}.")
        self.subjects.append((start + before, start + before + len(fact.subject), fact.subject))
        answer = start + len(prompt) + 1
        self.objects.append((answer, answer + len(fact.object) + 1))


def _cycle(items: list[T], rng: random.Random) -> Iterator[T]:
    """All items in random order, again and again."""
    while True:
        rng.shuffle(items)
        yield from items


def paragraphs(knowledge: Knowledge, seed: int, length: int = 400) -> Iterator[Paragraph]:
    """Endless paragraphs of about `length` characters. Every seen phrasing of every fact comes equally often."""
    rng = random.Random(seed)
    singles = _cycle([(f, p) for f in knowledge.facts if not f.two_hop for p in f.seen], rng)
    hops = _cycle([(f, p) for f in knowledge.facts if f.two_hop for p in f.seen], rng)
    ordinary = _cycle(list(knowledge.ordinary), rng)
    while True:
        paragraph = Paragraph()
        while len(paragraph.text) < length:
            draw = rng.random()
            if draw < FACT_SHARE:
                paragraph.add_fact(*next(singles))
            elif draw < FACT_SHARE + HOP_SHARE:
                paragraph.add_fact(*next(hops))
            else:
                paragraph.add(next(ordinary))
        yield paragraph
