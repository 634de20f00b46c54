"""A list of any length: only the rows in sight are ever made.

Knows: columns, the cursor, the filter. Refuses: what the rows mean. Textual's own tables keep every row as widgets or
cells; ten thousand take them seconds to fill and filter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from editctl.spec import visible

T = TypeVar("T")
WIDE = 110
"""Columns from which a place has its detail beside its list, and lists all their columns."""
LONGEST = 400
"""Characters of a text that are looked at for a cell."""


def fit(text: str, width: int) -> str:
    """A text in exactly `width` columns, with … where it was cut; nothing in it acts on a terminal."""
    shown = visible(text, LONGEST)
    if cell_len(shown) > width:
        shown = set_cell_size(shown, max(width - 1, 0)) + "…"[: max(width, 0)]
    return set_cell_size(shown, max(width, 0))


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a list."""

    title: str
    cell: Callable[[T], tuple[str, str]]
    """Text and tone, one of `RowList.TONES`."""
    width: int = 0
    """Terminal columns; 0 shares what is left."""
    share: int = 1
    """How much of what is left."""
    wide: bool = False
    """Whether it is left out of narrow lists."""


class RowList(ScrollView, Generic[T], can_focus=True):
    """Rows under a heading, one of them chosen."""

    TONES = ("plain", "good", "bad", "warn", "note", "dim")
    COMPONENT_CLASSES: ClassVar[set[str]] = {f"rows--{name}" for name in (*TONES, "head", "cursor", "blurred")}
    DEFAULT_CSS = """
    RowList {
        overflow-x: hidden; overflow-y: auto; scrollbar-size-vertical: 1;
        .rows--head { color: $text-muted; text-style: bold; }
        .rows--cursor { background: $block-cursor-background; color: $block-cursor-foreground; text-style: bold; }
        .rows--blurred { background: $surface-lighten-2; }
        .rows--good { color: $text-success; }
        .rows--bad { color: $text-error; }
        .rows--warn { color: $text-warning; }
        .rows--note { color: $text-accent; }
        .rows--dim { color: $text-muted; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "down", "down", show=False, id="list.down"),
        Binding("up,k", "up", "up", show=False, id="list.up"),
        Binding("pagedown,ctrl+d", "page(1)", "page down", show=False, id="list.page-down"),
        Binding("pageup,ctrl+u", "page(-1)", "page up", show=False, id="list.page-up"),
        Binding("home", "first", "first", show=False, id="list.first"),
        Binding("end", "last", "last", show=False, id="list.last"),
    ]

    class Moved(Message):
        """Another row is chosen."""

        def __init__(self, rows: RowList[Any]) -> None:
            super().__init__()
            self.rows = rows

        @property
        def control(self) -> RowList[Any]:
            """The list."""
            return self.rows

    class Opened(Moved):
        """A row was clicked twice."""

    def __init__(self, columns: Sequence[Column[T]], empty: str, key: Callable[[T], object], **named: Any) -> None:
        """
        Args:
            empty: what stands there when there are no rows.
            key: what a row is known by when the rows change.
        """
        super().__init__(**named)
        self.columns, self.empty, self.key = columns, empty, key
        self.items: Sequence[T] = ()
        self.cursor = 0
        self._sized: tuple[tuple[int, int], list[tuple[Column[T], int]]] | None = None

    @property
    def chosen(self) -> T | None:
        """The row under the cursor; None if there are none."""
        return self.items[self.cursor] if self.cursor < len(self.items) else None

    def show(self, items: Sequence[T], empty: str | None = None) -> None:
        """Take other rows; the cursor stays on the row with the same key, or where it was."""
        before = self.chosen
        self.empty = self.empty if empty is None else empty
        self.items = items
        wanted = None if before is None else self.key(before)
        if before is not None and not (self.cursor < len(items) and self.key(items[self.cursor]) == wanted):
            same = (i for i, item in enumerate(items) if self.key(item) == wanted)
            self.cursor = next(same, min(self.cursor, max(len(items) - 1, 0)))
        self._fit()
        self._tell()

    def move(self, to: int) -> None:
        """Choose a row by its position; what lies beyond the ends is the first or last."""
        to = max(0, min(to, len(self.items) - 1))
        if to != self.cursor:
            self.cursor = to
            self._tell()
        self._fit()

    def _tell(self) -> None:
        message = self.Moved(self)
        # What a parent seems to send goes no further than that parent, and it is the filter that has rows shown.
        message.set_sender(self)
        self.post_message(message)

    def _fit(self) -> None:
        """Let what is scrolled to hold the cursor."""
        self.virtual_size = Size(max(self.size.width, 1), len(self.items) + 1)
        seen = max(self.size.height - 1, 1)
        top = round(self.scroll_y)
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + seen:
            self.scroll_to(y=self.cursor - seen + 1, animate=False)
        self.refresh()

    def action_down(self) -> None:
        """One row down."""
        self.move(self.cursor + 1)

    def action_up(self) -> None:
        """One row up."""
        self.move(self.cursor - 1)

    def action_page(self, way: int) -> None:
        """As many rows as are in sight."""
        self.move(self.cursor + way * max(self.size.height - 2, 1))

    def action_first(self) -> None:
        """The first row."""
        self.move(0)

    def action_last(self) -> None:
        """The last row."""
        self.move(len(self.items) - 1)

    def on_resize(self) -> None:
        """Rows are as wide as the list."""
        self._fit()

    def on_click(self, event: events.Click) -> None:
        """Choose the row under the mouse; twice opens it."""
        row = round(self.scroll_y) + event.y - 1
        if event.y > 0 and row < len(self.items):
            self.move(row)
            if event.chain > 1:
                self.post_message(self.Opened(self))

    def _widths(self) -> list[tuple[Column[T], int]]:
        """The columns shown, with how wide they are; one space stands between them."""
        # Asked for every line of a paint; working it out is a fifth of painting a line.
        size = (self.scrollable_content_region.width, self.app.size.width)
        if self._sized is None or self._sized[0] != size:
            self._sized = (size, self._share_out(size[0]))
        return self._sized[1]

    def _share_out(self, width: int) -> list[tuple[Column[T], int]]:
        shown = [column for column in self.columns if not column.wide or self.app.size.width >= WIDE]
        spare = width - sum(column.width for column in shown) - len(shown) + 1
        shares = sum(column.share for column in shown if not column.width) or 1
        sizes, left = [], spare
        for column in shown:
            size = column.width or spare * column.share // shares
            left -= 0 if column.width else size
            sizes.append((column, max(size, 0)))
        # What does not divide goes to the last column that shares.
        last = max((i for i, (column, _) in enumerate(sizes) if not column.width), default=-1)
        return [(column, size + (max(left, 0) if i == last else 0)) for i, (column, size) in enumerate(sizes)]

    def render_line(self, y: int) -> Strip:
        """One line of what is in sight."""
        width, row = self.size.width, round(self.scroll_y) + y - 1
        if y == 0:
            style = self.get_component_rich_style("rows--head")
            titles = " ".join(fit(column.title, size) for column, size in self._widths())
            return Strip([Segment(titles, style)]).adjust_cell_length(width, style)
        if not self.items:
            lines = self.empty.splitlines()
            text = lines[y - 2] if 2 <= y < len(lines) + 2 else ""
            style = self.get_component_rich_style("rows--plain")
            return Strip([Segment(fit(f"  {text}", width), style)], width)
        if row >= len(self.items):
            return Strip.blank(width, self.rich_style)
        item, segments = self.items[row], []
        under = None
        if row == self.cursor:
            under = self.get_component_rich_style("rows--cursor" if self.has_focus else "rows--blurred", partial=True)
        widths = self._widths()
        for at, (column, size) in enumerate(widths):
            text, tone = column.cell(item)
            style = self.get_component_rich_style(f"rows--{tone}")
            if under is not None:
                style = style + under
            segments.append(Segment(fit(text, size) + (" " if at + 1 < len(widths) else ""), style))
        return Strip(segments).adjust_cell_length(width, under or self.rich_style)


class Finder(Vertical, Generic[T]):
    """A list with a filter above it: every word must occur, and no word after a `!`."""

    DEFAULT_CSS = """
    Finder {
        height: 1fr;
        Input { display: none; padding: 0 1; }
        &.-filtering Input { display: block; }
        RowList { height: 1fr; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "slash", "filter", "filter", key_display="/", id="list.filter", tooltip="Show only rows with these words"
        )
    ]

    def __init__(self, rows: RowList[T], text: Callable[[T], str], **named: Any) -> None:
        """
        Args:
            text: what is looked for words, without case.
        """
        super().__init__(**named)
        self.rows, self.text = rows, text
        self.items: Sequence[T] = ()
        self.empty = rows.empty
        """What stands there when nothing is to be listed, the filter aside."""
        self._input = Input(placeholder="filter: words, !without", select_on_focus=False, compact=True)

    def compose(self) -> ComposeResult:
        """The filter above the list."""
        yield self._input
        yield self.rows

    def show(self, items: Sequence[T], empty: str | None = None) -> None:
        """Take other rows; the filter stays.

        Args:
            empty: what stands there instead of rows from now on; None leaves that.
        """
        self.items = items
        self.empty = self.empty if empty is None else empty
        self._sift()

    @property
    def words(self) -> str:
        """The filter."""
        return self._input.value

    def _sift(self) -> None:
        words = self._input.value.casefold().split()
        wanted = [word for word in words if not word.startswith("!")]
        unwanted = [word[1:] for word in words if word.startswith("!") and len(word) > 1]
        if not words:
            self.rows.show(self.items, self.empty)
            return
        found = []
        for item in self.items:
            text = self.text(item)
            if all(word in text for word in wanted) and not any(word in text for word in unwanted):
                found.append(item)
        self.rows.show(found, f"nothing has all of: {self._input.value}\nesc takes the filter away")

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as one types."""
        event.stop()
        self._sift()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Back to the list, the filter stays."""
        event.stop()
        self.rows.focus()

    def on_key(self, event: events.Key) -> None:
        """Down leaves the filter for the list."""
        if self._input.has_focus and event.key == "down":
            event.stop()
            self.rows.focus()

    def action_filter(self) -> None:
        """Type what to look for."""
        self.add_class("-filtering")
        self._input.focus()

    def clear(self) -> bool:
        """Take the filter away; False if there was none."""
        if not self.has_class("-filtering"):
            return False
        self.remove_class("-filtering")
        self._input.value = ""
        self.rows.focus()
        return True
