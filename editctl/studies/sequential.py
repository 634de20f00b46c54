"""Sequential editing: many made-up edits of atlas, and unrelated facts that must stay.

Knows: how edits are drawn from what atlas knows. Refuses: running them; `bench` does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

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


def beside(edits: Sequence[Edit], unrelated: int, seed: int) -> dict[str, list[Question]]:
    """Questions about facts of subjects that no edit is about, and about other facts of their subjects."""
    facts = list(knowledge.load().single())
    random.Random(seed).shuffle(facts)
    edited = {edit.subject: edit.target_true for edit in edits}
    others = list({fact.subject: fact for fact in facts if fact.subject not in edited}.values())[:unrelated]
    same = [fact for fact in facts if fact.subject in edited and fact.object != edited[fact.subject]]
    return {UNRELATED: _stay(others), SAME_SUBJECT: _stay(same)}


DRAWS = 2
"""New objects that each fact is given where edits are made to be taught."""
REWORDED, NEIGHBOURS = 4, 2
"""Paraphrases, and other subjects of the same relation in the same phrasing, of an edit that is made to be taught."""


def lessons(seed: int) -> list[Edit]:
    """Edits of every fact atlas knows, each with probes of what must stay: other subjects of the relation in the same
    phrasing, another fact of the subject where there is one, and a fact of any kind."""
    known = knowledge.load()
    facts, rng = list(known.single()), random.Random(seed)
    by_relation: dict[str, list[Fact]] = {}
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation, []).append(fact)
        by_subject.setdefault(fact.subject, []).append(fact)
    made: list[Edit] = []
    for draw in range(DRAWS):
        for fact in facts:
            phrasing = rng.choice(fact.seen)
            target = rng.choice([o for o in known.objects(fact.relation) if o != fact.object])
            others = [text for text in (*fact.asked, *rng.sample(fact.seen, len(fact.seen))) if text != phrasing]
            near = [other for other in rng.sample(by_relation[fact.relation], NEIGHBOURS + 1) if other is not fact]
            stays = [(fill(phrasing, other.subject), other.object) for other in near[:NEIGHBOURS]]
            same = [other for other in by_subject[fact.subject] if other.relation != fact.relation]
            for other in ([rng.choice(same)] if same else []) + [rng.choice(facts)]:
                if other.subject != fact.subject or other.relation != fact.relation:
                    stays.append((fill(rng.choice(other.asked), other.subject), other.object))
            made.append(
                Edit(
                    id=f"lesson-{draw}-{len(made)}",
                    subject=fact.subject,
                    relation=phrasing,
                    target_new=target,
                    target_true=fact.object,
                    paraphrases=tuple(others[:REWORDED]),
                    locality=tuple(Probe(prompt=text, answer=(answer,)) for text, answer in stays),
                    portability=tuple(_consequences(fact, target)),
                )
            )
    return made


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
