"""The store: what was committed is found again, the head moves as jj's does, and one process writes at a time."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from editctl.errors import EditctlError, Exit, Locked, StalePlan, StoreError
from editctl.metrics.values import Answer, Metric
from editctl.spec import Edit
from editctl.store import CANDIDATE, Draft, Fault, LiveEdit, Operation, Store, Stored, Version, View, care
from editctl.store.schema import version_seal

NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)
FAST = next((folder for folder in ("/dev/shm",) if Path(folder).is_dir()), None)
"""Where stores of many commits lie: in memory where that can be had, for a commit waits for the disk."""


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
        "weights_hash": "w" * 32,
        "libraries": {"torch": "2.13.0"},
        "seconds": {"solve": 0.25},
        "peak_mb": 812.5,
        "norms": {"model.layers.2.mlp.down_proj": (0.1, 31.25)},
        "gates": {"reliability": 0.95},
        "edits": (),
    }
    return Draft(**{**values, **changes})


def id_of(version: Version | None) -> str:
    return version.id if version else ""


def commit(store: Store, on: str | None = None, **changes: Any) -> Version:
    """Commit on top of the head, or on another version."""
    head = id_of(store.head())
    how = {name: changes.pop(name) for name in ("hold", "instead_of", "without", "note", "verb") if name in changes}
    return store.commit(a_draft(parent=head if on is None else on, **changes), expected_head=head, **how)


def live(store: Store, number: int, delta: str, column: int = 0, **changes: Any) -> LiveEdit:
    """An edit and the place of its column in a factor file that is there."""
    return LiveEdit(an_edit(number, **changes), put_factor(store, delta), column)


def contents(lives: Sequence[LiveEdit]) -> list[tuple[Edit, str, int]]:
    """Live edits read whole, so that those of a draft compare with those of the store."""
    return [(live.edit, live.delta, live.column) for live in lives]


def put_factor(store: Store, name: str) -> str:
    store.deltas_dir.mkdir(parents=True, exist_ok=True)
    (store.deltas_dir / f"{name}.safetensors").write_bytes(b"")
    return name


def rows_of(store: Store, table: str) -> int:
    """How many rows a table has."""
    with closing(sqlite3.connect(store.database)) as db:
        found: tuple[int] = db.execute(f"select count(*) from {table}").fetchone()
    return found[0]


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
    assert store.view() == View()
    assert store.resolve("@") is None
    assert store.resolve("base") is None
    assert (store.edits(None), store.deltas(None), store.answers(None)) == ((), (), ())
    assert (store.metrics(None), store.events(None), store.last_answers(None, ["fact-0"])) == ((), (), ())
    assert care.inspect(store) == []
    assert not store.root.exists()


@pytest.mark.parametrize("verb", ["undo", "redo", "restore", "set_alias", "accept", "reject"])
def test_moving_the_head_of_a_store_never_written_fails_and_leaves_no_trace(store: Store, verb: str) -> None:
    """A command in the wrong folder does not make a store there."""
    arguments = {"restore": ("base",), "set_alias": ("stable", "base")}.get(verb, ())

    with pytest.raises(StoreError, match="is empty") as caught:
        getattr(store, verb)(*arguments)
    assert "editctl apply" in caught.value.hint
    assert not store.root.exists()


def test_a_version_comes_back_as_it_was_drafted(store: Store) -> None:
    """Every field of the draft, who and when, from another Store object."""
    draft = a_draft(edits=(live(store, 1, "d2"), live(store, 2, "d1")))

    made = store.commit(draft, command="editctl apply", note="naïve\0\N{SNOWMAN}", expected_head="")

    again = Store(store.root)
    assert again.head() == made
    assert again.versions() == [made]
    assert (made.created_at, made.who, len(made.id)) == ("2026-08-01T12:00:00+00:00", "ada@lab", 12)
    common = [name for name in Draft.__dataclass_fields__ if name in Version.__dataclass_fields__]
    assert {name: getattr(made, name) for name in common} == {name: getattr(draft, name) for name in common}
    assert {"norms", "gates", "params", "parent", "weights_hash"} <= set(common)
    assert contents(again.edits(made)) == contents(draft.edits) and again.deltas(made) == ("d2", "d1")
    description, words = f"version {made.id} with 2 edits", "naïve\0\N{SNOWMAN}"
    told = (made.created_at, "ada@lab", "editctl apply", 0, description, words, made.id)
    assert again.operations() == [Operation(1, 0, "apply", "", made.id, *told)]


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
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
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
    one = live(store, 1, "d1", note="Ĝis!", tags=("a",))
    two = live(store, 2, "d1", 1)
    twin = live(store, 1, "d2", note="Ĝis!", tags=("a",))

    first = commit(store, edits=(two, one))
    second = commit(store, edits=(two, one, twin))

    assert contents(store.edits(first)) == contents((two, one))
    assert contents(store.edits(second)) == contents((two, one, twin))
    assert rows_of(store, "edits") == 2


def test_what_a_plan_asks_of_an_edit_is_known_without_reading_it(store: Store) -> None:
    """A hundred thousand are compared with the specs before a run; the edit itself is only text until it is wanted."""
    edit = an_edit(1, relation="Where {} lies is", note="n")
    version = commit(store, edits=(LiveEdit(edit, put_factor(store, "d1"), 0),))

    (found,) = store.edits(version)

    assert (found.known.id, found.known.prompt) == ("fact-1", "Where Subject 1 lies is")
    assert found.known.weights_fingerprint == edit.weights_fingerprint
    assert found.known.notes_fingerprint == edit.notes_fingerprint
    assert isinstance(found.known, Stored) and found.known.text.startswith("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Edit, "from_json", lambda data: pytest.fail("read whole"))
        assert [one.known for one in Store(store.root).edits(version)] == [found.known]
    assert found.edit == edit


def test_the_same_draft_at_the_same_time_makes_another_version(store: Store) -> None:
    """Apply, undo, apply again within one tick of the clock: two versions, one content."""
    first = commit(store)
    store.undo()
    second = commit(store)

    assert first.id != second.id
    assert replace(first, id="") == replace(second, id="")
    assert store.versions() == [second, first]


# What a version shares with those below it


def test_a_chain_that_only_adds_keeps_one_row_an_edit(store: Store) -> None:
    """Not one for each version that the edit lives through; every version is read whole all the same."""
    lives = [live(store, n, f"d{n // 2}", n % 2) for n in range(6)]
    made = [commit(store, edits=tuple(lives[: n + 1])) for n in range(6)]

    assert rows_of(store, "version_edits") == 6
    for n, version in enumerate(made):
        assert contents(store.edits(version)) == contents(lives[: n + 1])
        assert store.deltas(version) == ("d0", "d1", "d2")[: n // 2 + 1]
    # Control: where the first place is another, none of the parent's rows can stand for the version's.
    commit(store, edits=(*lives[1:], lives[0]))
    assert rows_of(store, "version_edits") == 6 + 6


def changed(store: Store, lives: Sequence[LiveEdit], how: str) -> tuple[LiveEdit, ...]:
    """What five live edits become, two of them in each of the first two files."""
    moved = [one._replace(delta=put_factor(store, "d9")) for one in lives]
    return {
        "nothing changes": tuple(lives),
        "one is added": (*lives, live(store, 9, "d9")),
        "the last is dropped": tuple(lives[:-1]),
        "the middle one is dropped": (*lives[:2], moved[3], *lives[4:]),
        "the first is dropped": (*moved[1:],),
        "all are dropped": (),
        "the second is measured again": (lives[0], live(store, 1, "d0", 1, note="seen"), *lives[2:]),
        "the last lies elsewhere": (*lives[:4], lives[4]._replace(column=1)),
    }[how]


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("nothing changes", 0),
        ("one is added", 1),
        ("the last is dropped", 0),
        ("the middle one is dropped", 2),
        ("the first is dropped", 4),
        ("all are dropped", 0),
        ("the second is measured again", 4),
        ("the last lies elsewhere", 1),
    ],
)
def test_a_version_keeps_the_places_from_the_first_that_differs(store: Store, how: str, rows: int) -> None:
    """Also where the next one is back at what was before; no version below is touched."""
    lives = [live(store, n, f"d{n // 2}", n % 2) for n in range(5)]
    wanted = changed(store, lives, how)
    first = commit(store, edits=tuple(lives))

    second = commit(store, edits=wanted)

    assert rows_of(store, "version_edits") == 5 + rows
    third = commit(store, edits=tuple(lives))
    assert contents(store.edits(second)) == contents(wanted)
    assert store.deltas(second) == tuple(dict.fromkeys(one.delta for one in wanted))
    assert contents(store.edits(first)) == contents(store.edits(third)) == contents(lives)


def test_branches_keep_what_they_share_in_the_version_below(store: Store) -> None:
    """An undo and another apply: both branches stand on the same rows."""
    lives = [live(store, n, "d0", n) for n in range(4)]
    below = commit(store, edits=tuple(lives[:2]))
    left = commit(store, edits=tuple(lives[:3]))
    store.undo()
    right = commit(store, edits=(*lives[:2], lives[3]))

    assert rows_of(store, "version_edits") == 4
    assert left.parent == right.parent == below.id
    assert contents(store.edits(left)) == contents(lives[:3])
    assert contents(store.edits(right)) == contents([*lives[:2], lives[3]])


PLACED = st.tuples(st.integers(0, 4), st.sampled_from(["", "n"]), st.integers(0, 3), st.integers(0, 1))
"""Number and note of an edit, the file and the column it lies in."""
STEPS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 6), st.lists(PLACED, max_size=3), st.sets(st.integers(0, 4))),
    min_size=1,
    max_size=8,
)
"""For each version: which one it stands on, how many of its first edits it keeps, what follows, which are asked."""


@settings(max_examples=20, deadline=None)
@given(STEPS)
def test_every_version_of_a_tree_is_read_back_as_it_was_made(steps: list[Any]) -> None:
    """Edits, factor files and last answers, against lists that share nothing; and no row that a parent has is kept."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        store = Store(Path(folder))
        trees: list[tuple[Version | None, list[LiveEdit], dict[str, list[Answer]]]] = [(None, [], {})]
        rows = 0
        for number, (on, keep, more, asked) in enumerate(steps):
            parent, above, said = trees[on % len(trees)]
            lives = above[:keep] + [live(store, n, f"d{file}", column, note=note) for n, note, file, column in more]
            kinds = ("rewrite", "paraphrase")[: 1 + number % 2]
            fresh = {f"fact-{n}": [an_answer(f"fact-{n}", kind, str(number)) for kind in kinds] for n in sorted(asked)}
            answers = tuple(answer for some in fresh.values() for answer in some)
            version = commit(store, on=id_of(parent), edits=tuple(lives), answers=answers, hold="no")
            trees.append((version, lives, {**said, **fresh}))
            same = [a == b for a, b in zip(contents(above), contents(lives), strict=False)]
            rows += len(lives) - (same.index(False) if False in same else len(same))
        assert rows_of(store, "version_edits") == rows
        for number, (made, lives, said) in enumerate(trees):
            assert contents(store.edits(made)) == contents(lives)
            assert made is None or store.count(made) == len(lives)
            other, others, _ = trees[number // 2]
            texts, known = ([one.edit for one in side] for side in (lives, others))
            here, there = store.differing(made, other)
            assert contents(here) == contents([one for one in lives if one.edit not in known])
            assert contents(there) == contents([one for one in others if one.edit not in texts])
            assert store.deltas(made) == tuple(dict.fromkeys(one.delta for one in lives))
            names = ["fact-0", "fact-2", "fact-4"]
            wanted = {name: some for name, some in said.items() if name in names}
            found: dict[str, list[Answer]] = {}
            for answer in store.last_answers(made, names):
                found.setdefault(answer.edit, []).append(answer)
            assert found == wanted


def test_what_differs_between_versions_is_what_one_of_them_has_as_it_is(store: Store) -> None:
    """Where it lies does not count, a note does; the unedited model has nothing."""
    lives = [live(store, n, "d0", n) for n in range(3)]
    noted = live(store, 1, "d0", 1, note="seen")
    first = commit(store, edits=tuple(lives))
    second = commit(store, edits=(live(store, 2, "d7"), noted, live(store, 4, "d7", 1)))

    before, after = store.differing(first, second)
    assert [one.edit for one in before] == [lives[0].edit, lives[1].edit]
    assert contents(after) == contents([noted, live(store, 4, "d7", 1)])
    assert store.differing(second, first) == (after, before)
    assert store.differing(first, first) == ((), ())
    assert store.differing(None, first) == ((), store.edits(first))
    assert (store.count(first), store.count(second)) == (3, 3)


def test_a_comparison_has_facts_answers_metrics_and_norms_of_both_sides(store: Store) -> None:
    """What was said is the old version's, or what was said before the edit was first applied; alike is left out."""
    said = [Answer("fact-0", "rewrite", "p", ("Rome",), "Paris", after, True) for after in ("Rome", "Oslo", "Rome")]
    kept = Answer("fact-1", "rewrite", "q", ("Rome",), "Paris", "Bern", False)
    late = Answer("fact-2", "rewrite", "r", ("Rome",), "Paris", "Rome", True)
    same = Answer("fact-2", "locality", "s", (), "Paris", "Paris", True)
    metrics = tuple(Metric("reliability", "generated", value, 2) for value in (0.5, 1.0))
    norms = tuple({"module": (size, 9.0)} for size in (1.0, 2.0))
    lives = [live(store, n, "d0", n) for n in range(3)]
    noted = live(store, 1, "d0", 1, note="seen")
    first = commit(store, edits=lives[:2], answers=(said[0], kept), metrics=metrics[:1], norms=norms[0])
    second = commit(
        store, edits=(noted, lives[2]), answers=(said[1], kept, late, same), metrics=metrics[1:], norms=norms[1]
    )

    found = store.compare(first, second)
    assert (found.old, found.new) == (first, second)
    assert [[one.whole for one in side.values()] for side in found.facts] == [
        [lives[0].edit, lives[1].edit],
        [noted.edit, lives[2].edit],
    ]
    assert (found.added, found.removed, found.changed) == (("fact-2",), ("fact-0",), ("fact-1",))
    assert found.moved == (("Rome", said[1]), ("Paris", late))
    assert (found.metrics, found.norms) == ((metrics[:1], metrics[1:]), norms)
    back = store.compare(second, first)
    assert (back.added, back.removed, back.moved) == (("fact-0",), ("fact-2",), (("Oslo", said[0]),))
    alone = store.compare(None, first)
    assert (alone.old, alone.moved) == (None, (("Paris", said[0]), ("Paris", kept)))
    assert (alone.metrics[0], alone.norms[0], alone.added) == ((), {}, ("fact-0", "fact-1"))
    nothing = store.compare(first, first)
    assert (nothing.facts, nothing.moved) == (({}, {}), ())


def an_answer(edit: str, kind: str, after: str) -> Answer:
    return Answer(edit, kind, f"{edit} {kind}", ("Rome",), "Paris", after, after == "Rome")


def test_the_last_answers_are_the_newest_of_each_edit_along_the_chain(store: Store) -> None:
    """All of one time, oldest first; what a version beside the chain or above it heard does not count."""
    first = commit(store, answers=(an_answer("a", "rewrite", "1"), an_answer("a", "paraphrase", "1")))
    second = commit(store, answers=(an_answer("b", "rewrite", "2"), an_answer("c", "rewrite", "2")))
    third = commit(store, answers=(an_answer("a", "rewrite", "3"),))
    above = commit(store, answers=(an_answer("b", "rewrite", "4"),))
    beside = commit(store, on=second.id, answers=(an_answer("a", "rewrite", "5"), an_answer("c", "rewrite", "5")))

    def heard(version: Version | None, *edits: str) -> list[tuple[str, str, str]]:
        return [(a.edit, a.kind, a.after) for a in store.last_answers(version, edits)]

    assert heard(third, "a", "b", "z") == [("b", "rewrite", "2"), ("a", "rewrite", "3")]
    assert heard(second, "a") == [("a", "rewrite", "1"), ("a", "paraphrase", "1")]
    assert heard(above, "c", "b") == [("c", "rewrite", "2"), ("b", "rewrite", "4")]
    assert heard(beside, "a", "b", "c") == [("b", "rewrite", "2"), ("a", "rewrite", "5"), ("c", "rewrite", "5")]
    assert heard(first, "b") == heard(None, "a") == heard(third) == []


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


def an_about(artifact: str = "", kind: str = "", reader: str = "") -> dict[str, Any]:
    """What a factor file says of itself, of an overlay too where a kind is named."""
    over = {"overlay": {"kind": kind, "artifact": reader}} if kind else {}
    return {"format": 2 if kind else 1, "params": {"artifact": artifact}, **over}


def test_a_footprint_names_what_lies_over_the_weights_last(store: Store) -> None:
    """By its kind, whatever tensors it has, each once."""
    files = {"a": an_about(kind="serac"), "b": an_about(), "c": an_about(kind="grace"), "d": an_about(kind="serac")}
    tensors = {"a": ("overlay/dense",), "b": THIN, "c": (), "d": ("overlay/keys",)}
    size = sum(put_tensors(store.deltas_dir / f"{n}.safetensors", files[n], *tensors[n]) for n in files)
    version = commit(store, edits=tuple(LiveEdit(an_edit(i), name, 0) for i, name in enumerate(files)))
    assert store.footprint(version) == (4, size, ("thin", "grace", "serac"))


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
    version = commit(store, edits=tuple(LiveEdit(an_edit(i), name, 0) for i, name in enumerate(names)))
    assert store.footprint(version) == (len(names), sum(sizes), tuple(sorted(set(kinds))))
    if kinds:
        (store.deltas_dir / f"{names[0]}.safetensors").unlink()
        assert store.footprint(version)[:2] == (len(names), sum(sizes[1:])), "a missing file has no size"


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
        self.folder = Path(tempfile.mkdtemp(dir=FAST))
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


HeadMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
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


# Candidates and reviews


def test_a_version_that_is_held_waits_beside_the_head(store: Store) -> None:
    """It is a candidate, `candidate` names it, the log says why, and it is read like any other."""
    first = commit(store)
    held = commit(store, edits=(live(store, 1, "d1"),), hold="reliability is 50.0 %, wanted 95.0 %", note="try")

    assert store.head() == first
    assert store.view() == View(first.id, (held.id,), {CANDIDATE: held.id})
    assert store.resolve(CANDIDATE) == held and store.resolve("@") == first
    assert [one.id for one in store.edits(held)] == ["fact-1"]
    last = store.operations(1)[0]
    assert (last.verb, last.head_before, last.head, last.about) == ("apply", first.id, first.id, held.id)
    assert last.description == f"version {held.id} with 1 edit, a candidate: reliability is 50.0 %, wanted 95.0 %"
    assert last.note == "try"
    # Control: one that is not held becomes the head, and the candidate goes on waiting.
    other = commit(store)
    assert store.view() == View(other.id, (held.id,), {CANDIDATE: held.id})


def test_accepting_makes_a_candidate_the_head(store: Store) -> None:
    """With the words of who did it; what waited is closed and its name free."""
    held = commit(store, hold="no")

    done = store.accept(note="checked by hand", command="editctl accept")

    assert store.head() == held and store.view() == View(held.id)
    assert (done.verb, done.head_before, done.head, done.about) == ("accept", "", held.id, held.id)
    assert (done.note, done.command, done.edits) == ("checked by hand", "editctl accept", ())
    assert done.description == f"accepted version {held.id}"
    with pytest.raises(StoreError, match="no version waits for review"):
        store.accept()


def test_rejecting_closes_a_candidate_and_keeps_it(store: Store) -> None:
    """The head stays; the version can be looked at, but not become the head."""
    first = commit(store)
    held = commit(store, hold="no")

    done = store.reject(note="wrong source")

    assert store.view() == View(first.id) and done.about == held.id and done.note == "wrong source"
    assert store.resolve(held.id) == held and held in store.versions()
    tries: list[Callable[[], object]] = [store.reject, store.accept, lambda: store.restore(held.id)]
    for again in tries:
        with pytest.raises(StoreError):
            again()
    with pytest.raises(StoreError, match=f"version {held.id} is no candidate") as caught:
        store.accept(held.id)
    assert caught.value.hint


def test_of_several_candidates_the_newest_has_the_name(store: Store) -> None:
    """Deciding one passes it on; each is decided by its id too."""
    one, two, three = (commit(store, hold="no") for _ in range(3))
    assert store.view() == View("", (one.id, two.id, three.id), {CANDIDATE: three.id})

    store.reject()
    assert store.view() == View("", (one.id, two.id), {CANDIDATE: two.id})
    store.accept(one.id[:8])
    assert store.view() == View(one.id, (two.id,), {CANDIDATE: two.id})
    store.reject()
    assert store.view() == View(one.id)


def test_a_candidate_is_accepted_only_on_the_head_it_was_made_on(store: Store) -> None:
    """Exit code 5, as for a stale plan; back at that head it is good again."""
    held = commit(store, hold="no")
    other = commit(store)

    with pytest.raises(StalePlan, match=f"made on base, the head is now {other.id}") as caught:
        store.accept()
    assert caught.value.exit_code == Exit.STALE and "editctl restore" in caught.value.hint
    assert store.view().candidates == (held.id,)
    store.undo()
    assert store.accept().head == held.id


def test_the_head_goes_to_no_version_that_was_never_accepted(store: Store) -> None:
    """Not by its id, not by an alias; once it was the head, it can be again."""
    held = commit(store, hold="no")
    store.set_alias("mine", held.id)

    for ref in (held.id, held.id[:6], "mine", CANDIDATE):
        with pytest.raises(StoreError, match=f"version {held.id} was never accepted") as caught:
            store.restore(ref)
        assert f"editctl accept {held.id}" in caught.value.hint
    store.accept()
    store.restore("base")
    assert store.restore("mine").head == held.id


def test_what_a_review_makes_instead_takes_its_candidates_place(store: Store) -> None:
    """Held or not; a review of the head leaves candidates alone."""
    lives = [live(store, n, "d0", n) for n in range(3)]
    first = commit(store, edits=tuple(lives[:1]))
    held = commit(store, edits=tuple(lives), hold="no")
    again = commit(
        store, edits=tuple(lives[:2]), hold="no", instead_of=held.id, without=["fact-2"], verb="reject", note="odd"
    )
    assert store.view() == View(first.id, (again.id,), {CANDIDATE: again.id})
    last = store.operations(1)[0]
    assert (last.about, last.edits, last.note) == (held.id, ("fact-2",), "odd")
    assert last.description == f"version {again.id} with 2 edits, without fact-2, a candidate: no"

    good = commit(store, edits=tuple(lives[:1]), instead_of=again.id, without=["fact-1"], verb="reject")
    assert store.view() == View(good.id)
    waiting = commit(store, hold="no")
    other = commit(store, instead_of=good.id, without=["fact-0"], verb="reject")
    assert store.view() == View(other.id, (waiting.id,), {CANDIDATE: waiting.id})


def test_reviews_are_those_of_a_version_that_are_in_effect(store: Store) -> None:
    """Accepted edits, rejected ones, all of it; in order, with who and why. What was undone was never said."""
    lives = tuple(live(store, n, "d0", n) for n in range(3))
    held = commit(store, edits=lives, hold="no")
    store.accept(edits=["fact-0", "fact-1"], note="read the source")
    store.accept(edits=["fact-2"])
    store.undo()
    store.reject(note="once more")
    store.undo()
    store.accept(note="good enough")
    commit(store, edits=lives[:2], instead_of=held.id, without=["fact-2"], verb="reject", note="wrong after all")

    said = [(one.verb, one.edits, one.note, one.who) for one in store.reviews(held)]
    assert said == [
        ("accept", ("fact-0", "fact-1"), "read the source", "ada@lab"),
        ("accept", (), "good enough", "ada@lab"),
        ("reject", ("fact-2",), "wrong after all", "ada@lab"),
    ]
    head = store.head()
    assert head is not None and store.reviews(head) == [], "a review is about what was reviewed"
    store.undo()
    assert [one.verb for one in store.reviews(held)] == ["accept", "accept"]


def test_accepting_edits_is_recorded_and_moves_nothing(store: Store) -> None:
    """Of a candidate, of the head, of any version that has them."""
    first = commit(store, edits=(live(store, 1, "d1"),))
    held = commit(store, edits=(live(store, 1, "d1"), live(store, 2, "d1", 1)), hold="no")

    done = store.accept(edits=["fact-2"], note="checked")
    assert (done.about, done.edits, done.head) == (held.id, ("fact-2",), first.id)
    assert done.description == f"accepted fact-2 of version {held.id}"
    assert store.accept("@", edits=["fact-1"]).about == first.id
    assert store.view() == View(first.id, (held.id,), {CANDIDATE: held.id})
    with pytest.raises(StoreError, match=f"version {first.id} has no edit fact-2, fact-3") as caught:
        store.accept("@", edits=["fact-3", "fact-2", "fact-1"])
    assert "editctl show @" in caught.value.hint
    with pytest.raises(StoreError, match="the unedited model needs no review"):
        store.accept("base")
    with pytest.raises(StoreError, match=f"version {first.id} is the head: there is nothing to decide"):
        store.accept("@")
    assert len(store.operations()) == 4


# Aliases


def test_an_alias_is_set_moved_and_removed_by_operations(store: Store) -> None:
    """Each can be undone and redone; the head stays."""
    first, second = commit(store), commit(store)
    views = [store.view()]
    for name, ref in (("stable", "@-"), ("clean", "base"), ("stable", "@"), ("clean", None)):
        done = store.set_alias(name, ref, "editctl alias")
        assert (done.verb, done.command, done.head) == ("alias", "editctl alias", second.id)
        views.append(store.view())

    assert [dict(view.aliases) for view in views] == [
        {},
        {"stable": first.id},
        {"stable": first.id, "clean": ""},
        {"stable": second.id, "clean": ""},
        {"stable": second.id},
    ]
    told = [operation.description for operation in store.operations(4)[::-1]]
    assert told == [
        f"stable now stands for {first.id}",
        "clean now stands for base",
        f"stable now stands for {second.id}",
        "removed the alias clean",
    ]
    for view in views[-2::-1]:
        store.undo()
        assert store.view() == view
    for view in views[1:]:
        store.redo()
        assert store.view() == view


@pytest.mark.parametrize(
    ("name", "ref", "message"), [("stabel", None, "is not there"), ("stable", "@", "stands for [0-9a-f]{12} already")]
)
def test_an_alias_that_would_not_change_is_an_error(store: Store, name: str, ref: str | None, message: str) -> None:
    """Recorded, it would give undo something without effect."""
    commit(store)
    store.set_alias("stable", "@")

    with pytest.raises(StoreError, match=f"{name} {message}") as caught:
        store.set_alias(name, ref)
    assert "editctl alias" in caught.value.hint
    assert len(store.operations()) == 2


def test_restoring_moves_the_head_alone(store: Store) -> None:
    """Undo takes a whole operation back; restore leaves aliases and candidates as they are."""
    first = commit(store)
    held = commit(store, hold="no")
    store.set_alias("stable", "@")
    second = commit(store)
    view = store.view()

    store.restore(first.id)
    assert store.view() == replace(view, head=first.id)
    assert store.undo().view == view == View(second.id, (held.id,), {CANDIDATE: held.id, "stable": first.id})


def test_undo_and_redo_carry_candidates_along(store: Store) -> None:
    """Undoing the apply takes the candidate away, undoing a decision gives it back; redo does both again."""
    held = commit(store, hold="no")
    store.accept()
    waiting, accepted = View("", (held.id,), {CANDIDATE: held.id}), View(held.id)

    assert [store.undo().view, store.undo().view] == [waiting, View()]
    assert store.resolve(held.id) == held
    with pytest.raises(StoreError, match=f"version {held.id} is no candidate"):
        store.accept(held.id)
    assert [store.redo().view, store.redo().view] == [waiting, accepted]
    store.undo()
    assert store.reject().view == View()
    assert store.undo().view == waiting


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
    assert store.view().aliases == {"clean": "", "stable": second.id}


def test_an_alias_moves(store: Store) -> None:
    first = commit(store)
    store.set_alias("stable", "@")
    second = commit(store)
    assert store.resolve("stable") == first

    store.set_alias("stable", "@")

    assert store.resolve("stable") == second


@pytest.mark.parametrize(
    "name", ["", "@", "base", CANDIDATE, "op:1", "-x", "a b", "cafe", "ABCD12", "x" * 65, "\x1b[31m"]
)
def test_a_name_that_could_be_another_ref_is_no_alias(store: Store, name: str) -> None:
    commit(store)

    with pytest.raises(StoreError, match="cannot be an alias") as caught:
        store.set_alias(name, "@")
    assert caught.value.hint
    assert store.view().aliases == {}


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
    monkeypatch.setattr("editctl.store.store.digest", lambda value: next(digests))
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


def test_a_commit_that_names_a_missing_factor_file_is_refused(store: Store) -> None:
    """And is accepted once the file is there."""
    edits = (live(store, 0, "d0"), LiveEdit(an_edit(1), "d1", 0))

    with pytest.raises(StoreError, match=r"d1\.safetensors is missing") as caught:
        commit(store, edits=edits)
    assert caught.value.hint
    assert store.versions() == []

    put_factor(store, "d1")
    assert commit(store, edits=edits) == store.head()


@pytest.mark.parametrize(
    "about",
    [an_about("trained"), an_about(kind="serac", reader="trained"), an_about("trained", "serac", "trained")],
    ids=["written with", "read by", "both"],
)
def test_a_commit_that_needs_a_missing_trained_file_is_refused(store: Store, about: dict[str, Any]) -> None:
    """Whichever of its batches needs it, also one that the parent has; accepted once the file is there."""
    put_tensors(store.deltas_dir / "d0.safetensors", an_about())
    put_tensors(store.deltas_dir / "d1.safetensors", about)
    edits = (LiveEdit(an_edit(0), "d0", 0), LiveEdit(an_edit(1), "d1", 0))
    first = commit(store, edits=edits[:1])

    def refused(*edits: LiveEdit) -> None:
        with pytest.raises(StoreError, match=r"trained file .*trained\.safetensors is missing.*d1\.safet") as caught:
            commit(store, edits=edits)
        assert "backup" in caught.value.hint

    refused(*edits)
    assert store.versions() == [first]
    path = store.artifacts_dir / "trained.safetensors"
    put_tensors(path, {})
    assert commit(store, edits=edits) == store.head()
    path.unlink()
    refused(*edits, live(store, 2, "d2"))


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
        "edits": (live(store, 0, "d1"),),
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
    for table in ("edits", "version_edits", "answers", "metrics", "events"):
        assert rows_of(store, table) == 0, table
    assert contents(store.edits(commit(store, **full))) == contents(full["edits"])


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


# Seals


@pytest.fixture
def full(store: Store) -> Store:
    """A store with at least two rows in every table, and no fault."""
    lives = tuple(live(store, n, f"d{n}", note="n") for n in range(3))
    heard = (an_answer("fact-0", "rewrite", "Rome"), an_answer("fact-1", "rewrite", "Oslo"))
    told = (Metric("reliability", "generated", 0.5, 2), Metric("locality", "generated", 1.0, 2))
    for edits in (lives[:2], lives):
        commit(store, edits=edits, answers=heard, metrics=told, events=('{"a": 1}', '{"b": 2}'), note="why")
    store.set_alias("stable", "@")
    commit(store, edits=lives[:1], hold="no")
    store.accept(edits=["fact-0"])
    store.add_evidence("", "trace", "fact-0", {"layers": [1]})
    store.add_evidence(store.versions()[0].id, "trace", "fact-0", {"layers": [1]})
    # The files hold nothing, so their content does not have their name.
    assert faults(store) == []
    return store


def faults(store: Store) -> list[Fault]:
    """What is wrong beside the factor files of these tests, which are empty."""
    return [fault for fault in care.inspect(store) if not fault.what.startswith("factor file")]


SEALED: dict[str, str] = {
    "versions": "id parent base model dtype method params seed weights_hash libraries seconds peak_mb norms gates "
    "number kept created_at who seal",
    "edits": "digest id prompt weights_fingerprint notes_fingerprint json",
    "version_edits": "version position edit delta column",
    "answers": "version position edit kind prompt wanted before after ok nll_before nll_after forced_before "
    "forced_after axis group rival nll_rival_before nll_rival_after argmax_before forced_same soon",
    "metrics": "version position name protocol value n higher_is_better axis low high",
    "evidence": "id version kind edit data at who",
    "events": "version position line",
    "operations": "id parent verb head_before head at who command undoes description note about edits candidates "
    "aliases seal",
}
CELLS = [(table, column) for table, columns in SEALED.items() for column in columns.split()]
OWNER = {
    "edits": "'edit ' || id",
    "evidence": "'evidence ' || id",
    "operations": "'operation ' || id",
    "versions": "'version ' || id",
}
"""How a fault names what was changed, in SQL; the rows of all other tables belong to a version."""


def changed_by_hand(store: Store, table: str, column: str, value: str, *, first: bool = False) -> list[str]:
    """Change a cell of a table's first or last row; the names of what holds it now and held it before."""
    owner = OWNER.get(table, "'version ' || version")
    with closing(sqlite3.connect(store.database)) as db:
        (row,) = db.execute(f"select {'min' if first else 'max'}(rowid) from {table}").fetchone()
        names = [db.execute(f"select {owner} from {table} where rowid = ?", [row]).fetchone()[0]]
        assert db.execute(f'update {table} set "{column}" = {value} where rowid = ?', [row]).rowcount == 1
        db.commit()
        # An id that is a number is the row's own.
        (row,) = db.execute(f"select {'min' if first else 'max'}(rowid) from {table}").fetchone()
        names += [db.execute(f"select {owner} from {table} where rowid = ?", [row]).fetchone()[0]]
    return names


def test_every_column_of_every_table_is_sealed(full: Store) -> None:
    """So that a column that comes later is not forgotten."""
    with closing(sqlite3.connect(full.database)) as db:
        tables = [name for (name,) in db.execute("select name from sqlite_master where type = 'table'")]
        found = {(table, row[1]) for table in tables for row in db.execute(f"pragma table_info({table})")}
    assert {(table, column) for table, column in found if not table.startswith(("sqlite_", "_sqlite_"))} == set(CELLS)


@pytest.mark.parametrize("row", ["first", "last"])
@pytest.mark.parametrize(("table", "column"), CELLS, ids=lambda value: value)
def test_a_cell_changed_by_hand_is_found_and_named(full: Store, table: str, column: str, row: str) -> None:
    """A text grows by a letter, a number by a lot, nothing becomes a number; the rest of the check goes on."""
    other = f"""case typeof("{column}")
        when 'text' then "{column}" || 'x' when 'null' then 0.5 else "{column}" + 100 end"""
    owners = changed_by_hand(full, table, column, other, first=row == "first")

    assert {fault.what for fault in faults(full)} & set(owners)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("edits", "json", """replace(json, 'Rome', 'Oslo')"""),
        ("edits", "json", "'[]'"),
        ("edits", "json", "'{}'"),
        ("versions", "gates", "'{}'"),
        ("versions", "norms", "'[]'"),
        ("versions", "norms", "'{\"m\": 3}'"),
        ("versions", "params", "'{}'"),
        ("operations", "aliases", "'[]'"),
        ("operations", "candidates", "'[\"x\"]'"),
        ("operations", "edits", "'7'"),
        ("metrics", "value", "0.51"),
        ("answers", "ok", "1 - ok"),
    ],
)
def test_a_cell_that_is_still_of_its_kind_is_found_too(full: Store, table: str, column: str, value: str) -> None:
    """Another value, or JSON of another shape: nothing breaks that only means to look."""
    owners = changed_by_hand(full, table, column, value)

    assert {fault.what for fault in faults(full)} & set(owners)


