"""Specs: every edit of every spec file, the chosen one in full, and what is wrong with it.

Knows: staging, opening an editor, the form. Refuses: to keep anything of its own; the files are the model.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType

from editctl.errors import EditctlError
from editctl.plan import count
from editctl.spec import Edit, fill, visible
from editctl.tui import desk
from editctl.tui.desk import GLYPHS, TONES, Item
from editctl.tui.dialogs import Line, Question
from editctl.tui.form import EditForm
from editctl.tui.place import Pane, Place
from editctl.tui.rows import Column, Finder, RowList
from editctl.tui.tasks import Task

STAGED, UNSTAGED = "●", " "
EXTRA = 500
"""Characters that are shown of what an importer kept."""
FIRST = """No edits yet.

An edit is one fact the model shall state from now on.
  n   write the first one in a form
  e   open a spec file in your editor
  i   import a benchmark

Files are read from: {}"""


def mark(staged: bool) -> str:
    """How it is shown that something is staged."""
    return STAGED if staged else UNSTAGED


class SpecsPlace(Place):
    """All edits of all spec files."""

    NAME = "specs"
    CHANGES = frozenset({"new", "change", "delete", "editor", "take_in", "export"})
    ABOUT = (
        "All edits of all spec files, as the files are now: changes made elsewhere appear by themselves. + is new, "
        "~ is changed, = is what the model says already, ✗ has a problem, ! contradicts another edit, - is live but in "
        "no file any more. What is staged (●) makes the plan."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "stage", "stage", id="specs.stage", tooltip="Stage the edit for the plan, or take it out"),
        Binding("a", "stage_all", "all", id="specs.stage-all", tooltip="Stage everything in sight, or nothing"),
        Binding("enter", "change", "change", id="specs.change", tooltip="Change the edit in a form"),
        Binding("n", "new", "new", id="specs.new", tooltip="Write a new edit in a form"),
        Binding("e", "editor", "editor", id="specs.editor", tooltip="Open the file at the edit's line in $EDITOR"),
        Binding("x", "delete", "delete", id="specs.delete", tooltip="Take the edit out of its file"),
        Binding("p", "app.go('plan')", "plan", id="specs.plan", tooltip="See the plan of what is staged"),
        Binding("i", "take_in", "import", id="specs.import", tooltip="Import a benchmark's file as specs"),
        Binding("o", "export", "out", show=False, id="specs.export", tooltip="Write all edits as CounterFact's JSON"),
    ]

    def body(self) -> ComposeResult:
        """The list and the chosen edit."""
        columns: list[Column[Item]] = [
            Column("", lambda item: (mark(item.key in self.desk.staged), "note"), width=1),
            Column("", lambda item: (GLYPHS[item.state], TONES[item.state]), width=1),
            Column("state", lambda item: (item.state, TONES[item.state]), width=11, wide=True),
            Column("subject", lambda item: (item.edit.subject or "-", "plain"), share=4),
            Column("relation", lambda item: (item.edit.relation or "-", "dim"), share=5),
            Column("new target", lambda item: (item.edit.target_new or "-", "plain"), share=3),
            Column("file", lambda item: (Path(item.edit.file).stem or "-", "dim"), share=3),
        ]
        rows = RowList(columns, "reading …", lambda item: item.key, id="items")
        yield Finder(rows, lambda item: item.text, classes="list")
        yield Pane(classes="detail")

    @property
    def chosen(self) -> Item | None:
        """The edit under the cursor."""
        rows: RowList[Item] = self.query_one("#items", RowList)
        return rows.chosen

    def renew(self) -> None:
        """The edits as they are now."""
        finder: Finder[Item] = self.query_one(Finder)
        empty = FIRST.format(", ".join(map(str, self.desk.spec_paths))) if self.desk.specs.read else finder.empty
        if finder.items is not self.desk.specs.items or finder.empty != empty:
            finder.show(self.desk.specs.items, empty)
        finder.rows.refresh()
        self._detail()

    @on(RowList.Moved)
    def _detail(self) -> None:
        item, problems = self.chosen, self.desk.specs.problems
        staged = item is not None and item.key in self.desk.staged
        self.desk.pointed = item.key if item else ""
        pane, state = self.query_one(Pane), (item, staged, problems)
        pane.show_once(item and item.key, state, lambda: item_view(item, staged) if item else problems_view(problems))
        self.refresh_bindings()

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        item = self.chosen
        if action in ("stage", "change", "delete") and item is None:
            return "there is no edit here"
        if action == "stage" and item is not None and not item.stageable:
            if item.problems:
                return f"{item.problems[0].message}: mend it first"
            return "the model says this already"
        if action == "stage_all" and not self.desk.specs.stageable:
            return "there is nothing to stage: the model says all of this already"
        if action in ("change", "delete") and item is not None and item.state == desk.GONE:
            return "no file declares this edit any more; staged, it is dropped from the model"
        if action == "export" and not self.desk.specs.items:
            return "there is no edit to write"
        if action == "export" and self.desk.specs.problems:
            return f"{self.desk.specs.problems[0]}: mend it first"
        if action == "editor" and self.desk.runner.going:
            return "a run is going on, which would stand still while the editor has the terminal"
        return ""

    def action_stage(self) -> None:
        """Into the plan or out of it, and on to the next."""
        item = self.chosen
        if item is not None:
            self.desk.stage([item.key], item.key not in self.desk.staged)
            self.query_one("#items", RowList).action_down()

    def action_stage_all(self) -> None:
        """All that the filter leaves, or none of it."""
        rows: RowList[Item] = self.query_one("#items", RowList)
        keys = [item.key for item in rows.items if item.stageable]
        self.desk.stage(keys, not set(keys) <= self.desk.staged)

    @on(RowList.Opened)
    async def _opened(self) -> None:
        await self.app.run_action("change", self)

    @work(group="form", exclusive=True, exit_on_error=False)
    async def action_change(self) -> None:
        """Change the chosen edit."""
        item = self.chosen
        if item is not None:
            await self.app.push_screen_wait(EditForm(item.edit, replacing=item.edit.id))
            self.desk.look(changed=True)

    @work(group="form", exclusive=True, exit_on_error=False)
    async def action_new(self) -> None:
        """Write a new edit, in the chosen edit's file at first."""
        item, files = self.chosen, self.desk.specs.files
        first = self.desk.spec_paths[0]
        default = str(first / "edits.toml") if first.suffix != ".toml" else str(first)
        file = item.edit.file if item and item.edit.file else files[0] if files else default
        await self.app.push_screen_wait(EditForm(Edit(subject="", relation="", target_new="", file=file)))
        self.desk.look(changed=True)

    @work(group="form", exclusive=True, exit_on_error=False)
    async def action_delete(self) -> None:
        """Take the chosen edit out of its file."""
        from editctl import amend

        item = self.chosen
        if item is None:
            return
        edit = item.edit
        known = any(live.id == edit.id for live in self.desk.past.lives)
        live = "\nThe model keeps saying it until the drop is staged and applied." if known else ""
        title = f"Delete the edit {visible(edit.id)} from {visible(edit.file, 200)}?"
        if await self.app.push_screen_wait(Question(title, f"{edit.prompt} → {edit.target_new}{live}")):
            try:
                await asyncio.to_thread(amend.remove, Path(edit.file), edit.id)
            except EditctlError as error:
                self.desk.refused(error)
            else:
                self.notify(f"Deleted {edit.id} from {edit.file}", markup=False)
            self.desk.look(changed=True)

    @work(group="form", exclusive=True, exit_on_error=False)
    async def action_take_in(self) -> None:
        """Import a benchmark's file."""
        from editctl.tui.found import Outcome
        from editctl.tui.importing import ImportForm

        done = await self.app.push_screen_wait(ImportForm())
        if done is not None:
            self.desk.look(changed=True)
            words = "\n".join([done.counts, *(path for path, _ in done.files[:3])])
            self.notify(words, title="import", severity="warning" if done.refused else "information")
            if done.rows:
                self.app.push_screen(Outcome(done))

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_export(self) -> None:
        """Write all edits for other tools."""
        name = await self.app.push_screen_wait(Line("Write all edits to which JSON file?", value="counterfact.json"))
        if name is None:
            return
        path = Path(os.path.expanduser(name)).absolute()
        if await asyncio.to_thread(path.exists) and not await self.app.push_screen_wait(Question(f"Replace {path}?")):
            return
        arguments = self.desk.space.arguments("export-specs", "-o", str(path), "--yes")
        self.app.push_screen(Task(f"Write all edits to {name}", "export-specs", arguments))

    def action_editor(self) -> None:
        """Open the editor at the edit, or at the first problem of a file that cannot be read."""
        item, problems, files = self.chosen, self.desk.specs.problems, self.desk.specs.files
        if item is not None and item.edit.file:
            line = item.problems[0].line if item.problems else item.edit.line
            file = item.edit.file
        elif problems:
            file, line = problems[0].file, problems[0].line
        else:
            first = self.desk.spec_paths[0]
            file, line = files[0] if files else str(first if first.suffix == ".toml" else first / "edits.toml"), 1
        self.edit(file, line)

    def edit(self, file: str, line: int) -> None:
        """Hand the terminal to the editor until it is closed."""
        try:
            command = editor_command(os.environ, file, line)
        except ValueError as error:
            self.notify(f"EDITOR cannot be read as a command: {error}", severity="error")
            return
        if shutil.which(command[0]) is None:
            self.notify(f"There is no program {command[0]} here. Set EDITOR to your editor.", severity="error")
            return
        trouble = ""
        try:
            if not Path(file).exists():
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            with self.app.suspend():
                # Textual takes the terminal back only if nothing is raised in here.
                try:
                    code = subprocess.run(command, check=False).returncode
                    trouble = f"{command[0]} ended with code {code}" if code else ""
                except OSError as error:
                    trouble = f"{command[0]} cannot be started: {error.strerror}"
        except SuspendNotSupported:
            trouble = "Here is no terminal to hand to an editor; enter changes the edit in a form"
        except OSError as error:
            trouble = f"{file} cannot be made: {error.strerror}"
        if trouble:
            self.notify(trouble, severity="warning")
        self.app.refresh()
        self.desk.look(changed=True)


