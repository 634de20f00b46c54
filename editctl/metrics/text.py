"""Perplexity on a text: how well the model still predicts what no edit is about.

Protocol: texts one by one, teacher-forced, each token after the first given those before it; exp of the mean negative
log-likelihood over all tokens of all texts. Lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from editctl.engine.model import Model
from editctl.engine.speak import likelihoods


def perplexity(model: Model, texts: Sequence[str]) -> float:
    """Perplexity of the texts on the weights the model wears, tokens counted over all of them."""
    found = likelihoods(model, texts)
    return math.exp(-sum(total for total, _ in found) / sum(count for _, count in found))
