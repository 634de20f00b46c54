"""The order in which a batch of edits is written, nothing of how.

For each batch: targets, then layer by layer keys, solve, write. Batches written before may be put on as they are,
solved again without some of their facts, or folded into one, all from stored keys and residuals. Knows: a model's
weights as they grow, and what each later batch has to preserve. Refuses: stores, plans, measuring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from editctl import delta as delta_files
from editctl.delta import Delta, Factors
from editctl.engine import keys as key_room
from editctl.engine.families import writer_of
from editctl.engine.methods import Settings
from editctl.engine.model import Editing, Model
from editctl.engine.post import finish
from editctl.engine.prompts import Group, Request
from editctl.engine.prompts import groups as group_requests
from editctl.engine.solve import Kernel, Projector, strongest
from editctl.engine.statistics import Moment
from editctl.engine.target import optimise
from editctl.engine.writing import Job, Update, Written
from editctl.events import Emit, LayerSolved, Note, StageStarted


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
        library: Path = Path(),
    ) -> None:
        """
        Args:
            library: where trained files lie.
        """
        self._model = model
        self._clock = clock or Clock()
        self._editing = editing
        self._moments_of = moments_of
        self._contexts = contexts
        self._emit = emit
        self._library = library
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
        """Add a batch that was written before, with the facts of its edits."""
        for module, factors in delta.modules.items():
            self._put(module, factors)
        self._add(delta, facts)

    def keep(self, delta: Delta, facts: Sequence[tuple[Request, int]]) -> None:
        """Lay a batch over the weights with only some of its facts (each with its column): the others' entries go."""
        assert delta.overlay is not None
        columns = [column for _, column in facts]
        requests = [request for request, _ in facts]
        made = replace(
            delta,
            # As its entries have them: what an edit is called may have changed since, which changes no file.
            edits=tuple(delta.edits[c] for c in columns),
            columns=tuple(range(len(facts))),
            places=tuple(delta.places[c] for c in columns),
            together=tuple(delta.together[c] for c in columns),
            overlay=delta.overlay.only(columns),
        )
        self._add(made, requests)

    def _put(self, module: str, factors: Factors) -> None:
        with self._clock.stage("write"):
            self._editing.add(module, factors)
        self._parts.setdefault(module, []).append(factors)

    def _add(self, delta: Delta, facts: Sequence[Request]) -> None:
        if delta.overlay is not None:
            self._editing.lay(delta.overlay)
        self.deltas.append(delta)
        self._facts.append(tuple(facts))
        self._parts = {}

    # New edits

    def edit(self, requests: Sequence[Request], settings: Settings, number: int) -> Delta:
        """Write one batch of new requests."""
        writer = writer_of(settings)
        if writer is None:
            delta = self._solve_batch(requests, settings, number)
        else:
            delta = self._have_written(writer, requests, settings, number)
        self._add(delta, requests)
        for layer in settings.layers if delta.modules else ():
            block = self._model.blocks[layer]
            norm = float(block.weight.float().norm())
            self._emit(_layer_solved(number, layer, delta.modules[block.down_name], norm))
        return delta

    def _solve_batch(self, requests: Sequence[Request], settings: Settings, number: int) -> Delta:
        # What lies over the weights is no business of theirs, and goes without them.
        written = zip(self.deltas, self._facts, strict=True)
        earlier = [fact for delta, facts in written if delta.modules for fact in facts]
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

    def _have_written(
        self, writer: Callable[[Job], Written], requests: Sequence[Request], settings: Settings, number: int
    ) -> Delta:
        """Have a batch of new requests written by another room, and keep the keys at their places beside it."""
        space = settings.null_space

        def projector(layer: int) -> Projector | None:
            return Projector(self._moment(settings, layer), space, self._model.device) if space else None

        alike = [delta.found for delta in self.deltas if delta.params["method"] == settings.method]
        with self._clock.stage("target"):
            written = writer(
                Job(
                    model=self._model,
                    requests=requests,
                    settings=settings,
                    number=number,
                    emit=self._emit,
                    library=self._library,
                    projector=projector,
                    earlier=alike,
                )
            )
        modules: dict[str, Factors] = {}
        if written.updates:
            # The keys are kept, so that later batches of other methods preserve what was written.
            staged = key_room.Staged(self._model, requests, self._contexts, max(written.updates), self._emit)
            for layer, update in written.updates.items():
                keys = written.keys.get(layer)
                if keys is None:
                    with self._clock.stage("keys"):
                        keys = staged.stage(layer).keys(settings.write.keys).float().cpu()
                module = self._model.blocks[layer].down_name
                modules[module] = _factors(keys, update)
                self._put(module, modules[module])
                staged.written(layer)
        return Delta(
            tuple(r.id for r in requests),
            modules,
            settings.to_params(),
            places=tuple(r.place for r in requests),
            together=tuple((r.prompt,) for r in requests),
            found=written.found,
            overlay=written.overlay,
        )

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

    # Batches that become one

    def fold(self, batches: Sequence[tuple[Delta, Sequence[tuple[Request, int]]]]) -> None:
        """Write several batches of the same settings as one, each with its facts and their columns.

        The value that each column was written for stays what it was: its residual grows by what the batches before it
        had moved at its key, and all are solved together. A column whose place a later one took over is left away.

        Args:
            batches: in order of application; all of them `foldable`.
        """
        self.resolving = True
        first, _ = batches[0]
        settings = Settings.from_params(first.params)
        columns = _outlasting(batches)
        requests = [request for _, facts in batches for request, _ in facts]
        holders = list(dict.fromkeys(columns.values()))
        self._now = [
            _Column(
                batches[i][0].places[c],
                tuple(r for r in requests if columns[r] == (i, c)),
                batches[i][0].together[c],
            )
            for i, c in holders
        ]
        modules = {}
        for layer in settings.layers:
            module = self._model.blocks[layer].down_name
            updates = [delta.modules[module] for delta, _ in batches]
            keys = torch.cat([updates[i].keys[:, [c]] for i, c in holders], dim=1)
            residuals = torch.cat(
                [
                    updates[i].residuals[:, [c]] + sum(before.times(updates[i].keys[:, [c]]) for before in updates[:i])
                    for i, c in holders
                ],
                dim=1,
            )
            modules[module] = self._solve(settings, layer, keys, residuals)
        self._remembered(settings)
        made = replace(
            first,
            edits=tuple(r.id for r in requests),
            modules=modules,
            columns=tuple(holders.index(columns[r]) for r in requests),
            places=tuple(column.place for column in self._now),
            together=tuple(column.prompts for column in self._now),
            found={name: value for delta, _ in reversed(batches) for name, value in delta.found.items()},
        )
        self._add(made, requests)


