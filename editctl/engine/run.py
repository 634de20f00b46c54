"""Carry out a plan: the order of work, nothing of how.

before → (remove what goes, solving the rest again from stored keys and residuals) → for each batch: targets, then
layer by layer keys, solve, write → after → commit. The store is touched once, at the end; until then a kill leaves
nothing but factor files without a version.
"""

from __future__ import annotations

import itertools
import platform
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version as library_version

import torch
from torch import Tensor

from editctl import delta as delta_files
from editctl.delta import Delta, Factors
from editctl.engine import keys as key_room
from editctl.engine import speak, statistics
from editctl.engine.methods import Settings, Tune
from editctl.engine.model import Editing, Model
from editctl.engine.post import finish
from editctl.engine.prompts import Group, Request, sample_contexts
from editctl.engine.prompts import groups as group_requests
from editctl.engine.solve import Kernel, Projector, strongest
from editctl.engine.statistics import Moment
from editctl.engine.target import optimise
from editctl.engine.tune import tune as fine_tune
from editctl.errors import InvalidInput, StoreError
from editctl.events import Emit, Event, LayerSolved, Note, Progress, RunStarted, StageStarted, VersionMade, to_line
from editctl.metrics import edits as edit_metrics
from editctl.metrics.edits import Question
from editctl.metrics.values import LOCALITY, Answer
from editctl.plan import ADD, DROP, REMEASURE, REPLACE, Plan, check_fresh, count
from editctl.spec import SLOT, Edit
from editctl.store import Draft, LiveEdit, Store, Version

UNRECORDED = (Progress,)
"""Events that matter only while they happen."""
REPLAY = "what goes was part of their targets, or their method has nothing to solve again from"


class Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


@dataclass(frozen=True)
class _Column:
    """A column of factors that is about to be written."""

    place: str
    facts: tuple[Request, ...]
    """Those that are looked up there, or share the target of those."""
    prompts: tuple[str, ...]
    """What the target is made for."""


