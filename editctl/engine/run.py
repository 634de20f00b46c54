"""Carry out a plan: the order of work, nothing of how.

before → (remove what goes, solving the rest again from stored keys and residuals) → for each batch: targets, then
layer by layer keys, solve, write → after → commit. The store is touched once, at the end; until then a kill leaves
nothing but factor files without a version.
"""

from __future__ import annotations

import itertools
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version as library_version

import torch
from torch import Tensor

from editctl import delta as delta_files
from editctl.delta import Delta, Factors
from editctl.engine import keys as key_room
from editctl.engine import speak, statistics
from editctl.engine.methods import Settings
from editctl.engine.model import Editing, Model
from editctl.engine.prompts import Request, sample_contexts
from editctl.engine.solve import Kernel
from editctl.engine.statistics import Moment
from editctl.engine.target import optimise
from editctl.errors import InvalidInput, StoreError
from editctl.events import Emit, Event, LayerSolved, Note, Progress, RunStarted, StageStarted, VersionMade, to_line
from editctl.metrics import edits as edit_metrics
from editctl.metrics.edits import Question
from editctl.metrics.values import Answer
from editctl.plan import ADD, DROP, REMEASURE, REPLACE, Plan, check_fresh
from editctl.spec import Edit
from editctl.store import Draft, LiveEdit, Store, Version

UNRECORDED = (Progress,)
"""Events that matter only while they happen."""


class Editor:
    """A model, its second moments and the batches written so far: everything a solve needs.

    Studies use it without a store; `run` puts the store around it.
    """

    def __init__(
        self,
        model: Model,
        editing: Editing,
        moments_of: Callable[[Settings], Mapping[int, Moment]],
        contexts: Sequence[str],
        emit: Emit,
    ) -> None:
        self._model = model
        self._editing = editing
        self._moments_of = moments_of
        self._contexts = contexts
        self._emit = emit
        self._kernels: dict[tuple[object, ...], tuple[Kernel, int]] = {}
        self.deltas: list[Delta] = []
        """Batches in order of application."""
        self.resolving = False
        """Whether an earlier batch has changed, so that later ones must be solved again with their new history."""

    def wear(self, delta: Delta) -> None:
        """Add a batch that was solved before."""
        for module, factors in delta.modules.items():
            self._editing.add(module, factors)
        self.deltas.append(delta)

    def _solve(self, settings: Settings, layer: int, keys: Tensor, residuals: Tensor) -> Factors:
        """Solve one layer with all batches so far in its kernel's history, and write the update."""
        name = (settings.ridge, settings.corpus_content, settings.corpus_tokens, layer)
        if name not in self._kernels:
            moment = self._moments_of(settings)[layer]
            self._kernels[name] = (Kernel(moment, settings.ridge, self._model.device), 0)
        kernel, known = self._kernels[name]
        module = self._model.blocks[layer].down_name
        for earlier in self.deltas[known:]:
            if module in earlier.modules:
                kernel.absorb(earlier.modules[module].keys)
        factors = kernel.solve(keys, residuals)
        # The kernel remembers these keys itself: the batch being written counts as absorbed.
        self._kernels[name] = (kernel, len(self.deltas) + 1)
        self._editing.add(module, factors)
        return factors

    def edit(self, requests: Sequence[Request], settings: Settings, number: int) -> Delta:
        """Solve and write one batch of new requests."""
        layers, last = settings.layers, settings.layers[-1]
        self._emit(StageStarted("target", settings.target.steps, number))
        targets = optimise(self._model, last, requests, self._contexts, settings.target, emit=self._emit, batch=number)
        vectors = torch.stack([target.vector for target in targets], dim=1)
        self._emit(StageStarted("solve", len(layers), number))
        modules: dict[str, Factors] = {}
        for stage, layer in enumerate(layers):
            keys, states = key_room.keys_and_states(self._model, layer, last, requests, self._contexts)
            residuals = key_room.residual_share(vectors, states, stage, len(layers))
            factors = self._solve(settings, layer, keys, residuals)
            block = self._model.blocks[layer]
            modules[block.down_name] = factors
            self._emit(_layer_solved(number, layer, factors, float(block.weight.float().norm())))
        delta = Delta(tuple(r.id for r in requests), modules, settings.to_params())
        self.deltas.append(delta)
        return delta

    def solve_again(self, delta: Delta, columns: Sequence[int]) -> None:
        """Write a batch with only some of its edits, solved from stored keys and residuals without gradients.

        The residuals are those of the first time, so measure afterwards.
        """
        self.resolving = True
        settings = Settings.from_params(delta.params)
        modules = {}
        for layer in settings.layers:
            module = self._model.blocks[layer].down_name
            old = delta.modules[module]
            modules[module] = self._solve(settings, layer, old.keys[:, columns], old.residuals[:, columns])
        self.deltas.append(Delta(tuple(delta.edits[i] for i in columns), modules, delta.params))


