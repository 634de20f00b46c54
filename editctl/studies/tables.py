"""What a study found, as JSON rows, Markdown tables and plots.

Knows: that numbers of different protocols stand in different tables and pictures, each with its count. Refuses: to
measure; it is given marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editctl import plots
from editctl.errors import InvalidInput
from editctl.files import write_atomically
from editctl.metrics.values import CHECKS, PROTOCOLS, Metric
from editctl.report import markdown_table
from editctl.spec import slug
from editctl.studies.bench import Mark, Trial

RESULTS, TABLE, PLOTS = "results.json", "table.md", "plots"
"""Files a study leaves beside its journal."""
Pictures = Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float]]]]
"""By metric (its column and protocol) the points of every curve, by its name."""
BESIDE = "beside the answers"
"""Heading of the table of what is no answer."""
UNEDITED = "unedited"
ABILITY = CHECKS[2]


@dataclass(frozen=True)
class Result:
    """A finished trial, or one that could not be made."""

    trial: Trial
    marks: Sequence[Mark] = ()
    unedited: Mark | None = None
    """What the unedited model scores on the same questions."""
    refused: str = ""
    """Why there are no marks."""

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object a mark."""
        heads = self.trial.heads
        if self.refused:
            return [{**heads, "edits": len(self.trial.edits), "refused": self.refused}]
        return [{**heads, **mark.to_json()} for mark in self.marks]


def sheets(results: Sequence[Result]) -> dict[str, list[dict[str, object]]]:
    """By protocol, and for what is no answer, the rows of a table of the last marks; equal columns in every row."""
    found: dict[str, list[dict[str, object]]] = {}
    lines: list[tuple[dict[str, object], Mark, str]] = []
    for first in [result.unedited for result in results if result.unedited][:1]:
        unknown: dict[str, object] = dict.fromkeys(results[0].trial.heads, "–")
        lines.append(({**unknown, "method": UNEDITED, "edits": 0}, first, ""))
    for result in results:
        last = result.marks[-1] if result.marks else Mark(len(result.trial.edits), 0.0, ())
        lines.append(({**result.trial.heads, "edits": last.edits}, last, result.refused))
    for title in (*PROTOCOLS, BESIDE):
        columns = dict.fromkeys(_column(metric) for _, mark, _ in lines for metric in _of(mark, title))
        for heads, mark, refused in lines if columns else ():
            cells = {_column(metric): cell(metric, title) for metric in _of(mark, title)}
            row = {**heads, **{column: cells.get(column, "–") for column in columns}}
            if refused:
                row[next(iter(columns))] = refused
            found.setdefault(title, []).append(row)
    return found


def _of(mark: Mark, title: str) -> list[Metric]:
    """The metrics of one table; of ability the whole, whose families are in the rows."""
    if title == BESIDE:
        return [metric for metric in mark.beside if not (metric.name == ABILITY and metric.axis)]
    return [metric for metric in mark.answers if metric.protocol == title]


def _column(metric: Metric) -> str:
    return f"{metric.name} ({metric.axis})" if metric.axis else metric.name


def cell(metric: Metric, title: str) -> str:
    """A metric as a table shows it: of answers in percent, with their count."""
    if title != BESIDE:
        return f"{100 * metric.value:.1f} ({metric.n})"
    return f"{metric.value:.0f}" if float(metric.value).is_integer() else f"{metric.value:.4g}"


def markdown(results: Sequence[Result], more: Sequence[str] = ()) -> list[str]:
    """The tables as lines, each under the protocol of its numbers."""
    lines: list[str] = []
    for title, rows in sheets(results).items():
        told = title if title == BESIDE else f"{title}, percent (number of prompts)"
        lines += [f"**{told}**", "", *markdown_table(rows), ""]
    return [*lines, *more] if more else lines[:-1]


def curves(results: Iterable[Result], x: Callable[[Result, Mark], float], name: Callable[[Result], str]) -> Pictures:
    """The curves of all metrics, their points in the order of x; those that nowhere change are left out."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for result in results:
        for mark in result.marks:
            for metric in (*mark.answers, *_of(mark, BESIDE)):
                factor = 100 if metric in mark.answers else 1
                series = found.setdefault((_column(metric) + ", percent" * (factor == 100), metric.protocol), {})
                series.setdefault(name(result), []).append((x(result, mark), factor * metric.value))
    return {
        key: {title: sorted(points) for title, points in series.items()}
        for key, series in found.items()
        if any(len(dict(points)) > 1 for points in series.values())
        and len({value for points in series.values() for _, value in points}) > 1
    }


def short_names(results: Sequence[Result]) -> Callable[[Result], str]:
    """A name for each trial: its method, and what differs among trials of one method."""
    values: dict[tuple[str, str], set[str]] = {}
    for result in results:
        for key, value in result.trial.heads.items():
            values.setdefault((result.trial.settings.method, key), set()).add(str(value))
    varying = {key for (_, key), found in values.items() if len(found) > 1}

    def name(result: Result) -> str:
        heads = result.trial.heads
        return ", ".join([result.trial.settings.method, *(f"{key} {heads[key]}" for key in heads if key in varying)])

    return name


def write(folder: Path, values: Mapping[str, Any], lines: Sequence[str], pictures: Pictures, xlabel: str) -> str:
    """Write the results as JSON, the tables as Markdown and one picture a metric and protocol.

    Returns:
        What should be said: why there are no pictures, or nothing.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    try:
        write_atomically(folder / RESULTS, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
        write_atomically(folder / TABLE, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be written: {error.strerror}", "free some space") from None
    for (column, protocol), series in pictures.items():
        for suffix in plots.SUFFIXES:
            path = folder / PLOTS / f"{slug(protocol, column)}{suffix}"
            try:
                plots.curves(path, series, title=f"{column} ({protocol})", xlabel=xlabel, ylabel=column)
            except InvalidInput as error:
                return f"no plots: {error.message}; {error.hint}"
    return ""
