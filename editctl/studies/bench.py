"""One trial of a study: edits in batches on the unedited model, measured before, right after each batch and at marks.

Knows: the protocol, the metrics of a mark, and how a trial that was interrupted goes on from its last mark. Refuses: to
choose edits, to record versions, to put numbers of different protocols together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from editctl import delta as delta_files
from editctl.engine.asking import Said, answers_of, ask_all, request_of
from editctl.engine.checks import Checks, Side, Wanted
from editctl.engine.editor import Editor
from editctl.engine.families import laid
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import sample_contexts
from editctl.engine.recall import Recall
from editctl.engine.run import moments_for, peak_mb, reset_peak
from editctl.engine.statistics import Moment
from editctl.errors import InvalidInput
from editctl.events import Emit, Note, RunStarted, silent
from editctl.metrics import edits as edit_metrics
from editctl.metrics.edits import Question
from editctl.metrics.intervals import wilson
from editctl.metrics.values import GENERATED, REWRITE, Metric, before_of
from editctl.spec import Edit
from editctl.store import Store
from editctl.studies.journal import Journal

RIGHT_AFTER, FIRST = "reliability right after", "first batch"
"""Metrics of the edits' own prompts: asked before the next batch is written; the first batch's, asked at a mark."""
CORPUS, FREE = "corpus tokens", "free directions"
CLOCK, STATISTICS, STORED = "clock", "statistics", "stored"
"""Protocols of what is no answer: seconds of editing, measuring left out, and memory; what the second moments leave
free; what lies on disk."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Some edits under one method."""

    settings: Settings
    edits: tuple[Edit, ...]
    batch: int
    kept: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    """Questions beside the edits' own whose answers should stay, by the name of their column."""
    every: int = 0
    """Edits from one mark to the next; 0 for a single mark at the end."""
    alone: bool = False
    """Whether every batch is written on the unedited model, asked and taken off again."""
    labels: Mapping[str, object] = field(default_factory=dict)
    """What stands in front of its row beside method, null space, edits and batch."""

    @property
    def heads(self) -> dict[str, object]:
        """What tells its row from the others."""
        rule = self.settings.null_space
        space = f"{rule.rule} {rule.value:g}" if rule else "none"
        return {**self.labels, "method": self.settings.method, "null space": space, "batch": self.batch}

    @property
    def name(self) -> str:
        """Its name among the trials of a study, and its curve's."""
        return ", ".join(f"{value}" if key == "method" else f"{key} {value}" for key, value in self.heads.items())


_PARTS = ("answers", "beside")


