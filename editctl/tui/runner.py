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
    recorded: bool = False
    """Whether the store is not as it was although the run did not say what it made."""

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
        end = "Cancelled" if self.cancelled else f"Ended with code {self.code}"
        if self.recorded:
            return f"{end}; the store has changed all the same: History (5) shows what was recorded."
        return f"{end}; the store is as it was."


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

    def begin(self, title: str, course: Course) -> Run:
        """A run that is about to be started; from now on one goes on."""
        self.run = Run(title, course, Path(), time.monotonic())
        self._told()
        return self.run

    async def follow(self, run: Run, arguments: Sequence[str], verb: str, given: str = "") -> None:
        """Start the command that makes the version and follow it to its end.

        Args:
            given: what it reads from its standard input.
        """
        child: Child | None = None
        try:
            run.log = await asyncio.to_thread(log_file, self._logs, verb)
            self._child = child = await self._launch(arguments, run.log)
            if run.cancelled:
                child.interrupt()
                await self._ended(child)
            else:
                if given:
                    await child.send(given)
                await child.send("")
            count = 0
            while line := await child.line():
                # The header, metrics, and whatever a newer editctl says are no events.
                with suppress(ValueError, TypeError, AttributeError):
                    run.course.feed(events.from_line(line))
                count += 1
                if count % BURST == 0:
                    await asyncio.sleep(0)
            code = await child.wait()
            if code not in (Exit.OK, Exit.GATE) and not run.cancelled:
                run.complaint = await asyncio.to_thread(errors_of, run.log)
            run.code = code
        except OSError as error:
            run.complaint = f"error: the run cannot be started or followed: {error}"
        except asyncio.CancelledError:
            run.cancelled = True
            raise
        finally:
            if run.code is None:
                run.code = Exit.INTERRUPTED if run.cancelled else Exit.FAILED
                if child is not None:
                    child.interrupt()
                    await self._ended(child)
            run.ended, self._child = time.monotonic(), None
            self._told()

    async def cancel(self) -> None:
        """Ask the run to stop, and stop it after a while."""
        run = self.run
        if run is None or not run.going or run.cancelled:
            return
        run.cancelled = True
        self._told()
        # One that is only being started is interrupted as soon as it is there.
        if (child := self._child) is not None:
            child.interrupt()
            await self._ended(child)

    async def _ended(self, child: Child) -> None:
        try:
            await asyncio.wait_for(child.wait(), GRACE)
        except TimeoutError:
            child.kill()
