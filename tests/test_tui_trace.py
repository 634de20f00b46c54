"""Trace: an edit traced by a child, its heat maps walked in, the traces of each version, the proposed blocks used."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from screens import LANDMARKS, NARROW, WIDE, Screen, play, workspace
from scripted import Engine, traced
from textual.app import App, ComposeResult

from editctl.config import load as load_config
from editctl.metrics.effects import TRACE
from editctl.spec import load
from editctl.tui.dialogs import Pick, Question
from editctl.tui.heatmap import HeatMap, Line
from editctl.tui.tasks import Task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return workspace(tmp_path)


@pytest.fixture
def engine(folder: Path) -> Engine:
    """The tower was traced on the unedited model and on the head, which has it; the whale nowhere."""
    engine = Engine(folder / "store")
    whale, tower, _ = load([Path("specs")])
    engine.store.add_evidence("", TRACE, tower.id, traced(tower, "Paris").to_json())
    version = engine.make(engine.plan_of(tower))
    engine.store.add_evidence(version.id, TRACE, tower.id, traced(tower, "Rome").to_json())
    engine.store.add_evidence(version.id, "other", whale.id, {"not": "a trace"})
    return engine


async def ready(screen: Screen) -> None:
    """In Trace, all read."""
    await screen.press("7")
    await calm(screen)


async def calm(screen: Screen) -> None:
    """Nothing is read any more."""
    await screen.until(lambda: not [w for w in screen.app.workers if w.group == "traces" and not w.is_finished])
    await screen.settle()


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_what_was_traced_at_the_head_is_shown_and_walked_in(
    folder: Path, engine: Engine, size: tuple[int, int]
) -> None:
    """Tokens by blocks, the largest effect chosen at first; each kind; what the cell says; esc leaves step by step."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.shows("The Eiffel Tower is located in → Rome", "total effect 90.6 points", "Tower*", "state")
        await screen.shows("Tower*, block 2: 90.0 points, p 96.2 %", "the output of block 2")
        assert "a trace" not in screen.text, "other evidence is not listed"
        await screen.press("enter", "right", "down")
        await screen.shows("is, block 3: -3.1 points")
        await screen.press("end", "up", "k", "k")
        await screen.shows("The*, block 6: 0.0 points")
        await screen.press("v")
        await screen.shows("what the MLPs of blocks 5 to 6 write")
        await screen.press("v", "home", "l")
        await screen.shows("what the attention of blocks 0 to 2 writes")
        await screen.press("v", "escape")
        await screen.shows("the output of block 1")
        await screen.press("escape")
        assert screen.place == "specs"

    play(script, folder, engine=engine, size=size)


def test_an_edit_is_traced_by_a_child_that_tells_how_far_it_is(folder: Path, engine: Engine) -> None:
    """The one chosen in Specs is offered first; what was found is chosen when it has ended."""

    async def script(screen: Screen) -> None:
        engine.hold = asyncio.Event()
        await screen.press("end")
        await ready(screen)
        await screen.press("t")
        assert isinstance(screen.app.screen, Pick)
        await screen.press("enter")
        await screen.until(lambda: isinstance(screen.app.screen, Task), "the child")
        engine.hold.set()
        await screen.until(lambda: not isinstance(screen.app.screen, Task), "its end")
        await calm(screen)
        await screen.shows("Visitors see Big Ben in → London", "Ben*")
        head = engine.store.view().head
        wanted = ["trace", "specs/landmarks.toml", "--edit", "clock", "--ref", head, "--json"]
        assert engine.started[-1] == wanted
        assert [one.edit for one in engine.store.evidence(head, TRACE)] == ["clock", "tower"]

    play(script, folder, engine=engine)


