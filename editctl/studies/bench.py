"""One trial of a study: edits in batches on the unedited model, measured before, right after each batch and at the end.

Knows: the protocol and the row it yields. Refuses: to choose edits, to record versions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache

from editctl.engine.asking import Said, answers_of, ask_all, request_of
from editctl.engine.editor import Editor
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import sample_contexts
from editctl.engine.run import moments_for
from editctl.engine.statistics import Moment
from editctl.errors import InvalidInput
from editctl.events import Emit, RunStarted
from editctl.metrics import edits as edit_metrics
from editctl.metrics.edits import NAMES, Question
from editctl.metrics.text import perplexity
from editctl.metrics.values import KINDS, REWRITE
from editctl.spec import Edit
from editctl.store import Store


class Bench:
    """A model on which methods are tried one after another; what the unedited model says is asked once."""

    def __init__(self, model: Model, base: str, store: Store, emit: Emit) -> None:
        self._model, self._base, self._store, self._emit = model, base, store, emit
        self._said: dict[Question, Said] = {}

        @cache
        def moments_of(settings: Settings) -> Mapping[int, Moment]:
            return moments_for(model, settings, base, store, emit)

        self._moments_of = moments_of

    def _before(self, questions: Sequence[Question]) -> Said:
        """What the unedited model says."""
        fresh = [q for q in dict.fromkeys(questions) if q not in self._said]
        if fresh:
            said = ask_all(self._model, fresh, "before", self._emit)
            self._said |= {q: Said({q: said.words[q]}, {q: said.forced[q]}) for q in fresh}
        words = {q: self._said[q].words[q] for q in questions}
        return Said(words, {q: self._said[q].forced[q] for q in questions})

    def trial(
        self,
        settings: Settings,
        edits: Sequence[Edit],
        kept: Mapping[str, Sequence[Question]],
        *,
        batch: int,
        text: Sequence[str] = (),
    ) -> dict[str, object]:
        """All edits in batches of `batch`; one row of a table.

        Args:
            kept: questions beside the edits' own whose answers should stay, by the name of their column.
            text: what perplexity is measured on, before and at the end.

        Every share is of the model's own greedy words, in percent. "right after" asks each batch's own prompts before
        the next batch is written; everything else is asked at the end. Locality compares with the unedited model.
        """
        if not edits:
            raise InvalidInput("there are no edits to study", "name spec files that hold some")
        model, emit = self._model, self._emit
        questions = [q for edit in edits for q in edit_metrics.questions(edit)]
        questions += [q for asked in kept.values() for q in asked]
        before = self._before(questions)
        model.check_editable(settings.layers)
        if settings.needs_moments:
            self._moments_of(settings)
        contexts = sample_contexts(model, settings.seed)
        parts = [edits[start : start + batch] for start in range(0, len(edits), batch)]
        name = settings.method
        emit(RunStarted(model.name, str(model.device), str(model.dtype), name, len(edits), len(parts), 0))
        seconds, held = 0.0, 0
        calm = perplexity(model, text) if text else 1.0
        with model.editing() as editing:
            editor = Editor(model, editing, self._moments_of, contexts, emit)
            for number, part in enumerate(parts, 1):
                begun = time.perf_counter()
                editor.edit([request_of(edit, before) for edit in part], settings, number)
                seconds += time.perf_counter() - begun
                fresh = _own(part)
                words = ask_all(model, fresh, "after", emit).words
                held += sum(edit_metrics.says(words[q], q.wanted) for q in fresh)
            after = ask_all(model, questions, "after", emit)
            drift = perplexity(model, text) / calm - 1 if text else 0.0
        row: dict[str, object] = {"method": name, "null space": _rule(settings), "edits": len(edits), "batch": batch}
        row["reliability right after"] = _percent(held, len(edits))
        own = [q for edit in edits for q in edit_metrics.questions(edit)]
        columns = {NAMES[kind]: [q for q in own if q.kind == kind] for kind in KINDS}
        columns |= {"first batch at the end": _own(parts[0])} if len(parts) > 1 else {}
        for column, asked in (columns | dict(kept)).items():
            if asked:
                answers = answers_of(asked, before, after)
                row[column] = _percent(sum(a.ok for a in answers), len(answers))
        if text:
            row["perplexity drift"] = f"{100 * drift:+.1f} %"
        row["seconds an edit"] = f"{seconds / len(edits):.2f}"
        return row


def _own(edits: Sequence[Edit]) -> list[Question]:
    """The edits' own prompts."""
    return [q for edit in edits for q in edit_metrics.questions(edit) if q.kind == REWRITE]


def _rule(settings: Settings) -> str:
    rule = settings.null_space
    return f"{rule.rule} {rule.value:g}" if rule else "none"


def _percent(hits: int, total: int) -> str:
    return f"{100 * hits / total:.1f} ({total})"
