"""The terminal UI with the real engine in its child process on the built-in model, and what it takes.

The figures of docs/tui.md are printed by `pytest tests/test_tui_real.py -m timing -s`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from screens import WIDE, Screen, workspace
from scripted import Engine

from editctl import spec
from editctl.store import Store, care
from editctl.tui import children
from editctl.tui.app import EditctlApp
from editctl.tui.rows import Finder
from editctl.workspace import Workspace

ROOT = Path(__file__).parents[1]
FACTOR = float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
"""Stretches every limit on a busy or slow machine."""
PAINT, STALL, SIFT = 0.5 * FACTOR, 0.05 * FACTOR, 0.1 * FACTOR
"""Seconds: to the first paint, of the longest stall while a run goes on, from a key of the filter to its paint."""
SMALL = "checks = []\n[settings]\ncorpus_tokens = 20000\n"
"""Statistics of a fifth of the usual text, so that a run is short."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped specs about companies and landmarks, and the built-in model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    for name in ("companies", "landmarks"):
        shutil.copy(ROOT / "specs" / f"{name}.toml", tmp_path / "specs")
    (tmp_path / "editctl.toml").write_text(SMALL)
    return tmp_path


class Real(Screen):
    """The UI with real children."""

    async def until(self, condition: Any, what: str = "") -> None:
        """Wait for something that takes a model."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < 120 * FACTOR, f"{what} did not happen:\n{self.text}"
            await self.pilot.pause(0.02)
        await self.pilot.pause()


def session(script: Any, folder: Path) -> None:
    """Open the UI on a folder, with children as users have them, and do what an async function says."""

    async def run() -> None:
        app = EditctlApp(Workspace(store=None, config=None), logs=folder / "logs")
        async with app.run_test(size=WIDE, notifications=True) as pilot:
            screen = Real(pilot, app, Engine(folder / "store"))
            await screen.until(lambda: app.specs.read, "reading the specs")
            await script(screen)

    asyncio.run(run())


def test_a_session_from_the_first_look_to_the_last_undo(folder: Path) -> None:
    """Open, stage two edits, see what the model says now, apply, review, reject one, undo, redo, quit."""

    async def script(screen: Real) -> None:
        app, store = screen.app, Store(folder / "store")
        await screen.press("slash", *"landmarks", "enter")
        await screen.press("space", "space", "p")
        assert len(app.staged) == 2
        await screen.until(lambda: "99." in screen.text or "100.0 %" in screen.text, "what is said now")
        await screen.shows("Paris")
        await screen.press("g", "y")
        await screen.until(lambda: app.runner.run and not app.runner.going, "the run")
        first = store.head()
        assert first is not None and {live.id for live in store.edits(first)} == {
            "tower-takes-its-coffee-in-rome",
            "colosseum-needs-rain",
        }
        said = {answer.edit: answer.after for answer in store.answers(first) if answer.kind == "rewrite"}
        assert said["tower-takes-its-coffee-in-rome"] == "Rome"
        await screen.press("4")
        await screen.until(lambda: "✓ Rome" in screen.text, "the review")
        await screen.press("down", "r", "g", "y")
        await screen.until(lambda: store.head() != first and not app.runner.going, "the version without it")
        second = store.head()
        assert second is not None
        assert [live.id for live in store.edits(second)] == ["tower-takes-its-coffee-in-rome"]
        await screen.until(lambda: app.past.head == second, "its place in the list")
        await screen.press("u")
        await screen.until(lambda: store.head() == first, "the undo")
        await screen.until(lambda: app.past.head == first)
        await screen.press("ctrl+r")
        await screen.until(lambda: store.head() == second, "the redo")
        assert [op.verb for op in store.operations()] == ["redo", "undo", "reject", "apply"]
        assert care.inspect(store) == []
        await screen.press("q")
        await screen.until(lambda: app._exit, "the end")

    session(script, folder)
    assert not (folder / "store" / "lock.json").exists()


def test_a_run_that_is_killed_from_outside_is_a_message(folder: Path) -> None:
    """As the kernel does when memory runs out: the UI names the log, the store is as it was and can be locked."""

    async def script(screen: Real) -> None:
        app = screen.app
        await screen.press("space", "p")
        await screen.until(lambda: app.planned.plan)
        await screen.press("g", "y")
        await screen.until(lambda: app.runner.run and app.runner.run.course.talk, "the beginning of the run")
        child = app.runner._child
        assert isinstance(child, children.Process)
        os.kill(child._process.pid, signal.SIGKILL)
        await screen.until(lambda: not app.runner.going, "the end of the run")
        run = app.runner.run
        assert run is not None and run.code == -signal.SIGKILL
        await screen.until(lambda: any(str(run.log) in toast for toast in screen.toasts), "a message")
        assert run.log.read_text().startswith("$ editctl apply -")

    session(script, folder)
    with Store(folder / "store").lock("test"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# What it takes


def many(folder: Path, files: int, edits: int, versions: int) -> Path:
    """Spec files of that many edits each, and a store of versions of one edit each."""
    template = '[[edit]]\nid = "fact-{0}"\nsubject = "Subject {0}"\nrelation = "{{}} lies in the city of"\n'
    template += 'target_new = "Rome"\ntarget_true = "Paris"\nparaphrases = ["One finds {{}} in"]\n'
    numbers = range(files * edits)
    texts = {f"file-{i:04}": "".join(map(template.format, numbers[i * edits : (i + 1) * edits])) for i in range(files)}
    workspace(folder, **{name: f"version = 1\n\n{text}" for name, text in texts.items()})
    engine = Engine(folder / "store")
    for edit in spec.load([folder / "specs"])[:versions]:
        engine.make(engine.plan_of(edit))
    return folder


def painted(folder: Path, marks: Sequence[str], size: tuple[int, int] = WIDE) -> dict[str, float]:
    """Seconds from starting `editctl` on a terminal until each text is written to it."""
    begun = time.perf_counter()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "editctl"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    said, seen = b"", dict[str, float]()
    try:
        while len(seen) < len(marks) and time.perf_counter() - begun < 30:
            if select.select([terminal], [], [], 0.02)[0]:
                with suppress(OSError):
                    said += os.read(terminal, 1 << 16)
            now = time.perf_counter() - begun
            seen |= {mark: now for mark in marks if mark not in seen and mark.encode() in said}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    assert len(seen) == len(marks), said[-2000:]
    return seen


def spread(values: Sequence[float], unit: float = 1000) -> str:
    """Least, middle and most, in milliseconds."""
    ordered = sorted(values)
    return " / ".join(f"{unit * v:.0f}" for v in (ordered[0], ordered[len(ordered) // 2], ordered[-1])) + " ms"


@pytest.mark.timing
def test_the_first_paint_is_there_in_half_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 spec files and 200 versions, from starting Python to the first picture; best of seven, since other work on
    the machine only ever adds."""
    monkeypatch.chdir(tmp_path)
    many(tmp_path, 1000, 1, 200)
    painted(tmp_path, ["History"])  # compiles the byte code
    found = [painted(tmp_path, ["History", "200 applied"]) for _ in range(7)]
    first, full = ([one[mark] for one in found] for mark in ("History", "200 applied"))
    print(f"\nfirst paint {spread(first)}, all states {spread(full)} (least / middle / most of {len(found)})")
    assert min(first) < PAINT


