"""History: what was done and what was made, the chosen one in full; going back, comparing, playing a run again.

Knows: the two lists, what can be done with an operation or a version, looking after the store. Refuses: SQL and
computing; the store moves the head, children do what needs the model.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Static

from editctl.errors import EditctlError
from editctl.plan import count
from editctl.spec import visible
from editctl.tui import graph
from editctl.tui.desk import Past
from editctl.tui.dialogs import Line, Pick, Question
from editctl.tui.graph import Deed, Lists, Node
from editctl.tui.place import Pane, Place
from editctl.tui.plan import course_of
from editctl.tui.replay import Replay, read
from editctl.tui.rows import Column, Finder, RowList
from editctl.tui.tasks import Task

if TYPE_CHECKING:
    from editctl.store import Operation, Store, Version

BASE = "base"
"""What the unedited model is called in refs."""
WAIT = 0.05
"""Seconds that a row must be chosen before its version is read; who runs through a list reads nothing."""
MARK = "●"
"""Stands before the version that others are compared with."""
FORMATS = (
    ("merged", "an ordinary Hugging Face folder"),
    ("peft", "a LoRA adapter made of the factors"),
    ("delta", "the version itself, for another editctl store"),
)
NOTHING = """Nothing was done yet: the model is unedited.

  1   Specs: space stages an edit
  2   Plan: g applies what is staged and makes the first version
  I   take over a version that was exported elsewhere"""
PROMISE = """Every operation is kept here, and every version.

