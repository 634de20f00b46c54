"""General ability: what any model of English should still do after an edit that is about something else.

Protocol `probability`: of texts that differ in one place, the right one must be the likeliest, by the log-likelihood of
all its tokens, as in BLiMP (Warstadt et al. 2020). Knows: the canaries in `canaries.toml`, written for this project;
their families, chance level and score. Refuses: facts; what edits do to those is locality's matter.

They are few and easy: a fall tells that something is broken, no fall tells little. `harness` measures with the tasks
others use.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from editctl.engine.model import Model
from editctl.engine.speak import likelihoods
from editctl.events import Emit, silent
from editctl.metrics import intervals
from editctl.metrics.values import PROBABILITY, Metric

ABILITY = "ability"
"""Name of the metric; its axis is the family."""
_CHOICES = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Canary:
    """One item: texts of which the first is right."""

    family: str
    texts: tuple[str, ...]

    @property
    def chance(self) -> float:
        """Share of right answers of a model that knows nothing, 0 to 1."""
        return 1 / len(self.texts)


@cache
def suite() -> tuple[Canary, ...]:
    """All canaries, family by family."""
    data = tomllib.loads(Path(__file__).with_name("canaries.toml").read_text(encoding="utf-8"))
    return tuple(Canary(family["name"], _texts(item)) for family in data["family"] for item in family["items"])


def _texts(item: str) -> tuple[str, ...]:
    before, choices, after = _CHOICES.split(item)
    return tuple(before + choice + after for choice in choices.split("|"))


@dataclass(frozen=True)
class Ability:
    """Which canaries a model answers rightly."""

    canaries: tuple[Canary, ...]
    right: tuple[bool, ...]

    def metrics(self) -> tuple[Metric, ...]:
        """The share of right ones over all and by family, with Wilson's interval."""
        pairs = list(zip(self.canaries, self.right, strict=True))
        parts = {"": list(self.right)}
        for canary, right in pairs:
            parts.setdefault(canary.family, []).append(right)
        return tuple(
            Metric(ABILITY, PROBABILITY, sum(some) / len(some), len(some), True, family, *_wilson(some))
            for family, some in parts.items()
            if some
        )


def _wilson(right: Sequence[bool]) -> tuple[float, float]:
    return intervals.wilson(sum(right), len(right))


def ability(model: Model, canaries: Sequence[Canary] | None = None, emit: Emit = silent) -> Ability:
    """Ask the weights the model wears.

    A right text that is only as likely as another is not the likeliest, and one whose likelihood is no number (NaN)
    neither: a model that tells nothing apart scores 0, below chance.

    Args:
        canaries: None for the whole suite.
    """
    asked = tuple(suite() if canaries is None else canaries)
    scores = iter(likelihoods(model, [text for canary in asked for text in canary.texts], emit))
    right = []
    for canary in asked:
        first, *others = (total for total, _ in itertools.islice(scores, len(canary.texts)))
        right.append(all(first > other for other in others))
    return Ability(asked, tuple(right))


@dataclass(frozen=True)
class Change:
    """How the same canaries were answered before and after."""

    lost: tuple[Canary, ...]
    """Right before, wrong after."""
    gained: tuple[Canary, ...]
    difference: float
    """Share of right ones after less that before, −1 to 1."""
    low: float
    """95 % interval of the difference (Newcombe 1998, paired data)."""
    high: float
    p: float
    """McNemar's exact test, two-sided: how likely a change this uneven is when an edit loses as often as it gains."""


def change(before: Ability, after: Ability) -> Change:
    """Compare two answers to the same canaries.

    Raises:
        ValueError: they were asked others.
    """
    if before.canaries != after.canaries:
        raise ValueError("the canaries are others")
    pairs = list(zip(before.canaries, before.right, after.right, strict=True))
    lost = tuple(canary for canary, was, is_ in pairs if was and not is_)
    gained = tuple(canary for canary, was, is_ in pairs if is_ and not was)
    low, high = intervals.change(before.right, after.right)
    difference = (len(gained) - len(lost)) / max(1, len(pairs))
    return Change(lost, gained, difference, low, high, intervals.mcnemar(len(lost), len(gained)))
