"""Pictures of every place at 120 × 36 and 80 × 24; the same that docs/tui.md shows.

`EDITCTL_REWRITE=1 pytest tests/test_tui_pictures.py` draws them anew: look at each before it is kept.
"""

from __future__ import annotations

import asyncio
import difflib
import html
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from screens import NARROW, WIDE, Screen, play
from scripted import STUBBORN, Engine

from editctl import spec
from editctl.tui import runner

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "tui"
SIZES = {"120x36": WIDE, "80x24": NARROW}
Draw = Callable[[Screen], Awaitable[None]]


class Clock:
    """Noon, and a minute more each time it is asked."""

    def __init__(self) -> None:
        self._now = datetime(2026, 8, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        self._now += timedelta(minutes=1)
        return self._now


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped specs, and a clock that stands still for runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 7.0))
    shutil.copytree(ROOT / "specs", tmp_path / "specs")
    return tmp_path


def history(folder: Path) -> Engine:
    """A store with a few versions, one of them a candidate, and an undo."""
    engine = Engine(folder / "store", Clock())
    edits = {edit.id: edit for edit in spec.load([Path("specs")])}
    names = list(edits)
    engine.make(engine.plan_of(*(edits[name] for name in names[:8])), note="The removals of spring")
    engine.make(engine.plan_of(*(edits[name] for name in names[8:12])))
    engine.store.set_alias("stable", "@", "editctl alias stable")
    engine.store.undo("editctl undo")
    engine.make(engine.plan_of(*(edits[name] for name in names[16:20])), note="Books, corrected")
    stubborn = edits[names[20]].model_copy(update={"target_new": STUBBORN})
    engine.make(engine.plan_of(stubborn, *(edits[name] for name in names[21:24]), gates={"reliability": 0.99}))
    return engine


async def nothing(screen: Screen) -> None:
    """As it opens."""


async def wrong(screen: Screen) -> None:
    """A file gets a problem while it is looked at."""
    file = Path("specs") / "library.toml"
    file.write_text(file.read_text().replace("{} is a book", "It is a book"), encoding="utf-8")
    screen.app.look()
    await screen.until(lambda: screen.app.specs.problems)
    await screen.press("slash", *"invalid", "enter")


async def form(screen: Screen) -> None:
    """An edit in the form, its target taken away."""
    await screen.press("slash", *"eiffel", "enter", "enter")
    await screen.until(lambda: len(screen.app.screen_stack) > 1)
    await screen.pilot.pause(0.5)


