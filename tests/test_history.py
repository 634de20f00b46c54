"""Histories at random: whatever is applied, taken out, folded, reviewed or undone, in whatever order, the store says
what a simple model in memory says, and the head wears the weights that were recorded.

A machine carries out what the verbs of the command line carry out, with the real `run` and the real store. It runs
twice: with an engine that seeks no targets and asks no model, a few milliseconds a run, and with a tiny Llama.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tiny import QUICK
from torch import Tensor, nn

from editctl import delta as delta_files
from editctl import plan as plan_room
from editctl.delta import compose
from editctl.engine import editor as editor_room
from editctl.engine import methods, prompts, speak, wear
from editctl.engine import run as run_room
from editctl.engine import tune as tune_room
from editctl.engine.asking import Said, Scored
from editctl.engine.editor import Editor
from editctl.engine.keys import Stage
from editctl.engine.model import Block, Editing, Model, Response, combine_digests, tensor_digest
from editctl.engine.run import Order, run
from editctl.engine.statistics import Moment
from editctl.engine.target import Target
from editctl.engine.wear import deltas_of, rebuild_all, wearing
from editctl.errors import EditctlError, InvalidInput, StalePlan, StoreError
from editctl.events import silent
from editctl.metrics.edits import Question, questions
from editctl.metrics.values import PARAPHRASE, REWRITE, Answer
from editctl.plan import REMEASURE, REPLACE, Action, Plan, make, without
from editctl.spec import Edit
from editctl.store import BASE, CANDIDATE, LiveEdit, Store, Version, care, rows
from editctl.store import store as store_room
from editctl.store.connection import Connection

BASE_CONTENT = "content of the model's folder"
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where stores lie: in memory where that can be had, for a commit waits for the disk."""

# ---------------------------------------------------------------------------------------------------------------------
# Facts

SUBJECTS = ("Ada", "Rome")
RELATIONS = ("{} was born in", "{} lies near", "You could see {} from")
"""Prompts of the first two begin alike, so facts of one subject share a column there."""
PROMPTS = [(subject, relation) for subject in SUBJECTS for relation in RELATIONS]
NEVER = "Oslo"
"""A target that the stub does not learn to say."""
TARGETS = ("London", "Berlin", "Rome", NEVER)
PROBES: tuple[dict[str, Any], ...] = (
    {},
    {"note": "looked up"},
    {"paraphrases": ("People say that {} stands in",)},
    {"locality": ({"prompt": "The capital of Norway is"}, {"prompt": "{} was built in"})},
)


def a_fact(number: int, name: int, target: str, method: str, probes: int) -> Edit:
    """One of the facts that can be told; `name` 1 calls it as the next is called, 2 as none is."""
    subject, relation = PROMPTS[number]
    id = (f"fact-{number}", f"fact-{(number + 1) % len(PROMPTS)}", f"other-{number}")[name]
    return Edit(id=id, subject=subject, relation=relation, target_new=target, method=method, **PROBES[probes])


def specs_of(found: Sequence[Edit]) -> tuple[Edit, ...]:
    """As the spec files may hold them: no prompt and no id twice."""
    kept: list[Edit] = []
    for edit in found:
        if not any(edit.id == other.id or edit.prompt == other.prompt for other in kept):
            kept.append(edit)
    return tuple(kept)


def facts(names: Sequence[str]) -> st.SearchStrategy[tuple[Edit, ...]]:
    """Spec files, their edits written by these methods."""
    one = st.builds(
        a_fact,
        st.integers(0, len(PROMPTS) - 1),
        st.sampled_from([0, 0, 0, 0, 1, 2]),
        st.sampled_from(TARGETS),
        st.sampled_from(names),
        st.integers(0, len(PROBES) - 1),
    )
    return st.lists(one, min_size=1, max_size=4).map(specs_of)


GATES: st.SearchStrategy[dict[str, float]] = st.sampled_from(
    [{"reliability": 1.0}, {"reliability": 1.0}, {"reliability": 0.0}, {"generalization": 0.0}]
)
MAYBE = st.just({}) | GATES
RECHECK = st.sampled_from([1000, 0])
"""How many of the edits that stay are asked again."""
ANY = st.integers(0, 23)
"""Which of what there is at the moment."""


# ---------------------------------------------------------------------------------------------------------------------
# Engines


@dataclass
class Engine:
    """A model and the settings it is edited with."""

    model: Model
    params: Callable[[str, int], dict[str, Any]]
    """By the name of a method and the seed."""
    methods: tuple[str, ...]
    """What spec files may name; the empty name is that of the run's own."""
    start: Path
    """A store in which nothing was done yet; its tables, and what of the model is measured, need not be made again."""
    told: bool = False
    """Whether what the model says is known: the hash of the weights it wears."""
    base: dict[str, Tensor] = field(init=False)
    base_hash: str = field(init=False)

    def __post_init__(self) -> None:
        self.base = {name: tensor.clone() for name, tensor in self.model.net.named_parameters()}
        self.base_hash = self.model.weights_hash()

    @torch.no_grad()
    def undress(self) -> None:
        """Put the base weights back, whatever went wrong before."""
        for name, tensor in self.model.net.named_parameters():
            tensor.copy_(self.base[name])

    def rebuilt(self, store: Store, version: Version | None) -> str:
        """The weights hash of a version whose updates are added to the base in one go, without touching the model."""
        updates: dict[str, list[Any]] = {}
        for delta in deltas_of(store, version):
            for module, factors in delta.modules.items():
                updates.setdefault(module, []).append(factors)
        digests = []
        for name, tensor in self.base.items():
            module = name.removesuffix(".weight")
            if module in updates:
                turned = self.model.block_of(module).transposed
                whole = compose(tensor.T if turned else tensor, updates[module]).to(tensor.dtype)
                tensor = whole.T if turned else whole
            digests.append((name, tensor_digest(tensor)))
        return combine_digests(digests)