u takes back the last operation, b goes back to any other; nothing is ever lost."""
CARE = frozenset({"verify", "gc", "backup", "measure", "take"})
"""Actions that look after the store."""


class Which(Static):
    """The two lists by name, the one that is shown marked; a click shows the other."""

    def show(self, versions: bool, more: str) -> None:
        """Mark one of the two."""
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(" Operations ", "" if versions else "reverse bold")
        text.append(" Versions ", "reverse bold" if versions else "")
        self.update(text.append(f"  v switches{more}", "dim"))

    async def on_click(self, event: events.Click) -> None:
        """Show the other list."""
        await self.app.run_action("switch", self.screen)


class HistoryPlace(Place):
    """Operations and versions."""

    NAME = "history"
    CHANGES = frozenset({"go_back", "export", "alias", "unalias", "squash", "gc", "backup", "take"})
    ABOUT = (
        "Everything that was done, and every version that was made; v switches between the two. @ is how it is now, ◆ "
        "waits for review, ○ is any other version, ◇ the unedited model; what is dim is not in effect any more, ↶ was "
        "taken back. Nothing is ever lost: u takes back, b goes back to any version or operation."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("v", "switch", "switch", id="history.switch", tooltip="Operations or versions"),
        Binding("u", "app.undo", "undo", id="history.undo", tooltip="Take back the last operation"),
        Binding("ctrl+r", "app.redo", "redo", id="history.redo", tooltip="Take back the last undo"),
        Binding("b", "go_back", "go back", id="history.back", tooltip="Move the head to what is chosen"),
        Binding("enter", "review", "review", id="history.review", tooltip="Review the version"),
        Binding("d", "diff", "diff", id="history.diff", tooltip="Compare with the marked version or the parent"),
        Binding("m", "mark", "mark", id="history.mark", tooltip="Mark the version to compare others with"),
        Binding("y", "play", "play", id="history.play", tooltip="Play the run that made the version again"),
        Binding("x", "export", "export", id="history.export", tooltip="Write the version as other programs load it"),
        Binding("l", "alias", "name", id="history.alias", tooltip="Give the version a name: an alias"),
        Binding("L", "unalias", "unname", show=False, id="history.unalias", tooltip="Remove an alias"),
        Binding("s", "squash", "squash", id="history.squash", tooltip="Fold all batches after the version into one"),
        Binding("V", "verify", "verify", show=False, id="store.verify", tooltip="Check the store and rebuild versions"),
        Binding("G", "gc", "clean", show=False, id="store.gc", tooltip="Remove files that no version refers to"),
        Binding("B", "backup", "backup", show=False, id="store.backup", tooltip="Copy the store into a folder"),
        Binding("M", "measure", "measure", show=False, id="store.measure", tooltip="Ask a version all prompts again"),
        Binding("I", "take", "import", show=False, id="store.import", tooltip="Take over an exported version"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._lists = Lists(Past())
        self._listed = self._lists.past
        """What is listed or about to be."""
        self._views: dict[str, object] = {}
        """Versions in full, by id."""
        self._marked: str | None = None
        self._versions = False
        """Whether versions are listed."""

    def body(self) -> ComposeResult:
        """Both lists, one of them shown, and the chosen one."""
        deeds: list[Column[Deed]] = [
            Column("", lambda deed: (self._mark(deed.version), "note"), width=1),
            Column("", lambda deed: ("@" if deed.current else "↶" if deed.undone else "", _tone(deed)), width=1),
            Column("op", lambda deed: (str(deed.operation.id), _tone(deed)), width=5),
            Column("verb", lambda deed: (deed.operation.verb, _tone(deed)), width=8),
            Column("head", lambda deed: (deed.operation.head or BASE, _tone(deed)), width=12),
            Column("names", lambda deed: (deed.names, "note"), share=2),
            Column("when", lambda deed: (_when(deed.operation.at), "dim"), width=11),
            Column("what", lambda deed: (_what(deed.operation), _tone(deed)), share=5),
        ]
        with Vertical(id="lists", classes="list"):
            yield Which(id="which", markup=False)
            operations = RowList(deeds, "reading …", lambda deed: deed.operation.id, id="operations")
            yield Finder(operations, lambda deed: deed.text, id="done")
            versions = RowList(self._node_columns(1), "reading …", lambda node: node.id, id="versions")
            yield Finder(versions, lambda node: node.text, id="made")
        yield Pane(classes="detail")

    def _node_columns(self, rail: int) -> list[Column[Node]]:
        return [
            Column("", lambda node: (self._mark(node.id), "note"), width=1),
            Column("", lambda node: (node.rail, self._node_tone(node)), width=rail),
            Column("version", lambda node: (node.id or BASE, self._node_tone(node)), width=12),
            Column("names", lambda node: (node.names, "note"), share=2),
            Column("method", lambda node: (node.version.method if node.version else "", "dim"), width=9),
            Column("when", lambda node: (_when(node.version.created_at) if node.version else "", "dim"), width=11),
            Column("what", lambda node: (_made_by(node), "plain"), share=4),
        ]

    def _mark(self, version: str) -> str:
        return MARK if version == self._marked else ""

    def _node_tone(self, node: Node) -> str:
        view = self._lists.past.view
        if view is not None and node.id == view.head:
            return "good"
        return "warn" if node.id in self._lists.past.candidates else "plain"

    def on_mount(self) -> None:
        """Operations first."""
        self.query_one("#made").display = False

    # What is chosen

    @property
    def rows(self) -> RowList[Deed] | RowList[Node]:
        """The list that is shown."""
        return self.query_one("#versions" if self._versions else "#operations", RowList)

    @property
    def chosen(self) -> Deed | Node | None:
        """The row under the cursor."""
        return self.rows.chosen

    @property
    def version_id(self) -> str | None:
        """The version that the chosen row is about, "" for the unedited model; None without a row."""
        chosen = self.chosen
        if chosen is None:
            return None
        return chosen.id if isinstance(chosen, Node) else chosen.version

    @property
    def version(self) -> Version | None:
        """The version that the chosen row is about; None for the unedited model, too."""
        return self._lists.version(self.version_id or "")

    @property
    def _target(self) -> tuple[str, str]:
        """What `b` goes back to: the ref, and the head it leads to."""
        chosen = self.chosen
        if isinstance(chosen, Deed):
            return f"op:{chosen.operation.id}", chosen.operation.head
        head = chosen.id if chosen else ""
        return head or BASE, head

    @property
    def _old(self) -> str | None:
        """The version that the chosen one is compared with; None where there is none."""
        if self._marked is not None:
            return self._marked
        return self.version.parent if self.version else None

    # Showing

    def renew(self) -> None:
        """Both lists as they are now."""
        if self.desk.past.read and self.desk.past is not self._listed:
            self._listed = self.desk.past
            self.list_again()
        self._title()

    @work(exclusive=True, group="history", exit_on_error=False)
    async def list_again(self) -> None:
        """Lay the lanes of what was read anew."""
        # Not an argument: of those Textual writes out every field, thousands of versions here.
        lists = await asyncio.to_thread(graph.lists, self._listed)
        self._lists, self._views = lists, {}
        done: Finder[Deed] = self.query_one("#done", Finder)
        made: Finder[Node] = self.query_one("#made", Finder)
        done.empty = made.empty = NOTHING
        made.rows.columns = self._node_columns(lists.width)
        done.show(lists.deeds)
        made.show(lists.nodes)
        if self._marked and lists.version(self._marked) is None:
            self._marked = None
        self._title()
        self.detail()

    def _title(self) -> None:
        marked = "" if self._marked is None else f" · {MARK} {visible(self._marked) or BASE} is marked"
        self.query_one(Which).show(self._versions, marked)

    @on(RowList.Moved)
    def _moved(self, event: RowList.Moved) -> None:
        if event.rows is self.rows:
            self.detail()
            self.refresh_bindings()

    @work(exclusive=True, group="detail", exit_on_error=False)
    async def detail(self) -> None:
        """Show the chosen operation, and the version it is about in full."""
        await asyncio.sleep(WAIT)
        chosen, version = self.chosen, self.version
        parts: list[RenderableType] = []
        if isinstance(chosen, Deed):
            parts += [deed_view(chosen), Text()]
        if version is not None:
            if version.id not in self._views:
                try:
                    self._views[version.id] = await asyncio.to_thread(_in_full, self.desk.store, version)
                except EditctlError as error:
                    self._views[version.id] = Text(f"{visible(error.message)}\n{visible(error.hint)}", "red")
            parts.append(self._views[version.id])  # type: ignore[arg-type]
        elif chosen is not None:
            parts.append(Text("base: the unedited model, no edits", "bold"))
        elif self._lists.past.read and not self._lists.deeds:
            parts.append(Text(PROMISE, "dim"))
        if chosen is not self.chosen:
            return
        pane = self.query_one(Pane)
        pane.show(Group(*parts))
        pane.scroll_home(animate=False)
        self.refresh_bindings()

    # Obstacles

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        if action.startswith("app."):
            return self.desk.obstacle(action.removeprefix("app."))
        if action == "switch":
            return ""
        if action in ("take", *CARE) or action in self.CHANGES:
            if self.desk.runner.going:
                return "a run is going on: wait for it, or cancel it in Run"
            if self.desk.elsewhere and action not in ("verify", "backup", "measure", "export"):
                return f"the store is being changed by {self.desk.elsewhere}"
        if action == "take":
            return ""
        if not self._lists.deeds:
            return "nothing was done yet"
        if action == "unalias" and not self._aliases:
            return "no version has a name"
        if action in ("verify", "gc", "backup", "unalias"):
            return ""
        if self.chosen is None:
            return "nothing is chosen"
        return self._why_not_chosen(action)

    def _why_not_chosen(self, action: str) -> str:
        """What about the chosen row stands in the way."""
        name, view = self.version_id, self._lists.past.view
        head = view.head if view else ""
        if action == "go_back":
            target = self._target[1]
            if target == head:
                return f"the head is at {target or BASE} already"
            if target and target not in self._lists.heads:
                return "this version was never accepted, so the head cannot go there; Review (enter) accepts it"
        if action == "diff":
            if self._old is None:
                return "base has nothing below it: m marks another version to compare it with"
            if self._old == name:
                return "that takes two different versions: this is the marked one"
        if not name:
            if action == "review":
                return "the unedited model needs no review"
            if action in ("play", "measure"):
                return "the unedited model was made by no run"
        if action == "squash":
            if not head:
                return "the head is the unedited model: there is nothing to fold"
            if name not in self._lists.below:
                return "only what came after a version below the head can be folded"
        return ""

    @property
    def _aliases(self) -> dict[str, str]:
        """Names that a person gave, with their versions."""
        view = self._lists.past.view
        return {name: version for name, version in view.aliases.items() if name != "candidate"} if view else {}

    # Looking

    def action_switch(self) -> None:
        """The other list."""
        self._versions = not self._versions
        self.query_one("#made").display = self._versions
        self.query_one("#done").display = not self._versions
        self.rows.focus()
        self._title()
        self.detail()
        self.refresh_bindings()

    def action_mark(self) -> None:
        """Mark the version, or take the mark away."""
        name = self.version_id
        self._marked = None if name == self._marked else name
        for rows in self.query(RowList):
            rows.refresh()
        self._title()
        self.refresh_bindings()

    async def action_review(self) -> None:
        """To the version's review."""
        self.desk.reviewed = self.version_id
        await self.desk.action_go("review")

    @on(RowList.Opened)
    async def _opened(self) -> None:
        await self.app.run_action("review", self)

    @work(group="compare", exclusive=True, exit_on_error=False)
    async def action_diff(self) -> None:
        """What differs from the marked version, else from the parent."""
        old, new = self._lists.version(self._old or ""), self.version
        try:
            body = await asyncio.to_thread(_compared, self.desk.store, old, new)
        except EditctlError as error:
            self.desk.refused(error)
        else:
            self.desk.read(f"From {old.id if old else BASE} to {new.id if new else BASE}", body)

    @work(group="compare", exclusive=True, exit_on_error=False)
    async def action_play(self) -> None:
        """The run that made the version, from its recorded events."""
        version = self.version
        if version is None:
            return
        try:
            story = await asyncio.to_thread(lambda: read(self.desk.store.events(version)))
        except EditctlError as error:
            self.desk.refused(error)
            return
        if story:
            self.app.push_screen(Replay(version, story))
        else:
            self.notify("No events of this run were recorded.", severity="warning")

    # Changing

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_go_back(self) -> None:
        """Move the head, after a question."""
        ref, head = self._target
        name, now = head or BASE, self._lists.past.view.head if self._lists.past.view else ""
        where = f"where it was after operation {ref.removeprefix('op:')}: {name}" if ref.startswith("op:") else name
        body, seen = f"The head is at {now or BASE} now. Every version stays; u takes this back.", self.desk.seen
        if await self.app.push_screen_wait(Question(f"Move the head to {where}?", body)) is None:
            return
        self.desk.change("go back", lambda store: store.restore(ref, f"editctl tui: restore {ref}"), seen=seen)

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_alias(self) -> None:
        """Give the version a name."""
        ref = self.version_id or BASE
        name = await self.app.push_screen_wait(Line(f"A name for version {ref}", "for example stable"))
        if name in self._aliases:
            body = f"It is the name of {self._aliases[name] or BASE} now; u takes this back."
            if await self.app.push_screen_wait(Question(f"Give {visible(name)} to {ref}?", body)) is None:
                return
        if name is not None:
            self.desk.change("alias", lambda store: store.set_alias(name, ref, f"editctl tui: alias {name} {ref}"))

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_unalias(self) -> None:
        """Remove a name."""
        choices = [(name, version or BASE) for name, version in self._aliases.items()]
        name = await self.app.push_screen_wait(Pick("Remove which name?", choices))
        if name is not None:
            self.desk.change("alias", lambda store: store.set_alias(name, None, f"editctl tui: alias --delete {name}"))

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_squash(self) -> None:
        """Fold what came after the version into one solve."""
        head, ref = self._lists.past.head, self.version_id or BASE
        body = "The edits stay what they are; the new version is measured and held to the gates like any other."
        question = Question(f"Fold all batches after {ref} into one?", body, note=True)
        consent = await self.app.push_screen_wait(question)
        if consent is None or head is None:
            return
        if why := self.obstacle("squash"):
            self.notify(why, severity="warning", markup=False)
            return
        note = ["--note", consent.note] if consent.note else []
        arguments = self.desk.space.arguments("squash", ref, "--yes", "--json", *note, model=True)
        course = course_of(head.params, 0)
        course.shares = {**course.shares, **head.seconds}
        self.desk.carry_out("squash", course, arguments, "squash")

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_export(self) -> None:
        """Write the version into a folder."""
        ref = self.version_id or BASE
        # The unedited model has nothing but its weights.
        formats = FORMATS if self.version else FORMATS[:1]
        form = await self.app.push_screen_wait(Pick(f"Export version {ref} as", formats))
        if form is None:
            return
        folder = await self.app.push_screen_wait(Line("Into which new folder?", value=f"exports/{ref}-{form}"))
        if folder is None:
            return
        arguments = self.desk.space.arguments("export", ref, "--out", _path(folder), "--format", form, model=True)
        self.app.push_screen(Task(f"Export version {ref} as {form} to {folder}", "export", arguments))

    # The store

    def action_verify(self) -> None:
        """Check the store; nothing is changed."""
        arguments = self.desk.space.arguments("verify", model=True)
        self.app.push_screen(Task("Check the store and rebuild every version", "verify", arguments))

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_gc(self) -> None:
        """Remove files that no version refers to."""
        body = "Interrupted runs leave some. Versions, operations and all they refer to stay."
        if await self.app.push_screen_wait(Question("Remove files that no version refers to?", body)) is not None:
            self.app.push_screen(Task("Remove left-over files", "gc", self.desk.space.arguments("gc")))

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_backup(self) -> None:
        """Copy the store."""
        folder = await self.app.push_screen_wait(Line("Copy the store into which folder?", "for example ../backup"))
        if folder is not None:
            arguments = self.desk.space.arguments("backup", _path(folder))
            self.app.push_screen(Task(f"Copy the store to {folder}", "backup", arguments))

    def action_measure(self) -> None:
        """Ask the version all its prompts again; nothing is recorded."""
        ref = self.version_id or BASE
        arguments = self.desk.space.arguments("measure", ref, "--json", model=True)
        self.app.push_screen(Task(f"Ask version {ref} all its prompts again", "measure", arguments, measured_view))

    @work(group="question", exclusive=True, exit_on_error=False)
    async def action_take(self) -> None:
        """Take over what was exported elsewhere."""
        folder = await self.app.push_screen_wait(Line("Import from which folder?", "made by export, format delta"))
        if folder is None:
            return
        body = "Its weights are rebuilt and compared, its prompts are asked, and it is held to the gates."
        consent = await self.app.push_screen_wait(Question(f"Take over the version in {folder}?", body, note=True))
        if consent is None:
            return
        if why := self.obstacle("take"):
            self.notify(why, severity="warning", markup=False)
            return
        note = ["--note", consent.note] if consent.note else []
        more = ("delta", _path(folder), "--yes", "--json", *note)
        arguments = self.desk.space.arguments("import", *more, model=True)
        self.desk.carry_out("import", course_of({}, 0), arguments, "import")


