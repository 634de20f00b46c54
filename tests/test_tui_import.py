"""The import of a benchmark in Specs: what a file holds is shown, then written, in the words of the file itself."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from screens import NARROW, Screen, opened, play, workspace
from scripted import Engine
from textual.widgets import Input

from editctl.spec import load
from editctl.tui import children
from editctl.tui.dialogs import Line, Pick, Question
from editctl.tui.found import Found, Outcome, Settings
from editctl.tui.importing import ImportForm, Paths
from editctl.tui.rows import RowList
from editctl.tui.tasks import Task

SAMPLES = Path(os.environ.get("EDITCTL_SAMPLES", Path(__file__).parents[1] / "../shared/data")) / "malformed"
STALL = 0.05 * float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))


def flat(subject: str, new: str = "English", **more: Any) -> dict[str, Any]:
    """A record of CounterFact as EasyEdit has it."""
    prompt = f"The mother tongue of {subject} is"
    record = {"case_id": 7, "prompt": prompt, "target_new": new, "subject": subject, "ground_truth": "French"}
    return record | {"rephrase_prompt": f"{subject} grew up with", "locality_prompt": "Paris is in"} | more


def zsre(subject: str) -> dict[str, Any]:
    """A record of zsRE as MEND has it."""
    record = {"subject": subject, "src": f"Where was {subject} born?", "pred": "?", "rephrase": f"{subject}'s town?"}
    return record | {"alt": "Oslo", "answers": ["Rome"], "loc": "nq question: who?", "loc_ans": "me", "cond": ""}


RECORDS = [flat("Ada"), flat("Bob", prompt="No name is"), flat("Cid"), flat("Ada", "Dutch")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(RECORDS))
    return workspace(tmp_path)


async def ready(screen: Screen, file: str = "bench.json") -> None:
    """The dialog, the file read."""
    await screen.press("i")
    await read(screen, file)


async def read(screen: Screen, file: str) -> None:
    """Another file, read."""
    put(screen, "file", file)
    screen.app.screen.set_focus(screen.app.screen.query_one("#file"))
    await screen.tap("enter")
    await calm(screen)


def put(screen: Screen, name: str, text: str) -> None:
    """Write into a field."""
    screen.app.screen.query_one(f"#{name}", Input).value = text


async def calm(screen: Screen) -> None:
    """What is written in the fields was read, and nothing is read or written any more."""

    def still() -> bool:
        form = screen.app.screen
        return not isinstance(form, ImportForm) or (form._known is not None and not form._doing)

    await screen.until(still, "the end of reading")


def name(screen: Screen) -> str:
    """What is on top."""
    return type(screen.app.screen).__name__


def test_what_a_file_holds_is_shown_before_it_is_written(folder: Path) -> None:
    """Format, counts, each refused record; no is what return does; then the edits are in the list, the rest to read."""

    async def script(screen: Screen) -> None:
        await screen.press("i", *"ben", "right", "enter")
        await screen.shows("counterfact-flat (detected)", "2 of 4 records can be imported as 2 edits")
        await screen.shows("not imported: 1 subject absent, 1 conflict", "specs/bench.toml")
        await screen.shows("record 2 (case 7), line 1: the prompt does not name the subject")
        screen.app.screen.set_focus(screen.app.screen.query_one(RowList))
        await screen.press("down")
        await screen.shows("record 4 (case 7), line 1: contradicts record 1")
        await screen.press("ctrl+s")
        await screen.shows("Write 2 edits to specs/bench.toml?")
        await screen.press("enter")
        assert name(screen) == "ImportForm" and not Path("specs/bench.toml").exists()
        await screen.press("ctrl+s", "y")
        await screen.until(lambda: isinstance(screen.app.screen, Outcome), "what came of it")
        await screen.settle()
        assert [edit.subject for edit in load([Path("specs/bench.toml")])] == ["Ada", "Cid"]
        assert "Ada" in {item.edit.subject for item in screen.app.specs.items}
        assert screen.toasts == ["2 of 4 records imported as 2 edits\nspecs/bench.toml"]
        screen.app.clear_notifications()
        await screen.shows("specs/bench.toml: 2 edits", "contradicts record 1")
        await screen.press("slash", "d", "enter", "escape", "escape")
        assert name(screen) == "SpecsPlace"
        asked = ["import", "file", "bench.json"]
        wanted = [[*asked, "--dry-run", "--json"], [*asked, "-o", "specs/bench.toml", "--json"]]
        assert screen.engine.started == wanted

    play(script, folder)


def test_a_file_that_holds_edits_alone_leaves_nothing_to_read(folder: Path) -> None:
    """ctrl+s reads first what was not read; without refused records the list is all that is shown afterwards."""
    Path("bench.json").write_text(json.dumps(RECORDS[:1]))

    async def script(screen: Screen) -> None:
        await screen.press("i", "ctrl+s")
        assert "Name a file first" in screen.toasts[-1]
        put(screen, "file", "bench.json")
        await screen.press("ctrl+s")
        await screen.until(lambda: isinstance(screen.app.screen, Question), "the question")
        await screen.press("y")
        await screen.until(lambda: name(screen) == "SpecsPlace", "the list")
        await screen.settle()
        assert screen.toasts[-1].startswith("1 of 1 record imported as 1 edit")

    play(script, folder)


def test_the_format_what_edits_aim_at_and_how_many_records_can_be_chosen(folder: Path) -> None:
    """A wrong format is told with what the records look like; zsRE alone has a target."""
    Path("z.json").write_text(json.dumps([zsre("Ada"), zsre("Bob")]))

    async def script(screen: Screen) -> None:
        await ready(screen)
        assert "target" not in screen.lines[5] and not screen.app.screen.query_one("#row-target").display
        await screen.press("tab", "enter", "end", "enter")
        await calm(screen)
        await screen.shows("known (as named)", "4 of 4 records in bench.json cannot be edits", "counterfact-flat")
        await screen.press("ctrl+s")
        await calm(screen)
        assert name(screen) == "ImportForm", "there is nothing to write"
        await screen.press("enter", "home", "enter")
        await calm(screen)
        await screen.shows("2 of 4 records can be imported")
        await read(screen, "z.json")
        await screen.shows("its edits aim at the counterfactual alt", "2 of 2 records", "specs/z.toml")
        await screen.press("down", "down", "enter")
        assert isinstance(screen.app.screen, Pick)
        await screen.press("end", "enter")
        await calm(screen)
        await screen.shows("its edits aim at the first true answer")
        await screen.press("down", "x", "1", "enter")
        await calm(screen)
        await screen.shows("1 of 1 record can be imported")
        await screen.press("ctrl+s", "y")
        await screen.until(lambda: name(screen) == "SpecsPlace", "the list")
        assert [edit.target_new for edit in load([Path("specs/z.toml")])] == ["Rome"]
        assert screen.engine.started[-1][2:7] == ["z.json", "--target", "answers", "--limit", "1"]

    play(script, folder)


def test_files_are_replaced_only_when_that_was_asked(folder: Path) -> None:
    """With how many edits are lost; one that came after the question stays; what is read anew was changed."""
    taken = Path("specs/bench.toml")

    async def script(screen: Screen) -> None:
        await ready(screen)
        await screen.press("ctrl+s")
        taken.write_text("mine")
        await screen.press("y")
        await calm(screen)
        await screen.shows("specs/bench.toml would be replaced")
        assert taken.read_text() == "mine"
        await screen.press("ctrl+s")
        await calm(screen)
        await screen.until(lambda: isinstance(screen.app.screen, Question), "the question")
        await screen.shows("Replaced or deleted, with the 0 edits in it: specs/bench.toml")
        Path("bench.json").write_text(json.dumps(RECORDS[:1]))
        await screen.press("y")
        await calm(screen)
        assert taken.read_text() == "mine" and "changed since it was read" in screen.toasts[-1]
        await screen.shows("1 of 1 record can be imported")
        await screen.press("ctrl+s", "y")
        await screen.until(lambda: name(screen) == "SpecsPlace", "the list")
        assert len(load([taken])) == 1

    play(script, folder)


def test_a_file_that_nobody_reads_is_not_written(folder: Path) -> None:
    """Its edits would be in no list."""

    async def script(screen: Screen) -> None:
        await ready(screen)
        for told, into in enumerate(("bench.toml", "specs/bench.json", "specs", ""), 1):
            put(screen, "into", into)
            await screen.press("ctrl+s")
            await screen.until(lambda told=told: len(screen.toasts) == told, "the refusal")
            assert "none of those that are read: name a *.toml of specs" in screen.toasts[-1]
            assert screen.app.focused is screen.app.screen.query_one("#into")

    play(script, folder)


def test_esc_stops_what_is_done_and_then_leaves(folder: Path) -> None:
    """Reading, then writing; nothing was written; leaving the UI while specs are written asks."""

    async def script(screen: Screen) -> None:
        await screen.press("i")
        put(screen, "file", "bench.json")
        for key, doing in (("enter", "reading"), ("y", "writing")):
            engine.hold = asyncio.Event()
            started = len(engine.started)
            await screen.press(key)
            await screen.shows(f"{doing} …", "esc stops it")
            assert isinstance(screen.app.screen, ImportForm)
            assert bool(screen.app.screen.loss) is (doing == "writing")
            await screen.press("enter", "ctrl+s", "escape")
            await screen.shows("stopped: nothing was written")
            assert not Path("specs/bench.toml").exists() and len(engine.started) == started + 1
            engine.hold = None
            await screen.press("ctrl+s")
            await screen.shows("Write 2 edits")
        await screen.press("n", "escape")
        assert name(screen) == "SpecsPlace"

    engine = Engine(folder / "store")
    play(script, folder, engine=engine)


def test_hostile_records_and_names_are_shown_literally(folder: Path) -> None:
    """Markup, escape sequences and direction overrides, in the dialog, its question and what came of it."""
    evil = "[red]x[/red][@click=app.quit]q[/]"
    records = [flat("Ada", f"{evil}"), flat("Bob\x1b[31m", case_id=f"{evil}\u202e"), flat(evil, prompt="None is")]
    Path("[b]e[red].json").write_text(json.dumps(records))

    async def script(screen: Screen) -> None:
        await ready(screen, "[b]e[red].json")
        await screen.shows("file      [b]e[red].json", "specs/[b]e[red].toml")
        await screen.shows("[red]x[/red][@click=app.quit]q[/]\\u202e", "Bob\\x1b[31m")
        assert "\x1b" not in screen.text and "\u202e" not in screen.text
        put(screen, "into", "specs/[u]v[red].toml")
        await screen.press("ctrl+s")
        await screen.shows("Write 1 edit to specs/[u]v[red].toml?")
        await screen.press("y")
        await screen.until(lambda: isinstance(screen.app.screen, Outcome), "what came of it")
        screen.app.clear_notifications()
        await screen.shows("Imported [b]e[red].json", "specs/[u]v[red].toml: 1 edit", "Bob\\x1b[31m")
        assert "\x1b" not in screen.text and "\u202e" not in screen.text

    play(script, folder, size=NARROW)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
def test_every_malformed_file_is_shown_or_refused_in_words(folder: Path) -> None:
    """One after the other in the same dialog; nothing acts, nothing is written, nothing breaks."""

    async def script(screen: Screen) -> None:
        await screen.press("i")
        for path in sorted(SAMPLES.glob("*.json")):
            await read(screen, str(path))
            told = screen.text
            assert ("can be imported as" in told) != ("error:" in told), f"{path.name}\n{told}"
            assert not [c for c in told if not c.isprintable() and c != "\n"], path.name
            assert (path.stem in ("truncated", "control_characters", "control_characters_raw")) is ("error:" in told)
        assert screen.app.is_running and not list(Path("specs").glob("*_*")) and not screen.engine.faults

    play(script, folder)


def test_what_cannot_be_read_is_told_and_a_name_is_no_option(folder: Path) -> None:
    """A file that is not there, a folder, no JSON with its line, no benchmark; `~` and a dash."""
    Path("-x.json").write_text(json.dumps(RECORDS[:1]))
    Path("odd.json").write_text('[{"[b]a[/b]": 1}]')
    Path("cut.json").write_text('[{"a": \n"b')

    async def script(screen: Screen) -> None:
        await screen.press("i")
        for file, *words in (
            ("missing.json", "missing.json cannot be read", "name a file"),
            ("specs", "specs cannot be read"),
            ("cut.json", "cut.json:2", "the file ends within a text"),
            ("odd.json", "odd.json is of no known format: its records have [b]a[/b]"),
            ("~no-such-user/x.json", "~no-such-user/x.json cannot be read"),
            ("-x.json", "1 of 1 record can be imported"),
        ):
            await read(screen, file)
            await screen.shows(*words)
        assert not screen.engine.faults

    play(script, folder)


def test_all_edits_are_written_as_counterfact_once_that_may_replace(folder: Path) -> None:
    """The file is named, a file that is there is asked about."""

    async def script(screen: Screen) -> None:
        await screen.press("o")
        assert isinstance(screen.app.screen, Line)
        await screen.press("enter")
        await screen.until(lambda: isinstance(screen.app.screen, Task) and screen.app.screen.code == 0, "its end")
        out = json.loads(Path("counterfact.json").read_text())
        assert {record["requested_rewrite"]["subject"] for record in out} >= {"Moby Dick", "Big Ben"}
        Path("counterfact.json").write_text("mine")
        await screen.press("escape", "o", "enter")
        await screen.shows("Replace", "counterfact.json?")
        await screen.press("enter")
        assert Path("counterfact.json").read_text() == "mine" and name(screen) == "SpecsPlace"

    play(script, folder)


def test_a_path_is_completed_by_what_is_there(folder: Path) -> None:
    """Folders and JSON files; no name that would not be shown as it is."""
    for hostile in ("be\x1b.json", "bd.txt"):
        Path(hostile).write_text("")
    Path("deep").mkdir()
    (Path("deep") / "one.jsonl").write_text("")

    def completed(value: str) -> str | None:
        return asyncio.run(Paths().get_suggestion(value))

    assert [completed(value) for value in ("be", "b", "d", "deep/o")] == [
        "bench.json",
        "bench.json",
        "deep/",
        "deep/one.jsonl",
    ]
    assert [completed(value) for value in ("bd", "zz", "", "nowhere/x", "a\0")] == [None] * 5


def test_lines_that_say_nothing_are_passed_over() -> None:
    """Whatever an older or newer child says."""
    found = Found(Settings("x", "", "", ""))
    for line in ("", "no JSON", "[1]", '{"type": "refused"}', '{"type": "summary", "records": "many"}', '{"type": []}'):
        found.take(line)
    assert found == Found(Settings("x", "", "", ""))


@pytest.mark.slow
def test_a_real_child_reads_and_writes_while_the_loop_goes_on(folder: Path) -> None:
    """10,000 records, half of them refused, each told; no turn of the loop takes long, and a control is felt."""
    records = [flat(f"Ada {at}", prompt=f"The tongue of Ada {at} is" if at % 2 else "None is") for at in range(10_000)]
    Path("bench.json").write_text(json.dumps(records))
    late: list[float] = []

    async def beat() -> None:
        while True:
            begun = time.monotonic()
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - begun - 0.005)

    async def script(screen: Screen) -> None:
        await screen.press("i")
        put(screen, "file", "bench.json")
        beating = asyncio.create_task(beat())
        await screen.tap("enter")
        await calm(screen)
        beating.cancel()
        await screen.shows("5000 of 10000 records can be imported as 5000 edits")
        assert len(screen.app.screen.query_one(RowList).items) == 5000
        print(f"longest stalls of {len(late)} beats: {[round(1000 * x) for x in sorted(late)[-5:]]} ms")
        assert max(late) < STALL
        time.sleep(STALL)
        await screen.press("ctrl+s", "y")
        await screen.until(lambda: isinstance(screen.app.screen, Outcome), "what came of it")

    async def run() -> None:
        engine = Engine(folder / "store")
        engine.launch = children.launch  # type: ignore[assignment, method-assign]
        async with opened(folder, engine=engine) as screen:
            await script(screen)

    asyncio.run(run())
    assert len(load([Path("specs/bench.toml")])) == 5000
