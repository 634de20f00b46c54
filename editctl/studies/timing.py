"""Seconds an edit of several methods on the same edits and model, by phase, several times over.

Knows: that repetitions take turns, so that what else the machine does meets all methods alike; medians and ranges.
Refuses: quality; other studies measure it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from editctl.engine.asking import request_of
from editctl.engine.editor import Clock, Editor
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import sample_contexts
from editctl.engine.run import moments_for
from editctl.engine.statistics import Moment
from editctl.errors import InvalidInput
from editctl.events import Emit
from editctl.spec import Edit
from editctl.studies.bench import CLOCK, Pace
from editctl.studies.journal import opened
from editctl.studies.runtime import PHASES
from editctl.studies.tables import Pictures

if TYPE_CHECKING:
    from editctl.workspace import Workspace

REFERENCE = "memit"
"""The method others are compared with, where it is among them; else the first."""
Spent = Mapping[tuple[str, int], Sequence[Mapping[str, float]]]
"""By method and batch size the seconds of each repetition by phase."""


def measure(
    space: Workspace,
    edits: Sequence[Edit],
    settings: Sequence[Settings],
    batches: Sequence[int],
    repeat: int,
    out: Path | None,
    config: Mapping[str, Any],
    emit: Emit,
) -> Spent:
    """Time one batch of every size under every one of the settings, on the unedited model, `repeat` times.

    The first batch of a method is written once untimed, since it also pays for what is made once.

    Args:
        out: the study's folder; what an earlier run timed there is taken from it.

    Raises:
        InvalidInput: a batch is larger than there are edits.
    """
    if max(batches) > len(edits):
        raise InvalidInput(f"the specs hold {len(edits)} edits, not {max(batches)}", "ask for a smaller --batch")
    with opened(out, config) as journal:
        model, (_, base), store = space.load(), space.source(), space.store()

        @cache
        def moments_of(one: Settings) -> Mapping[int, Moment]:
            return moments_for(model, one, base, store, emit)

        todo = [
            (turn, one, size)
            for turn in range(repeat)
            for size in batches
            for one in settings
            if len(journal.of(_name(one, size))) <= turn
        ]
        pace = Pace(emit, sum(size for _, _, size in todo))
        for one in {each.method: each for _, each, _ in todo}.values():
            model.check_editable(one.layers)
            _once(model, one, edits[: min(batches)], moments_of, emit, store.artifacts_dir)
        for turn, one, size in todo:
            seconds = _once(model, one, edits[:size], moments_of, emit, store.artifacts_dir)
            journal.add({"trial": _name(one, size), "turn": turn, "seconds": seconds})
            pace.step(size, f"{_name(one, size)}, time {turn + 1} of {repeat}")
        return {
            (one.method, size): [line["seconds"] for line in journal.of(_name(one, size))]
            for one in settings
            for size in batches
        }


def _name(settings: Settings, size: int) -> str:
    return f"{settings.method}, batch {size}"


def _once(
    model: Model, settings: Settings, edits: Sequence[Edit], moments_of: Any, emit: Emit, library: Path
) -> dict[str, float]:
    """Seconds an edit by phase of one batch."""
    if settings.needs_moments:
        moments_of(settings)
    contexts, clock = sample_contexts(model, settings.seed), Clock()
    with model.editing() as editing:
        editor = Editor(model, editing, moments_of, contexts, emit, clock, library)
        editor.edit([request_of(e) for e in edits], settings, 1)
    return {phase: clock.seconds.get(phase, 0.0) / len(edits) for phase in PHASES}


def rows(spent: Spent) -> list[dict[str, Any]]:
    """One row a method and batch size: medians of the phases; median, least and most of all of them together; and how
    many times the reference's median that is."""
    totals = {key: [sum(turn.values()) for turn in turns] for key, turns in spent.items()}
    methods = list(dict.fromkeys(method for method, _ in spent))
    reference = REFERENCE if REFERENCE in methods else methods[0]
    found = []
    for (method, batch), turns in spent.items():
        all_of_it = totals[method, batch]
        row: dict[str, Any] = {"method": method, "batch": batch, "times": len(turns)}
        row |= {phase: median(turn[phase] for turn in turns) for phase in PHASES}
        row |= {"all": median(all_of_it), "least": min(all_of_it), "most": max(all_of_it)}
        row[f"times {reference}"] = median(all_of_it) / median(totals[reference, batch])
        found.append(row)
    return found


def table(some: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Rows as they are printed: seconds an edit."""
    shown = []
    for row in some:
        cells: dict[str, object] = {key: row[key] for key in ("method", "batch", "times")}
        cells |= {f"{phase}, s an edit": f"{row[phase]:.4f}" for phase in PHASES}
        cells["all, s an edit"] = f"{row['all']:.4f} ({row['least']:.4f} to {row['most']:.4f})"
        cells |= {key: f"{value:.2f}" for key, value in row.items() if key.startswith("times ")}
        shown.append(cells)
    return shown


def curves(some: Sequence[Mapping[str, Any]]) -> Pictures:
    """Seconds an edit against the size of the batch."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in some:
        series.setdefault(row["method"], []).append((row["batch"], row["all"]))
    return {("seconds an edit, median", CLOCK): {name: sorted(points) for name, points in series.items()}}
