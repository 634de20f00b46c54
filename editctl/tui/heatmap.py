"""A heat map one can walk in: rows of effects by block, one cell chosen.

Knows: what fits into its columns and lines, the cursor. Refuses: what the rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from editctl.heat import CELL, SHADES, STYLES, level
from editctl.tui.rows import fit

NAME = 24
"""Columns of a row's name at most."""
LEAST = 8
"""Columns for cells, whatever the names take."""


@dataclass(frozen=True)
class Line:
    """One row."""

    name: str
    values: Sequence[float]
    """Effects by block, in shares of 1."""


class HeatMap(Widget, can_focus=True):
    """Rows by blocks: numbers where they have room, else shades; what has no room is come to by walking."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"heat--head", "heat--cursor", "heat--blurred"}
    DEFAULT_CSS = """
    HeatMap {
        height: 1fr;
        .heat--head { color: $text-muted; text-style: bold; }
        .heat--cursor { background: $block-cursor-background; color: $block-cursor-foreground; text-style: bold; }
        .heat--blurred { text-style: reverse; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "step(0,-1)", "left", show=False, id="heat.left"),
        Binding("right,l", "step(0,1)", "right", show=False, id="heat.right"),
        Binding("up,k", "step(-1,0)", "up", show=False, id="heat.up"),
        Binding("down,j", "step(1,0)", "down", show=False, id="heat.down"),
        Binding("home", "jump(0)", "first", show=False, id="heat.first"),
        Binding("end", "jump(-1)", "last", show=False, id="heat.last"),
    ]

    class Moved(Message):
        """Another cell is chosen."""

    def __init__(self, **named: object) -> None:
        super().__init__(**named)  # type: ignore[arg-type]
        self.lines: Sequence[Line] = ()
        self.row = self.block = 0
        self._top = 1.0

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return max((len(line.values) for line in self.lines), default=0)

    def show(self, lines: Sequence[Line], top: float) -> None:
        """Take other rows.

        Args:
            top: the effect that has the strongest shade.
        """
        self.lines, self._top = lines, top
        self.move(self.row, self.block)

    def move(self, row: int, block: int) -> None:
        """Choose a cell; what lies beyond the edge is at it."""
        self.row = max(0, min(row, len(self.lines) - 1))
        self.block = max(0, min(block, self.blocks - 1))
        self.post_message(self.Moved())
        self.refresh()

    def to_highest(self) -> None:
        """Choose the cell with the largest effect."""
        cells = [(value, -row, -at) for row, line in enumerate(self.lines) for at, value in enumerate(line.values)]
        if cells:
            _, row, block = max(cells)
            self.move(-row, -block)

    def action_step(self, down: int, right: int) -> None:
        """To the cell beside."""
        self.move(self.row + down, self.block + right)

    def action_jump(self, to: int) -> None:
        """To the first or last block."""
        self.move(self.row, to if to >= 0 else self.blocks - 1)

    # Drawing

    @property
    def _label(self) -> int:
        """Columns of the names."""
        widest = max((cell_len(line.name) for line in self.lines), default=0)
        return max(min(widest, NAME, self.size.width - LEAST - 1), 1)

    @property
    def _cell(self) -> int:
        """Columns of a cell."""
        room = self.size.width - self._label - 1
        return CELL if room >= CELL * self.blocks else max(1, min(CELL - 2, room // max(self.blocks, 1)))

    @property
    def _origin(self) -> tuple[int, int]:
        """Row and block at the upper left, so that the chosen cell is in sight."""
        high, wide = max(self.size.height - 1, 1), max((self.size.width - self._label - 1) // self._cell, 1)
        return _window(self.row, high, len(self.lines)), _window(self.block, wide, self.blocks)

    def render_line(self, y: int) -> Strip:
        """The blocks' numbers, or a row."""
        width, name, cell = self.size.width, self._label, self._cell
        top, left = self._origin
        seen = range(left, min(left + max((width - name - 1) // cell, 1), self.blocks))
        if y == 0:
            heads = self.get_component_rich_style("heat--head")
            return Strip([Segment(" " * (name + 1) + _heads(seen, cell), heads)]).adjust_cell_length(width, heads)
        row = top + y - 1
        if row >= len(self.lines):
            return Strip.blank(width, self.rich_style)
        line = self.lines[row]
        segments = [Segment(fit(line.name, name) + " ", self.rich_style)]
        for block in seen:
            value = line.values[block] if block < len(line.values) else 0.0
            of = level(value, self._top)
            text, style = (
                (f"{round(100 * value):3d} ", _style(of)) if cell == CELL else (SHADES[of] * cell, Style.null())
            )
            if (row, block) == (self.row, self.block):
                style = self.get_component_rich_style("heat--cursor" if self.has_focus else "heat--blurred")
            segments.append(Segment(text, self.rich_style + style))
        return Strip(segments).adjust_cell_length(width, self.rich_style)

    def on_click(self, event: events.Click) -> None:
        """Choose the cell under the mouse."""
        top, left = self._origin
        row, block = top + event.y - 1, left + (event.x - self._label - 1) // self._cell
        if event.y > 0 and row < len(self.lines) and event.x > self._label and block < self.blocks:
            self.move(row, block)


def _window(at: int, size: int, many: int) -> int:
    """Where a window of so many places begins that holds a place, in the middle where it can."""
    return max(0, min(at - size // 2, many - size))


def _heads(seen: range, cell: int) -> str:
    """The numbers of blocks above their cells, as many as have room."""
    if cell == CELL:
        return "".join(f"{block:3d} " for block in seen)
    line = ""
    for block in seen:
        at = (block - seen.start) * cell
        if (block % 5 == 0 or block == seen.start) and len(line) + bool(line) <= at:
            line = line.ljust(at) + str(block)
    return line


@cache
def _style(of: int) -> Style:
    return Style.parse(STYLES[of])
