"""Hostile text in the terminal UI: whatever specs, models, stores, logs and other processes say is shown literally.

Markup is Textual's own, which could colour, link and run actions; escape sequences would reach the terminal; direction
overrides would show another text than the one that is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripted
import tomlkit
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text
from screens import NARROW, WIDE, Screen, opened, play
from textual.app import App
from textual.content import Content

from editctl.errors import EditctlError
from editctl.metrics import effects
from editctl.metrics.edits import Question as Asking
from editctl.spec import Edit, Probe, visible
from editctl.store import Draft, Store, Version
from editctl.tui.dialogs import Line, Pick, Question, Viewer
from editctl.tui.place import Pane, Place
from editctl.tui.rows import RowList, fit
from editctl.tui.specs import SpecsPlace

SAMPLES = Path(os.environ.get("EDITCTL_SAMPLES", Path(__file__).parents[1] / "../shared/data")) / "malformed"
# The narrow screen shows a part of what the wide one does, from the same views.
SIZES = [WIDE, pytest.param(NARROW, marks=pytest.mark.slow)]
MARKUP = "[red]{}[/red][@click=app.quit]q[/][link=https://e.vil]z[/link]漢\\[b]"
"""What a valid field may hold."""
RAW = "\x1b[31m{}\u202e[red]z[/red]\x1b]8;;https://e.vil\x07w\x1b[0m\x9b2J\u200b\r\x08"
"""What no valid field may hold."""
OPEN = {"form", "ask", "apply", "review", "question", "pick", "cancel", "quit", "leave", "run", "child"}
"""Workers that wait for a person or a run."""
SCROLLS = {"grab", "scroll_down", "scroll_up", "scroll_left", "scroll_right", "release"}
"""What the mouse does on a scroll bar."""
LONG = "Llanfair" * 60


def marked(mark: str) -> str:
    """Markup around a mark."""
    return MARKUP.format(mark)


def raw(mark: str) -> str:
    """Escape sequences and a direction override around a mark."""
    return RAW.format(mark)


def shown(mark: str) -> tuple[str, str]:
    """How the beginnings of `marked` and `raw` must stand on the screen."""
    return f"[red]{mark}[/red]", f"\\x1b[31m{mark}\\u202e"


def edit_of(make: Callable[[str], str], name: str) -> Edit:
    """An edit with hostile text in every field, each with a mark of its own."""
    return Edit(
        id=name,
        subject=make(f"{name}S"),
        relation="{} is " + make(f"{name}R"),
        target_new=make(f"{name}N"),
        target_true=make(f"{name}T"),
        paraphrases=("They say {} is " + make(f"{name}P"),),
        locality=(Probe(prompt=make(f"{name}L"), answer=(make(f"{name}A"),)),),
        portability=(Probe(prompt=make(f"{name}Q") + " {}", answer=(make(f"{name}B"),), kind=make(f"{name}K")),),
        tags=(make(f"{name}G"),),
        source=make(f"{name}U"),
        note=make(f"{name}O") + "\nsecond\n",
    )


def table_of(edit: Edit) -> str:
    """The edit in a spec file."""
    fields = {name: value for name, value in edit.to_json().items() if value and name not in ("file", "line")}
    return str(tomlkit.dumps({"edit": [fields]}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose folder, spec files and store have hostile names."""
    root = tmp_path / "[b]w[/b]"
    (root / "specs").mkdir(parents=True)
    monkeypatch.chdir(root)
    (root / "editctl.toml").write_text("store = '[red]store[/red]'\n")
    bad = table_of(edit_of(raw, "bad"))
    assert "\x1b" not in bad
    (root / "specs" / "[red]f.toml").write_text("version = 1\n" + table_of(edit_of(marked, "good")))
    (root / "specs" / "\x1b[31mg\u202e.toml").write_text("version = 1\n" + bad)
    (root / "specs" / "h.toml").write_text(f"version = 1\n'{marked('key')}' = 1\n[[edit]]\n'{marked('field')}' = 2\n")
    (root / "specs" / "i.toml").write_text(f"{marked('toml')}\x1b[31m")
    return root


class Foreign(Store):
    """A store that another program filled: what no edit of ours would hold is in its records."""

    def commit(self, draft: Draft, **named: Any) -> Version:
        """The draft with hostile words in what is no edit."""
        said = [json.loads(line) for line in draft.events]
        for one in said:
            one |= {name: raw("event") for name in ("model", "device", "method") if name in one}
        draft = replace(
            draft,
            model=raw("model"),
            dtype=raw("dtype"),
            method=raw("method"),
            params={**draft.params, raw("param"): raw("value")},
            libraries={raw("library"): raw("1")},
            norms={raw("norm"): (0.25, 31.5)},
            metrics=[replace(metric, name=raw(metric.name)) for metric in draft.metrics[:1]] + list(draft.metrics[1:]),
            events=tuple(map(json.dumps, said)),
        )
        return super().commit(draft, **named)