def test_all_edits_are_traced_once_that_is_confirmed(folder: Path, engine: Engine) -> None:
    """No is what return does; the averages come last, so they are chosen, with their interval and prompts."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("a")
        assert isinstance(screen.app.screen, Question)
        await screen.press("enter")
        assert not engine.started
        await screen.press("a", "y")
        await screen.until(lambda: len(engine.store.evidence()) == 7 and screen.place == "trace", "four more")
        await screen.until(lambda: not isinstance(screen.app.screen, Task), "its end")
        await calm(screen)
        await screen.shows("3 prompts together", "last subject token", "90.0 [90.0, 90.0] points over 3 prompts")

    play(script, folder, engine=engine)


def test_a_trace_that_fails_or_is_cancelled_says_so_and_leaves_no_gap(folder: Path, engine: Engine) -> None:
    """The dialog stays with the child's complaint; esc leaves it."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        file = folder / "specs" / "books.toml"
        text = file.read_text()
        await screen.press("t")
        file.write_text("version = 3\n")
        await screen.press("enter")
        await screen.until(lambda: isinstance(screen.app.screen, Task) and screen.app.screen.code, "its complaint")
        await screen.shows("It was refused.", "1 problem in 1 file")
        await screen.press("escape")
        file.write_text(text)
        engine.hold = asyncio.Event()
        await screen.press("t", "enter")
        await screen.until(lambda: isinstance(screen.app.screen, Task), "the child")
        await screen.press("escape", "y")
        await screen.until(lambda: isinstance(screen.app.screen, Task) and screen.app.screen.code, "its end")
        await screen.shows("Cancelled.")
        await screen.press("escape")
        assert len(engine.store.evidence()) == 3 and not engine.faults

    play(script, folder, engine=engine)


def test_the_proposed_blocks_are_written_once_that_is_confirmed(folder: Path, engine: Engine) -> None:
    """What was set before is shown; comments stay; plans from now on are made with them."""
    Path("editctl.toml").write_text("[settings]\nlayers = [1]  # mine\n")

    async def script(screen: Screen) -> None:
        await screen.press("a")
        await ready(screen)
        await screen.press("w")
        await screen.shows("- layers = [1]", "+ layers = [1, 2, 3]", "whose MLPs restore most")
        await screen.press("enter")
        assert load_config().settings == {"layers": [1]}
        await screen.press("w", "y")
        await screen.until(lambda: load_config().settings == {"layers": [1, 2, 3]}, "the new blocks")
        assert "# mine" in Path("editctl.toml").read_text()
        assert any("Wrote layers = [1, 2, 3] to editctl.toml" in toast for toast in screen.toasts)

        def planned() -> object:
            return screen.app.planned.plan and screen.app.planned.plan.params["layers"]

        await screen.until(lambda: planned() == [1, 2, 3], "the plan made anew")

    play(script, folder, engine=engine)


def test_a_configuration_that_cannot_take_them_is_left_as_it_is(folder: Path, engine: Engine) -> None:
    """The refusal is told."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("w")
        Path("editctl.toml").write_text("[settings\n")
        await screen.press("y")
        await screen.until(lambda: any("not valid" in toast for toast in screen.toasts), "the refusal")
        assert Path("editctl.toml").read_text() == "[settings\n"

    play(script, folder, engine=engine)


def test_the_traces_of_any_version_are_shown(folder: Path, engine: Engine) -> None:
    """The head's at first; by r the unedited model's, where the model said something else."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("r", "down", "enter")
        await calm(screen)
        await screen.shows("→ Paris")
        await screen.press("t", "enter")
        await screen.until(lambda: engine.started, "the child")
        assert engine.started[-1][engine.started[-1].index("--ref") + 1] == "base"
        await screen.until(lambda: not isinstance(screen.app.screen, Task), "its end")
        await screen.press("r", "home", "enter")
        await calm(screen)
        await screen.shows("→ Rome")

    play(script, folder, engine=engine)


def test_a_trace_made_elsewhere_appears(folder: Path, engine: Engine) -> None:
    """Another program's is listed when the store is looked at; the one that was chosen stays."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        (whale,) = [edit for edit in load([Path("specs")]) if edit.id == "whale"]
        engine.store.add_evidence(screen.head, TRACE, "whale", traced(whale, "Herman Melville").to_json())
        screen.app.look()
        await calm(screen)
        await screen.shows("Moby Dick", "→ Rome")

    play(script, folder, engine=engine)


def test_where_nothing_was_traced_the_next_step_is_shown(folder: Path) -> None:
    """And no key does harm; each says why."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.shows(
            "Nothing was traced at base yet.", "t   traces an edit", "Where in the model an answer passes"
        )
        for key in ("enter", "v", "w"):
            await screen.press(key)
            assert "nothing was traced" in screen.toasts[-1].lower()
        assert screen.place == "trace"

    play(script, folder)