def _layer_solved(number: int, layer: int, factors: Factors, weight_norm: float) -> LayerSolved:
    # ‖R A‖² = tr(RᵀR · A Aᵀ), n × n.
    update = ((factors.residuals.T @ factors.residuals) * (factors.factor @ factors.factor.T)).sum().clamp_min(0).sqrt()
    reached = factors.residuals @ (factors.factor @ factors.keys)
    wanted = factors.residuals.norm().clamp_min(1e-30)
    left = float((factors.residuals - reached).norm() / wanted)
    return LayerSolved(number, layer, float(update), weight_norm, left)


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
    if settings.ridge.energy is not None:
        for layer, moment in moments.items():
            emit(statistics.null_space_event(layer, moment, settings.ridge.energy))
    return moments


def request_of(edit: Edit) -> Request:
    """The fact of an edit."""
    return Request(edit.id, edit.relation, edit.subject, edit.target_new)


@dataclass(frozen=True)
class Said:
    """What a version says to all questions."""

    words: Mapping[Question, str]
    forced: Mapping[Question, tuple[float | None, float | None]]
    """Teacher-forced NLL and token accuracy of the first wanted answer; None without one."""

    def __or__(self, other: Said) -> Said:
        return Said({**self.words, **other.words}, {**self.forced, **other.forced})


def ask_all(model: Model, questions: Sequence[Question], stage: str, emit: Emit) -> Said:
    """Greedy words to every question, and teacher-forced values of wanted answers. Equal questions are asked once."""
    # A sentence end within a wanted answer ("St. Louis") must not cut what the model says.
    start = len(model.encode(""))
    least = {a: len(model.encode(a)) - start if set(a) & set(".!?") else 1 for q in questions for a in q.wanted}
    asked = {q: (q.prompt, max((least[answer] for answer in q.wanted), default=1)) for q in questions}
    different = list(dict.fromkeys(asked.values()))
    pairs = list(dict.fromkeys((q.prompt, q.wanted[0]) for q in questions if q.wanted))
    emit(StageStarted(stage, len(different)))
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        emit(Progress(stage, done, len(different)))

    words = speak.answers(model, [prompt for prompt, _ in different], [n for _, n in different], tick)
    by_prompt = dict(zip(different, words, strict=True))
    forced = dict(zip(pairs, speak.forced(model, pairs), strict=True))
    none = (None, None)
    return Said(
        {q: by_prompt[asked[q]] for q in questions},
        {q: forced[q.prompt, q.wanted[0]] if q.wanted else none for q in questions},
    )


def answers_of(questions: Sequence[Question], before: Said, after: Said) -> tuple[Answer, ...]:
    """Both versions' words side by side, judged."""
    result = []
    for q in questions:
        was, now, old, new = before.words[q], after.words[q], before.forced[q], after.forced[q]
        ok = edit_metrics.judge(q, was, now)
        result.append(Answer(q.edit, q.kind, q.prompt, q.wanted, was, now, ok, old[0], new[0], old[1], new[1]))
    return tuple(result)


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begun, 3)


