"""Metrics as Rich text: which protocol made a number, of how many prompts, how sure it is, what it was before.

Knows: how metrics fit a terminal of any width, and why one is absent. Refuses: what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from editctl.metrics.edits import PROTOCOLS, RETENTION, SCORE, forgotten, says
from editctl.metrics.units import written
from editctl.metrics.values import PROBABILITY, REWRITE, Answer, Metric, before_of
from editctl.metrics.values import PROTOCOLS as ANSWERED
from editctl.spec import visible

NARROW = 76
"""Columns below which intervals have no room."""
CURVE = 10
"""Points of a retention curve."""
NAMED = 20
"""Edits named as forgotten."""
_BROKEN = {"teacher-forced": "teacher-\nforced", "probability": "proba-\nbility"}
"""Heads that are too wide for a narrow table."""


class MetricsView:
    """One row a metric: shares of answers by protocol, then what else was measured; each with its 95 % interval where
    there is room, or with the change where what it was before is given.

    Args:
        parts: whether what a number is made of has rows too: families of canaries, phases of a run.
    """

    def __init__(self, metrics: Sequence[Metric], before: Sequence[Metric] = (), *, parts: bool = False) -> None:
        self._shares = [m for m in metrics if m.name in PROTOCOLS]
        self._known = {metric.key: metric for metric in metrics}
        were = {(m.name, m.protocol, before_of(m.axis)) for m in metrics}
        self._others = [m for m in metrics if m.name not in PROTOCOLS and m.key not in were and (parts or not m.axis)]
        self._earlier = {metric.key: metric for metric in before}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW
        parts = [table(narrow) for table, some in ((self._answers, self._shares), (self._beside, self._others)) if some]
        for number, part in enumerate(parts):
            yield from (Text(), part) if number else (part,)

    def _answers(self, narrow: bool) -> Table:
        kinds = [p for p in ANSWERED if p != PROBABILITY or any(m.protocol == p for m in self._shares)]
        table = _table("metric", *kinds, "prompts", left=("metric",), narrow=narrow)
        for name, axis in dict.fromkeys((m.name, m.axis) for m in self._shares):
            rows = {m.protocol: m for m in self._shares if (m.name, m.axis) == (name, axis)}
            cells = [self._value(rows[p], narrow) if p in rows else Text("-", "dim") for p in kinds]
            counts = dict.fromkeys(str(rows[p].n) for p in kinds if p in rows)
            table.add_row(_named(name, axis), *cells, "/".join(counts))
        return table

    def _beside(self, narrow: bool) -> Table:
        """What is no share of answers: every number with its protocol and whether more of it is better."""
        heads = ("also measured", "value", "before", "better") + (() if narrow else ("of", "protocol"))
        table = _table(*heads, left=("also measured", "better", "protocol"), narrow=narrow)
        for metric in self._others:
            before = self._known.get((metric.name, metric.protocol, before_of(metric.axis)))
            table.add_row(
                _named(metric.name, metric.axis),
                self._value(metric, narrow),
                Text(written(before)) if before else Text("-", "dim"),
                "higher" if metric.higher_is_better else "lower",
                *(() if narrow else (str(metric.n), Text(visible(metric.protocol, 100)))),
            )
        return table

    def _value(self, metric: Metric, narrow: bool) -> Text:
        """The value with the ends of its interval, or with the change from what it was."""
        text, before = Text(written(metric)), self._earlier.get(metric.key)
        if before is None:
            share = metric.name in PROTOCOLS
            ends = [end for end in (metric.low, metric.high) if end is not None and not narrow]
            told = [f"{100 * end:.0f}" if share else written(metric, end) for end in ends]
            return text.append(" " + "–".join(told) if told else "", "dim")
        if before.value != metric.value:
            change = metric.value - before.value
            told_change = f"{'+' if change > 0 else '-'}{written(metric, abs(change)).removesuffix(' %')}"
            text.append(f" ({told_change})", "green" if (change > 0) == metric.higher_is_better else "red")
        return text


def _table(*heads: str, left: Sequence[str], narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(_BROKEN.get(head, head) if narrow else head, justify="left" if head in left else "right")
    return table


def _named(name: str, axis: str) -> Text:
    return Text(f"  {visible(axis, 100)}", "dim") if axis else Text(visible(name, 100))


def _percent(value: float) -> str:
    return "no number" if math.isnan(value) else f"{100 * value:.1f} %"


_ABSENT = {
    "generalization": "no edit has paraphrases",
    "locality": "no edit has locality probes",
    "portability": "no edit has portability probes",
    RETENTION: "nothing was written after an edit",
    SCORE: "it needs all three probabilities",
    "fluency": "no edit has openings (generation)",
    "consistency": "no edit has references",
    "essence": "no edit has a text about its subject (essence)",
}
"""Why a metric has no value."""
_CHECK = {"fluency": "generation", "consistency": "generation", "essence": "essence"}
"""The check that yields a metric beside the answers."""
_NO_RIVAL = "no edit names target_true"


def unmeasured_line(metrics: Sequence[Metric], checks: Sequence[str]) -> Text:
    """What has no value because nothing was there to measure it with.

    Args:
        checks: what was to be measured beside answers; the others are not told.
    """
    there = {(m.name, m.protocol) for m in metrics}
    absent = [name for name in _ABSENT if not any(name == known for known, _ in there)]
    told = [f"{name} ({_ABSENT[name]})" for name in absent if _CHECK.get(name) in (None, *checks)]
    if ("reliability", PROBABILITY) not in there:
        told.append(f"probabilities ({_NO_RIVAL})")
    return Text("Not measured: " + ", ".join(told), "dim") if told else Text()


def retention_view(answers: Sequence[Answer]) -> RenderableType:
    """The retention curve: in order of application, what was said right after a batch and what is said now; and the
    edits that are forgotten, by name. Nothing where nothing was written after any edit."""
    own = [a for a in answers if a.kind == REWRITE and a.soon is not None]
    if not own:
        return Text()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("edits, oldest first", "right after", "now"):
        table.add_column(head, justify="left" if head.startswith("edits") else "right")
    size = math.ceil(len(own) / CURVE)
    for start in range(0, len(own), size):
        some = own[start : start + size]
        soon = sum(says(a.soon or "", a.wanted) for a in some)
        now = sum(a.ok for a in some)
        last = start + len(some)
        table.add_row(f"{start + 1}–{last}", *(_percent(hits / len(some)) for hits in (soon, now)))
    lost = forgotten(answers)
    names = ", ".join(visible(name, 100) for name in lost[:NAMED]) + (", …" if len(lost) > NAMED else "")
    return Group(Text(), table, Text(f"forgotten: {names or 'none'}", "yellow" if lost else "dim"))