def test_without_edits_there_is_nothing_to_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where a spec has a problem, not all can be."""
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path, good=LANDMARKS, bad="version = 1\n[[edit]]\n")

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("a")
        assert "mend it first" in screen.toasts[-1]
        for file in (tmp_path / "specs").iterdir():
            file.unlink()
        screen.app.look()
        await screen.settle()
        await screen.press("t")
        assert "there is no edit to trace" in screen.toasts[-1].lower()

    play(script, tmp_path)


def test_nothing_is_traced_or_written_with_readonly(folder: Path, engine: Engine) -> None:
    """Each key says so; looking goes on."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        for key in "taw":
            await screen.press(key)
            assert "--readonly" in screen.toasts[-1]
        await screen.press("v")
        await screen.shows("what the MLPs of blocks 1 to 3 write")
        assert not engine.started

    play(script, folder, engine=engine, readonly=True)


def test_a_record_that_cannot_be_read_is_told(folder: Path, engine: Engine) -> None:
    """In its row; the others are shown."""
    engine.store.add_evidence(engine.store.view().head, TRACE, "tower", {"tokens": "x"})

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.shows("this is no trace")
        await screen.press("w", "v")
        assert all("this is no trace" in toast.lower() for toast in screen.toasts[-2:])
        await screen.press("down")
        await screen.shows("→ Rome")

    play(script, folder, engine=engine)


# ---------------------------------------------------------------------------------------------------------------------
# The heat map alone


class Alone(App[None]):
    """A heat map and nothing else."""

    def compose(self) -> ComposeResult:
        """The heat map."""
        yield HeatMap()


def of_size(size: tuple[int, int], rows: int, blocks: int, at: tuple[int, int]) -> tuple[list[str], tuple[int, int]]:
    """What is drawn with a cell chosen, and the cell that a click on where it stands chooses."""
    drawn: list[str] = []
    clicked: list[tuple[int, int]] = []

    async def run() -> None:
        app = Alone()
        async with app.run_test(size=size) as pilot:
            heat = app.query_one(HeatMap)
            lines = [
                Line(f"row {row}", [((row * blocks + at) % 97) / 100 for at in range(blocks)]) for row in range(rows)
            ]
            heat.show(lines, 1.0)
            heat.move(*at)
            await pilot.pause()
            drawn.extend(strip.text for strip in app.screen._compositor.render_strips())
            top, left = heat._origin
            place = heat._label + 1 + (heat.block - left) * heat._cell
            heat.move(0, 0)
            heat.move(*at)
            await pilot.click(HeatMap, offset=(place, heat.row - top + 1))
            clicked.append((heat.row, heat.block))

    asyncio.run(run())
    return drawn, clicked[0]


@pytest.mark.parametrize("size", [(80, 10), (30, 5)])
@pytest.mark.parametrize(
    ("rows", "blocks", "at"), [(5, 7, (2, 3)), (40, 7, (39, 6)), (3, 48, (1, 40)), (30, 200, (29, 199))]
)
def test_the_chosen_cell_is_always_in_sight(size: tuple[int, int], rows: int, blocks: int, at: tuple[int, int]) -> None:
    """Whatever the size; nothing is wider than the screen, and the mouse finds the same cell."""
    drawn, clicked = of_size(size, rows, blocks, at)
    assert len(drawn) == size[1] and {len(line) for line in drawn} == {size[0]}
    assert any(line.startswith(f"row {at[0]} ") for line in drawn[1:])
    assert clicked == at


def test_numbers_stand_where_they_have_room() -> None:
    """Points of p under the numbers of blocks; shades where there are too many."""
    drawn, _ = of_size((80, 6), 2, 7, (0, 0))
    assert drawn[0].split() == [str(block) for block in range(7)]
    assert drawn[2].split() == ["row", "1", "7", "8", "9", "10", "11", "12", "13"]
    drawn, _ = of_size((40, 6), 2, 24, (0, 0))
    assert drawn[0].split() == ["0", "5", "10", "15", "20"] and set(drawn[1][6:]) <= set(" ·░▒▓█")