def libraries() -> dict[str, str]:
    """Versions of what decides the arithmetic."""
    names = ("editctl", "torch", "transformers", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{name: library_version(name) for name in names}}


def peak_mb(device: torch.device) -> float:
    """Most memory used so far: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def deltas_of(store: Store, version: Version | None) -> list[Delta]:
    """A version's batches, read and checked."""
    return [delta_files.load(name, store.deltas_dir) for name in (version.deltas if version else ())]


@contextmanager
def wearing(model: Model, store: Store, version: Version | None) -> Iterator[Editing]:
    """The model with a version's weights on; the base again afterwards, bit for bit."""
    with model.editing() as editing:
        for delta in deltas_of(store, version):
            for module, factors in delta.modules.items():
                editing.add(module, factors)
        yield editing


def measure(model: Model, store: Store, version: Version, other: Version | None, emit: Emit) -> tuple[Answer, ...]:
    """Ask all prompts of a version's edits, of `other` and of the version itself.

    Raises:
        StoreError: the rebuilt weights are not those the version was recorded with.
    """
    questions = [q for live in store.edits(version) for q in edit_metrics.questions(live.edit)]
    with wearing(model, store, other):
        before = ask_all(model, questions, "before", emit)
    with wearing(model, store, version) as editing:
        found = editing.weights_hash()
        if found != version.weights_hash:
            raise StoreError(
                f"version {version.id} was recorded with weights {version.weights_hash}, rebuilt they are {found}",
                "the model or the store changed since; check the model folder and restore the store from a backup",
            )
        after = ask_all(model, questions, "after", emit)
    return answers_of(questions, before, after)


