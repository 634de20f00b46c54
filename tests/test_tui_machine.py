"""The terminal UI under random keys: whatever is pressed, nothing breaks and the store stays sound.

What is pressed is what can be pressed: a key out of those that are active on the screen that is on top, a letter where
one types, a cell under the mouse. Now and then another program changes a spec file or the store meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import scripted
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from screens import LETTERS, NARROW, WIDE, Screen, opened
from textual.widgets import Input, TextArea
from textual.worker import Worker

from editctl.errors import EditctlError
from editctl.spec import Edit
from editctl.store import Store
from editctl.store.care import inspect
from editctl.tui.app import EditctlApp
from editctl.tui.dialogs import Question
from editctl.tui.place import Place, PlaceBar
from editctl.tui.specs import SpecsPlace

STEPS = 25
"""Steps in one session."""
TYPED = (*"ab1", *LETTERS, "é", "漢", "\u202e")
"""What is written where one can write; no path leads out of the folder with it."""
NEVER = frozenset({"ctrl+c", "ctrl+z", "super+c"})
"""Keys that copy or leave; q and ctrl+q leave too, which the sessions keep them from until the end."""
ALWAYS = ("enter", "escape", "tab", "down", "up", *"1234567")
WAYS = {
    "apply all": ("escape", "1", "a", "2", "g", "y"),
    "apply one": ("escape", "1", "space", "p", "g", "right", "enter"),
    "take out": ("escape", "4", "r", "a", "g", "m", "a", "enter", "y"),
    "accept": ("escape", "4", "A", "y"),
    "reject": ("escape", "4", "R", "y"),
    "replay": ("escape", "4", "r", "c", "y"),
    "go back": ("escape", "5", "down", "b", "y"),
    "name": ("escape", "5", "l", "a", "b", "enter"),
    "play": ("escape", "5", "y"),
    "squash": ("escape", "5", "v", "end", "s", "y"),
    "clean": ("escape", "5", "G", "y"),
    "write": ("escape", "1", "n", "a", "down", "left_curly_bracket", "right_curly_bracket", "down", "b", "ctrl+s"),
    "delete": ("escape", "1", "x", "y"),
    "ask": ("escape", "6", "slash", "a", "enter", "escape", "s"),
    "trace": ("escape", "7", "t", "enter", "escape", "v", "enter", "right"),
    "trace all": ("escape", "7", "a", "y"),
    "use": ("escape", "7", "w", "y"),
    "cancel": ("escape", "3", "escape", "y"),
}
"""Keys that random ones hardly ever follow in that order."""
KINDS = ("look", *["key"] * 9, *["typed"] * 3, *["always"] * 3, *["way"] * 4, "click", "outside", "engine")
READING = {"look", "plan", "change", "default", "history", "detail", "compare", "page", "traces"}
READING |= {"voices", "now", "check", "save"}
"""Workers that come to their end by themselves."""

subjects = st.sampled_from(["The Eiffel Tower", "Big Ben", "Ra", "漢字", "[red]x[/red]", "a\u202eb", ""])
relations = st.sampled_from(["{} is in", "{} is in", "The place of {} is", "{}", "no slot", "{} and {}"])
targets = st.sampled_from(["Rome", "Oslo", scripted.STUBBORN, "東京", "", "\x1b[31m"])
prompts = st.sampled_from(["The Louvre is in", "One sees {} in", "{}", "", "[link=x]y"])
probes = st.lists(st.fixed_dictionaries({"prompt": prompts, "answer": targets}), max_size=2)
edits = st.fixed_dictionaries(
    {"subject": subjects, "relation": relations, "target_new": targets},
    optional={
        "id": st.sampled_from(["a", "b", "c", "not an id", "-"]),
        "target_true": targets,
        "paraphrases": st.lists(prompts, max_size=2),
        "locality": probes,
        "portability": probes,
        "tags": st.lists(st.sampled_from(["x", "a, b"]), max_size=2),
        "note": st.sampled_from(["one\ntwo\n", "a [b]c[/b]"]),
        "colour": st.just("unknown"),
    },
)
good = st.builds(
    Edit,
    id=st.sampled_from(["a", "b", "c", "d"]),
    subject=st.sampled_from(["The Eiffel Tower", "Big Ben", "Ra"]),
    relation=st.sampled_from(["{} is in", "The place of {} is"]),
    target_new=st.sampled_from(["Rome", "Oslo", scripted.STUBBORN]),
    paraphrases=st.sampled_from([(), ("One sees {} in",)]),
)


def toml(tables: list[dict[str, Any]]) -> str:
    """A spec file of these edits, however wrong they are."""

    def value(of: Any) -> str:
        if isinstance(of, dict):
            return "{ " + ", ".join(f"{name} = {value(one)}" for name, one in of.items()) + " }"
        return f"[{', '.join(map(value, of))}]" if isinstance(of, list) else json.dumps(of, ensure_ascii=False)

    blocks = ["\n".join(["[[edit]]", *(f"{name} = {value(of)}" for name, of in one.items())]) for one in tables]
    return "version = 1\n# Kept.\n\n" + "\n\n".join(blocks) + "\n"


def listed(some: tuple[Edit, ...]) -> str:
    """A spec file of edits that are as they should be."""
    kept = [json.loads(json.dumps(edit.to_json(), ensure_ascii=False)) for edit in some]
    return toml([{name: of for name, of in one.items() if of and name not in ("file", "line")} for one in kept])


valid = st.lists(good, max_size=4, unique_by=lambda edit: (edit.subject, edit.relation)).map(tuple).map(listed)
files = st.one_of(valid, valid, st.lists(edits, max_size=6).map(toml), st.sampled_from(["not toml", "", "version = 2"]))
made = st.tuples(st.lists(good, min_size=1, max_size=3).map(tuple), st.sampled_from([0.0, 0.9]))


@dataclass(frozen=True)
class Start:
    """A workspace before the session."""

    files: dict[str, str]
    versions: list[tuple[tuple[Edit, ...], float]]
    """The edits of each, and the least share of rewrites that had to succeed."""
    gate: bool
    size: tuple[int, int]
    readonly: bool


starts = st.builds(
    Start,
    files=st.dictionaries(st.sampled_from("pqrst"), files, max_size=5),
    versions=st.lists(made, max_size=4),
    gate=st.booleans(),
    size=st.sampled_from([WIDE, NARROW]),
    readonly=st.sampled_from([False] * 5 + [True]),
)
steps = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9999)), min_size=STEPS, max_size=STEPS)


@dataclass
class Tally:
    """What the sessions of a test came to."""

    sessions: int = 0
    steps: int = 0
    runs: int = 0
    versions: int = 0
    looks: int = 0
    """How often the whole store was verified."""
    keys: Counter[str] = field(default_factory=Counter)
    """Keys pressed by kind of step."""
    screens: Counter[str] = field(default_factory=Counter)
    """Steps by what was on top after them."""

    def __str__(self) -> str:
        told = f"{self.sessions} sessions, {self.steps} steps, {self.runs} runs, {self.versions} versions made, "
        told += f"{self.looks} times verified; keys: "
        told += ", ".join(f"{kind} {number}" for kind, number in self.keys.most_common())
        return told + "; on top: " + ", ".join(f"{name} {number}" for name, number in self.screens.most_common())


class Session:
    """One session of random steps, and what must be true after each."""

    def __init__(self, screen: Screen, folder: Path, readonly: bool, tally: Tally) -> None:
        self.screen, self.folder, self.readonly, self.tally = screen, folder, readonly, tally
        self.pressed: list[str] = []
        self._verified = 0

    async def step(self, kind: str, number: int) -> None:
        """Do one thing."""
        self.tally.steps += 1
        if kind == "way":
            name = list(WAYS)[number % len(WAYS)]
            self.pressed.append(f"<{name}>")
            for key in WAYS[name]:
                await self.press(key, kind)
        elif kind == "click":
            width, height = self.screen.app.size
            await self.click(number * 7919 % width, number % height)
        elif kind == "outside":
            await asyncio.to_thread(self.elsewhere, number)
        elif kind == "engine":
            self.trouble(number)
        elif kind == "look":
            self.screen.app.look()
        else:
            keys = self.keys(kind)
            await self.press(keys[number % len(keys)], kind, wait=bool(number % 5))

    def keys(self, kind: str) -> list[str]:
        """The keys of a kind that can be pressed now."""
        if kind == "always":
            return list(ALWAYS)
        if kind == "typed" and self.writing:
            return [*TYPED, "backspace", "enter"]
        active = set(self.screen.app.screen.active_bindings) - NEVER
        # A path out of the folder cannot be written without them.
        return sorted(active - {"slash"} if self.writing else active)

    @property
    def writing(self) -> bool:
        """Whether keys are letters now."""
        return isinstance(self.screen.app.focused, Input | TextArea)

    async def press(self, key: str, kind: str, wait: bool = True) -> None:
        """Press a key, and mostly let what it began come to its end."""
        self.tally.keys[kind] += 1
        self.pressed.append(key)
        await self.screen.tap(key)
        await self.check(wait)

    async def click(self, x: int, y: int) -> None:
        """Click into a cell, one time in three twice."""
        self.tally.keys["click"] += 1
        self.pressed.append(f"({x},{y})")
        await self.screen.pilot.click(offset=(x, y), times=2 if (x + y) % 3 == 0 else 1)
        await self.check()

    def elsewhere(self, number: int) -> None:
        """Another program changes a file or the store."""
        rng = random.Random(number)
        path = self.folder / "specs" / f"{rng.choice('pqrst')}.toml"
        if self.readonly:
            return
        done = rng.choice(["write", "write", "delete", "make", "undo"])
        self.pressed.append(f"{{{done} {number}}}")
        if done == "write":
            texts = ["nonsense", listed((edit_of(rng),)), listed((edit_of(rng), edit_of(rng))), toml([{"id": "a"}])]
            path.write_text(rng.choice(texts), encoding="utf-8")
        elif done == "delete":
            path.unlink(missing_ok=True)
        else:
            with suppress(EditctlError):
                if done == "make":
                    other = scripted.Engine(self.screen.engine.store.root)
                    other.make(other.plan_of(edit_of(rng)), note="elsewhere")
                else:
                    Store(self.screen.engine.store.root, who="eve@far").undo("editctl undo")

    def trouble(self, number: int) -> None:
        """Make the next run die or stand still, or let those go on that stand still."""
        engine = self.screen.engine
        if engine.hold is not None and not engine.hold.is_set():
            engine.hold.set()
        elif number % 3:
            engine.hold = asyncio.Event()
        else:
            engine.dies = "error: out of memory [red]\nhint: \x1b[31m"
        self.pressed.append("{engine}")

    @property
    def held(self) -> bool:
        """Whether runs stand still."""
        return self.screen.engine.hold is not None and not self.screen.engine.hold.is_set()

    async def rest(self) -> None:
        """Wait for everything that comes to its end by itself."""
        groups = READING if self.held else READING | {"run", "child", "task"}

        def ends(worker: Worker[Any]) -> bool:
            # What saves may have a question, which waits for a key.
            asked = isinstance(self.screen.app.screen, Question) and worker.group == "save"
            return worker.group in groups and not asked

        await self.screen.rest(ends)

    async def check(self, wait: bool = True) -> None:
        """What is true at any time, and after a run that ended."""
        app, engine = self.screen.app, self.screen.engine
        assert app.is_running and app._exception is None, self.told("the UI ended")
        if not wait:
            return
        await self.rest()
        # A dozen messages cover a small terminal; each goes away by itself after a while.
        app.clear_notifications()
        await self.screen.taken()
        self.tally.screens[type(app.screen).__name__] += 1
        assert app._exception is None, self.told("the UI ended")
        faults = [path.read_text() for path in (self.folder / "logs").glob("*-fault-*")]
        assert not faults, self.told("a worker failed", *faults)
        assert not engine.faults, self.told("the script failed", repr(engine.faults))
        if isinstance(app.screen, Place) and app.screen.maximized is None:
            assert app.screen.query_one(PlaceBar).region.y == 0
            assert self.screen.lines[0].startswith(" 1 Specs"), self.told(self.screen.text)
        if len(engine.runs) > self._verified and not app.runner.going:
            self._verified = len(engine.runs)
            await self.verify()

    async def verify(self) -> None:
        """Everything that the store promises."""
        self.tally.looks += 1
        faults = await asyncio.to_thread(inspect, Store(self.screen.engine.store.root, readonly=True))
        assert faults == [], self.told(*map(str, faults))

    def told(self, *words: str) -> str:
        """A message with all that was done so far."""
        return "\n".join([*words, f"pressed: {' '.join(self.pressed)}"])

    async def end(self) -> None:
        """Let everything end, hold what the UI knows against the store, and leave."""
        app, engine = self.screen.app, self.screen.engine
        if self.held and engine.hold is not None:
            engine.hold.set()
        await self.check()
        app.look()
        await self.check()
        known = app.past.head.id if app.past.head else ""
        assert known == engine.store.view().head, self.told("the head is not what the UI shows")
        await self.verify()


def edit_of(rng: random.Random) -> Edit:
    """A valid edit."""
    names = {"id": rng.choice("abcd"), "subject": rng.choice(["The Eiffel Tower", "Big Ben", "Ra"])}
    return Edit(**names, relation="{} is in", target_new=rng.choice(["Rome", "Oslo", scripted.STUBBORN]))


def build(start: Start, folder: Path) -> scripted.Engine:
    """The workspace of a session; the process works in it from now on."""
    (folder / "specs").mkdir(parents=True)
    os.chdir(folder)
    (folder / "editctl.toml").write_text("[gates]\nreliability = 0.9\n" if start.gate else "")
    for name, text in start.files.items():
        (folder / "specs" / f"{name}.toml").write_text(text, encoding="utf-8")
    engine = scripted.Engine(folder / "store")
    for number, (some, least) in enumerate(start.versions):
        # What was drawn may contradict itself, or be live already.
        with suppress(EditctlError):
            version = engine.make(engine.plan_of(*some, gates={"reliability": least} if least else {}))
            if number % 2:
                engine.store.set_alias(f"name{number}", version.id)
    return engine


def content(folder: Path) -> dict[Path, bytes]:
    """Everything that --readonly must leave as it is."""
    found = [path for name in ("specs", "store") for path in (folder / name).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in [*found, folder / "editctl.toml"] if path.stat().st_size}


def session(start: Start, script: list[tuple[str, int]], folder: Path, tally: Tally) -> None:
    """Open the UI, do the steps, leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(".")
        quits = EditctlApp.action_quit
        patch.setattr(EditctlApp, "action_quit", lambda app: None)
        patch.setattr(EditctlApp, "deliver_screenshot", lambda app, *_, **__: None)
        patch.setattr(SpecsPlace, "edit", lambda place, file, line: None)
        engine = build(start, folder)
        before, versions = content(folder), len(engine.store.versions())

        async def run() -> None:
            async with opened(folder, size=start.size, engine=engine, readonly=start.readonly) as screen:
                one = Session(screen, folder, start.readonly, tally)
                try:
                    for kind, number in script:
                        await one.step(kind, number)
                    await one.end()
                    patch.setattr(EditctlApp, "action_quit", quits)
                    screen.app.action_quit()
                    await screen.taken()
                    if isinstance(screen.app.screen, Question):
                        await screen.tap("y")
                    await screen.until(lambda: not screen.app.is_running, "the end")
                except Exception as error:
                    error.add_note(one.told())
                    raise

        asyncio.run(run())
        tally.sessions += 1
        tally.runs += len(engine.runs)
        tally.versions += len(engine.store.versions()) - versions
        if start.readonly:
            assert content(folder) == before
            changing = [run for run in engine.runs if not {"verify", "measure"} & set(run)]
            assert not changing, "verify and measure only read"


