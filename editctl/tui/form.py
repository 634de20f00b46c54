"""The form of one edit: its fields as text, what is wrong with them as one types, saving.

Knows: how lists and probes are written one a line, and which field a problem is about. Refuses: to change what it
cannot show as it is, to write over what changed in the file meanwhile unasked, and what a valid edit is; `spec` says
that.
"""

from __future__ import annotations

import asyncio
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Input, Static, TextArea

from editctl import amend
from editctl.errors import InvalidInput, Problem
from editctl.plan import count
from editctl.spec import MAX_ITEMS, SLOT, Edit, Probe, Report, Shelf, fill, slug, visible
from editctl.tui.dialogs import Question
from editctl.tui.place import KeyBar, Pane, Tells

if TYPE_CHECKING:
    from editctl.tui.app import EditctlApp

PAUSE = 0.15
"""Seconds after the last key before what is written is checked."""
BEGIN = """subject, relation and target_new make an edit; all else measures or explains it.
The relation is a prompt with {} where the subject stands, and the model shall continue it with target_new."""


def probes_of(text: str) -> tuple[Probe, ...]:
    """The probes of a text, one a line: `[kind] prompt => answer | other answer`; kind and answers may be absent."""
    probes = []
    for line in lines_in(text):
        match = re.fullmatch(r"\[([^\[\]]*)\]\s*(.*)", line)
        kind, rest = (match[1].strip(), match[2]) if match else ("", line)
        prompt, *answers = re.split(r"(?:^| +)=>(?: +|$)", rest, maxsplit=1)
        answer = re.split(r"(?:^| +)\|(?: +|$)", answers[0]) if answers else []
        probes.append(Probe(prompt=prompt, answer=tuple(map(str.strip, answer)), kind=kind))
    return tuple(probes)


def lines_of(probes: Iterable[Probe]) -> str:
    """The probes as `probes_of` reads them, where it can: no prompt may hold ` => ` or begin with a bracket."""
    return "\n".join(map(_line_of, probes))


def _line_of(probe: Probe) -> str:
    kind = f"[{probe.kind}] " if probe.kind else ""
    return kind + probe.prompt + (f" => {' | '.join(probe.answer)}" if probe.answer else "")


def lines_in(text: str) -> tuple[str, ...]:
    """The lines that are not blank, without the spaces around them."""
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _prose(text: str) -> str:
    """A text whose spaces and lines stay as they are; blanks alone are none."""
    return text if text.strip() else ""


def showable(text: str, also: str = "") -> bool:
    """Whether an input shows the text as it is: nothing in it is hidden or acts on a terminal.

    Args:
        also: characters that are fine all the same.
    """
    # Joiners spell words, and wide or narrow spaces are seen as such.
    return all(c.isprintable() or c in "\u200c\u200d" or c in also or unicodedata.category(c) == "Zs" for c in text)


@dataclass(frozen=True)
class Field:
    """How a field of an edit is written in the form."""

    hint: str
    """Stands there while it is empty."""
    show: Callable[[Any], str] = str
    read: Callable[[str], Any] = str.strip
    area: bool = False
    """Whether it has several lines."""

    def editable(self, value: Any) -> bool:
        """Whether the value can be changed in the form without losing any of it."""
        text = self.show(value)
        if not showable(text, "\n\t" if self.area else ""):
            return False
        # A list as long as is read at most may go on in the file.
        return isinstance(value, str) or (self.read(text) == value and len(value) < MAX_ITEMS)