@pytest.mark.timing
def test_nothing_stalls_while_a_run_goes_on(folder: Path) -> None:
    """A heartbeat in the UI's own loop while a real run works and the person goes from place to place; the best of up
    to three runs, since other work on the machine only ever adds."""
    found: list[float] = []
    for _ in range(3):
        late = stalls(folder)
        found.append(max(late))
        if found[-1] < STALL:
            return
        shutil.rmtree(folder / "store")
    pytest.fail(worst(found))


def stalls(folder: Path) -> list[float]:
    """How late each beat of a session with a run came, in seconds."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            late.append(time.perf_counter() - begun - 0.005)

    async def script(screen: Real) -> None:
        app = screen.app
        await screen.press(*"23456", "escape", "escape", "1", "a", "p")
        await screen.until(lambda: app.planned.plan and not app.asker.doing, "the plan")
        await screen.press("g")
        heart = asyncio.create_task(beat())
        await screen.pilot.press("y")
        await screen.until(lambda: app.runner.going)
        keys = 0
        while app.runner.going:
            await screen.pilot.press("1243"[keys % 4] if keys % 3 else "j")
            await screen.pilot.pause(0.2)
            keys += 1
        heart.cancel()
        assert app.runner.run is not None and app.runner.run.course.made is not None and keys > 5
        print(f"\n{len(late)} beats in a run of {app.runner.run.elapsed:.1f} s with {keys} keys; worst: {worst(late)}")

    session(script, folder)
    return late


def worst(late: Sequence[float]) -> str:
    """The longest stalls."""
    return ", ".join(f"{1000 * value:.0f} ms" for value in sorted(late)[-5:])


@pytest.mark.timing
def test_a_heartbeat_feels_a_stall(folder: Path) -> None:
    """Control: a loop that does not get its turn for 60 ms is late by that."""
    late: list[float] = []

    async def run() -> None:
        async def beat() -> None:
            while True:
                begun = time.perf_counter()
                await asyncio.sleep(0.005)
                late.append(time.perf_counter() - begun - 0.005)

        heart = asyncio.create_task(beat())
        await asyncio.sleep(0.02)
        time.sleep(0.06)
        await asyncio.sleep(0.02)
        heart.cancel()

    asyncio.run(run())
    assert max(late) > 0.05


@pytest.mark.timing
def test_ten_thousand_edits_are_filtered_within_a_tenth_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a key of the filter to the paint of what it leaves; and from one row to the next, and to the end."""
    monkeypatch.chdir(tmp_path)
    many(tmp_path, 10, 1000, 0)
    sifted: list[float] = []
    moved: list[float] = []
    painted: list[float] = []
    paint = EditctlApp._display

    def display(app: EditctlApp, *what: Any) -> None:
        paint(app, *what)
        painted.append(time.perf_counter())

    monkeypatch.setattr(EditctlApp, "_display", display)

    async def answered(screen: Real, key: str, state: Callable[[], Any]) -> float:
        """Seconds from a key to the last paint that it leads to."""
        before, begun = state(), time.perf_counter()
        screen.app.simulate_key(key)
        while state() == before:
            await asyncio.sleep(0)
        done = time.perf_counter()
        while not painted or painted[-1] < done:
            await asyncio.sleep(0)
        await screen.pilot.pause(0.1)
        return painted[-1] - begun

    async def script(screen: Real) -> None:
        assert len(screen.app.specs.items) == 10_000
        await screen.press("slash")
        rows = screen.app.screen.query_one("#items")
        for key in ("7", "7", "backspace", "backspace", "s", "u", "b", "backspace", "backspace", "backspace", "9", "9"):
            sifted.append(await answered(screen, key, lambda: screen.app.screen.query_one(Finder).words))
        assert 0 < len(rows.items) < 1000
        await screen.press("escape")
        for key in ("j", "j", "pagedown", "end", "k", "home", "end"):
            moved.append(await answered(screen, key, lambda: rows.cursor))
        assert rows.cursor == 9_999

    session(script, tmp_path)
    print(f"\n10,000 edits: a key of the filter {spread(sifted)}, a move {spread(moved)} (least / middle / most)")
    assert median(sifted) < SIFT and median(moved) < SIFT
