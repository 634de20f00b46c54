"""A command that makes no version, while it works: export, verify, measure, gc, backup.

Knows: its words as they come, cancelling, what its exit code means. Refuses: to know the commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from editctl.errors import Exit
from editctl.spec import visible
from editctl.tui.dialogs import Question
from editctl.tui.place import Pane, Tells, plain
from editctl.tui.runner import BURST, GRACE

if TYPE_CHECKING:
    from editctl.tui.app import EditctlApp
    from editctl.tui.children import Child

KEPT = 1000
"""Lines that are shown, the last ones."""
LOADING = frozenset({"export", "verify", "measure", "trace"})
"""Verbs that load the model; two models at once may be more than the device holds."""
PACE = 0.3
"""Seconds between looks at the log."""
WORDS = {
    Exit.OK: "Done.",
    Exit.FAILED: "It ended with a complaint.",
    Exit.USAGE: "It was refused.",
    Exit.LOCKED: "The store is being changed by another process.",
    Exit.INTERRUPTED: "Cancelled.",
}
"""What came of it, by exit code."""


class Task(Tells, ModalScreen[int | None]):
    """A command at work; its exit code is the answer."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "leave", id="task.leave")]

    def __init__(
        self,
        title: str,
        verb: str,
        arguments: Sequence[str],
        view: Callable[[Sequence[str]], RenderableType] | None = None,
        read: Callable[[str], str] = str,
        leaves: bool = False,
    ) -> None:
        """
        Args:
            verb: what its log is named after.
            arguments: of the command line, after `editctl`.
            view: how its output is shown once it has ended well; by default as it is.
            read: how a line of its output is shown while it works; empty for one that is not.
            leaves: whether it goes by itself once it has ended well.
        """
        super().__init__()
        self._read, self._leaves = read, leaves
        self._title, self._verb, self._arguments, self._view = title, verb, list(arguments), view
        self._child: Child | None = None
        self._said: list[str] = []
        """Lines of its standard output."""
        self._told: list[str] = []
        """The same as they are shown."""
        self._log: list[str] = []
        """Lines of its log, which has its complaints too."""
        self._cancelled = False
        self.code: int | None = None
        """Exit code, once it has ended."""

    @property
    def loss(self) -> str:
        """What is lost if the UI is left now."""
        return f"{self._title}: it is at work and would be stopped." if self.code is None else ""

    @property
    def desk(self) -> EditctlApp:
        """The app, by its own type."""
        return self.app  # type: ignore[return-value]

    def compose(self) -> ComposeResult:
        """The title, how it stands, its words."""
        with Vertical(classes="dialog tall"):
            yield Static(plain(self._title), classes="title")
            yield Static(id="state", markup=False)
            yield Pane(classes="body")
            yield Static(id="hint", classes="hint", markup=False)

    def on_mount(self) -> None:
        """Begin."""
        self.query_one(Pane).focus()
        self._show()
        self.follow()

    @work(group="task", exclusive=True, exit_on_error=False)
    async def follow(self) -> None:
        """Start the command and follow it to its end."""
        if self._verb in LOADING:
            await self.desk.asker.stop()
        try:
            self._child = child = await self.desk.start(self._verb, self._arguments)
        except OSError as error:
            self._told.append(f"editctl cannot be started: {error.strerror}")
            self.code = int(Exit.FAILED)
            self._show()
            return
        if self._cancelled:
            child.interrupt()
        looking = self.set_interval(PACE, self._look)
        try:
            await child.send("")
            while line := await child.line():
                self._said.append(line)
                self._told.append(self._read(line))
                if len(self._said) % BURST == 0:
                    await asyncio.sleep(0)
            code = await child.wait()
        except asyncio.CancelledError:
            child.interrupt()
            await self._ended(child)
            raise
        finally:
            looking.stop()
        self._log = await asyncio.to_thread(_words, child)
        self._child, self.code = None, code
        self._show()
        self.desk.look()
        if self._leaves and code == Exit.OK and self.is_current:
            self.dismiss(code)

    @work(group="log", exclusive=True, exit_on_error=False)
    async def _look(self) -> None:
        child = self._child
        if child is not None:
            self._log = await asyncio.to_thread(_words, child)
            self._show()

    def _show(self) -> None:
        state = self.query_one("#state", Static)
        if self.code is None:
            state.update(Text("stopping …" if self._cancelled else "working …", "bold"))
        else:
            words = WORDS.get(Exit(self.code), "") if self.code in set(Exit) else ""
            words = "Cancelled." if self._cancelled and self.code else words or f"It ended with code {self.code}."
            state.update(Text(words, "bold" if self.code == Exit.OK else "bold yellow"))
        self.query_one("#hint", Static).update("esc cancels" if self.code is None else "esc leaves, j and k scroll")
        known = set(self._log)
        lines = [*self._log, *(line for line in self._told[-KEPT:] if line and line not in known)]
        body: RenderableType = plain("\n".join(lines[-KEPT:]))
        viewed = False
        if self.code == Exit.OK and self._view is not None:
            with suppress(ValueError, KeyError, TypeError):
                body, viewed = self._view(self._said), True
        pane = self.query_one(Pane)
        pane.show(body)
        if viewed:
            pane.scroll_home(animate=False)
        else:
            pane.scroll_end(animate=False)

    @work(group="leave", exclusive=True, exit_on_error=False)
    async def action_leave(self) -> None:
        """Ask, then cancel; once it has ended, leave."""
        if self.code is None:
            question = Question(f"Cancel: {visible(self._title)}?", "What it did so far is lost.")
            if await self.app.push_screen_wait(question) is None or self.code is not None:
                return
            self._cancelled = True
            self._show()
            if (child := self._child) is not None:
                child.interrupt()
                await self._ended(child)
        else:
            self.dismiss(self.code)

    async def _ended(self, child: Child) -> None:
        try:
            await asyncio.wait_for(child.wait(), GRACE)
        except TimeoutError:
            child.kill()


def _words(child: Child) -> list[str]:
    """The last lines of a child's log, without the command that heads it."""
    try:
        lines = child.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if not line.startswith("$ ")][-KEPT:]
