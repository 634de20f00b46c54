"""Gates: what a version must reach before the head moves to it.

Knows: the names of metrics that can be asked for, and which edits stand behind a value that is too low. Refuses:
models, stores; it judges numbers that were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from editctl.errors import InvalidInput
from editctl.metrics.edits import NAMES, PROTOCOLS, RETENTION, forgotten, hit
from editctl.metrics.values import Answer, Metric

_KIND = {name: kind for kind, name in NAMES.items()}
NAMED = (*PROTOCOLS, *(f"{name}.{protocol}" for name, protocols in PROTOCOLS.items() for protocol in protocols[1:]))
"""What a threshold can be set for: a share in its first protocol, `generated` where it has that, or NAME.PROTOCOL."""


@dataclass(frozen=True)
class Failure:
    """A gate that a version does not pass."""

    gate: str
    wanted: float
    value: float | None
    """What was measured; None where no prompt was asked to measure it with."""
    edits: tuple[str, ...]
    """Ids of the edits that answered otherwise than wanted."""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.gate} cannot be measured: no prompt for it was asked"
        # A share just under its gate must not read like it.
        digits = next((n for n in (1, 2, 4) if round(100 * self.value, n) != round(100 * self.wanted, n)), 8)
        return f"{self.gate} is {100 * self.value:.{digits}f} %, wanted {100 * self.wanted:.{digits}f} %"


def check(gates: Mapping[str, float]) -> None:
    """Make sure that every threshold is one.

    Raises:
        InvalidInput: a metric of that name does not exist, or the threshold is no share.
    """
    for name, wanted in gates.items():
        if name not in NAMED:
            near = get_close_matches(name, NAMED, 1)
            hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(NAMED)}"
            raise InvalidInput(f"there is no metric {name} to hold a version to", hint)
        if not 0 <= wanted <= 1:
            raise InvalidInput(f"gate {name} = {wanted} is no share", "give a number from 0 to 1")


def failures(
    gates: Mapping[str, float], metrics: Sequence[Metric], answers: Sequence[Answer], edits: int
) -> tuple[Failure, ...]:
    """The gates that a version with these measurements does not pass.

    Args:
        edits: how many are live in it; without any it has nothing to pass.
    """
    found = []
    values = {(metric.name, metric.protocol): metric.value for metric in metrics if not metric.axis}
    for gate, wanted in gates.items() if edits else ():
        name, _, protocol = gate.partition(".")
        # A gate that another editctl knew is one that cannot be measured.
        protocol = protocol or PROTOCOLS.get(name, ("",))[0]
        value = values.get((name, protocol))
        if name == RETENTION and value is None:
            # Nothing was written after any edit: there is nothing yet that could have been forgotten.
            continue
        if value is None or not value >= wanted:
            asked = (answer for answer in answers if name in _KIND and answer.kind == _KIND[name])
            missed = forgotten(answers) if name == RETENTION else (a.edit for a in asked if hit(a, protocol) is False)
            found.append(Failure(gate, wanted, value, tuple(dict.fromkeys(missed))))
    return tuple(found)
