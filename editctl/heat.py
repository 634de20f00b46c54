"""Causal traces as Rich text: heat maps that fit 80 columns and can be read without colour.

Knows: how many columns a block gets, numbers where they fit and shades where they do not. Refuses: to compute effects.

Every text that comes from a spec, a model or a store goes through `visible` and into a `Text`, never into markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from editctl.metrics.effects import (
    AVERAGES,
    BEFORE,
    FIRST,
    KINDS,
    MIDDLE,
    SUBJECT,
    TRACE,
    Average,
    Proposal,
    Summary,
    Trace,
)
from editctl.plan import count
from editctl.spec import visible

if TYPE_CHECKING:
    from editctl.store import Evidence

SHADES = " ·░▒▓█"
"""From no effect to the largest."""
STYLES = ("dim", "", "black on #c6dbef", "black on #6baed6", "#ffffff on #2171b5", "bold #ffffff on #08306b")
"""As `SHADES`, for numbers."""
CELL = 4
"""Columns of a cell that holds a number: three digits or two and a sign, and a space."""
LABEL = 24
"""Columns of a row's name at most."""
LISTED = 100
"""Prompts that are listed."""
MEANING = {
    "state": "state: one block's output put back",
    "mlp": "mlp: what the MLPs of {} blocks write put back, by the middle one",
    "attention": "attention: what the attention of {} blocks writes put back, by the middle one",
}


def level(value: float, top: float) -> int:
    """Which of `SHADES` an effect has, if the largest one is `top`."""
    share = value / top if top > 0 and math.isfinite(value) else 0.0
    return max(0, min(len(SHADES) - 1, math.ceil(share * (len(SHADES) - 1) - 0.5)))


def named(token: str, role: str) -> str:
    """A token as rows name it; those of the subject have a star."""
    shown = visible(token, LABEL).strip() or repr(token)
    return shown + "*" * (role in (FIRST, MIDDLE, SUBJECT))


@dataclass(frozen=True)
class Row:
    """One row of a heat map."""

    name: str
    values: Sequence[float]
    """Effects, 0 to 1."""
    note: str = ""
    """What stands behind it; by default its largest value and where."""

    @property
    def said(self) -> str:
        """What stands behind it."""
        return self.note or highest(self.values)


def highest(values: Sequence[float]) -> str:
    """The largest of a row's values, and at which block."""
    at = max(range(len(values)), key=lambda block: values[block])
    return f"{at}: {points(values[at])}"


def points(effect: float) -> str:
    """An effect in points of probability."""
    return f"{round(100 * effect, 1) + 0.0:.1f}"


