"""Causal effects of restored states: what one prompt's trace holds, what many add up to, the blocks they speak for.

Knows: roles of tokens, effects by role and block with intervals, and the rule by which blocks are proposed. Refuses:
models and tensors; these values travel to the store and to both faces, which load no torch.

Terms are those of Meng et al. 2022 (ROME, section 2): p is the probability of the answer's first token. The total
effect is p(clean) − p(corrupted); the indirect effect of a cell is p(corrupted, the cell restored) − p(corrupted); its
mean over prompts is the average indirect effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from editctl.metrics.intervals import mean_interval
from editctl.metrics.kinds import ATTENTION as ATTENTION
from editctl.metrics.kinds import KINDS as KINDS
from editctl.metrics.kinds import MLP as MLP
from editctl.metrics.kinds import SAMPLES as SAMPLES
from editctl.metrics.kinds import STATE as STATE

FIRST, MIDDLE, SUBJECT, NEXT, FURTHER, LAST = ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""The roles of a prompt's tokens from the subject on, in order. A subject of one token has only its last; where the
subject ends the prompt, its last token is the prompt's."""
BEFORE = "before"
"""The role of tokens before the subject, where nothing is corrupted and nothing can be restored."""
TRACE, AVERAGES = "trace", "trace averages"
"""Kinds of evidence in a store: one prompt's trace, and what those of one command add up to."""
WINDOW, OF_BLOCKS, LEAST_WINDOW = 10, 48, 3
"""ROME restores MLPs and attention in windows of 10 of GPT-2 XL's 48 blocks. A shallower model gets the same share of
its blocks, but at least 3."""
LEAST = 0.1
"""Share of p(clean) that corrupting must take away for a prompt to count in averages: where the subject hardly matters,
there is nothing to restore."""


@dataclass(frozen=True)
class Case:
    """A prompt to trace."""

    edit: str
    """Id of the edit it is of, "" for none."""
    prompt: str
    start: int
    """Where in the prompt the subject begins, in characters."""
    end: int
    answer: str = ""
    """The answer whose probability is traced; empty for what the model says."""

    @property
    def subject(self) -> str:
        """The words that are corrupted."""
        return self.prompt[self.start : self.end]


def window_of(blocks: int) -> int:
    """Blocks that are restored together in a model with so many."""
    return min(WINDOW, blocks, max(LEAST_WINDOW, round(blocks * WINDOW / OF_BLOCKS)))


def roles(tokens: int, start: int, end: int) -> tuple[str, ...]:
    """The role of each of a prompt's tokens, of which start..end are the subject's."""
    found = [BEFORE] * start + [MIDDLE] * (end - start) + [FURTHER] * (tokens - end)
    found[start] = FIRST
    found[end - 1] = SUBJECT
    if end < tokens:
        found[end] = NEXT
    found[-1] = LAST
    return tuple(found)


