"""The processes that work for the UI: each is a command of the command line, with its own log file.

Knows: starting, reading line by line, stopping. Refuses: what the lines mean. A child can be stopped for certain, gives
back the device's memory when it ends, and cannot take the UI down with it.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGINT
from typing import BinaryIO, Protocol

LOGS = 20
"""Log files that are kept."""
NICE = 5
"""How much a child gives way to others, as of `nice`."""
LONGEST = 256 * 2**20
"""Bytes of the longest line a child may say."""


class Child(Protocol):
    """A command at work."""

    log: Path
    """Where all it says is kept."""

    async def line(self) -> str:
        """The next line of its output, without the line end; "" when there will be no more."""

    async def send(self, line: str) -> None:
        """A line for its input; "" ends it."""

    def interrupt(self) -> None:
        """Ask it to stop, as ctrl-C does."""

    def kill(self) -> None:
        """Stop it at once."""

    async def wait(self) -> int:
        """Its exit code, once it has ended."""


Launch = Callable[[Sequence[str], Path], Awaitable[Child]]
"""Starts a command, given its arguments after `editctl` and where to keep what it says."""


class Process:
    """A command in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, kept: BinaryIO) -> None:
        """
        Args:
            kept: the log, open for writing.
        """
        self._process, self.log, self._kept = process, log, kept

    async def line(self) -> str:
        """As of `Child`; the line is in the log too."""
        assert self._process.stdout is not None
        data = await self._process.stdout.readline()
        if data:
            with suppress(OSError, ValueError):  # ValueError: it is closed, for the process has ended
                self._kept.write(data)
                self._kept.flush()
        return data.decode("utf-8", "replace").rstrip("\n") if data != b"\n" else " "

    async def send(self, line: str) -> None:
        """As of `Child`."""
        assert self._process.stdin is not None
        with suppress(ConnectionError):
            if line:
                self._process.stdin.write(line.encode() + b"\n")
                await self._process.stdin.drain()
            else:
                self._process.stdin.close()

    def interrupt(self) -> None:
        """As of `Child`."""
        with suppress(ProcessLookupError):
            self._process.send_signal(SIGINT)

    def kill(self) -> None:
        """As of `Child`."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """As of `Child`."""
        code = await self._process.wait()
        self._kept.close()
        if self._process.stdin is not None:
            # Else the pipe is closed by the garbage collector, which may come after the loop.
            self._process.stdin.close()
        return code


async def launch(arguments: Sequence[str], log: Path) -> Child:
    """Start `editctl` with these arguments; what it says on standard error goes to the log."""
    file = log.open("ab")
    try:
        file.write(f"$ {shlex.join(['editctl', *arguments])}\n".encode(errors="replace"))
        file.flush()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "editctl", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            limit=LONGEST,
        )
    except BaseException:
        file.close()
        raise
    # Every key press takes the processor from a run for a moment, not a run from the keys.
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
    return Process(process, log, file)


def log_file(folder: Path, verb: str) -> Path:
    """Where a new child's words go; all but the newest logs are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    known = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for old in known[: max(len(known) - LOGS + 1, 0)]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}-{os.getpid()}.log"


def errors_of(log: Path) -> str:
    """The last thing a child complained about, for a message; empty if it said nothing."""
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip() and line[0] not in "{$"]
        begun = [i for i, line in enumerate(said) if line.startswith("error: ")]
        return "\n".join(said[begun[-1] :][:6] if begun else said[-2:])
    return ""
