"""Trace: where in the model an answer passes, as heat maps of what was traced at a version.

Knows: which trace is looked at, by which kind, and what the cell under the cursor says. Refuses: computing, and to
write blocks into the configuration unasked; a child traces and the store keeps what it found.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Static

from editctl import heat
from editctl.errors import EditctlError
from editctl.metrics.effects import (
    ATTENTION,
    AVERAGES,
    BEFORE,
    KINDS,
    MLP,
    STATE,
    TRACE,
    Average,
    Proposal,
    Summary,
    Trace,
    averages,
    propose,
)
from editctl.plan import count
from editctl.spec import visible
from editctl.tui import desk
from editctl.tui.dialogs import Pick, Question
from editctl.tui.heatmap import HeatMap, Line
from editctl.tui.place import Place
from editctl.tui.rows import Column, Finder, RowList
from editctl.tui.tasks import Task

if TYPE_CHECKING:
    from editctl.store import Evidence

BASE, HEAD = "base", "@"
EMPTY = """Nothing was traced at {} yet.

  t   traces an edit
  a   traces all edits, and averages them"""
UNREAD = "reading …"


@dataclass(frozen=True)
class Record:
    """One thing that was traced."""

    evidence: Evidence
    trace: Trace | None = None
    summary: Summary | None = None
    """Of many prompts."""
    wrong: str = ""
    """Why it cannot be read."""
    usual: int = 1
    """How many blocks the method edits."""

    @property
    def title(self) -> str:
        """What was traced."""
        if self.summary is not None:
            return f"{count(len(self.summary.edits), 'prompt')} together"
        return self.trace.subject if self.trace else self.evidence.edit or self.evidence.kind

    @property
    def answer(self) -> str:
        """What p is of."""
        return self.trace.answer if self.trace else ""

    @property
    def effect(self) -> str:
        """The total effect."""
        return heat.points(self.trace.total) if self.trace else ""

    @property
    def tone(self) -> str:
        """How its row looks."""
        if self.wrong:
            return "bad"
        return "warn" if self.trace is not None and not self.trace.counts else "plain"

    @cached_property
    def text(self) -> str:
        """What a filter looks at."""
        more = (self.trace.edit, self.trace.prompt, self.trace.answer) if self.trace else ("averages",)
        return " ".join((self.title, self.evidence.who, *more)).casefold()

    @cached_property
    def proposal(self) -> Proposal:
        """Which blocks it speaks for."""
        if self.summary is not None:
            return self.summary.proposal
        return propose(averages([self.trace]) if self.trace else (), self.usual)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was restored."""
        found = (
            {a.kind for a in self.summary.averages} if self.summary else set(self.trace.effects if self.trace else ())
        )
        return tuple(kind for kind in KINDS if kind in found)

    @property
    def window(self) -> int:
        """Blocks that were restored together."""
        known = self.summary or self.trace
        return known.window if known else 1

    def rows(self, kind: str) -> list[tuple[Line, Average | None]]:
        """The heat map of a kind: tokens from the subject on, or roles with their averages."""
        if self.summary is not None:
            return [(Line(visible(a.role, 100), a.means), a) for a in self.summary.averages if a.kind == kind]
        if self.trace is None:
            return []
        known = zip(self.trace.tokens, self.trace.roles, self.trace.effects.get(kind, ()), strict=False)
        return [(Line(heat.named(token, role), row), None) for token, role, row in known if role != BEFORE]

    @cached_property
    def top(self) -> float:
        """The effect that has the strongest shade: one for all kinds, so that they can be compared."""
        shown = [value for kind in self.kinds for line, _ in self.rows(kind) for value in line.values]
        return max([self.trace.total if self.trace else 0.0, *shown], default=0.0)


def record_of(one: Evidence, usual: int) -> Record:
    """What a piece of evidence holds."""
    try:
        if one.kind == AVERAGES:
            return Record(one, summary=Summary.from_json(one.data), usual=usual)
        return Record(one, trace=Trace.from_json(one.data), usual=usual)
    except ValueError as error:
        return Record(one, wrong=str(error), usual=usual)


