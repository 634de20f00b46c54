"""A past run, played again from the events that the store keeps.

Knows: the pace, pausing, stepping. Refuses: the model; nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from editctl import events
from editctl.events import Event
from editctl.spec import visible
from editctl.tui.course import SHARES, Course
from editctl.tui.place import Pane, Tells, plain
from editctl.tui.plan import course_of
from editctl.tui.run import RunPanel

if TYPE_CHECKING:
    from editctl.store import Version

TICK = 0.05
"""Seconds between two pictures."""
WHOLE = 6.0
"""Seconds that a run of many events takes."""
SLOWEST = 10.0
"""Events a second of a run of few."""


def read(lines: Sequence[str]) -> list[Event]:
    """The events of a run; what this version does not know is left out."""
    found = []
    for line in lines:
        try:
            found.append(events.from_line(line))
        except (ValueError, TypeError, AttributeError):
            continue
    return found


class Replay(Tells, ModalScreen[None]):
    """The run that made a version."""

    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "pause", "pause", id="replay.pause"),
        Binding("left", "step(-1)", "back", id="replay.back"),
        Binding("right", "step(1)", "on", id="replay.on"),
        Binding("home", "jump(0)", "from the start", id="replay.start"),
        Binding("end", "jump(-1)", "to the end", id="replay.end"),
        Binding("escape,q", "leave", "leave", id="replay.leave"),
    ]

    def __init__(self, version: Version, story: Sequence[Event]) -> None:
        """
        Args:
            story: the run's events, in order.
        """
        super().__init__()
        self._version, self._story = version, story
        self._course, self._fed = self._new(), 0
        self._at = 0.0
        self._going = True

    def _new(self) -> Course:
        course = course_of(self._version.params, 0)
        seconds = self._version.seconds
        shares = {name: seconds.get(name, 0.0) for name in SHARES}
        # What editing took is kept by what it consists of.
        shares["edit"] += sum(value for name, value in seconds.items() if name not in SHARES)
        course.shares = shares
        return course

    def compose(self) -> ComposeResult:
        """The panel of a run."""
        with Vertical(classes="dialog tall"):
            yield Static(plain(f"The run that made version {self._version.id}"), classes="title")
            yield RunPanel()
            yield Static(id="hint", classes="hint", markup=False)

    def on_mount(self) -> None:
        """Begin."""
        self.query_one(Pane).can_focus = False
        self.call_after_refresh(self._show)
        self.set_interval(TICK, self._tick)

    def _tick(self) -> None:
        if self._going:
            self._to(self._at + TICK * max(len(self._story) / WHOLE, SLOWEST))

    def _to(self, at: float) -> None:
        """Show the run after so many events."""
        self._at = max(0.0, min(at, float(len(self._story))))
        wanted = int(self._at)
        if wanted < self._fed:
            self._course, self._fed = self._new(), 0
        for event in self._story[self._fed : wanted]:
            self._course.feed(event)
        self._fed = wanted
        self._going = self._going and wanted < len(self._story)
        self._show()

    def _show(self) -> None:
        course, whole = self._course, sum(self._course.shares.values())
        ended = self._fed == len(self._story)
        elapsed = whole if ended else whole * course.fraction
        outcome: Text | str = ""
        if ended:
            outcome = Text(f"Made version {visible(self._version.id)}.", "bold")
            if course.failed:
                outcome.append(" A gate failed: it was a candidate.", "yellow")
        self.query_one(RunPanel).show(course, "played again", elapsed, whole - elapsed, outcome)
        doing = "pauses" if self._going else "plays"
        words = f"event {self._fed} of {len(self._story)} · space {doing} · ← → step · esc leaves"
        self.query_one("#hint", Static).update(words)

    def action_pause(self) -> None:
        """Stand still or go on; from the end, begin again."""
        self._going = not self._going
        self._to(0 if self._going and self._fed == len(self._story) else self._at)

    def action_step(self, way: int) -> None:
        """One event, and stand still."""
        self._going = False
        self._to(self._fed + way)

    def action_jump(self, to: int) -> None:
        """To the first or after the last event."""
        self._going = self._going and to == 0
        self._to(to if to >= 0 else len(self._story))

    def action_leave(self) -> None:
        """Done."""
        self.dismiss(None)
