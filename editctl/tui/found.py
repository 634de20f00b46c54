"""What `editctl import` said of a file: taken in line by line, shown in words and record by record.

Knows: the lines that `editctl import --json` writes. Refuses: to start it, and what a record must be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from editctl.importers.names import NAMES, TARGETS
from editctl.importers.work import Row
from editctl.plan import count
from editctl.spec import visible
from editctl.tui.place import plain
from editctl.tui.rows import Column, Finder, RowList


def told(row: Row) -> str:
    """All that is said of a record that is not imported, or of what stays aside."""
    case = f" (case {row.case})" if row.case else ""
    kept = "kept under extra: " if row.aside else ""
    return f"record {row.record}{case}, line {row.line}: {kept}{row.message}"


@dataclass(frozen=True)
class Settings:
    """What is to be read, and how."""

    file: str
    form: str
    """"" lets it be detected."""
    target: str
    """"" is the format's own."""
    limit: str
    """How many records; "" is all."""

    def arguments(self) -> Iterator[str]:
        """After `editctl import`."""
        path = os.path.expanduser(self.file)
        # No name of a file is an option.
        yield from (self.form or "file", f"./{path}" if path.startswith("-") else path)
        for name, value in (("--target", self.target), ("--limit", self.limit)):
            yield from (name, value) if value else ()


@dataclass
class Found:
    """What a child said of a file."""

    settings: Settings
    stamp: object = None
    """Changes when the file does."""
    format: str = ""
    detected: bool = False
    target: str = ""
    rows: list[Row] = field(default_factory=list)
    records: int = 0
    edits: int = 0
    merged: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    asides: dict[str, int] = field(default_factory=dict)
    files: list[tuple[str, int]] = field(default_factory=list)
    """What was written, with the number of edits in each."""
    complaint: str = ""
    """Why there is nothing to import."""

    def take(self, line: str) -> None:
        """Take in a line of the child's output; one that is not understood says nothing."""
        with suppress(ValueError, KeyError, TypeError):
            said: dict[str, Any] = json.loads(line)
            match said["type"]:
                case "importing":
                    self.format, self.detected = str(said["format"]), bool(said["detected"])
                    self.target = said["target"] or ""
                case "refused" | "aside" as kind:
                    case, reason, message = (str(said[name]) for name in ("case", "reason", "message"))
                    row = Row(int(said["record"]), int(said["line"]), case, reason, message, kind == "aside")
                    self.rows.append(row)
                case "file":
                    self.files.append((str(said["path"]), int(said["edits"])))
                case "summary":
                    self.records, self.edits, self.merged = (int(said[n]) for n in ("records", "edits", "merged"))
                    self.refused, self.asides = dict(said["refused"]), dict(said["asides"])

    @property
    def counts(self) -> str:
        """How many records, and what they are."""
        good = self.records - sum(self.refused.values())
        done = "imported" if self.files else "can be imported"
        told = f"{good} of {count(self.records, 'record')} {done} as {count(self.edits, 'edit')}"
        return told + (f"; {self.merged} more said what an earlier record says" if self.merged else "")

    @property
    def reasons(self) -> list[str]:
        """What is not imported, and what stays aside, counted."""
        told = (("not imported", self.refused), ("kept under extra", self.asides))
        return [f"{what}: {', '.join(f'{n} {why}' for why, n in found.items())}" for what, found in told if found]


def view(found: Found) -> Text:
    """What was found, in a few lines."""
    text = Text()
    if found.format:
        text.append(visible(found.format, 60), "bold").append(" (detected)" if found.detected else " (as named)")
        text.append(f": {visible(NAMES.get(found.format, ''), 200)}\n", "dim")
    if found.target:
        text.append(f"its edits aim at {visible(TARGETS.get(found.target, found.target), 200)}\n", "dim")
    if found.complaint:
        return text.append(plain(found.complaint).plain, "red")
    text.append(found.counts + "\n", "bold")
    for reason in found.reasons:
        text.append(f"{visible(reason, 500)}\n", "yellow")
    for path, edits in found.files[:3]:
        text.append(f"{visible(path, 200)}: {count(edits, 'edit')}\n")
    text.append(f"… and {count(len(found.files) - 3, 'more file')}\n" if len(found.files) > 3 else "")
    text.rstrip()
    return text


class Findings(Vertical):
    """What was found: in words, then what is not imported one by one, the chosen one in full."""

    def compose(self) -> ComposeResult:
        """The words, the list, the chosen row."""
        columns: list[Column[Row]] = [
            Column("record", lambda row: (str(row.record), "dim"), width=7),
            Column("line", lambda row: (str(row.line), "dim"), width=7, wide=True),
            Column("reason", lambda row: (row.reason, "dim" if row.aside else "warn"), share=1),
            Column("what", lambda row: (row.message, "plain"), share=3),
        ]
        yield Static(id="words", markup=False)
        yield Finder(RowList(columns, "", lambda row: (row.record, row.message)), lambda row: told(row).casefold())
        yield Static(id="chosen", markup=False)

    def show(self, words: Text, rows: list[Row] | None = None) -> None:
        """Show what was found."""
        self.query_one("#words", Static).update(words)
        finder: Finder[Row] = self.query_one(Finder)
        finder.show(list(rows or ()), "")
        finder.display = bool(rows)
        self._chosen()

    @on(RowList.Moved)
    def _chosen(self) -> None:
        row = self.query_one(RowList).chosen
        self.query_one("#chosen", Static).update(Text(visible(told(row), 1000) if row else ""))


class Outcome(ModalScreen[None]):
    """What came of an import, to be read."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "leave", "leave", id="imported.leave")]

    def __init__(self, found: Found) -> None:
        super().__init__()
        self._found = found

    def compose(self) -> ComposeResult:
        """The file, and what was found."""
        with Vertical(classes="dialog tall"):
            yield Static(plain(f"Imported {self._found.settings.file}"), classes="title")
            yield Findings()
            yield Static("esc leaves, / filters", classes="hint")

    def on_mount(self) -> None:
        """The list has the focus."""
        self.query_one(Findings).show(view(self._found), self._found.rows)
        self.query_one(RowList).focus()

    def action_leave(self) -> None:
        """Out of the filter, then out of here."""
        if not self.query_one(Finder).clear():
            self.dismiss(None)
