"""The one run at a time: a child that makes a version, and what its events add up to.

Knows: starting, following, cancelling. Refuses: what is shown of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from editctl import events
from editctl.errors import Exit
from editctl.tui.children import Child, Launch, errors_of, log_file
from editctl.tui.course import Course

GRACE = 10.0
"""Seconds a cancelled run has to stop by itself."""
BURST = 50
"""Lines taken in before the screen gets its turn."""


@dataclass
class Run:
    """A run that was started here."""

    title: str
    course: Course
    log: Path
    begun: float
    """Monotonic seconds."""
    ended: float | None = None
    code: int | None = None
    """Exit code, once it has ended."""
    cancelled: bool = False
    complaint: str = ""

    @property
    def going(self) -> bool:
        """Whether it has not ended."""
        return self.code is None

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return (time.monotonic() if self.ended is None else self.ended) - self.begun

    @property
    def left(self) -> float | None:
        """Seconds still to come; None while that cannot be said."""
        return self.course.left(self.elapsed) if self.going else 0.0

    @property
    def outcome(self) -> str:
        """What came of it, in a sentence."""
        made = self.course.made
        if self.going:
            return "stopping …" if self.cancelled else ""
        if made is not None and made.candidate:
            return f"Version {made.version} is a candidate: a gate failed, and the head stays where it was."
        if made is not None:
            return f"Made version {made.version}; the head is there now."
        if self.code == Exit.OK:
            return "There was nothing to do."
        if self.cancelled:
            return "Cancelled; the store is as it was."
        return f"Ended with code {self.code}; the store is as it was."


class Runner:
    """At most one run, which goes on whatever is shown."""

    def __init__(self, launch: Launch, logs: Path, told: Callable[[], None]) -> None:
        self._launch, self._logs, self._told = launch, logs, told
        self._child: Child | None = None
        self.run: Run | None = None
        """The run that goes on, or the last one."""

    @property
    def going(self) -> bool:
        """Whether a run goes on."""
        return self.run is not None and self.run.going

    async def carry_out(self, title: str, course: Course, arguments: Sequence[str], verb: str, given: str = "") -> Run:
        """Start a command that makes a version and follow it to its end.

        Args:
            given: what it reads from its standard input.
        """
        log = await asyncio.to_thread(log_file, self._logs, verb)
        run = self.run = Run(title, course, log, time.monotonic())
        self._told()
        self._child = child = await self._launch(arguments, log)
        try:
            if given:
                await child.send(given)
            await child.send("")
            count = 0
            while line := await child.line():
                # The header, metrics, and whatever a newer editctl says are no events.
                with suppress(ValueError, TypeError, AttributeError):
                    course.feed(events.from_line(line))
                count += 1
                if count % BURST == 0:
                    await asyncio.sleep(0)
            code = await child.wait()
        except asyncio.CancelledError:
            child.interrupt()
            await self._ended(child)
            run.ended, run.code = time.monotonic(), Exit.INTERRUPTED
            raise
        run.ended, run.complaint = time.monotonic(), ""
        if code not in (Exit.OK, Exit.GATE) and not run.cancelled:
            run.complaint = await asyncio.to_thread(errors_of, log)
        run.code, self._child = code, None
        self._told()
        return run

    async def cancel(self) -> None:
        """Ask the run to stop, and stop it after a while."""
        child, run = self._child, self.run
        if child is None or run is None or run.cancelled:
            return
        run.cancelled = True
        self._told()
        child.interrupt()
        await self._ended(child)

    async def _ended(self, child: Child) -> None:
        try:
            await asyncio.wait_for(child.wait(), GRACE)
        except TimeoutError:
            child.kill()
