"""Plan: what would be done, what the model says now, and what it will probably take.

Knows: the staged actions, asking for what is said now, the question before a run. Refuses: computing; the plan is the
core's, and the run is a child's.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from editctl.errors import EditctlError
from editctl.metrics.edits import NAMES, questions, says
from editctl.metrics.edits import Question as Asking
from editctl.metrics.values import LOCALITY, REWRITE
from editctl.plan import count
from editctl.spec import visible
from editctl.tui import desk
from editctl.tui.asker import Asked, Reply
from editctl.tui.course import SHARES, Course
from editctl.tui.desk import Item
from editctl.tui.dialogs import Line, Question
from editctl.tui.place import Pane, Place
from editctl.tui.rows import WIDE, Column, Finder, RowList
from editctl.tui.specs import mark

DEBOUNCE = 0.2
"""Seconds without a change of what is staged before the model is asked."""
AT_ONCE = 64
"""Prompts asked in one go, so that the first answers are soon there."""
NOTHING = """Nothing to do: the model says what the specs say.

  1   back to the specs: n writes an edit, enter changes one
  5   what was done before"""


class PlanPlace(Place):
    """What would be done."""

    NAME = "plan"
    CHANGES = frozenset({"apply", "save"})
    ABOUT = (
        "What would be done: + add, ~ replace, ? measure again, - drop. Only what is staged (●) is in the plan. Beside "
        "it what the model says now to every prompt of the edit, and how probable the new and the old target are."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "stage", "stage", id="plan.stage", tooltip="Take the edit out of the plan, or put it in"),
        Binding("a", "stage_all", "all", id="plan.stage-all", tooltip="Stage everything in sight, or nothing"),
        Binding("g", "apply", "go", id="plan.apply", tooltip="Apply the plan: edit the model"),
        Binding("s", "save", "save", id="plan.save", tooltip="Save the plan to a file: an exact contract for later"),
        Binding("n", "now", "ask now", id="plan.now", tooltip="Ask again what the model says now"),
        Binding("enter", "open", "edit", id="plan.open", tooltip="Show the edit in Specs"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str, tuple[str, ...]], Reply] = {}
        """Replies by head, prompt and what was wanted."""
        self._trouble = ""
        self._arrival = -1
        """Which coming to this place was seen."""
        self._wanted: tuple[str, frozenset[str]] | None = None

    def body(self) -> ComposeResult:
        """The actions and the chosen one."""
        columns: list[Column[Item]] = [
            Column("", lambda item: (mark(item.key in self.desk.staged), "note"), width=1),
            Column("", lambda item: (_glyph(item), desk.TONES[item.state]), width=1),
            Column("edit", lambda item: (item.edit.prompt, "plain"), share=5),
            Column("from", lambda item: (self._now(item), "dim"), share=2),
            Column("to", lambda item: ("-" if item.state == desk.GONE else item.edit.target_new, "good"), share=2),
        ]
        rows = RowList(columns, "reading …", lambda item: item.key, id="actions")
        yield Finder(rows, lambda item: item.text, classes="list")
        yield Pane(classes="detail")

    @property
    def chosen(self) -> Item | None:
        """The action under the cursor."""
        rows: RowList[Item] = self.query_one("#actions", RowList)
        return rows.chosen

    def on_screen_resume(self) -> None:
        """What could not be asked is asked again."""
        if self._trouble:
            self._wanted = None

    def renew(self) -> None:
        """The actions as they are now; what is staged comes first."""
        finder: Finder[Item] = self.query_one(Finder)
        staged = self.desk.staged
        pending = [item for item in self.desk.specs.items if item.stageable]
        pending.sort(key=lambda item: item.key not in staged)
        empty = NOTHING if self.desk.specs.read else finder.empty
        if list(finder.items) != pending or finder.empty != empty:
            finder.show(pending, empty)
        # Only who comes from another place: a dialog that closes must not move the cursor.
        if self._arrival != self.desk.arrivals and (self.chosen is None or self.chosen.key not in staged):
            finder.rows.move(0)
        self._arrival = self.desk.arrivals
        finder.rows.refresh()
        self._ask_new()
        self._detail()

    def _ask_new(self) -> None:
        """Ask what is said now to the prompts of what is staged, if that was not asked yet."""
        wanted = (self._head, self.desk.staged)
        if self.desk.staged and wanted != self._wanted and not self.desk.runner.going:
            self._wanted = wanted
            self.ask_now()

    @property
    def _head(self) -> str:
        return self.desk.past.head.id if self.desk.past.head else ""

    @work(exclusive=True, group="now", exit_on_error=False)
    async def ask_now(self) -> None:
        """Ask the head all prompts of what is staged, the chosen edit's first."""
        # Who stages one after another asks once.
        await asyncio.sleep(DEBOUNCE)
        head, chosen = self._head, self.chosen
        items = [item for item in self.desk.specs.items if item.key in self.desk.staged]
        items.sort(key=lambda item: chosen is None or item.key != chosen.key)
        todo = [asked for item in items for asked in map(_asked, _questions(item), [item] * 10_000)]
        todo = [asked for asked in dict.fromkeys(todo) if (head, asked.prompt, asked.wanted) not in self._said]
        self._trouble = ""
        try:
            for at in range(0, len(todo), AT_ONCE):
                part = todo[at : at + AT_ONCE]
                version, replies = await self.desk.ask("@", part)
                if version != head:
                    break
                found = zip(part, replies, strict=True)
                self._said |= {(head, asked.prompt, asked.wanted): reply for asked, reply in found}
                self.update()
        except EditctlError as error:
            self._trouble = f"{error.message}\n{error.hint}"
            self.update()

    def said(self, item: Item, question: Asking) -> Reply | None:
        """What the head says, if it was asked."""
        asked = _asked(question, item)
        return self._said.get((self._head, asked.prompt, asked.wanted))

    def _now(self, item: Item) -> str:
        reply = self.said(item, _questions(item)[0])
        if reply is not None:
            return reply.text
        return item.old.target_new if item.old else item.edit.target_true or ""

    @on(RowList.Moved)
    def _detail(self) -> None:
        item = self.chosen
        replies = tuple(self.said(item, question) for question in _questions(item)) if item else ()
        state = (item, replies, self.desk.planned, self.desk.staged, self._trouble)
        self.query_one(Pane).show_once(item and item.key, state, self._body)
        self.refresh_bindings()

    def _body(self) -> RenderableType:
        planned, item, wide = self.desk.planned, self.chosen, self.app.size.width >= WIDE
        parts: list[RenderableType] = []
        space = [Text()] if wide else []
        wrong = self.desk.specs.count(desk.INVALID, desk.CONFLICT)
        if wrong:
            parts.append(Text(f"{count(wrong, 'edit')} with problems cannot be planned: Specs (1) shows them", "red"))
        if planned.error is not None:
            from editctl.report import problem_lines

            parts += [problem_lines(planned.error), Text()]
        elif planned.plan is not None:
            from editctl.report import expected_line

            lines = [Text(planned.plan.summary(), "bold")]
            lines += [expected_line(planned.expected)] if planned.expected else []
            for line in lines:
                line.no_wrap, line.overflow = not wide, "ellipsis"
            parts += [*lines, *space]
        elif not self.desk.staged and self.desk.specs.stageable:
            parts += [Text("Nothing is staged: space stages an edit, a stages all.", "yellow"), *space]
        if item is not None:
            parts.append(self._item_view(item, wide))
        return Group(*parts)

    def _item_view(self, item: Item, wide: bool) -> RenderableType:
        edit = item.edit
        head = Text().append(f"{_glyph(item)} {visible(edit.id, 200)}", "bold")
        if item.reason:
            head.append(f"  {visible(item.reason, 500)}", "yellow")
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        table.add_column("prompt", overflow="fold", ratio=4)
        table.add_column("says now", overflow="fold", ratio=2)
        table.add_column("new", justify="right", no_wrap=True)
        table.add_column("old", justify="right", no_wrap=True)
        kind = ""
        for question in _questions(item):
            if question.kind != kind:
                kind = question.kind
                name = "the edit" if kind == REWRITE else NAMES[kind]
                table.add_row(Text(name, "bold"), "", "", "")
            reply = self.said(item, question)
            new, old = _targets(item, question)
            words = Text("…" if self._asking(item) else "not asked", "dim")
            if reply is not None:
                good = kind != LOCALITY and says(reply.text, question.wanted)
                words = Text(visible(reply.text, 80), "green" if good else "")
            chances = dict(zip(_wanted(item, question), reply.probabilities, strict=False)) if reply else {}
            cells = [f"{100 * chances[t]:.1f} %" if t in chances else "-" for t in (new, old)]
            table.add_row(Text("  " + visible(question.prompt, 400)), words, *cells)
        fact = [Text(_fact(item), "dim"), Text()] if wide else []
        parts: list[RenderableType] = [head, *fact, table]
        if self._trouble:
            parts += [Text(), Text("\n".join(visible(line, 1000) for line in self._trouble.splitlines()), "red")]
        elif item.key not in self.desk.staged:
            parts += [Text(), Text("not in the plan; staged, the model is asked what it says now", "dim")]
        return Group(*parts)

    def _asking(self, item: Item) -> bool:
        return item.key in self.desk.staged and not self._trouble

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        if action in ("stage", "open") and self.chosen is None:
            return "there is nothing here"
        if action == "open" and self.chosen is not None and self.chosen.state == desk.GONE:
            return "no file declares this edit any more"
        if action in ("apply", "save", "now"):
            if not self.desk.staged:
                return "nothing is staged: space stages an edit, a stages all"
            if self.desk.runner.going:
                return "a run is going on: Run (3) shows it"
        if action in ("apply", "save"):
            planned = self.desk.planned
            if not self.desk.planned_now:
                return "the plan is still being made"
            if planned.error is not None:
                return planned.error.message
            if planned.plan is None or not planned.plan.changes:
                return "the plan is still being made" if planned.plan is None else "there is nothing to do"
        if action == "apply" and self.desk.trouble:
            return self.desk.trouble
        if action == "apply" and self.desk.elsewhere:
            return f"the store is being changed by {self.desk.elsewhere}"
        return ""

    def action_stage(self) -> None:
        """Into the plan or out of it."""
        item = self.chosen
        if item is not None:
            self.desk.stage([item.key], item.key not in self.desk.staged)

    def action_stage_all(self) -> None:
        """All that the filter leaves, or none of it."""
        rows: RowList[Item] = self.query_one("#actions", RowList)
        keys = [item.key for item in rows.items]
        self.desk.stage(keys, not set(keys) <= self.desk.staged)

    def action_now(self) -> None:
        """Ask again."""
        head = self._head
        self._said = {key: reply for key, reply in self._said.items() if key[0] != head}
        self.ask_now()
        self._detail()

    async def action_open(self) -> None:
        """The edit in its file's list."""
        item = self.chosen
        await self.desk.action_go("specs")
        if item is not None and isinstance(self.app.screen, Place):
            finder: Finder[Item] = self.app.screen.query_one(Finder)
            if item.key not in {one.key for one in finder.rows.items}:
                finder.clear()
            finder.rows.move(next((i for i, one in enumerate(finder.rows.items) if one.key == item.key), 0))

    @on(RowList.Opened)
    async def _opened(self) -> None:
        await self.app.run_action("open", self)

    @work(group="ask", exclusive=True, exit_on_error=False)
    async def action_save(self) -> None:
        """Save the plan as a contract."""
        from editctl import plan as plan_room

        made = self.desk.planned.plan
        file = await self.app.push_screen_wait(Line("Save the plan as", "plan.json"))
        if file is None or made is None:
            return
        path = Path(file).expanduser()
        if path.suffix == ".toml":
            self.notify(f"{file} would be a spec file: a plan is JSON", severity="error")
            return
        if (
            path.exists()
            and await self.app.push_screen_wait(Question(f"Replace {file}?", "It is there already.")) is None
        ):
            return
        try:
            await asyncio.to_thread(plan_room.save, made, path)
        except EditctlError as error:
            self.desk.refused(error)
        else:
            self.notify(f"Saved the plan to {file}; editctl apply {file} does exactly that.", markup=False)

    @work(group="apply", exclusive=True, exit_on_error=False)
    async def action_apply(self) -> None:
        """Ask, then edit the model."""
        from editctl.report import expected_line, plan_view

        made, expected = self.desk.planned.plan, self.desk.planned.expected
        if made is None:
            return
        lines = Group(plan_view(made, made.summary()), *([expected_line(expected)] if expected else []))
        consent = await self.app.push_screen_wait(Question("Apply these changes to the model?", lines, note=True))
        if consent is None:
            return
        why = self.obstacle("apply")
        if not why and self.desk.planned.plan != made:
            why = "the plan is another one now: look at it again"
        if why:
            self.notify(why[:1].upper() + why[1:], severity="warning", markup=False)
            return
        note = ["--note", consent.note] if consent.note else []
        arguments = self.desk.space.arguments("apply", "-", "--json", *note, device=True)
        text = json.dumps(made.to_json())
        course = course_of(made.params, len(self.desk.planned.plan.actions) if self.desk.planned.plan else 0)
        head = self.desk.past.head
        if head is not None:
            course.shares = {**SHARES, **head.seconds}
        self.desk.carry_out("apply", course, arguments, "apply", text)


