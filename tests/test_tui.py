"""The terminal UI: every place, and every key that changes files or the store, with an engine that follows a script."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from screens import BOOKS, LANDMARKS, NARROW, WIDE, Screen, play, workspace
from scripted import STUBBORN, Engine, Scripted

from editctl.spec import load
from editctl.store import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return workspace(tmp_path)


async def apply_all(screen: Screen) -> None:
    """Stage everything and apply it."""
    await screen.press("1", "a", "p")
    await screen.until(lambda: screen.app.planned.plan, "a plan")
    await screen.press("g", "y")
    await screen.until(lambda: screen.app.runner.run and not screen.app.runner.going, "the end of the run")
    await screen.settle()


# ---------------------------------------------------------------------------------------------------------------------
# Specs


def test_every_edit_of_every_file_is_listed_with_its_state(folder: Path) -> None:
    """Files in order, edits in order, what is new is new."""

    async def script(screen: Screen) -> None:
        assert [(i.edit.id, i.state) for i in screen.app.specs.items] == [
            ("whale", "new"),
            ("tower", "new"),
            ("clock", "new"),
        ]
        for words in ("Moby Dick", "{} was written by", "Jane Austen", "books.toml", "3 edits in 2 files", "3 new"):
            await screen.shows(words)

    play(script, folder)


def test_applying_what_is_staged_makes_a_version_of_just_that(folder: Path) -> None:
    """Two of three are staged; the question names them; y confirms where g asked."""

    async def script(screen: Screen) -> None:
        await screen.press("space", "space", "p")
        assert screen.app.staged == {"whale", "tower"}
        await screen.until(lambda: "90.0 %" in screen.text, "what is said now")
        await screen.press("g")
        await screen.shows("2 to add")
        assert screen.head == ""
        await screen.press("y")
        await screen.until(lambda: screen.head, "a version")
        await screen.until(lambda: not screen.app.staged, "nothing staged")
        assert {live.id for live in screen.engine.store.edits(screen.engine.store.head())} == {"whale", "tower"}
        assert screen.place == "run"
        assert any("Made version" in toast for toast in screen.toasts)

    play(script, folder)


def test_a_file_changed_by_another_program_is_shown_at_once(folder: Path) -> None:
    """An edit comes, another gets a problem with its line; nothing else is asked of the person."""

    async def script(screen: Screen) -> None:
        await screen.until(lambda: len(screen.app.specs.items) == 3)
        wrong = BOOKS.replace("{} was written by", "was written by")
        (folder / "specs" / "books.toml").write_text(wrong, encoding="utf-8")
        (folder / "specs" / "more.toml").write_text(BOOKS.replace("whale", "wail").replace("Moby", "Mobile"))
        await screen.until(lambda: "invalid" in screen.text and "Mobile Dick" in screen.text)
        await screen.shows("specs/books.toml:6: relation has no place")
        assert [i.state for i in screen.app.specs.items] == ["invalid", "new", "new", "new"]

    play(script, folder, poll=0.05)


def test_contradicting_edits_are_named_and_cannot_be_staged(folder: Path) -> None:
    """The one that comes second has the problem; the key says why it does nothing."""

    async def script(screen: Screen) -> None:
        assert [i.state for i in screen.app.specs.items] == ["new", "conflicting", "new", "new"]
        await screen.press("down", "space")
        assert not screen.app.staged
        assert any("contradicts" in toast.casefold() for toast in screen.toasts)
        await screen.press("a")
        assert screen.app.staged == {"whale", "tower", "clock"}

    other = BOOKS.replace("whale", "other").replace("Jane Austen", "Homer")
    workspace(folder, books=BOOKS, books2=other, landmarks=LANDMARKS)
    play(script, folder)


def test_a_broken_file_never_turns_its_live_edits_into_drops(folder: Path) -> None:
    """What is live and in no readable file could be staged to be dropped only once every file can be read."""

    async def script(screen: Screen) -> None:
        await apply_all(screen)
        (folder / "specs" / "books.toml").write_text("not toml", encoding="utf-8")
        screen.app.look()
        await screen.until(lambda: screen.app.specs.problems)
        gone = [item for item in screen.app.specs.items if item.state == "gone"]
        assert [item.edit.id for item in gone] == ["whale"]
        await screen.press("1", "a")
        assert not screen.app.staged
        (folder / "specs" / "books.toml").unlink()
        screen.app.look()
        await screen.until(lambda: not screen.app.specs.problems)
        await screen.press("a")
        assert screen.app.staged == {"-whale"}
        await screen.press("p", "g", "y")
        await screen.until(lambda: len(screen.engine.lives(screen.engine.store.head())) == 2, "the drop")

    play(script, folder)


def test_the_filter_takes_words_and_words_not_wanted(folder: Path) -> None:
    """All words, in any field; ! leaves out; esc takes it away."""

    async def script(screen: Screen) -> None:
        rows = screen.app.screen.query_one("#items")
        await screen.press("slash", *"new")
        assert len(rows.items) == 3
        await screen.press("space", *"!paris")
        assert [item.edit.id for item in rows.items] == ["whale", "clock"]
        await screen.press("enter", "a")
        assert screen.app.staged == {"whale", "clock"}
        await screen.press("escape")
        assert len(rows.items) == 3

    play(script, folder)


def test_deleting_an_edit_asks_and_leaves_the_rest_of_the_file(folder: Path) -> None:
    """x asks, return says no, y deletes; the other edit stays as it was."""

    async def script(screen: Screen) -> None:
        file = folder / "specs" / "landmarks.toml"
        await screen.press("down", "x", "enter")
        assert file.read_text() == LANDMARKS
        await screen.press("x", "y")
        await screen.until(lambda: "tower" not in file.read_text(), "the deletion")
        assert file.read_text().endswith(LANDMARKS[LANDMARKS.index('[[edit]]\nid = "clock"') :])
        await screen.until(lambda: len(screen.app.specs.items) == 2)

    play(script, folder)


@pytest.mark.parametrize(
    ("editor", "command"),
    [
        ("vi", ["vi", "+7", "a.toml"]),
        ("emacs -nw", ["emacs", "-nw", "+7", "a.toml"]),
        ("/usr/bin/code", ["/usr/bin/code", "--wait", "--goto", "a.toml:7"]),
        ("hx", ["hx", "a.toml:7"]),
    ],
)
def test_the_editor_is_opened_at_the_line(editor: str, command: list[str]) -> None:
    """Each as it is told the line; VISUAL goes before EDITOR."""
    from editctl.tui.specs import editor_command

    assert editor_command({"EDITOR": editor}, "a.toml", 7) == command
    assert editor_command({"EDITOR": "ed", "VISUAL": editor}, "a.toml", 7) == command


# ---------------------------------------------------------------------------------------------------------------------
# Plan and Run


def test_the_plan_says_what_the_model_says_now_and_how_probable_both_targets_are(folder: Path) -> None:
    """Prompt, paraphrase and probes of what is staged; nothing is asked of what is not."""

    async def script(screen: Screen) -> None:
        await screen.press("2")
        await screen.shows("Nothing is staged")
        assert not screen.engine.started
        await screen.press("1", "down", "space", "2")
        await screen.until(lambda: "90.0 %" in screen.text, "what is said now")
        for words in ("Paris", "5.0 %", "generalization", "The Louvre is in", "The country where", "1 to add"):
            await screen.shows(words)
        asked = [arguments for arguments in screen.engine.started if "--stdin" in arguments]
        assert len(asked) == 1

    play(script, folder)


def test_return_on_the_question_does_not_apply(folder: Path) -> None:
    """No has the focus, so neither return nor a second g does anything."""

    async def script(screen: Screen) -> None:
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned.plan)
        for keys in (("g", "enter"), ("g", "g", "escape"), ("g", "n")):
            await screen.press(*keys)
            assert not screen.engine.runs
        await screen.press("g", "right", "enter")
        await screen.until(lambda: screen.engine.runs)

    play(script, folder)


def test_the_note_of_the_question_is_in_the_log(folder: Path) -> None:
    """Typed letters go to the note, not to the keys."""

    async def script(screen: Screen) -> None:
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned.plan)
        await screen.press("g", "m", *"yn", "enter", "y")
        await screen.until(lambda: screen.head, "a version")
        assert screen.engine.store.operations()[0].note == "yn"

    play(script, folder)


def test_a_cancelled_run_leaves_the_store_as_it_was(folder: Path) -> None:
    """esc asks, y cancels; other places can be visited meanwhile and the run goes on."""

    async def script(screen: Screen) -> None:
        screen.engine.hold = asyncio.Event()
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned.plan)
        await screen.press("g", "y")
        await screen.until(lambda: screen.app.runner.run and screen.app.runner.run.course.step > 5)
        await screen.shows("loss", "step 11 of at most 25")
        await screen.press("1", "5", "3")
        assert screen.app.runner.going
        await screen.press("escape", "n")
        assert screen.app.runner.going
        await screen.press("escape", "y")
        await screen.until(lambda: not screen.app.runner.going, "the end")
        assert screen.head == "" and screen.engine.store.versions() == []
        await screen.shows("Cancelled; the store is as it was")
        assert len(screen.app.staged) == 3, "what was staged is not lost"

    play(script, folder)


def test_a_child_that_dies_is_a_message_with_the_path_of_its_log(folder: Path) -> None:
    """What it said last, where the rest is; the UI goes on and the next run works."""

    async def script(screen: Screen) -> None:
        screen.engine.dies = "error: the device is out of memory\nhint: a smaller batch_size"
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned.plan)
        await screen.press("g", "y")
        await screen.until(lambda: any("out of memory" in toast for toast in screen.toasts), "a message")
        run = screen.app.runner.run
        assert run is not None and str(run.log) in screen.toasts[-1]
        await screen.shows("smaller batch_size")
        assert screen.head == ""
        await screen.press("2", "g", "y")
        await screen.until(lambda: screen.head, "a version")

    play(script, folder)


def test_leaving_while_a_run_goes_on_asks_and_cancels_it(folder: Path) -> None:
    """No child outlives the UI."""

    async def script(screen: Screen) -> None:
        screen.engine.hold = asyncio.Event()
        await screen.press("a", "p")
        await screen.until(lambda: screen.app.planned.plan)
        await screen.press("g", "y")
        await screen.until(lambda: screen.app.runner.run and screen.app.runner.run.course.step > 5)
        await screen.press("q", "n")
        assert screen.app.runner.going
        await screen.press("q", "y")
        await screen.until(lambda: not screen.app.runner.going, "the end")
        assert screen.engine.store.versions() == []

    play(script, folder)


def test_a_failed_gate_makes_a_candidate_and_says_so(folder: Path) -> None:
    """The head stays; the bar counts what waits for review."""

    async def script(screen: Screen) -> None:
        await apply_all(screen)
        assert screen.head == ""
        await screen.shows("is a candidate")
        assert "Review(1)" in screen.lines[0]

    (folder / "editctl.toml").write_text("[gates]\nreliability = 0.9\n")
    workspace(folder, landmarks=LANDMARKS.replace("Tokyo", STUBBORN))
    play(script, folder)


def test_a_saved_plan_is_the_contract_that_apply_takes(folder: Path) -> None:
    """s writes what `plan -o` writes."""
    from editctl import plan

    async def script(screen: Screen) -> None:
        await screen.press("space", "p")
        await screen.until(lambda: screen.app.planned.plan)
        await screen.press("s", *"x.json", "enter")
        await screen.until((folder / "x.json").is_file)
        assert plan.load(folder / "x.json").to_json() == screen.app.planned.plan.to_json()

    play(script, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Everywhere


def test_undo_and_redo_work_from_everywhere_and_say_what_they_did(folder: Path) -> None:
    """In any place, and what is listed follows."""

    async def script(screen: Screen) -> None:
        await apply_all(screen)
        made = screen.head
        await screen.press("1", "u")
        await screen.until(lambda: screen.head == "" and screen.app.past.head is None, "the undo")
        assert any("ndid operation 1 (apply)" in toast for toast in screen.toasts)
        await screen.until(lambda: screen.app.specs.count("new") == 3)
        await screen.press("ctrl+r")
        await screen.until(lambda: screen.app.past.head is not None, "the redo")
        assert screen.head == made

    play(script, folder)


def test_a_key_that_does_nothing_says_why(folder: Path) -> None:
    """Undo with nothing done, going with nothing staged."""

    async def script(screen: Screen) -> None:
        await screen.press("u")
        assert screen.toasts[-1] == "Nothing was done yet"
        await screen.press("2", "g")
        assert screen.toasts[-1].startswith("Nothing is staged")

    play(script, folder)


def test_readonly_changes_nothing_and_says_so(folder: Path) -> None:
    """Every action that changes files or the store, of every place; looking works."""
    from editctl.tui.app import place_class
    from editctl.tui.place import PLACES

    engine = Engine(folder / "store")

    async def make(screen: Screen) -> None:
        await apply_all(screen)

    play(make, folder, engine=engine)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts}

    async def script(screen: Screen) -> None:
        for number, name in enumerate(PLACES, 1):
            await screen.press("escape", str(number))
            place = screen.app.screen
            for binding in place_class(name).BINDINGS:
                action = binding.action.partition("(")[0]
                if action in place.CHANGES:
                    told = len(screen.toasts)
                    await screen.app.run_action(binding.action, place)
                    await screen.settle()
                    assert screen.app.screen is place, f"{action} of {name} opened a question"
                    assert "--readonly" in " ".join(screen.toasts[told:]), action
            assert place.CHANGES or name in ("run", "history", "ask")
        await screen.press("u")
        assert "--readonly" in screen.toasts[-1]

    play(script, folder, readonly=True, engine=Engine(folder / "store"))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts}
    assert before == after


def test_another_program_that_writes_is_named_and_its_result_appears(folder: Path) -> None:
    """While it has the lock apply says whose it is; when it ends the lists are new."""
    engine = Engine(folder / "store")

    async def script(screen: Screen) -> None:
        await screen.press("space", "p")
        await screen.until(lambda: screen.app.planned.plan)
        held = asyncio.Event()

        def hold() -> None:
            with Store(folder / "store", who="eve@far").lock("squash"):
                while not held.is_set():
                    time.sleep(0.01)

        task = asyncio.create_task(asyncio.to_thread(hold))
        await screen.until(lambda: "`squash` of eve@far" in screen.text, "the name of who has the lock")
        await screen.press("g")
        assert "eve@far" in screen.toasts[-1] and not screen.engine.runs
        held.set()
        await task
        engine.make(engine.plan_of(screen.app.specs.items[0].edit))
        await screen.until(lambda: screen.app.specs.items[0].state == "applied", "the other program's version")
        assert "eve@far" not in screen.lines[1]

    play(script, folder, engine=engine, poll=0.05)


@pytest.mark.parametrize(
    ("size", "edit", "shown"),
    [
        (WIDE, "tower", ["memory hit: edit tower (serac, score 0.98)"]),
        (NARROW, "tower", ["memory hit: edit tower", "(serac, score 0.98)"]),
        (NARROW, "[b]\x1b[31m\u202e" + "Llan" * 60, [r"memory hit: edit [b]\x1b[31m\u202eL…", "(serac, score 0.98)"]),
    ],
    ids=["wide", "narrow", "hostile"],
)
def test_asking_names_the_edit_of_an_overlay_that_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], edit: str, shown: list[str]
) -> None:
    """Under the answer of the version that has overlays, in whole lines; that none did is told there and only there."""
    engine, said = Engine(folder / "store"), Scripted.line
    head = engine.make(engine.plan_of(*load([Path("specs")])[:1])).id

    async def line(self: Scripted) -> str:
        """Only of the head, only what names the tower."""
        reply = json.loads(await said(self))
        if reply.get("version") == head:
            reply["overlays"] = ["serac"]
            hit = {"kind": "serac", "edit": edit, "score": 0.984, "sent": "read this"}
            reply["answers"] = [{**a, "hit": hit if "tower" in a["prompt"] else None} for a in reply["answers"]]
        return json.dumps(reply)

    async def script(screen: Screen) -> None:
        await screen.press("6", *"tower", "enter")
        await screen.until(lambda: screen.text.count("75.0 %") == 2, "both answers")
        (base, at), *more = [[cell.strip() for cell in line.split("││")] for line in screen.lines if "││" in line][2:]
        assert at.rstrip("│ ") == shown[0] and not base.strip("│ ")
        assert [row[1].rstrip("│ ") for row in more[: len(shown)]] == [*shown[1:], ""]
        assert all(line.isprintable() for line in screen.lines) and "read this" not in screen.text
        await screen.press("escape", "slash", *["backspace"] * 5, *"clock", "enter")
        await screen.shows("no hit")
        assert screen.text.count("no hit") == 1 and "memory" not in screen.text

    monkeypatch.setattr(Scripted, "line", line)
    play(script, folder, size=size, engine=engine)


def test_every_place_fits_a_small_terminal_and_names_its_keys(folder: Path) -> None:
    """The places, the status and the keys are in sight at 80 × 24; ? explains every key."""

    async def script(screen: Screen) -> None:
        for number, title in enumerate(("Specs", "Plan", "Run", "Review", "History", "Ask", "Trace"), 1):
            await screen.press("escape", str(number))
            assert f"{number} {title}" in screen.lines[0]
            assert "7 Trace" in screen.lines[0]
            assert "? keys" in screen.lines[-1] or title == "Ask", "in Ask ? is a letter of the prompt"
            await screen.press("escape", "question_mark")
            await screen.shows("esc leaves, j and k scroll")
            await screen.press("escape")

    play(script, folder, size=NARROW)


def test_everything_that_has_a_key_has_a_name_a_palette_entry_and_no_key_that_terminals_mix_up(folder: Path) -> None:
    """In every place; two actions of one place never share a key."""
    from editctl.tui.app import Actions
    from editctl.tui.keys import SAME, known

    bindings = list(known())
    assert len(bindings) > 60
    for where, binding in bindings:
        keys = binding.key.split(",")
        assert binding.tooltip or binding.description, (where, binding)
        assert not set(keys) & set(SAME), (where, binding)

    async def script(screen: Screen) -> None:
        for number in range(1, 8):
            await screen.press("escape", str(number))
            await screen.press("escape")
            names = [name for name, _, _ in Actions(screen.app.screen)._found()]
            place = screen.app.screen
            own = {b.tooltip for b in type(place).BINDINGS if b.id and b.id != "leave"}
            assert {f"{what}" for what in own} <= {name.partition(": ")[2] for name in names}
            assert all(": " in name for name in names)

    play(script, folder)


def test_a_key_given_in_the_configuration_replaces_the_usual_one(folder: Path) -> None:
    """In the place, in the key bar, and in what ? says."""

    async def script(screen: Screen) -> None:
        await screen.press("space")
        assert not screen.app.staged
        await screen.press("z")
        assert screen.app.staged == {"whale"}
        assert "z stage" in screen.lines[-1]
        await screen.press("escape", "f2")
        assert screen.place == "plan"

    (folder / "editctl.toml").write_text('theme = "nord"\n[keys]\n"specs.stage" = "z"\n"go.plan" = "f2"\n')
    play(script, folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[keys]\n\n"specs.stag" = "z"', "editctl.toml:3: there is no key specs.stag"),
        ('[keys]\n"specs.stage" = "ctrl+m"', "editctl.toml:2: terminals send ctrl+m as return"),
        ('[keys]\n"specs.stage" = "n"', "editctl.toml:2: n would be specs.stage and specs.new in specs"),
        ('[keys]\n"specs.stage" = ""', "editctl.toml:2: specs.stage has no key"),
        ('[keys]\n"question.yes" = "g"', "editctl.toml:2: g would be yes to a question and is the key of"),
        ('[keys]\n"plan.apply" = "y"', "editctl.toml:2: y would be yes to a question and is the key of plan.apply"),
        ('theme = "mauve"', "editctl.toml:1: there is no theme mauve"),
    ],
)
def test_keys_and_themes_that_cannot_be_are_refused_with_their_line(folder: Path, text: str, told: str) -> None:
    """Before anything is shown; what is right passes."""
    from editctl.errors import InvalidInput
    from editctl.tui.keys import check
    from editctl.workspace import Workspace

    (folder / "editctl.toml").write_text(text + "\n")
    with pytest.raises(InvalidInput) as caught:
        check(Workspace(store=None, config=None))
    assert any(str(problem).startswith(told) for problem in caught.value.problems)
    (folder / "editctl.toml").write_text('theme = "nord"\n[keys]\n"specs.stage" = "z,space"\n')
    check(Workspace(store=None, config=None))


def test_the_mouse_does_what_the_keys_do(folder: Path) -> None:
    """A click on a place, on a row, on a key of the key bar; two on a row open it."""

    async def script(screen: Screen) -> None:
        pilot = screen.pilot
        await pilot.click(offset=(screen.lines[0].index("2 Plan"), 0))
        await screen.settle()
        assert screen.place == "plan"
        await pilot.click(offset=(screen.lines[0].index("1 Specs"), 0))
        await screen.settle()
        row = next(y for y, line in enumerate(screen.lines) if "Big Ben" in line)
        await pilot.click(offset=(20, row))
        await pilot.click(offset=(screen.lines[-1].index("space"), len(screen.lines) - 1))
        await screen.settle()
        assert screen.app.staged == {"clock"}
        await pilot.click(offset=(20, row), times=2)
        await screen.until(lambda: len(screen.app.screen_stack) > 1, "the form")

    play(script, folder)


def test_without_colour_everything_is_still_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR takes every colour away; states have glyphs."""

    async def script(screen: Screen) -> None:
        await screen.press("space")
        strips = screen.app.screen._compositor.render_strips()
        colours = {
            colour.triplet
            for strip in strips
            for segment in strip.apply_filter(screen.app._filters[-1], screen.app.screen.background_colors[1])
            if segment.style
            for colour in (segment.style.color, segment.style.bgcolor)
            if colour is not None and colour.triplet is not None
        }
        assert all(red == green == blue for red, green, blue in colours)
        await screen.shows("● + new")

    monkeypatch.setenv("NO_COLOR", "1")
    play(script, folder)


