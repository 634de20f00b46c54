"""Questions that stand above a place: each ends with an answer or with none.

Knows: asking for a yes, a text, one of a list; showing a text. Refuses: what the answer is for. The key that confirms
is never the key that asked, and nothing is confirmed by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from editctl.tui.place import Pane, plain
from editctl.tui.rows import Column, Finder, RowList


@dataclass(frozen=True)
class Consent:
    """A yes, and why."""

    note: str = ""


class Question(ModalScreen[Consent | None]):
    """Yes or no; no is what return does at first."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "yes", "yes", id="question.yes"),
        Binding("n,escape", "no", "no", id="question.no"),
        Binding("m", "note", "note", id="question.note"),
        Binding("left,right", "other", "other", show=False, id="question.other"),
    ]

    def __init__(self, title: str, body: object = "", *, note: bool = False) -> None:
        """
        Args:
            body: what Rich can print; a string is shown literally.
            note: whether why may be said.
        """
        super().__init__()
        self._title, self._body, self._note = title, body, note

    def compose(self) -> ComposeResult:
        """The question, the note, the two buttons."""
        with Vertical(classes="dialog"):
            yield Static(plain(self._title), classes="title")
            pane = Pane(classes="body")
            pane.can_focus = False
            yield pane
            if self._note:
                yield Input(placeholder="why (m): kept in the log", id="note")
            with Horizontal(classes="buttons"):
                yield Button("No (n)", id="no")
                yield Button("Yes (y)", id="yes")

    def on_mount(self) -> None:
        """No has the focus."""
        self.query_one(Pane).show(self._body)
        self.query_one(Pane).display = bool(self._body)
        self.query_one("#no").focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A note is not always asked for."""
        return self._note if action == "note" else True

    @on(Button.Pressed, "#yes")
    def action_yes(self) -> None:
        """Go on."""
        self.dismiss(Consent(self.query_one("#note", Input).value.strip() if self._note else ""))

    @on(Button.Pressed, "#no")
    def action_no(self) -> None:
        """Leave everything as it is; out of the note first."""
        if isinstance(self.focused, Input):
            self.query_one("#no").focus()
            return
        self.dismiss(None)

    def action_note(self) -> None:
        """Say why."""
        self.query_one("#note").focus()

    def action_other(self) -> None:
        """To the other button."""
        if not isinstance(self.focused, Input):
            self.query_one("#yes" if self.focused and self.focused.id == "no" else "#no").focus()

    @on(Input.Submitted)
    def note_written(self) -> None:
        """Back to the buttons, on no."""
        self.query_one("#no").focus()


class Line(ModalScreen[str | None]):
    """One line of text."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "leave", id="line.leave")]

    def __init__(self, title: str, placeholder: str = "", value: str = "") -> None:
        """
        Args:
            value: what is proposed; nothing is, where an input could not show it as it is.
        """
        super().__init__()
        self._title, self._placeholder, self._value = title, placeholder, value if value.isprintable() else ""

    def compose(self) -> ComposeResult:
        """The title and the line."""
        with Vertical(classes="dialog small"):
            yield Static(plain(self._title), classes="title")
            yield Input(self._value, placeholder=self._placeholder)
            yield Static("return takes it, esc leaves", classes="hint")

    @on(Input.Submitted)
    def taken(self, event: Input.Submitted) -> None:
        """Answer with what is written; an empty line is no answer."""
        self.dismiss(event.value.strip() or None)

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)


class Pick(ModalScreen[str | None]):
    """One of several, by name; typing filters."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "leave", id="pick.leave"),
        Binding("enter", "take", "take", id="pick.take"),
    ]

    def __init__(self, title: str, choices: Sequence[tuple[str, str]], empty: str = "there is nothing to pick") -> None:
        """
        Args:
            choices: what is answered, and what is shown beside it.
        """
        super().__init__()
        self._title, self._choices, self._empty = title, choices, empty

    def compose(self) -> ComposeResult:
        """The title and the list."""
        columns: list[Column[tuple[str, str]]] = [
            Column("", lambda choice: (choice[0], "plain"), share=1),
            Column("", lambda choice: (choice[1], "dim"), share=2),
        ]
        with Vertical(classes="dialog tall"):
            yield Static(plain(self._title), classes="title")
            rows = RowList(columns, self._empty, lambda choice: choice[0])
            yield Finder(rows, lambda choice: " ".join(choice).casefold())
            yield Static("return takes it, / filters, esc leaves", classes="hint")

    def on_mount(self) -> None:
        """The list has the focus."""
        self.query_one(Finder).show(self._choices)
        self.query_one(RowList).focus()

    @on(RowList.Opened)
    def action_take(self) -> None:
        """Answer with the chosen one."""
        chosen = self.query_one(RowList).chosen
        if chosen is not None:
            self.dismiss(chosen[0])

    def action_leave(self) -> None:
        """Out of the filter, then out of the list."""
        if not self.query_one(Finder).clear():
            self.dismiss(None)


class Viewer(ModalScreen[None]):
    """Something to read."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "leave", "leave", id="viewer.leave")]

    def __init__(self, title: str, body: object) -> None:
        super().__init__()
        self._title, self._body = title, body

    def compose(self) -> ComposeResult:
        """The title and the text."""
        with Vertical(classes="dialog tall"):
            yield Static(plain(self._title), classes="title")
            yield Pane(classes="body")
            yield Static("esc leaves, j and k scroll", classes="hint")

    def on_mount(self) -> None:
        """The text has the focus, so that it scrolls."""
        self.query_one(Pane).show(self._body)
        self.query_one(Pane).focus()

    def on_click(self, event: events.Click) -> None:
        """A click beside it leaves."""
        if event.widget is self:
            self.dismiss(None)

    def action_leave(self) -> None:
        """Done."""
        self.dismiss(None)