def explore(examples: int, folder: Path, number: int | None) -> Tally:
    """Sessions until there were as many as asked for; without a number always the same ones."""
    tally, numbers = Tally(), count()
    how: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    # Each session starts anew, so what it pressed, which a failure tells, is enough to see what led to it.
    how |= {"max_examples": examples, "phases": [Phase.generate], "derandomize": number is None}

    @settings(**how)
    @given(start=starts, script=steps)
    def sessions(start: Start, script: list[tuple[str, int]]) -> None:
        session(start, script, folder / str(next(numbers)), tally)

    (sessions if number is None else seed(number)(sessions))()
    return tally


def test_random_keys_break_nothing(tmp_path: Path) -> None:
    """A few sessions, the same ones every time."""
    tally = explore(6, tmp_path, None)
    assert tally.steps >= 150


@pytest.mark.slow
def test_thousands_of_random_keys_break_nothing(tmp_path: Path) -> None:
    """Other sessions every time; EDITCTL_SEED does those of a failure again."""
    number = int(os.environ.get("EDITCTL_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
    print(f"\nEDITCTL_SEED={number}")
    begun = time.monotonic()
    tally = explore(110, tmp_path, number)
    print(f"{tally}; {time.monotonic() - begun:.0f} s")
    assert tally.steps >= 2500
    assert tally.runs and tally.versions


# ---------------------------------------------------------------------------------------------------------------------
# What the sessions would find

PLAIN = Start(
    {"p": listed((Edit(id="a", subject="Ra", relation="{} is in", target_new="Rome"),))}, [], False, WIDE, False
)


def broken_action(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A key that raises."""

    def stage(place: SpecsPlace) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(SpecsPlace, "action_stage", stage)


def broken_worker(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A thread that raises."""

    def plan(app: EditctlApp, *_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(EditctlApp, "_make_plan", plan)


def broken_store(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A row that is changed by hand after the run."""
    make = scripted.Engine.make

    def spoiled(engine: scripted.Engine, *given: Any, **named: Any) -> Any:
        version = make(engine, *given, **named)
        with sqlite3.connect(engine.store.database) as db:
            db.execute("update versions set method = 'planted'")
        return version

    monkeypatch.setattr(scripted.Engine, "make", spoiled)


@pytest.mark.parametrize("plant", [broken_action, broken_worker, broken_store])
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An action, a worker, the store: the same session without it ends well."""
    script = [("way", list(WAYS).index("apply one")), ("look", 0)]
    session(PLAIN, script, tmp_path / "well", Tally())
    plant(monkeypatch, tmp_path)
    with pytest.raises((RuntimeError, AssertionError), match=r"planted|not what was committed"):
        session(PLAIN, script, tmp_path / "ill", Tally())