FIELDS = {
    "id": Field("made from subject and relation"),
    "subject": Field("what the fact is about, as in running text: The Eiffel Tower"),
    "relation": Field("the prompt, with {} where the subject stands: {} stands in"),
    "target_new": Field("how the model shall continue it: Rome"),
    "target_true": Field("how it continued it before, if that is known: Paris"),
    "paraphrases": Field("other prompts with {}, one a line", "\n".join, lines_in, area=True),
    "locality": Field("what must stay, one a line: The Louvre stands in => Paris", lines_of, probes_of, area=True),
    "portability": Field(
        "what follows, one a line: [reasoning] The country where {} stands is => Italy", lines_of, probes_of, area=True
    ),
    "tags": Field(
        "words to select edits by: towers, europe", ", ".join, lambda text: lines_in(text.replace(",", "\n"))
    ),
    "generation": Field("openings for free text, one a line: The best of {} is", "\n".join, lines_in, True),
    "references": Field("texts that free text should be like, one a line", "\n".join, lines_in, area=True),
    "essence": Field("a text about the subject, whose perplexity is measured", read=_prose, area=True),
    "source": Field("why this is so", read=_prose, area=True),
    "note": Field("what a reviewer should know", read=_prose, area=True),
}
_NOUNS = {"paraphrase": "paraphrases", "locality probe": "locality", "portability probe": "portability", "tag": "tags"}
_NOUNS |= {"generation prompt": "generation", "reference": "references"}
_ABOUT = re.compile(rf"(?:\w+(?: \d+)? of )?\b({'|'.join([*_NOUNS, *FIELDS])})\b(?: (\d+))?")
_TOGETHER = {"contradicts": "target_new", "duplicate of": "relation", "shares the subject": "subject"}


def field_of(message: str) -> tuple[str, int]:
    """The field that a problem's message is about, and which item of it, from 1; "" and 0 for what is not said."""
    for begin, name in _TOGETHER.items():
        if message.startswith(begin):
            return name, 0
    match = _ABOUT.match(message)
    return (_NOUNS.get(match[1], match[1]), int(match[2] or 0)) if match else ("", 0)


def is_read(path: Path, paths: Sequence[Path]) -> bool:
    """Whether a file is among those that are read, or would be if it were there."""
    real = os.path.realpath(path)
    inside = path.suffix == ".toml" and os.path.realpath(path.parent) in map(os.path.realpath, paths)
    return inside or real in [os.path.realpath(one) for one in paths if not one.is_dir()]


@dataclass(frozen=True)
class Judged:
    """What would come of saving."""

    edit: Edit
    """As it would be saved."""
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    refused: bool = False
    """Whether it cannot be saved; problems with other edits alone do not keep it from that."""
    clash: tuple[str, ...] = ()
    """Fields that were changed in the form and in the file."""


class Judge:
    """Tells what would come of saving, from any thread; files that did not change are not read again."""

    def __init__(self, paths: Sequence[Path], edit: Edit, replacing: str) -> None:
        """
        Args:
            paths: spec files and folders.
            edit: as the form shows it at first.
            replacing: id of the edit it takes the place of, "" for none.
        """
        self._paths, self._edit, self._replacing = paths, edit, replacing
        self._all, self._alone, self._one = Shelf(), Shelf(), Lock()

    def judge(self, file: str, fields: Mapping[str, Any]) -> Judged:
        """What would come of saving to a file.

        Args:
            fields: of the edit, those that were changed in the form.
        """
        with self._one:
            path = Path(file)
            edit, clash = self._latest(path, fields)
            if not is_read(path, self._paths):
                places = ", ".join(map(str, self._paths))
                problem = Problem(
                    file or "file", 1, "file is none of those that are read", f"name a *.toml of {places}"
                )
                return Judged(edit, (problem,), refused=True)
            try:
                text = amend.text_with(path, edit, self._replacing)
            except InvalidInput as error:
                told = Problem(str(path), edit.line or 1, error.message, error.hint)
                return Judged(edit, (*error.problems, told), refused=True, clash=clash)
            # First, so that what two edits dispute is told with this one's place.
            report = self._all.check([path, *self._paths], texts={str(path): text})
            own = self._own(report, path, edit)
            if own is None:
                return Judged(edit, report.problems, refused=True, clash=clash)
            problems, warnings = (self._about(own, report, some) for some in (report.problems, report.warnings))
            return Judged(edit, problems, warnings, own not in report.edits, clash)

    def _latest(self, path: Path, fields: Mapping[str, Any]) -> tuple[Edit, tuple[str, ...]]:
        """The edit as the file has it now with what was changed in the form, and what was changed in both."""
        latest, method = self._edit, self._edit.method
        if self._replacing or path.is_file():
            report = self._alone.check([path])
            edits = [*report.edits, *report.faulty]
            same = [edit for edit in edits if edit.id == self._replacing]
            latest = same[0] if self._replacing and len(same) == 1 else latest
            method = edits[0].method if edits else method
        clash = tuple(
            name
            for name, value in fields.items()
            if getattr(latest, name) not in (getattr(self._edit, name), value) and name != "id"
        )
        return latest.model_copy(update={**fields, "method": method}), clash

    def _own(self, report: Report, path: Path, edit: Edit) -> Edit | None:
        """The edit among all that were read; a new one is the last of its file."""
        found = [one for one in (*report.edits, *report.faulty) if one.file == str(path)]
        if self._replacing:
            name = edit.id or slug(edit.subject, edit.relation)
            found = [one for one in found if one.id == name] or found
            return min(found, key=lambda one: abs(one.line - edit.line), default=None)
        return max(found, key=lambda one: one.line, default=None)

    def _about(self, own: Edit, report: Report, some: Iterable[Problem]) -> tuple[Problem, ...]:
        """Those that stand in the edit's lines, or name its place."""
        lines = [one.line for one in (*report.edits, *report.faulty) if one.file == own.file and one.line > own.line]
        end = min(lines, default=10**9)
        place = re.compile(re.escape(f" at {visible(own.file, 500)}:{own.line}") + r"(?!\d)")
        return tuple(
            one for one in some if (one.file == own.file and own.line <= one.line < end) or place.search(one.message)
        )


