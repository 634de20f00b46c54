"""How much preserved-knowledge data a null space needs: shares of the corpus against rank and scores.

Knows: the rule by which the smallest safe corpus is named. Refuses: to run trials; `bench` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from editctl.metrics.edits import NAMES
from editctl.metrics.values import GENERATED, LOCALITY, PARAPHRASE, REWRITE, Metric
from editctl.studies.bench import CORPUS, Trial
from editctl.studies.tables import Result

SHARES = (1, 2, 5, 10, 25, 50, 100)
"""Percent of the corpus's tokens."""
WATCHED = tuple(NAMES[kind] for kind in (REWRITE, PARAPHRASE, LOCALITY))
"""Scores, in the model's own words, that a smaller corpus must not lower."""
SHARE = "corpus, percent"
RULE = (
    "The smallest safe corpus is the smallest share from which on, up to the whole, no score of reliability, "
    "generalization and locality (generated) is below the lower end of the whole corpus's 95 % interval."
)


def whole(trial: Trial) -> Trial:
    """The trial with all tokens its settings ask for."""
    return replace(trial, labels={**trial.labels, SHARE: 100})


def parts(trial: Trial, shares: Sequence[int], seen: int) -> Iterator[Trial]:
    """The trials with less, the largest share first.

    Args:
        seen: tokens that the whole corpus gave.
    """
    for share in sorted((share for share in set(shares) if share < 100), reverse=True):
        settings = replace(trial.settings, corpus_tokens=max(1, seen * share // 100))
        yield replace(trial, settings=settings, labels={**trial.labels, SHARE: share})


def seen(result: Result) -> int:
    """Tokens that the corpus gave."""
    return next(metric.n for metric in result.marks[-1].beside if metric.name == CORPUS)


def smallest_safe(results: Sequence[Result]) -> int | None:
    """The smallest safe share by `RULE`, in percent, among the shares of one method; None where one of the scores was
    not measured with the whole corpus, so that nothing can be said."""
    by_share = {int(str(result.trial.heads[SHARE])): result for result in results}
    floor = {name: metric.low for name, metric in _watched(by_share[100]).items()}
    if set(floor) != set(WATCHED):
        return None
    safe = 100
    for share in sorted(by_share, reverse=True):
        found = _watched(by_share[share])
        for name, low in floor.items():
            if name not in found or (low is not None and found[name].value < low):
                return safe
        safe = share
    return safe


def spelled(share: int | None) -> str:
    """A smallest safe share in words."""
    if share is None:
        return f"cannot be said: {', '.join(WATCHED)} were not all measured with the whole corpus"
    return f"{share} % of the corpus"


def _watched(result: Result) -> dict[str, Metric]:
    """The watched scores of the last mark; none where the trial was refused."""
    last = result.marks[-1].answers if result.marks else ()
    return {m.name: m for m in last if m.name in WATCHED and m.protocol == GENERATED and not m.axis}
