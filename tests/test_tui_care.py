"""The terminal UI where things go wrong: what was decided is what is done, nothing is lost, every fault is told."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from screens import BOOKS, Screen, play, workspace
from scripted import Engine

from editctl.errors import StoreError
from editctl.tui import desk
from editctl.tui.form import EditForm


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return workspace(tmp_path)


async def look(screen: Screen) -> None:
    """Have the files read anew."""
    screen.app.look()
    await screen.settle()


def test_a_plan_that_is_not_that_of_what_is_staged_is_not_applied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is made anew g says so; what was unstaged a moment ago is not applied."""

    async def script(screen: Screen) -> None:
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned_now)
        make = screen.app._make_plan

        def slowly(*arguments: Any) -> Any:
            time.sleep(0.5)
            return make(*arguments)

        monkeypatch.setattr(screen.app, "_make_plan", slowly)
        await screen.pilot.press("space")
        await screen.pilot.press("g")
        await screen.pilot.pause()
        assert screen.toasts[-1] == "The plan is still being made"
        await screen.until(lambda: screen.app.planned_now)
        await screen.press("g")
        assert "Moby Dick" not in "\n".join(line for line in screen.lines if "│" in line), (
            "the question names the edits"
        )
        await screen.press("y")
        await screen.until(lambda: screen.head)
        assert {edit.id for edit in screen.engine.lives(screen.engine.store.head())} == {"tower", "clock"}

    play(script, folder)


def test_what_is_staged_is_a_fact_not_a_name(folder: Path) -> None:
    """Another program gives the id to another fact: it is not staged any more, and that is said."""

    async def script(screen: Screen) -> None:
        await screen.press("space")
        assert screen.app.staged == {"whale"}
        other = BOOKS.replace("Moby Dick", "Dracula")
        (folder / "specs" / "books.toml").write_text(other, encoding="utf-8")
        await look(screen)
        assert not screen.app.staged
        assert any("no longer staged: Dracula was written by" in toast for toast in screen.toasts)

    play(script, folder)


def test_a_file_that_is_half_written_for_a_moment_loses_no_staging(folder: Path) -> None:
    """What cannot be read cannot be applied; once it can, it is staged as it was."""

    async def script(screen: Screen) -> None:
        await screen.press("a")
        (folder / "specs" / "books.toml").write_text("version =", encoding="utf-8")
        await look(screen)
        assert screen.app.staged == {"tower", "clock"}
        (folder / "specs" / "books.toml").write_text(BOOKS, encoding="utf-8")
        await look(screen)
        assert screen.app.staged == {"whale", "tower", "clock"}

    play(script, folder)


def test_what_was_applied_is_not_staged_again_when_its_file_changes(folder: Path) -> None:
    """Staging ends with the run that did it."""

    async def script(screen: Screen) -> None:
        await screen.press("space", "p")
        await screen.until(lambda: screen.app.planned_now)
        await screen.press("g", "y")
        await screen.until(lambda: screen.app.specs.count(desk.APPLIED) == 1)
        (folder / "specs" / "books.toml").write_text(BOOKS.replace("Jane Austen", "Homer"), encoding="utf-8")
        await look(screen)
        assert screen.app.specs.count(desk.CHANGED) == 1 and not screen.app.staged

    play(script, folder)


def test_saving_a_plan_replaces_no_spec_file_and_asks_before_it_replaces_another(folder: Path) -> None:
    """A slip of the path costs nothing."""

    async def script(screen: Screen) -> None:
        await screen.press("space", "p")
        await screen.until(lambda: screen.app.planned_now)
        await screen.press("s", *"specs/books.toml", "enter")
        assert "spec file" in screen.toasts[-1]
        assert (folder / "specs" / "books.toml").read_text() == BOOKS
        (folder / "a.txt").write_text("mine")
        await screen.press("s", *"a.txt", "enter", "enter")
        assert (folder / "a.txt").read_text() == "mine"
        await screen.press("s", *"a.txt", "enter", "y")
        await screen.until(lambda: (folder / "a.txt").read_text() != "mine")

    play(script, folder)


def test_a_dialog_that_closes_leaves_the_cursor_of_the_plan_where_it_was(folder: Path) -> None:
    """What the palette does next is about the same edit."""

    async def script(screen: Screen) -> None:
        await screen.press("space", "p", "end")
        place = screen.app.screen
        before = place.chosen.key
        assert before not in screen.app.staged
        await screen.press("question_mark", "escape")
        assert place.chosen.key == before

    play(script, folder)


def test_a_log_folder_that_cannot_be_written_is_a_message(folder: Path) -> None:
    """Neither asking nor running ends the UI, and once it can be written both work."""

    async def script(screen: Screen) -> None:
        (folder / "logs").write_text("a file")
        await screen.press("space", "p")
        await screen.until(lambda: "cannot be started" in screen.text, "the reason why nothing is asked")
        await screen.until(lambda: screen.app.planned_now)
        await screen.press("g", "y")
        await screen.until(lambda: any("cannot be started" in toast for toast in screen.toasts), "a message")
        assert not screen.app.runner.going
        (folder / "logs").unlink()
        await screen.press("2", "n")
        await screen.until(lambda: "90.0 %" in screen.text)
        await screen.press("g", "y")
        await screen.until(lambda: screen.head, "a version")

    play(script, folder)