def _outlasting(batches: Sequence[tuple[Delta, Sequence[tuple[Request, int]]]]) -> dict[Request, tuple[int, int]]:
    """For every fact, in order, the batch and column that stand for it at the end."""
    held: list[tuple[int, int]] = []
    found: dict[Request, tuple[int, int]] = {}
    for i, (delta, facts) in reversed(list(enumerate(batches))):
        for column in {c for _, c in facts}:
            own = [r for r, c in facts if c == column]
            prompts = {r.prompt for r in own}
            place = delta.places[column]
            later = ((j, c, batches[j][0]) for j, c in held if j > i)
            taken = ((j, c) for j, c, d in later if d.places[c] == place and prompts <= set(d.together[c]))
            holder = next(taken, (i, column))
            if holder == (i, column):
                held.append(holder)
            found |= dict.fromkeys(own, holder)
    return {request: found[request] for _, facts in batches for request, _ in facts}


def _factors(keys: Tensor, update: Update) -> Factors:
    """An update with the keys (d_in × n) at its edits' places, and what it moves at them as residuals."""
    none = torch.zeros(0, keys.shape[0])
    if isinstance(update, Tensor):
        return Factors(keys, update @ keys, none, dense=update)
    left, right = update
    return Factors(keys, left @ (right @ keys), none, left, right)


def foldable(delta: Delta) -> bool:
    """Whether a batch can become part of another from what is stored: ROME writes its facts one at a time."""
    settings = Settings.from_params(delta.params)
    return settings.solvable and not settings.ridge.hard


def _layer_solved(number: int, layer: int, factors: Factors, weight_norm: float) -> LayerSolved:
    reached = factors.times(factors.keys)
    wanted = factors.residuals.norm().clamp_min(1e-30)
    left = float((factors.residuals - reached).norm() / wanted)
    return LayerSolved(number, layer, factors.norm(), weight_norm, left)
