"""The store: what was committed is found again, the head moves as jj's does, and one process writes at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from editctl import store as store_module
from editctl.errors import EditctlError, Exit, Locked, StalePlan, StoreError
from editctl.metrics.values import Answer, Metric
from editctl.spec import Edit
from editctl.store import Draft, LiveEdit, Operation, Store, Version

NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)


def an_edit(number: int = 0, **changes: Any) -> Edit:
    values = {"id": f"fact-{number}", "subject": f"Subject {number}", "relation": "{} lies in", "target_new": "Rome"}
    return Edit(**{**values, **changes})


def a_draft(parent: str = "", **changes: Any) -> Draft:
    values: dict[str, Any] = {
        "parent": parent,
        "base": "b" * 32,
        "model": "atlas",
        "dtype": "float32",
        "method": "alphaedit",
        "params": {"layers": [2, 3], "ridge": 0.5, "nested": {"on": True}},
        "seed": 7,
        "deltas": (),
        "weights_hash": "w" * 32,
        "libraries": {"torch": "2.13.0"},
        "seconds": {"solve": 0.25},
        "peak_mb": 812.5,
        "edits": (),
    }
    return Draft(**{**values, **changes})


def id_of(version: Version | None) -> str:
    return version.id if version else ""


def commit(store: Store, **changes: Any) -> Version:
    """Commit on top of the head."""
    head = id_of(store.head())
    return store.commit(a_draft(parent=head, **changes), expected_head=head)


def put_factor(store: Store, name: str) -> str:
    store.deltas_dir.mkdir(parents=True, exist_ok=True)
    (store.deltas_dir / f"{name}.safetensors").write_bytes(b"")
    return name


def on_disk(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below the folder with its content and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", now=lambda: NOON, who="ada@lab")


# What was committed is found again


def test_a_store_never_written_reads_as_empty_and_leaves_no_trace(store: Store) -> None:
    """Looking at nothing makes nothing."""
    assert store.head() is None
    assert store.versions() == []
    assert store.operations() == []
    assert store.aliases() == {}
    assert store.resolve("@") is None
    assert store.resolve("base") is None
    assert (store.edits(None), store.answers(None), store.metrics(None), store.events(None)) == ((), (), (), ())
    assert not store.root.exists()


@pytest.mark.parametrize("verb", ["undo", "redo", "restore", "set_alias"])
def test_moving_the_head_of_a_store_never_written_fails_and_leaves_no_trace(store: Store, verb: str) -> None:
    """A command in the wrong folder does not make a store there."""
    arguments = {"restore": ("base",), "set_alias": ("stable", "base")}.get(verb, ())

    with pytest.raises(StoreError, match="is empty") as caught:
        getattr(store, verb)(*arguments)
    assert "editctl apply" in caught.value.hint
    assert not store.root.exists()


def test_a_version_comes_back_as_it_was_drafted(store: Store) -> None:
    """Every field of the draft, who and when, from another Store object."""
    draft = a_draft(deltas=(put_factor(store, "d1"), put_factor(store, "d2")), note="naïve\0\N{SNOWMAN}")

    made = store.commit(draft, command="editctl apply", expected_head="")

    again = Store(store.root)
    assert again.head() == made
    assert again.versions() == [made]
    assert (made.created_at, made.who, len(made.id)) == ("2026-08-01T12:00:00+00:00", "ada@lab", 12)
    common = [name for name in Draft.__dataclass_fields__ if name in Version.__dataclass_fields__]
    assert {name: getattr(made, name) for name in common} == {name: getattr(draft, name) for name in common}
    description = f"version {made.id} with 0 edits"
    first = Operation(1, 0, "apply", "", made.id, made.created_at, "ada@lab", "editctl apply", 0, description)
    assert again.operations() == [first]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(allow_nan=False)
MAYBE = st.none() | NUMBER
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
ANSWERS = st.builds(Answer, TEXT, TEXT, TEXT, TEXTS, TEXT, TEXT, st.booleans(), MAYBE, MAYBE, MAYBE, MAYBE)
METRICS = st.builds(Metric, TEXT, TEXT, NUMBER, st.integers(0, 2**40), st.booleans())


@settings(max_examples=25, deadline=None)
@given(st.lists(ANSWERS, max_size=4), st.lists(METRICS, max_size=4), st.lists(TEXT, max_size=4))
def test_what_was_measured_and_heard_comes_back_exactly(
    answers: list[Answer], metrics: list[Metric], events: list[str]
) -> None:
    """Order, repetition, odd characters, infinities and every bit of a number survive."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))

        made = commit(store, answers=tuple(answers), metrics=tuple(metrics), events=tuple(events))

        assert store.answers(made) == tuple(answers)
        assert store.metrics(made) == tuple(metrics)
        assert store.events(made) == tuple(events)


