"""Carry out a plan: what is asked when, what stays of earlier batches, what is recorded.

before → the batches that are there (put on, solved again without what goes, sought anew, or folded into one) → new
batches → after → commit. Knows: the order of work; `editor` writes. The store is touched once, at the end; until then a
kill leaves nothing but factor files without a version.
"""

from __future__ import annotations

import itertools
import platform
import random
import resource
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version as library_version
from pathlib import Path

import torch

from editctl import delta as delta_files
from editctl.delta import Delta
from editctl.engine import speak, statistics
from editctl.engine.asking import Said, Scored, answers_of, ask_all, request_of
from editctl.engine.checks import Checks, Side, Wanted
from editctl.engine.editor import Clock, Editor, foldable
from editctl.engine.families import follows_weights, laid
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import Request, sample_contexts
from editctl.engine.recall import Recall
from editctl.engine.statistics import Moment
from editctl.engine.wear import deltas_of, wearing
from editctl.errors import InvalidInput, StoreError
from editctl.events import (
    Emit,
    Event,
    GateFailed,
    MemoryUsed,
    Note,
    Progress,
    RunStarted,
    StageStarted,
    VersionMade,
    silent,
    to_line,
)
from editctl.metrics import edits as edit_metrics
from editctl.metrics import gates
from editctl.metrics.edits import Question
from editctl.metrics.values import REWRITE
from editctl.plan import ADD, DROP, REMEASURE, REPLACE, Plan, check_fresh, count
from editctl.spec import Edit
from editctl.store import BASE, Draft, LiveEdit, Store, Stored, Version

REJECT = "reject"
SPOKEN = 100
"""New edits about whose subjects a run lets the model write; a text takes a hundred passes."""
NEW_EDITS = "of new edits"
"""Added to the protocol of what is measured of texts about some of the edits."""
UNRECORDED = (Progress, MemoryUsed)
"""Events that matter only while they happen."""
REPLAY = "what goes was part of their targets, or their method has nothing to solve again from"


@dataclass(frozen=True, kw_only=True)
class Order:
    """How a plan is to be carried out, beside what it says."""

    verb: str = "apply"
    command: str = ""
    """The command line, for the record."""
    note: str = ""
    """Why, for the record."""
    replay: bool = False
    """Whether batches after what goes are sought anew instead of solved again."""
    fold: int | None = None
    """How many of the first batches stay as they are while the others become one; None folds none."""
    recheck: int = 1000
    """How many of the edits that stay are asked again, at most."""
    checks: tuple[str, ...] = ()
    """What is measured beside answers, of `values.CHECKS`."""
    given: tuple[Delta, ...] = ()
    """Batches of the plan's new edits that were solved elsewhere."""
    weights_hash: str = ""
    """What the weights must come to; "" if nobody knows."""


def moments_for(model: Model, settings: Settings, base: str, store: Store, emit: Emit) -> dict[int, Moment]:
    """Second moments of the layers of a run, and word of how much of each may be edited."""
    moments = statistics.moments(
        model,
        settings.layers,
        corpus=settings.corpus,
        tokens=settings.corpus_tokens,
        base=base,
        folder=store.stats_dir,
        emit=emit,
        content=settings.corpus_content,
    )
    if settings.null_space is not None:
        for layer, moment in moments.items():
            emit(statistics.null_space_event(layer, moment, settings.null_space))
    return moments


def libraries() -> dict[str, str]:
    """Versions of what decides the arithmetic."""
    names = ("editctl", "torch", "transformers", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{name: library_version(name) for name in names}}


_HIGH_WATER = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begin to measure peak memory anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        # 5 resets what Linux keeps as the most that was resident.
        _HIGH_WATER.write_text("5")