async def first_words(port: int, origin: str) -> bytes:
    """What a browser's socket gets until the specs are listed; the page it is opened from is `origin`."""
    import aiohttp

    said = b""
    where = f"http://127.0.0.1:{port}/ws?width=100&height=30"
    async with aiohttp.ClientSession() as browser, browser.ws_connect(where, origin=origin) as socket:
        while b"3 edits in 2 files" not in said:
            message = await asyncio.wait_for(socket.receive(), 20)
            said += message.data if isinstance(message.data, bytes) else str(message.data).encode()
    return said


def test_the_browser_is_served_on_this_machine_and_to_its_own_page_alone(folder: Path) -> None:
    """The page and the UI in it come from 127.0.0.1; no other address answers, and no other site's socket."""
    import socket
    import subprocess
    import sys
    import urllib.request

    import aiohttp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "editctl", "tui", "--serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(400):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2) as page:
                        assert b"editctl" in page.read()
                    break
                except OSError:
                    time.sleep(0.05)
            else:
                pytest.fail("no page came")
            assert b"Specs" in asyncio.run(first_words(port, f"http://127.0.0.1:{port}"))
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                asyncio.run(first_words(port, "http://example.org"))
            addresses = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
            for address in addresses:
                if not address.startswith("127."):
                    with pytest.raises(OSError):
                        socket.create_connection((address, port), timeout=1).close()
        finally:
            server.terminate()