@pytest.mark.parametrize("table", SEALED)
@pytest.mark.parametrize("row", ["first", "last"])
def test_a_row_taken_out_is_found(full: Store, table: str, row: str) -> None:
    """Of an operation the one after it tells, of the newest the version that it made."""
    if (table, row) == ("operations", "last"):
        full.undo()
        commit(full)
    if (table, row) == ("evidence", "last"):
        pytest.skip("nothing stands on it")
    with closing(sqlite3.connect(full.database)) as db:
        edge = "min" if row == "first" else "max"
        db.execute(f"delete from {table} where rowid = (select {edge}(rowid) from {table})")
        db.commit()

    assert faults(full)


def test_an_operation_between_two_others_or_after_them_is_found(full: Store) -> None:
    """Its seal follows from no seal before it; one that the store makes is no fault."""
    columns = SEALED["operations"].replace("id ", "", 1).replace(" ", ", ")
    full.undo()
    assert faults(full) == []
    with closing(sqlite3.connect(full.database)) as db:
        copied = f"insert into operations (id, {columns}) select id + 1, {columns} from operations where id = ?"
        db.execute(copied, [full.operations(1)[0].id])
        db.commit()

    assert [fault.what for fault in faults(full)] == [f"operation {full.operations(1)[0].id}"]


