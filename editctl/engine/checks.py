"""What is measured beside answers: drift, perplexity, general ability, essence, fluency and consistency.

Knows: which of them are asked for, on which texts, and what of the unedited model is known already. Refuses: answers
to prompts, which are `asking`'s, and how a number is made, which `metrics` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from editctl.atlas import knowledge
from editctl.engine.model import Model
from editctl.engine.recall import Recall
from editctl.engine.sampling import LENGTH, sampled
from editctl.events import Emit, Note, StageStarted
from editctl.metrics import ability, consistency, drift, fluency, text
from editctl.metrics.harness import HARNESS, harness
from editctl.metrics.values import CHECKS, PROBABILITY, TEACHER_FORCED, Metric, before_of
from editctl.spec import Edit

DRIFT, PERPLEXITY, ABILITY, ESSENCE, GENERATION = CHECKS
TEXTS = 30
"""Ordinary texts, of ten sentences each, that perplexity is measured on when no other text is named."""
T = TypeVar("T")


def ordinary() -> tuple[str, ...]:
    """Ordinary sentences without facts, ten a text."""
    sentences = knowledge.load().ordinary
    return tuple(" ".join(sentences[start : start + 10]) for start in range(0, len(sentences), 10))


@dataclass
class Side:
    """What was found of one set of weights."""

    states: drift.States | None = None
    ability: ability.Ability | None = None
    alone: list[Metric] = field(default_factory=list)
    """Metrics of the model as it is."""


@dataclass(frozen=True)
class Wanted:
    """What is to be measured beside answers."""

    checks: tuple[str, ...] = ()
    """Of `values.CHECKS`."""
    texts: tuple[str, ...] = ()
    """What perplexity is measured on; empty for the first `TEXTS` ordinary texts."""
    text: str = ""
    """What those are, "" for the ordinary ones."""
    tasks: tuple[str, ...] = ()
    """Of lm-evaluation-harness."""
    trusted: bool = False
    """Whether task files may be run."""


class Checks:
    """What is checked of weights before and after, on the same texts.

    Args:
        edits: whose essences are read and about whose subjects texts are written.
        whose: which of the live edits those are, where not all; such values are not to be compared with those of all.
    """

    def __init__(self, wanted: Wanted, edits: Sequence[Edit], emit: Emit, whose: str = "") -> None:
        self._wanted, self._names, self._edits, self._emit = wanted, frozenset(wanted.checks), tuple(edits), emit
        self._whose, self._told = whose, False
        self._texts = wanted.texts or ordinary()[:TEXTS]

    def side(self, model: Model, layer: int, recall: Recall | None = None) -> Side:
        """Measure the weights the model wears.

        Args:
            layer: the last edited block, after which drift is measured.
            recall: what was found of these weights before; only the unedited model has it.
        """
        side = Side()
        if not self._names and not self._wanted.tasks:
            return side
        self._emit(StageStarted("checks", 0))

        def known(name: str, of: object, find: Callable[[], T]) -> T:
            return find() if recall is None else recall.value(name, of, find)

        if DRIFT in self._names:
            side.states = drift.states(model, drift.prompts(), layer, self._emit)
        if PERPLEXITY in self._names:
            value = known(PERPLEXITY, self._texts, lambda: text.perplexity(model, self._texts))
            protocol = f"{TEACHER_FORCED}, {self._wanted.text}" if self._wanted.text else TEACHER_FORCED
            side.alone.append(Metric(PERPLEXITY, protocol, value, len(self._texts), False))
        if ABILITY in self._names:
            suite = ability.suite()
            asked = [canary.texts for canary in suite]
            right = known(ABILITY, asked, lambda: ability.ability(model, suite, self._emit).right)
            side.ability = ability.Ability(suite, tuple(right))
            side.alone += side.ability.metrics()
        read = [edit.essence for edit in self._edits if edit.essence]
        if ESSENCE in self._names and read:
            found = text.essence(known(ESSENCE, read, lambda: text.essences(model, read, self._emit)))
            side.alone += self._of_some(found)
        openings = self._openings(model) if GENERATION in self._names else []
        if openings:
            prompts = [prompt for _, prompt in openings]
            texts = known(GENERATION, prompts, lambda: sampled(model, prompts, emit=self._emit))
            side.alone += self._of_written([(edit, said) for (edit, _), said in zip(openings, texts, strict=True)])
        for task in self._wanted.tasks:
            side.alone += harness(model, task, trusted=self._wanted.trusted)
        return side

    def _of_written(self, texts: Sequence[tuple[Edit, str | None]]) -> list[Metric]:
        found = self._of_some(fluency.fluency([said for _, said in texts]))
        by_edit: dict[str, list[str | None]] = {}
        for edit, said in texts:
            by_edit.setdefault(edit.id, []).append(said)
        alike = [consistency.resemblance(by_edit.get(edit.id, ()), edit.references) for edit in self._edits]
        return found + self._of_some(consistency.consistency(alike))

    def _of_some(self, metric: Metric | None) -> list[Metric]:
        """A metric of the edits, if there is one, that says which of them."""
        if metric is None:
            return []
        return [replace(metric, protocol=f"{metric.protocol} {self._whose}".rstrip())]

    def _openings(self, model: Model) -> list[tuple[Edit, str]]:
        """Openings of all edits that leave room for a text; the others are told."""
        room = min(LENGTH, model.context_length)
        all_ = [(edit, prompt) for edit in self._edits for prompt in edit.generation_prompts]
        fitting = [(edit, prompt) for edit, prompt in all_ if 0 < len(model.encode(prompt)) < room]
        long = {edit.id for edit, _ in all_} - {edit.id for edit, _ in fitting}
        if len(fitting) < len(all_) and not self._told:
            self._told = True
            named = f", of {', '.join(sorted(long)[:5])} all" if long else ""
            self._emit(Note(f"{len(all_) - len(fitting)} openings leave no room in {room} tokens for a text{named}"))
        return fitting

    def compare(self, before: Side, after: Side) -> tuple[Metric, ...]:
        """Metrics of the second side, each beside what it was on the first, and those of the change."""
        found: list[Metric] = []
        if before.states is not None and after.states is not None:
            found += drift.drift(before.states, after.states).metrics()
        was = {metric.key: metric for metric in before.alone}
        for metric in after.alone:
            found.append(metric)
            if metric.key in was and (not metric.axis or metric.protocol == HARNESS):
                found.append(replace(was[metric.key], axis=before_of(metric.axis)))
        if before.ability is not None and after.ability is not None:
            change = ability.change(before.ability, after.ability)
            n = len(after.ability.right)
            found.append(
                Metric(f"{ABILITY} change", PROBABILITY, change.difference, n, True, "", change.low, change.high)
            )
        return tuple(found)
