"""How a metric's value is written: in percent, degrees, seconds or as it is.

Knows: the unit of every metric by its name. Refuses: models and tensors; both faces use it.
"""

from __future__ import annotations

import math

from editctl.metrics.values import Metric

_PLAIN = {"fluency": 1, "essence": 2, "perplexity": 2}
"""Metrics without a unit, and their decimals."""
_UNITS = {"drift angle": ("°", 2), "seconds an edit": (" s", 2), "peak memory": (" MB", 0)}
_TASK = "task "
"""How the metrics of lm-evaluation-harness begin; what they are shares of, only those between 0 and 1 tell."""


def written(metric: Metric, value: float | None = None) -> str:
    """A value of a metric with its unit; shares in percent.

    Args:
        value: another one of the same metric, as an end of its interval; None for its own.
    """
    number = metric.value if value is None else value
    if not math.isfinite(number):
        return "no number" if math.isnan(number) else "infinite"
    if metric.name in _PLAIN:
        return f"{number:,.{_PLAIN[metric.name]}f}"
    if metric.name in _UNITS:
        unit, decimals = _UNITS[metric.name]
        return f"{number:,.{decimals}f}{unit}"
    if metric.name == "disk an edit":
        return f"{number / 1000:,.1f} kB"
    if metric.name.startswith(_TASK) and not 0 <= metric.value <= 1:
        return f"{number:,.4g}"
    return f"{100 * number:.1f} %"
