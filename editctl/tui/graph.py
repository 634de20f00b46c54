"""What History lists: versions as a graph with lanes, operations with whether they are still in effect.

Knows: lanes of a tree of versions, names of versions, what an operation is about. Refuses: widgets, the store; it is
given the past and returns values. Thousands of versions take tens of milliseconds, so a worker thread does it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editctl.store import Operation, Version
    from editctl.tui.desk import Past

HEAD, WAITS, OTHER, ROOT = "@", "◆", "○", "◇"
"""Glyphs of the head, of a candidate, of other versions and of the unedited model."""
LANES = 7
"""Lanes drawn apart; all others share one more, drawn as ┊."""


@dataclass(frozen=True)
class Deed:
    """An operation as a row."""

    operation: Operation
    current: bool
    """Whether it is the last one, which left everything as it is now."""
    undone: bool
    """Whether its effect was taken back."""
    quiet: bool
    """Whether it is not in effect: undone, an undo or a redo, or left behind by a new line."""

    @property
    def version(self) -> str:
        """Id of the version it is about, "" for the unedited model."""
        operation = self.operation
        return operation.head if operation.head != operation.head_before else operation.about or operation.head

    @property
    def names(self) -> str:
        """The aliases that its head had after it."""
        return ", ".join(name for name, version in self.operation.aliases.items() if version == self.operation.head)

    @cached_property
    def text(self) -> str:
        """What a filter looks at."""
        op = self.operation
        words = (f"op:{op.id}", op.verb, op.head or "base", self.names, op.at, op.who, op.description, op.note)
        return " ".join((*words, op.command)).casefold()


@dataclass(frozen=True)
class Node:
    """A version as a row; None is the unedited model."""

    version: Version | None
    rail: str
    """Its place among the lanes."""
    names: str
    maker: Operation | None
    """The operation that made it."""

    @property
    def id(self) -> str:
        """The version's id, "" for the unedited model."""
        return self.version.id if self.version else ""

    @cached_property
    def text(self) -> str:
        """What a filter looks at."""
        version, maker = self.version, self.maker
        words = [self.id or "base", self.names]
        words += [version.method, version.created_at, version.who] if version else []
        words += [maker.description, maker.note] if maker else []
        return " ".join(words).casefold()


@dataclass(frozen=True)
class Lists:
    """Everything that History lists, of one reading of the store."""

    past: Past
    deeds: tuple[Deed, ...] = ()
    """Newest first."""
    nodes: tuple[Node, ...] = ()
    """Newest first, the unedited model last; none where no version was made yet."""
    width: int = 1
    """Columns of the widest rail."""
    heads: frozenset[str] = frozenset()
    """Versions that were the head once."""
    below: frozenset[str] = frozenset()
    """The versions below the head, and "" where there is a head."""
    versions: Mapping[str, Version] | None = None
    """By id."""

    def version(self, name: str) -> Version | None:
        """The version of this id; None for the unedited model and for what is not in the store."""
        return (self.versions or {}).get(name)


def lists(past: Past) -> Lists:
    """The rows of a past."""
    from editctl.store.rows import line_of

    view = past.view
    head, candidates = (view.head, view.candidates) if view else ("", ())
    try:
        effective = {op.id for op in line_of(past.operations)[0]}
    except IndexError:  # a damaged store: an undo of nothing
        effective = {op.id for op in past.operations}
    taken = {op.undoes for op in past.operations if op.verb == "undo"} - effective
    deeds = tuple(
        Deed(op, current=at == 0, undone=op.id in taken, quiet=op.id not in effective)
        for at, op in enumerate(past.operations)
    )
    makers: dict[str, Operation] = {}
    for op in reversed(past.operations):
        for name in {op.head, *op.candidates}:
            makers.setdefault(name, op)
    names: dict[str, list[str]] = {}
    for name, version in view.aliases.items() if view else ():
        names.setdefault(version, []).append(name)
    versions = {version.id: version for version in past.versions}
    parents = [(version.id, version.parent) for version in past.versions]
    rails = drawn(parents, head, candidates) if parents else []
    known: list[Version | None] = [*past.versions, None]
    nodes = tuple(
        Node(version, rail, ", ".join(names.get(version.id if version else "", ())), makers.get(version.id))
        if version
        else Node(None, rail, ", ".join(names.get("", ())), None)
        for version, rail in zip(known, rails, strict=False)
    )
    below, at = set(), head
    while at and at in versions and versions[at].parent not in below:
        at = versions[at].parent
        below.add(at)
    heads = frozenset(op.head for op in past.operations)
    width = max(map(len, rails), default=1)
    return Lists(past, deeds, nodes, width, heads, frozenset(below), versions)


def drawn(parents: Sequence[tuple[str, str]], head: str, candidates: Collection[str]) -> list[str]:
    """The lanes of a tree, one line a version and a last one for the unedited model.

    The leftmost lane is the head's. A version whose parent has a lane already hangs on it (├─○), so there are hardly
    more lanes than versions with several others above them.

    Args:
        parents: version and the one below it ("" for the unedited model), newest first.
        head: "" for the unedited model.
        candidates: versions that wait for review.
    """
    known = {name for name, _ in parents}
    # What each lane leads down to; the last one is of all lanes beyond those that are drawn apart.
    lanes: list[set[str]] = [set() for _ in range(LANES + 1)]
    lines = []
    for name, below in [*parents, ("", None)]:
        ended = [i for i, lane in enumerate(lanes) if name in lane]
        for i in ended:
            lanes[i].discard(name)
        if below is not None and below not in known:
            below = ""
        hung: int | None = None
        if name == head:
            at = 0
        elif ended:
            at = ended[0]
        else:
            hung = next((i for i, lane in enumerate(lanes) if below in lane), None)
            first = 1 if hung is None else hung + 1
            at = next((i for i in range(first, LANES) if not lanes[i]), LANES)
        if hung is None and below is not None:
            hung = next((i for i in range(at) if below in lanes[i]), None)
        glyph = HEAD if name == head else ROOT if not name else WAITS if name in candidates else OTHER
        lines.append(_line(lanes, at, glyph, hung, [i for i in ended if i != at]))
        if hung is None and below is not None:
            lanes[at].add(below)
    return lines


def _line(lanes: Sequence[Collection[str]], at: int, glyph: str, hung: int | None, ended: Sequence[int]) -> str:
    """One line of the graph.

    Args:
        lanes: those that go on.
        at: the lane of the version.
        hung: the lane that the version hangs on.
        ended: other lanes that come down to the version.
    """
    first, last = min([at, *ended] if hung is None else [at, hung, *ended]), max([at, *ended])
    parts = []
    for i, lane in enumerate(lanes):
        across = first <= i <= last
        if i == at:
            sign = glyph
        elif i == hung:
            sign = "├"
        elif i in ended and not lane:
            sign = "╯" if i == last else "┴"
        elif lane:
            sign = "┼" if across else "│" if i < LANES else "┊"
        else:
            sign = "─" if across else " "
        parts.append(sign + ("─" if first <= i < last else " "))
    return "".join(parts).rstrip()
