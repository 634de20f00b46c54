"""What the UI knows of specs and store, read in one go by a worker thread and never changed afterwards.

Knows: which state every edit is in, and when files or the store have changed. Refuses: widgets; it is given paths and a
store and returns values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from editctl.errors import Problem
from editctl.plan import ADD, DROP, KEEP, REMEASURE, REPLACE, make

if TYPE_CHECKING:
    from editctl.spec import Edit, Shelf
    from editctl.store import LiveEdit, Operation, Store, Version, View

NEW, CHANGED, APPLIED, INVALID, CONFLICT, GONE = "new", "changed", "applied", "invalid", "conflicting", "gone"
"""States of an edit; gone is live but in no spec."""
GLYPHS = {NEW: "+", CHANGED: "~", APPLIED: "=", INVALID: "✗", CONFLICT: "!", GONE: "-"}
TONES = {NEW: "good", CHANGED: "warn", APPLIED: "dim", INVALID: "bad", CONFLICT: "bad", GONE: "bad"}
_STATES = {ADD: NEW, REPLACE: CHANGED, REMEASURE: CHANGED, KEEP: APPLIED, DROP: GONE}


@dataclass(frozen=True)
class Item:
    """One edit as the lists show it."""

    edit: Edit
    state: str
    reason: str = ""
    """Why it is in that state, where there is more to say."""
    problems: tuple[Problem, ...] = ()
    old: Edit | None = None
    """The live edit it stands in for."""

    @cached_property
    def key(self) -> str:
        """What it is known by when everything is read again; no id begins with a dash."""
        if self.state == GONE:
            return f"-{self.edit.id}"
        return f"-{self.edit.file}:{self.edit.line}" if self.problems else self.edit.id

    @property
    def fact(self) -> str:
        """Which fact it is about, whatever it is called and shall be answered."""
        return f"{self.edit.subject}\0{self.edit.relation}"

    @property
    def stageable(self) -> bool:
        """Whether a plan can do something about it."""
        # While any spec cannot be read nobody knows what is meant to be gone.
        return self.state in (NEW, CHANGED) or (self.state == GONE and not self.problems)

    @cached_property
    def text(self) -> str:
        """What a filter looks at."""
        edit = self.edit
        words = (self.state, edit.id, edit.subject, edit.relation, edit.target_new, edit.target_true, edit.file)
        return " ".join((*words, *edit.tags)).casefold()


@dataclass(frozen=True)
class Specs:
    """All edits of all spec files, and live ones that no file declares."""

    items: tuple[Item, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    read: bool = False
    """Whether they were read at all."""

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The spec files, in order."""
        named = [item.edit.file for item in self.items if item.state != GONE] + [p.file for p in self.problems]
        return tuple(sorted({name for name in named if name.endswith(".toml")}))

    @cached_property
    def stageable(self) -> frozenset[str]:
        """Keys of what a plan can do something about."""
        return frozenset(item.key for item in self.items if item.stageable)

    def count(self, *states: str) -> int:
        """How many edits are in these states."""
        return sum(item.state in states for item in self.items)


@dataclass(frozen=True)
class Past:
    """The store as it was read."""

    view: View | None = None
    head: Version | None = None
    versions: tuple[Version, ...] = ()
    """Newest first."""
    operations: tuple[Operation, ...] = ()
    """Newest first."""
    lives: tuple[LiveEdit, ...] = ()
    """What is live in the head."""
    stamp: object = None
    read: bool = False

    @property
    def candidates(self) -> tuple[str, ...]:
        """Versions that wait for review, oldest first."""
        return self.view.candidates if self.view else ()

    def version(self, name: str) -> Version | None:
        """The version of this id."""
        return next((version for version in self.versions if version.id == name), None)


def read_specs(shelf: Shelf, paths: Sequence[Path], lives: Sequence[LiveEdit]) -> Specs:
    """The spec files, and how every edit in them stands to what is live."""
    # A folder of specs that is not there yet is an empty one: the first edit makes it.
    report = shelf.check([path for path in paths if path.suffix == ".toml" or path.exists()])
    whose = _whose([*report.edits, *report.faulty], report.problems)
    items: list[Item] = []
    actions = make(report.edits, [live.known for live in lives], model="", base="", head="", params={}, prune=True)
    for action in actions.actions:
        edit = action.edit
        found = whose.get((edit.file, edit.line), ())
        if action.kind == DROP:
            items.append(Item(edit, GONE, action.reason, report.problems[:1]))
        else:
            items.append(Item(edit, CONFLICT if found else _STATES[action.kind], action.reason, found, action.old))
    for edit in report.faulty:
        items.append(Item(edit, INVALID, problems=whose.get((edit.file, edit.line), ())))
    items.sort(key=lambda item: (item.state == GONE, item.edit.file, item.edit.line))
    for item in items:
        # Made here, where there is time: the first key of a filter needs them all.
        _ = item.text
    return Specs(tuple(items), report.problems, report.warnings, read=True)


def _whose(edits: Sequence[Edit], problems: Sequence[Problem]) -> dict[tuple[str, int], tuple[Problem, ...]]:
    """Problems by the file and line of the edit they stand in; those above the first edit belong to none."""
    lines: dict[str, list[int]] = {}
    for edit in edits:
        lines.setdefault(edit.file, []).append(edit.line)
    for found in lines.values():
        found.sort()
    whose: dict[tuple[str, int], tuple[Problem, ...]] = {}
    for problem in problems:
        starts = lines.get(problem.file, [])
        if at := bisect_right(starts, problem.line):
            place = (problem.file, starts[at - 1])
            whose[place] = (*whose.get(place, ()), problem)
    return whose


def staged_actions(items: Sequence[Item], staged: Collection[str]) -> tuple[list[Edit], list[str]]:
    """Of what is staged: the edits to be made, and the ids of live edits to be dropped."""
    wanted = [item.edit for item in items if item.key in staged and item.state != GONE]
    dropped = [item.edit.id for item in items if item.key in staged and item.state == GONE]
    return wanted, dropped


def read_past(store: Store, limit: int | None = None) -> Past:
    """Everything about versions and operations."""
    stamp = stamp_of_store(store.root)
    view = store.view()
    head = store.head()
    return Past(
        view=view,
        head=head,
        versions=tuple(store.versions()),
        operations=tuple(store.operations(limit)),
        lives=store.edits(head),
        stamp=stamp,
        read=True,
    )


def stamp_of_store(root: Path) -> object:
    """A value that changes when the store does."""
    found = []
    for name in ("editctl.db", "editctl.db-wal"):
        with suppress(OSError):
            stat = (root / name).stat()
            if stat.st_size:  # who only reads leaves an empty log for a moment
                found.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def stamp_of_specs(paths: Sequence[Path]) -> object:
    """A value that changes when a spec file does, or when one comes or goes."""
    found = []
    for path in paths:
        for file in sorted(path.glob("*.toml")) if path.is_dir() else [path]:
            with suppress(OSError):
                stat = file.stat()
                found.append((str(file), stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)