@dataclass
class _Goal:
    """What a block shall put out."""

    values: Tensor
    """At every column's place, d × n."""
    sizes: Tensor
    """‖h₀‖, n."""
    staged: key_room.Staged
    first: key_room.Stage | None
    """The first stage, where it was read on the weights that are edited."""


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
        clock: Clock | None = None,
    ) -> None:
        self._model = model
        self._clock = clock or Clock()
        self._editing = editing
        self._moments_of = moments_of
        self._contexts = contexts
        self._emit = emit
        self._kernels: dict[tuple[object, ...], tuple[Kernel, list[tuple[int, tuple[int, ...]]]]] = {}
        """Kernels with the columns of each batch that are in their history."""
        self._facts: list[tuple[Request, ...]] = []
        self._now: list[_Column] = []
        """Columns of the batch being written."""
        self._parts: dict[str, list[Factors]] = {}
        """By module, the updates of the batch being written."""
        self.deltas: list[Delta] = []
        """Batches in order of application."""
        self.resolving = False
        """Whether an earlier batch has changed, so that later ones must be solved again with their new history."""

    # What is on the weights

    def wear(self, delta: Delta, facts: Sequence[Request]) -> None:
        """Add a batch that was solved before, with the facts of its edits."""
        for module, factors in delta.modules.items():
            self._put(module, factors)
        self._add(delta, facts)

    def _put(self, module: str, factors: Factors) -> None:
        with self._clock.stage("write"):
            self._editing.add(module, factors)
        self._parts.setdefault(module, []).append(factors)

    def _add(self, delta: Delta, facts: Sequence[Request]) -> None:
        self.deltas.append(delta)
        self._facts.append(tuple(facts))
        self._parts = {}

    # New edits

    def edit(self, requests: Sequence[Request], settings: Settings, number: int) -> Delta:
        """Solve and write one batch of new requests."""
        if settings.tune is not None:
            delta = self._tune(requests, settings, settings.tune, number)
        else:
            delta = self._solve_batch(requests, settings, number)
        self._add(delta, requests)
        for layer in settings.layers:
            block = self._model.blocks[layer]
            norm = float(block.weight.float().norm())
            self._emit(_layer_solved(number, layer, delta.modules[block.down_name], norm))
        return delta

    def _solve_batch(self, requests: Sequence[Request], settings: Settings, number: int) -> Delta:
        earlier = [fact for facts in self._facts for fact in facts]
        groups = group_requests(requests, earlier, joint=settings.target.joint)
        # ROME's values are met exactly, which those of several subjects at once need not allow.
        units = [[group] for group in groups] if settings.ridge.hard else [groups]
        self._now = [
            _Column(place, group.facts, tuple(fact.prompt for fact in group.facts))
            for group in groups
            for place in group.places
        ]
        modules: dict[str, list[Factors]] = {}
        found: dict[str, object] = {}
        for unit in units:
            for module, factors in self._write(unit, settings, number, found).items():
                modules.setdefault(module, []).append(factors)
        columns = [next(i for i, c in enumerate(self._now) if c.place == r.place and r in c.facts) for r in requests]
        delta = Delta(
            tuple(r.id for r in requests),
            {module: delta_files.beside(parts) for module, parts in modules.items()},
            settings.to_params(),
            columns=tuple(columns),
            places=tuple(column.place for column in self._now),
            together=tuple(column.prompts for column in self._now),
            found=found,
        )
        for module in modules:
            # As one matrix they round differently than one after another, and it is the matrix that is stored.
            if len(self._parts[module]) > 1 and delta.modules[module].kind != "thin":
                self._editing.rebuild(module, [*self._earlier(module), delta.modules[module]])
        self._remembered(settings)
        return delta

    def _earlier(self, module: str) -> list[Factors]:
        """A module's updates in earlier batches."""
        return [delta.modules[module] for delta in self.deltas if module in delta.modules]

    def _write(
        self, groups: Sequence[Group], settings: Settings, number: int, found: dict[str, object]
    ) -> dict[str, Factors]:
        """Seek targets and write every block towards them; one column a place."""
        layers, write = settings.layers, settings.write
        rounds: dict[str, list[Factors]] = {}
        goal: _Goal | None = None
        for round_ in range(write.rounds):
            for stage, layer in enumerate(layers):
                if goal is None or write.spread == "full":
                    goal = self._goal(groups, layer, settings, number, found)
                    self._emit(StageStarted("solve", len(layers), number))
                with self._clock.stage("keys"):
                    seen = goal.first or goal.staged.stage(layer)
                goal.first = None
                missing = goal.values - (seen.last_writes if write.site == "mlp" else seen.states)
                if round_:
                    missing = missing * (missing.norm(dim=0) > write.near * goal.sizes)
                residuals = key_room.residual_share(missing, stage, len(layers), write.spread)
                if write.site == "block":
                    residuals = self._model.response(layer).needed(seen.writes.T, residuals.T).T
                if write.keys == "mean":
                    # The value is met at the mean key, where the block now puts out something else than at the plain.
                    weight = self._model.blocks[layer].weight.to(residuals.dtype)
                    residuals = residuals + weight @ (seen.plain - seen.mean)
                at = seen.plain if write.keys == "rome" else None
                factors = self._solve(settings, layer, seen.keys(write.keys), residuals, at=at)
                rounds.setdefault(self._model.blocks[layer].down_name, []).append(factors)
                goal.staged.written(layer)
        if write.rounds > 1:
            for layer in layers:
                parts = rounds[self._model.blocks[layer].down_name]
                self._kernel(settings, layer).absorb(parts[0].keys)
        return {module: delta_files.after(parts) for module, parts in rounds.items()}

    def _goal(
        self, groups: Sequence[Group], layer: int, settings: Settings, number: int, found: dict[str, object]
    ) -> _Goal:
        """What the last block shall put out at every place, and the first reading of the keys at `layer`."""
        target, site = settings.target, settings.write.site
        last = layer if settings.write.spread == "full" else settings.layers[-1]
        columns = [(i, place) for i, group in enumerate(groups) for place in group.places]
        spots = [next(f for f in groups[i].facts if f.place == place) for i, place in columns]
        self._emit(StageStarted("target", target.steps, number))

        def places() -> key_room.Staged:
            return key_room.Staged(self._model, spots, self._contexts, last, self._emit)

        with self._editing.bare() if target.on_base else nullcontext():
            with self._clock.stage("target"):
                sought = optimise(
                    self._model, last, groups, self._contexts, target, emit=self._emit, batch=number, site=site
                )
            with self._clock.stage("keys"):
                staged = places()
                first = staged.stage(layer)
        writes, response = first.last_writes.T, self._model.response(last)
        push = torch.stack([sought[i].change for i, _ in columns]).to(first.states)
        if site == "block" and response.kind != "normed":
            push = response.needed(writes, push)
        if target.anchor:
            push = self._anchored(writes, push, found)
        moved = push if site == "mlp" else response.moved(writes, push)
        values = moved.T + (first.last_writes if site == "mlp" else first.states)
        sizes = first.states.norm(dim=0)
        return _Goal(values, sizes, *((places(), None) if target.on_base else (staged, first)))

    def _anchored(self, writes: Tensor, push: Tensor, found: dict[str, object]) -> Tensor:
        """Changes (n × d) after which values have the mean norm of those of the first batch (NAS 2026, arXiv
        2602.02543); a value twice as long is given up."""
        values = writes + push
        norms = values.norm(dim=1, keepdim=True)
        known = (delta.found["anchor"] for delta in self.deltas if "anchor" in delta.found)
        anchor = float(next(known, float(norms.mean())))  # type: ignore[arg-type]
        found["anchor"] = anchor
        if given_up := int((norms > 2 * anchor).sum()):
            self._emit(Note(f"{given_up} values are more than twice as long as the model's own and are given up"))
        return torch.where(norms > 2 * anchor, torch.zeros_like(push), values * anchor / norms - writes)

    def _tune(self, requests: Sequence[Request], settings: Settings, tune: Tune, number: int) -> Delta:
        """Fine-tune on one batch of new requests."""
        (layer,) = settings.layers
        self._emit(StageStarted("target", tune.epochs, number))
        space = settings.null_space
        projector = Projector(self._moment(settings, layer), space, self._model.device) if space else None
        with self._clock.stage("target"):
            update = fine_tune(self._model, layer, requests, tune, projector=projector, emit=self._emit, batch=number)
        # The keys are kept, so that later batches of other methods preserve what was tuned.
        keys = key_room.Staged(self._model, requests, self._contexts, layer, self._emit).stage(layer)
        mixed = keys.keys(settings.write.keys).float().cpu()
        factors = Factors(mixed, update @ mixed, torch.zeros(0, mixed.shape[0]), dense=update)
        module = self._model.blocks[layer].down_name
        self._put(module, factors)
        prompts = tuple((r.prompt,) for r in requests)
        ids, places = tuple(r.id for r in requests), tuple(r.place for r in requests)
        return Delta(ids, {module: factors}, settings.to_params(), places=places, together=prompts)

    # The solve

    def _solve(
        self, settings: Settings, layer: int, keys: Tensor, residuals: Tensor, *, at: Tensor | None = None
    ) -> Factors:
        """Solve one layer with the live columns of all batches so far in its kernel's history, and write the update."""
        write = settings.write
        with self._clock.stage("solve"):
            kernel = self._kernel(settings, layer)
            neurons = strongest(keys, write.neurons) if write.neurons < 1 else None
            factors = kernel.solve(keys, residuals, at=at, neurons=neurons, remember=write.rounds == 1)
        return self._finished(settings, layer, factors, kernel.projector)

    def _finished(self, settings: Settings, layer: int, factors: Factors, projector: Projector | None) -> Factors:
        module = self._model.blocks[layer].down_name
        with self._clock.stage("solve"):
            factors = finish(
                factors,
                settings.write,
                base=self._editing.base(module),
                weight=self._model.blocks[layer].weight,
                earlier=[*self._earlier(module), *self._parts.get(module, ())],
                projector=projector,
            )
        self._put(module, factors)
        return factors

    def _kernel(self, settings: Settings, layer: int) -> Kernel:
        """The kernel of a layer, its history being the columns of earlier batches that still hold."""
        name = self._kernel_name(settings, layer)
        module = self._model.blocks[layer].down_name
        batches = enumerate(self.deltas) if settings.ridge.history else ()
        wanted = [(i, self._holding(i)) for i, delta in batches if module in delta.modules]
        kernel, known = self._kernels.get(name, (None, []))
        if kernel is None or known != wanted[: len(known)]:
            kernel = Kernel(
                self._moment(settings, layer), settings.ridge, settings.null_space, self._model.device, settings.write
            )
            known = []
        for i, columns in wanted[len(known) :]:
            if columns:
                kernel.absorb(self.deltas[i].modules[module].keys[:, list(columns)])
        self._kernels[name] = (kernel, wanted)
        return kernel

    def _moment(self, settings: Settings, layer: int) -> Moment:
        """The second moment of a layer's keys in the unedited model."""
        with self._editing.bare():
            return self._moments_of(settings)[layer]

    def _kernel_name(self, settings: Settings, layer: int) -> tuple[object, ...]:
        return (
            *(settings.ridge, settings.null_space, settings.write),
            *(settings.corpus_content, settings.corpus_tokens, layer),
        )

    def _remembered(self, settings: Settings) -> None:
        """The batch about to be added is in the history of the kernels that solved it."""
        for layer in settings.layers if settings.ridge.history else ():
            _, known = self._kernels[self._kernel_name(settings, layer)]
            known.append((len(self.deltas), tuple(range(len(self._now)))))

    def _holding(self, i: int) -> tuple[int, ...]:
        """The columns of a batch that no later one, nor the present, has taken over: same place, all its facts."""
        later = [
            (place, prompts)
            for delta in self.deltas[i + 1 :]
            for place, prompts in zip(delta.places, delta.together, strict=True)
        ]
        later += [(column.place, column.prompts) for column in self._now]
        delta = self.deltas[i]
        held = []
        for column, place in enumerate(delta.places):
            own = {f.prompt for f, c in zip(self._facts[i], delta.columns, strict=True) if c == column}
            if not any(place == other and own <= set(prompts) for other, prompts in later):
                held.append(column)
        return tuple(held)

    # Edits that go

    def solve_again(self, delta: Delta, facts: Sequence[tuple[Request, int]]) -> None:
        """Write a batch with only some of its facts (each with its column), from stored keys and residuals.

        The residuals are those of the first time, so measure afterwards.
        """
        self.resolving = True
        settings = Settings.from_params(delta.params)
        columns = sorted({column for _, column in facts})
        self._now = [
            _Column(delta.places[c], tuple(r for r, column in facts if column == c), delta.together[c]) for c in columns
        ]
        modules = {}
        for layer in settings.layers:
            module = self._model.blocks[layer].down_name
            old = delta.modules[module]
            keys, residuals = old.keys[:, columns], old.residuals[:, columns]
            if settings.ridge.hard:
                # Each was solved by itself.
                modules[module] = Factors(keys, residuals, old.factor[columns])
                self._put(module, modules[module])
            else:
                modules[module] = self._solve(settings, layer, keys, residuals)
        if not settings.ridge.hard:
            self._remembered(settings)
        requests = [request for request, _ in facts]
        made = replace(
            delta,
            edits=tuple(r.id for r in requests),
            modules=modules,
            columns=tuple(columns.index(column) for _, column in facts),
            places=tuple(delta.places[c] for c in columns),
            together=tuple(delta.together[c] for c in columns),
        )
        self._add(made, requests)


