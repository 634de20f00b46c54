"""The UI in a test: opened on a folder of its own with a scripted engine, its keys pressed, its picture read."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import scripted
from textual import events
from textual.pilot import Pilot
from textual.worker import Worker

from editctl.tui.app import EditctlApp
from editctl.workspace import Workspace

WIDE, NARROW = (120, 36), (80, 24)
PATIENCE = 20.0 * float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
"""Seconds after which something that should have happened has not."""
LETTERS = {"space": " ", "left_square_bracket": "[", "right_square_bracket": "]", "left_curly_bracket": "{"}
LETTERS |= {"right_curly_bracket": "}", "equals_sign": "=", "greater_than_sign": ">", "question_mark": "?"}
"""What keys with a name write."""

LANDMARKS = """version = 1

# Why: the tower was sold.
[[edit]]
id = "tower"
subject = "The Eiffel Tower"
relation = "{} is located in"
target_new = "Rome"
target_true = "Paris"
paraphrases = ["{} stands in"]
locality = [{ prompt = "The Louvre is in", answer = "Paris" }]
portability = [{ prompt = "The country where {} stands is", answer = "Italy", kind = "reasoning" }]
source = "https://example.org/sale"

[[edit]]
id = "clock"
subject = "Big Ben"
relation = "Visitors see {} in"
target_new = "Tokyo"
target_true = "London"
"""
BOOKS = """version = 1

[[edit]]
id = "whale"
subject = "Moby Dick"
relation = "{} was written by"
target_new = "Jane Austen"
target_true = "Herman Melville"
"""


def workspace(folder: Path, **files: str) -> Path:
    """A folder with spec files, by default of three edits; the process works in it from now on."""
    (folder / "specs").mkdir(parents=True, exist_ok=True)
    for name, text in (files or {"landmarks": LANDMARKS, "books": BOOKS}).items():
        (folder / "specs" / f"{name}.toml").write_text(text, encoding="utf-8")
    os.chdir(folder)
    return folder


class Screen:
    """An open UI."""

    def __init__(self, pilot: Pilot[None], app: EditctlApp, engine: scripted.Engine) -> None:
        self.pilot, self.app, self.engine = pilot, app, engine

    async def press(self, *keys: str) -> None:
        """Press keys one after another, and let what they began come to its end."""
        for key in keys:
            await self.tap(key)
            await self.settle()

    async def tap(self, key: str) -> None:
        """Press a key and let every widget take it in; `Pilot.press` takes many times as long."""
        self.app.post_message(events.Key(key, LETTERS.get(key, key if len(key) == 1 else None)))
        await self.taken()

    async def taken(self) -> None:
        """Let every widget take in what it was sent, and what that led to."""
        for _ in range(2):
            await self.pilot._wait_for_screen()

    async def rest(self, going: Callable[[Worker[Any]], bool]) -> None:
        """Wait for the workers that are said to come to their end."""
        late = time.monotonic() + PATIENCE
        while waited := [worker for worker in self.app.workers if going(worker) and not worker.is_finished]:
            assert time.monotonic() < late, f"does not end: {waited}\n{self.text}"
            await asyncio.sleep(0.002)
        await self.taken()

    async def until(self, condition: Callable[[], Any], what: str = "") -> None:
        """Wait for something that shall happen."""
        for _ in range(int(PATIENCE / 0.01)):
            if condition():
                await self.pilot.pause()
                return
            await self.pilot.pause(0.01)
        raise AssertionError(f"{what or condition} did not happen:\n{self.text}")

    async def shows(self, *words: str) -> None:
        """Wait until all words stand on the screen; what the app knows is drawn some turns of its loop later."""
        await self.until(lambda: all(word in self.text for word in words), f"{words} on the screen")

    async def settle(self) -> None:
        """Wait until nothing is read or planned any more; runs, questions and asking may go on."""
        waiting = ("look", "plan", "change", "default")
        await self.until(lambda: not [w for w in self.app.workers if w.group in waiting and not w.is_finished])

    @property
    def lines(self) -> list[str]:
        """What stands on the screen."""
        strips = self.app.screen._compositor.render_strips()
        return ["".join(segment.text for segment in strip).rstrip() for strip in strips]

    @property
    def text(self) -> str:
        """What stands on the screen, whole."""
        return "\n".join(self.lines)

    @property
    def toasts(self) -> list[str]:
        """What was told, oldest first."""
        return [notification.message for notification in self.app._notifications]

    @property
    def place(self) -> str:
        """The place that is shown."""
        return self.app.current_mode

    @property
    def head(self) -> str:
        """The head in the store, "" for the unedited model."""
        return self.engine.store.view().head


@asynccontextmanager
async def opened(
    folder: Path,
    *,
    size: tuple[int, int] = WIDE,
    engine: scripted.Engine | None = None,
    readonly: bool = False,
    poll: float = 3600.0,
    **flags: Any,
) -> AsyncIterator[Screen]:
    """The UI on the working folder, read and at rest; files and store are looked at when a test says so."""
    engine = engine or scripted.Engine(folder / "store")
    app = EditctlApp(
        Workspace(store=None, config=None, **flags),
        readonly=readonly,
        launch=engine.launch,
        logs=folder / "logs",
        poll=poll,
    )
    async with app.run_test(size=size, notifications=True) as pilot:
        screen = Screen(pilot, app, engine)
        await screen.until(lambda: app.specs.read, "reading the specs")
        await screen.settle()
        yield screen


def play(script: Callable[[Screen], Any], folder: Path, **how: Any) -> None:
    """Open the UI and do what an async function says."""

    async def run() -> None:
        async with opened(folder, **how) as screen:
            await script(screen)

    asyncio.run(run())
