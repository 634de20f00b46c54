"""What a study has found so far, kept in a folder so that it can go on.

Knows: one JSON line for each finished part, the configuration they belong to, and that two processes must not write one
folder. Refuses: to know what the lines mean, and to mix the results of two configurations.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from editctl.errors import InvalidInput, Locked
from editctl.events import json_line
from editctl.files import write_atomically

ABOUT, LINES, DELTAS = "study.json", "parts.jsonl", "deltas"
"""Files of a study's folder: its configuration, its finished parts, and the factors of a trial that is under way."""


class Journal:
    """The finished parts of one study, in the order in which they were finished; in memory alone without a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.lines: list[dict[str, Any]] = []

    @property
    def deltas(self) -> Path:
        """Where the factor files of a trial under way lie."""
        return (self.folder or Path()) / DELTAS

    def tidy(self) -> None:
        """A trial is finished: its factor files are needed no more."""
        if self.folder is not None:
            shutil.rmtree(self.deltas, ignore_errors=True)

    def of(self, trial: str) -> list[dict[str, Any]]:
        """The finished parts of one trial."""
        return [line for line in self.lines if line["trial"] == trial]

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep a finished part; it is on disk when this returns.

        Raises:
            InvalidInput: the folder cannot be written.
        """
        self.lines.append(json.loads(json.dumps(line)))
        if self.folder is None:
            return
        try:
            with (self.folder / LINES).open("ab") as file:
                file.write(json_line(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidInput(f"{self.folder} cannot be written: {error.strerror}", "free some space") from None


@contextmanager
def opened(folder: Path | None, about: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a study with this configuration: taken up where the folder holds one, else begun.

    Raises:
        InvalidInput: the folder holds a study of another configuration, something else, or cannot be written.
        Locked: another process is writing there.
    """
    if folder is None:
        yield Journal()
        return
    wanted = json.loads(json.dumps(about))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        with lock:
            journal = Journal(folder)
            if (folder / ABOUT).exists():
                _check(folder, wanted)
                journal.lines = list(_read(folder / LINES))
            elif any(path.name != ".lock" for path in folder.iterdir()):
                raise InvalidInput(f"{folder} holds something else than a study", "name an empty folder with -o")
            else:
                write_atomically(folder / ABOUT, (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode())
            yield journal
    except Timeout:
        raise Locked(f"another process is writing {folder}", "wait for it, or name another folder with -o") from None
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be used: {error.strerror}", "name another folder with -o") from None


def _check(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Make sure that a folder's study is the one wanted.

    Raises:
        InvalidInput: it is another.
    """
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    except (ValueError, TypeError, AttributeError):
        raise InvalidInput(f"{folder / ABOUT} is damaged", "name another folder with -o") from None
    if different:
        raise InvalidInput(
            f"{folder} holds a study of another configuration; what differs: {', '.join(sorted(different))}",
            "give the same specs and settings, or name another folder with -o",
        )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; one that was cut by a kill is taken away, so that the next stands by itself."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_atomically(path, whole)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InvalidInput(f"{path}:{number}: the line is damaged", "name another folder with -o, or begin anew")
        yield found