def filled(root: Path) -> scripted.Engine:
    """An engine with three versions of hostile edits; the last one is a candidate."""
    engine = scripted.Engine(root / "[red]store[/red]")
    who = raw("who")
    engine.store = Foreign(engine.store.root, now=engine.store._now, who=who)
    first, second = edit_of(raw, "one"), edit_of(marked, "two")
    engine.make(engine.plan_of(first), note=raw("note"))
    engine.make(engine.plan_of(second), note=marked("note"))
    stubborn = edit_of(raw, "three").model_copy(update={"target_new": scripted.STUBBORN})
    engine.make(engine.plan_of(stubborn, gates={"reliability": 1.0}), note=LONG)
    engine.store.accept("candidate", edits=["three"], note=raw("verdict"), command=raw("command"))
    engine.store.set_alias("stable", "@-", command=raw("command"))
    return engine


def faults(app: App[Any]) -> Iterator[str]:
    """What of a picture could act on a terminal or came out of markup."""
    width = app.size.width
    for y, strip in enumerate(app.screen._compositor.render_strips()):
        line = list(strip)
        text = "".join(segment.text for segment in line)
        for segment in line:
            if not segment.text.isprintable():
                yield f"line {y} holds {segment.text!r}"
            if segment.control:
                yield f"line {y} controls: {segment.control}"
            if segment.style is not None and segment.style.link:
                yield f"line {y} links to {segment.style.link}"
            meta = segment.style.meta if segment.style is not None else {}
            if {name: did for name, did in meta.items() if name.startswith("@") and did not in SCROLLS}:
                yield f"line {y} acts: {meta}"
        # A message that comes in is drawn beyond the edge for a moment, whatever it says.
        if (cells := sum(cell_len(segment.text) for segment in line)) != width and not app._notifications:
            yield f"line {y} has {cells} cells of {width}: {text!r}"


def scan(screen: Screen, at: str) -> None:
    """Make sure that nothing on the screen acts."""
    found = list(faults(screen.app))
    assert not found, f"{at}: " + "\n".join([*found, screen.text.encode("unicode_escape").decode()[:4000]])


def of(screen: Screen, selector: str) -> str:
    """All that a pane holds, beyond what is in sight, without blanks: long words break at any cell."""
    content = screen.app.screen.query_one(selector, Pane)._content
    return "".join("".join(content.render_line(y).text for y in range(content.size.height)).split())


async def walk(screen: Screen, *keys: str) -> None:
    """Press keys and look at every picture on the way."""
    for key in keys:
        await screen.tap(key)
        await calm(screen)
        scan(screen, f"after {key} of {' '.join(keys)}")


async def calm(screen: Screen) -> None:
    """Wait for everything that comes to its end by itself."""
    await screen.rest(lambda worker: worker.group not in OPEN)
    # Until the next frame a picture may be half of the one before.
    await asyncio.sleep(1 / 40)
    await screen.taken()


def both(text: str, mark: str) -> bool:
    """Whether the mark stands there literally, as `marked` or as `raw` has it."""
    return any("".join(one.split()) in text for one in shown(mark))


@pytest.mark.parametrize("size", SIZES)
def test_specs_show_every_field_literally(folder: Path, size: tuple[int, int]) -> None:
    """List, detail, form, question, filter and the reasons in the palette, of valid and invalid edits."""

    async def script(screen: Screen) -> None:
        rows = screen.app.screen.query_one("#items", RowList)
        scan(screen, "the list")
        names = {item.edit.id: at for at, item in enumerate(rows.items)}
        assert {"good", "bad"} <= set(names)
        for name, at in names.items():
            rows.move(at)
            await calm(screen)
            scan(screen, f"edit {name}")
            if name in ("good", "bad"):
                literal = "[red]{}[/red]" if name == "good" else "\\x1b[31m{}\\u202e"
                text = of(screen, ".detail")
                for mark in "SRNTPLAQBKGUO":
                    assert literal.format(name + mark) in text, (mark, text)
                assert literal.format(name + "S")[:10] in screen.text, "the list"
            # The reason why it cannot be staged is in the palette and in a message.
            for key in ("space", "ctrl+p", "escape", "question_mark", "escape", "x", "escape"):
                await walk(screen, key)
            await walk(screen, "enter")
            if not isinstance(screen.app.screen, Place):
                for _ in range(12):
                    await walk(screen, "tab")
                await walk(screen, "home", "left_square_bracket", "b", "right_square_bracket", "ctrl+s")
                for key in ("escape", "y", "escape", "y"):
                    if not isinstance(screen.app.screen, Place):
                        await walk(screen, key)
            assert isinstance(screen.app.screen, SpecsPlace)
        await walk(screen, "slash", *"[red]", "down", "escape", "n", *"[b]", "escape", "y")

    play(script, folder, size=size)


