"""Drift: how far edits have moved what the model computes about things they are not about.

Protocol `hidden states`: the residual stream after the last edited block, on fixed ordinary sentences, compared token
by token with what it was before. Knows: how states are read, the relative shift, the angle of the principal subspace.
Refuses: to say what is before and what after; it is given both.

The first position of a sentence is left out: it sees nothing but itself, the same in every sentence, and many models
put a norm there that hides all others (Sun et al. 2024, massive activations).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editctl.atlas import knowledge
from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.errors import InvalidInput
from editctl.events import Emit, silent
from editctl.metrics.intervals import mean_interval
from editctl.metrics.values import Metric

HIDDEN = "hidden states"
"""The protocol, which also names the block: after different blocks other things are measured."""
RANK = 5
"""Directions of the principal subspace."""
PROMPTS = 100
ROWS = 128


def prompts() -> tuple[str, ...]:
    """The fixed prompts: the first `PROMPTS` of the ordinary English sentences that ship with the package, which state
    no fact."""
    return knowledge.load().ordinary[:PROMPTS]


@dataclass(frozen=True)
class States:
    """Hidden states of some texts after one block."""

    hidden: Tensor
    """Tokens × d, float64, on the CPU; the texts one after another, without their first positions."""
    ends: tuple[int, ...]
    """Row of each text's last token."""
    layer: int = 0


def states(model: Model, texts: Sequence[str], layer: int, emit: Emit = silent) -> States:
    """The residual stream after block `layer` on the weights the model wears; texts of one token are left out.

    Raises:
        InvalidInput: there is no such block.
    """
    if not 0 <= layer < len(model.blocks):
        raise InvalidInput(f"{model.name} has blocks 0 to {len(model.blocks) - 1}, not {layer}", "name another one")
    encoded = [ids for ids in (model.encode(text)[: model.context_length] for text in texts) if len(ids) > 1]
    found: dict[int, Tensor] = {}

    def work(indices: Sequence[int]) -> list[Tensor]:
        ids = torch.tensor([encoded[i] for i in indices], device=model.device)
        _, outputs = model.read(ids, torch.ones_like(ids), outputs=[layer])
        return list(outputs[layer][:, 1:].cpu().double())

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    # Of equal length, so that no padding moves a state.
    for _, group in itertools.groupby(order, key=lambda i: len(encoded[i])):
        alike = list(group)
        found |= zip(alike, in_chunks(alike, ROWS, work, emit, "prompts"), strict=True)
    parts = [found[i] for i in range(len(encoded))]
    ends = tuple(end - 1 for end in itertools.accumulate(map(len, parts)))
    return States(torch.cat(parts) if parts else torch.zeros(0, 1, dtype=torch.float64), ends, layer)


@dataclass(frozen=True)
class Drift:
    """How far states have moved. A shift is ‖h' − h‖ / ‖h‖ of one token; NaN where a state is no number."""

    last: tuple[float, ...]
    """The shift at the last token of each text."""
    mean: float
    """Of the shifts of all tokens."""
    largest: float
    tokens: int
    angle: float | None
    """Between the principal subspaces before and after, in degrees, 0 to 90; None when there are too few states."""
    layer: int = 0
    """The block after which the states are."""

    def metrics(self) -> tuple[Metric, ...]:
        """The mean shift at the last token with Student's interval over texts; that of all tokens; the largest of all
        tokens; the angle."""
        if not self.last:
            return ()
        low, high = mean_interval(self.last)
        low = None if low is None else max(0.0, low)
        mean = math.fsum(self.last) / len(self.last)
        protocol = f"{HIDDEN} after block {self.layer}"
        found = [
            Metric("drift", protocol, mean, len(self.last), False, "", low, high),
            Metric("drift", protocol, self.mean, self.tokens, False, "all tokens"),
            Metric("drift", protocol, self.largest, self.tokens, False, "largest"),
        ]
        if self.angle is not None:
            found.append(Metric("drift angle", protocol, self.angle, self.tokens, False))
        return tuple(found)


def drift(before: States, after: States, rank: int = RANK) -> Drift:
    """How far the states of the same texts have moved.

    Raises:
        ValueError: they are of other texts.
    """
    if (before.layer, before.ends) != (after.layer, after.ends) or before.hidden.shape != after.hidden.shape:
        raise ValueError("the states are of other texts, or after another block")
    tokens = len(before.hidden)
    if not tokens:
        return Drift((), 0.0, 0.0, 0, None, before.layer)
    moved = (after.hidden - before.hidden).norm(dim=1)
    # A state of zeros has no length to compare with; only a model without weights has one.
    shifts = moved / before.hidden.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return Drift(
        tuple(shifts[list(before.ends)].tolist()),
        float(shifts.mean()),
        float(shifts.max()),
        tokens,
        _angle(before.hidden, after.hidden, rank),
        before.layer,
    )


def _angle(before: Tensor, after: Tensor, rank: int) -> float | None:
    """Largest principal angle (degrees) between the subspaces that the first `rank` principal components of the rows
    span (Björck and Golub 1973); None where they are not `rank` dimensions."""
    if not (before.isfinite().all() and after.isfinite().all()):
        return math.nan
    bases = []
    for rows in (before, after):
        _, sizes, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        # Beyond the rank of the states, directions are rounding.
        if len(sizes) <= rank or not sizes[rank - 1] > 1e-10 * sizes[0]:
            return None
        bases.append(directions[:rank].T)
    one, other = bases
    cosines = torch.linalg.svdvals(one.T @ other)
    # The arc cosine is blind to small angles, the arc sine to those near 90 degrees.
    sine = float(torch.linalg.matrix_norm(other - one @ (one.T @ other), ord=2))
    cosine = float(cosines.min())
    return math.degrees(math.asin(min(1.0, sine)) if sine < cosine else math.acos(max(0.0, min(1.0, cosine))))