def editor_command(environment: os._Environ[str] | dict[str, str], file: str, line: int) -> list[str]:
    """How to open a file at a line in the user's editor; editors differ in how they are told the line.

    Raises:
        ValueError: what the environment says is no command.
    """
    command = shlex.split(environment.get("VISUAL") or environment.get("EDITOR") or "vi") or ["vi"]
    name = Path(command[0]).name
    if name in ("code", "codium", "cursor", "windsurf"):
        return [*command, "--wait", "--goto", f"{file}:{line}"]
    if name in ("hx", "helix", "subl", "zed"):
        return [*command, f"{file}:{line}"]
    return [*command, f"+{line}", file]


def problems_view(problems: tuple[object, ...] | list[object]) -> Text:
    """Problems with file and line, and what to do."""
    text = Text()
    for problem in problems[:100]:
        text.append(visible(str(problem), 500) + "\n", "red")
        if hint := getattr(problem, "hint", ""):
            text.append(f"  hint: {visible(hint, 500)}\n", "dim")
    return text


def item_view(item: Item, staged: bool) -> RenderableType:
    """An edit in full."""
    edit, parts = item.edit, list[RenderableType]()
    title = Text(visible(edit.id or "(no id)", 200), "bold")
    title.append(f"  {GLYPHS[item.state]} {item.state}", "")
    if staged:
        title.append(f"  {STAGED} staged")
    parts.append(title)
    if edit.file:
        parts.append(Text(f"{visible(edit.file, 200)}:{edit.line}", "dim"))
    if item.reason:
        parts.append(Text(visible(item.reason, 500), "yellow"))
    if item.problems:
        parts += [Text(), problems_view(list(item.problems))]
    parts.append(Text())
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)

    def row(name: str, value: str) -> None:
        if value:
            table.add_row(name, Text(visible(value, 10_000)))

    row("subject", edit.subject)
    row("relation", edit.relation)
    row("target_new", edit.target_new)
    old = item.old.target_new if item.old and item.old.prompt == edit.prompt else ""
    row("live target", old if old != edit.target_new else "")
    row("target_true", edit.target_true)
    row("method", edit.method)
    row("tags", ", ".join(edit.tags))
    row("source", edit.source)
    row("note", edit.note)
    row("essence", edit.essence)
    row("extra", visible(edit.extra, EXTRA))
    parts.append(table)
    for name, texts in (
        ("paraphrase", [fill(text, edit.subject) for text in edit.paraphrases]),
        ("locality probe", [_probe(p.prompt, p.answer, "", edit.subject) for p in edit.locality]),
        ("portability probe", [_probe(p.prompt, p.answer, p.kind, edit.subject) for p in edit.portability]),
        ("generation prompt", list(edit.generation_prompts)),
        ("reference", list(edit.references)),
    ):
        if texts:
            parts += [Text(), Text(count(len(texts), name), "bold")]
            parts += [Text(f"  {visible(text, 10_000)}") for text in texts]
    return Group(*parts)


def _probe(prompt: str, answer: tuple[str, ...], kind: str, subject: str) -> str:
    said = f" → {' | '.join(answer)}" if answer else ""
    return fill(prompt, subject) + said + (f"  ({kind})" if kind else "")