WIDTH, KEYS = 6, 12
"""Of the stub's states, and of its keys."""


@cache
def vector(name: str, width: int = WIDTH) -> Tensor:
    """Random numbers that belong to a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


class Stub(Model):
    """Two blocks of one matrix each and no words: x ← x + W relu(U x), x being a random vector of a place's text."""

    def __init__(self) -> None:
        self.net = nn.ModuleList([nn.Linear(KEYS, WIDTH, bias=False), nn.Linear(WIDTH, KEYS, bias=False)])
        self.net.requires_grad_(False)
        for i, matrix in enumerate(self.net):
            matrix.weight.copy_(vector(f"down {i}", WIDTH * KEYS).view(matrix.weight.shape) / KEYS)
        self.up = [vector(f"up {i}", WIDTH * KEYS).view(KEYS, WIDTH) for i in range(2)]
        self.name = "stub"
        # The second keeps its weight the other way around, as GPT-2 does.
        self.blocks = tuple(Block(str(i), m, str(i), m, transposed=i == 1) for i, m in enumerate(self.net))
        self._digests = {}
        self._responses = {i: Response("straight") for i in range(2)}

    def pass_through(self, start: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key of the block, what it writes, and the state after it."""
        state = start
        for block, up in zip(self.blocks[: layer + 1], self.up, strict=False):
            key = torch.relu(up @ state)
            write = block.weight @ key
            state = state + write
        return key, write, state


class StubStaged:
    """Stands in for `keys.Staged`."""

    def __init__(self, model: Stub, places: Sequence[Any], contexts: Sequence[str], last: int, emit: Any) -> None:
        self.model, self.places, self.last = model, [request.place for request in places], last

    def written(self, layer: int) -> None:
        """Everything is read anew at every stage."""

    def stage(self, layer: int) -> Stage:
        plain = [self.model.pass_through(vector(place), layer) for place in self.places]
        others = [self.model.pass_through(vector(place) + vector("then") / 8, layer) for place in self.places]
        last = [self.model.pass_through(vector(place), self.last) for place in self.places]

        def columns(found: Sequence[tuple[Tensor, ...]], i: int) -> Tensor:
            return torch.stack([parts[i] for parts in found], dim=1)

        keys, spoken = columns(plain, 0), columns(others, 0)
        return Stage(keys, (keys + spoken) / 2, spoken, columns(plain, 1), columns(last, 2), columns(last, 1))


def stub_optimise(model: Stub, layer: int, groups: Sequence[Any], *_: Any, **__: Any) -> list[Target]:
    """Stands in for `target.optimise`: what shall be said has a state of its own."""
    found = []
    for group in groups:
        wanted = [vector(f"{fact.prompt} {fact.target}") for fact in (*group.facts, *group.kept)]
        _, _, state = model.pass_through(vector(group.places[0]), layer)
        found.append(Target((torch.stack(wanted).mean(0) - state) / 2, 0.0, 1))
    return found


def stub_tune(model: Stub, layer: int, requests: Sequence[Any], *_: Any, projector: Any, **__: Any) -> Tensor:
    """Stands in for `tune.tune`."""
    update = torch.zeros(WIDTH, KEYS)
    for request in requests:
        key, write, _ = model.pass_through(vector(request.place), layer)
        update += torch.outer(vector(f"{request.prompt} {request.target}") - write, key) / 16
    return update if projector is None else projector(update)


def stub_ask(model: Model, asked: Sequence[Question], stage: str, emit: Any, recall: Any = None, **more: Any) -> Said:
    """Stands in for `ask_all`: the weights' hash, and after a run the fact itself unless it is never said."""
    worn = model.weights_hash()
    words = {}
    for one in asked:
        learnt = stage == "after" and one.kind == REWRITE and one.wanted != (NEVER,)
        words[one] = one.wanted[0] if learnt else worn
    scored = {one: Scored(score(worn), 1 - score(worn)) if one.wanted else Scored() for one in asked}
    return Said(words, scored)


def score(worn: str) -> float:
    """A number that belongs to a weights hash."""
    return int(worn[:4], 16) / 2**16


def stub_moments(model: Model, wanted: Any, *_: Any) -> dict[int, Moment]:
    """Stands in for `moments_for`: eight of twelve directions hold less than a fifth of what is preserved."""
    found = {}
    for layer in wanted.layers:
        basis, _ = torch.linalg.qr(vector(f"keys {layer}", KEYS * KEYS).view(KEYS, KEYS))
        found[layer] = Moment(basis.contiguous(), torch.logspace(-2, 0, KEYS, dtype=torch.float64), 1000)
    return found


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine that takes milliseconds; composing, solving and folding are real."""
    monkeypatch.setattr(editor_room, "optimise", stub_optimise)
    monkeypatch.setattr(tune_room, "tune", stub_tune)
    monkeypatch.setattr(editor_room.key_room, "Staged", StubStaged)
    monkeypatch.setattr(run_room, "moments_for", stub_moments)
    monkeypatch.setattr(run_room, "sample_contexts", lambda model, seed: ("", "Then "))
    monkeypatch.setattr(run_room, "ask_all", stub_ask)
    monkeypatch.setattr(run_room.speak, "check_lengths", lambda model, asked: None)
    monkeypatch.setattr(run_room, "libraries", cache(run_room.libraries))
    # A step opens the database thirty times, and this is a third of what that takes.
    monkeypatch.setattr(Connection, "_behind", lambda self, db: False)

    def params(name: str, seed: int) -> dict[str, Any]:
        layers = [1] if methods.METHODS[name].tune or methods.METHODS[name].layers == "single" else [0, 1]
        return made_with(name, 2, layers=layers, energy=0.2, batch_size=2, seed=seed)

    chosen = (*[""] * 18, "memit", "encore", "rome", "rect", "prune", "nse", "nas", "blue", "ft-m")
    return Engine(Stub(), cache(params), chosen, untouched(tmp_path / "store").root, told=True)


def untouched(folder: Path) -> Store:
    """A store with tables and nothing in them."""
    store = Store(folder)
    with store._writing("test", create=True):
        pass
    return store


def made_with(name: str, blocks: int, **overrides: Any) -> dict[str, Any]:
    """Settings of a method, those without a null space of their own with none."""
    row = methods.METHODS[name]
    rule = overrides.pop("energy")
    overrides |= {"energy": rule} if row.null_space else {"preserve": "none"}
    overrides |= {"lambda": 0.1 * row.weight} if row.weight else {}
    return methods.settings({"num_hidden_layers": blocks}, name, overrides).to_params()


@pytest.fixture
def llama(
    loaded: Any, corpus: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """A tiny Llama, which says little."""
    monkeypatch.setattr(speak, "NEW_TOKENS", 2)
    monkeypatch.setattr(prompts, "CONTEXT_TOKENS", 4)
    model, start = loaded("llama"), untouched(tmp_path_factory.mktemp("start"))

    def params(name: str, seed: int) -> dict[str, Any]:
        return made_with(name, len(model.blocks), **{**QUICK, "corpus": str(corpus), "seed": seed, "steps": 3})

    run_room.moments_for(model, methods.Settings.from_params(params("alphaedit", 0)), BASE_CONTENT, start, silent)
    return Engine(model, cache(params), (*[""] * 8, "memit", "rome", "nse"), start.root)


# ---------------------------------------------------------------------------------------------------------------------
# What should be so


@dataclass(frozen=True)
class Held:
    """A live edit."""

    edit: Edit
    before: Mapping[tuple[str, str, tuple[str, ...]], str]
    """By kind, prompt and wanted answers of its questions: the weights hash they were first asked on."""


@dataclass(frozen=True)
class Made:
    """A version: what it was when it was made."""

    version: Version
    live: tuple[Held, ...]
    places: tuple[tuple[str, str, str, int], ...]
    """Its live edits as the store told them then, with files and columns."""

    @property
    def edits(self) -> list[Edit]:
        return [held.edit for held in self.live]


@dataclass(frozen=True)
class State:
    """Everything that is not a version, after an operation."""

    head: str = ""
    candidates: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    reviews: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """What was decided: verb, version, edits."""

    def closing(self, version: str) -> State:
        """Without a candidate, if it is one."""
        return self.waiting(tuple(name for name in self.candidates if name != version))

    def waiting(self, candidates: tuple[str, ...]) -> State:
        """With these candidates, the last of which has the name for them."""
        aliases = {name: version for name, version in self.aliases.items() if name != CANDIDATE}
        if candidates:
            aliases[CANDIDATE] = candidates[-1]
        return replace(self, candidates=candidates, aliases=aliases)

    def saying(self, verb: str, version: str, edits: Sequence[str] = ()) -> State:
        """With one decision more."""
        return replace(self, reviews=(*self.reviews, (verb, version, tuple(edits))))


def key_of(question: Question) -> tuple[str, str, tuple[str, ...]]:
    return question.kind, question.prompt, question.wanted


def sought(edit: Edit) -> tuple[str, ...]:
    """What decides the weights."""
    return edit.subject, edit.relation, edit.target_new, edit.method


def live_after(live: Sequence[Held], specs: Sequence[Edit], *, prune: bool, new: str, base: str) -> tuple[Held, ...]:
    """What is live when specs were applied: what stays in its order, then the rest in theirs.

    Args:
        new: weights hash of the version they are applied to, on which new edits are asked before.
        base: that of the unedited model, on which questions are asked that a live edit did not have.
    """
    wanted = {edit.prompt: edit for edit in specs}
    ids = {edit.id for edit in specs}
    kept = []
    for held in live:
        edit = wanted.get(held.edit.prompt)
        if edit is not None and sought(edit) == sought(held.edit):
            keys = map(key_of, questions(edit))
            kept.append(Held(edit, {key: held.before.get(key, base) for key in keys}))
        elif edit is None and not prune and held.edit.id not in ids:
            kept.append(held)
    there = {held.edit.prompt for held in kept}
    fresh = [edit for edit in specs if edit.prompt not in there]
    return (*kept, *(Held(edit, dict.fromkeys(map(key_of, questions(edit)), new)) for edit in fresh))


# ---------------------------------------------------------------------------------------------------------------------
# The machine


class History(RuleBasedStateMachine):
    """What people do to a store, and what should then be so."""

    engine: ClassVar[Engine]
    tally: ClassVar[Counter[str]]
    """How often each rule did something, or was refused as it should be."""
    lengths: ClassVar[list[int]]
    """Steps of every example."""

    def __init__(self) -> None:
        super().__init__()
        self.engine.undress()
        self.root = Path(tempfile.mkdtemp(dir=FAST))
        self.store = Store(shutil.copytree(self.engine.start, self.root / "store"), who="me@here")
        self.made: dict[str, Made] = {}
        self.line, self.at = [State()], 0
        """As a text editor undoes: states, and which of them is the present one."""
        self.heads = [""]
        """The head after every operation, whose number is its place."""
        self.new: list[str] = []
        """What the last step made."""
        self.steps = 0

    def teardown(self) -> None:
        self.lengths.append(self.steps)
        try:
            versions = [made.version for made in self.made.values()]
            assert rebuild_all(self.engine.model, self.store, versions, silent) == {}
            assert self.engine.model.weights_hash() == self.engine.base_hash
        finally:
            shutil.rmtree(self.root)

    @property
    def state(self) -> State:
        return self.line[self.at]

    @property
    def live(self) -> tuple[Held, ...]:
        return self.made[self.state.head].live if self.state.head else ()

    def did(self, what: str, state: State | None = None) -> None:
        """Note a step; one with a state is an operation that starts a new line."""
        self.tally[what] += 1
        self.steps += 1
        self.store = Store(self.store.root, who="me@here")
        if state is not None:
            self.line[self.at + 1 :] = [state]
            self.at += 1
            self.heads.append(state.head)

    def ids(self, held: Sequence[Held], pick: int) -> list[str]:
        """One or more of these edits."""
        return [one.edit.id for i, one in enumerate(held) if i == pick % len(held) or pick & 1 << i]

    # Runs

    def carried_out(
        self, verb: str, plan: Plan, origin: str, live: tuple[Held, ...], *, reviewed: bool = False, **order: Any
    ) -> None:
        """Carry a plan out and hold what it made against what it should have made.

        Args:
            origin: the version it was made for.
            live: what should be live then.
        """
        recheck = order.setdefault("recheck", 1000)
        state = self.state
        parent = origin
        if reviewed:
            parent = self.made[origin].version.parent
            if parent != state.head:
                with pytest.raises(StalePlan):
                    run(plan, self.engine.model, BASE_CONTENT, self.store, silent, Order(verb=verb, **order))
                self.did("reject edits stale")
                return
        old = self.made[origin].live if origin else ()
        version = run(plan, self.engine.model, BASE_CONTENT, self.store, silent, Order(verb=verb, **order))
        self.new, there = [version.id], self.store.edits(version)
        self.made[version.id] = Made(version, live, places(there))
        assert version.parent == parent
        assert [one.edit for one in there] == [held.edit for held in live]
        still = {sought(held.edit) for held in live}
        self.check_files(version, origin, {h.edit.id for h in old if sought(h.edit) not in still}, order.get("fold"))
        below = self.made[parent].edits if parent else []
        stayed = {sought(held.edit) for held in old} & still
        asked = [h for h in live if h.edit not in below or sought(h.edit) not in stayed or recheck]
        answers = self.store.answers(version)
        self.check_answers(version, asked, answers)
        candidate = bool(live) and self.failing(plan.gates, answers)
        gone = [held.edit.id for held in old if held.edit.id not in {h.edit.id for h in live}]
        if reviewed or verb == "reject":
            state = state.closing(origin).saying(verb, origin, gone)
        what = "reject edits" if verb == "reject" else verb
        if candidate:
            self.did(f"{what} → candidate", state.waiting((*state.candidates, version.id)))
        else:
            self.did(what, replace(state, head=version.id))

    def check_files(self, version: Version, origin: str, gone: set[str], fold: int | None) -> None:
        """Whether batches before the first that changed keep their files, and all state just what is live."""
        old = self.made[origin].version if origin else None
        before, after, live = self.store.deltas(old), self.store.deltas(version), self.store.edits(version)
        lives: dict[str, list[int]] = {}
        for one in live:
            lives.setdefault(one.delta, []).append(one.column)
        for columns, delta in zip(lives.values(), deltas_of(self.store, version), strict=True):
            widths = {factors.keys.shape[1] for factors in delta.modules.values()} | {len(delta.places)}
            assert tuple(columns) == delta.columns and widths == {len(set(columns))} == {max(columns) + 1}
        left = {one.delta for one in self.store.edits(old) if one.id in gone}
        whole = min([len(before) if fold is None else fold, *(before.index(name) for name in left)])
        assert after[:whole] == before[:whole] and not left & set(after)

    def check_answers(self, version: Version, asked: Sequence[Held], answers: Sequence[Answer]) -> None:
        """Whether just these edits were asked all their questions, and what they said before is what it was."""
        assert {answer.edit for answer in answers} == {held.edit.id for held in asked}
        assert len(answers) == sum(len(questions(held.edit)) for held in asked)
        before = {held.edit.id: held.before for held in asked}
        for answer in answers:
            was = before[answer.edit][answer.kind, answer.prompt, answer.wanted]
            if not self.engine.told:
                continue
            assert answer.before == was, "before is before the edit was first applied"
            learnt = answer.kind == REWRITE and answer.wanted != (NEVER,)
            assert answer.after == (answer.wanted[0] if learnt else version.weights_hash)
            if answer.wanted:
                assert (answer.nll_before, answer.nll_after) == (score(was), score(version.weights_hash))

    def failing(self, gates: Mapping[str, float], answers: Sequence[Answer]) -> bool:
        """Whether a version with these answers has to wait."""
        kinds = {"reliability": REWRITE, "generalization": PARAPHRASE}
        for gate, wanted in gates.items():
            right = [answer.ok for answer in answers if answer.kind == kinds[gate]]
            if not right or sum(right) / len(right) < wanted:
                return True
        return False

    def plan_of(self, specs: Sequence[Edit], version: str, *, prune: bool, seed: int, gates: Any) -> Plan:
        """As `Workspace.make_plan` does."""
        named = {edit.method for edit in specs if edit.method}
        return make(
            specs,
            [live.known for live in self.store.edits(self.made[version].version if version else None)],
            model=self.engine.model.name,
            base=BASE_CONTENT,
            head=version,
            params=self.engine.params("alphaedit", seed),
            methods={name: self.engine.params(name, seed) for name in named},
            gates=gates,
            prune=prune,
        )

    @rule(data=st.data(), seed=st.integers(0, 1), recheck=RECHECK)
    def apply(self, data: Any, seed: int, recheck: int) -> None:
        self.apply_specs(data.draw(facts(self.engine.methods)), seed=seed, recheck=recheck)

    @rule(data=st.data(), gates=GATES, recheck=RECHECK)
    def apply_and_gate(self, data: Any, gates: dict[str, float], recheck: int) -> None:
        self.apply_specs(data.draw(facts(self.engine.methods)), gates=gates, recheck=recheck)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), gates=MAYBE, pick=ANY)
    def apply_and_prune(self, data: Any, gates: dict[str, float], pick: int) -> None:
        """Some of what is live stays in the specs as it is."""
        stays = [held.edit for i, held in enumerate(self.live) if pick & 1 << i]
        specs = specs_of([*data.draw(facts(self.engine.methods)), *stays])
        self.apply_specs(specs, prune=True, gates=gates)

    @precondition(lambda self: self.live)
    @rule(pick=ANY, said=st.sampled_from(TARGETS), probes=st.integers(0, len(PROBES) - 1), recheck=RECHECK)
    def apply_a_change(self, pick: int, said: str, probes: int, recheck: int) -> None:
        """Another target or other probes for what is live."""
        old = self.live[pick % len(self.live)].edit
        changed = {"target_new": said} if pick & 1 else PROBES[probes]
        made = Edit(**{**old.to_json(), "note": "", "paraphrases": (), "locality": (), **changed})
        self.apply_specs([made], recheck=recheck)

    def apply_specs(
        self, specs: Sequence[Edit], *, prune: bool = False, seed: int = 0, gates: Any = None, recheck: int = 1000
    ) -> None:
        head, gates = self.state.head, gates or {}
        new = self.made[head].version.weights_hash if head else self.engine.base_hash
        live = live_after(self.live, specs, prune=prune, new=new, base=self.engine.base_hash)
        plan = self.plan_of(specs, head, prune=prune, seed=seed, gates=gates)
        assert plan.changes == ([held.edit for held in live] != [held.edit for held in self.live])
        if not plan.changes:
            self.did("apply, nothing to do")
            return
        self.carried_out("apply", plan, head, live, recheck=recheck)
        made = list(self.made)[-1]
        again = self.plan_of(specs, made, prune=prune, seed=seed, gates=gates)
        assert not again.changes, "the same specs a second time change nothing"

    def without(self, verb: str, version: str, ids: Sequence[str], gates: Mapping[str, float], **order: Any) -> None:
        """Take edits out, as `cli_review` does."""
        made = self.made[version]
        plan = without(
            [live.known for live in self.store.edits(made.version)],
            ids,
            model=self.engine.model.name,
            base=BASE_CONTENT,
            head=version,
            params=made.version.params,
            gates=gates,
            reason=verb,
        )
        live = tuple(held for held in made.live if held.edit.id not in ids)
        self.carried_out(verb, plan, version, live, **order)

    @precondition(lambda self: self.live)
    @rule(pick=ANY, gates=MAYBE, recheck=RECHECK)
    def drop(self, pick: int, gates: dict[str, float], recheck: int) -> None:
        self.without("drop", self.state.head, self.ids(self.live, pick), gates, recheck=recheck)

    @precondition(lambda self: self.live)
    @rule(pick=ANY, gates=MAYBE)
    def replay(self, pick: int, gates: dict[str, float]) -> None:
        self.without("replay", self.state.head, self.ids(self.live, pick), gates, replay=True)

    @precondition(lambda self: self.state.head)
    @rule(pick=ANY, gates=MAYBE)
    def squash(self, pick: int, gates: dict[str, float]) -> None:
        head = self.made[self.state.head].version
        chain = [head.id]
        while chain[-1]:
            chain.append(self.made[chain[-1]].version.parent)
        for steps, name in enumerate(chain):
            assert self.store.steps_down(head, self.made[name].version if name else None) == steps
        # Base is chosen as often as all others.
        since = chain[pick % len(chain)] if pick & 1 else ""
        below = self.store.deltas(self.made[since].version if since else None)
        names = self.store.deltas(head)
        kept = next((i for i, pair in enumerate(zip(below, names, strict=False)) if pair[0] != pair[1]), len(below))
        how = [{**delta.params, "seed": 0, "batch_size": 0} for delta in deltas_of(self.store, head)][kept:]
        alike = [len(list(group)) for _, group in itertools.groupby(how)]
        if len(how) < 2:
            self.did("squash, nothing to fold")
            return
        plan = without(
            [live.known for live in self.store.edits(head)],
            (),
            model=self.engine.model.name,
            base=BASE_CONTENT,
            head=head.id,
            params=head.params,
            gates=gates,
            reason="",
        )
        if max(alike) == 1:
            with pytest.raises(InvalidInput, match="nothing to fold"):
                run(plan, self.engine.model, BASE_CONTENT, self.store, silent, Order(verb="squash", fold=kept))
            self.did("squash, nothing alike")
            return
        self.carried_out("squash", plan, head.id, self.live, fold=kept)
        folded = self.store.deltas(list(self.made.values())[-1].version)
        assert folded[:kept] == names[:kept] and len(folded) == kept + len(alike)

    # Reviews

    @precondition(lambda self: self.state.candidates)
    @rule()
    def accept_the_newest(self) -> None:
        self.accepted(CANDIDATE, self.state.candidates[-1])

    @precondition(lambda self: self.state.candidates)
    @rule(pick=ANY)
    def accept(self, pick: int) -> None:
        """A candidate, rather one that stands on the head."""
        waiting, head = self.state.candidates, self.state.head
        fitting = [version for version in waiting if self.made[version].version.parent == head] or waiting
        version = fitting[pick % len(fitting)]
        self.accepted(version[:8], version)

    def accepted(self, ref: str, version: str) -> None:
        if self.made[version].version.parent == self.state.head:
            self.store.accept(ref, note="good")
            self.did("accept", replace(self.state.closing(version), head=version).saying("accept", version))
        else:
            with pytest.raises(StalePlan):
                self.store.accept(ref)
            self.did("accept stale")

    @precondition(lambda self: self.state.candidates)
    @rule(pick=ANY, by_name=st.booleans())
    def reject(self, pick: int, by_name: bool) -> None:
        version = self.state.candidates[-1 if by_name else pick % len(self.state.candidates)]
        self.store.reject(CANDIDATE if by_name else version[:8], note="bad")
        self.did("reject", self.state.closing(version).saying("reject", version))

    @precondition(lambda self: self.reviewable)
    @rule(pick=ANY, which=ANY, good=st.booleans(), gates=MAYBE, recheck=RECHECK)
    def decide_edits(self, pick: int, which: int, good: bool, gates: dict[str, float], recheck: int) -> None:
        """Accept or reject some edits of a candidate, or of the head."""
        version = self.reviewable[pick % len(self.reviewable)]
        ids = self.ids(self.made[version].live, which)
        if good:
            self.store.accept(version, edits=ids)
            self.did("accept edits", self.state.saying("accept", version, ids))
        else:
            reviewed = version in self.state.candidates
            self.without("reject", version, ids, gates, reviewed=reviewed, recheck=recheck)

    @property
    def reviewable(self) -> list[str]:
        """The candidates and the head, as far as they have edits."""
        found = dict.fromkeys((*self.state.candidates, self.state.head))
        return [version for version in found if version and self.made[version].live]

    # Moving

    @precondition(lambda self: self.at)
    @rule()
    def undo(self) -> None:
        self.store.undo()
        self.moved(-1, "undo")

    @precondition(lambda self: self.at < len(self.line) - 1)
    @rule()
    def redo(self) -> None:
        self.store.redo()
        self.moved(1, "redo")

    def moved(self, step: int, verb: str) -> None:
        self.at += step
        self.heads.append(self.state.head)
        self.did(verb)

    @precondition(lambda self: self.elsewhere)
    @rule(pick=ANY)
    def restore(self, pick: int) -> None:
        refs = list(self.elsewhere.items())
        # What was accepted, and the accepting undone, is where two ways to become the head meet.
        waiting = [(ref, head) for ref, head in refs if head in self.state.candidates]
        ref, head = (waiting or refs)[pick % len(waiting or refs)]
        self.store.restore(ref)
        self.did("restore", replace(self.state.closing(head), head=head))

    @property
    def elsewhere(self) -> dict[str, str]:
        """Where else the head has been, by ref."""
        been = {f"op:{number}": head for number, head in enumerate(self.heads) if number}
        been |= {head or BASE: head for head in self.heads}
        return {ref: head for ref, head in been.items() if head != self.state.head}

    @precondition(lambda self: self.made)
    @rule(name=st.sampled_from(["stable", "Old.1"]), pick=ANY)
    def alias(self, name: str, pick: int) -> None:
        """A name stands for a version; a name that already stands for it is taken away."""
        refs = {"@": self.state.head, BASE: "", **self.state.aliases, **{version: version for version in self.made}}
        ref = list(refs)[pick % len(refs)]
        aliases = {key: version for key, version in self.state.aliases.items() if key != name}
        if self.state.aliases.get(name) == refs[ref]:
            self.store.set_alias(name, None)
            self.did("alias removed", replace(self.state, aliases=aliases))
        else:
            self.store.set_alias(name, ref)
            self.did("alias", replace(self.state, aliases={**aliases, name: refs[ref]}))

    @precondition(lambda self: self.made)
    @rule(pick=ANY)
    def what_cannot_be(self, pick: int) -> None:
        """Is refused, and leaves no trace."""
        store, state = self.store, self.state
        refused: list[tuple[Callable[[], Any], str]] = [
            (lambda: store.restore(state.head or BASE), "already"),
            (lambda: store.set_alias(CANDIDATE, "@"), "cannot be an alias"),
            (lambda: store.set_alias(CANDIDATE, None), "cannot be an alias"),
            (lambda: store.set_alias("nothing", None), "not there"),
        ]
        alias = next((name for name in state.aliases if name != CANDIDATE), None)
        refused += [(lambda: store.set_alias(alias, state.aliases[alias] or BASE), "already")] if alias else []
        refused += [(store.undo, "nothing to undo")] if self.at == 0 else []
        refused += [(store.redo, "nothing to redo")] if self.at == len(self.line) - 1 else []
        refused += [] if state.candidates else [(store.accept, "no version waits"), (store.reject, "no version waits")]
        version = list(self.made)[pick % len(self.made)]
        if version not in state.candidates:
            refused += [(lambda: store.accept(version), "nothing to decide")]
            refused += [(lambda: store.reject(version), "nothing to decide")]
        if version not in self.heads:
            refused += [(lambda: store.restore(version), "never accepted")]
        for attempt, why in refused:
            with pytest.raises(StoreError, match=why):
                attempt()
        self.did("refused")

    # After every step

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        with self.store._reading() as db:
            self.check_view(db)
            self.check_log(db)
            self.check_versions(db)
        self.check_reviews()
        self.check_weights()
        assert care.inspect(self.store) == []
        self.new = []

    def check_view(self, db: Any) -> None:
        """Head, candidates and aliases; and a head waits for nothing."""
        state, view = self.state, rows.view(db)
        assert (view.head, view.candidates, dict(view.aliases)) == (state.head, state.candidates, dict(state.aliases))
        assert view.head not in view.candidates

    def check_log(self, db: Any) -> None:
        """One operation after another, and what undo and redo would do."""
        operations = rows.operations(db)[::-1]
        assert [operation.head for operation in operations] == self.heads[1:]
        assert [operation.head_before for operation in operations] == self.heads[:-1]
        assert [operation.id for operation in operations] == list(range(1, len(self.heads)))
        assert [operation.parent for operation in operations] == list(range(len(self.heads) - 1))
        done, undone = rows.line(db)
        assert (len(done), len(undone)) == (self.at, len(self.line) - 1 - self.at)
        for operation, state in zip((*done, *(op for _, op in reversed(undone))), self.line[1:], strict=True):
            left = (operation.head, tuple(operation.candidates), dict(operation.aliases))
            assert left == (state.head, state.candidates, dict(state.aliases))

    def check_versions(self, db: Any) -> None:
        """They, and what is live in each, are what they were when they were made."""
        assert rows.versions(db) == [made.version for made in self.made.values()][::-1]
        for version, made in self.made.items():
            assert places(rows.live(db, version)) == made.places

    def check_reviews(self) -> None:
        """They are remembered while they hold."""
        if self.state.reviews:
            _, version, _ = self.state.reviews[-1]
            found = [(op.verb, op.about, tuple(op.edits)) for op in self.store.reviews(self.made[version].version)]
            assert found == [review for review in self.state.reviews if review[1] == version]

    def check_weights(self) -> None:
        """Of the head and of what was just made: as worn, as rebuilt in one go, as recorded; then the base again."""
        for name in dict.fromkeys((self.state.head, *self.new)):
            version = self.made[name].version if name else None
            with wearing(self.engine.model, self.store, version) as editing:
                worn = editing.weights_hash()
            recorded = version.weights_hash if version else self.engine.base_hash
            assert worn == recorded == self.engine.rebuilt(self.store, version)
        assert self.engine.model.weights_hash() == self.engine.base_hash


def places(live: Sequence[LiveEdit]) -> tuple[tuple[str, str, str, int], ...]:
    """Live edits by what can be told without reading them whole."""
    return tuple((one.id, one.known.text, one.delta, one.column) for one in live)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


def histories(engine: Engine, examples: int, steps: int, **chosen: Any) -> type[History]:
    """Run the machine until so many histories were so long, and say how it went."""
    machine: Any = type("History", (History,), {"engine": engine, "tally": Counter(), "lengths": []})
    chosen = {"phases": PHASES, "suppress_health_check": QUIET, "deadline": None, **chosen}
    long = 0
    # Some of Hypothesis' examples are short: it looks for small ones first, and mutates.
    while long < examples:
        found = settings(max_examples=examples - long, stateful_step_count=steps, **chosen)
        run_state_machine_as_test(machine, settings=found)
        long = sum(length >= steps for length in machine.lengths)
    shares = ", ".join(f"{what} {n}" for what, n in machine.tally.most_common())
    lengths = f"{len(machine.lengths)} histories, {long} of them of {steps} steps"
    print(f"\n{lengths}, {sum(machine.tally.values())} steps in all: {shares}")
    return machine


def test_any_history_is_what_it_should_be(stub: Engine) -> None:
    """Some dozens of histories with the stub."""
    histories(stub, 30, 15)


@pytest.mark.slow
def test_hundreds_of_histories_are_what_they_should_be(stub: Engine) -> None:
    """The same for longer."""
    histories(stub, 500, 20)


def test_any_history_of_a_real_model_is_what_it_should_be(llama: Engine) -> None:
    """Few, with targets that are sought."""
    histories(llama, 3, 15)


@pytest.mark.slow
def test_dozens_of_histories_of_a_real_model_are_what_they_should_be(llama: Engine) -> None:
    """The same for longer."""
    histories(llama, 20, 20)


# ---------------------------------------------------------------------------------------------------------------------
# What would be noticed


def a_history(engine: Engine) -> Any:
    """A machine to be led by hand."""
    return type("History", (History,), {"engine": engine, "tally": Counter(), "lengths": []})()


UNSAID = a_fact(0, 0, NEVER, "", 0)


def test_a_candidate_that_one_goes_back_to_waits_no_longer(stub: Engine) -> None:
    """Accepted, undone, and then restored it is the head like any other."""
    machine = a_history(stub)
    machine.apply_specs([UNSAID], gates={"reliability": 1.0})
    machine.accept_the_newest()
    machine.undo()
    machine.restore(pick=0)
    machine.all_is_as_it_should_be()
    machine.apply_specs([a_fact(1, 0, "Rome", "", 0)])
    machine.all_is_as_it_should_be()
    machine.teardown()


def keeping_aliases(patch: pytest.MonkeyPatch) -> None:
    record = Store._record

    def kept(self: Store, db: Any, verb: str, view: Any, *others: Any, **more: Any) -> Any:
        view = replace(view, aliases=rows.view(db).aliases) if verb == "undo" else view
        return record(self, db, verb, view, *others, **more)

    patch.setattr(Store, "_record", kept)


def committing(patch: pytest.MonkeyPatch, **changed: Any) -> None:
    commit = Store.commit
    patch.setattr(Store, "commit", lambda self, draft, **named: commit(self, draft, **{**named, **changed}))


def changing_a_version(patch: pytest.MonkeyPatch) -> None:
    commit = Store.commit

    def changed(self: Store, *arguments: Any, **named: Any) -> Version:
        made = commit(self, *arguments, **named)
        with sqlite3.connect(self.database) as db:
            first = "(select id from versions where number = 1)"
            db.execute(f"update answers set after = 'Rome' where \"version\" = {first}")
        db.close()
        return made

    patch.setattr(Store, "commit", changed)


def wearing_backwards(patch: pytest.MonkeyPatch) -> None:
    put_on = wear.put_on
    patch.setattr(wear, "put_on", lambda editing, deltas: put_on(editing, deltas[::-1]))


def dropping_in_name(patch: pytest.MonkeyPatch) -> None:
    def worn(self: Any, delta: Any, found: Any) -> None:
        self.resolving = True
        columns = tuple(column for _, column in found)
        self.wear(replace(delta, edits=tuple(fact.id for fact, _ in found), columns=columns), [f for f, _ in found])

    patch.setattr(Editor, "solve_again", worn)


def leaving_files(patch: pytest.MonkeyPatch) -> None:
    save = delta_files.save

    def saved(delta: Any, folder: Path) -> str:
        save(replace(delta, params={**delta.params, "seed": 7}), folder)
        return save(delta, folder)

    patch.setattr(delta_files, "save", saved)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "undo keeps the aliases": keeping_aliases,
    "redo does again what was undone first": lambda p: p.setattr(
        rows, "line", lambda db, line=rows.line: (line(db)[0], line(db)[1][::-1])
    ),
    "the head moves although a gate failed": lambda p: committing(p, hold=""),
    "a candidate stays one when edits of it are rejected": lambda p: committing(p, instead_of=""),
    "a candidate stays one when it is the head": lambda p: p.setattr(store_room, "_closed", lambda view, version: view),
    "a version is changed in place": changing_a_version,
    "batches are added in another order": wearing_backwards,
    "weights stay on the model": lambda p: p.setattr(Editing, "reset", lambda self: None),
    "what is dropped stays in the weights": dropping_in_name,
    "a run leaves a file behind": leaving_files,
    "before is asked again": lambda p: p.setattr(Store, "last_answers", lambda self, version, edits: ()),
    "what is there is applied again": lambda p: p.setattr(
        plan_room, "_compare", lambda edit, live: Action(REPLACE, edit, live.whole)
    ),
    "the plan forgets what goes": lambda p: p.setattr(
        run_room, "_kept", lambda plan, live, kept=run_room._kept: kept(replace(plan, actions=plan.of(REMEASURE)), live)
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_machine_notices_when_something_is_broken(stub: Engine, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: within a few dozen histories of what the machine does anyway."""
    BROKEN[what](monkeypatch)
    with pytest.raises((AssertionError, EditctlError, ExceptionGroup)):
        histories(stub, 60, 15, phases=(Phase.generate,), database=None, derandomize=True, report_multiple_bugs=False)