def run(plan: Plan, model: Model, base: str, store: Store, emit: Emit, *, command: str = "") -> Version:
    """Carry out the plan and return the version it made, which is the new head.

    Args:
        base: content hash of the model's folder.

    Raises:
        StalePlan: the store or the model is not what the plan was made for.
        Locked: another process is writing.
    """
    clock = _Clock()
    recorded: list[str] = []

    def tell(event: Event) -> None:
        if not isinstance(event, UNRECORDED):
            recorded.append(to_line(event))
        emit(event)

    head = store.head()
    check_fresh(plan, base=base, head=head.id if head else "")
    if head is not None and head.dtype != str(model.dtype):
        raise InvalidInput(
            f"version {head.id} was made in {head.dtype}, the model is loaded in {model.dtype}",
            f"pass --dtype {head.dtype.removeprefix('torch.')}, or restore base first",
        )
    # A plan may leave the dtype to the machine; what was done is recorded.
    dtype = str(model.dtype).removeprefix("torch.")
    settings = replace(Settings.from_params(plan.params), dtype=dtype)
    new = [action.edit for action in plan.of(ADD, REPLACE)]
    todo = list(_batches(new, settings.batch_size))
    where, drops = str(model.device), len(plan.of(REPLACE, DROP))
    tell(RunStarted(model.name, where, str(model.dtype), settings.method, len(new), len(todo), drops))
    kept = _kept(plan, store.edits(head))
    stay = [q for lives in kept.values() for live in lives for q in edit_metrics.questions(live.edit)]
    fresh = [q for edit in new for q in edit_metrics.questions(edit)]
    questions = stay + fresh
    model.check_editable(settings.layers)
    speak.check_lengths(model, ((q.edit, q.prompt) for q in questions))

    @cache
    def moments_of(wanted: Settings) -> Mapping[int, Moment]:
        return moments_for(model, wanted, base, store, tell)

    with clock.stage("statistics"):
        moments_of(settings)
        contexts = sample_contexts(model, settings.seed)
    with clock.stage("before"):
        before = _before(model, store, head, stay, fresh, tell)
    _note_unknown(new, before, tell)
    with model.editing() as editing:
        editor = Editor(model, editing, moments_of, contexts, tell)
        batches: list[list[Edit]] = []
        with clock.stage("rebuild"):
            for name, delta in zip(head.deltas if head else (), deltas_of(store, head), strict=True):
                if lives := kept[name]:
                    columns = [live.column for live in lives]
                    if len(columns) == len(delta.edits) and not editor.resolving:
                        editor.wear(delta)
                    else:
                        editor.solve_again(delta, columns)
                    batches.append([live.edit for live in lives])
                else:
                    editor.resolving = True
        with clock.stage("edit"):
            for number, batch in enumerate(todo, 1):
                own = replace(Settings.from_params(plan.params_of(batch[0].method)), dtype=dtype)
                editor.edit([request_of(edit) for edit in batch], own, number)
                batches.append(batch)
        with clock.stage("after"):
            after = ask_all(model, questions, "after", tell)
        with clock.stage("commit"):
            tell(StageStarted("commit", 0))
            names = [delta_files.save(delta, store.deltas_dir) for delta in editor.deltas]
            weights_hash = editing.weights_hash()
    answers = answers_of(questions, before, after)
    draft = Draft(
        parent=head.id if head else "",
        base=base,
        model=model.name,
        dtype=str(model.dtype),
        method=_methods(editor.deltas),
        params=settings.to_params(),
        seed=settings.seed,
        deltas=tuple(names),
        weights_hash=weights_hash,
        libraries=libraries(),
        seconds=clock.seconds,
        peak_mb=peak_mb(model.device),
        edits=tuple(
            LiveEdit(edit, name, column)
            for name, batch in zip(names, batches, strict=True)
            for column, edit in enumerate(batch)
        ),
        answers=answers,
        metrics=edit_metrics.summary(answers),
        events=tuple(recorded),
    )
    version = store.commit(draft, command=command, expected_head=head.id if head else "")
    emit(VersionMade(version.id, version.parent, weights_hash, clock.seconds, draft.peak_mb))
    return version


def _before(
    model: Model, store: Store, head: Version | None, stay: Sequence[Question], fresh: Sequence[Question], emit: Emit
) -> Said:
    """What was said before each edit was first applied.

    That is recorded for the edits that stay, so drift adds up over versions and shows; what is fresh is asked of the
    head; probes that were added to a live edit are asked of the unedited model.
    """
    recorded = {(a.edit, a.kind, a.prompt, a.wanted): a for a in store.answers(head)}
    known = {q: a for q in stay if (a := recorded.get((q.edit, q.kind, q.prompt, q.wanted)))}
    said = Said({q: a.before for q, a in known.items()}, {q: (a.nll_before, a.forced_before) for q, a in known.items()})
    if late := [q for q in stay if q not in known]:
        said |= ask_all(model, late, "before", emit)
    with wearing(model, store, head):
        return said | ask_all(model, fresh, "before", emit)


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


def _kept(plan: Plan, live: Sequence[LiveEdit]) -> dict[str, list[LiveEdit]]:
    """By factor file, in order of application: the live edits that stay, as the specs now describe them."""
    gone = {action.old.id for action in plan.of(REPLACE) if action.old} | {a.edit.id for a in plan.of(DROP)}
    renewed = {action.old.id: action.edit for action in plan.of(REMEASURE) if action.old}
    kept: dict[str, list[LiveEdit]] = {}
    for one in live:
        lives = kept.setdefault(one.delta, [])
        if one.edit.id not in gone:
            lives.append(replace(one, edit=renewed.get(one.edit.id, one.edit)))
    return kept


def _batches(edits: Sequence[Edit], size: int) -> Iterator[list[Edit]]:
    """Batches of at most `size` edits of one method, in order."""
    for _, group in itertools.groupby(edits, key=lambda edit: edit.method):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))
