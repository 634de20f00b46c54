"""Importing a benchmark: which file, as what, and where to; what the file holds is shown before anything is written.

Knows: the fields, whether what was read still holds of them, and what would be replaced. Refuses: what formats and
records are; `editctl import` reads and writes, in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.suggester import Suggester
from textual.widgets import Input, Static

from editctl.errors import Exit
from editctl.importers.names import NAMES, TARGETS, WITH_TARGET
from editctl.plan import count
from editctl.spec import visible
from editctl.tui.dialogs import Pick, Question
from editctl.tui.form import is_read, showable
from editctl.tui.found import Findings, Found, Settings, view
from editctl.tui.place import KeyBar, Tells
from editctl.tui.rows import Finder
from editctl.tui.runner import BURST, GRACE

if TYPE_CHECKING:
    from editctl.tui.app import EditctlApp
    from editctl.tui.children import Child

BEGIN = """return reads the file; nothing is written before you say so (ctrl+s).

Formats: {}"""
COMPLAINT = 8
"""Lines of a child's log that tell why it ended; two where its records were told one by one."""
NAMED = 100
"""Files that are looked at to complete a path."""


class Choice(Static, can_focus=True):
    """One of several, chosen from a list."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,space", "choose", "choose", id="import.choose", tooltip="Choose from a list"),
        Binding("down", "app.focus_next", "next field", show=False, id="import.down"),
        Binding("up", "app.focus_previous", "field before", show=False, id="import.up"),
    ]

    class Asked(Message):
        """Another one is wanted."""

        def __init__(self, choice: Choice) -> None:
            super().__init__()
            self.choice = choice

    def __init__(self, none: str, choices: dict[str, str], **named: Any) -> None:
        """
        Args:
            none: what it is called that nothing is chosen.
            choices: what each is, by its name.
        """
        super().__init__(Text(none, "dim"), markup=False, **named)
        self.none, self.choices, self.value = none, choices, ""

    def choose(self, value: str) -> None:
        """Take one; "" takes none."""
        self.value = value
        self.update(Text(f"{value}: {self.choices[value]}" if value else self.none, "" if value else "dim"))

    def action_choose(self) -> None:
        """Ask for another."""
        self.post_message(self.Asked(self))

    def on_click(self) -> None:
        """As return does."""
        self.focus()
        self.action_choose()


class _Field(Input):
    """A field of one line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "app.focus_next", "next field", show=False, id="import.down"),
        Binding("up", "app.focus_previous", "field before", show=False, id="import.up"),
    ]


class Paths(Suggester):
    """Completes a path: JSON files and folders."""

    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        """The first name that goes on as the value does; none that an input could not show as it is."""
        return await asyncio.to_thread(self._first, value)

    def _first(self, value: str) -> str | None:
        folder, begun = os.path.split(value)
        if not begun:
            return None
        names: list[str] = []
        with suppress(OSError, ValueError), os.scandir(os.path.expanduser(folder) or ".") as found:
            for one in found:
                if one.name.startswith(begun) and showable(one.name) and len(names) < NAMED:
                    names.append(one.name + ("/" if one.is_dir() else ""))
        fit = sorted(name for name in names if name.endswith(("/", ".json", ".jsonl")))
        return os.path.join(folder, fit[0]) if fit else None


