"""Review: what a version changed, edit by edit, and the verdict on it.

Knows: verdicts that are pending, and which operation or run carries each out. Refuses: to measure; what is shown was
measured when the version was made.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from rich.console import Group, RenderableType
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.worker import WorkerError

from editctl.errors import EditctlError
from editctl.metrics import gates
from editctl.metrics.edits import NAMES
from editctl.metrics.gates import Failure
from editctl.metrics.values import GENERATED, KINDS, LOCALITY, PARAPHRASE, PORTABILITY, REWRITE, Answer, Metric
from editctl.plan import count
from editctl.spec import SLOT, visible
from editctl.tui.course import SHARES
from editctl.tui.desk import Past
from editctl.tui.dialogs import Pick, Question, Viewer
from editctl.tui.place import Pane, Place
from editctl.tui.plan import course_of
from editctl.tui.rows import WIDE, Column, Finder, RowList

if TYPE_CHECKING:
    from editctl.store import LiveEdit, Operation, Store, Version

ACCEPT, REJECT = "accept", "reject"
GLYPHS = {ACCEPT: "✓", REJECT: "✗"}
KEPT = 8
"""Pages that are kept read."""
NAMED = 3
"""Edits named in one line."""
LISTED = 20
"""Edits named in a question."""
FIRST = """Nothing to review yet.

  1   Specs: space stages an edit
  2   Plan: g applies what is staged
  4   then here: what the model said before and says now"""
SILENT = """No prompt was asked when this version was made.

  [ ]   a newer or an older version
  d     what differs from the version below it"""


@dataclass(frozen=True)
class Row:
    """One edit that was asked when a version was made."""

    edit: str
    answers: Mapping[str, tuple[Answer, ...]]
    """By kind, in the order of the prompts."""
    own: Answer
    """To the prompt of the edit itself."""
    counts: Mapping[str, tuple[str, str]]
    """By kind, how many of the prompts were answered as wanted, and the tone of that."""
    text: str
    """What a filter looks at, the verdict aside."""


@dataclass(frozen=True)
class Page:
    """A version as it is reviewed."""

    version: Version
    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    failed: tuple[Failure, ...]
    lives: Mapping[str, LiveEdit] = field(repr=False)
    """What is live in the version, by id."""
    reviews: tuple[Operation, ...]
    """Oldest first."""
    verdicts: Mapping[str, str]
    """By edit, the last verdict on record."""
    note: str
    """Why the version was made."""


def read_page(store: Store, version: Version, past: Past) -> Page:
    """Everything that a review of the version shows."""
    # A first import takes longer than a key press may; this is a worker thread.
    import editctl.report  # noqa: F401

    answers, metrics = store.answers(version), store.metrics(version)
    lives = {live.id: live for live in store.edits(version)}
    failed = gates.failures(version.gates, metrics, answers, len(lives))
    behind: dict[str, list[str]] = {}
    for one in failed:
        for edit in one.edits:
            behind.setdefault(edit, []).append(one.gate)
    grouped: dict[str, list[Answer]] = {}
    for answer in answers:
        grouped.setdefault(answer.edit, []).append(answer)
    reviews = tuple(store.reviews(version))
    # The operation that made a version is the first that knows it.
    made = next((op for op in reversed(past.operations) if version.id in (op.head, *op.candidates)), None)
    return Page(
        version=version,
        rows=tuple(_row(edit, mine, behind.get(edit, ())) for edit, mine in grouped.items()),
        metrics=metrics,
        failed=failed,
        lives=lives,
        reviews=reviews,
        verdicts={edit: review.verb for review in reviews for edit in review.edits},
        note=made.note if made else "",
    )


def _row(edit: str, mine: list[Answer], behind: list[str] | tuple[()]) -> Row:
    by_kind = {kind: tuple(answer for answer in mine if answer.kind == kind) for kind in KINDS}
    own = (by_kind[REWRITE] or tuple(mine))[0]
    counts = {}
    for kind, asked in by_kind.items():
        good = sum(answer.ok for answer in asked)
        tone = "dim" if not asked else "plain" if good == len(asked) else "warn"
        counts[kind] = (f"{good}/{len(asked)}" if asked else "-", tone)
    states = ["ok" if own.ok else "failed", *(f"gate:{gate}" for gate in behind)]
    states += ["moved"] if any(not answer.ok for answer in by_kind[LOCALITY]) else []
    words = (*states, edit, own.prompt, own.before, own.after, *own.wanted)
    return Row(edit, by_kind, own, counts, " ".join(words).casefold())


class ReviewPlace(Place):
    """Before and after of every edit of a version."""

    NAME = "review"
    CHANGES = frozenset({"carry_out", "accept_version", "reject_version", "replay"})
    ABOUT = (
        "What a version changed: for every edit what the model said before and says now. a and r mark edits (✓ good, "
        "✗ to be taken out), g carries the marks out; what is taken out is solved away, the rest is measured again. "
        "A candidate missed a gate and waits: A makes it the head, R closes it. The filter knows the words failed, ok, "
        "moved, accepted, rejected and gate:NAME."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "accept", "accept", id="review.accept", tooltip="Mark the edit as good, or take the mark away"),
        Binding("r", "reject", "reject", id="review.reject", tooltip="Mark the edit to be taken out, or unmark it"),
        Binding("g", "carry_out", "go", id="review.go", tooltip="Carry the marks out"),
        Binding("A", "accept_version", "version ✓", id="review.accept-version", tooltip="Make the candidate the head"),
        Binding("R", "reject_version", "version ✗", id="review.reject-version", tooltip="Close the candidate"),
        Binding("enter", "full", "full", id="review.full", tooltip="Read the edit and the version in full"),
        Binding("d", "diff", "diff", id="review.diff", tooltip="What differs from the version below it"),
        Binding("o", "pick", "open", id="review.open", tooltip="Choose the version to review"),
        Binding("left_square_bracket", "step(-1)", "newer", id="review.newer", tooltip="Review the next newer version"),
        Binding("right_square_bracket", "step(1)", "older", id="review.older", tooltip="Review the next older version"),
        Binding(
            "c",
            "replay",
            "replay",
            id="review.replay",
            tooltip="Take the edits marked ✗ out of the head and do anew all that came after them",
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[tuple[str, object], Page] = {}
        """By version and state of the store, the oldest first."""
        self._page: Page | None = None
        """What is shown."""
        self._reading: tuple[str, object] | None = None
        self._trouble = ""
        self._marks: dict[str, dict[str, str]] = {}
        """Pending verdicts by version and edit."""

    def body(self) -> ComposeResult:
        """The edits and the chosen one."""
        columns: list[Column[Row]] = [
            Column("", self._mark, width=1),
            Column("edit", lambda row: (self._fact(row), "plain"), share=5),
            Column("before", lambda row: (row.own.before, "dim"), share=3),
            Column("  after", lambda row: (_after(row.own), "good" if row.own.ok else "bad"), share=3),
            Column("para", lambda row: row.counts[PARAPHRASE], width=5),
            Column("keep", lambda row: row.counts[LOCALITY], width=5),
            Column("port", lambda row: row.counts[PORTABILITY], width=5),
        ]
        rows = RowList(columns, "reading …", lambda row: row.edit, id="edits")
        yield Finder(rows, lambda row: f"{row.text} {self._verdict(row)}", classes="list")
        yield Pane(classes="detail")

    # What is shown

    @property
    def chosen(self) -> Row | None:
        """The edit under the cursor."""
        rows: RowList[Row] = self.query_one("#edits", RowList)
        return rows.chosen

    @property
    def version(self) -> Version | None:
        """The version that is reviewed: the one asked for, else the newest candidate, else the head."""
        past = self.desk.past
        names = [self.desk.reviewed, *past.candidates[-1:]]
        return next(filter(None, (past.version(name) for name in names if name)), past.head)

    @property
    def marks(self) -> dict[str, str]:
        """Pending verdicts on edits of the version, by id."""
        version = self.version
        return self._marks.setdefault(version.id, {}) if version else {}

    def marked(self, verdict: str) -> list[str]:
        """Edits of the version with this pending verdict, in the order they were marked."""
        return [edit for edit, mark in self.marks.items() if mark == verdict]

    def _verdict(self, row: Row) -> str:
        verdict = self.marks.get(row.edit) or (self._page.verdicts.get(row.edit) if self._page else None)
        return f"{verdict}ed" if verdict else ""

    def _fact(self, row: Row) -> str:
        """The subject, which a prompt may name last, then what is said of it."""
        live = self._page.lives.get(row.edit) if self._page else None
        if live is not None:
            with suppress(EditctlError):
                return f"{live.edit.subject}: {live.edit.relation.replace(SLOT, '…')}"
        return row.own.prompt

    def _mark(self, row: Row) -> tuple[str, str]:
        if mark := self.marks.get(row.edit):
            return GLYPHS[mark], "good" if mark == ACCEPT else "bad"
        recorded = self._page.verdicts.get(row.edit, "") if self._page else ""
        return GLYPHS.get(recorded, " "), "dim"

    def renew(self) -> None:
        """The version as it stands now."""
        finder: Finder[Row] = self.query_one(Finder)
        version = self.version
        page = None if version is None else self._pages.get((version.id, self.desk.past.stamp))
        if version is not None and page is None:
            self._read(version)
            # Of the same version, what was shown is still right but for its reviews.
            page = self._page if self._page and self._page.version.id == version.id else None
        if page is not self._page or not finder.items:
            self._page = page
            if page is not None:
                self._forget_what_is_gone(page)
            finder.empty = "reading …" if version or not self.desk.past.read else FIRST
            finder.empty = SILENT if page else self._trouble or finder.empty
            finder.show(page.rows if page else ())
        finder.rows.refresh()
        self._detail()

    def _forget_what_is_gone(self, page: Page) -> None:
        asked = {row.edit for row in page.rows}
        marks = self._marks.get(page.version.id, {})
        self._marks[page.version.id] = {edit: mark for edit, mark in marks.items() if edit in asked}

    def _read(self, version: Version) -> None:
        key = (version.id, self.desk.past.stamp)
        if key != self._reading:
            self._reading = key
            self._read_page(key, version, self.desk.past)

    @work(exclusive=True, group="page", exit_on_error=False)
    async def _read_page(self, key: tuple[str, object], version: Version, past: Past) -> None:
        self._trouble = ""
        try:
            self._pages[key] = await asyncio.to_thread(read_page, self.desk.store, version, past)
        except EditctlError as error:
            self._trouble = f"{error.message}\n{error.hint}"
        while len(self._pages) > KEPT:
            del self._pages[next(iter(self._pages))]
        if key in self._pages and self._reading == key:
            self._reading = None
        self.update()

    @on(RowList.Moved)
    def _detail(self) -> None:
        page, row, parts = self._page, self.chosen, []
        if page is not None:
            wide = self.app.size.width >= WIDE
            parts.append(self._summary(page) if wide else self._short_summary(page))
            if marks := self.marks:
                done = [f"{len(self.marked(verdict))} to {verdict}" for verdict in GLYPHS if self.marked(verdict)]
                parts.append(Text(f"{', '.join(done)}: g carries {'it' if len(marks) == 1 else 'them'} out", "yellow"))
            if row is not None:
                parts += [Text()] if wide else []
                parts.append(self._edit_view(page, row))
        self.query_one(Pane).show(Group(*parts))
        self.refresh_bindings()

    def _state(self, version: Version) -> str:
        past = self.desk.past
        if version.id in past.candidates:
            return "a candidate: it waits for review"
        return "the head" if past.head and past.head.id == version.id else "neither the head nor a candidate"

    def _summary(self, page: Page) -> RenderableType:
        """The version in a few lines."""
        from editctl.figures import MetricsView
        from editctl.report import review_line, short

        version = page.version
        head = Text(visible(version.id), "bold").append(f"  {self._state(version)}", "not bold")
        asked = "" if len(page.rows) == len(page.lives) else f" ({len(page.rows)} asked)"
        made = f"on {short(version.parent)} by {version.method}, {count(len(page.lives), 'edit')}{asked}"
        parts: list[RenderableType] = [head, Text(visible(f"{made}, {version.created_at} {version.who}", 500), "dim")]
        parts += [Text(f"“{visible(page.note, 1000)}”", "italic")] if page.note else []
        for one in page.failed:
            line = Text(f"✗ {visible(str(one), 200)}", "red")
            parts.append(line.append(f" ({_names(one.edits)})" if one.edits else "", "dim"))
        if page.version.gates and not page.failed:
            passed = ", ".join(f"{name} {wanted:g}" for name, wanted in version.gates.items())
            parts.append(Text(visible(f"✓ gates passed: {passed}", 500), "green"))
        for review in page.reviews:
            line = Text(f"{review.verb}ed ", "cyan")
            if review.edits:
                line.append(_names(review.edits) + ": ")
                line.append(visible(f"{review.note or 'no note'} ({review.who}, {review.at})", 1000))
            else:
                line.append_text(review_line(review))
            parts.append(line)
        return Group(*parts, Text(), MetricsView(page.metrics)) if page.metrics else Group(*parts)

    def _short_summary(self, page: Page) -> RenderableType:
        """The version in three lines, for few rows; `enter` has the rest."""
        version, state = page.version, self._state(page.version).partition(":")[0]
        line = Text(f"{visible(version.id)} {state}", "bold").append(
            f" by {visible(version.method, 60)}", "not bold dim"
        )
        if page.failed:
            line.append("  ✗ " + "; ".join(visible(str(one), 200) for one in page.failed), "not bold red")
        elif version.gates:
            line.append("  ✓ gates passed", "not bold green")
        shares = [(m.name, f"{100 * m.value:.1f}") for m in page.metrics if m.protocol == GENERATED]
        values = [f"{visible(name)} {share.removesuffix('.0')} %" for name, share in shares]
        lines = [line, Text("  ".join(values), "dim")]
        for one in lines:
            one.no_wrap, one.overflow = True, "ellipsis"
        return Group(*lines)

    def _edit_view(self, page: Page, row: Row) -> RenderableType:
        """An edit with all that was asked about it."""
        from editctl.report import review_line

        text = Text().append(visible(row.edit, 200), "bold")
        if mark := self.marks.get(row.edit):
            text.append(f"  {GLYPHS[mark]} to {mark}", "green" if mark == ACCEPT else "red")
        text.append("\n")
        for review in page.reviews:
            if row.edit in review.edits:
                text.append(f"{review.verb}ed: ", "cyan")
                text.append_text(review_line(replace(review, edits=()))).append("\n")
        if live := page.lives.get(row.edit):
            try:
                about = {"source": live.edit.source, "note": live.edit.note}
            except EditctlError as error:
                about = {"unreadable": error.message}
            for name, value in about.items():
                if value:
                    text.append(f"{name}: ", "dim").append(visible(value, 10_000) + "\n")
        for kind in KINDS:
            asked = row.answers[kind]
            if asked:
                good = sum(answer.ok for answer in asked)
                name = "the edit" if kind == REWRITE else NAMES[kind]
                text.append(f"{name}" + ("" if kind == REWRITE else f" {good}/{len(asked)}") + "\n", "bold")
            for answer in asked:
                _tell(text, answer)
        text.right_crop(1)
        return text

    # What can be done

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        version = self.version
        if action in ("pick", "step", "diff") or version is None:
            return "" if version else "there is no version yet: g in Plan (2) makes one"
        if action in ("accept", "reject", "full") and self.chosen is None:
            return "there is no edit here"
        if action == "reject":
            return self._why_not_out(version)
        if action in self.CHANGES:
            if self.desk.runner.going:
                return "a run is going on: Run (3) shows it"
            if self.desk.elsewhere:
                return f"the store is being changed by {self.desk.elsewhere}"
        if action == "carry_out":
            if not self.marked(ACCEPT) and not self.marked(REJECT):
                return "nothing is marked: a marks an edit as good, r to be taken out"
            return self._why_not_out(version) if self.marked(REJECT) else ""
        if action == "replay":
            return self._why_not_replay(version)
        if action in ("accept_version", "reject_version"):
            if version.id not in self.desk.past.candidates:
                if self._state(version) == "the head":
                    return "this is the head: there is nothing to decide; u takes it back, r marks an edit"
                return "this version does not wait for review; History (5) restores it"
            return self._why_stale(version) if action == "accept_version" else ""
        return ""

    def _why_not_out(self, version: Version) -> str:
        """Why edits cannot be taken out of the version."""
        if version.id in self.desk.past.candidates:
            return self._why_stale(version)
        if self._state(version) != "the head":
            return "edits are taken out of the head or a candidate: restore in History (5) goes to this version first"
        return ""

    def _why_not_replay(self, version: Version) -> str:
        if self._state(version) != "the head":
            return "only what was done on the head can be done anew"
        return "" if self.marked(REJECT) else "no edit is marked to be taken out: r marks one"

    def _why_stale(self, version: Version) -> str:
        """Why nothing can be made of a candidate any more."""
        head = self.desk.past.head.id if self.desk.past.head else ""
        if version.parent == head:
            return ""
        made, now = version.parent or "base", head or "base"
        return f"it was made on {made}, the head is now {now}: apply the specs again, or restore {made} first"

    def action_accept(self) -> None:
        """Good, or undecided again; and on to the next."""
        self._put(ACCEPT)

    def action_reject(self) -> None:
        """To be taken out, or undecided again; and on to the next."""
        self._put(REJECT)

    def _put(self, verdict: str) -> None:
        row, marks = self.chosen, self.marks
        if row is None:
            return
        if marks.get(row.edit) == verdict:
            del marks[row.edit]
        else:
            marks[row.edit] = verdict
        rows: RowList[Row] = self.query_one("#edits", RowList)
        at = rows.cursor
        rows.action_down()
        if rows.cursor == at:
            self._detail()

    async def action_step(self, way: int) -> None:
        """Another version: `way` is 1 for the next older, -1 for the next newer."""
        names, version = [version.id for version in self.desk.past.versions], self.version
        at = (names.index(version.id) if version and version.id in names else 0) + way
        if 0 <= at < len(names):
            self._go(names[at])
        else:
            self.notify(f"This is the {'oldest' if way > 0 else 'newest'} version", markup=False)

    def _go(self, version: str) -> None:
        self.desk.reviewed = version
        self.query_one("#edits", RowList).action_first()
        self.update()

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_pick(self) -> None:
        """Choose the version."""
        choices = []
        for version in self.desk.past.versions:
            state = self._state(version).partition(":")[0].removeprefix("neither the head nor a candidate")
            made = version.created_at[:16].replace("T", " ")
            parts = (state, made, f"by {version.method}", f"on {version.parent or 'base'}")
            choices.append((version.id, ", ".join(filter(None, parts))))
        name = await self.app.push_screen_wait(Pick("Review which version?", choices))
        if name is not None:
            self._go(name)

    @on(RowList.Opened)
    async def _opened(self) -> None:
        await self.app.run_action("full", self)

    def action_full(self) -> None:
        """The edit and the version, with more room."""
        page, row = self._page, self.chosen
        if page is not None and row is not None:
            body = Group(self._edit_view(page, row), Text(), self._summary(page))
            self.app.push_screen(Viewer(self._fact(row), body))

    @work(group="diff", exclusive=True, exit_on_error=False)
    async def action_diff(self) -> None:
        """What differs from the version below."""
        version = self.version
        if version is None:
            return
        try:
            body = await asyncio.to_thread(_diff, self.desk.store, version)
        except EditctlError as error:
            self.desk.refused(error)
        else:
            self.desk.read(f"What {version.id} changed", body)

    @work(group="review", exclusive=True, exit_on_error=False)
    async def action_carry_out(self) -> None:
        """Ask, then record what is good, then take out what is not."""
        version, good, bad = self.version, self.marked(ACCEPT), self.marked(REJECT)
        if version is None:
            return
        lines = Text()
        if good:
            lines.append(f"Record as good: {_names(good, LISTED)}\n")
        if bad:
            lines.append(f"Take out, and solve and measure the rest again: {_names(bad, LISTED)}\n", "red")
            lines.append("That is a run; u takes it back.\n", "dim")
        lines.right_crop(1)
        note = await self._asked("carry_out", f"Carry out the verdicts on version {version.id}?", lines)
        if note is None:
            return
        if good:
            recorded: list[Operation] = []

            def accept(store: Store) -> Operation:
                shown = " ".join(["editctl tui: accept", version.id, *(f"--edit {edit}" for edit in good)])
                recorded.append(store.accept(version.id, edits=good, note=note, command=shown))
                return recorded[-1]

            await self.desk.change(ACCEPT, accept).wait()
            if not recorded:
                return
            self._unmark(version, good)
        if bad:
            named = [part for edit in bad for part in ("--edit", edit)]
            await self._run(version, bad, note, REJECT, version.id, *named)

    @work(group="review", exclusive=True, exit_on_error=False)
    async def action_replay(self) -> None:
        """Ask, then take the edits out and do anew what came after them."""
        version, bad = self.version, self.marked(REJECT)
        if version is None:
            return
        lines = Text(f"Take out: {_names(bad, LISTED)}\n", "red")
        lines.append(
            "All that came after them is sought anew, as if they had never been. That is a run; u takes it back."
        )
        note = await self._asked("replay", f"Do version {version.id} anew without these edits?", lines)
        if note is not None:
            await self._run(version, bad, note, "replay", *bad)

    @work(group="review", exclusive=True, exit_on_error=False)
    async def action_accept_version(self) -> None:
        """Ask, then make the candidate the head."""
        version, page = self.version, self._page
        if version is None or page is None:
            return
        lines = Text("".join(f"✗ {visible(str(one), 200)}\n" for one in page.failed), "red")
        if bad := self.marked(REJECT):
            lines.append(f"{count(len(bad), 'edit')} marked to be taken out would stay; g takes them out.\n", "yellow")
        lines.right_crop(1)
        note = await self._asked("accept_version", f"Make version {version.id} the head?", lines)
        if note is not None:
            shown = f"editctl tui: accept {version.id}"
            self.desk.change(ACCEPT, lambda store: store.accept(version.id, note=note, command=shown))

    @work(group="review", exclusive=True, exit_on_error=False)
    async def action_reject_version(self) -> None:
        """Ask, then close the candidate."""
        version = self.version
        if version is None:
            return
        body = "It stays in the store; the head stays where it is."
        note = await self._asked("reject_version", f"Reject version {version.id}?", body)
        if note is not None:
            shown = f"editctl tui: reject {version.id}"
            self.desk.change(REJECT, lambda store: store.reject(version.id, note=note, command=shown))

    async def _asked(self, action: str, title: str, body: object) -> str | None:
        """The note of a yes; None for a no, or when the action became impossible in the meantime."""
        consent = await self.app.push_screen_wait(Question(title, body, note=True))
        if consent is None:
            return None
        if why := self.obstacle(action):
            self.notify(why[:1].upper() + why[1:], severity="warning", markup=False)
            return None
        return consent.note

    async def _run(self, version: Version, edits: list[str], note: str, verb: str, *more: str) -> None:
        """Have a child take edits out of the version; what it took out is no longer marked."""
        noted = ["--note", note] if note else []
        # What the version was held to, what comes of its review is held to as well.
        held = [part for gate, wanted in version.gates.items() for part in ("--gate", f"{gate}={wanted}")]
        arguments = self.desk.space.arguments(verb, *more, "--yes", "--json", *noted, *held, model=True)
        course = course_of(version.params, 0)
        course.shares = {**SHARES, **version.seconds}
        with suppress(WorkerError):
            await self.desk.carry_out(verb, course, arguments, verb).wait()
        if course.made is not None:
            self._unmark(version, edits)

    def _unmark(self, version: Version, edits: list[str]) -> None:
        marks = self._marks.get(version.id, {})
        for edit in edits:
            marks.pop(edit, None)
        self.update()


def _after(answer: Answer) -> str:
    return f"{GLYPHS[ACCEPT] if answer.ok else GLYPHS[REJECT]} {answer.after}"


def _names(edits: list[str] | tuple[str, ...], most: int = NAMED) -> str:
    """Edits by id, the first of very many."""
    shown = ", ".join(visible(edit, 100) for edit in edits[:most])
    return shown + (f" and {len(edits) - most} more" if len(edits) > most else "")


def _tell(text: Text, answer: Answer) -> None:
    """One prompt: what was said, what was wanted, how probable that was."""
    tone = "green" if answer.ok else "red"
    text.append("✓ " if answer.ok else "✗ ", tone).append(visible(answer.prompt, 2000) + "\n")
    text.append("    ").append(visible(answer.before, 200) or "(nothing)", "dim").append(" → ")
    text.append(visible(answer.after, 200) or "(nothing)", tone)
    if answer.kind == LOCALITY and not answer.ok:
        text.append("  moved", "bold red")
    text.append("\n")
    chances = [f"{100 * math.exp(-nll):.1f} %" for nll in (answer.nll_before, answer.nll_after) if nll is not None]
    wanted = " | ".join(visible(one, 200) for one in answer.wanted)
    parts = [f"wanted {wanted}" if answer.kind != LOCALITY else f"known as {wanted}"] if wanted else []
    parts += [f"{' → '.join(chances)} a token"] if len(chances) == 2 else []
    if parts:
        text.append(f"    {', '.join(parts)}\n", "dim")


def _diff(store: Store, version: Version) -> RenderableType:
    from editctl.report import diff_view, short

    old = store.resolve(version.parent) if version.parent else None
    found = store.compare(old, version)
    names = (short(version.parent), short(version.id))
    return diff_view(names, found.facts, found.moved, found.metrics, found.norms)