@pytest.mark.parametrize("size", SIZES)
def test_deleting_shows_and_tells_literally(folder: Path, size: tuple[int, int]) -> None:
    """The question, and the message of what was done."""

    async def script(screen: Screen) -> None:
        rows = screen.app.screen.query_one("#items", RowList)
        for name in ("bad", "good"):
            rows.move(next(at for at, item in enumerate(rows.items) if item.edit.id == name))
            await walk(screen, "x")
            assert isinstance(screen.app.screen, Question)
            text = of(screen, ".body")
            assert both(text, f"{name}S") and both(text, f"{name}N")
            await walk(screen, "y")

    play(script, folder, size=size)


@pytest.mark.parametrize("size", SIZES)
def test_what_the_model_and_a_run_say_is_shown_literally(
    folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers, next tokens, a child that dies with hostile last words, its log."""

    def say(question: Asking, lives: object) -> str:
        return raw("said") if "S" in question.prompt else marked("said")

    monkeypatch.setattr(scripted, "said", say)

    async def script(screen: Screen) -> None:
        await walk(screen, "a", "2")
        await screen.until(lambda: "[red]said" in screen.text or "\\x1b[31msaid" in screen.text, "an answer")
        scan(screen, "an answer")
        await walk(screen, "g")
        assert isinstance(screen.app.screen, Question)
        await walk(screen, "m", *"[b]x", "escape", "escape", "s")
        assert isinstance(screen.app.screen, Line)
        await walk(screen, *"[b]a", "enter", "question_mark", "escape", "ctrl+p", "escape")
        screen.engine.dies = f"{raw('err')}\nerror: {raw('dies')}\nhint: {marked('hint')}"
        await walk(screen, "g", "y")
        await screen.until(lambda: screen.app.runner.run and not screen.app.runner.going, "the death")
        await calm(screen)
        scan(screen, "the death")
        assert screen.app.screen.id != "" and both(of(screen, "#talk"), "dies")
        await walk(screen, "l")
        assert isinstance(screen.app.screen, Viewer)
        assert both(of(screen, ".body"), "err")
        await walk(screen, "escape", "6", *"[red]S[/red]", "enter")
        await screen.until(lambda: "said" in screen.text, "answers")
        scan(screen, "the answers")
        await screen.shows("\\x1b[31msaid\\u202e")
        await walk(screen, "escape", "t")
        assert isinstance(screen.app.screen, Line)
        await walk(screen, *"[b]", "enter", "s")
        assert isinstance(screen.app.screen, Pick)
        await walk(screen, "enter", "enter")
        assert isinstance(screen.app.screen, Line)
        # What was said cannot be shown as it is, so it is not proposed.
        await walk(screen, *"[b]", "enter")
        assert isinstance(screen.app.screen, Question)
        await walk(screen, "y", "escape", "v", "escape")

    play(script, folder, size=size)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_store_holds_is_shown_literally(folder: Path, size: tuple[int, int]) -> None:
    """Every field of its records, in Review and History and all their dialogs."""
    engine = filled(folder)

    async def script(screen: Screen) -> None:
        await walk(screen, "4")
        await screen.until(lambda: "three" in screen.text, "the page")
        await walk(screen, "end")
        text = of(screen, ".detail")
        for mark in ("threeS", "threeP", "threeL", "threeQ", "threeU", "threeO"):
            assert both(text, mark), (mark, text)
        await walk(screen, "enter")
        assert isinstance(screen.app.screen, Viewer)
        assert both(of(screen, ".body"), "who")
        await walk(screen, "escape", "d")
        assert isinstance(screen.app.screen, Viewer)
        await walk(screen, "escape", "o")
        assert isinstance(screen.app.screen, Pick)
        await walk(screen, "enter", "home", "r", "g", "escape", "A", "escape", "R", "escape")
        await walk(screen, "right_square_bracket", "right_square_bracket", "end", "r", "c", "escape")
        await walk(screen, "5")
        text = ""
        for _ in range(4):
            await walk(screen, "down")
            await asyncio.sleep(0.1)
            await calm(screen)
            scan(screen, "an operation")
            text += of(screen, ".detail")
        for mark in ("who", "note", "command", "model"):
            assert both(text, mark), (mark, text)
        await walk(screen, "home", "d", "escape", "m", "end", "d", "escape", "y", "end", "escape", "l", "escape")
        await walk(
            screen, "L", "escape", "x", "enter", "escape", "b", "escape", "v", "home", "end", "up", "s", "escape"
        )
        await walk(screen, "V", "escape", "M", "escape", "I", *"[b]", "enter", "escape", "B", *"[b]", "enter", "escape")
        await walk(screen, "ctrl+p", *"alias", "escape", "escape", "escape", "6", "v")
        await walk(screen, "escape", "1", "u", "ctrl+r")

    play(script, folder, size=size, engine=engine)


@pytest.mark.parametrize("size", SIZES)
def test_traces_are_shown_literally(folder: Path, size: tuple[int, int]) -> None:
    """Prompts, tokens, answers and what is wrong with a record, in list, heat map, cell, questions and dialogs."""
    engine = filled(folder)
    head = engine.store.view().head
    evil = scripted.traced(Edit(subject="Big Ben", relation="See {} in", target_new="x"), raw("said"))
    texts = {"prompt": raw("prompt"), "subject": marked("subject"), "tokens": (raw("token"),) * 4}
    numbers = {"at": raw("at"), "n": 1}
    broken = {**evil.to_json(), "tokens": None, raw("key"): raw("value")}
    for data in (numbers, broken, {**evil.to_json(), "roles": [raw("role")] * 5}, replace(evil, **texts).to_json()):
        engine.store.add_evidence(head, effects.TRACE, raw("edit"), data)
    found = effects.summary([evil, evil], 2).to_json()
    found["proposal"] |= {"why": raw("why")}
    found["averages"] = [{**average, "role": marked("role")} for average in found["averages"]]
    engine.store.add_evidence(head, effects.AVERAGES, raw("edit"), found)

    async def script(screen: Screen) -> None:
        await walk(screen, "7")
        await screen.until(lambda: "together" in screen.text, "the averages")
        await walk(screen, "enter", "down", "right", "v", "escape")
        await screen.shows(shown("role")[0][:8], shown("why")[1])
        await walk(screen, "w")
        assert isinstance(screen.app.screen, Question) and both(of(screen, ".body"), "why")
        await walk(screen, "escape", "down", "enter", "down", "v", "v", "escape")
        await screen.shows(shown("said")[1], shown("prompt")[1], shown("token")[1][:12])
        await walk(screen, "slash", *"[red]", "escape", "r")
        assert isinstance(screen.app.screen, Pick)
        await walk(screen, "escape", "t", "enter")
        await screen.until(lambda: not isinstance(screen.app.screen, Pick), "the child")
        await calm(screen)
        scan(screen, "the child's complaint")
        await walk(screen, "escape", "end", "up", "up", "question_mark", "escape")

    play(script, folder, size=size, engine=engine)


@pytest.mark.parametrize("size", SIZES)
def test_a_damaged_store_tells_it_literally(folder: Path, size: tuple[int, int]) -> None:
    """What SQLite or a record says of itself."""
    engine = filled(folder)
    with sqlite3.connect(engine.store.database) as db:
        db.execute("update edits set json = ?", (f'{{"id": "{raw("x")}",',))
        db.execute("update operations set description = ?", (raw("did"),))

    async def script(screen: Screen) -> None:
        await walk(screen, *"1234567", "escape", "4", "enter", "escape", "5", "down", "d", "escape", "v", "down", "y")

    play(script, folder, size=size, engine=engine)


@pytest.mark.parametrize("size", SIZES)
def test_who_has_the_lock_is_named_literally(folder: Path, size: tuple[int, int]) -> None:
    """In the status line and in the reasons."""

    async def script(screen: Screen) -> None:
        held = asyncio.Event()

        def hold() -> None:
            with Store(folder / "[red]store[/red]", who=raw("eve")).lock(raw("verb")):
                while not held.is_set():
                    time.sleep(0.01)

        await walk(screen, "a", "2")
        task = asyncio.create_task(asyncio.to_thread(hold))
        try:
            await screen.until(lambda: "\\x1b[31mverb" in screen.text, "who has the lock")
            scan(screen, "the lock")
            await walk(screen, "g", "ctrl+p", "escape", "4", "A", "5", "G")
        finally:
            held.set()
            await task

    play(script, folder, size=size, poll=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_errors_are_told_literally(folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of operations of the store, of asking, and faults of our own."""

    asked = []

    def refuse(*_: object) -> None:
        asked.append(1)
        raise EditctlError(raw("message") + marked("x"), raw("hint") + marked("y"))

    def fail(*_: object) -> None:
        raise RuntimeError(raw("message"))

    async def script(screen: Screen) -> None:
        screen.app.change("undo", refuse)
        await calm(screen)
        assert any("\\x1b[31mmessage" in toast for toast in screen.toasts)
        scan(screen, "a refusal")
        screen.app.change("undo", fail)
        await calm(screen)
        assert any("fault" in toast for toast in screen.toasts)
        scan(screen, "a fault")
        monkeypatch.setattr(screen.app.asker, "ask", refuse)
        asked.clear()
        await walk(screen, "a", "2")
        await screen.until(lambda: asked)
        await asyncio.sleep(0.5)
        # Once when the place comes up, once when it is shown.
        assert 1 <= len(asked) <= 2, "what was refused is not asked again and again"
        await walk(screen, "6", "a", "enter")
        screen.app.clear_notifications()
        await screen.until(lambda: "\\x1b[31mmessage" in screen.text, "the refusal")
        scan(screen, "a refusal in Ask")

    play(script, folder, size=size)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of real data sets are not here (EDITCTL_SAMPLES)")
@pytest.mark.parametrize("size", SIZES)
def test_malformed_samples_of_data_sets_are_shown_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Each record as a spec of its fields, each file that cannot be read as a spec file as it is."""
    monkeypatch.chdir(tmp_path)
    Path("specs").mkdir()
    for sample in sorted(SAMPLES.glob("*.json")):
        file = Path("specs") / f"{sample.stem}.toml"
        try:
            data = json.loads(sample.read_text(encoding="utf-8"))
        except ValueError:
            file.write_bytes(sample.read_bytes())
            continue
        records = data if isinstance(data, list) else [data] if "case_id" in data else list(data.values())
        file.write_text(tomlkit.dumps({"version": 1, "edit": [spec_of(record) for record in records]}))

    async def script(screen: Screen) -> None:
        scan(screen, "the list")
        rows = screen.app.screen.query_one("#items", RowList)
        assert len(rows.items) > 10
        for at, item in enumerate(rows.items):
            rows.move(at)
            await screen.pilot._wait_for_screen()
            scan(screen, f"{item.edit.file}:{item.edit.line}")
        rows.move(0)
        await walk(screen, "x", "escape", "enter", "tab", "escape", "a", "2", "end", "g", "escape")

    play(script, tmp_path, size=size)


def spec_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record of CounterFact or of a flat data set as the fields of an edit."""
    asked = record.get("requested_rewrite", record)

    def text(value: object) -> str:
        return str(value["str"] if isinstance(value, dict) else value)

    return {
        "subject": asked["subject"],
        "relation": asked["prompt"],
        "target_new": text(asked["target_new"]),
        "target_true": text(asked.get("target_true", "")) or "unknown",
        "paraphrases": record.get("paraphrase_prompts", [])[:3],
        "locality": [{"prompt": prompt} for prompt in record.get("neighborhood_prompts", [])[:3]],
    }


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (Text("raw escape \x1b[31m"), "holds"),
        (Text("direction \u202e"), "holds"),
        (Content.from_markup("[link='https://e.vil']z[/]"), "links"),
        (Content.from_markup("[@click=app.quit]q[/]"), "acts"),
    ],
)
def test_the_scan_finds_what_acts(planted: object, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scan, where a text was shown as it came."""
    monkeypatch.chdir(tmp_path)

    async def run() -> list[str]:
        async with opened(tmp_path) as screen:
            assert not list(faults(screen.app))
            screen.app.screen.query_one(Pane).show(planted)
            await screen.pilot.pause()
            return list(faults(screen.app))

    assert any(found in fault for fault in asyncio.run(run()))


@given(st.text(max_size=60), st.integers(-2, 40))
def test_a_cell_is_as_wide_as_it_shall_be(text: str, width: int) -> None:
    """Of any text, in any width; what is cut says so, what fits is whole."""
    cell = fit(text, width)
    assert cell_len(cell) == max(width, 0) and cell.isprintable()
    whole = visible(text, 400)
    assert cell.rstrip() == whole.rstrip() if cell_len(whole) <= width else width < 1 or cell.endswith("…")