async def imported(screen: Screen) -> None:
    """A benchmark's file, read; one record names no subject, one contradicts another."""
    facts = [("Danielle Darrieux", "English"), ("Toko Yasuda", "Dutch"), ("Danielle Darrieux", "Danish")]
    records = [
        {
            "case_id": at,
            "prompt": f"The mother tongue of {subject if at != 1 else 'that singer'} is",
            "subject": subject,
            "target_new": new,
            "ground_truth": "French",
            "rephrase_prompt": f"{subject}, a native",
            "locality_prompt": "Henri Barbusse spoke",
        }
        for at, (subject, new) in enumerate(facts)
    ]
    Path("counterfact.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    await screen.press("i", *"counterfact.json", "enter")
    await screen.shows("1 of 3 records", "record 2")


async def planned(screen: Screen) -> None:
    """Two edits staged, the model asked what it says now."""
    await screen.press("slash", *"taj", "enter", "space", "escape", "down", "space", "p")
    await screen.until(lambda: "90.0 %" in screen.text)


async def question(screen: Screen) -> None:
    """The question before a run."""
    await planned(screen)
    await screen.press("g")
    await screen.pilot.pause()


async def running(screen: Screen) -> None:
    """In the middle of a run."""
    screen.engine.hold = asyncio.Event()
    await planned(screen)
    await screen.press("g", "y")
    await screen.until(lambda: screen.app.runner.run and screen.app.runner.run.course.step > 10)
    await screen.until(lambda: "loss" in screen.text)


async def review(screen: Screen) -> None:
    """A candidate, one edit marked."""
    await screen.press("4")
    await screen.until(lambda: "reliability" in screen.text)
    await screen.press("r", "up")
    await screen.pilot.pause(0.2)


async def operations(screen: Screen) -> None:
    """What was done."""
    await screen.press("5")
    await screen.until(lambda: "operation 6" in screen.text)


async def versions(screen: Screen) -> None:
    """What was made, as a graph."""
    await operations(screen)
    await screen.press("v", "down")
    await screen.until(lambda: "version " in screen.text and "parent" in screen.text)


async def difference(screen: Screen) -> None:
    """Two versions compared."""
    await versions(screen)
    await screen.press("d")
    await screen.until(lambda: len(screen.app.screen_stack) > 1)
    await screen.pilot.pause(0.2)


async def asked(screen: Screen) -> None:
    """One prompt, base and head side by side."""
    await screen.press("6", *"Everyone knows that the Eiffel Tower is in".replace(" ", "\0").split("\0")[0])
    for word in ["knows", "that", "the", "Eiffel", "Tower", "is", "in"]:
        await screen.press("space", *word)
    await screen.press("enter")
    await screen.until(lambda: screen.text.count("75") >= 2)


async def traced(screen: Screen) -> None:
    """An edit traced, a cell of the MLPs' heat map chosen."""
    await screen.press("slash", *"eiffel", "enter", "7", "t", "enter")
    await screen.until(lambda: "Tower*" in screen.text and len(screen.app.screen_stack) == 1)
    await screen.press("v", "enter", "right")
    await screen.until(lambda: "block 3" in screen.text)


async def averaged(screen: Screen) -> None:
    """All edits traced, what they add up to."""
    await screen.press("7", "a", "y")
    await screen.until(lambda: "together" in screen.text and len(screen.app.screen_stack) == 1)


async def keys(screen: Screen) -> None:
    """What ? shows."""
    await screen.press("question_mark")
    await screen.pilot.pause()


DRAWN: dict[str, tuple[Draw, bool]] = {
    "specs": (nothing, True),
    "problems": (wrong, True),
    "form": (form, True),
    "import": (imported, True),
    "plan": (planned, True),
    "question": (question, True),
    "run": (running, True),
    "review": (review, True),
    "history": (operations, True),
    "versions": (versions, True),
    "diff": (difference, True),
    "ask": (asked, True),
    "trace": (traced, True),
    "averages": (averaged, True),
    "keys": (keys, True),
    "first": (nothing, False),
}
"""By name: what is done before the picture is taken, and whether there is anything in the workspace."""


def words(svg: str) -> list[str]:
    """What can be read in a picture, line by line as far as it tells."""
    return [html.unescape(text).replace("\xa0", " ") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DRAWN)
def test_a_place_looks_as_its_picture(name: str, size: str, folder: Path) -> None:
    """To the last cell and colour."""
    draw, filled = DRAWN[name]
    if not filled:
        shutil.rmtree(folder / "specs")
    drawn = []

    async def script(screen: Screen) -> None:
        await draw(screen)
        screen.app.clear_notifications()
        await screen.pilot.pause(0.1)
        drawn.append(screen.app.export_screenshot(title="editctl", simplify=True))

    play(script, folder, size=SIZES[size], engine=history(folder) if filled else Engine(folder / "store"))
    kept = PICTURES / f"{name}-{size}.svg"
    if os.environ.get("EDITCTL_REWRITE"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(drawn[0], encoding="utf-8")
    expected = kept.read_text(encoding="utf-8") if kept.exists() else ""
    if drawn[0] != expected:
        told = difflib.unified_diff(words(expected), words(drawn[0]), str(kept), "now", lineterm="", n=0)
        pytest.fail("\n".join([*list(told)[:60], "EDITCTL_REWRITE=1 draws it anew"]))


def test_every_picture_is_drawn_here_and_shown_on_the_page() -> None:
    """None is left over, none is hidden."""
    files = {path.name for path in PICTURES.glob("*.svg")}
    page = (ROOT / "docs" / "tui.md").read_text(encoding="utf-8")
    assert files == {f"{name}-{size}.svg" for name in DRAWN for size in SIZES}
    assert {name for name in files if f"tui/{name}" not in page} == set()


def test_a_changed_cell_is_seen() -> None:
    """Control: one letter more in a picture, and its words differ."""
    svg = (PICTURES / "specs-120x36.svg").read_text(encoding="utf-8")
    assert words(svg) != words(svg.replace("Specs", "Specks", 1)) and len(words(svg)) > 30
