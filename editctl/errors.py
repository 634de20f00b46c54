"""What can go wrong in a way the user can mend, and the exit code that says so.

Knows: the few kinds of error, each with a message and a hint. Refuses: to catch anything else; any other exception is a
bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Process exit codes, one per thing a script may want to react to."""

    OK = 0
    FAILED = 1
    USAGE = 2
    """Wrong arguments or invalid specs. Under `plan --detailed-exitcode` 2 means "there are changes"."""
    LOCKED = 3
    GATE = 4
    STALE = 5
    INTERRUPTED = 130


class EditctlError(Exception):
    """A failure whose message and hint are shown to the user as they are, without a traceback."""

    exit_code = Exit.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one file."""

    file: str
    line: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


class InvalidInput(EditctlError):
    """Specs, configuration or arguments that cannot be acted on; carries every problem found."""

    exit_code = Exit.USAGE

    def __init__(self, message: str, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint)
        self.problems = tuple(problems)


class ModelError(EditctlError):
    """The model cannot be found, loaded or edited."""


class StoreError(EditctlError):
    """The store lacks what was asked for, or what it holds does not agree with its hashes."""


class Locked(EditctlError):
    """Another process is changing the store."""

    exit_code = Exit.LOCKED


class StalePlan(EditctlError):
    """A saved plan no longer describes the store or the model it was made for."""

    exit_code = Exit.STALE
