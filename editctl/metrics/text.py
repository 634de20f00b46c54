"""Perplexity on a text: how well the model still predicts what no edit is about, and what is written about a subject.

Protocol: texts one by one, teacher-forced, each token after the first given those before it; exp of the mean negative
log-likelihood. Lower is better. A model with a start token reads it first, so all tokens of the text are predicted;
without one the first is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from editctl.engine.model import Model
from editctl.engine.speak import likelihoods
from editctl.events import Emit, silent
from editctl.metrics.intervals import mean_interval
from editctl.metrics.values import TEACHER_FORCED, Metric

ESSENCE_TOKENS = 100
"""Tokens of an edit's essence that are read, the start token among them (ROME's evaluation code)."""


def perplexity(model: Model, texts: Sequence[str]) -> float:
    """Perplexity of the texts on the weights the model wears, tokens counted over all of them.

    Infinite when it is more than a float can hold; NaN when there is no token to predict, or its probability is no
    number.
    """
    found = likelihoods(model, texts)
    return _exp(sum(total for total, _ in found), sum(count for _, count in found))


def essences(model: Model, texts: Sequence[str], emit: Emit = silent) -> list[float | None]:
    """Perplexity of each text's first `ESSENCE_TOKENS` tokens, by the mean over the N − 1 that are predicted.

    ROME's essence score divides by N: it is this value to the power of (N − 1) / N.

    Returns:
        For each text its perplexity; None when no token of it is predicted, as in an empty text.
    """
    found = likelihoods(model, texts, emit, most=ESSENCE_TOKENS)
    return [_exp(total, count) if count else None for total, count in found]


def essence(values: Sequence[float | None]) -> Metric | None:
    """The geometric mean of the essences' perplexities over edits, with Student's interval of their logarithms.

    Perplexities are ratios: in an arithmetic mean one broken text hides all others.

    Returns:
        None when no edit has an essence.
    """
    # The logarithm of a perplexity is minus the mean log-likelihood of a token.
    logs = [math.log(value) for value in values if value is not None]
    if not logs:
        return None
    low, high = (None if end is None else _exp(-end, 1) for end in mean_interval(logs))
    return Metric("essence", TEACHER_FORCED, _exp(-math.fsum(logs), len(logs)), len(logs), False, "", low, high)


def _exp(total: float, count: int) -> float:
    """Perplexity by a log-likelihood and the number of tokens it is of."""
    if not count:
        return math.nan
    try:
        return math.exp(-total / count)
    except OverflowError:
        return math.inf
