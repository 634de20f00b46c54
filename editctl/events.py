"""What can happen during a run, as frozen values that travel as one JSON object a line.

Knows: the vocabulary and its JSON form; the same stream feeds `apply --json`, the progress bar and the TUI.
Refuses: to print, to time, to decide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

SCHEMA = 1
"""Version of the event stream, sent as its first line."""
_UNUSUAL = re.compile(r"[^ -~]+")


@dataclass(frozen=True)
class Event:
    """Base of all events; `type` in the JSON is the class name in snake case."""


@dataclass(frozen=True)
class RunStarted(Event):
    """A plan is about to be carried out."""

    model: str
    device: str
    dtype: str
    method: str
    edits: int
    """Edits to solve for (adds and replacements)."""
    batches: int
    """Batches they are solved in."""
    drops: int


@dataclass(frozen=True)
class StageStarted(Event):
    """`stage` is one of: load, statistics, before, target, solve, after, commit, rebuild, trace, train."""

    stage: str
    total: int
    """Units of work the stage will count, 0 when it does not count."""
    batch: int = 0
    """Which batch of edits, from 1; 0 outside batches."""


@dataclass(frozen=True)
class Progress(Event):
    """`done` of `total` units of the stage are finished."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class MemoryUsed(Event):
    """Most memory used so far: the device's on CUDA, else the process's."""

    mb: float


@dataclass(frozen=True)
class TargetStep(Event):
    """One optimisation step of a batch of target vectors."""

    batch: int
    step: int
    loss: float
    """Mean negative log-likelihood of the batch's targets, finished ones included, nats a token."""
    active: int


@dataclass(frozen=True)
class TrainStep(Event):
    """One step of training what a method reads."""

    step: int
    total: int
    parts: dict[str, float]
    """The loss and its parts, by name."""


@dataclass(frozen=True)
class LayerSolved(Event):
    """One layer of one batch was written."""

    batch: int
    layer: int
    delta_norm: float
    """Frobenius norm of this batch's update."""
    weight_norm: float
    residual: float
    """Share of the wanted change at the keys that the solve left undone, 0 (all done) to 1."""


@dataclass(frozen=True)
class NullSpace(Event):
    """The retained rank of the null-space projector of one layer."""

    layer: int
    rank: int
    width: int
    energy: float
    """Share of the second moment's trace that lies inside the retained (editable) subspace."""


@dataclass(frozen=True)
class Note(Event):
    """Something the user should know; not an error."""

    message: str


@dataclass(frozen=True)
class GateFailed(Event):
    """The version does not reach what it is held to."""

    gate: str
    wanted: float
    value: float | None
    """What was measured; None where no prompt was asked to measure it with."""
    edits: list[str]
    """Ids of the edits that answered otherwise than wanted."""


@dataclass(frozen=True)
class VersionMade(Event):
    """The run's result is in the store."""

    version: str
    parent: str
    weights_hash: str
    seconds: dict[str, float]
    """Wall-clock seconds by stage."""
    peak_mb: float
    candidate: bool = False
    """Whether it waits for review and the head stays where it was."""


Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """An `Emit` that drops everything."""


def _kind(cls: type[Event]) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")


_KINDS: dict[str, type[Event]] = {_kind(cls): cls for cls in Event.__subclasses__()}


def to_line(event: Event) -> str:
    """The event as one line of JSON, without the line end."""
    return json_line({"type": _kind(type(event)), **asdict(event)})


def from_line(line: str) -> Event:
    """The event of one line of JSON; keys this version does not know are ignored.

    Raises:
        ValueError: the line is not JSON, or of a type this version does not know.
    """
    data = json.loads(line)
    cls = _KINDS.get(data.get("type", ""))
    if cls is None:
        raise ValueError(f"unknown event type {data.get('type')!r}")
    return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def json_line(value: object) -> str:
    """The value as one line of JSON that acts on no terminal: what cannot be seen is escaped, other text is not."""
    return _UNUSUAL.sub(_spelled, json.dumps(value, ensure_ascii=False))


def _spelled(run: re.Match[str]) -> str:
    if run[0].isprintable():
        return run[0]
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in run[0])


def header() -> str:
    """The first line of every stream."""
    return json.dumps({"type": "version", "schema": SCHEMA})