def test_a_fault_of_ours_in_a_form_is_told_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, with the log that tells more; the form is there as it was."""
    from editctl import amend

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    async def script(screen: Screen) -> None:
        await screen.press("enter")
        await screen.until(lambda: isinstance(screen.app.screen, EditForm))
        await screen.press("tab", "end", *"X")
        monkeypatch.setattr(amend, "save", fail)
        await screen.press("ctrl+s")
        await screen.until(lambda: any("RuntimeError: planted" in toast for toast in screen.toasts), "the fault")
        assert isinstance(screen.app.screen, EditForm)
        assert list((folder / "logs").glob("*fault*"))

    play(script, folder)


def test_leaving_with_a_form_that_is_not_saved_asks(folder: Path) -> None:
    """Also by the key that Textual has for it everywhere."""

    async def script(screen: Screen) -> None:
        await screen.press("enter")
        await screen.until(lambda: isinstance(screen.app.screen, EditForm))
        await screen.press(*"X", "ctrl+q")
        await screen.shows("The form has what is not saved")
        await screen.press("n")
        assert isinstance(screen.app.screen, EditForm) and screen.app.is_running

    play(script, folder)


def test_an_operation_of_another_program_that_is_not_shown_yet_is_not_undone(folder: Path) -> None:
    """u takes back what one sees; two presses of one's own take back two."""
    engine = Engine(folder / "store")

    async def script(screen: Screen) -> None:
        edits = [item.edit for item in screen.app.specs.items]
        for edit in edits[:2]:
            engine.make(engine.plan_of(edit))
        await look(screen)
        engine.make(engine.plan_of(edits[2]))
        head = screen.head
        await screen.press("u")
        assert "another program changed the store" in screen.toasts[-1] and screen.head == head
        await look(screen)
        await screen.pilot.press("u", "u")
        await screen.until(lambda: [op.verb for op in engine.store.operations(2)] == ["undo", "undo"])

    play(script, folder, engine=engine)


def test_a_store_that_cannot_be_read_for_a_moment_is_not_taken_for_an_empty_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was known stays, the trouble is told, nothing can be applied; the next look mends it."""
    engine = Engine(folder / "store")
    read = desk.read_past

    def fail(*_: object) -> None:
        raise StoreError("the store's database is busy", "close that program and try again")

    async def script(screen: Screen) -> None:
        engine.make(engine.plan_of(screen.app.specs.items[0].edit))
        await look(screen)
        head = screen.app.past.head
        monkeypatch.setattr(desk, "read_past", fail)
        engine.make(engine.plan_of(screen.app.specs.items[1].edit))
        await look(screen)
        (folder / "specs" / "more.toml").write_text(BOOKS.replace("whale", "wail").replace("Moby", "Mobile"))
        await look(screen)
        assert screen.app.past.head == head and "database is busy" in screen.lines[1]
        await screen.press("end", "space", "p", "g")
        assert "database is busy" in screen.toasts[-1]
        monkeypatch.setattr(desk, "read_past", read)
        await look(screen)
        assert screen.app.past.head != head and "busy" not in screen.lines[1]

    play(script, folder, engine=engine)


def test_an_editor_that_is_not_there_is_a_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that cannot be read as a command; during a run the editor waits."""

    async def script(screen: Screen) -> None:
        for editor, told in (("/nonexistent/editor", "There is no program"), ("emacs 'x", "cannot be read")):
            monkeypatch.setenv("EDITOR", editor)
            await screen.press("e")
            assert told in screen.toasts[-1]
        screen.engine.hold = asyncio.Event()
        await screen.press("space", "p")
        await screen.until(lambda: screen.app.planned_now)
        await screen.press("g", "y")
        await screen.until(lambda: screen.app.runner.going)
        await screen.press("1", "e")
        assert "a run is going on" in screen.toasts[-1].casefold()

    monkeypatch.delenv("VISUAL", raising=False)
    play(script, folder)


def test_a_run_that_is_cancelled_before_its_process_is_there_makes_nothing(folder: Path) -> None:
    """And a second one does not begin beside it."""
    engine = Engine(folder / "store")
    launch = engine.launch

    async def slowly(arguments: Any, log: Any) -> Any:
        if "--stdin" not in arguments:
            await asyncio.sleep(2.5)
        return await launch(arguments, log)

    engine.launch = slowly  # type: ignore[method-assign]

    async def script(screen: Screen) -> None:
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned_now)
        await screen.pilot.press("g", "y")
        await screen.until(lambda: screen.app.runner.going)
        await screen.pilot.press("2", "g")
        assert "a run is going on" in screen.toasts[-1].casefold()
        await screen.pilot.press("3", "escape", "y")
        await screen.until(lambda: not screen.app.runner.going)
        assert engine.store.versions() == [] and len(engine.runs) == 1

    play(script, folder, engine=engine)