def _path(written: str) -> str:
    """A path that no command takes for an option."""
    return str(Path(written).expanduser().absolute())


def _tone(deed: Deed) -> str:
    return "good" if deed.current else "dim" if deed.quiet else "plain"


def _when(at: str) -> str:
    """Month, day, hour, minute."""
    return at[5:16].replace("T", " ")


def _what(operation: Operation) -> str:
    """What an operation did, without the version that its row names already."""
    return operation.description.removeprefix(f"version {operation.head} ")


def _made_by(node: Node) -> str:
    """What is known of how a version came to be, but for its id, which stands before."""
    if node.version is None:
        return "the unedited model"
    if node.maker is None:
        return ""
    words = node.maker.description.removeprefix(f"version {node.id} ")
    return f"{node.maker.verb} {words}" if node.maker.about == node.id else f"{node.maker.verb}: {words}"


def deed_view(deed: Deed) -> RenderableType:
    """An operation in full: what, when, who, why, and how it left everything."""
    op = deed.operation
    title = Text(f"operation {op.id}: {visible(op.verb)}", "bold")
    if deed.current:
        title.append("  how it is now", "green")
    elif deed.undone:
        title.append("  taken back", "yellow")
    elif deed.quiet and op.verb not in ("undo", "redo"):
        title.append("  not in effect any more", "yellow")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    edits = f"{count(len(op.edits), 'edit')}: {', '.join(op.edits)}" if op.edits else ""
    head = op.head or BASE
    before = op.head_before or BASE
    facts = {
        "what": op.description,
        "when": op.at,
        "who": op.who,
        "why": op.note,
        "command": op.command,
        "edits": edits,
        "head": head if head == before else f"{before} → {head}",
        "waiting": ", ".join(op.candidates),
        "names": ", ".join(f"{name} = {version or BASE}" for name, version in op.aliases.items()),
    }
    for name, value in facts.items():
        if value:
            table.add_row(name, Text(visible(value, 10_000)))
    return Group(title, table)


def measured_view(lines: Sequence[str]) -> RenderableType:
    """What `editctl measure --json` said."""
    from editctl.figures import MetricsView
    from editctl.metrics.values import Answer, Metric
    from editctl.report import answers_view

    said = [json.loads(line) for line in lines]
    kinds: dict[str, list[dict[str, object]]] = {"answer": [], "metric": []}
    for one in said:
        kinds.get(one.pop("type", ""), []).append(one)
    answers = [Answer(**{**one, "wanted": tuple(one["wanted"])}) for one in kinds["answer"]]  # type: ignore[arg-type]
    told = [{**one, "value": math.nan if one["value"] is None else one["value"]} for one in kinds["metric"]]
    metrics = [Metric(**one) for one in told]  # type: ignore[arg-type]
    return Group(MetricsView(metrics), Text(), answers_view(answers, 100))


def _in_full(store: Store, version: Version) -> object:
    from editctl.cli_run import version_report

    return version_report(store, version, rows=0)


def _compared(store: Store, old: Version | None, new: Version | None) -> object:
    from editctl.report import diff_view, short

    found = store.compare(old, new)
    names = (short(old.id if old else ""), short(new.id if new else ""))
    return diff_view(names, found.facts, found.moved, found.metrics, found.norms)
