"""What all places have in common: the line of places above, the keys below, and why a key does nothing now.

Knows: bindings and their obstacles. Refuses: what any one place is about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingType
from textual.containers import Container, VerticalScroll
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Static
from textual.worker import Worker, WorkerState

from editctl.spec import visible
from editctl.tui.rows import WIDE, Finder

if TYPE_CHECKING:
    from editctl.tui.app import EditctlApp

PLACES = {"specs": "Specs", "plan": "Plan", "run": "Run", "review": "Review", "history": "History", "ask": "Ask"}
PLACES |= {"trace": "Trace"}
"""The places in the order of their keys, 1 to 7."""


def plain(text: str) -> Text:
    """Text that is shown literally."""
    return Text("\n".join(visible(line, 10_000) for line in text.splitlines()))


class PlaceBar(Widget):
    """The places, the one that is shown marked, and what is worked on."""

    DEFAULT_CSS = "PlaceBar { height: 1; background: $panel; }"

    def render(self) -> Text:
        """One line."""
        app: EditctlApp = self.app  # type: ignore[assignment]
        text = Text(no_wrap=True)
        for number, (name, title) in enumerate(PLACES.items(), 1):
            here = name == app.current_mode
            mark = app.place_mark(name)
            text.append(f" {number} {title}{mark} ", "reverse bold" if here else "")
        right = visible(app.where(), 200)
        room = self.size.width - text.cell_len
        if cell_len(right) + 1 < room:
            text.append(" " * (room - cell_len(right) - 1) + right, "dim")
        return text

    async def on_click(self, event: events.Click) -> None:
        """Go to the place under the mouse."""
        app: EditctlApp = self.app  # type: ignore[assignment]
        at = 0
        for number, (name, title) in enumerate(PLACES.items(), 1):
            at += len(f" {number} {title}{app.place_mark(name)} ")
            if event.x < at:
                await app.action_go(name)
                return


class StatusBar(Widget):
    """What is going on, here and in other processes."""

    DEFAULT_CSS = (
        "StatusBar { height: 1; color: $text-muted; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }"
    )

    def render(self) -> Text:
        """One line."""
        app: EditctlApp = self.app  # type: ignore[assignment]
        text, style = app.status()
        return Text(visible(text, 400), style, no_wrap=True, overflow="ellipsis")


class KeyBar(Widget):
    """What can be done now; a key that cannot be used is dim, and says why when it is pressed or clicked."""

    DEFAULT_CSS = "KeyBar { height: 1; background: $panel; }"

    def on_mount(self) -> None:
        """Follow the bindings."""
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.refresh())

    def _shown(self) -> list[tuple[ActiveBinding, str, str]]:
        """Bindings, how their keys are written, what they do; that for help always fits."""
        found: dict[str, tuple[ActiveBinding, str, str]] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if binding.show:
                found.setdefault(binding.action, (active, self.app.get_key_display(binding), binding.description))
        always = [entry for action, entry in found.items() if action == "help"]
        room = self.size.width - sum(len(shown) + len(what) + 2 for _, shown, what in always)
        fitting = []
        for entry in found.values():
            size = len(entry[1]) + len(entry[2]) + 2
            if entry not in always and size <= room:
                fitting.append(entry)
                room -= size
        return fitting + always

    def render(self) -> Text:
        """One line."""
        text = Text(no_wrap=True)
        for active, shown, what in self._shown():
            enabled = active.enabled
            text.append(shown, "bold" if enabled else "dim").append(f" {what}", "" if enabled else "dim").append(" ")
        return text

    async def on_click(self, event: events.Click) -> None:
        """Do what the key under the mouse does, whatever has the focus."""
        at = 0
        for active, shown, what in self._shown():
            at += len(shown) + len(what) + 2
            if event.x < at:
                await self.app.run_action(active.binding.action, active.node)
                return


class Tells:
    """What begins workers, and tells a fault in one of them."""

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """As of `EditctlApp.fault`."""
        if event.state == WorkerState.ERROR:
            event.worker.node.app.fault(event.worker.error)  # type: ignore[attr-defined]


class Pane(VerticalScroll):
    """A text that may be longer than its place."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "down", show=False, id="pane.down"),
        Binding("k", "scroll_up", "up", show=False, id="pane.up"),
    ]

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._content = Static(markup=False)
        self._key: tuple[object, object] | None = None

    def compose(self) -> ComposeResult:
        """What is shown."""
        yield self._content

    def show(self, content: object) -> None:
        """Show something that Rich can print; strings are shown literally."""
        self._key = None
        self._content.update(plain(content) if isinstance(content, str) else content)  # type: ignore[arg-type]

    def show_once(self, about: object, state: object, make: Callable[[], object]) -> None:
        """Show what `make` gives, unless that is what was shown last: laying a long table out takes as long as a paint.

        Args:
            about: what it is about; about something else it is read from the top again.
            state: all that `make` depends on beside.
        """
        before = self._key
        if before != (about, state):
            self.show(make())
            self._key = (about, state)
            if before is None or before[0] != about:
                self.scroll_home(animate=False)


class Place(Tells, Screen[None]):
    """One of the places."""

    NAME: ClassVar[str] = ""
    CHANGES: ClassVar[frozenset[str]] = frozenset()
    """Actions that change the store or files; none is to be had with --readonly."""
    AUTO_FOCUS: ClassVar[str | None] = "RowList"
    ABOUT: ClassVar[str] = ""
    """What the place is for, said by `?`."""
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "back", show=False, id="leave")]

    _mounted = False

    @property
    def desk(self) -> EditctlApp:
        """The app, by its own type."""
        return self.app  # type: ignore[return-value]

    def compose(self) -> ComposeResult:
        """The bars, and what the place is about between them."""
        # Before there is anything to be styled anew.
        wide = self.app.size.width >= WIDE
        self.set_class(wide, "-wide").set_class(not wide, "-narrow")
        yield PlaceBar()
        yield StatusBar()
        with Container(id="body"):
            yield from self.body()
        yield KeyBar()

    def body(self) -> ComposeResult:
        """What is between the bars."""
        yield from ()

    def renew(self) -> None:
        """Show what is known now: specs, the store or the run changed."""

    def why_not(self, action: str) -> str:
        """Why an action cannot be done now; empty if it can."""
        return ""

    def obstacle(self, action: str) -> str:
        """`why_not`, and what stands in the way of all changes, or of all actions."""
        if not self._mounted:
            return "the place is just being opened"
        if action in self.CHANGES and self.desk.readonly:
            return "opened with --readonly: nothing can be changed"
        return self.why_not(action)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim what cannot be done."""
        return None if self.obstacle(action) else True

    def on_mount(self) -> None:
        """From now on there is something to show it in."""
        self._mounted = True
        self.update()

    def on_screen_resume(self) -> None:
        """What changed while another place was shown."""
        self.update()

    def update(self) -> None:
        """Show what is known now, bars and keys too."""
        if not (self._mounted and self.is_current):
            return
        self.renew()
        for bar in self.query("PlaceBar, StatusBar"):
            bar.refresh()
        self.refresh_bindings()

    async def action_leave(self) -> None:
        """Out of whatever one is in: the filter, then the place."""
        if not any(finder.clear() for finder in self.query(Finder)):
            await self.desk.action_back()