@pytest.mark.parametrize("circle", ["of one", "of two", "of a younger one"])
def test_a_circle_of_parents_made_by_hand_has_an_end(full: Store, circle: str) -> None:
    """Every question that follows the parents ends, where it did not, and `verify` names the row."""
    second, first = (version.id for version in full.versions()[1:])
    child, parent = {"of one": (second, second), "of two": (first, second)}.get(circle, (first, full.versions()[0].id))
    with closing(sqlite3.connect(full.database)) as db, db:
        db.execute("update versions set parent = ? where id = ?", (parent, child))
    whole = full.resolve(second)
    assert whole is not None
    assert [live.id for live in full.edits(whole)][-1] == "fact-2" and full.count(whole) <= 3
    assert full.deltas(whole)[-1] == "d2" and full.near(whole, ["fact-2"])[0]
    assert full.last_answers(whole, ["fact-0"]) and full.differing(None, whole)[1]
    assert full.steps_down(whole, None) == (1 if circle == "of one" else 2)
    with pytest.raises(StoreError, match="goes beyond base"):
        full.resolve("@-999999")
    assert f"version {child}" in [fault.what for fault in faults(full)]


def test_a_version_without_its_parent_and_an_operation_without_its_version_are_named(full: Store) -> None:
    """As long as SQLite lets one take them out, which its own check then tells as well."""
    oldest = full.versions()[-1]
    with closing(sqlite3.connect(full.database)) as db:
        db.execute("delete from versions where id = ?", [oldest.id])
        db.commit()

    found = {fault.what: fault.wrong for fault in faults(full)}

    assert f"its parent {oldest.id} is not there" in found.values()
    assert found["operation 1"] == f"names version {oldest.id}, which is not there"


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


