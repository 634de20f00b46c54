"""Run: what the run is doing, how far it is, what came of it.

Knows: showing a course, live or recorded. Refuses: the child itself; `runner` has it.
"""

from __future__ import annotations

from typing import ClassVar

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Sparkline, Static

from editctl.spec import visible
from editctl.tui.course import Course
from editctl.tui.dialogs import Question
from editctl.tui.place import Pane, Place

PACE = 0.1
"""Seconds between looks at a run that goes on."""
NONE = """No run yet.

A run edits the model as the plan says and makes a version.
  1   Specs: space stages an edit
  2   Plan: g applies what is staged
  5   History: y plays a past run again"""


class RunPanel(Vertical):
    """A run: its numbers, its loss, its talk."""

    def __init__(self) -> None:
        super().__init__()
        self._facts, self._title = Static(id="facts", markup=False), Static(id="loss-title", markup=False)
        self._loss, self._talk = Sparkline([], id="loss", summary_function=max), Pane(id="talk")

    def compose(self) -> ComposeResult:
        """Facts, loss, talk."""
        yield from (self._facts, self._title, self._loss, self._talk)

    def show(
        self, course: Course, title: str, elapsed: float | None, left: float | None, outcome: RenderableType
    ) -> None:
        """Show how a run stands.

        Args:
            elapsed: seconds; None where they are not known, as of a run that is played again.
        """
        self._facts.update(facts_view(course, title, elapsed, left, self.size.width - 2))
        losses = course.losses
        last = f"loss {losses[-1]:.3f} nats a token, {course.active} targets still sought" if losses else ""
        self._title.update(Text(last))
        self._loss.display = bool(losses)
        self._loss.data = losses[-2 * max(self.size.width, 1) :]
        talk = Text("\n".join(visible(line, 1000) for line in course.talk))
        self._talk.show(Group(outcome, Text(), talk) if outcome else talk)


def facts_view(course: Course, title: str, elapsed: float | None, left: float | None, width: int) -> RenderableType:
    """The numbers of a run."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    batch = f", batch {course.batch} of {course.batches}" if course.batch and course.batches else ""
    units = f", {course.done} of {course.total}" if course.total and course.stage not in ("target", "solve") else ""
    steps = f", step {course.step} of at most {course.steps}" if course.stage == "target" and course.step else ""
    layer = f", block {course.layer} written ({course.solved} of {course.layers})" if course.solved else ""
    times = "" if elapsed is None else f"{elapsed:.0f} s so far"
    if elapsed is not None and left:
        times += f", about {left:.0f} s left"
    rows = {
        "run": title,
        "stage": course.doing + batch + (layer if course.stage in ("target", "solve") else "") + steps + units,
        "edits": f"{course.edits_done} of {course.edits} written" if course.edits else "",
        "model": ", ".join(filter(None, [course.model, course.device, course.method])),
        "memory": f"{course.memory:.0f} MB at most so far" if course.memory else "",
        "time": times,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(visible(value, 500)))
    bar = ProgressBar(100, 100 * course.fraction, width=max(min(width, 76), 10))
    # The bar ends no line by itself, and what has no line has no height.
    return Group(table, bar, Text())


class RunPlace(Place):
    """The run that goes on, or the last one."""

    NAME = "run"
    AUTO_FOCUS = "#talk"
    ABOUT = (
        "The run that goes on, or the last one. It works in a process of its own and goes on whatever place is shown. "
        "esc asks, then cancels it; a cancelled run leaves the store as it was."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "cancel", id="run.cancel", tooltip="Cancel the run; else back"),
        Binding("enter", "review", "review", id="run.review", tooltip="Review the version that was made"),
        Binding("l", "log", "log", id="run.log", tooltip="All that the run said"),
    ]

    def body(self) -> ComposeResult:
        """The panel, or what there is to do without a run."""
        yield Static(NONE, id="none", markup=False)
        yield RunPanel()

    def on_mount(self) -> None:
        """Look at the run a few times a second; its events come faster than eyes."""
        self.set_interval(PACE, self._tick)

    def _tick(self) -> None:
        if self.desk.runner.going:
            self.update()

    def renew(self) -> None:
        """The run as it stands."""
        run = self.desk.runner.run
        self.query_one("#none").display = run is None
        panel = self.query_one(RunPanel)
        panel.display = run is not None
        if run is None:
            return
        outcome = Text(visible(run.outcome, 1000), "bold" if run.code in (None, 0) else "bold yellow")
        if run.complaint:
            outcome.append("\n" + "\n".join(visible(line, 1000) for line in run.complaint.splitlines()), "red")
        if run.complaint or (run.code and not run.cancelled and run.course.made is None):
            outcome.append(f"\nAll it said is in {visible(str(run.log), 500)}", "dim")
        panel.show(run.course, run.title, run.elapsed, run.left, outcome if run.outcome else "")

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        run = self.desk.runner.run
        if action == "review" and (run is None or run.course.made is None):
            return "no version was made here yet"
        if action == "log" and run is None:
            return "there was no run yet"
        return ""

    @work(group="cancel", exclusive=True, exit_on_error=False)
    async def action_cancel(self) -> None:
        """Ask, then cancel; without a run back to the place before."""
        if not self.desk.runner.going:
            await self.action_leave()
            return
        question = Question("Cancel the run?", "What it did so far is lost; the store stays as it is.")
        if await self.app.push_screen_wait(question) is not None:
            await self.desk.runner.cancel()

    async def action_review(self) -> None:
        """To the version that was made."""
        run = self.desk.runner.run
        if run is not None and run.course.made is not None:
            self.desk.reviewed = run.course.made.version
            await self.desk.action_go("review")

    @work(group="log", exclusive=True, exit_on_error=False)
    async def action_log(self) -> None:
        """The log file's end."""
        import asyncio

        run = self.desk.runner.run
        if run is None:
            return

        def read() -> str:
            try:
                return run.log.read_text(encoding="utf-8", errors="replace")[-100_000:]
            except OSError as error:
                return f"{run.log} cannot be read: {error.strerror}"

        self.desk.read(str(run.log), await asyncio.to_thread(read))
