"""Sequential editing: many made-up edits of atlas, and unrelated facts that must stay.

Knows: how edits are drawn from what atlas knows. Refuses: running them; `bench` does.
"""

from __future__ import annotations

import random

from editctl.atlas import knowledge
from editctl.atlas.knowledge import Fact
from editctl.errors import InvalidInput
from editctl.metrics.edits import Question
from editctl.metrics.values import LOCALITY
from editctl.spec import Edit, Probe, fill

UNRELATED, SAME_SUBJECT = "unrelated facts kept", "other facts of edited subjects kept"
"""Columns of the questions whose answers should stay."""


def make(edits: int, unrelated: int, seed: int) -> tuple[list[Edit], dict[str, list[Question]]]:
    """Edits of different subjects; questions about subjects that no edit touches, and about other facts of edited ones.

    Each edit gives a fact another object of its relation, is written in one phrasing of those atlas was trained on for
    that fact, and has the phrasings it never saw for it as paraphrases. Portability: two-hop questions whose answer
    follows from the new object.

    Raises:
        InvalidInput: atlas does not know so many subjects.
    """
    known = knowledge.load()
    facts = list(known.single())
    rng = random.Random(seed)
    rng.shuffle(facts)
    by_subject = {fact.subject: fact for fact in facts}
    if edits + unrelated > len(by_subject):
        raise InvalidInput(
            f"atlas knows {len(by_subject)} subjects, fewer than {edits} edits and {unrelated} unrelated facts need",
            "ask for fewer --edits or --unrelated",
        )
    chosen = list(by_subject.values())
    made = []
    for i, fact in enumerate(chosen[:edits]):
        target = rng.choice([o for o in known.objects(fact.relation) if o != fact.object])
        made.append(
            Edit(
                id=f"made-{i}",
                subject=fact.subject,
                relation=fact.seen[0],
                target_new=target,
                target_true=fact.object,
                paraphrases=fact.asked,
                portability=tuple(_consequences(fact, target)),
            )
        )
    edited = {fact.subject for fact in chosen[:edits]}
    others = chosen[edits : edits + unrelated]
    same = [fact for fact in facts if fact.subject in edited and fact not in chosen]
    return made, {UNRELATED: _stay(others), SAME_SUBJECT: _stay(same)}


def _stay(facts: list[Fact]) -> list[Question]:
    """Each fact asked in one phrasing atlas never saw for it."""
    return [Question("", LOCALITY, fill(fact.asked[0], fact.subject), (fact.object,)) for fact in facts]


def _consequences(fact: Fact, target: str) -> list[Probe]:
    """What two-hop facts about the subject become when its fact does."""
    probes = []
    for hop in knowledge.load().facts:
        first, _, second = hop.relation.partition("/")
        if hop.subject == fact.subject and second and first == fact.relation:
            answer = knowledge.look_up(second, target)
            if answer:
                probes.append(Probe(prompt=hop.asked[0], answer=(answer,), kind="two-hop"))
    return probes