def test_who_changes_the_store_can_be_asked(store: Store, hold: Any) -> None:
    """By those who only look: nobody, a process, and nobody again once it is killed, though its note stays."""
    assert store.holder() == "" and not store.root.exists()
    commit(store)
    assert store.holder() == ""
    process = hold(store)
    assert re.fullmatch(rf"`apply` of alice@host \(pid {process.pid}\) since 20\S+", store.holder())
    assert Store(store.root, readonly=True).holder() == store.holder()
    process.kill()
    process.wait()
    assert (store.root / "lock.json").exists()
    assert store.holder() == ""


def test_a_holder_in_this_process_is_told_to_all_but_itself(store: Store) -> None:
    """Another Store on the folder is told; a note that says nothing is another process's."""
    with store.lock("undo"):
        assert store.holder() == ""
        assert Store(store.root).holder().startswith("`undo` of ada@lab")
        (store.root / "lock.json").write_text("{")
        assert Store(store.root).holder() == "another process"
    assert Store(store.root).holder() == ""


def test_where_no_note_lies_the_lock_is_not_tried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a screen may ask often without being in a writer's way."""
    tried: list[int] = []
    monkeypatch.setattr(Store, "busy", lambda self: bool(tried.append(1)))
    commit(store)
    assert store.holder() == "" and tried == []
    (store.root / "lock.json").write_text("{}")
    assert store.holder() == "" and tried == [1]


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
        store.accept,
        store.reject,
        lambda: store.lock("apply").__enter__(),
    ]


