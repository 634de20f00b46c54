"""One trial of a study: edits in batches on the unedited model, measured before, right after each batch and at the end.

Knows: the protocol and the row it yields. Refuses: to choose edits, to record versions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache

from editctl.engine import run
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import sample_contexts
from editctl.engine.statistics import Moment
from editctl.errors import InvalidInput
from editctl.events import Emit, RunStarted
from editctl.metrics import edits as edit_metrics
from editctl.metrics.edits import NAMES, Question
from editctl.metrics.values import KINDS, REWRITE
from editctl.spec import Edit
from editctl.store import Store


class Bench:
    """A model with the settings of one method."""

    def __init__(self, model: Model, base: str, store: Store, emit: Emit, settings: Settings) -> None:
        self._model, self._base, self._store, self._emit = model, base, store, emit
        self._settings = settings

    def trial(
        self, method: str, edits: Sequence[Edit], kept: Mapping[str, Sequence[Question]], *, batch: int
    ) -> dict[str, object]:
        """All edits in batches of `batch`; one row of a table.

        Args:
            kept: questions beside the edits' own whose answers should stay, by the name of their column.

        Every share is of the model's own greedy words, in percent. "right after" asks each batch's own prompts before
        the next batch is written; everything else is asked at the end. Locality compares with the unedited model.
        """
        if not edits:
            raise InvalidInput("there are no edits to study", "name spec files that hold some")
        model, emit = self._model, self._emit
        questions = [q for edit in edits for q in edit_metrics.questions(edit)]
        questions += [q for asked in kept.values() for q in asked]
        before = run.ask_all(model, questions, "before", emit)

        @cache
        def moments_of(settings: Settings) -> Mapping[int, Moment]:
            return run.moments_for(model, settings, self._base, self._store, emit)

        moments_of(self._settings)
        contexts = sample_contexts(model, self._settings.seed)
        parts = [edits[start : start + batch] for start in range(0, len(edits), batch)]
        emit(RunStarted(model.name, str(model.device), str(model.dtype), method, len(edits), len(parts), 0))
        seconds, held = 0.0, 0
        with model.editing() as editing:
            editor = run.Editor(model, editing, moments_of, contexts, emit)
            for number, part in enumerate(parts, 1):
                begun = time.perf_counter()
                editor.edit([run.request_of(edit) for edit in part], self._settings, number)
                seconds += time.perf_counter() - begun
                fresh = [q for edit in part for q in edit_metrics.questions(edit) if q.kind == REWRITE]
                words = run.ask_all(model, fresh, "after", emit).words
                held += sum(edit_metrics.says(words[q], q.wanted) for q in fresh)
            after = run.ask_all(model, questions, "after", emit)
        row: dict[str, object] = {"method": method, "edits": len(edits), "batch": batch}
        row["reliability right after"] = _percent(held, len(edits))
        own = [q for edit in edits for q in edit_metrics.questions(edit)]
        columns = {NAMES[kind]: [q for q in own if q.kind == kind] for kind in KINDS} | dict(kept)
        for name, asked in columns.items():
            if asked:
                answers = run.answers_of(asked, before, after)
                row[name] = _percent(sum(a.ok for a in answers), len(answers))
        row["seconds an edit"] = f"{seconds / len(edits):.2f}"
        return row


def _percent(hits: int, total: int) -> str:
    return f"{100 * hits / total:.1f} ({total})"