def test_a_metric_that_is_not_a_number_comes_back_as_such(store: Store) -> None:
    """A mean over nothing is recorded, not dropped."""
    made = commit(store, metrics=(Metric("portability", "generated", math.nan, 0),))

    assert math.isnan(store.metrics(made)[0].value)


def test_edits_come_back_in_order_and_their_text_is_kept_once(store: Store) -> None:
    """Versions share the text of the edits they share; equal edits in one version stay two."""
    one = LiveEdit(an_edit(1, note="Ĝis!", tags=("a",)), put_factor(store, "d1"), 0)
    two = LiveEdit(an_edit(2), "d1", 1)
    twin = LiveEdit(an_edit(1, note="Ĝis!", tags=("a",)), put_factor(store, "d2"), 0)

    first = commit(store, edits=(two, one))
    second = commit(store, edits=(two, one, twin))

    assert store.edits(first) == (two, one)
    assert store.edits(second) == (two, one, twin)
    with sqlite3.connect(store.database) as db:
        assert db.execute("select count(*), min(weights_fingerprint) from edits").fetchone()[0] == 2


def test_the_same_draft_at_the_same_time_makes_another_version(store: Store) -> None:
    """Apply, undo, apply again within one tick of the clock: two versions, one content."""
    first = commit(store)
    store.undo()
    second = commit(store)

    assert first.id != second.id
    assert replace(first, id="") == replace(second, id="")
    assert store.versions() == [second, first]


# What lies beside the database


def put_tensors(path: Path, about: dict[str, Any], *names: str, size: int = 4) -> int:
    """A safetensors file of editctl's with these tensors, `size` bytes each; its size."""
    places = {
        n: {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i, n in enumerate(names)
    }
    head = json.dumps({"__metadata__": {"editctl": json.dumps(about)}, **places}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size * len(names)))
    return path.stat().st_size


THIN = ("m.keys", "m.residuals", "m.factor")
OF_KIND = {"thin": (*THIN, "m.left", "m.right"), "sparse": (*THIN, "m.mask"), "dense": (*THIN, "m.dense")}