def test_a_readonly_store_refuses_to_write_and_leaves_the_disk_alone(store: Store) -> None:
    """Reading changes no byte and leaves no file behind, whether or not the folder can be written."""
    made = commit(store, edits=(live(store, 0, "d1"),))
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
    writer.execute("update versions set model = 'from the log beside the file'")
    writer.commit()
    assert store.database.with_name("editctl.db-wal").exists()
    assert store.head() == replace(made, model="from the log beside the file")
    writer.close()


def test_reading_cannot_write(store: Store) -> None:
    """The walls of the room hold even for a mistake inside it."""
    commit(store)

    with pytest.raises(StoreError, match="cannot be written"), store._reading() as db:
        db["events"].insert({"version": "x", "position": 0, "line": ""})


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


# Evidence, and the schema it came with


def test_evidence_is_kept_beside_versions_newest_first(store: Store) -> None:
    """Of a version, of the unedited model, of a kind; the view stays as it is."""
    made, operations = commit(store), len(store.operations())
    one = store.add_evidence("", "trace", "fact-0", {"layers": [1, 2], "text": "[red]ü\x1b"})
    other = store.add_evidence(made.id, "trace", "", {})
    third = store.add_evidence(made.id, "averages", "fact-0", {"n": None})
    assert store.evidence() == [third, other, one]
    assert store.evidence("") == store.evidence("", "trace") == [one]
    assert store.evidence(made.id, "trace") == [other] and store.evidence("nothing") == []
    assert one.data == {"layers": [1, 2], "text": "[red]ü\x1b"} and one.who == store.versions()[0].who
    assert len({one.id, other.id, third.id}) == 3 and faults(store) == []
    assert len(store.operations()) == operations and store.head() == made
    with pytest.raises(StoreError, match="is not in the store"):
        store.add_evidence("0123456789ab", "trace", "", {})