@dataclass(frozen=True)
class Mark:
    """What was measured after so many edits."""

    edits: int
    seconds: float
    """Spent on editing since the beginning, measuring left out."""
    answers: tuple[Metric, ...]
    beside: tuple[Metric, ...] = ()
    """What is no answer to an edit's question."""
    forgotten: tuple[str, ...] = ()
    """Ids of the edits that were stated right after their batch and are not any more."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {
            part: [{name: _spelled(value) for name, value in asdict(metric).items()} for metric in getattr(self, part)]
            for part in _PARTS
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mark:
        """Back from `to_json`."""
        answers, beside = (
            tuple(Metric(**{key: _read(key, value) for key, value in metric.items()}) for metric in data[part])
            for part in _PARTS
        )
        return cls(data["edits"], data["seconds"], answers, beside, tuple(data["forgotten"]))


class Pace:
    """How much of a study is done, and how long the rest will take at the pace so far."""

    def __init__(self, emit: Emit, total: int) -> None:
        """
        Args:
            total: edits of all trials.
        """
        self._emit, self._total = emit, total
        self._done = self._fresh = 0
        self._begun = time.monotonic()

    def skip(self, edits: int) -> None:
        """So many edits were done by an earlier run."""
        self._done += edits

    def step(self, edits: int, what: str) -> None:
        """So many more edits are done and measured."""
        self._done, self._fresh = self._done + edits, self._fresh + edits
        left = (self._total - self._done) * (time.monotonic() - self._begun) / max(1, self._fresh)
        time_left = f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"
        self._emit(Note(f"{what}; {self._done} of {self._total} edits of the study, {time_left}"))


class Bench:
    """A model on which trials are made one after another; what the unedited model says is asked once."""

    def __init__(
        self,
        model: Model,
        base: str,
        store: Store,
        emit: Emit,
        *,
        journal: Journal | None = None,
        checks: Sequence[str] = (),
        text: Sequence[str] = (),
        pace: Pace | None = None,
    ) -> None:
        """
        Args:
            checks: what is checked beside the answers, of `metrics.values.CHECKS`.
            text: what perplexity is measured on; by default ordinary sentences.
        """
        self._model, self._emit, self._journal, self._pace = model, emit, journal or Journal(), pace
        self._names, self._text, self._library = tuple(checks), tuple(text), store.artifacts_dir
        self._recall = Recall.of(model, base, store.root)

        @cache
        def moments_of(settings: Settings) -> Mapping[int, Moment]:
            return moments_for(model, settings, base, store, emit)

        self._moments_of = moments_of

    def unedited(self, trial: Trial) -> Mark:
        """What the unedited model scores on a trial's questions: what is wanted later, it should not say."""
        questions = [q for edit in trial.edits for q in edit_metrics.questions(edit)]
        before = ask_all(self._model, questions, "before", self._emit, self._recall)
        metrics = edit_metrics.summary(answers_of(questions, before, before))
        side = self._checks(trial).side(self._model, self._last(trial), self._recall)
        return Mark(0, 0.0, metrics, tuple(side.alone))

    def _last(self, trial: Trial) -> int:
        """The last edited block; of what lies over the weights the model's last."""
        return max(trial.settings.layers, default=len(self._model.blocks) - 1)

    def _checks(self, trial: Trial) -> Checks:
        return Checks(Wanted(self._names, self._text), trial.edits, self._emit)

    def run(self, trial: Trial) -> list[Mark]:
        """The marks of a trial, those that the journal holds first.

        Shares are of the model's answers in the protocol each metric names. "Right after" asks each batch's own prompts
        before the next batch is written; everything else is asked at a mark, of the edits written so far. Locality and
        what should stay are compared with the unedited model.

        Raises:
            InvalidInput: there are no edits.
        """
        if not trial.edits:
            raise InvalidInput("there are no edits to study", "name spec files that hold some")
        lines = self._journal.of(trial.name)
        try:
            marks = [Mark.from_json(line) for line in lines]
        except (KeyError, TypeError, ValueError, AttributeError):
            message = f"what was found of {trial.name} before is damaged, or of another editctl"
            raise InvalidInput(message, "name another folder with -o, or begin anew") from None
        if marks and self._pace:
            self._pace.skip(marks[-1].edits)
        if marks and marks[-1].edits == len(trial.edits):
            return marks
        model, emit, settings = self._model, self._emit, trial.settings
        edits = trial.edits
        everything = [q for edit in edits for q in edit_metrics.questions(edit)]
        everything += [q for asked in trial.kept.values() for q in asked]
        before = ask_all(model, everything, "before", emit, self._recall)
        model.check_editable(settings.layers)
        if settings.needs_moments:
            self._moments_of(settings)
        checks = self._checks(trial)
        calm = checks.side(model, self._last(trial), self._recall)
        if trial.alone:
            return [self._alone(trial, before)]
        contexts = sample_contexts(model, settings.seed)
        parts = [edits[start : start + trial.batch] for start in range(0, len(edits), trial.batch)]
        emit(RunStarted(model.name, str(model.device), str(model.dtype), settings.method, len(edits), len(parts), 0))
        soon = {q: words for line in lines for q, words in _heard(edits, line["soon"])}
        seconds = marks[-1].seconds if marks else 0.0
        fresh: dict[Question, str] = {}
        made: list[str] = []
        size, peak = 0, 0.0
        reset_peak(model.device)
        with model.editing() as editing:
            editor = Editor(model, editing, self._moments_of, contexts, emit, library=self._library)
            names = [name for line in lines for name in line["deltas"]]
            if names:
                emit(Note(f"{trial.name}: going on after {marks[-1].edits} edits"))
            for name, part in zip(names, parts, strict=False):
                known = delta_files.load(name, self._journal.deltas)
                size += len(known.to_bytes())
                editor.wear(known, [request_of(edit, before) for edit in part])
            for number, part in enumerate(parts[len(names) :], len(names) + 1):
                begun = time.perf_counter()
                delta = editor.edit([request_of(edit, before) for edit in part], settings, number)
                seconds += time.perf_counter() - begun
                size, peak = size + len(delta.to_bytes()), peak_mb(model.device)
                if self._journal.folder:
                    made.append(delta_files.save(delta, self._journal.deltas))
                with laid(model, editing.overlays, self._library):
                    fresh |= ask_all(model, _own(part), "after", emit).words
                done = min(number * trial.batch, len(edits))
                if done < len(edits) and not (trial.every and _passed(done, trial.batch, trial.every)):
                    continue
                soon |= fresh
                with laid(model, editing.overlays, self._library):
                    mark = self._mark(trial, done, seconds, before, soon, checks, calm, size, peak)
                marks.append(mark)
                heard = {q.edit: words for q, words in fresh.items()}
                self._journal.add({"trial": trial.name, **mark.to_json(), "soon": heard, "deltas": made})
                fresh, made = {}, []
                if self._pace:
                    new = done - (marks[-2].edits if len(marks) > 1 else 0)
                    self._pace.step(new, f"{trial.name}: {done} of {len(edits)} edits")
        self._journal.tidy()
        return marks

    def _alone(self, trial: Trial, before: Said) -> Mark:
        """What the edits come to when no other is there: each batch on the unedited model, asked at once."""
        model, settings, seconds = self._model, trial.settings, 0.0
        contexts, after = sample_contexts(model, settings.seed), Said({}, {})
        for start in range(0, len(trial.edits), trial.batch):
            part = trial.edits[start : start + trial.batch]
            with model.editing() as editing:
                editor = Editor(model, editing, self._moments_of, contexts, silent, library=self._library)
                begun = time.perf_counter()
                editor.edit([request_of(edit, before) for edit in part], settings, 1)
                seconds += time.perf_counter() - begun
                with laid(model, editing.overlays, self._library):
                    after |= ask_all(model, [q for edit in part for q in edit_metrics.questions(edit)], "after", silent)
        questions = [q for edit in trial.edits for q in edit_metrics.questions(edit)]
        n = len(trial.edits)
        beside = (Metric("seconds an edit", CLOCK, seconds / n, n, False),)
        mark = Mark(n, seconds, edit_metrics.summary(answers_of(questions, before, after)), beside)
        self._journal.add({"trial": trial.name, **mark.to_json(), "soon": {}, "deltas": []})
        if self._pace:
            self._pace.step(n, trial.name)
        return mark

    def _mark(
        self,
        trial: Trial,
        done: int,
        seconds: float,
        before: Said,
        soon: Mapping[Question, str],
        checks: Checks,
        calm: Side,
        size: int,
        peak: float,
    ) -> Mark:
        """Everything that is measured after `done` edits."""
        model, settings = self._model, trial.settings
        questions = [q for edit in trial.edits[:done] for q in edit_metrics.questions(edit)]
        kept = [q for asked in trial.kept.values() for q in asked]
        after = ask_all(model, questions + kept, "after", self._emit)
        answers = answers_of(questions, before, after, soon)
        metrics = list(edit_metrics.summary(answers))
        own = {a.edit: a for a in answers if a.kind == REWRITE}
        metrics.append(_share(RIGHT_AFTER, [edit_metrics.says(a.soon or "", a.wanted) for a in own.values()]))
        if done > trial.batch:
            metrics.append(_share(FIRST, [own[edit.id].ok for edit in trial.edits[: trial.batch]]))
        for column, asked in trial.kept.items():
            if asked:
                metrics.append(_share(column, [a.ok for a in answers_of(asked, before, after)]))
        compared = checks.compare(calm, checks.side(model, self._last(trial)))
        beside = [metric for metric in compared if metric.axis != before_of("")]
        beside.append(Metric("seconds an edit", CLOCK, seconds / done, done, False))
        beside.append(Metric("kilobytes an edit", STORED, size / 1000 / done, done, False))
        beside.append(Metric("peak memory, MB", STORED, peak, done, False))
        if settings.needs_moments:
            moments = self._moments_of(settings)
            seen = min(moment.seen for moment in moments.values())
            beside.append(Metric(CORPUS, STATISTICS, seen, seen))
            if space := settings.null_space:
                ranks = {block: moment.null_rank(space) for block, moment in moments.items()}
                beside += [Metric(FREE, STATISTICS, rank, seen, axis=f"block {block}") for block, rank in ranks.items()]
        return Mark(done, seconds, tuple(metrics), tuple(beside), edit_metrics.forgotten(answers))


def _own(edits: Sequence[Edit]) -> list[Question]:
    """The edits' own prompts."""
    return [q for edit in edits for q in edit_metrics.questions(edit) if q.kind == REWRITE]


def _heard(edits: Sequence[Edit], words: Mapping[str, str]) -> list[tuple[Question, str]]:
    """What was said right after, by the edits' own prompts."""
    return [(q, words[q.edit]) for q in _own([edit for edit in edits if edit.id in words])]


def _passed(done: int, batch: int, every: int) -> bool:
    """Whether the batch that ends at `done` reached the next multiple of `every`."""
    return done // every > (done - batch) // every


def _share(name: str, hits: Sequence[bool], axis: str = "") -> Metric:
    """A share of answers in the model's own words, edits taken for independent."""
    low, high = wilson(sum(hits), len(hits))
    return Metric(name, GENERATED, sum(hits) / len(hits), len(hits), True, axis, low, high)


def _spelled(value: Any) -> Any:
    """A value as JSON has it: a number that is not finite as a word that `float` reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(name: str, value: Any) -> Any:
    """A metric's field back from JSON."""
    return float(value) if name in ("value", "low", "high") and value is not None else value