def progress_of(line: str) -> str:
    """How a line of the child's output reads while it works; empty for one that tells nothing."""
    try:
        said = json.loads(line)
        if said["type"] == "trace":
            return f"{said['edit'] or said['prompt']} → {said['answer']}: {heat.points(said['total'])} points"
        if said["type"] == "progress" and said["stage"] == "trace":
            return f"{int(said['done'])} of {count(int(said['total']), 'prompt')}"
    except (ValueError, KeyError, TypeError):
        return ""
    return ""


class Kinds(Static):
    """What can be restored, the one that is shown marked; a click shows the next."""

    def show(self, kinds: Sequence[str], chosen: str) -> None:
        """Mark one of them."""
        text = Text(no_wrap=True, overflow="ellipsis")
        for kind in kinds:
            text.append(f" {kind} ", "reverse bold" if kind == chosen else "")
        self.update(text.append("  v switches" if len(kinds) > 1 else "", "dim"))

    async def on_click(self, event: events.Click) -> None:
        """Show the next."""
        await self.app.run_action("kind", self.screen)


class TracePlace(Place):
    """What was traced at a version."""

    NAME = "trace"
    CHANGES = frozenset({"trace", "trace_all", "use"})
    ABOUT = (
        "Where in the model an answer passes. Noise on the subject's tokens takes the answer away (the total effect); "
        "one state put back to what it was without noise brings some of it back (a cell, in points of probability). "
        "state is what a block puts out; mlp and attention are what those of a few neighbouring blocks write. The more "
        "a cell brings back, the more of the answer passes there. Every trace is kept with its version."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "trace", "trace", id="trace.trace", tooltip="Trace the prompt of an edit"),
        Binding("a", "trace_all", "all", id="trace.all", tooltip="Trace all edits of all spec files, and average them"),
        Binding("enter", "map", "cells", id="trace.map", tooltip="Walk in the heat map; esc leaves it"),
        Binding("v", "kind", "kind", id="trace.kind", tooltip="State, MLP or attention"),
        Binding("w", "use", "use blocks", id="trace.use", tooltip="Write the proposed blocks to the configuration"),
        Binding("r", "version", "version", id="trace.version", tooltip="Look at the traces of another version"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._ref = HEAD
        self._records: tuple[Record, ...] = ()
        self._read: object = None
        """Of which version and store the records are; None before they were read."""
        self._kind: str = STATE
        self._newest = False
        """Whether the newest is to be chosen once it is read."""
        self._shown: tuple[Record | None, str] = (None, "")

    def body(self) -> ComposeResult:
        """The list, and the chosen trace."""
        columns: list[Column[Record]] = [
            Column("traced", lambda record: (record.title, record.tone), share=3),
            Column("answer", lambda record: (record.answer, "dim"), share=2),
            Column("effect", lambda record: (record.effect, record.tone), width=6),
            Column("when", lambda record: (record.evidence.at[5:16].replace("T", " "), "dim"), width=11, wide=True),
        ]
        rows = RowList(columns, UNREAD, lambda record: record.evidence.id, id="traces")
        yield Finder(rows, lambda record: record.text, classes="list")
        with Vertical(classes="detail"):
            yield Static(id="about", markup=False)
            yield Kinds(id="kinds", markup=False)
            yield HeatMap(id="map")
            yield Static(id="cell", markup=False)

    # What is shown

    @property
    def _rows(self) -> RowList[Record]:
        return self.query_one("#traces", RowList)

    @property
    def _map(self) -> HeatMap:
        return self.query_one("#map", HeatMap)

    @property
    def chosen(self) -> Record | None:
        """The trace under the cursor."""
        return self._rows.chosen

    def _version(self) -> str:
        """Id of the version whose traces are shown, "" for the unedited model."""
        past = self.desk.past
        if self._ref == HEAD:
            return past.head.id if past.head else ""
        return "" if self._ref == BASE else self._ref

    def renew(self) -> None:
        """The traces as they are now."""
        if self.desk.past.read and self._read != (self._version(), self.desk.past.stamp):
            self.read()
        self._detail()

    @work(group="traces", exclusive=True, exit_on_error=False)
    async def read(self) -> None:
        """Read the traces of the version."""
        version, stamp = self._version(), self.desk.past.stamp
        try:
            self._records = await asyncio.to_thread(self._found, version)
        except EditctlError as error:
            self._records = ()
            self.desk.refused(error)
        self._read = version, stamp
        finder: Finder[Record] = self.query_one(Finder)
        finder.show(self._records, EMPTY.format(version or BASE))
        if self._newest:
            self._newest = False
            self._rows.move(0)
        self._detail()

    def _found(self, version: str) -> tuple[Record, ...]:
        evidence = self.desk.store.evidence(version)
        traced = [one for one in evidence if one.kind in (TRACE, AVERAGES)]
        usual = self.desk.space.usual() if traced else 1
        return tuple(record_of(one, usual) for one in traced)

    @on(RowList.Moved)
    def _detail(self) -> None:
        record = self.chosen
        kinds = record.kinds if record else ()
        kind = self._kind if self._kind in kinds else kinds[0] if kinds else ""
        for name in ("#kinds", "#map", "#cell"):
            self.query_one(name).display = record is not None
        if record is None:
            self._shown = (None, "")
            self.query_one("#about", Static).update(Text(self.ABOUT, "dim"))
        elif self._shown != (record, kind):
            self.query_one("#about", Static).update(about(record))
            self.query_one("#kinds", Kinds).show(kinds, kind)
            before, self._shown = self._shown[0], (record, kind)
            self._map.show([line for line, _ in record.rows(kind)], record.top)
            if before is not record:
                self._map.to_highest()
            self._cell()
        self.refresh_bindings()

    @on(HeatMap.Moved)
    def _cell(self) -> None:
        record, kind = self._shown
        if record is not None:
            self.query_one("#cell", Static).update(cell_of(record, kind, self._map.row, self._map.block))

    # Keys

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        record = self.chosen
        if action in ("trace", "trace_all"):
            if self.desk.runner.going:
                return "a run is going on, which has the model: trace when it has ended"
            if not self._items:
                return "there is no edit to trace: Specs (1) writes one"
            if action == "trace_all" and self.desk.specs.problems:
                return f"{self.desk.specs.problems[0]}: mend it first"
        if action in ("map", "kind", "use") and record is None:
            return "nothing was traced at this version yet: t traces an edit"
        if action in ("map", "kind") and record is not None and not record.kinds:
            return record.wrong or "there is nothing in it"
        if action == "use" and record is not None and not record.proposal.layers:
            return record.wrong or f"no blocks are proposed: {record.proposal.why}"
        return ""

    async def action_leave(self) -> None:
        """From the heat map to the list, from there back."""
        if self._map.has_focus:
            self._rows.focus()
        else:
            await super().action_leave()

    @on(RowList.Opened)
    async def _opened(self) -> None:
        await self.app.run_action("map", self)

    def action_map(self) -> None:
        """Into the heat map."""
        self._map.focus()

    def action_kind(self) -> None:
        """The next of what was restored."""
        record, kind = self._shown
        if record is not None and record.kinds:
            self._kind = record.kinds[(record.kinds.index(kind) + 1) % len(record.kinds)]
            self._detail()

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_version(self) -> None:
        """Traces of another version."""
        past = self.desk.past
        head = past.head.id if past.head else ""
        choices = [(HEAD, f"the head, {head or BASE}"), (BASE, "the unedited model")]
        choices += [(v.id, f"{v.created_at[:16]}  {v.method}") for v in past.versions]
        ref = await self.app.push_screen_wait(Pick("Traces of which version?", choices))
        if ref is not None:
            self._ref = ref
            self.update()

    # Tracing

    @property
    def _items(self) -> list[desk.Item]:
        """Edits that can be traced, the one that is chosen in Specs first."""
        found = [item for item in self.desk.specs.items if item.state != desk.GONE and not item.problems]
        return sorted(found, key=lambda item: item.key != self.desk.pointed)

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_trace(self) -> None:
        """Trace one edit."""
        items = {item.edit.id: item.edit for item in self._items}
        choices = [(name, f"{edit.prompt} → {edit.target_true or '?'}") for name, edit in items.items()]
        name = await self.app.push_screen_wait(Pick("Trace the prompt of which edit?", choices))
        if name is not None and not self.why_not("trace"):
            await self._work(f"Trace {items[name].prompt}", items[name].file, "--edit", name)

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_trace_all(self) -> None:
        """Trace all edits, once that is confirmed."""
        many = count(len(self._items), "edit")
        body = (
            "Each takes about as long as asking a few hundred prompts.\nWhat is cancelled keeps what was traced so far."
        )
        if await self.app.push_screen_wait(Question(f"Trace all {many}?", body)) and not self.why_not("trace_all"):
            await self._work(f"Trace {many}", *map(str, self.desk.spec_paths))

    async def _work(self, title: str, *what: str) -> None:
        space, ref = self.desk.space, self._version() or BASE
        arguments = space.arguments("trace", *what, "--ref", ref, "--json", model=True)
        self._newest = True
        await self.app.push_screen_wait(Task(title, "trace", arguments, read=progress_of, leaves=True))
        self.desk.look()

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_use(self) -> None:
        """Write the proposed blocks to the configuration, once that is confirmed."""
        from editctl import config

        record = self.chosen
        if record is None or not record.proposal.layers:
            return
        layers, path = list(record.proposal.layers), self.desk.space.config_path or Path(config.FILE)
        set_now = self.desk.space.config.settings.get("layers")
        body = heat.proposal_line(record.proposal).append("\n\n")
        body.append(f"[settings] of {visible(str(path), 200)}:\n")
        body.append(f"  - layers = {set_now}\n" if set_now is not None else "", "red")
        body.append(f"  + layers = {layers}", "green")
        body.append("\n\nWhat is applied stays as it is; new edits are written there.", "dim")
        if await self.app.push_screen_wait(Question("Use these blocks?", body)) is None:
            return
        try:
            await asyncio.to_thread(config.put, path, ("settings", "layers"), layers)
        except (EditctlError, OSError) as error:
            self.desk.refused(error if isinstance(error, EditctlError) else EditctlError(f"{path}: {error.strerror}"))
        else:
            # What was read of the file before is no longer so.
            self.desk.space = self.desk.space.with_flags()
            self.notify(f"Wrote layers = {layers} to {path}")
            self.desk.plan_again()


def about(record: Record) -> Text:
    """What was traced, in a few lines."""
    text = Text()
    if record.wrong:
        return text.append(visible(record.wrong, 500), "red")
    if (trace := record.trace) is not None:
        text.append(f"{visible(trace.prompt, 200)} ").append(f"→ {visible(trace.answer, 60)}\n", "bold")
        chances = f"p {100 * trace.clean:.1f} %, corrupted {100 * trace.corrupted:.1f} %"
        text.append(f"{chances}: total effect {heat.points(trace.total)} points\n")
        if not trace.counts:
            text.append(f"{heat.LOW}\n", "yellow")
    if (found := record.summary) is not None:
        text.append(f"{count(len(found.edits), 'prompt')} together", "bold")
        left = f"; in {found.left_out} more the subject hardly matters" if found.left_out else ""
        text.append(f"{left}\n")
    return text.append_text(heat.proposal_line(record.proposal))


def cell_of(record: Record, kind: str, row: int, block: int) -> Text:
    """What the cell under the cursor says."""
    rows = record.rows(kind)
    if row >= len(rows) or block >= len(rows[row][0].values):
        return Text()
    line, average = rows[row]
    last = len(line.values)
    first, end = (max(0, block - record.window // 2), min(last, block + (record.window + 1) // 2))
    what = {
        STATE: f"the output of block {block}",
        MLP: f"what the MLPs of blocks {first} to {end - 1} write",
        ATTENTION: f"what the attention of blocks {first} to {end - 1} writes",
    }[kind]
    text = Text(f"{line.name}, block {block}: ", "bold")
    if average is not None:
        return text.append(f"{heat.told(average, block)} points over {count(average.n, 'prompt')}\n{what}, put back")
    chance = 100 * ((record.trace.corrupted if record.trace else 0.0) + line.values[block])
    return text.append(f"{heat.points(line.values[block])} points, p {max(chance, 0.0):.1f} %\n{what}, put back")