def peak_mb(device: torch.device) -> float:
    """Most memory used so far, or since `reset_peak`: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def run(plan: Plan, model: Model, base: str, store: Store, emit: Emit, order: Order = Order()) -> Version:
    """Carry out the plan and return the version it made: the new head, or a candidate if a gate failed.

    A plan made for a candidate instead of the head is a review of it: what comes of it stands on what the candidate
    stands on.

    Args:
        base: content hash of the model's folder.

    Raises:
        StalePlan: the store or the model is not what the plan was made for.
        Locked: another process is writing.
    """
    clock = Clock()
    recorded: list[str] = []

    def tell(event: Event) -> None:
        if not isinstance(event, UNRECORDED):
            recorded.append(to_line(event))
        emit(event)
        if isinstance(event, StageStarted):
            emit(MemoryUsed(peak_mb(model.device)))

    view, origin = store.view(), store.resolve(plan.head or BASE)
    reviewed = origin is not None and origin.id in view.candidates
    parent = origin.parent if origin and reviewed else plan.head
    check_fresh(replace(plan, head=parent), base=base, head=view.head)
    if origin is not None and origin.dtype != str(model.dtype):
        raise InvalidInput(
            f"version {origin.id} was made in {origin.dtype}, the model is loaded in {model.dtype}",
            f"pass --dtype {origin.dtype.removeprefix('torch.')}, or restore base first",
        )
    # A plan may leave the dtype to the machine; what was done is recorded.
    dtype = str(model.dtype).removeprefix("torch.")
    settings = replace(Settings.from_params(plan.params), dtype=dtype)
    new = [action.edit for action in plan.of(ADD, REPLACE)]
    todo = list(_batches(new, settings.batch_size))
    if order.given:
        # In order and not by name: what an edit is called may have changed since it was written.
        rest = iter(new)
        todo = [list(itertools.islice(rest, len(delta.edits))) for delta in order.given]
    where, drops = str(model.device), len(plan.of(REPLACE, DROP))
    tell(RunStarted(model.name, where, str(model.dtype), settings.method, len(new), len(todo), drops))
    old = _old(plan, store, origin)
    staying = [live.edit for batch in old for live in batch.lives]
    asked = _asked_again(plan, old, store.edits(store.resolve(parent or BASE)), order, tell)
    stay = [q for edit in asked for q in edit_metrics.questions(edit)]
    fresh = [q for edit in new for q in edit_metrics.questions(edit)]
    questions = stay + fresh
    # On the unedited model, since what is measured must not depend on what it wears.
    solved = (Settings.from_params(plan.params_of(method)) for method in {edit.method for edit in new})
    stored = [Settings.from_params(batch.delta.params) for batch in old if batch.lives]
    edited = sorted({layer for one in (*solved, *stored) for layer in one.layers})
    model.check_editable(edited)
    speak.check_lengths(model, ((q.edit, q.prompt, (*q.wanted, q.rival)) for q in questions))

    @cache
    def moments_of(wanted: Settings) -> Mapping[int, Moment]:
        return moments_for(model, wanted, base, store, tell)

    if order.fold is not None and all(len(alike) == 1 for alike in _alike(old[order.fold :])):
        raise InvalidInput("no two neighbouring batches have the same settings: there is nothing to fold", "")
    with clock.stage("statistics"):
        for wanted in (settings, *map(Settings.from_params, plan.methods.values())) if new and not order.given else ():
            if wanted.needs_moments:
                moments_of(replace(wanted, dtype=dtype))
        contexts = sample_contexts(model, settings.seed)
    known = Recall.of(model, base, store.root)
    with clock.stage("before"):
        called = {action.edit.id: action.old.id for action in plan.of(REMEASURE) if action.old}
        before, soon = _before(model, store, origin, called, staying, stay, fresh, known, tell)
    with clock.stage("checks"):
        written = _some(new, plan.head, tell) if order.checks else ()
        whose = "" if len(written) == len(new) + len(staying) else NEW_EDITS
        checks = Checks(Wanted(order.checks), written, tell, whose)
        # What lies over the weights changes no block; drift is measured at the last.
        last = max(edited, default=len(model.blocks) - 1)
        unedited = checks.side(model, last, known) if new or stored else Side()
    _note_unknown(new, before, tell)
    with model.editing() as editing:
        editor = Editor(model, editing, moments_of, contexts, tell, clock, store.artifacts_dir)
        lives: list[LiveEdit] = []

        def worn() -> AbstractContextManager[None]:
            """The model as it is asked: with what lies over the weights."""
            return laid(model, editing.overlays, store.artifacts_dir)

        def filed(edits: Sequence[Edit | Stored]) -> None:
            """Put the batch just written on disk; `edits` are its edits in order, which may be called otherwise now."""
            delta = editor.deltas[-1]
            name = delta_files.save(delta, store.deltas_dir)
            # From here on as it lies on disk, so that memory does not grow by keys and factors.
            editor.deltas[-1] = delta_files.load(name, store.deltas_dir)
            lives.extend(LiveEdit(edit, name, column) for edit, column in zip(edits, delta.columns, strict=True))

        gone = {action.old.prompt for action in plan.of(REPLACE) if action.old}
        gone |= {action.edit.prompt for action in plan.of(DROP)}
        first = len(old) if order.fold is None else order.fold
        for batch in old[:first]:
            if not batch.lives:
                editor.resolving |= bool(batch.delta.modules)
                continue
            _stand(editor, batch, before, gone, settings.seed, order, tell)
            filed(batch.known)
        for alike in _alike(old[first:]):
            if len(alike) == 1:
                _stand(editor, alike[0], before, gone, settings.seed, order, tell)
            elif all(foldable(batch.delta) for batch in alike):
                editor.fold([(batch.delta, batch.facts(before)) for batch in alike])
            else:
                _seek_anew(editor, alike, before, settings.seed, tell)
            filed([edit for batch in alike for edit in batch.known])
        for number, edits in enumerate(todo, 1):
            facts = [request_of(edit, before) for edit in edits]
            if order.given:
                editor.wear(order.given[number - 1], facts)
            else:
                own = replace(Settings.from_params(plan.params_of(edits[0].method)), dtype=dtype)
                editor.edit(facts, own, number)
            filed(edits)
            if number < len(todo):
                with clock.stage("after"), worn():
                    soon |= ask_all(model, _own(edits), "after", silent, scored=False).words
        with clock.stage("after"), worn():
            after = ask_all(model, questions, "after", tell)
            # Nothing was written after the last batch.
            latest = {live.id for live in lives if live.delta == lives[-1].delta}
            soon = {q: said for q, said in soon.items() if q.edit not in latest}
        with clock.stage("checks"), worn():
            beside = checks.compare(unedited, checks.side(model, last)) if lives else ()
        with clock.stage("commit"):
            tell(StageStarted("commit", 0))
            weights_hash, norms = editing.weights_hash(), editing.norms()
    if order.weights_hash and weights_hash != order.weights_hash:
        raise StoreError(
            f"the weights come to {weights_hash}, where the version was made they came to {order.weights_hash}",
            "the factor files and the record do not belong together; export the version again",
        )
    answers = answers_of(questions, before, after, soon)
    metrics = (*edit_metrics.summary(answers), *beside)
    failed = gates.failures(plan.gates, metrics, answers, len(lives))
    for one in failed:
        tell(GateFailed(one.gate, one.wanted, one.value, list(one.edits)))
    seconds = {phase: round(spent, 3) for phase, spent in clock.seconds.items()}
    draft = Draft(
        parent=parent,
        base=base,
        model=model.name,
        dtype=str(model.dtype),
        method=_methods(editor.deltas),
        params=settings.to_params(),
        seed=settings.seed,
        weights_hash=weights_hash,
        libraries=libraries(),
        seconds=seconds,
        peak_mb=peak_mb(model.device),
        norms=norms,
        gates=dict(plan.gates),
        edits=tuple(lives),
        answers=answers,
        metrics=metrics,
        events=tuple(recorded),
    )
    version = store.commit(
        draft,
        expected_head=parent,
        verb=order.verb,
        command=order.command,
        note=order.note,
        instead_of=plan.head if order.verb == REJECT else "",
        without=[action.edit.id for action in plan.of(DROP)] if order.verb != "apply" else (),
        hold="; ".join(map(str, failed)),
    )
    emit(VersionMade(version.id, version.parent, weights_hash, seconds, draft.peak_mb, bool(failed)))
    return version


@dataclass(frozen=True)
class _Batch:
    """A batch that is there: what was solved, and what of it stays."""

    delta: Delta
    lives: tuple[LiveEdit, ...]

    @property
    def known(self) -> list[Edit | Stored]:
        """Its edits that stay, in order."""
        return [live.known for live in self.lives]

    def facts(self, before: Said) -> list[tuple[Request, int]]:
        """What it states, with the columns."""
        return [(request_of(live.edit, before), live.column) for live in self.lives]


def _stand(editor: Editor, batch: _Batch, before: Said, gone: set[str], seed: int, order: Order, emit: Emit) -> None:
    """Put a batch on: as it is, without what goes, or sought anew where that is not enough."""
    facts, delta = batch.facts(before), batch.delta
    over = delta.overlay
    if over is not None and not (editor.resolving and follows_weights(over)):
        editor.keep(delta, facts)
        return
    torn = bool(gone & {prompt for _, column in facts for prompt in delta.together[column]})
    if not torn and len(facts) == len(delta.edits) and not editor.resolving:
        editor.wear(delta, [fact for fact, _ in facts])
    elif not torn and not order.replay and Settings.from_params(delta.params).solvable:
        editor.solve_again(delta, facts)
    else:
        _seek_anew(editor, [batch], before, seed, emit, "as asked" if order.replay else REPLAY)


def _seek_anew(
    editor: Editor, batches: Sequence[_Batch], before: Said, seed: int, emit: Emit, why: str = REPLAY
) -> None:
    """Seek the facts of batches of the same settings with gradients, in one."""
    editor.resolving |= any(batch.delta.modules for batch in batches)
    facts = [fact for batch in batches for fact, _ in batch.facts(before)]
    emit(Note(f"{count(len(facts), 'edit')} sought anew: {why}"))
    # The contexts of this run are those of its seed.
    editor.edit(facts, replace(Settings.from_params(batches[0].delta.params), seed=seed), 0)


def _alike(batches: Sequence[_Batch]) -> Iterator[list[_Batch]]:
    """Neighbours that were written with the same settings."""

    def how(batch: _Batch) -> Settings:
        return replace(Settings.from_params(batch.delta.params), seed=0, batch_size=1)

    for _, group in itertools.groupby((batch for batch in batches if batch.lives), how):
        yield list(group)


def _old(plan: Plan, store: Store, origin: Version | None) -> list[_Batch]:
    """The batches that are there, in order of application."""
    loaded = zip(_kept(plan, store.edits(origin)).values(), deltas_of(store, origin), strict=True)
    return [_Batch(delta, tuple(lives)) for lives, delta in loaded]


def _kept(plan: Plan, live: Sequence[LiveEdit]) -> dict[str, list[LiveEdit]]:
    """By factor file, in order of application: the live edits that stay, as the specs now describe them."""
    gone = {action.old.id for action in plan.of(REPLACE) if action.old} | {a.edit.id for a in plan.of(DROP)}
    renewed = {action.old.id: action.edit for action in plan.of(REMEASURE) if action.old}
    kept: dict[str, list[LiveEdit]] = {}
    for one in live:
        lives = kept.setdefault(one.delta, [])
        if one.id not in gone:
            lives.append(one._replace(known=renewed[one.id]) if one.id in renewed else one)
    return kept


def _asked_again(plan: Plan, old: Sequence[_Batch], below: Sequence[LiveEdit], order: Order, emit: Emit) -> list[Edit]:
    """The edits that stay and are asked again: all that the parent does not have as they are, and some of the rest.

    The rest come from the batches that are solved again, then from the others, at random.
    """

    def content(live: LiveEdit) -> tuple[str, str, str]:
        return live.id, live.known.weights_fingerprint, live.known.notes_fingerprint

    there = {content(live) for live in below}
    changed = next((i for i, b in enumerate(old) if len(b.lives) < len(b.delta.edits)), len(old))
    changed = min(changed, len(old) if order.fold is None else order.fold)
    lives = [(i < changed, live) for i, batch in enumerate(old) for live in batch.lives]
    must = [live for _, live in lives if content(live) not in there]
    rest = [(still, live) for still, live in lives if content(live) in there]
    if len(rest) > order.recheck:
        some = f"{order.recheck} of {count(len(rest), 'edit')} that stay"
        emit(Note(f"{some} are asked again (`recheck` in editctl.toml)"))
        random.Random(plan.head).shuffle(rest)
        rest.sort(key=lambda item: item[0])
    chosen = {live.id for live in must} | {live.id for _, live in rest[: order.recheck]}
    return [live.edit for _, live in lives if live.id in chosen]


def _before(
    model: Model,
    store: Store,
    origin: Version | None,
    called: Mapping[str, str],
    staying: Sequence[Edit],
    stay: Sequence[Question],
    fresh: Sequence[Question],
    known: Recall,
    emit: Emit,
) -> tuple[Said, dict[Question, str]]:
    """What was said before each edit was first applied, and right after.

    That is recorded for the edits that stay, so drift adds up over versions and shows; what is fresh is asked of the
    plan's version; probes that were added to a live edit are asked of the unedited model.

    Args:
        called: by id what an edit was called until now, where that is another name.
    """
    answers = store.last_answers(origin, [called.get(edit.id, edit.id) for edit in staying])
    recorded = {(a.edit, a.kind, a.prompt, a.wanted): a for a in answers}
    asked = [q for edit in staying for q in edit_metrics.questions(edit)]
    found = {q: a for q in asked if (a := recorded.get((called.get(q.edit, q.edit), q.kind, q.prompt, q.wanted)))}
    scored = {
        q: Scored(a.nll_before, a.forced_before, a.argmax_before, a.nll_rival_before if a.rival == q.rival else None)
        for q, a in found.items()
    }
    said = Said({q: a.before for q, a in found.items()}, scored)
    if late := [q for q in stay if q not in found]:
        said |= ask_all(model, late, "before", emit, known)
    with wearing(model, store, origin):
        said |= ask_all(model, fresh, "before", emit, known if origin is None else None)
    # Where it is not recorded, the version that was asked is the one that made the edit.
    soon = {q: a.after if a.soon is None else a.soon for q, a in found.items() if q.kind == REWRITE}
    return said, soon


def _some(edits: Sequence[Edit], head: str, emit: Emit) -> list[Edit]:
    """Those of the new edits about whose subjects texts are written."""
    spoken = [edit for edit in edits if edit.generation]
    if len(spoken) > SPOKEN:
        emit(Note(f"texts are written about {SPOKEN} of {count(len(spoken), 'edit')}; `editctl measure` takes all"))
        spoken = random.Random(head).sample(spoken, SPOKEN)
    chosen = {edit.id for edit in spoken}
    return [edit for edit in edits if not edit.generation or edit.id in chosen]


def _own(edits: Sequence[Edit]) -> list[Question]:
    """The edits' own prompts."""
    return [q for edit in edits for q in edit_metrics.questions(edit) if q.kind == REWRITE]


def _note_unknown(new: Sequence[Edit], before: Said, emit: Emit) -> None:
    """Say which edits name a target_true that the model did not say."""
    for edit in new:
        own = edit_metrics.questions(edit)[0]
        if edit.target_true and not edit_metrics.says(before.words[own], (edit.target_true,)):
            said = before.words[own]
            emit(Note(f"{edit.id}: the model did not say {edit.target_true!r} before, but {said!r}"))


def _methods(deltas: Sequence[Delta]) -> str:
    """The methods of the batches with how many edits each wrote; the name alone when there is one."""
    counts: Counter[str] = Counter()
    for delta in deltas:
        counts[str(delta.params["method"])] += len(delta.edits)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


def _batches(edits: Sequence[Edit], size: int) -> Iterator[list[Edit]]:
    """Batches of at most `size` edits of one method, in order."""
    for _, group in itertools.groupby(edits, key=lambda edit: edit.method):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))