class ImportForm(Tells, ModalScreen[Found | None]):
    """A benchmark's file to be imported; answers what came of it, None if nothing was written."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "import", id="import.save", tooltip="Import what was found, once that is confirmed"),
        Binding("escape", "leave", "leave", id="import.leave", tooltip="Stop reading or writing, else leave"),
        Binding("tab", "app.focus_next", "next field", id="import.next", tooltip="To the next field"),
        Binding("shift+tab", "app.focus_previous", "field before", show=False, id="import.previous"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._found: Found | None = None
        self._child: Child | None = None
        self._doing = ""
        """What a child does now."""
        self._stopped = False
        self._asking = False
        self._proposed = ""
        """The file to write as it was proposed."""
        self._done: Found | None = None
        """What was written."""

    @property
    def desk(self) -> EditctlApp:
        """The app, by its own type."""
        return self.app  # type: ignore[return-value]

    @property
    def loss(self) -> str:
        """What is lost if the UI is left now."""
        return "An import is at work and would be stopped." if self._doing == "writing" else ""

    def compose(self) -> ComposeResult:
        """The fields, and what was found below them."""
        fields = {
            "file": _Field(placeholder="a benchmark's JSON file", suggester=Paths(), id="file", compact=True),
            "format": Choice("detected from its fields", NAMES, id="format"),
            "target": Choice("the format's own: alt", TARGETS, id="target"),
            "records": _Field(placeholder="all", restrict="([1-9][0-9]{0,8})?", id="records", compact=True),
            "into": _Field(placeholder="a spec file", id="into", compact=True, select_on_focus=False),
        }
        with Vertical(classes="form"):
            yield Static("Import a benchmark", classes="title")
            for name, widget in fields.items():
                with Horizontal(classes="row", id=f"row-{name}"):
                    yield Static(name, classes="label", markup=False)
                    yield widget
            yield Findings()
            yield KeyBar()

    def on_mount(self) -> None:
        """The file has the focus."""
        self._show()
        self.query_one("#file").focus()

    # What is written

    def _text(self, name: str) -> str:
        return self.query_one(f"#{name}", Input).value.strip()

    @property
    def _settings(self) -> Settings:
        form, target = (self.query_one(f"#{name}", Choice).value for name in ("format", "target"))
        return Settings(self._text("file"), form, target if self._aims else "", self._text("records"))

    @property
    def _aims(self) -> bool:
        """Whether there are two ways to understand the format."""
        form = self.query_one("#format", Choice).value
        return (form or (self._found.format if self._found else "")) in WITH_TARGET

    @property
    def _known(self) -> Found | None:
        """What was found, if it is of what is written."""
        found = self._found
        return found if found is not None and found.settings == self._settings else None

    @property
    def _sound(self) -> Found | None:
        """What was found, if it can be imported too."""
        found = self._known
        return found if found is not None and found.edits and not found.complaint else None

    @on(Input.Changed, "#file")
    def _typed(self) -> None:
        """Propose a spec file of the same name, unless one was written."""
        written, stem = self._text("into"), Path(self._text("file")).stem
        folders = [path for path in self.desk.spec_paths if path.suffix != ".toml"]
        if written == self._proposed and folders:
            self._proposed = str(folders[0] / f"{stem}.toml") if stem and showable(stem) else ""
            self.query_one("#into", Input).value = self._proposed
        self._show()

    @on(Input.Changed, "#records")
    def _fewer(self) -> None:
        self._show()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        """Read what is to be read anew, else on to the next field."""
        if event.input.id != "into" and self._text("file") and not self._sound:
            self.look()
        else:
            self.focus_next()

    @on(Choice.Asked)
    @work(group="pick", exclusive=True, exit_on_error=False)
    async def _asked(self, event: Choice.Asked) -> None:
        """Choose the format, or what its edits aim at; the file is read again."""
        choice = event.choice
        if self._doing:
            return
        title = "Which format?" if choice.id == "format" else "What shall its edits aim at?"
        # A list has no row without a name.
        first = ("detect", choice.none) if choice.id == "format" else ("own", choice.none)
        answer = await self.app.push_screen_wait(Pick(title, [first, *choice.choices.items()]))
        if answer is None:
            return
        choice.choose("" if answer == first[0] else answer)
        self._show()
        if self._text("file"):
            self.look()

    def _show(self) -> None:
        found = self._known
        self.query_one("#row-target").display = self._aims
        findings = self.query_one(Findings)
        if self._doing:
            words = f"{self._doing} …" + ("  stopping" if self._stopped else "  esc stops it")
            findings.show(Text(words, "bold"))
        elif found is None:
            findings.show(Text(BEGIN.format(", ".join(NAMES)), "dim"))
        else:
            findings.show(view(found), found.rows)
        self.refresh_bindings()

    # Reading and writing

    @work(group="task", exit_on_error=False)
    async def look(self, ask: bool = False) -> None:
        """Have the file read; nothing is written.

        Args:
            ask: whether to go on and ask whether to write.
        """
        if self._doing:
            return
        settings, self._doing = self._settings, "reading"
        found = self._found = Found(settings, await asyncio.to_thread(_stamp, settings.file))
        if await self._follow(found, "--dry-run") and ask and self.is_current:
            self.action_save()

    @work(group="task", exit_on_error=False)
    async def write(self, settings: Settings, into: Path, more: list[str]) -> None:
        """Have the specs written."""
        if self._doing:
            return
        self._doing = "writing"
        done = self._found = Found(settings)
        if await self._follow(done, "-o", str(into), *more):
            self._done = done
            if self.is_current:
                self.dismiss(done)

    async def _follow(self, found: Found, *more: str) -> bool:
        """Have a child read, or write, and take in what it says; whether it did."""
        arguments = self.desk.space.arguments("import", *found.settings.arguments(), *more, "--json")
        self._stopped = False
        self._show()
        try:
            code, found.complaint = await self._work(found, arguments)
        except OSError as error:
            code, found.complaint = int(Exit.FAILED), f"editctl cannot be started: {error.strerror}"
        finally:
            self._child, self._doing = None, ""
        self._show()
        return code == Exit.OK

    async def _work(self, found: Found, arguments: list[str]) -> tuple[int, str]:
        """Follow a child to its end: its exit code, and what it complained about."""
        self._child = child = await self.desk.start("import", arguments)
        try:
            if self._stopped:
                child.interrupt()
            await child.send("")
            lines = 0
            while line := await child.line():
                found.take(line)
                lines += 1
                if lines % BURST == 0:
                    await asyncio.sleep(0)
            code = await child.wait()
        except asyncio.CancelledError:
            child.interrupt()
            await _ended(child)
            raise
        if code == Exit.OK:
            return code, ""
        if self._stopped:
            return code, "stopped: nothing was written"
        return code, await asyncio.to_thread(_complaint, child.log, 2 if found.rows else COMPLAINT)

    @work(group="save", exit_on_error=False)
    async def action_save(self) -> None:
        """Write what was found, once that is confirmed; what was not read yet is read first."""
        if self._doing or self._asking:
            return
        found = self._sound
        if not self._text("file"):
            self.notify("Name a file first", severity="warning")
            self.query_one("#file").focus()
        elif found is None:
            self.look(ask=True)
        else:
            self._asking = True
            try:
                await self._confirm(found)
            finally:
                self._asking = False

    async def _confirm(self, found: Found) -> None:
        """Ask whether to write, and what may be replaced; then write."""
        into = Path(os.path.expanduser(self._text("into")))
        paths = self.desk.spec_paths
        if not await asyncio.to_thread(is_read, into, paths):
            words = f"A file there is none of those that are read: name a *.toml of {', '.join(map(str, paths))}"
            self.notify(words, title="into", severity="error")
            self.query_one("#into").focus()
            return
        old = await asyncio.to_thread(_existing, into)
        body = view(found)
        if old:
            edits = sum(item.edit.file in map(str, old) for item in self.desk.specs.items)
            shown = ", ".join(visible(str(path), 200) for path in old[:3]) + (" …" if len(old) > 3 else "")
            body.append(f"\n\nReplaced or deleted, with the {count(edits, 'edit')} in it: {shown}", "bold red")
        title = f"Write {count(found.edits, 'edit')} to {visible(str(into), 200)}?"
        if await self.app.push_screen_wait(Question(title, body)) is None or self._known is not found:
            return
        if await asyncio.to_thread(_stamp, found.settings.file) != found.stamp:
            self.notify("The file changed since it was read: look at what it holds now", severity="warning")
            self.look()
            return
        # Unless asked, a file that came meanwhile is not replaced.
        self.write(found.settings, into, ["--yes"] if old else [])

    # Leaving

    @work(group="leave", exclusive=True, exit_on_error=False)
    async def action_leave(self) -> None:
        """Out of the filter; else stop what is done; else leave."""
        if self._doing:
            self._stopped = True
            self._show()
            if (child := self._child) is not None:
                child.interrupt()
                await _ended(child)
        elif not self.query_one(Finder).clear():
            self.dismiss(self._done)


async def _ended(child: Child) -> None:
    try:
        await asyncio.wait_for(child.wait(), GRACE)
    except TimeoutError:
        child.kill()


def _complaint(log: Path, lines: int) -> str:
    """The last lines of a child's log, without the command that heads it and its data."""
    try:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    return "\n".join([line for line in said if line.strip() and line[0] not in "{$"][-lines:])


def _stamp(file: str) -> object:
    """A value that changes when the file does."""
    with suppress(OSError, ValueError):
        found = os.stat(os.path.expanduser(file))
        return found.st_mtime_ns, found.st_size, found.st_ino
    return None


def _existing(into: Path) -> list[Path]:
    """The files that an import of this name would replace."""
    from editctl.importers.work import existing

    return existing(into)