@pytest.mark.parametrize(
    "kinds", [(), ("thin",), ("sparse",), ("dense",), ("thin", "thin"), ("thin", "sparse", "dense")], ids="+".join
)
def test_a_versions_footprint_is_that_of_its_factor_files(store: Store, kinds: tuple[str, ...]) -> None:
    """Their bytes, and the kinds of update in them, each once; files of other versions do not count."""
    names = [f"{i}{kind}" for i, kind in enumerate(kinds)]
    sizes = [
        put_tensors(store.deltas_dir / f"{name}.safetensors", {"format": 1}, *OF_KIND[kind], size=100 * (i + 1))
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    put_tensors(store.deltas_dir / "other.safetensors", {"format": 1}, *OF_KIND["dense"])
    version = commit(store, deltas=tuple(names))
    assert store.footprint(version) == (sum(sizes), tuple(sorted(set(kinds))))
    if kinds:
        (store.deltas_dir / f"{names[0]}.safetensors").unlink()
        assert store.footprint(version)[0] == sum(sizes[1:]), "a missing file has no size"


def test_the_second_moments_of_one_model_are_listed_by_block(store: Store) -> None:
    """What each says of itself; those of other models, unfinished ones and files that are none are left out."""
    assert store.measured("mine") == []
    about = [
        {"base": base, "layer": layer, "seen": 10 * layer} for base, layer in (("mine", 10), ("other", 1), ("mine", 2))
    ]
    for i, one in enumerate(about):
        put_tensors(store.stats_dir / f"{i}.safetensors", one, "basis", "eigenvalues")
    put_tensors(store.stats_dir / "9.part.safetensors", about[0] | {"layer": 5}, "0.0")
    (store.stats_dir / "torn.safetensors").write_bytes((store.stats_dir / "0.safetensors").read_bytes()[:40])
    (store.stats_dir / "huge.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (store.stats_dir / "empty.safetensors").write_bytes(b"")
    foreign = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (store.stats_dir / "foreign.safetensors").write_bytes(len(foreign).to_bytes(8, "little") + foreign)
    assert store.measured("mine") == [about[2], about[0]]
    assert store.measured("other") == [about[1]]
    assert store.measured("") == []


# Moving the head


class HeadMachine(RuleBasedStateMachine):
    """The store against a list of heads with a cursor, the way a text editor undoes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder, who="ada@lab")
        self.heads = [""]
        self.cursor = 0
        self.made: list[Version] = []
        self.log = [""]
        """The head after every operation; its index is the operation's id."""

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _new_line(self, head: str) -> None:
        self.heads[self.cursor + 1 :] = [head]
        self._moved(1)

    def _moved(self, step: int) -> None:
        self.cursor += step
        self.log.append(self.heads[self.cursor])

    @rule()
    def apply(self) -> None:
        self.made.append(commit(self.store))
        self._new_line(self.made[-1].id)

    @rule()
    def undo(self) -> None:
        if self.cursor == 0:
            with pytest.raises(StoreError, match=r"nothing to undo|is empty"):
                self.store.undo()
            return
        self.store.undo()
        self._moved(-1)

    @rule()
    def redo(self) -> None:
        if self.cursor == len(self.heads) - 1:
            with pytest.raises(StoreError, match=r"nothing to redo|is empty"):
                self.store.redo()
            return
        self.store.redo()
        self._moved(1)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        ids = ["base", *(version.id for version in self.made)]
        operations = [f"op:{n}" for n in range(1, len(self.log))]
        ref = data.draw(st.sampled_from(ids + operations))
        head = self.log[int(ref[3:])] if ref in operations else ref.removeprefix("base")
        if head == self.heads[self.cursor]:
            with pytest.raises(StoreError, match="already"):
                self.store.restore(ref)
            return
        self.store.restore(ref)
        self._new_line(head)

    @rule()
    def restart(self) -> None:
        self.store = Store(self.folder, who="ada@lab")

    @invariant()
    def the_head_is_where_the_cursor_is(self) -> None:
        assert id_of(self.store.head()) == self.heads[self.cursor]

    @invariant()
    def the_log_is_a_chain_and_nothing_is_lost(self) -> None:
        operations = self.store.operations()[::-1]
        assert [operation.head for operation in operations] == self.log[1:]
        assert [operation.head_before for operation in operations] == self.log[:-1]
        assert [operation.id for operation in operations] == list(range(1, len(self.log)))
        assert [operation.parent for operation in operations] == list(range(len(self.log) - 1))
        assert self.store.versions() == self.made[::-1]


HeadMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestHead = HeadMachine.TestCase


def test_undo_and_redo_say_what_they_took_back(store: Store) -> None:
    """An undo names the operation, a redo the undo; a second undo goes further back instead of undoing the first."""
    first, second = commit(store), commit(store)

    moves = [store.undo(), store.undo("editctl undo"), store.redo(), store.redo(), store.undo()]

    assert [(move.id, move.verb, move.undoes) for move in moves] == [
        (3, "undo", 2),
        (4, "undo", 1),
        (5, "redo", 4),
        (6, "redo", 3),
        (7, "undo", 2),
    ]
    assert [move.head for move in moves] == [first.id, "", first.id, second.id, first.id]
    assert (moves[1].command, moves[1].description) == ("editctl undo", "undid operation 1 (apply)")
    assert store.operations(limit=2) == [moves[4], moves[3]]


def test_an_operation_after_an_undo_starts_a_new_line(store: Store) -> None:
    """Redo then fails with the way out; undo jumps over what was undone before; nothing is lost."""
    first, second = commit(store), commit(store)
    store.undo()
    commit(store)

    with pytest.raises(StoreError, match="nothing to redo") as caught:
        store.redo()
    assert "editctl restore" in caught.value.hint
    assert store.undo().head == first.id
    assert store.undo().head == ""
    assert store.restore("op:2").head == second.id


def test_undoing_at_the_beginning_fails_and_points_forward(store: Store) -> None:
    commit(store)
    store.undo()

    with pytest.raises(StoreError, match="nothing to undo") as caught:
        store.undo()
    assert "editctl redo" in caught.value.hint
    assert len(store.operations()) == 2


def test_restoring_what_is_there_already_keeps_what_can_be_redone(store: Store) -> None:
    """Were it recorded, the line of undone operations would end for nothing."""
    first, second = commit(store), commit(store)
    store.undo()

    with pytest.raises(StoreError, match=f"at {first.id} already"):
        store.restore("op:1")
    assert store.redo().head == second.id


@pytest.mark.parametrize("ref", ["op:9", "op:0", "op:", "op:-1"])
def test_restoring_an_operation_that_is_not_there_fails(store: Store, ref: str) -> None:
    commit(store)

    with pytest.raises(StoreError) as caught:
        store.restore(ref)
    assert caught.value.hint
    assert len(store.operations()) == 1


# Refs


def test_every_kind_of_ref_names_its_version(store: Store) -> None:
    """`@-` walks the versions below the head, not the operations."""
    first, second, third = commit(store), commit(store), commit(store)
    store.set_alias("stable", "@-")
    store.set_alias("clean", "base")
    store.undo()
    store.redo()

    assert store.resolve("@") == store.resolve("@-0") == third
    assert store.resolve("@-") == store.resolve("@-1") == second
    assert store.resolve("@-2") == first
    assert store.resolve("@-3") is None
    assert store.resolve("base") is None
    assert store.resolve(second.id) == store.resolve(second.id[:6]) == store.resolve(second.id.upper()) == second
    assert store.resolve("stable") == second
    assert store.resolve("clean") is None
    assert store.aliases() == {"clean": "", "stable": second.id}


def test_an_alias_moves(store: Store) -> None:
    first = commit(store)
    store.set_alias("stable", "@")
    second = commit(store)
    assert store.resolve("stable") == first

    store.set_alias("stable", "@")

    assert store.resolve("stable") == second


@pytest.mark.parametrize("name", ["", "@", "base", "op:1", "-x", "a b", "cafe", "ABCD12", "x" * 65, "\x1b[31m"])
def test_a_name_that_could_be_another_ref_is_no_alias(store: Store, name: str) -> None:
    commit(store)

    with pytest.raises(StoreError, match="cannot be an alias") as caught:
        store.set_alias(name, "@")
    assert caught.value.hint
    assert store.aliases() == {}


@pytest.mark.parametrize(
    ("ref", "message", "hint"),
    [
        ("@-3", "goes beyond base", "`@-2`"),
        ("@-999999", "goes beyond base", "`@-2`"),
        ("@-" + "9" * 5000, "neither a version nor an alias", "editctl log"),
        ("@@", "neither a version nor an alias", ""),
        ("", "neither a version nor an alias", "editctl log"),
        ("stabel", "neither a version nor an alias", "did you mean `stable`?"),
        ("bse", "neither a version nor an alias", "`base`"),
        ("abc", "too short", "4 digits"),
        ("%%%%", "neither a version nor an alias", "editctl log"),
    ],
)
def test_a_ref_that_names_nothing_says_so_and_what_would(store: Store, ref: str, message: str, hint: str) -> None:
    commit(store)
    commit(store)
    store.set_alias("stable", "@")

    with pytest.raises(StoreError, match=message) as caught:
        store.resolve(ref)
    assert hint in caught.value.hint


def test_below_base_there_is_nothing(store: Store) -> None:
    with pytest.raises(StoreError, match="goes beyond base") as caught:
        store.resolve("@-")
    assert "`@`" in caught.value.hint


def test_an_unknown_version_names_the_nearest(store: Store) -> None:
    version = commit(store)
    last = "0" if version.id[-1] != "0" else "1"

    with pytest.raises(StoreError, match="no version begins with") as caught:
        store.resolve(version.id[:-1] + last)
    assert version.id in caught.value.hint


def test_an_ambiguous_prefix_lists_the_candidates(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits come from a stand-in for the hash; one digit more tells the versions apart."""
    digests = iter(["abcd1" + "0" * 7, "abcd2" + "0" * 7, "ffff" + "0" * 8])
    monkeypatch.setattr(store_module, "_digest", lambda value: next(digests))
    one, two, _ = commit(store), commit(store), commit(store)

    with pytest.raises(StoreError, match="`abcd` begins 2 versions") as caught:
        store.resolve("abcd")
    assert one.id in caught.value.hint
    assert two.id in caught.value.hint
    assert "ffff" not in caught.value.hint
    assert store.resolve("abcd2") == two


# A commit is all or nothing


def test_a_commit_for_another_head_is_refused_as_stale(store: Store) -> None:
    first = commit(store)

    with pytest.raises(StalePlan, match=f"the head is {first.id}, but this was made for base") as caught:
        store.commit(a_draft(), expected_head="")
    assert caught.value.exit_code == Exit.STALE
    assert "editctl plan" in caught.value.hint
    assert store.versions() == [first]


@pytest.mark.parametrize("where", ["deltas", "edits"])
def test_a_commit_that_names_a_missing_factor_file_is_refused(store: Store, where: str) -> None:
    """And is accepted once the file is there."""
    both: dict[str, dict[str, Any]] = {
        "deltas": {"deltas": ("d1",)},
        "edits": {"edits": (LiveEdit(an_edit(), "d1", 0),)},
    }
    changes = both[where]

    with pytest.raises(StoreError, match=r"d1\.safetensors is missing") as caught:
        commit(store, **changes)
    assert caught.value.hint
    assert store.versions() == []

    put_factor(store, "d1")
    assert commit(store, **changes) == store.head()


def test_a_commit_on_an_unknown_parent_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="parent version 123456789abc"):
        store.commit(a_draft(parent="123456789abc"), expected_head="")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_commit_leaves_nothing_visible(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """The last statement of the transaction fails, after all others wrote; the lock is free afterwards."""
    kept = commit(store)
    before = Store(store.root).operations()
    full: dict[str, Any] = {
        "edits": (LiveEdit(an_edit(), put_factor(store, "d1"), 0),),
        "answers": (Answer("fact-0", "rewrite", "p", ("Rome",), "Paris", "Rome", True),),
        "metrics": (Metric("reliability", "generated", 1.0, 1),),
        "events": ('{"type": "note"}',),
    }

    def interrupted(self: Store, db: Any, *arguments: Any, **options: Any) -> Operation:
        assert db["versions"].count == 2
        assert db["events"].count == 1
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_record", interrupted)
        with pytest.raises(error):
            commit(store, **full)

    assert store.versions() == [kept]
    assert store.operations() == before
    with sqlite3.connect(store.database) as db:
        for table in ("edits", "version_edits", "answers", "metrics", "events"):
            assert db.execute(f"select count(*) from {table}").fetchone() == (0,), table
    assert store.edits(commit(store, **full)) == full["edits"]


def test_a_reader_sees_the_old_state_during_an_open_transaction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not wait for the writer."""
    first = commit(store)
    record = Store._record
    seen: list[Version | None] = []

    def record_and_look(self: Store, db: Any, *arguments: Any, **options: Any) -> Operation:
        operation = record(self, db, *arguments, **options)
        assert db["versions"].count == 2
        seen.append(Store(store.root, readonly=True).head())
        return operation

    monkeypatch.setattr(Store, "_record", record_and_look)
    second = commit(store)

    assert seen == [first]
    assert store.head() == second


def test_any_thread_may_call(store: Store) -> None:
    """A TUI reads and undoes from workers."""
    first = commit(store)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.extend([store.head(), store.undo().head, store.head()]))
    thread.start()
    thread.join()

    assert results == [first, "", None]


# The lock


HOLD = """
import sys, time
from pathlib import Path
from editctl.store import Store
with Store(Path(sys.argv[1]), who="alice@host").lock("apply"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold() -> Iterator[Any]:
    """Hold a store's lock in another process."""
    running: list[subprocess.Popen[str]] = []

    def start(store: Store, seconds: float = 60) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(store.root), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_lock_held_by_another_process_names_its_holder(store: Store, hold: Any) -> None:
    """No writer gets in, every reader does; killing the holder frees the lock although its note stays behind."""
    first = commit(store)
    process = hold(store)

    for write in (store.undo, store.redo, lambda: commit(store), lambda: store.set_alias("x", "@")):
        with pytest.raises(Locked, match=rf"`apply` of alice@host \(pid {process.pid}\) since 20") as caught:
            write()
    assert caught.value.exit_code == Exit.LOCKED
    assert "--lock-timeout" in caught.value.hint
    assert store.head() == first

    process.kill()
    process.wait()
    assert json.loads((store.root / "lock.json").read_text())["pid"] == process.pid
    with store.lock("undo"):
        assert json.loads((store.root / "lock.json").read_text()) == {
            "id": json.loads((store.root / "lock.json").read_text())["id"],
            "verb": "undo",
            "who": "ada@lab",
            "pid": os.getpid(),
            "since": "2026-08-01T12:00:00+00:00",
        }
    assert not (store.root / "lock.json").exists()


def test_waiting_for_the_lock_gets_it_once_it_is_free(store: Store, hold: Any) -> None:
    """With a timeout long enough; a short one gives up."""
    hold(store, 0.5)

    with pytest.raises(Locked), store.lock("apply", timeout=0.01):
        pass
    with store.lock("apply", timeout=30):
        commit(store)


def test_the_holder_writes_under_its_own_lock_and_keeps_it(store: Store) -> None:
    """A run takes the lock once and commits inside; another Store on the folder stays out until it ends."""
    with store.lock("apply"):
        first = commit(store)
        with pytest.raises(Locked, match="`apply` of ada@lab"):
            Store(store.root).undo()
        store.set_alias("stable", "@")

    assert Store(store.root).undo().head_before == first.id


def test_the_lock_belongs_to_the_thread_that_took_it(store: Store) -> None:
    """Another thread with the same Store is another writer."""
    commit(store)
    caught: list[EditctlError] = []

    def write() -> None:
        try:
            store.undo()
        except EditctlError as error:
            caught.append(error)

    with store.lock("apply"):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    assert [type(error) for error in caught] == [Locked]


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", "\x00"])
def test_a_holder_that_has_not_said_who_it_is_is_another_process(store: Store, note: str) -> None:
    with store.lock("apply"):
        (store.root / "lock.json").write_text(note)
        with pytest.raises(Locked, match="another process"):
            commit(Store(store.root))


def test_an_exception_under_the_lock_frees_it(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.lock("apply"):
        raise ZeroDivisionError

    commit(Store(store.root))


# Trouble with the files


def writers(store: Store) -> list[Any]:
    return [
        lambda: store.commit(a_draft(), expected_head=""),
        store.undo,
        store.redo,
        lambda: store.restore("base"),
        lambda: store.set_alias("x", "base"),
        lambda: store.lock("apply").__enter__(),
    ]


def test_a_readonly_store_refuses_to_write_and_leaves_the_disk_alone(store: Store) -> None:
    """Reading changes no byte and leaves no file behind, whether or not the folder can be written."""
    put_factor(store, "d1")
    made = commit(store, edits=(LiveEdit(an_edit(), "d1", 0),))
    before = on_disk(store.root)
    readonly = Store(store.root, readonly=True)

    assert readonly.head() == made
    assert readonly.edits(made)[0].column == 0
    for write in writers(readonly):
        with pytest.raises(StoreError, match="read-only") as caught:
            write()
        assert "open it for writing" in caught.value.hint
    assert on_disk(store.root) == before


def test_a_readonly_store_never_written_stays_unwritten(tmp_path: Path) -> None:
    readonly = Store(tmp_path / "none", readonly=True)

    for write in writers(readonly):
        with pytest.raises(StoreError, match="read-only"):
            write()
    assert readonly.versions() == []
    assert not readonly.root.exists()


def test_a_folder_that_cannot_be_written_is_read_without_helper_files(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for the time of reading; and with a writer at work what it committed is seen."""
    made = commit(store)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    listed = sorted(os.listdir(store.root))

    with store._reading() as db:
        assert db["versions"].count == 1
        assert sorted(os.listdir(store.root)) == listed

    writer = sqlite3.connect(store.database)
    writer.execute("update versions set note = 'from the log beside the file'")
    writer.commit()
    assert store.database.with_name("editctl.db-wal").exists()
    assert store.head() == replace(made, note="from the log beside the file")
    writer.close()


def test_reading_cannot_write(store: Store) -> None:
    """The walls of the room hold even for a mistake inside it."""
    commit(store)

    with pytest.raises(StoreError, match="cannot be written"), store._reading() as db:
        db["aliases"].insert({"name": "x", "version": ""})


@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_that_is_no_database_is_an_error_with_a_remedy(store: Store, readonly: bool) -> None:
    store.root.mkdir()
    store.database.write_bytes(b"this is not a database, it is a text file" * 100)
    opened = Store(store.root, readonly=readonly)

    calls = [opened.head, opened.versions, lambda: opened.resolve("@")] + ([] if readonly else writers(opened)[:-1])
    for call in calls:
        with pytest.raises(StoreError, match="is not an SQLite database") as caught:
            call()
        assert "backup" in caught.value.hint


def test_a_torn_database_is_an_error_with_a_remedy(store: Store) -> None:
    """Half of the pages overwritten."""
    commit(store, events=tuple("x" * 1000 for _ in range(50)))
    data = store.database.read_bytes()
    store.database.write_bytes(data[: len(data) // 8] + b"\xff" * (len(data) * 7 // 8))

    with pytest.raises(StoreError, match="is damaged") as caught:
        store.versions()
        store.operations()
    assert "backup" in caught.value.hint


def test_an_empty_database_file_reads_as_empty_and_can_be_written(store: Store) -> None:
    """What a crash between making the file and filling it leaves."""
    store.root.mkdir()
    store.database.touch()
    assert store.versions() == []
    with pytest.raises(StoreError, match="nothing to undo"):
        store.undo()
    with pytest.raises(StoreError, match="no operation 1"):
        store.restore("op:1")

    assert commit(store) == store.head()


def test_a_store_of_a_newer_editctl_asks_for_an_upgrade(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither read nor written; what this editctl knows is not overwritten."""
    commit(store)
    with sqlite3.connect(store.database) as db:
        db.execute("insert into _sqlite_migrations values (99, 'editctl', 'm099_later', '2030-01-01')")
    before = store.database.read_bytes()

    for call in (store.head, store.versions, *writers(store)[:-1]):
        with pytest.raises(StoreError, match=r"newer editctl \(it has m099_later\)") as caught:
            call()
        assert "upgrade editctl" in caught.value.hint
    assert store.database.read_bytes() == before


def test_a_store_where_a_file_lies_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")

    with pytest.raises(StoreError, match="cannot be written") as caught:
        commit(Store(tmp_path / "taken"))
    assert caught.value.hint
    with pytest.raises(StoreError, match="cannot be written"):
        commit(Store(tmp_path / "taken" / "below"))


def test_tables_are_strict_and_in_wal_mode(store: Store) -> None:
    """A number in a text column is refused by the file itself."""
    commit(store)
    with sqlite3.connect(store.database) as db:
        assert db.execute("pragma journal_mode").fetchone() == ("wal",)
        with pytest.raises(sqlite3.IntegrityError, match="TEXT value in INTEGER"):
            db.execute("update versions set seed = 'seven'")


def test_importing_the_store_loads_neither_its_libraries_nor_torch() -> None:
    """sqlite_utils alone costs a quarter of a second."""
    code = "import sys, editctl.store; print({'sqlite_utils', 'filelock', 'torch', 'rich'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
