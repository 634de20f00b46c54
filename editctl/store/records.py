"""The values a store keeps: versions, what is live in them, operations.

Knows: their fields. Refuses: SQL, files, tensors; these values travel to the engine and to both faces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from editctl.errors import StoreError
from editctl.metrics.values import Answer, Metric

if TYPE_CHECKING:
    from editctl.spec import Edit

BASE = "base"
"""What the unedited model is called in refs; in rows and fields it is the empty string."""
CANDIDATE = "candidate"
"""The alias of the version that waits for review, the newest of several."""


@lru_cache(maxsize=10_000)
def _read(text: str) -> Edit:
    from editctl.spec import Edit

    try:
        return Edit.from_json(json.loads(text))
    except ValueError:
        message = "the text of an edit in the store is not what was recorded"
        raise StoreError(message, "`editctl verify` says which") from None


class Stored(NamedTuple):
    """What is known of an edit without reading it whole. Versions may have a hundred thousand: tuples are made in a
    quarter of the time that objects take."""

    id: str
    prompt: str
    weights_fingerprint: str
    notes_fingerprint: str
    digest: str
    """Content name of the edit in the store."""
    text: str
    """The edit as JSON."""

    @property
    def whole(self) -> Edit:
        """The edit."""
        return _read(self.text)


class LiveEdit(NamedTuple):
    """One edit of a version and where its rank-one term lies."""

    known: Edit | Stored
    delta: str
    """Name of the factor file that holds its column."""
    column: int

    @property
    def id(self) -> str:
        """The edit's id."""
        return self.known.id

    @property
    def edit(self) -> Edit:
        """The edit."""
        return self.known.whole


@dataclass(frozen=True, kw_only=True)
class _Made:
    """How the weights of a version came to be."""

    parent: str
    """The version below, "" for the unedited model."""
    base: str
    """Content hash of the unedited model and its tokenizer."""
    model: str
    """The model as the user named it."""
    dtype: str
    method: str
    params: dict[str, Any]
    seed: int
    weights_hash: str
    libraries: dict[str, str]
    """Library versions by name."""
    seconds: dict[str, float]
    """Wall-clock seconds by stage."""
    peak_mb: float
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By edited module, Frobenius norms of the whole update and of the weight that carries it."""
    gates: dict[str, float] = field(default_factory=dict)
    """Thresholds that the version was held to, by metric."""


@dataclass(frozen=True, kw_only=True)
class Draft(_Made):
    """A version that is not committed yet, with all that is recorded beside it."""

    edits: tuple[LiveEdit, ...] = field(repr=False)
    """Everything live in the version, in order of application."""
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    metrics: tuple[Metric, ...] = ()
    events: tuple[str, ...] = field(default=(), repr=False)
    """The run's events, one JSON line each."""


@dataclass(frozen=True, kw_only=True)
class Version(_Made):
    """A committed version; it never changes."""

    id: str
    """The first 12 hexadecimal digits of the SHA-256 of everything in its row."""
    created_at: str
    """ISO 8601, UTC."""
    who: str
    """user@host"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs between two versions, of which None is the unedited model; each pair is of the old, of the new."""

    old: Version | None
    new: Version | None
    facts: tuple[Mapping[str, Edit | Stored], Mapping[str, Edit | Stored]]
    """By id, the live edits that only one of the two has as they are, weights aside."""
    moved: tuple[tuple[str, Answer], ...]
    """The answers of the new version that are not what they were, each with what it was."""
    metrics: tuple[tuple[Metric, ...], tuple[Metric, ...]]
    norms: tuple[Mapping[str, tuple[float, float]], Mapping[str, tuple[float, float]]]
    """As a version has them."""

    @property
    def added(self) -> tuple[str, ...]:
        """Ids that only the new version has."""
        return tuple(name for name in self.facts[1] if name not in self.facts[0])

    @property
    def removed(self) -> tuple[str, ...]:
        """Ids that only the old version has."""
        return tuple(name for name in self.facts[0] if name not in self.facts[1])

    @property
    def changed(self) -> tuple[str, ...]:
        """Ids that both have, for different edits."""
        return tuple(name for name in self.facts[1] if name in self.facts[0])


@dataclass(frozen=True)
class View:
    """What an operation leaves behind: everything that is not a version."""

    head: str = ""
    """Version id, "" for the unedited model."""
    candidates: tuple[str, ...] = ()
    """Versions that wait for review, oldest first."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Version id by movable name, "" for the unedited model."""


@dataclass(frozen=True)
class Operation:
    """One change of the view."""

    id: int
    """1, 2, 3 …"""
    parent: int
    """The operation before, 0 for none."""
    verb: str
    """apply, drop, replay, squash, import, accept, reject, alias, undo, redo or restore."""
    head_before: str
    head: str
    """Version id, "" for the unedited model."""
    at: str
    who: str
    command: str
    undoes: int
    """Undo: the operation whose effect it took back. Redo: the undo it took back. Else 0."""
    description: str
    note: str = ""
    """Why, in the words of who did it."""
    about: str = ""
    """The version that was made or reviewed, "" for none."""
    edits: tuple[str, ...] = ()
    """Ids of the edits of `about` that a review speaks of; none means all of it."""
    candidates: tuple[str, ...] = ()
    """The view's candidates after it."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """The view's aliases after it."""

    @property
    def view(self) -> View:
        """Everything as it was left."""
        return View(self.head, self.candidates, self.aliases)


@dataclass(frozen=True)
class Evidence:
    """What was found out about a version after it was made, for example where a fact is kept."""

    id: str
    """The first 12 hexadecimal digits of the SHA-256 of everything else and of the id of the one before it."""
    version: str
    """Version id, "" for the unedited model."""
    kind: str
    """trace, …"""
    edit: str
    """Id of the edit it is about, "" for none."""
    data: dict[str, Any]
    at: str
    """ISO 8601, UTC."""
    who: str
    """user@host"""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a store."""

    what: str
    """Which row or file."""
    wrong: str
    remedy: str
    repaired: bool = False
