"""History: the two lists, going back, comparing, playing again, names, export and the care of the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from screens import NARROW, WIDE, Screen, play, workspace
from scripted import STUBBORN, Engine

from editctl.spec import load
from editctl.tui.dialogs import Line, Question, Viewer
from editctl.tui.replay import Replay
from editctl.tui.tasks import Task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return workspace(tmp_path)


@pytest.fixture
def engine(folder: Path) -> Engine:
    """Three versions: one edit, two edits (the head), and a candidate; the first is named."""
    engine = Engine(folder / "store")
    whale, tower, clock = load([Path("specs")])
    first = engine.make(engine.plan_of(whale), note="because [b]bold[/b] \x1b[31m")
    engine.store.set_alias("stable", first.id)
    engine.make(engine.plan_of(tower))
    engine.make(engine.plan_of(clock.model_copy(update={"target_new": STUBBORN}), gates={"reliability": 1.0}))
    return engine


async def ready(screen: Screen) -> None:
    """In History, all read."""
    await screen.press("5")
    await screen.until(lambda: "in effect" in screen.text or "operation" in screen.text, "the chosen operation")
    await calm(screen)


async def calm(screen: Screen) -> None:
    """Nothing is listed or read any more."""
    groups = ("history", "detail", "compare")
    await screen.until(lambda: not [w for w in screen.app.workers if w.group in groups and not w.is_finished])
    await screen.settle()


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_operations_and_versions_are_listed_and_shown_in_full(
    folder: Path, engine: Engine, size: tuple[int, int]
) -> None:
    """v switches; what a note says is shown literally."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        newest, *_ = engine.store.versions()
        await screen.shows("@ 4")
        await screen.press("end")
        await calm(screen)
        await screen.shows("because [b]bold[/b] \\x1b[31m")
        await screen.press("v")
        await calm(screen)
        for words in ("◆", "@", "◇", "stable", newest.id, "candidate"):
            await screen.shows(words)

    play(script, folder, engine=engine, size=size)


def test_going_back_asks_and_undo_takes_it_back(folder: Path, engine: Engine) -> None:
    """To an operation, to a version, to the unedited model."""
    _, second, first = (version.id for version in engine.store.versions())

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("b")
        assert any("already" in toast for toast in screen.toasts)
        await screen.press("end", "b")
        assert isinstance(screen.app.screen, Question)
        await screen.press("enter")
        assert screen.head == second
        await screen.press("b", "y")
        await screen.until(lambda: screen.head == first, "the first version")
        await screen.press("u")
        await screen.until(lambda: screen.head == second, "the second version")
        await calm(screen)
        await screen.press("v", "end", "b", "y")
        await screen.until(lambda: screen.head == "", "the unedited model")
        await calm(screen)
        await screen.press("home", "b")
        assert any("never accepted" in toast for toast in screen.toasts)

    play(script, folder, engine=engine)


def test_any_two_versions_are_compared(folder: Path, engine: Engine) -> None:
    """With the parent at first, with the marked one then."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("v", "down", "d")
        await screen.until(lambda: isinstance(screen.app.screen, Viewer), "what differs")
        await screen.shows("+ The Eiffel Tower")
        await screen.press("escape", "m", "d")
        assert any("two different versions" in toast for toast in screen.toasts)
        await screen.shows("● ")
        await screen.press("end", "d")
        await screen.until(lambda: isinstance(screen.app.screen, Viewer), "what differs")
        await screen.shows("→ base")
        await screen.press("escape", "m", "m", "d")
        assert any("nothing below" in toast for toast in screen.toasts)

    play(script, folder, engine=engine)


def test_a_past_run_is_played_again(folder: Path, engine: Engine) -> None:
    """Paused, stepped, to the end."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("v", "down", "y")
        await screen.until(lambda: isinstance(screen.app.screen, Replay), "the run")
        await screen.press("space", "home", "right", "right")
        await screen.shows("event 2 of")
        await screen.shows("alphaedit")
        await screen.press("end")
        await screen.until(lambda: "Made version" in screen.text, "the end")
        await screen.press("left", "escape", "end", "y")
        assert any("made by no run" in toast for toast in screen.toasts)

    play(script, folder, engine=engine)


def test_names_are_given_and_taken(folder: Path, engine: Engine) -> None:
    """A name that cannot be one is refused in words."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("l")
        assert isinstance(screen.app.screen, Line)
        await screen.press(*"cafe", "enter")
        await screen.until(lambda: any("cannot be an alias" in toast for toast in screen.toasts), "a refusal")
        await screen.press("l", *"good", "enter")
        await screen.until(lambda: "good" in engine.store.view().aliases, "the name")
        await calm(screen)
        await screen.press("L", "enter")
        await screen.until(lambda: "stable" not in engine.store.view().aliases, "the name to go")

    play(script, folder, engine=engine)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("x enter enter", "export"),
        ("V", "verify"),
        ("G y", "gc"),
        ("M", "measure"),
        ("B o u t enter", "backup"),
    ],
)
def test_commands_beside_runs_show_their_words(folder: Path, engine: Engine, keys: str, words: str) -> None:
    """Each is a child of the command line; esc leaves once it has ended."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press(*keys.split())
        await screen.until(lambda: isinstance(screen.app.screen, Task) and screen.app.screen.code == 0, "its end")
        assert "all is well" in screen.text or words == "measure"
        assert words in engine.started[-1]
        await screen.press("escape")
        assert screen.place == "history"

    play(script, folder, engine=engine)


def test_nothing_can_be_changed_with_readonly(folder: Path, engine: Engine) -> None:
    """Each key says so."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        for key in "ublLxsGBI":
            before = len(screen.toasts)
            await screen.press(key)
            assert "--readonly" in screen.toasts[-1]
            assert len(screen.toasts) == before + 1

    play(script, folder, engine=engine, readonly=True)


def test_an_empty_store_says_what_comes_next(folder: Path) -> None:
    """Both lists; no key does harm."""

    async def script(screen: Screen) -> None:
        await screen.press("5")
        await screen.until(lambda: "Nothing was done yet" in screen.text, "what comes next")
        await screen.press("v", "b", "d", "y", "x", "s", "enter")
        await screen.shows("Nothing was done yet")
        assert screen.place == "history"

    play(script, folder)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("v down down s y", ["squash", "{first}", "--yes", "--json"]),
        ("I o u t enter y", ["import", "delta", "{folder}/out", "--yes", "--json"]),
    ],
)
def test_what_makes_a_version_is_a_run(folder: Path, engine: Engine, keys: str, words: list[str]) -> None:
    """It is asked about and shown in Run."""
    first = engine.store.versions()[-1].id

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press(*keys.split())
        await screen.until(lambda: screen.place == "run" and not screen.app.runner.going, "the end of the run")
        assert engine.runs[-1] == [word.format(first=first, folder=folder) for word in words]

    play(script, folder, engine=engine)
