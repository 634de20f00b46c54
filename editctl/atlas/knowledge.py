"""What atlas is taught: facts, two-hop facts and ordinary sentences, read from `facts/`.

Knows: the data files, and which phrasings of a fact are shown in training and which are kept for asking. Refuses:
tokens and models.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parent / "facts"
INVERSE = "^-1"
ASKED = 2
"""Phrasings of each fact that training never shows for it."""


@dataclass(frozen=True)
class Fact:
    """One thing atlas knows. Prompts are phrasings with the subject filled in; the answer follows after a space."""

    relation: str
    """Relation name; a two-hop fact has two, joined by "/"."""
    subject: str
    object: str
    seen: tuple[str, ...]
    """Phrasings, each with one {}, used in training for this fact."""
    asked: tuple[str, ...]
    """Phrasings used in training for other facts only."""

    @property
    def two_hop(self) -> bool:
        """Whether it joins two relations."""
        return "/" in self.relation

    def prompts(self, phrasings: tuple[str, ...]) -> Iterator[str]:
        """The phrasings with the subject in its place."""
        return (phrasing.replace("{}", self.subject) for phrasing in phrasings)


@dataclass(frozen=True)
class Knowledge:
    """Everything in `facts/`."""

    facts: tuple[Fact, ...]
    """Single facts, then two-hop facts."""
    ordinary: tuple[str, ...]
    """Sentences that state no fact."""

    def single(self) -> tuple[Fact, ...]:
        """The facts of one relation."""
        return tuple(fact for fact in self.facts if not fact.two_hop)

    def objects(self, relation: str) -> tuple[str, ...]:
        """All different answers of a relation, sorted."""
        return tuple(sorted({fact.object for fact in self.facts if fact.relation == relation}))


def _fact(relation: str, subject: str, answer: str, phrasings: list[str]) -> Fact:
    """Split the phrasings by a hash of the fact, so that every phrasing is shown for some facts and kept for others."""
    order = sorted(phrasings, key=lambda p: sha256(f"{relation}|{subject}|{p}".encode()).digest())
    return Fact(relation, subject, answer, seen=tuple(order[ASKED:]), asked=tuple(order[:ASKED]))


@cache
def _data() -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Relations by name, and hops, as they stand in the files."""
    relations: dict[str, dict[str, Any]] = {}
    hops: list[dict[str, Any]] = []
    for path in sorted(FACTS.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        relations.update({relation["name"]: relation for relation in data.get("relation", [])})
        hops.extend(data.get("hop", []))
    return relations, hops


@cache
def _table(relation: str) -> dict[str, str]:
    """Answers by subject; `name^-1` is the relation read backwards."""
    name = relation.removesuffix(INVERSE)
    table: dict[str, str] = _data()[0][name]["facts"]
    return table if name == relation else {answer: subject for subject, answer in table.items()}


def look_up(relation: str, subject: str) -> str | None:
    """What a relation says of a subject, None if nothing."""
    return _table(relation).get(subject)


@cache
def load() -> Knowledge:
    """Read all data files."""
    relations, hops = _data()
    facts = [
        _fact(name, subject, answer, relation["phrasings"])
        for name, relation in relations.items()
        for subject, answer in _table(name).items()
    ]
    for hop in hops:
        for subject, middle in _table(hop["first"]).items():
            if (answer := look_up(hop["second"], middle)) is not None:
                facts.append(_fact(f"{hop['first']}/{hop['second']}", subject, answer, hop["phrasings"]))
    ordinary = (FACTS / "ordinary.txt").read_text(encoding="utf-8").splitlines()
    return Knowledge(tuple(facts), tuple(line for line in ordinary if line))