class Heat:
    """Rows of effects by block, in points of probability; in bands one below another where the blocks need them."""

    def __init__(self, rows: Sequence[Row], top: float) -> None:
        self._rows, self._top = rows, top

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Text]:
        """The heat map in so many columns."""
        blocks = max((len(row.values) for row in self._rows), default=0)
        if not blocks:
            return
        name = min(max(cell_len(row.name) for row in self._rows), LABEL)
        said = max(cell_len(row.said) for row in self._rows)
        room = max(width - name - said - 4, 8)
        cell = CELL if room >= CELL * blocks else max(1, min(CELL - 1, room // blocks))
        a_band = room // cell
        for begin in range(0, blocks, a_band):
            end = min(begin + a_band, blocks)
            heads = _heads(begin, end, cell)
            yield Text(f"{'':{name}} {heads}  highest at", "bold", no_wrap=True)
            for row in self._rows:
                line = Text(f"{set_cell_size(row.name, name)} ", no_wrap=True)
                for value in row.values[begin:end]:
                    of = level(value, self._top)
                    if cell == CELL:
                        line.append(f"{round(100 * value):3d}", STYLES[of]).append(" ")
                    else:
                        line.append(SHADES[of] * cell)
                yield line.append(f"  {row.said}", "dim")


def _heads(begin: int, end: int, cell: int) -> str:
    """The numbers of blocks above their cells, as many as have room."""
    if cell == CELL:
        return "".join(f"{block:3d} " for block in range(begin, end))
    line = ""
    for block in range(begin, end):
        at = (block - begin) * cell
        if block % 5 == 0 and len(line) <= at:
            line = line.ljust(at) + str(block)
    return line.ljust((end - begin) * cell)[: (end - begin) * cell]


def trace_view(trace: Trace) -> RenderableType:
    """One prompt: its probabilities and a heat map a kind, rows from the subject on."""
    what = f"{visible(trace.edit, 80)}: " if trace.edit else ""
    head = Text(f"{what}{visible(trace.prompt, 300)} ").append(f"→ {visible(trace.answer, 100)}\n", "bold")
    head.append(
        f"p({visible(trace.token)!r}) {100 * trace.clean:.1f} %, with the subject corrupted "
        f"{100 * trace.corrupted:.1f} %: total effect {points(trace.total)} points "
        f"({trace.samples} samples, noise {trace.noise:.3g}, seed {trace.seed})"
    )
    if not trace.counts:
        head.append(f"\n{LOW}", "yellow")
    parts: list[RenderableType] = [head]
    top = max(trace.total, *(value for rows in trace.effects.values() for row in rows for value in row), 0.0)
    for kind in (kind for kind in KINDS if kind in trace.effects):
        known = zip(trace.tokens, trace.roles, trace.effects[kind], strict=True)
        rows = [Row(named(token, role), values) for token, role, values in known if role != BEFORE]
        parts += [Text(f"\n{MEANING[kind].format(trace.window)}", "bold"), Heat(rows, top)]
    parts.append(Text("\nEffects in points of p; * marks the subject. Tokens before it have none.", "dim"))
    return Group(*parts)


LOW = "The subject hardly matters here: corrupting it takes less than a tenth of p away. Left out of averages."


def averages_view(traces: Sequence[Trace], found: Sequence[Average]) -> RenderableType:
    """Many prompts: one line each, then the average indirect effects by role with their intervals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("edit", overflow="fold", ratio=3)
    table.add_column("answer", overflow="fold", ratio=2)
    for head in ("clean", "corrupted", "total effect"):
        table.add_column(head, justify="right", no_wrap=True)
    for trace in traces[:LISTED]:
        total = Text(points(trace.total), "" if trace.counts else "yellow")
        chances = (f"{100 * p:.1f} %" for p in (trace.clean, trace.corrupted))
        table.add_row(Text(visible(trace.edit, 80)), Text(visible(trace.answer)), *chances, total)
    parts: list[RenderableType] = [table]
    if len(traces) > LISTED:
        parts.append(Text(f"… and {len(traces) - LISTED} more (--json)", "dim"))
    left = sum(not trace.counts for trace in traces)
    counted = Text(f"\n{len(traces) - left} of {len(traces)} prompts count")
    parts.append(
        counted.append(f"; in {left} corrupting the subject takes less than a tenth of p away" if left else "")
    )
    top = max((value for average in found for value in average.means), default=0.0)
    for kind in KINDS:
        if rows := [average_row(average) for average in found if average.kind == kind]:
            parts += [Text(f"\n{MEANING[kind].format(traces[0].window)}", "bold"), Heat(rows, top)]
    if found:
        meaning = "Average indirect effects in points of p, with the 95 % interval of the highest; ×: prompts."
        parts.append(Text(f"\n{meaning}", "dim"))
    return Group(*parts)


def average_row(average: Average) -> Row:
    """An average as a row: the highest value with its interval and the number of prompts behind it."""
    return Row(
        visible(average.role, LABEL), average.means, f"{average.peak}: {told(average, average.peak)} ×{average.n}"
    )


def told(average: Average, block: int) -> str:
    """The mean at a block with its interval, in points."""
    low, high = average.lows[block], average.highs[block]
    interval = "" if low is None or high is None else f" [{points(low)}, {points(high)}]"
    return points(average.means[block]) + interval


def proposal_line(proposal: Proposal) -> Text:
    """Which blocks to edit, and why."""
    if not proposal.layers or proposal.effect is None:
        return Text(f"No blocks are proposed: {visible(proposal.why, 300)}.", "yellow")
    blocks = ", ".join(map(str, proposal.layers))
    text = Text(f"Proposed: blocks {blocks}", "bold")
    many = count(proposal.n, "prompt")
    return text.append(f", {visible(proposal.why, 300)} ({points(proposal.effect)} points; {many}).", "not bold")


def picture(traces: Sequence[Trace], found: Sequence[Average]) -> Mapping[str, Any]:
    """The same as arguments of `plots.heatmap`: kinds below each other; tokens of one prompt, roles of many."""
    values: list[Sequence[float]] = []
    names: list[str] = []
    blocks = max(trace.blocks for trace in traces)
    for kind in KINDS:
        if len(traces) == 1:
            known = zip(traces[0].tokens, traces[0].roles, traces[0].effects.get(kind, ()), strict=False)
            rows = [(named(token, role), effects) for token, role, effects in known]
        else:
            rows = [
                (f"{visible(average.role, LABEL)} ×{average.n}", average.means)
                for average in found
                if average.kind == kind
            ]
        if rows and values:
            names.append("")
            values.append([math.nan] * blocks)
        names += [f"{kind}  {name}" for name, _ in rows]
        values += [effects for _, effects in rows]
    one = traces[0]
    title = f"{one.prompt} → {one.answer}" if len(traces) == 1 else "Average indirect effects"
    label = "indirect effect, probability"
    columns = [str(block) for block in range(blocks)]
    return {"values": values, "rows": names, "columns": columns, "title": title, "label": label}


def evidence_view(found: Sequence[Evidence]) -> Text:
    """What was found out about a version, newest first, a line each."""
    text = Text()
    for one in found[:LISTED]:
        text.append(f"{visible(one.kind, 20)} ", "bold").append(f"{visible(one.at[:16])}  ")
        text.append(evidence_line(one)).append("\n")
    if len(found) > LISTED:
        text.append(f"… and {len(found) - LISTED} more (editctl show --json)\n", "dim")
    text.right_crop(1)
    return text


def evidence_line(one: Evidence) -> str:
    """What a piece of evidence says, on one line."""
    try:
        if one.kind == AVERAGES:
            found = Summary.from_json(one.data)
            blocks = ", ".join(map(str, found.proposal.layers))
            return f"{count(len(found.edits), 'prompt')}, proposed: {f'blocks {blocks}' if blocks else 'none'}"
        if one.kind == TRACE:
            trace = Trace.from_json(one.data)
            what = f"{visible(trace.edit or trace.prompt)} → {visible(trace.answer, 30)}"
            return f"{what}: total effect {points(trace.total)} points"
    except ValueError as error:
        return visible(str(error), 200)
    return visible(one.edit)