class _Area(TextArea):
    """A field of several lines."""

    def _on_paste(self, event: events.Paste) -> None:  # type: ignore[override]
        event.text = "".join(c for c in event.text.replace("\r\n", "\n").replace("\r", "\n") if showable(c, "\n\t"))


class _Line(Input):
    """A field of one line; up and down would scroll what is around it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "app.focus_next", "next field", show=False, id="form.down"),
        Binding("up", "app.focus_previous", "field before", show=False, id="form.up"),
    ]

    def _on_paste(self, event: events.Paste) -> None:
        event.text = "".join(c for c in event.text if showable(c, "\n"))


class EditForm(Tells, ModalScreen[bool]):
    """An edit to be changed or made; answers whether something was saved."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "save", id="form.save", tooltip="Save the edit to its file"),
        Binding("escape", "leave", "leave", id="form.leave", tooltip="Leave the form; unsaved changes are asked about"),
        Binding("tab", "app.focus_next", "next field", id="form.next", tooltip="To the next field"),
        Binding("shift+tab", "app.focus_previous", "field before", show=False, id="form.previous"),
    ]

    def __init__(self, edit: Edit, replacing: str = "") -> None:
        """
        Args:
            edit: as it is shown at first; a new one names the file it would go to.
            replacing: the edit's id in its file, "" for a new one.
        """
        super().__init__()
        self._edit, self._replacing = edit, replacing
        made = edit.id == slug(edit.subject, edit.relation)
        values = {name: getattr(edit, name) for name in FIELDS} | ({"id": ""} if made else {})
        self._texts = {name: field.show(values[name]) for name, field in FIELDS.items()}
        self._fixed = {name for name, field in FIELDS.items() if not field.editable(values[name])}
        if not replacing:
            self._texts = {"file": edit.file} | self._texts
        self._judge: Judge | None = None
        self._asked = 0
        self._timer: Timer | None = None
        self._saving = False

    @property
    def desk(self) -> EditctlApp:
        """The app, by its own type."""
        return self.app  # type: ignore[return-value]

    def compose(self) -> ComposeResult:
        """The fields between what the edit says and what is wrong with it."""
        edit = self._edit
        title = Text(f"Change {visible(self._replacing, 80)}" if self._replacing else "New edit", no_wrap=True)
        if self._replacing:
            title.append(f"  {visible(edit.file, 200)}:{edit.line}", "dim")
        with Vertical(classes="form"):
            yield Static(title, classes="title")
            yield Static(id="preview", markup=False)
            fields = VerticalScroll(id="fields")
            fields.can_focus = False
            with fields:
                for name, text in self._texts.items():
                    with Horizontal(classes="row", id=f"row-{name}"):
                        yield Static(name, classes="label", markup=False)
                        yield self._widget(name, text)
            yield Pane(id="told")
            yield KeyBar()

    def _widget(self, name: str, text: str) -> Input | TextArea:
        field = FIELDS.get(name, Field("a spec file, or a new one"))
        if name in self._fixed:
            shown = "\n".join(visible(line, 10_000) for line in text.split("\n"))
            return _Area(shown, id=name, read_only=True, compact=True, highlight_cursor_line=False)
        if field.area:
            return _Area(text, id=name, compact=True, highlight_cursor_line=False, placeholder=field.hint)
        return _Line(text, field.hint, id=name, compact=True, select_on_focus=False)

    def on_mount(self) -> None:
        """The subject has the focus."""
        if self._edit.line and not self._replacing:
            words = "The edit has no id that can be read, so no form can tell it from others: e opens it in your editor"
            self.notify(words, severity="warning", markup=False)
            self.dismiss(False)
            return
        self._judge = Judge(self.desk.spec_paths, self._edit, self._replacing)
        self.query_one("#target_new" if self._replacing else "#subject").focus()
        self._label_rows({}, set())
        self._preview()
        if self._replacing:
            self.check()
        else:
            self.query_one(Pane).show(Text(BEGIN, "dim"))

    # What is written

    def _text(self, name: str) -> str:
        widget = self.query_one(f"#{name}")
        return widget.value if isinstance(widget, Input) else widget.text if isinstance(widget, TextArea) else ""

    @property
    def _written(self) -> dict[str, str]:
        """The texts that are not as they were."""
        found = {name: self._text(name) for name in self._texts if name not in self._fixed}
        return {name: text for name, text in found.items() if text != self._texts[name]}

    @property
    def _fields(self) -> dict[str, Any]:
        """The fields of the edit that were changed."""
        fields = {name: FIELDS[name].read(text) for name, text in self._written.items() if name != "file"}
        if "id" not in self._fixed and not self._text("id").strip() and {"subject", "relation"} & set(fields):
            fields["id"] = ""
        return fields

    @property
    def _file(self) -> str:
        return self._edit.file if self._replacing else self._text("file").strip()

    @on(Input.Changed)
    @on(TextArea.Changed)
    def _typed(self) -> None:
        self._preview()
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(PAUSE, self._look)

    def _look(self) -> None:
        if self._written:
            self.check()

    @on(Input.Submitted)
    def _next(self) -> None:
        self.focus_next()

    @on(TextArea.SelectionChanged)
    def _moved(self) -> None:
        self._preview()

    def on_descendant_focus(self) -> None:
        """The line under the cursor is shown with its subject."""
        self._preview()

    def _preview(self) -> None:
        """What is asked and what is to be said, of the edit or of the line under the cursor."""
        subject, focused = self._text("subject").strip(), self.focused
        template, said, kind = self._text("relation").strip(), self._text("target_new").strip(), ""
        if isinstance(focused, TextArea) and focused.id in ("paraphrases", "locality", "portability", "generation"):
            line = focused.document[focused.cursor_location[0]]
            if focused.id in ("paraphrases", "generation") and line.strip():
                template = line.strip()
                said = "" if focused.id == "generation" else said
            elif probes := probes_of(line):
                template, said, kind = probes[0].prompt, " | ".join(probes[0].answer), probes[0].kind
        text = Text()
        before, slot, after = template.partition(SLOT)
        text.append(visible(before, 500)).append(visible(subject or SLOT, 200) if slot else "", "bold")
        text.append(visible(fill(after, subject or SLOT), 500))
        if template:
            text.append(" → ", "dim").append(visible(said, 200) if said else "…", "bold green" if said else "dim")
            text.append(f"  ({visible(kind, 100)})" if kind else "", "dim")
        self.query_one("#preview", Static).update(text)

    # What is wrong

    @work(group="check", exit_on_error=False)
    async def check(self) -> None:
        """Say what would come of saving; only what was asked last is shown."""
        self._asked += 1
        asked, judge = self._asked, self._judge
        if judge is not None:
            found = await asyncio.to_thread(judge.judge, self._file, self._fields)
            if asked == self._asked and self.is_attached:
                self._show(found)

    def _show(self, found: Judged) -> None:
        text = Text()
        clashes = [
            Problem(found.edit.file, found.edit.line, f"{name} was changed in the file meanwhile")
            for name in found.clash
        ]
        marks: dict[str, set[int]] = {}
        bad: set[str] = set()
        for problems, style in ((found.problems, "red"), ((*clashes, *found.warnings), "yellow")):
            for problem in problems:
                text.append(visible(str(problem), 500) + "\n", style)
                text.append(f"  hint: {visible(problem.hint, 500)}\n" if problem.hint else "", "dim")
                name, item = field_of(problem.message)
                marks.setdefault(name, set()).add(item)
                bad |= {name} if style == "red" else set()
        text.rstrip()
        self.query_one(Pane).show(text or Text("no problems", "green"))
        self._label_rows(marks, bad)

    def _label_rows(self, marks: Mapping[str, set[int]], bad: set[str]) -> None:
        """Mark the fields that problems are about, with the lines concerned."""
        for name in self._texts:
            row = self.query_one(f"#row-{name}")
            row.set_class(name in bad, "-bad")
            row.set_class(name in marks and name not in bad, "-warn")
            words = f"{'✗' if name in bad else '!' if name in marks else ' '} {name}"
            if name in self._fixed:
                words += "\n  change it in\n  your editor (e)"
            elif items := sorted(marks.get(name, set()) - {0}):
                numbers = [at for at, line in enumerate(self._text(name).split("\n"), 1) if line.strip()]
                lines = ", ".join(str(numbers[item - 1]) for item in items[:3] if item <= len(numbers))
                words += f"\n  line {lines}" if lines and FIELDS[name].area else ""
            row.query_one(".label", Static).update(Text(words))

    # Leaving

    @property
    def loss(self) -> str:
        """What is lost if the UI is left now."""
        return "The form has what is not saved." if self._written else ""

    @work(group="save", exclusive=True, exit_on_error=False)
    async def action_save(self) -> None:
        """Write the edit to its file, if nothing stands against it."""
        judge, file = self._judge, self._file
        if judge is None or self._saving:
            return
        if self._replacing and not self._written:
            self.notify("Nothing was changed")
            self.dismiss(False)
            return
        self._saving = True
        try:
            self._asked += 1
            found = await asyncio.to_thread(judge.judge, file, self._fields)
            self._show(found)
            if found.refused:
                words = found.problems[0].message if found.problems else "the file cannot hold it"
                self.notify(visible(words, 500), title="not saved", severity="error", markup=False)
                self._go_to(found)
            elif await self._agreed(found):
                again = await asyncio.to_thread(judge.judge, file, self._fields)
                if again.edit != found.edit:
                    self._show(again)
                    self.notify("The file was changed meanwhile: look at it and save again", severity="warning")
                    return
                await asyncio.to_thread(amend.save, Path(file), found.edit, self._replacing)
                name = found.edit.id or slug(found.edit.subject, found.edit.relation)
                self.notify(visible(f"Saved {name} to {file}", 500), markup=False)
                self.dismiss(True)
        except InvalidInput as error:
            self._show(Judged(found.edit, (*error.problems, Problem(file, 1, error.message, error.hint))))
            self.desk.refused(error)
        finally:
            self._saving = False

    def _go_to(self, found: Judged) -> None:
        """To the first field that a problem is about."""
        named = [field_of(problem.message)[0] for problem in found.problems]
        for name in named:
            if name in self._texts:
                self.query_one(f"#{name}").focus()
                return

    async def _agreed(self, found: Judged) -> bool:
        """Whether it is to be saved in spite of what speaks against it."""
        lines = [f"{name} was changed in the file meanwhile; yours would stand there instead" for name in found.clash]
        lines += [str(problem) for problem in found.problems]
        if not lines:
            return True
        body = Text("\n".join(visible(line, 500) for line in lines))
        return await self.app.push_screen_wait(Question("Save the edit all the same?", body)) is not None

    @work(group="leave", exclusive=True, exit_on_error=False)
    async def action_leave(self) -> None:
        """Out of the form; what was written and not saved is asked about."""
        if self._saving:
            return
        written = len(self._written)
        question = Question("Leave without saving?", f"What was written in {count(written, 'field')} is lost.")
        if not written or await self.app.push_screen_wait(question) is not None:
            self.dismiss(False)