def course_of(params: object, edits: int) -> Course:
    """A run before its first event."""
    known = dict(params) if isinstance(params, dict) else {}
    layers = known.get("layers")
    target = known.get("target")
    return Course(
        steps=int(target.get("steps", 25)) if isinstance(target, dict) else 25,
        layers=len(layers) if isinstance(layers, list | tuple) else 1,
        edits=edits,
    )


def _glyph(item: Item) -> str:
    return desk.GLYPHS[item.state]


def _fact(item: Item) -> str:
    edit = item.edit
    target = "(dropped)" if item.state == desk.GONE else edit.target_new
    return visible(f"{edit.prompt} → {target}", 1000)


def _questions(item: Item) -> list[Asking]:
    return questions(item.edit)


def _targets(item: Item, question: Asking) -> tuple[str, str]:
    """What the edit wants here and what was wanted before; "" where that is nothing to ask for."""
    edit = item.edit
    if question.kind in (REWRITE, "paraphrase"):
        old = item.old.target_new if item.old and item.old.target_new != edit.target_new else edit.target_true
        return edit.target_new, old
    answer = question.wanted[0] if question.wanted else ""
    return (answer, "") if question.kind != LOCALITY else ("", answer)


def _wanted(item: Item, question: Asking) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target for target in _targets(item, question) if target))


def _asked(question: Asking, item: Item) -> Asked:
    return Asked(question.prompt, _wanted(item, question))