def test_a_record_damaged_before_the_schema_changed_is_damaged_after(store: Store) -> None:
    """Answers and metrics get new columns, and so new seals; only what was whole is sealed anew."""
    answers = (Answer("fact-0", "rewrite", "p", ("Rome",), "Paris", "Rome", True, 1.0, 2.0),)
    whole, damaged = (commit(store, answers=answers, metrics=(Metric("m", "generated", v, 1),)) for v in (0.5, 1.0))
    with closing(sqlite3.connect(store.database)) as db:
        for table, last in (("answers", "forced_after"), ("metrics", "higher_is_better")):
            for column in SEALED[table].partition(f"{last} ")[2].split():
                db.execute(f'alter table {table} drop column "{column}"')
        db.execute("drop table evidence")
        db.execute("delete from _sqlite_migrations where name = 'm003_measures'")
        db.commit()
    raw = sqlite_utils.Database(store.database)
    for row in list(raw["versions"].rows):
        raw["versions"].update(row["id"], {"seal": version_seal(raw, row["id"])})
    raw["answers"].update((damaged.id, 0), {"after": "Oslo"})
    raw.close()
    assert store.answers(whole) == answers and [m.value for m in store.metrics(whole)] == [0.5]
    assert {fault.what for fault in faults(store)} == {f"version {damaged.id}"}
    store.add_evidence("", "trace", "", {})
    assert {fault.what for fault in faults(store)} == {f"version {damaged.id}"}
