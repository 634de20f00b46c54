"""What every way of writing a batch is given, and what it gives back.

A method that solves for target vectors is the editor's own; all others are functions from a `Job` to what they have
`Written`, registered in `families`. Knows: these values. Refuses: everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from editctl.delta import Overlay
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.solve import Projector
from editctl.events import Emit

Update = Tensor | tuple[Tensor, Tensor]
"""The update of a down-projection: d_out × d_in, or its two factors, d_out × m and m × d_in. In fp32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch of new requests on the weights as they are, without what lies over them."""

    model: Model
    requests: Sequence[Request]
    settings: Settings
    number: int
    """Of the batch, from 1; 0 for one that is written again."""
    emit: Emit
    library: Path
    """Where trained files lie."""
    projector: Callable[[int], Projector | None]
    """The null space of a block, None where anything may be written."""
    earlier: Sequence[Mapping[str, object]] = ()
    """What earlier batches of the same method found out (`Delta.found`), in order."""


@dataclass(frozen=True)
class Written:
    """What a batch comes to."""

    updates: Mapping[int, Update] = field(default_factory=dict)
    """By block, ascending."""
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    """By block the keys at the edits' places (d_in × n) where they were read on the way; else they are read again."""
    overlay: Overlay | None = None
    found: Mapping[str, object] = field(default_factory=dict)
    """What later batches go on with; numbers alone."""