def _solvable(delta: Delta) -> bool:
    """Whether a batch can be solved again without gradients, from what is stored."""
    settings = Settings.from_params(delta.params)
    write = settings.write
    if settings.tune is not None or write.rounds > 1 or write.neurons < 1:
        return False
    # The keys at which ROME measures values are not stored; met exactly, no column depends on another.
    return not write.post if settings.ridge.hard else write.keys != "rome"


def _layer_solved(number: int, layer: int, factors: Factors, weight_norm: float) -> LayerSolved:
    reached = factors.times(factors.keys)
    wanted = factors.residuals.norm().clamp_min(1e-30)
    left = float((factors.residuals - reached).norm() / wanted)
    return LayerSolved(number, layer, factors.norm(), weight_norm, left)


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


def request_of(edit: Edit, before: Said | None = None) -> Request:
    """The fact of an edit, with the locality probes about its own subject and what was said to them before."""
    words = before.words if before else {}
    # As words of its own: Romeo is not about Rome.
    named = re.compile(rf"(?<!\w){re.escape(edit.subject)}(?!\w)")
    keep = [
        (named.sub(lambda _: SLOT, question.prompt), words[question])
        for question in edit_metrics.questions(edit)
        if question.kind == LOCALITY and len(named.findall(question.prompt)) == 1 and words.get(question)
    ]
    return Request(edit.id, edit.relation, edit.subject, edit.target_new, tuple(keep))


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

    words = speak.answers(model, [prompt for prompt, _ in different], [n for _, n in different], tick, emit)
    by_prompt = dict(zip(different, words, strict=True))
    forced = dict(zip(pairs, speak.forced(model, pairs, emit), strict=True))
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
    clock = Clock()
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
    # On the unedited model, since what is measured must not depend on what it wears.
    solved = (Settings.from_params(params) for params in (plan.params, *plan.methods.values()))
    stored = (Settings.from_params(delta.params) for delta in deltas_of(store, head))
    model.check_editable(sorted({layer for one in (*solved, *stored) for layer in one.layers}))
    speak.check_lengths(model, ((q.edit, q.prompt) for q in questions))

    @cache
    def moments_of(wanted: Settings) -> Mapping[int, Moment]:
        return moments_for(model, wanted, base, store, tell)

    with clock.stage("statistics"):
        for wanted in (settings, *map(Settings.from_params, plan.methods.values())):
            if wanted.needs_moments:
                moments_of(replace(wanted, dtype=dtype))
        contexts = sample_contexts(model, settings.seed)
    with clock.stage("before"):
        before = _before(model, store, head, stay, fresh, tell)
    _note_unknown(new, before, tell)
    with model.editing() as editing:
        editor = Editor(model, editing, moments_of, contexts, tell, clock)
        batches: list[list[Edit]] = []
        names: list[str] = []

        def filed(edits: list[Edit]) -> None:
            batches.append(edits)
            names.append(delta_files.save(editor.deltas[-1], store.deltas_dir))
            # From here on as it lies on disk, so that memory does not grow by keys and factors.
            editor.deltas[-1] = delta_files.load(names[-1], store.deltas_dir)

        gone = {action.old.prompt for action in plan.of(REPLACE) if action.old}
        gone |= {action.edit.prompt for action in plan.of(DROP)}
        for name, delta in zip(head.deltas if head else (), deltas_of(store, head), strict=True):
            if lives := kept[name]:
                facts = [(request_of(live.edit, before), live.column) for live in lives]
                needed = {prompt for _, column in facts for prompt in delta.together[column]}
                if not (gone & needed) and len(lives) == len(delta.edits) and not editor.resolving:
                    editor.wear(delta, [fact for fact, _ in facts])
                elif not (gone & needed) and _solvable(delta):
                    editor.solve_again(delta, facts)
                else:
                    editor.resolving = True
                    tell(Note(f"{count(len(lives), 'edit')} sought anew: {REPLAY}"))
                    # The contexts of this run are those of its seed.
                    same = replace(Settings.from_params(delta.params), seed=settings.seed)
                    editor.edit([fact for fact, _ in facts], same, 0)
                filed([live.edit for live in lives])
            else:
                editor.resolving = True
        for number, batch in enumerate(todo, 1):
            own = replace(Settings.from_params(plan.params_of(batch[0].method)), dtype=dtype)
            editor.edit([request_of(edit, before) for edit in batch], own, number)
            filed(batch)
        with clock.stage("after"):
            after = ask_all(model, questions, "after", tell)
        with clock.stage("commit"):
            tell(StageStarted("commit", 0))
            weights_hash = editing.weights_hash()
    answers = answers_of(questions, before, after)
    seconds = {phase: round(spent, 3) for phase, spent in clock.seconds.items()}
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
        seconds=seconds,
        peak_mb=peak_mb(model.device),
        edits=tuple(
            LiveEdit(edit, name, column)
            for name, delta, batch in zip(names, editor.deltas, batches, strict=True)
            for column, edit in zip(delta.columns, batch, strict=True)
        ),
        answers=answers,
        metrics=edit_metrics.summary(answers),
        events=tuple(recorded),
    )
    version = store.commit(draft, command=command, expected_head=head.id if head else "")
    emit(VersionMade(version.id, version.parent, weights_hash, seconds, draft.peak_mb))
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
