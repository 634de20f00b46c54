"""Whatever happens to a store: the head is the old version or the new one, what was acknowledged is there, and every
damage is found and named.

Commands are killed at every step by which they change the disk and at moments drawn at random, disks are full at every
write, files are cut and pages flipped. `nursery` has the processes that die.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from nursery import DENIABLE, Ended, Nursery, say_little

from editctl import delta as delta_files
from editctl.cli import main
from editctl.engine import methods, prompts, speak, wear
from editctl.engine.model import Model, load
from editctl.errors import EditctlError, Locked, StoreError
from editctl.events import silent
from editctl.metrics.values import Answer, Metric
from editctl.spec import Edit
from editctl.store import Draft, LiveEdit, Store, Stored, Version, care, rows

SETTINGS = """model = "{model}"
device = "cpu"
recheck = 0
checks = []
[settings]
layers = [1]
steps = 1
corpus = "{corpus}"
corpus_tokens = 1000
energy = 0.2
"""
"""Under which a run takes under half a second."""
EDITS = {
    "tower": ("The Eiffel Tower", "{} is located in the city of", "Rome"),
    "ada": ("Ada", "{} was born in", "Oslo"),
    "curie": ("Marie Curie", "In the end {} lived in", "Berlin"),
}
LEFT = "is not part of any version"
"""What is wrong with a file that an interrupted run left behind."""


class Outcome(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


def command(folder: Path, *arguments: str) -> Outcome:
    """Run a command of editctl in a folder, in this process; no error is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["editctl", *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    assert "Traceback" not in err.getvalue()
    return Outcome(code, out.getvalue(), err.getvalue())


def done(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run a command that goes well; what it says."""
    outcome = command(folder, *arguments)
    assert outcome.code == code, outcome.out + outcome.err
    return outcome.out


@pytest.fixture(scope="module", autouse=True)
def _few_words() -> Iterator[None]:
    """Models say little, here as in the nursery."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speak, "NEW_TOKENS", speak.NEW_TOKENS)
        patch.setattr(prompts, "CONTEXT_OPENINGS", prompts.CONTEXT_OPENINGS)
        say_little()
        yield


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Model:
    """What the workspaces edit, to rebuild versions with."""
    return load(str(folders["llama"]), device="cpu", dtype="float32")


# ---------------------------------------------------------------------------------------------------------------------
# Workspaces to copy


def _spec(id: str) -> str:
    subject, relation, target = EDITS[id]
    return (
        f'version = 1\n\n[[edit]]\nid = "{id}"\nsubject = "{subject}"\nrelation = "{relation}"\n'
        f'target_new = "{target}"\nlocality = ["The capital of Norway is"]\n'
    )


def _apply(id: str, *more: str) -> tuple[str, ...]:
    return ("apply", f"specs/{id}.toml", "--yes", *more)


@pytest.fixture(scope="module")
def templates(folders: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workspaces by name: `bare` has no store, `fresh` one with second moments only, `one` a version, `two` another on
    it, `held` a candidate on it; `left` is `two` with leftovers, `spoiled` has a factor file that was flipped after a
    backup, `copied` has a backup that is not up to date.
    """
    root = tmp_path_factory.mktemp("templates")

    def grown(name: str, base: str, *commands: tuple[str, ...], code: int = 0) -> Path:
        shutil.copytree(root / base, root / name)
        for one in commands:
            done(root / name, *one, code=code)
        return root / name

    (root / "empty/specs").mkdir(parents=True)
    (root / "empty/editctl.toml").write_text(SETTINGS.format(model=folders["llama"], corpus=corpus))
    for id in EDITS:
        (root / f"empty/specs/{id}.toml").write_text(_spec(id))
    fresh = grown("fresh", "empty", _apply("tower"))
    shutil.rmtree(fresh / "store/deltas")
    (fresh / "store/editctl.db").unlink()
    shutil.rmtree(grown("bare", "fresh") / "store")
    grown("one", "fresh", _apply("tower"))
    grown("two", "one", _apply("ada"))
    grown("undone", "two", ("undo",))
    grown("held", "one", _apply("ada", "--gate", "reliability=1"), code=4)
    grown("copied", "one", ("backup", "copy"), _apply("ada"))
    left = grown("left", "two")
    for name in ("deltas/0.safetensors", "deltas/1.safetensors.7.part", "stats/2.safetensors.8.part", "lock.part"):
        (left / "store" / name).write_bytes(b"left")
    spoiled = grown("spoiled", "left", ("backup", "copy"))
    flip(next(path for path in sorted((spoiled / "store/deltas").iterdir()) if path.stat().st_size > 500), 500)
    shutil.rmtree(root / "empty")
    return {path.name: path for path in root.iterdir()}


def flip(path: Path, place: int, mask: int = 1) -> None:
    """Change bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


Copy = Callable[[str], Path]


@pytest.fixture
def copy(templates: dict[str, Path], tmp_path: Path) -> Iterator[Copy]:
    """Makes a workspace like a template; each call makes another and removes the one before."""
    made = 0

    def make(name: str) -> Path:
        nonlocal made
        shutil.rmtree(tmp_path / f"w{made}", ignore_errors=True)
        made += 1
        return Path(shutil.copytree(templates[name], tmp_path / f"w{made}"))

    yield make


# ---------------------------------------------------------------------------------------------------------------------
# What a store holds


def content(store: Store) -> dict[str, Any]:
    """All that can be read of a store, by the functions its methods call, over one connection instead of hundreds."""
    with store._reading() as db:
        versions = rows.versions(db)
        found: dict[str, Any] = {
            "view": asdict(rows.view(db)),
            "versions": [asdict(version) for version in versions],
            "operations": [asdict(operation) for operation in rows.operations(db)],
        }
        for version in versions:
            live = rows.live(db, version.id)
            found[version.id] = {
                "live": [(one.delta, one.column, one.known) for one in live],
                "deltas": rows.deltas(db, version.id),
                "answers": [asdict(rows.answer(row)) for row in rows.details(db, "answers", version.id)],
                "metrics": [repr(rows.metric(row)) for row in rows.details(db, "metrics", version.id)],
                "events": rows.details(db, "events", version.id),
            }
            for one in live:
                assert isinstance(one.known, Stored)
                json.loads(one.known.text)
        return found


class Shape(NamedTuple):
    """What is the same each time a command is carried out: everything but times and the names that hold times."""

    head: str
    versions: tuple[str, ...]
    operations: tuple[tuple[str, str], ...]
    candidates: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]
    counts: tuple[int, ...]


def shape(store: Store) -> Shape:
    versions = store.versions()
    weights = {"": "base", **{version.id: version.weights_hash for version in versions}}
    view = store.view()
    lists = (store.edits, store.answers, store.metrics, store.events)
    return Shape(
        weights[view.head],
        tuple(version.weights_hash for version in versions),
        tuple((operation.verb, weights[operation.head]) for operation in store.operations()),
        tuple(weights[name] for name in view.candidates),
        tuple((name, weights[version]) for name, version in view.aliases.items()),
        tuple(len(read(version)) for version in versions for read in lists),
    )


def not_rebuilt(model: Model, store: Store) -> dict[str, EditctlError]:
    return wear.rebuild_all(model, store, store.versions()[::-1], silent)


def files(folder: Path) -> set[str]:
    """Names of the files that stay: what SQLite makes and removes is none of ours, nor is the lock."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not re.search(r"(-wal|-shm|/lock|/lock\.json)$", name)}


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@dataclass(frozen=True)
class Case:
    """A command in a workspace."""

    template: str
    arguments: tuple[str, ...]
    said: str
    """What it says when it has done what it was asked for, a regular expression."""


ID = r"(?m)^[0-9a-f]{12}$"
CASES = {
    "apply": Case("one", _apply("ada"), ID),
    "first": Case("fresh", _apply("tower"), ID),
    "bare": Case("bare", _apply("tower"), ID),
    "json": Case("one", _apply("ada", "--json"), '"version_made"'),
    "drop": Case("two", ("drop", "tower", "--yes"), ID),
    "squash": Case("two", ("squash", "--yes"), ID),
    "undo": Case("two", ("undo",), "Now at"),
    "redo": Case("undone", ("redo",), "Now at"),
    "restore": Case("two", ("restore", "base"), "Now at"),
    "alias": Case("two", ("alias", "stable"), "Now at"),
    "accept": Case("held", ("accept",), "Now at"),
    "reject": Case("held", ("reject",), "Now at"),
    "gc": Case("left", ("gc",), "Removed"),
    "repair": Case("spoiled", ("verify", "--repair", "--from", "copy", "--no-rebuild"), "mended"),
    "backup": Case("two", ("backup", "copy"), "Copied"),
    "again": Case("copied", ("backup", "copy"), "Copied"),
}


@dataclass(frozen=True)
class Undisturbed:
    """What a case comes to when nothing happens."""

    old: Shape
    new: Shape
    early: Shape | None
    """Of the store in the folder `copy` before, where there is one."""
    copied: Shape | None
    """And after."""
    files: set[str]
    """What is there then, but for what nothing refers to."""
    after: str
    """Weights hash of the head after another apply."""
    files_after: set[str]
    gaps: tuple[str, ...]
    times: tuple[float, ...]
    seconds: float


@pytest.fixture(scope="module")
def nursery(templates: dict[str, Path], model: Model) -> Iterator[Nursery]:
    """With everything imported that the templates needed."""
    made = Nursery()
    ours = re.compile(r"_?pytest|hypothesis|pluggy|conftest|test_|tiny|nursery|__")
    made.load([*(name for name in sys.modules if not ours.match(name)), "test_faults"])
    yield made
    made.close()


Known = Callable[[str], Undisturbed]


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, templates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Looks up what a case comes to; found out once."""
    found: dict[str, Undisturbed] = {}

    def look(name: str) -> Undisturbed:
        if name not in found:
            case, root = CASES[name], tmp_path_factory.mktemp(name)
            folder = Path(shutil.copytree(templates[case.template], root / "w"))
            store = Store(folder / "store")
            old, early = shape(store), _copied(folder)
            ended = nursery.run(folder, *case.arguments)
            assert ended.code == 0, ended.out + ended.err
            new, copied = shape(store), _copied(folder)
            left = swept(folder)
            done(folder, *_apply("curie"))
            found[name] = Undisturbed(
                old, new, early, copied, left, shape(store).head, swept(folder), ended.gaps, ended.times, ended.seconds
            )
            shutil.rmtree(root)
        return found[name]

    return look


def _copied(folder: Path) -> Shape | None:
    return shape(Store(folder / "copy")) if (folder / "copy").is_dir() else None


def swept(folder: Path) -> set[str]:
    """The names of the files after those were removed that nothing refers to."""
    for name in ("store", "copy"):
        if (folder / name / "editctl.db").exists():
            care.collect(Store(folder / name))
    return files(folder)


def alike(case: Case, found: Shape, wanted: Shape) -> bool:
    """Whether two shapes are the same; a run says in an event that it goes on with what another began to measure."""
    return found._replace(counts=()) == wanted._replace(counts=()) if case.template == "bare" else found == wanted


def check(folder: Path, name: str, ended: Ended, known: Undisturbed, model: Model) -> bool:
    """Hold what a killed command left against every promise; whether it had done what it was asked for."""
    case, store, copied = CASES[name], Store(folder / "store"), Store(folder / "copy")
    with store.lock("test"):
        pass
    assert "Traceback" not in ended.err
    found = shape(store)
    assert found in (known.old, known.new)
    acknowledged = ended.code == 0 or re.search(case.said, ended.out) is not None
    assert found == known.new or not acknowledged
    if case.template != "spoiled":
        assert {fault.wrong for fault in care.inspect(store)} <= {LEFT}
        assert not_rebuilt(model, store) == {}
        if copied.database.exists():
            assert shape(copied) in (known.copied, known.early)
            assert {fault.wrong for fault in care.inspect(copied)} <= {LEFT}
            assert not_rebuilt(model, copied) == {}
    if found == known.old:
        done(folder, *case.arguments)
        assert alike(case, shape(store), known.new)
        assert swept(folder) == known.files
    else:
        done(folder, *_apply("curie"))
        assert shape(store).head == known.after
        assert swept(folder) == known.files_after
    if known.copied is not None:
        assert care.inspect(copied) == []
        assert shape(copied) == known.copied
    assert care.inspect(store) == []
    assert not_rebuilt(model, store) == {}
    return found == known.new


def between(gaps: tuple[str, ...]) -> list[int]:
    """A gap of each moment: nothing is between one step's end and the next one's beginning."""
    return [i for i, gap in enumerate(gaps) if not gap.startswith("after") or i == len(gaps) - 1]


STEPS = (
    "flock store/lock",
    "replace store/lock.json",
    "write store/deltas/#.safetensors.#.part",
    "fsync store/deltas/#.safetensors.#.part",
    "replace store/deltas/#.safetensors",
    "fsync store/deltas",
    "begin immediate in store/editctl.db",
    'insert INTO "versions"',
    'insert OR IGNORE INTO "edits"',
    'insert INTO "version_edits"',
    'insert INTO "answers"',
    'insert INTO "metrics"',
    'insert INTO "events"',
    'update "versions" set "seal"',
    'insert INTO "operations"',
    "commit in store/editctl.db",
    "disconnect in store/editctl.db",
    "unlink store/lock.json",
    "flock store/lock",
)
"""Those of a commit, in order."""


def test_every_step_of_a_commit_is_seen(undisturbed: Known) -> None:
    """The steps are found by watching; what Python and SQLite themselves report was all watched."""
    gaps = undisturbed("apply").gaps
    begun = iter(gap.removeprefix("before ") for gap in gaps if gap.startswith("before"))
    assert [step for step in STEPS if not any(gap.startswith(step) for gap in begun)] == []
    assert [gap for name in CASES for gap in undisturbed(name).gaps if gap.startswith("unwatched")] == []


def stage(ended: Ended) -> str:
    """How far a killed apply had come."""
    if not ended.killed:
        return "ended"
    if re.search(f"{ID}|version_made", ended.out):
        return "acknowledged"
    passed = {
        "after commit": "committed",
        "after begin": "in the transaction",
        "store/deltas": "its factors written",
        "after replace store/lock.json": "computing",
    }
    return next((name for part, name in passed.items() if any(part in gap for gap in ended.gaps)), "starting")


OFTEN = {"apply": 1, "undo": 1, "repair": 3, "backup": 3}
"""Cases killed at steps each time the tests run: at every one, at every third. The slow tests do all at all."""
EVERY = [pytest.param(name, stride, id=f"{name}-{stride}") for name, stride in OFTEN.items()]
EVERY += [pytest.param(name, 1, id=f"{name}-1", marks=pytest.mark.slow) for name in CASES if OFTEN.get(name) != 1]


@pytest.mark.parametrize(("name", "stride"), EVERY)
def test_killed_at_any_step_a_command_has_happened_or_not(
    nursery: Nursery, undisturbed: Known, copy: Copy, model: Model, name: str, stride: int
) -> None:
    """Before every change of the disk, in the middle of every write, and after the last."""
    case, known = CASES[name], undisturbed(name)
    whole = Counter[bool]()
    for gap in between(known.gaps)[::stride]:
        folder = copy(case.template)
        ended = nursery.run(folder, *case.arguments, kill=gap)
        assert ended.killed, ended.err
        assert ended.gaps == known.gaps[:gap]
        whole[check(folder, name, ended, known, model)] += 1
    if known.old != known.new:
        assert whole[False] > 3 and whole[True] > 1, "killed on both sides of the commit"


@pytest.mark.parametrize("kills", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_any_moment_an_apply_has_happened_or_not(
    nursery: Nursery, undisturbed: Known, copy: Copy, model: Model, kills: int
) -> None:
    """Four in six moments are drawn from the whole run, one from while it writes, one from after its commit."""
    draw = random.Random(kills)
    known = undisturbed("apply")
    writing = next(i for i, gap in enumerate(known.gaps) if "deltas" in gap)
    committed = next(i for i, gap in enumerate(known.gaps) if gap.startswith("after commit"))
    stages: Counter[str] = Counter()
    for number in range(kills):
        name = ("apply", "json")[number // 6 % 2]
        folder, share = copy("one"), draw.random()
        if number % 6 == 0:
            when = {"since": known.gaps[writing], "after": share * (known.times[committed] - known.times[writing])}
        elif number % 6 == 1:
            when = {"since": known.gaps[committed], "after": share * (known.seconds - known.times[committed])}
        else:
            when = {"after": 1.1 * (number + share) / kills * known.seconds}
        ended = nursery.run(folder, *CASES[name].arguments, **when)
        stages[stage(ended)] += 1
        check(folder, name, ended, undisturbed(name), model)
    print(f"{kills} kills: {dict(stages)}")
    assert stages["starting"] + stages["computing"] > kills / 5
    assert stages["its factors written"] + stages["in the transaction"] > 0
    assert stages["committed"] + stages["acknowledged"] + stages["ended"] > 0


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("apply", "json")])
@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_command_has_happened_or_not(
    nursery: Nursery, undisturbed: Known, copy: Copy, model: Model, name: str, kills: int
) -> None:
    """All others that write."""
    case, known = CASES[name], undisturbed(name)
    draw = random.Random(name)
    for _ in range(kills):
        folder = copy(case.template)
        ended = nursery.run(folder, *case.arguments, after=draw.random() * known.seconds)
        check(folder, name, ended, known, model)


@pytest.mark.parametrize("name", ["undo", pytest.param("apply", marks=pytest.mark.slow)])
def test_interrupted_at_any_step_a_command_has_happened_or_not(
    nursery: Nursery, undisturbed: Known, copy: Copy, model: Model, name: str
) -> None:
    """The interrupt key lets a command tidy up, which must not undo half of it; exit code 130."""
    case, known = CASES[name], undisturbed(name)
    for gap in between(known.gaps)[:-1]:
        folder = copy(case.template)
        ended = nursery.run(folder, *case.arguments, kill=gap, signal=signal.SIGINT)
        assert ended.code == 130, ended.err
        assert "Interrupted" in ended.err
        check(folder, name, ended, known, model)


def dying(nursery: Nursery, folder: Path, name: str, gap: str, before: str) -> Ended:
    """Kill a case of a broken editctl at the first gap of a name.

    Args:
        before: code that breaks it.
    """
    trial = Path(shutil.copytree(folder, folder.with_name("trial")))
    gaps = nursery.run(trial, *CASES[name].arguments, before=before).gaps
    kill = next(i for i, found in enumerate(gaps) if found.startswith(gap))
    ended = nursery.run(folder, *CASES[name].arguments, before=before, kill=kill)
    assert ended.killed
    return ended


NO_TRANSACTION = """
from sqlite_utils import Database
def execute(db, sql, *more, _execute=Database.execute):
    return _execute(db, "select 1" if sql.split()[0] in ("begin", "commit") else sql, *more)
Database.execute = execute
"""
HASTY = """
from editctl.store import Store
def commit(*a, _commit=Store.commit, **k):
    print("0" * 12, flush=True)
    return _commit(*a, **k)
Store.commit = commit
"""
SOFT = """
import filelock, os
class FileLock:
    def __init__(self, path, timeout):
        self.path = f"{path}.soft"
    def acquire(self, **more):
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise filelock.Timeout(self.path) from None
    def release(self):
        os.unlink(self.path)
filelock.FileLock = FileLock
"""


@pytest.mark.parametrize(
    ("gap", "broken", "what"),
    [
        ('before insert INTO "operations"', NO_TRANSACTION, AssertionError),
        ('before insert INTO "version_edits"', NO_TRANSACTION, AssertionError),
        ("before begin", HASTY, AssertionError),
        ("after open store/lock.soft", SOFT, Locked),
    ],
    ids=["no transaction", "half a version", "said too early", "a lock that outlives its holder"],
)
def test_the_look_at_what_a_kill_left_sees_what_is_wrong(
    nursery: Nursery,
    undisturbed: Known,
    copy: Copy,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    gap: str,
    broken: str,
    what: type[Exception],
) -> None:
    """Control: an editctl that commits without a transaction, that speaks before it has, that cannot lose its lock."""
    folder = copy("one")
    ended = dying(nursery, folder, "apply", gap, broken)
    if broken is SOFT:
        import filelock

        monkeypatch.setattr(filelock, "FileLock", filelock.FileLock)
        exec(broken, {})
    with pytest.raises(what):
        check(folder, "apply", ended, undisturbed("apply"), model)


# ---------------------------------------------------------------------------------------------------------------------
# Killed inside of SQLite, where no step can be seen


@pytest.fixture
def log(copy: Copy) -> tuple[Path, Shape, Shape, bytes, bytes, bytes]:
    """A workspace, its shape before and after an apply; the database before, the log of the apply, the one after."""
    folder = copy("one")
    store = Store(folder / "store")
    old, before = shape(store), store.database.read_bytes()
    with contextlib.closing(sqlite3.connect(store.database)) as reader:
        reader.execute("select * from versions").fetchone()
        done(folder, *_apply("ada"))
        log = store.database.with_name("editctl.db-wal").read_bytes()
        assert store.database.read_bytes() == before, "a commit writes the log alone"
    new = shape(store)
    assert new != old
    assert not store.database.with_name("editctl.db-wal").exists()
    return folder, old, new, before, log, store.database.read_bytes()


def test_a_commit_cut_off_anywhere_has_happened_or_not(log: Any) -> None:
    """SQLite's log with its end missing: the version is there only with the last byte of its commit."""
    folder, old, new, before, whole, _ = log
    store = Store(folder / "store")
    draw = random.Random(0)
    frame = 24 + 4096
    cuts = {place for n in range(0, len(whole), frame) for place in (n, n + 32, n + 32 + draw.randrange(frame))}
    found = {}
    for cut in sorted(cut for cut in cuts | {0, len(whole) - 1, len(whole)} if cut <= len(whole)):
        store.database.write_bytes(before)
        store.database.with_name("editctl.db-wal").write_bytes(whole[:cut])
        found[cut] = shape(store)
        assert {fault.wrong for fault in care.inspect(store)} <= {LEFT}
    assert [cut for cut in found if found[cut] == new] == [len(whole)]
    assert set(found.values()) == {old, new}


def test_a_log_cut_off_while_it_is_carried_over_loses_nothing(log: Any) -> None:
    """Any pages of the database may be new already: the log has them all."""
    folder, _, new, before, whole, after = log
    store = Store(folder / "store")
    draw = random.Random(0)
    for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        mixed = bytearray(before)
        for place in range(0, len(after), 4096):
            if draw.random() < share:
                mixed[place : place + 4096] = after[place : place + 4096]
        store.database.write_bytes(mixed)
        store.database.with_name("editctl.db-wal").write_bytes(whole)
        assert shape(store) == new
        assert care.inspect(store) == []


def test_a_store_copied_without_its_log_is_the_one_before(log: Any) -> None:
    """While the log is there, the copy needs it: without it the last versions are missing, and their files show it."""
    folder, old, new, before, whole, _ = log
    copied = Store(Path(shutil.copytree(folder / "store", folder / "by hand")))
    copied.database.write_bytes(before)
    assert shape(copied) == old
    assert [fault.wrong for fault in care.inspect(copied)] == [LEFT]
    copied.database.with_name("editctl.db-wal").write_bytes(whole)
    assert shape(copied) == new
    assert care.inspect(copied) == []


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def full(outcome: Ended | Outcome, folder: Path, old: Shape, words: str = "No space left|disk is full") -> None:
    """Hold a command that found the disk full against what it has to do."""
    assert outcome.code == 1, outcome.out + outcome.err
    assert re.search(f"(?m)^error: .*({words})", outcome.err), outcome.err
    assert re.search("(?m)^hint: ", outcome.err)
    assert "Traceback" not in outcome.err
    store = Store(folder / "store")
    with store.lock("test"):
        pass
    assert shape(store) == old
    assert {fault.wrong for fault in care.inspect(store) if "factor file" not in fault.what} <= {LEFT}


def refusable(gaps: tuple[str, ...]) -> list[str]:
    """The steps that a full disk can refuse, in order."""
    return [gap.removeprefix("before ") for gap in gaps if gap.split()[0] == "before" and gap.split()[1] in DENIABLE]


@pytest.mark.parametrize("name", ["apply", "bare", "undo", "repair", "backup"])
def test_a_disk_that_is_full_at_any_write_is_named_and_nothing_has_happened(
    nursery: Nursery, undisturbed: Known, copy: Copy, tmp_path: Path, name: str
) -> None:
    """Every write is refused once, half done; the same command goes through when there is space."""
    case, known = CASES[name], undisturbed(name)
    steps = refusable(known.gaps)
    assert len(steps) > 3
    folders = []
    for number, step in enumerate(steps):
        if name == "bare" and "stats" not in step:
            continue  # as in a workspace that has measured
        folder = Path(shutil.copytree(copy(case.template), tmp_path / str(number)))
        ended = nursery.run(folder, *case.arguments, deny=number)
        if ended.code == 0:
            # A folder may be one that cannot be synchronised; looking does without the lock where it cannot be had.
            assert step in ("fsync store/deltas", "fsync store/stats", "fsync copy", "fsync copy/deltas") or (
                name == "repair" and "lock" in step
            )
            assert alike(case, shape(Store(folder / "store")), known.new)
            assert swept(folder) == known.files
            continue
        full(ended, folder, known.old)
        folders.append(folder)
    # Everything that was refused leaves its traces to the last that goes through.
    for folder in (folders[0], folders[len(folders) // 2], folders[-1]):
        done(folder, *case.arguments)
        assert alike(case, shape(Store(folder / "store")), known.new)
        assert swept(folder) == known.files


def test_a_store_on_a_disk_where_files_can_be_so_long_only_is_left_as_it_was(
    nursery: Nursery, undisturbed: Known, copy: Copy
) -> None:
    """A quota that SQLite meets as well; what it finds too long is named, whichever file it is."""
    known = undisturbed("apply")
    draw = random.Random(0)
    sizes = sorted(path.stat().st_size for path in copy("two").rglob("*") if path.is_file())
    limits = sorted({0, 100, 4096, 30_000, 40_000, max(sizes) - 1, *draw.sample(sizes, 3)})
    codes = {}
    for limit in limits:
        folder = copy("one")
        ended = nursery.run(folder, *CASES["apply"].arguments, file_size=limit)
        codes[limit] = ended.code
        if ended.code == 0:
            assert shape(Store(folder / "store")) == known.new
        else:
            full(ended, folder, known.old, "File too large|cannot be read or written|disk is full")
            done(folder, *CASES["apply"].arguments)
            assert shape(Store(folder / "store")) == known.new
    assert codes[0] == 1
    assert nursery.run(copy("one"), *CASES["apply"].arguments, file_size=10_000_000).code == 0


def put(store: Store, data: bytes) -> str:
    """A factor file of this content; its name."""
    name = hashlib.sha256(data).hexdigest()[:32]
    store.deltas_dir.mkdir(parents=True, exist_ok=True)
    (store.deltas_dir / f"{name}.safetensors").write_bytes(data)
    return name


def an_edit(number: int) -> Edit:
    return Edit(
        id=f"fact-{number}", subject=f"Subject {number}", relation="{} lies in", target_new="Rome", note="é \N{SNOWMAN}"
    )


def commit(store: Store, *new: int, keep: int = 10**6, rows: int = 3, **more: Any) -> Version:
    """A version made without a model: what is live at the head, as much as is kept, and these edits in a new batch."""
    head = store.head()
    live = list(store.edits(head))[:keep]
    if new:
        name = put(store, f"batch {new} {head.id if head else ''}".encode())
        live += [LiveEdit(an_edit(number), name, column) for column, number in enumerate(new)]
    draft = Draft(
        parent=head.id if head else "",
        base="b" * 32,
        model="atlas",
        dtype="torch.float32",
        method="alphaedit",
        params=methods.settings({"num_hidden_layers": 4}, "alphaedit", {}).to_params(),
        seed=0,
        weights_hash=hashlib.sha256(repr(live).encode()).hexdigest()[:32],
        libraries={"torch": "2"},
        seconds={"solve": 0.5},
        peak_mb=1.5,
        edits=tuple(live),
        answers=tuple(
            Answer(
                f"fact-{n}",
                "rewrite",
                f"Subject {n} lies in {i}",
                ("Rome",),
                "Paris",
                "Rome",
                True,
                1.5,
                0.25,
                0.0,
                1.0,
            )
            for n in new
            for i in range(rows)
        ),
        metrics=(Metric("reliability", "generated", 1.0, len(new)), Metric("locality", "generated", math.nan, 0)),
        events=tuple(json.dumps({"type": "note", "text": f"{i} " * 20}) for i in range(rows)),
    )
    return store.commit(draft, expected_head=draft.parent, **more)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", who="me@here")


def test_a_database_that_cannot_grow_is_named_and_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every number of pages that is too few; the factor files wait for the next attempt."""
    commit(store, 1, 2)
    before, plain = content(store), sqlite3.connect
    with contextlib.closing(plain(store.database)) as db:
        pages = db.execute("pragma page_count").fetchone()[0]
    refused = 0
    for limit in range(pages, 10_000):

        def limited(*arguments: Any, limit: int = limit, **named: Any) -> sqlite3.Connection:
            db: sqlite3.Connection = plain(*arguments, **named)
            db.execute(f"pragma max_page_count = {limit}")
            return db

        monkeypatch.setattr(sqlite3, "connect", limited)
        try:
            made = commit(store, 3, 4, rows=100)
        except StoreError as error:
            assert "disk is full" in error.message and "nothing was changed" in error.hint
            refused += 1
            assert content(store) == before
            assert {fault.wrong for fault in care.inspect(store)} == {LEFT}
        else:
            break
    assert refused > 3
    assert store.head() == made
    assert care.inspect(store) == []


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems, where the system lets it; they are gone when the test is."""
    made: list[Path] = []

    def run(*arguments: str) -> None:
        try:
            ended = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"nothing can be mounted here: {error}")
        if ended.returncode:
            pytest.skip(f"nothing can be mounted here: {ended.stderr.strip()}")

    def make(*arguments: str, at: Path | None = None) -> Path:
        if at is None:
            at = tmp_path / f"mounted{len(made)}"
            at.mkdir()
        run(*arguments, str(at))
        if at not in made:
            made.append(at)
        return at

    yield make
    for path in reversed(made):
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def test_a_file_system_that_is_full_is_named_and_the_store_stays(
    nursery: Nursery, undisturbed: Known, templates: dict[str, Path], mount: Callable[..., Path]
) -> None:
    """A real one, with less and less space left; when there is more the command goes through."""
    known = undisturbed("apply")
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    codes = []
    for left in (0, 4, 16, 32, 56, 88, 400):
        folder = Path(shutil.copytree(templates["one"], disk / "w"))
        free = shutil.disk_usage(disk).free - left * 1024
        (disk / "filler").write_bytes(bytes(free))
        ended = nursery.run(folder, *CASES["apply"].arguments)
        codes.append(ended.code)
        assert done(folder, "log") and done(folder, "show")
        (disk / "filler").unlink()
        if ended.code == 0:
            assert shape(Store(folder / "store")) == known.new
        else:
            full(ended, folder, known.old, "No space left|disk is full|cannot be read or written")
            done(folder, *CASES["apply"].arguments)
        assert shape(Store(folder / "store")) == known.new
        assert swept(folder) == known.files
        shutil.rmtree(folder)
    assert codes == sorted(codes, reverse=True) and set(codes) == {0, 1}


# ---------------------------------------------------------------------------------------------------------------------
# Stores that cannot be written


def locked_up(folder: Path, mount: Callable[..., Path]) -> None:
    """Let nothing in a folder be written: by permissions, or by a mount, since permissions do not bind root."""
    if os.geteuid():
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        return
    mount("--bind", str(folder), at=folder)
    mount("-o", "remount,ro,bind", at=folder)


def told(outcome: Outcome | Ended, words: str) -> None:
    """Hold a command that could not do what it was asked for to what it has to say."""
    assert outcome.code == 1, outcome.out
    assert re.search(f"(?m)^error: .*({words})", outcome.err), outcome.err
    assert re.search("(?m)^hint: ", outcome.err)


def test_a_store_that_cannot_be_written_is_read_and_says_so(copy: Copy, mount: Callable[..., Path]) -> None:
    """Looking, planning and verifying work; what would write is refused and has left nothing."""
    folder = copy("two")
    said = [done(folder, *look) for look in (("log", "--json"), ("show", "--json"), ("verify",), ("plan", "specs"))]
    before = files(folder)
    locked_up(folder / "store", mount)
    assert said == [done(folder, *v) for v in (("log", "--json"), ("show", "--json"), ("verify",), ("plan", "specs"))]
    for verb in (("undo",), ("gc",), ("accept",), ("alias", "stable"), _apply("curie"), ("drop", "ada", "--yes")):
        told(command(folder, *verb), "cannot be written")
    assert files(folder) == before


@pytest.mark.parametrize("lost", [(), ("-shm",), ("-shm", "-wal")], ids=["as it was", "no index", "no log"])
def test_what_a_killed_writer_left_is_read_where_nothing_can_be_written(
    nursery: Nursery, undisturbed: Known, copy: Copy, mount: Callable[..., Path], lost: tuple[str, ...]
) -> None:
    """Its version is in the log: it is shown, or that it cannot be read; never the one before as if all were well."""
    known, folder = undisturbed("apply"), copy("one")
    kill = known.gaps.index("before disconnect in store/editctl.db")
    assert nursery.run(folder, *CASES["apply"].arguments, kill=kill).killed
    for name in lost:
        (folder / f"store/editctl.db{name}").unlink()
    locked_up(folder / "store", mount)
    store = Store(folder / "store")
    outcome = command(folder, "log")
    if outcome.code == 0:
        assert shape(store) == (known.old if "-wal" in lost else known.new)
        assert [fault.wrong for fault in care.inspect(store)] == [LEFT] * ("-wal" in lost)
    else:
        told(outcome, "cannot be opened|cannot be read|cannot be written")
        assert care.inspect(store) != []
        assert "-shm" in lost


def test_a_store_opened_read_only_takes_no_lock(store: Store) -> None:
    """Whatever would write says so; reading goes on."""
    made = commit(store, 1)
    closed = Store(store.root, readonly=True)
    before = content(closed)
    for write in (
        closed.undo,
        lambda: commit(closed, 2),
        lambda: care.collect(closed),
        lambda: care.repair(closed, [], None),
    ):
        with pytest.raises(StoreError, match="read-only"):
            write()
    assert content(closed) == before
    assert closed.head() == made


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_factor_file_cut_anywhere_is_named(copy: Copy, model: Model) -> None:
    """At every tenth of its length, and missing altogether."""
    folder = copy("two")
    store = Store(folder / "store")
    head = store.head()
    path = store.deltas_dir / f"{store.deltas(head)[-1]}.safetensors"
    data = path.read_bytes()
    for length in (*range(0, len(data), len(data) // 10), len(data) - 1, None):
        if length is None:
            path.unlink()
        else:
            path.write_bytes(data[:length])
        assert [fault.what for fault in care.inspect(store)] == [f"factor file {path}"]
        assert list(not_rebuilt(model, store)) == [head.id if head else ""]
        for verb in (("measure",), ("ask", "Ada was born in"), ("drop", "tower", "--yes")):
            told(command(folder, *verb), f"{path.name} is (missing|not what was written)")
        outcome = command(folder, "verify")
        assert (outcome.code, path.name in outcome.out) == (1, True)
    path.write_bytes(data)
    assert care.inspect(store) == []


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_bit_flipped_anywhere_in_a_factor_file_is_named(copy: Copy, flips: int) -> None:
    """In its header as in its numbers; the file is never taken for what it was."""
    store = Store(copy("two") / "store")
    name = store.deltas(store.head())[0]
    path = store.deltas_dir / f"{name}.safetensors"
    draw = random.Random(0)
    for _ in range(flips):
        place, mask = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        flip(path, place, mask)
        assert [fault.what for fault in care.inspect(store)] == [f"factor file {path}"]
        with pytest.raises(StoreError, match="is not what was written"):
            delta_files.load(name, store.deltas_dir)
        flip(path, place, mask)
    assert care.inspect(store) == []


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 24 versions with all that a store can hold, made without a model; a few dozen pages."""
    ticks = itertools.count()
    noon = datetime(2026, 8, 1, 12, tzinfo=UTC)
    store = Store(tmp_path_factory.mktemp("grown"), who="me@here", now=lambda: noon + timedelta(seconds=next(ticks)))
    for number in range(0, 60, 3):
        commit(store, number, number + 1, number + 2, keep=number if number != 30 else 17)
        if number % 15 == 0:
            store.set_alias(f"good-{number}", "@")
    commit(store, keep=40, verb="drop", without=["fact-3"], note="Warum nicht?")
    store.undo("editctl undo")
    store.undo()
    store.redo()
    commit(store, 70, hold="reliability is 0.0 %")
    commit(store, 71, hold="reliability is 0.0 %")
    store.reject(note="no")
    store.accept(edits=["fact-70"])
    return store


Damage = Callable[[bytearray, int, random.Random], None]


def _flip_a_bit(data: bytearray, start: int, draw: random.Random) -> None:
    data[start + draw.randrange(PAGE)] ^= 1 << draw.randrange(8)


def _change_a_byte(data: bytearray, start: int, draw: random.Random) -> None:
    data[start + draw.randrange(PAGE)] ^= draw.randrange(1, 256)


def _flip_in_the_head(data: bytearray, start: int, draw: random.Random) -> None:
    data[start + draw.randrange(64)] ^= 1 << draw.randrange(8)


def _empty_a_part(data: bytearray, start: int, draw: random.Random) -> None:
    place = start + draw.randrange(0, PAGE, 512)
    data[place : place + 512] = bytes(512)


def _lose_a_page(data: bytearray, start: int, draw: random.Random) -> None:
    data[start : start + PAGE] = bytes(PAGE)


def _swap_a_page(data: bytearray, start: int, draw: random.Random) -> None:
    other = draw.randrange(len(data) // PAGE) * PAGE
    data[start : start + PAGE], data[other : other + PAGE] = data[other : other + PAGE], data[start : start + PAGE]


PAGE = 4096
DAMAGES: dict[str, tuple[Damage, int]] = {
    "a bit": (_flip_a_bit, 12),
    "a byte": (_change_a_byte, 12),
    "a bit of the head": (_flip_in_the_head, 12),
    "a sector lost": (_empty_a_part, 4),
    "a page lost": (_lose_a_page, 1),
    "two pages swapped": (_swap_a_page, 4),
}
"""Ways to damage a page, and how often each is tried on each page by the slow tests."""


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "often"])
def test_a_damaged_page_is_named_or_changed_nothing(grown: Store, tmp_path: Path, kind: str, thorough: bool) -> None:
    """Each page in turn. What is read of a damaged store is right, or refused, or `verify` knows that it is wrong."""
    change, times = DAMAGES[kind]
    draw = random.Random(kind)
    whole, original = grown.database.read_bytes(), content(grown)
    assert len(whole) // PAGE > 24
    assert care.inspect(grown) == []
    folder = Path(shutil.copytree(grown.root, tmp_path / "store"))
    store = Store(folder)
    seen = Counter[str]()
    for start in range(0, len(whole), PAGE):
        for _ in range(times if thorough else 1):
            data = bytearray(whole)
            change(data, start, draw)
            store.database.write_bytes(data)
            faults = care.inspect(store)
            try:
                found = content(store)
            except StoreError as error:
                assert error.hint
                found = {}
            assert faults or found == original, f"page {start // PAGE}: unnoticed"
            seen["found" if faults else "free space"] += 1
            seen["refused"] += not found
            seen["read wrongly, but found"] += bool(found) and found != original
            for verb in (("log",), ("show",), ("diff",), ("verify", "--no-rebuild")) if seen.total() % 10 == 0 else ():
                outcome = command(tmp_path, *verb)
                assert outcome.code in (0, 1)
                assert outcome.code == 0 or verb[0] == "verify" or re.search("(?m)^hint: ", outcome.err), outcome.err
    print(f"{kind}: {len(whole) // PAGE} pages, {dict(seen)}")
    assert seen["found"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Stores of an earlier editctl


FIRST: dict[str, Any] = json.loads(Path(__file__).with_name("store_1.json").read_text(encoding="utf-8"))


@pytest.fixture
def first(tmp_path: Path) -> Store:
    """A store of schema 1, as the editctl of then made it."""
    store = Store(tmp_path / "store", who="me@here")
    for name, text in FIRST["files"].items():
        assert put(store, text.encode()) == name
    with contextlib.closing(sqlite3.connect(store.database)) as db:
        db.executescript("\n".join(FIRST["sql"]))
        db.execute("pragma journal_mode = wal")
    return store


def tables(store: Store) -> dict[str, list[str]]:
    """The columns of every table."""
    with contextlib.closing(sqlite3.connect(store.database)) as db:
        names = [row[0] for row in db.execute("select name from sqlite_master where type = 'table' order by name")]
        return {name: [row[1] for row in db.execute(f"pragma table_info({name})")] for name in names}


def bytes_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def same_as_then(store: Store, operations: int = 0, version: int = 0) -> None:
    """Hold what is read of a store against what the editctl of then read.

    Args:
        operations: how many came since.
    """
    then = FIRST["read"]
    versions = store.versions()
    assert [found.id for found in versions] == [found["id"] for found in then["versions"]]
    for found, wanted in zip(versions, then["versions"], strict=True):
        now = json.loads(json.dumps(asdict(found)))
        assert {key: now[key] for key in wanted.keys() - {"deltas", "note"}} == {
            key: value for key, value in wanted.items() if key not in ("deltas", "note")
        }
        assert list(now["params"]) == list(wanted["params"]), "in the order they were written"
        assert (found.norms, found.gates) == ({}, {})
        assert list(store.deltas(found)) == wanted["deltas"]
        live = store.edits(found)
        assert [[one.edit.to_json(), one.delta, one.column] for one in live] == then["live"][found.id]
        for one in live:
            known = one.known
            assert [known.prompt, known.weights_fingerprint, known.notes_fingerprint] == then["fingerprints"][one.id]
        answers = json.loads(json.dumps([asdict(answer) for answer in store.answers(found)]))
        recorded = then["answers"][found.id]
        assert [{key: now[key] for key in was} for now, was in zip(answers, recorded, strict=True)] == recorded
        # A value that is no number equals nothing, but is written like any other.
        metrics, recorded = [asdict(metric) for metric in store.metrics(found)], then["metrics"][found.id]
        same = [{key: now[key] for key in was} for now, was in zip(metrics, recorded, strict=True)]
        assert repr(same) == repr(recorded)
        assert list(store.events(found)) == then["events"][found.id]
    ours = store.operations()[operations:]
    assert [{key: getattr(op, key) for key in wanted} for op, wanted in zip(ours, then["operations"], strict=True)] == (
        then["operations"]
    )
    assert dict(store.view().aliases) == then["aliases"]
    if not operations:
        head = store.head()
        assert (head.id if head else "") == then["head"]
    assert {op.note for op in ours} | {op.about for op in ours} == {""}


@pytest.mark.parametrize("closed", [False, True], ids=["open", "read-only"])
def test_a_store_of_schema_1_is_read_as_it_is_and_not_changed(
    first: Store, mount: Callable[..., Path], closed: bool
) -> None:
    """Every value that was recorded, through every command that looks; also where nothing can be written."""
    if closed:
        locked_up(first.root, mount)
    before = bytes_of(first.root)
    same_as_then(first)
    assert care.inspect(first) == []
    for verb in (("log",), ("show",), ("show", "stable"), ("diff",), ("alias",), ("verify", "--no-rebuild")):
        done(first.root.parent, *verb)
    assert bytes_of(first.root) == before
    assert closed or "aliases" in tables(first)


def test_the_first_command_that_writes_brings_a_store_of_schema_1_forward(first: Store) -> None:
    """Undo and redo walk as they did, aliases stay, and all that was recorded is there."""
    fresh = Store(first.root.with_name("fresh"))
    commit(fresh, 1)
    assert [first.redo().head for _ in FIRST["read"]["first redone"]] == FIRST["read"]["first redone"]
    assert tables(first) == tables(fresh)
    same_as_then(first, len(FIRST["read"]["first redone"]))
    assert care.inspect(first) == []
    first.undo()
    assert [first.undo().head for _ in FIRST["read"]["undone"]] == FIRST["read"]["undone"]
    with pytest.raises(StoreError, match="nothing to undo"):
        first.undo()
    assert [first.redo().head for _ in FIRST["read"]["redone"]] == FIRST["read"]["redone"]
    with pytest.raises(StoreError, match="nothing to redo"):
        first.redo()
    same_as_then(first, len(first.operations()) - len(FIRST["read"]["operations"]))
    made = commit(first, 5, 6)
    assert [live.id for live in first.edits(made)][-2:] == ["fact-5", "fact-6"]
    assert care.inspect(first) == []


def test_what_a_store_of_schema_1_kept_twice_is_kept_once(first: Store) -> None:
    """Versions that share edits with the one below hold only what differs; tables are as strict as a new store's."""
    with contextlib.closing(sqlite3.connect(first.database)) as db:
        before = db.execute("select count(*) from version_edits").fetchone()[0]
    first.redo()
    with contextlib.closing(sqlite3.connect(first.database)) as db:
        after = db.execute("select count(*) from version_edits").fetchone()[0]
        strict = db.execute("select name from pragma_table_list where strict = 0 and schema = 'main'").fetchall()
    assert after == before - sum(v["kept"] for v in _kept(first))
    assert after < before
    assert {name for (name,) in strict if not name.startswith("_sqlite") and "sqlite_" not in name} == set()


def _kept(store: Store) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(store.database)) as db:
        return [{"kept": row[0]} for row in db.execute("select kept from versions")]


def test_a_store_of_schema_1_is_backed_up_and_swept_as_any_other(first: Store, tmp_path: Path) -> None:
    """The copy is a store of now; the one it was made from is left as it was."""
    before = bytes_of(first.root)
    assert care.back_up(first, tmp_path / "copy") == len(FIRST["files"])
    same_as_then(Store(tmp_path / "copy"))
    assert care.inspect(Store(tmp_path / "copy")) == []
    assert bytes_of(first.root) == before
    (first.deltas_dir / "x.part").write_bytes(b"left")
    assert [one.path.name for one in care.collect(first)] == ["x.part"]
    same_as_then(first)
    first.redo()
    assert care.back_up(first, tmp_path / "copy") == 0
    assert care.inspect(Store(tmp_path / "copy")) == []


def test_a_store_of_a_later_editctl_is_refused_and_left_alone(first: Store) -> None:
    """By every command, with the way out."""
    with sqlite3.connect(first.database) as db:
        db.execute("insert into _sqlite_migrations values (99, 'editctl', 'm999_later', '2030-01-01')")
    db.close()
    before = bytes_of(first.root)
    for verb in (("log",), ("show",), ("undo",), ("gc",), ("backup", "copy"), ("verify",)):
        outcome = command(first.root.parent, *verb)
        assert outcome.code == 1
        assert "newer editctl" in outcome.out + outcome.err
        assert "m999_later" in outcome.out + outcome.err
    kept = {name: value for name, value in bytes_of(first.root).items() if not name.endswith(("/lock", "/lock.json"))}
    assert kept == before


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_of_a_migration_a_store_is_of_the_old_schema_or_the_new(
    nursery: Nursery, first: Store, stride: int
) -> None:
    """And holds the same; the same command then goes through."""
    old, aside = tables(first), first.root.with_name("aside")
    folder = first.root.parent
    shutil.copytree(first.root, aside)
    before = content(first)
    gaps = nursery.run(folder, "redo").gaps
    new = tables(first)
    assert new != old
    same_as_then(first, 1)
    places = between(gaps)
    assert len(places) > 60
    seen = Counter[str]()
    for kill in (*places[::stride], len(gaps) - 1):
        shutil.rmtree(first.root)
        shutil.copytree(aside, first.root)
        ended = nursery.run(folder, "redo", kill=kill)
        assert ended.killed
        on_disk, found = tables(first), content(first)
        moved = len(found["operations"]) - len(before["operations"])
        assert on_disk in (old, new)
        assert moved == 0 or on_disk == new
        assert {**found, "view": {}, "operations": found["operations"][moved:]} == {**before, "view": {}}
        assert {fault.wrong for fault in care.inspect(first)} <= {LEFT}
        seen["old" if on_disk == old else "moved" if moved else "new"] += 1
        if not moved:
            done(folder, "redo")
        assert tables(first) == new
        assert len(first.operations()) == len(before["operations"]) + 1
        assert care.inspect(first) == []
    assert seen["old"] > 5 and seen["moved"]


CREATE = """
from pathlib import Path
from editctl.store import Store
from test_faults import commit
print(commit(Store(Path("store"), who="me@here"), 1, 2).id)
"""


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_of_the_first_commit_a_store_is_empty_or_has_it(
    nursery: Nursery, tmp_path: Path, stride: int
) -> None:
    """While the database and its tables are made, too; the next commit goes through."""
    gaps = nursery.run(tmp_path, code=CREATE).gaps
    made = content(Store(tmp_path / "store"))
    seen = Counter[int]()
    for kill in (*between(gaps)[::stride], len(gaps) - 1):
        shutil.rmtree(tmp_path / "store")
        ended = nursery.run(tmp_path, code=CREATE, kill=kill)
        assert ended.killed
        store = Store(tmp_path / "store", who="me@here")
        if store.root.exists():
            with store.lock("test"):
                pass
        assert {fault.wrong for fault in care.inspect(store)} <= {LEFT}
        found = len(store.versions())
        assert found in (0, 1) and len(store.operations()) == found
        assert found or not ended.out
        seen[found] += 1
        commit(store, *(() if found else (1, 2)))
        assert [live.id for live in store.edits(store.head())] == ["fact-1", "fact-2"]
        care.collect(store)
        assert care.inspect(store) == []
    assert seen[0] and seen[1]
    assert len(made["versions"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Mending and copying


def faults_of(outcome: Outcome) -> list[dict[str, Any]]:
    """What `verify --json` found."""
    return [line for line in map(json.loads, outcome.out.splitlines()) if line["type"] == "fault"]


def test_what_can_be_mended_is_and_the_rest_is_said(copy: Copy, model: Model) -> None:
    """Leftovers, spoiled and lost files that a backup has; a file that no backup has as it was stays as it is."""
    folder = copy("two")
    store, spare = Store(folder / "store"), Store(folder / "copy")
    done(folder, "backup", "copy")
    first, second = (store.deltas_dir / f"{name}.safetensors" for name in store.deltas(store.head()))
    original = content(store)
    flip(first, 1000)
    second.unlink()
    (store.deltas_dir / "stray.safetensors").write_bytes(b"left")
    verify = ("verify", "--json", "--no-rebuild")
    found = command(folder, *verify)
    assert found.code == 1
    assert [fault["repaired"] for fault in faults_of(found)] == [False] * 3
    spoiled = first.read_bytes()
    flip(spare.deltas_dir / first.name, 2000)
    mended = command(folder, *verify, "--repair", "--from", "copy")
    assert mended.code == 1
    assert {Path(f["what"].split()[-1]).name: f["repaired"] for f in faults_of(mended)} == {
        first.name: False,
        second.name: True,
        "stray.safetensors": True,
    }
    assert first.read_bytes() == spoiled, "not made worse"
    flip(spare.deltas_dir / first.name, 2000)
    assert command(folder, *verify, "--repair").code == 1, "without a backup there is nothing to take it from"
    mended = command(folder, *verify, "--repair", "--from", "copy")
    assert mended.code == 0
    assert [fault["repaired"] for fault in faults_of(mended)] == [True]
    assert care.inspect(store) == []
    assert content(store) == original
    assert not_rebuilt(model, store) == {}
    assert command(folder, *verify).code == 0


def index_page(store: Store, name: str) -> int:
    with contextlib.closing(sqlite3.connect(store.database)) as db:
        return int(db.execute("select rootpage from sqlite_master where name = ?", [name]).fetchone()[0])


@pytest.mark.parametrize(
    "name", ["sqlite_autoindex_edits_1", "sqlite_autoindex_versions_1", "sqlite_autoindex_version_edits_1"]
)
def test_a_broken_index_is_made_anew(copy: Copy, name: str) -> None:
    """What it indexes is all there, so nothing is lost; before, `verify` says what is wrong and changes nothing."""
    folder = copy("two")
    store = Store(folder / "store")
    original = content(store)
    page, data = index_page(store, name), bytearray(store.database.read_bytes())
    data[page * PAGE - 3] ^= 1  # cells are filled in from the end of a page
    store.database.write_bytes(data)
    broken = bytes(data)
    found = command(folder, "verify", "--no-rebuild")
    assert (found.code, "index" in found.out) == (1, True), found.out
    assert store.database.read_bytes() == broken
    mended = command(folder, "verify", "--no-rebuild", "--repair", "--json")
    assert mended.code == 0, mended.out
    assert all(fault["repaired"] for fault in faults_of(mended))
    assert care.inspect(store) == []
    assert content(store) == original


SPOILS = {
    "a version": "update versions set seed = seed + 1",
    "an edit": "update edits set prompt = prompt || '!'",
    "an edit's text": "update edits set json = replace(json, 'Rome', 'Oslo')",
    "a fingerprint": "update edits set weights_fingerprint = notes_fingerprint",
    "an answer": "update answers set \"after\" = 'so'",
    "a metric": "update metrics set value = 0.125",
    "an event": "delete from events where position = 1",
    "a place": 'update version_edits set "column" = 7',
    "what was kept": "update versions set kept = 0",
    "an operation": "update operations set command = 'rm'",
    "an operation gone": "delete from operations where id = 1",
    "operations in another order": "update operations set id = id + 5",
    "an alias": 'update operations set aliases = \'{"a": ""}\'',
    "a version gone": "delete from versions where number = 1",
    "a version that is not there": "update operations set head = '0123456789ab'",
}
"""Statements that say something else than what was recorded."""


@pytest.mark.parametrize("what", SPOILS)
def test_a_record_that_was_changed_is_named_and_nothing_is_removed(copy: Copy, what: str) -> None:
    """Not even what looks left over: what the record named is not known any more. No repair makes up a record."""
    folder = copy("left")
    store = Store(folder / "store")
    (store.root / "lock.part").unlink()
    with sqlite3.connect(store.database) as db:
        assert db.execute(SPOILS[what]).rowcount > 0
    db.close()
    before = files(folder)
    faults = care.damage(store)
    assert faults and all(fault.remedy == care.BACKUP for fault in faults)
    for verb in (("verify", "--no-rebuild"), ("verify", "--no-rebuild", "--repair", "--from", "nowhere")):
        outcome = command(folder, *verb)
        assert outcome.code == 1
        assert "backup" in outcome.out
    told(command(folder, "gc"), "nothing was removed")
    assert files(folder) == before


@pytest.mark.parametrize("what", ["a version", "an edit", "an answer", "a place", "an operation", "an alias"])
def test_without_seals_a_changed_record_would_not_be_seen(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Control: neither SQLite nor what refers to what notices."""
    store = Store(copy("two") / "store")
    with sqlite3.connect(store.database) as db:
        db.execute(SPOILS[what])
    db.close()
    assert care.damage(store) != []
    monkeypatch.setattr(care, "_sealed", lambda store, db: iter(()))
    assert care.damage(store) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_a_database_that_is_no_database_is_named(copy: Copy, damaged: bool) -> None:
    """Or one cut short: nothing is taken for leftover, and no command shows a traceback."""
    folder = copy("two")
    store = Store(folder / "store")
    data = store.database.read_bytes()
    store.database.write_bytes(data[: len(data) // 2] if damaged else b"no database at all" * 400)
    before = files(folder)
    for verb in (("log",), ("show",), ("undo",), ("gc",), ("backup", "copy"), ("plan",), _apply("curie")):
        told(command(folder, *verb), "damaged|not an SQLite database|cannot be read")
    for verb in (("verify",), ("verify", "--repair")):
        outcome = command(folder, *verb)
        assert (outcome.code, "backup" in outcome.out + outcome.err) == (1, True)
    assert {name for name in files(folder) if not name.startswith("copy")} == before


@pytest.mark.parametrize("verb", [("gc",), ("verify", "--repair"), ("backup", "copy")], ids=" ".join)
def test_nothing_is_removed_while_another_process_writes(copy: Copy, verb: tuple[str, ...]) -> None:
    """Its files may not be named yet, so none is called left over. Copies are made meanwhile, but not two into one."""
    folder = copy("spoiled" if verb[0] == "verify" else "left")
    store = Store(folder / "store")
    if verb[0] != "verify":
        done(folder, "backup", "copy")
    (store.root / "lock.part").unlink()
    before = files(folder)
    with Store(folder / ("copy" if verb[0] == "backup" else "store")).lock("apply"):
        outcome = command(folder, *verb)
        assert outcome.code == 3, outcome.out
        assert re.search(r"`apply` of \S+@\S+ \(pid \d+\)", outcome.err)
        if verb[0] == "gc":
            done(folder, "verify")
        if verb[0] != "verify":
            done(folder, "backup", "another" if verb[0] == "backup" else "copy")
    assert before <= files(folder)
    done(folder, *verb, *(("--from", "copy", "--no-rebuild") if verb[0] == "verify" else ()))
    assert [fault for fault in care.inspect(store) if verb[0] != "backup"] == []


def test_a_backup_is_a_store_and_only_what_is_new_is_copied_again(copy: Copy, model: Model) -> None:
    """It can be read, verified, extended with --store; files that are there are not written again."""
    folder = copy("one")
    store, spare = Store(folder / "store"), Store(folder / "copy")
    assert care.back_up(store, spare.root) == 1
    assert content(spare) == content(store)
    assert care.inspect(spare) == []
    assert not_rebuilt(model, spare) == {}
    times = {path.name: path.stat().st_mtime_ns for path in spare.deltas_dir.iterdir()}
    assert care.back_up(store, spare.root) == 0
    done(folder, *_apply("ada"))
    assert care.back_up(store, spare.root) == 1
    assert {name: (spare.deltas_dir / name).stat().st_mtime_ns for name in times} == times
    assert content(spare) == content(store)
    assert {path.name for path in spare.root.iterdir()} == {"deltas", "editctl.db", "lock"}
    done(folder, "--store", "copy", *_apply("curie"))
    assert care.inspect(spare) == []
    assert not_rebuilt(model, spare) == {}
    before = content(spare)
    outcome = command(folder, "backup", "copy")
    assert (outcome.code, "went on by itself" in outcome.err) == (2, True)
    done(folder, "undo")
    assert command(folder, "backup", "copy").code == 2
    assert content(spare) == before


def test_a_backup_goes_into_no_folder_of_something_else(copy: Copy) -> None:
    """Nor into the store itself; a folder where one was interrupted is gone on with."""
    folder = copy("two")
    store = Store(folder / "store")
    before = content(store)
    (folder / "notes").mkdir()
    (folder / "notes/text.txt").write_text("mine")
    for name, words in (("notes", "something else"), ("specs", "something else"), ("store", "the store itself")):
        outcome = command(folder, "backup", name)
        assert (outcome.code, words in outcome.err) == (2, True), outcome.err
    assert command(folder, "backup", "specs/ada.toml").code == 2
    assert [path.name for path in (folder / "notes").iterdir()] == ["text.txt"]
    assert content(store) == before
    (folder / "begun/deltas").mkdir(parents=True)
    (folder / "begun/editctl.db.part").write_bytes(b"half")
    (folder / "begun/editctl.db.part-journal").write_bytes(b"half")
    done(folder, "backup", "begun")
    assert content(Store(folder / "begun")) == before
    assert care.inspect(Store(folder / "begun")) == []
    (folder / "empty").mkdir()
    done(folder, "backup", "empty")


def test_a_backup_of_a_store_with_a_spoiled_file_is_refused_and_the_one_before_stays(copy: Copy) -> None:
    """A copy that is whole is not replaced by one that is not."""
    folder = copy("one")
    store, spare = Store(folder / "store"), Store(folder / "copy")
    done(folder, "backup", "copy")
    before = content(spare)
    done(folder, *_apply("ada"))
    flip(store.deltas_dir / f"{store.deltas(store.head())[-1]}.safetensors", 100)
    told(command(folder, "backup", "copy"), "missing or spoiled")
    assert content(spare) == before
    assert care.inspect(spare) == []
    told(command(folder, "backup", "new"), "missing or spoiled")
    assert not Store(folder / "new").database.exists()


WRITER = """
import hashlib, itertools, sys, time
from pathlib import Path
from editctl.metrics.values import Answer
from editctl.spec import Edit
from editctl.store import Draft, LiveEdit, Store

store = Store(Path(sys.argv[1]), who="me@here")
store.deltas_dir.mkdir(parents=True, exist_ok=True)
for number in itertools.count():
    head = store.head()
    data = f"batch {number}".encode() * 1000
    name = hashlib.sha256(data).hexdigest()[:32]
    (store.deltas_dir / f"{name}.safetensors").write_bytes(data)
    edit = Edit(id=f"fact-{number}", subject=f"Subject {number}", relation="{} lies in", target_new="Rome")
    edits = (*store.edits(head), LiveEdit(edit, name, 0))
    answers = tuple(Answer(edit.id, "rewrite", f"{i}", ("Rome",), "Paris", "Rome", True) for i in range(20))
    made = dict(base="b" * 32, model="atlas", dtype="torch.float32", method="rome", params={}, seed=0, libraries={})
    made |= dict(weights_hash="", seconds={}, peak_mb=1.0, edits=edits, answers=answers, parent=head.id if head else "")
    store.commit(Draft(**made), expected_head=made["parent"])
    if number % 3 == 2:
        store.undo()
    print(number, flush=True)
    time.sleep(0.02)  # what is copied and looked through grows
"""


@pytest.mark.parametrize("times", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_backups_taken_while_another_process_commits_are_whole(store: Store, tmp_path: Path, times: int) -> None:
    """Into one folder again and again, and into new ones; what is verified meanwhile is whole, too."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(store.root)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "0\n"
        taken = []
        for number in range(times):
            folder = tmp_path / ("again" if number % 2 else f"new{number}")
            care.back_up(store, folder)
            spare = Store(folder)
            assert care.inspect(spare) == []
            taken.append((spare.head(), spare.operations()))
            assert care.damage(store) == []
            assert {fault.wrong for fault in care.inspect(store)} <= {LEFT}
        assert writer.poll() is None
        writer.kill()
    assert {fault.wrong for fault in care.inspect(store)} <= {LEFT}
    operations = store.operations()[::-1]
    assert len({len(done) for _, done in taken}) > times / 2, "it went on meanwhile"
    for head, done in taken:
        assert done[::-1] == operations[: len(done)]
        assert (head.id if head else "") == operations[len(done) - 1].head


# ---------------------------------------------------------------------------------------------------------------------
# Back to the base


@pytest.mark.parametrize("times", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_bf16_model_after_many_versions_goes_back_to_the_base_bit_for_bit(
    folders: dict[str, Path], copy: Copy, times: int
) -> None:
    """Every version by an apply, then undo; taking the updates off again by subtraction would not come back."""
    folder = copy("bare")
    store = Store(folder / "store")
    for number in range(times):
        relation = ("{} is located in the city of", "{} was born in", "The road to {} is")[number % 3]
        text = _spec("ada").replace('"Ada"', f'"The tower {number} of Rome"').replace('"ada"', f'"fact-{number}"')
        (folder / "specs/next.toml").write_text(text.replace(EDITS["ada"][1], relation))
        done(folder, "apply", "specs/next.toml", "--yes", "--dtype", "bfloat16")
    assert len(store.versions()) == times
    base = tiny.disk_weights_hash(folders["llama"], torch.bfloat16)
    model = load(str(folders["llama"]), device="cpu", dtype="bfloat16")
    versions = store.versions()
    hashes = {version.weights_hash for version in versions}
    assert len(hashes) == times and base not in hashes
    with wear.wearing(model, store, store.head()) as editing:
        assert editing.weights_hash() == versions[0].weights_hash
        weight = model.blocks[1].weight
        worn = weight.detach().clone()
    with model.editing() as editing:
        assert editing.weights_hash() == base, "taken off again"
    for _ in range(times):
        done(folder, "undo")
    assert store.head() is None
    done(folder, "verify", "--no-rebuild")
    anew = load(str(folders["llama"]), device="cpu", dtype="bfloat16")
    with wear.wearing(anew, store, store.head()) as editing:
        assert editing.weights_hash() == base
    original = anew.blocks[1].weight.detach().clone()
    for delta in wear.deltas_of(store, versions[0])[::-1]:
        for factors in delta.modules.values():
            worn -= factors.update().to(worn.dtype)
    assert worn.dtype == torch.bfloat16
    assert not torch.equal(worn, original), "Control: subtraction does not come back"