@dataclass(frozen=True)
class Trace:
    """The traced prompt of one edit, or a prompt of its own."""

    edit: str
    """Id of the edit, "" for none."""
    prompt: str
    subject: str
    answer: str
    """What the model goes on with, or the answer that was asked for; its first token is what p is of."""
    token: str
    """That token, as text."""
    tokens: tuple[str, ...]
    """The prompt's tokens, as texts."""
    roles: tuple[str, ...]
    clean: float
    """p of the prompt as it is."""
    corrupted: float
    """Mean p over the samples of noise."""
    effects: Mapping[str, tuple[tuple[float, ...], ...]]
    """By kind, the indirect effect of each token (rows) and block (columns). A window is named by the block in its
    middle."""
    window: int
    """Blocks that are restored together, of the kinds that come in windows."""
    samples: int
    seed: int
    noise: float
    """Standard deviation of the noise."""

    @property
    def total(self) -> float:
        """The total effect."""
        return self.clean - self.corrupted

    @property
    def counts(self) -> bool:
        """Whether corrupting the subject changes enough for the prompt to count in averages."""
        return self.total > LEAST * self.clean

    @property
    def blocks(self) -> int:
        """How many blocks were traced."""
        return max((len(row) for rows in self.effects.values() for row in rows), default=0)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; probabilities to the sixth digit."""

        def rounded(rows: tuple[tuple[float, ...], ...]) -> list[list[float]]:
            return [[round(value, 6) for value in row] for row in rows]

        numbers = {"clean": round(self.clean, 6), "corrupted": round(self.corrupted, 6)}
        return {**asdict(self), **numbers, "effects": {kind: rounded(rows) for kind, rows in self.effects.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trace:
        """Back from `to_json`; keys this version does not know are ignored.

        Raises:
            ValueError: it is not what `to_json` makes.
        """
        try:
            values = {f.name: data[f.name] for f in fields(cls)}
            for name in ("tokens", "roles"):
                values[name] = tuple(map(_text, values[name]))
            for name in ("edit", "prompt", "subject", "answer", "token"):
                _text(values[name])
            for name in ("window", "samples", "seed"):
                values[name] = _count(values[name])
            values |= {name: _share(values[name]) for name in ("clean", "corrupted")}
            values["noise"] = float(values["noise"])
            values["effects"] = {
                kind: tuple(tuple(map(_share, row)) for row in rows)
                for kind, rows in dict(values["effects"]).items()
                if kind in KINDS
            }
            made = cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no trace: {error}") from None
        widths = {len(row) for rows in made.effects.values() for row in rows}
        if len(widths) > 1 or any(len(rows) != len(made.tokens) for rows in made.effects.values()):
            raise ValueError("this is no trace: its rows differ in length")
        if len(made.roles) != len(made.tokens):
            raise ValueError("this is no trace: tokens and roles differ in number")
        return made


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or abs(value) > 2**63:
        raise TypeError(f"{type(value).__name__} is no count")
    return value


def _end(value: Any) -> float:
    """The end of an interval, which may lie beyond what a mean can be."""
    if type(value) not in (int, float) or not -1000 <= value <= 1000:
        raise ValueError("the end of an interval is none")
    return float(value)


def _share(value: Any) -> float:
    """A probability, or a difference of two."""
    if type(value) not in (int, float) or not -1.001 <= value <= 1.001:
        raise ValueError("a probability is none")
    return float(value)


@dataclass(frozen=True)
class Average:
    """The average indirect effect of one kind at tokens of one role, block by block."""

    kind: str
    role: str
    n: int
    """Prompts that have such a token; several of one prompt are averaged first, so that each prompt counts once."""
    means: tuple[float, ...]
    lows: tuple[float | None, ...]
    """Ends of the 95 % interval over prompts (Student's); None for a single prompt."""
    highs: tuple[float | None, ...]

    @property
    def peak(self) -> int:
        """The block with the highest mean."""
        return max(range(len(self.means)), key=lambda block: self.means[block], default=0)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Average:
        """Back from `to_json`.

        Raises:
            ValueError: it is not what `to_json` makes.
        """
        try:
            means = tuple(map(_share, data["means"]))
            ends = [tuple(None if end is None else _end(end) for end in data[name]) for name in ("lows", "highs")]
            made = cls(_text(data["kind"]), _text(data["role"]), _count(data["n"]), means, *ends)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no average: {error}") from None
        if made.kind not in KINDS or not means or {len(end) for end in ends} != {len(means)}:
            raise ValueError("this is no average: of no kind, or its rows differ in length")
        return made


def averages(traces: Sequence[Trace]) -> tuple[Average, ...]:
    """Average indirect effects by kind and role over the prompts that count, in the order of `KINDS` and `ROLES`."""
    counted = [trace for trace in traces if trace.counts]
    found = []
    for kind in KINDS:
        for role in ROLES:
            rows = [row for trace in counted if (row := _mean_row(trace, kind, role))]
            if rows:
                columns = list(zip(*rows, strict=True))
                ends = [mean_interval(column) for column in columns]
                means = tuple(math.fsum(column) / len(column) for column in columns)
                lows, highs = zip(*ends, strict=True)
                found.append(Average(kind, role, len(rows), means, lows, highs))
    return tuple(found)


def _mean_row(trace: Trace, kind: str, role: str) -> tuple[float, ...]:
    """The mean over a prompt's tokens of one role, block by block; empty when it has none."""
    rows = [row for row, own in zip(trace.effects.get(kind, ()), trace.roles, strict=False) if own == role]
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


@dataclass(frozen=True)
class Proposal:
    """Blocks to edit, or why there are none to propose."""

    layers: tuple[int, ...]
    """Empty when nothing can be proposed."""
    why: str
    effect: float | None = None
    """Mean of the blocks' average indirect effects."""
    n: int = 0
    """Prompts it is made of."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proposal:
        """Back from `to_json`.

        Raises:
            ValueError: it is not what `to_json` makes.
        """
        try:
            layers, effect = tuple(map(_count, data["layers"])), data["effect"]
            return cls(layers, _text(data["why"]), None if effect is None else _share(effect), _count(data["n"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no proposal: {error}") from None


def propose(found: Sequence[Average], count: int) -> Proposal:
    """The `count` neighbouring blocks with the highest average indirect effect of MLPs at the last subject token.

    A block stands for the window in whose middle it is. The last block is none of them: what it writes at the subject
    reaches no later token.
    """
    average = next((a for a in found if (a.kind, a.role) == (MLP, SUBJECT)), None)
    if average is None:
        return Proposal((), "no prompt that counts was traced by MLP with text after its subject")
    blocks = len(average.means) - 1
    count = min(count, blocks)
    means = [math.fsum(average.means[at : at + count]) / count for at in range(blocks - count + 1) if count]
    start = max(range(len(means)), key=lambda at: means[at], default=0)
    layers = tuple(range(start, start + count))
    peak = max(layers, key=lambda at: average.means[at], default=0)
    low = average.lows[peak]
    if not layers or average.means[peak] <= 0 or (low is not None and low <= 0):
        return Proposal((), f"restoring MLPs at the {SUBJECT} brings nothing back that is more than chance")
    why = f"the {count} neighbouring blocks whose MLPs restore most at the {SUBJECT}"
    return Proposal(layers, why, means[start], average.n)


@dataclass(frozen=True)
class Summary:
    """What the traces of several prompts add up to."""

    edits: tuple[str, ...]
    """Ids of those that count."""
    left_out: int
    """How many do not."""
    averages: tuple[Average, ...]
    proposal: Proposal
    window: int
    """As of each trace."""
    samples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        parts = {"averages": [average.to_json() for average in self.averages], "proposal": self.proposal.to_json()}
        return {**asdict(self), "edits": list(self.edits), **parts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Summary:
        """Back from `to_json`; keys this version does not know are ignored.

        Raises:
            ValueError: it is not what `to_json` makes.
        """
        try:
            edits, averages = tuple(map(_text, data["edits"])), tuple(map(Average.from_json, data["averages"]))
            numbers = [_count(data[name]) for name in ("left_out", "window", "samples", "seed")]
            left_out, *settings = numbers
            return cls(edits, left_out, averages, Proposal.from_json(data["proposal"]), *settings)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"these are no averages: {error}") from None


def summary(traces: Sequence[Trace], count: int) -> Summary:
    """What traces of one command add up to.

    Args:
        traces: at least one; all with the same window, samples and seed.
        count: how many blocks are wanted to edit.
    """
    found, first = averages(traces), traces[0]
    counted = tuple(trace.edit for trace in traces if trace.counts)
    settings = (first.window, first.samples, first.seed)
    return Summary(counted, len(traces) - len(counted), found, propose(found, count), *settings)
