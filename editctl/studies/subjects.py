"""Two edits a subject: one target vector for both, against one each; and facts of the subject that nobody touches.

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

NAMED, UNNAMED = "facts of the subject the specs name", "facts of the subject nobody names"


def make(subjects: int, seed: int) -> tuple[list[Edit], list[Edit], dict[str, list[Question]]]:
    """The first edit of every subject, the second of every subject, and questions about further facts of them.

    Subjects have at least two facts of different relations, those with most facts first. Of a third fact the second
    edit's spec says that it shall stay, as a locality probe in a phrasing atlas was trained on; it is asked in one that
    atlas never saw for it, and so are further facts, which no spec names.

    Raises:
        InvalidInput: atlas knows fewer such subjects.
    """
    known = knowledge.load()
    rng = random.Random(seed)
    by_subject: dict[str, dict[str, Fact]] = {}
    for fact in known.single():
        by_subject.setdefault(fact.subject, {})[fact.relation] = fact
    rich = [list(facts.values()) for facts in by_subject.values() if len(facts) >= 2]
    rng.shuffle(rich)
    rich.sort(key=len, reverse=True)
    if len(rich) < subjects:
        raise InvalidInput(f"atlas knows {len(rich)} subjects with two facts, not {subjects}", "ask for fewer")
    first: list[Edit] = []
    second: list[Edit] = []
    asked: dict[str, list[Question]] = {NAMED: [], UNNAMED: []}
    for i, facts in enumerate(rich[:subjects]):
        rng.shuffle(facts)
        probes = tuple(Probe(prompt=fact.seen[0], answer=(fact.object,)) for fact in facts[2:3])
        for edits, fact, named in ((first, facts[0], ()), (second, facts[1], probes)):
            target = rng.choice([o for o in known.objects(fact.relation) if o != fact.object])
            edits.append(
                Edit(
                    id=f"subject-{i}-{len(first) + len(second) - 2 * i}",
                    subject=fact.subject,
                    relation=fact.seen[0],
                    target_new=target,
                    target_true=fact.object,
                    paraphrases=fact.asked,
                    locality=named,
                )
            )
        asked[NAMED] += [_stays(fact) for fact in facts[2:3]]
        asked[UNNAMED] += [_stays(fact) for fact in facts[3:]]
    return first, second, asked


def _stays(fact: Fact) -> Question:
    return Question("", LOCALITY, fill(fact.asked[0], fact.subject), (fact.object,))
