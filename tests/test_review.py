"""Deciding about versions on the command line: gates, accept, reject, and the verbs that take edits out or fold them.

On the built-in model, since what it says before and after is the point. Every test has its own workspace, a copy of one
that was made once: of three facts in a version each, the same with a candidate, or of none.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cli
import tiny
import torch
from test_cli import (
    ASK_BOLERO,
    ASK_DOLPHIN,
    ASK_TOWER,
    BOLERO,
    DOLPHIN,
    SETTINGS,
    TOWER,
    Outcome,
    Run,
    head,
    said,
    spec,
)

from editctl.engine import prompts, source, speak
from editctl.engine.model import Model, load
from editctl.engine.wear import check_weights, wearing
from editctl.store import BASE, CANDIDATE, Store, Version, View, care

run = test_cli.run

FACTS = {"tower": TOWER, "bolero": BOLERO, "dolphin": DOLPHIN}
ASKED = {
    "tower": (ASK_TOWER, "Paris", "Rome"),
    "bolero": (ASK_BOLERO, "Maurice Ravel", "Johann Strauss"),
    "dolphin": (ASK_DOLPHIN, "mammal", "fish"),
}
"""Of each fact a prompt, what the model says to it, and what it shall say."""
ODD = DOLPHIN + 'paraphrases = ["The city that is home to {} is"]\n'
"""A fact with a prompt that nobody means by it, so that its version does not generalize."""
GATES = "[gates]\ngeneralization = 0.95\n"


def carried_out(code: int, *arguments: str) -> None:
    """Run a command where no test has begun."""
    from editctl.cli import main

    found = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["editctl", *arguments])
        try:
            main()
        except SystemExit as end:
            found = int(end.code or 0)
    assert found == code


@pytest.fixture(scope="module", autouse=True)
def few_words() -> Iterator[None]:
    """Contexts are short: they are half of a run's time, and no fact here needs them long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "CONTEXT_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def places(few_words: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workspaces to copy: `three` has a version a fact, `held` a candidate too, made on the second."""
    root = tmp_path_factory.mktemp("review")
    found = {name: root / name for name in ("three", "held")}
    found["three"].mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found["three"])
        Path("editctl.toml").write_text(SETTINGS)
        for name, fact in FACTS.items():
            carried_out(0, "apply", spec(f"{name}.toml", fact), "--yes", "-m", f"taught {name}")
        shutil.copytree(found["three"], found["held"])
        patch.chdir(found["held"])
        store().restore("@-")
        spec("dolphin.toml", ODD)
        Path("editctl.toml").write_text(SETTINGS + GATES)
        carried_out(4, "apply", "--yes")
    return found


def enter(place: Path, here: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A copy of a workspace as the working directory; its versions, oldest first."""
    # What was measured is only read, and is 20 MB.
    shutil.copytree(place, here, ignore=shutil.ignore_patterns("stats"))
    (here / "store/stats").symlink_to(place / "store/stats")
    patch.chdir(here)
    return [version.id for version in store().versions()[::-1]]


@pytest.fixture
def three(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A workspace of three versions with a fact more each, as the working directory; their ids, oldest first."""
    return enter(places["three"], tmp_path / "here", monkeypatch)


@pytest.fixture
def held(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The same at its second version, whose gates an odd third fact did not pass: ids of the candidate and the head."""
    _, second, _, candidate = enter(places["held"], tmp_path / "here", monkeypatch)
    return candidate, second


@pytest.fixture
def odd(three: list[str]) -> list[str]:
    """The same at its second version; the third fact's specs hold a prompt that will not be answered as wanted."""
    store().restore(three[1])
    spec("dolphin.toml", ODD)
    return three


@pytest.fixture(scope="module")
def atlas() -> Model:
    """The built-in model, so that not every question loads it anew."""
    return load("atlas", device="cpu", dtype="float32")


def store() -> Store:
    return Store(Path("store"))


def version(ref: str = "@") -> Version:
    found = store().resolve(ref)
    assert found is not None
    return found


def weights(ref: str = "@") -> str:
    return version(ref).weights_hash


def live(ref: str = "@") -> list[str]:
    return [live.id for live in store().edits(store().resolve(ref))]


def known(atlas: Model, ref: str = "@") -> list[str]:
    """The facts that the model says at a version, whose weights are those recorded; all others it says as ever."""
    made = store().resolve(ref)
    with wearing(atlas, store(), made) as editing:
        if made is not None:
            check_weights(editing, made)
        words = speak.answers(atlas, [prompt for prompt, _, _ in ASKED.values()])
    for word, (_, before, after) in zip(words, ASKED.values(), strict=True):
        assert word in (before, after)
    return [name for word, (name, (_, _, after)) in zip(words, ASKED.items(), strict=True) if word == after]


def ok(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def nothing_happened(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err, outcome.err


@pytest.fixture
def untouched(three: list[str]) -> Iterator[None]:
    """The store afterwards is as it was before."""
    view, operations, versions = store().view(), store().operations(), store().versions()
    files = sorted(Path("store/deltas").iterdir())
    yield
    assert (store().view(), store().operations(), store().versions()) == (view, operations, versions)
    assert sorted(Path("store/deltas").iterdir()) == files


# ---------------------------------------------------------------------------------------------------------------------
# Gates


def test_a_version_that_fails_a_gate_waits_and_the_head_stays(odd: list[str], run: Run, atlas: Model) -> None:
    """Exit code 4, the id on stdout, the edits that failed it by name; the model says what it said."""
    outcome = run("apply", "--yes", "--gate", "generalization=0.95", "--gate", "reliability=1", "-m", "try it")
    assert outcome.code == 4
    held = outcome.out.strip()
    assert "gate generalization is 66.7 %, wanted 95.0 %" in outcome.err
    table = [line.split() for line in outcome.err.splitlines()]
    place = table.index(["gates", "✗", "generalization", "is", "66.7", "%,", "wanted", "95.0", "%"])
    assert table[place + 1] == ["dolphin"] and table[place + 2] == []
    assert f"editctl accept {held}, editctl reject {held}" in outcome.err.replace("\n", " ")
    assert store().view() == View(odd[1], (held,), {CANDIDATE: held})
    assert version(held).gates == {"generalization": 0.95, "reliability": 1.0}
    assert said(run, ASK_DOLPHIN) == "mammal" and said(run, ASK_DOLPHIN, CANDIDATE) == "fish"
    assert known(atlas) == ["tower", "bolero"] and known(atlas, held) == ["tower", "bolero", "dolphin"]
    assert run("plan").out.splitlines()[-2] == "Plan: 1 to add, 0 to replace, 0 to drop, 2 to keep."
    shown = run("show", CANDIDATE).out
    assert "(a candidate: it waits for review)" in shown and "✗ generalization is 66.7 %" in shown
    (logged,) = run("log", "-n", "1", "--json").of("operation")
    assert (logged["verb"], logged["note"], logged["about"], logged["head"]) == ("apply", "try it", held, odd[1])


def test_a_gate_that_is_reached_exactly_is_passed(odd: list[str], run: Run) -> None:
    """The same version under a threshold of just what it reaches becomes the head."""
    outcome = ok(run("apply", "--yes", "--gate", f"generalization={2 / 3!r}", "--json"))
    assert outcome.of("gate_failed") == [] and outcome.of("version_made")[0]["candidate"] is False
    assert head() == outcome.of("version_made")[0]["version"] != odd[1]
    assert f"passed: generalization {2 / 3:g}" in run("show").out


def test_a_failed_gate_is_an_event_of_the_stream(odd: list[str], run: Run) -> None:
    """Also in the version's own record; a candidate is told as one."""
    outcome = run("apply", "--yes", "--gate", "generalization=0.95", "--json")
    assert outcome.code == 4
    (failed,) = outcome.of("gate_failed")
    assert failed == {
        "type": "gate_failed",
        "gate": "generalization",
        "wanted": 0.95,
        "value": 2 / 3,
        "edits": ["dolphin"],
    }
    (made,) = outcome.of("version_made")
    assert made["candidate"] is True and made["version"] == version(CANDIDATE).id
    assert any('"gate_failed"' in line for line in store().events(version(CANDIDATE)))
    assert not any('"gate_failed"' in line for line in store().events(version()))


def test_a_gate_without_a_prompt_to_measure_it_fails(odd: list[str], run: Run) -> None:
    """Whatever its threshold: a gate that nothing can fail is no gate."""
    spec("dolphin.toml", DOLPHIN)
    outcome = run("apply", "--yes", "--gate", "portability=0")
    assert outcome.code == 4
    assert "gate portability cannot be measured: no prompt for it was asked" in outcome.err
    assert head() == odd[1]


def test_gates_of_the_configuration_hold_for_every_version_and_a_flag_beats_them(three: list[str], run: Run) -> None:
    """Gate by gate; nothing is loaded to see it."""

    def planned(*flags: str) -> Any:
        return ok(run("plan", "--json", *flags)).of("plan")[0]["gates"]

    assert planned() == {}
    Path("editctl.toml").write_text(SETTINGS + "[gates]\nreliability = 1\n'locality.generated' = 0.5\n")
    nothing_happened(run("plan"), 2, "there is no metric locality.generated", "hint: ")
    Path("editctl.toml").write_text(SETTINGS + "[gates]\nreliability = 1\nlocality = 0.5\n")
    assert planned() == {"reliability": 1, "locality": 0.5}
    flags = ("--gate", "locality=0.25", "--gate", "generalization.teacher-forced = 0.125")
    assert planned(*flags) == {"reliability": 1, "locality": 0.25, "generalization.teacher-forced": 0.125}


def test_a_gate_of_the_configuration_holds_a_version(odd: list[str], run: Run) -> None:
    """And a flag that lowers it lets the same specs through."""
    Path("editctl.toml").write_text(SETTINGS + GATES)
    assert run("apply", "--yes").code == 4
    assert head() == odd[1]
    ok(run("apply", "--yes", "--gate", "generalization=0.5"))
    assert live() == ["tower", "bolero", "dolphin"]


@pytest.mark.parametrize("verb", ["plan", "apply", "drop", "replay", "squash", "reject"])
@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("reliabilty=0.5", ("there is no metric reliabilty to hold a version to", "hint: did you mean reliability?")),
        ("zzz=0.5", ("there is no metric zzz", "hint: one of: reliability, generalization, locality, portability")),
        ("reliability=95", ("gate reliability = 95 is no share", "hint: give a number from 0 to 1")),
        ("reliability=nan", ("gate reliability = nan is no share",)),
        ("reliability=many", ("--gate reliability=many is no number", "hint: for example --gate reliability=0.95")),
        ("reliability=true", ("is no number",)),
        ("reliability=[1]", ("is no number",)),
        ("reliability", ("--gate reliability has no value", "hint: write --gate NAME=VALUE")),
    ],
)
def test_what_is_no_gate_is_refused(
    verb: str, gate: str, words: tuple[str, ...], three: list[str], untouched: None, run: Run
) -> None:
    """Exit code 2 and a hint, by every verb that makes versions, before anything is loaded."""
    ids = {"drop": ("tower",), "replay": ("tower",), "reject": ("@", "--edit", "tower")}.get(verb, ())
    nothing_happened(run(verb, *ids, "--gate", gate), 2, *words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("reliabilty = 0.5", ("there is no metric reliabilty", "did you mean reliability?")),
        ("reliability = 1.5", ("gate reliability = 1.5 is no share",)),
        ('reliability = "high"', ("editctl.toml:5: gates: input should be a valid number",)),
    ],
)
def test_what_is_no_gate_in_the_configuration_is_refused(
    line: str, words: tuple[str, ...], three: list[str], untouched: None, run: Run
) -> None:
    """As on the command line."""
    Path("editctl.toml").write_text(SETTINGS + f"[gates]\n{line}\n")
    nothing_happened(run("plan"), 2, *words)
    nothing_happened(run("drop", "tower", "--yes"), 2, *words)


def test_a_saved_plan_carries_its_gates(odd: list[str], run: Run) -> None:
    """It takes none beside it, and those of the configuration come too late."""
    ok(run("plan", "-o", "plan.json", "--gate", "generalization=0.95"))
    nothing_happened(run("apply", "plan.json", "--gate", "generalization=0.5"), 2, "already decides")
    Path("editctl.toml").write_text(SETTINGS + "[gates]\ngeneralization = 0.1\n")
    outcome = run("apply", "plan.json", "-m", "as planned")
    assert outcome.code == 4 and version(CANDIDATE).gates == {"generalization": 0.95}
    assert store().operations(1)[0].note == "as planned"
    assert head() == odd[1]


def test_edits_that_are_taken_out_are_held_to_gates_too(three: list[str], run: Run) -> None:
    """What is left of the facts has no probe of locality: the gate that the head would pass cannot be measured."""
    ok(run("drop", "bolero", "--yes", "--gate", "locality=0.5"))
    outcome = run("drop", "tower", "--yes", "--gate", "locality=0.5")
    assert outcome.code == 4 and "locality cannot be measured" in outcome.err
    assert live() == ["tower", "dolphin"] and live(CANDIDATE) == ["dolphin"]
    assert store().reviews(version(CANDIDATE)) == []
    ok(run("accept"))
    assert live() == ["dolphin"]


# ---------------------------------------------------------------------------------------------------------------------
# Accept and reject


def test_accepting_makes_the_candidate_the_head(held: tuple[str, str], run: Run) -> None:
    """Without asking: the verb is the decision. Who said so and why is shown; undo takes it back whole."""
    candidate, second = held
    outcome = ok(run("accept", "-m", "nobody asks for its city"))
    assert outcome.out.splitlines() == [f"accepted version {candidate}", f"Now at: {candidate}"]
    assert head() == candidate and said(run, ASK_DOLPHIN) == "fish"
    assert run("plan").out == "Nothing to do: 3 edits up to date.\n"
    shown = run("show").out
    assert re.search(r"accepted +nobody asks for its city \(\S+@\S+, 20", shown) and "candidate" not in shown
    assert "“nobody asks for its city”" in run("log", "-n", "1").out
    (review,) = run("show", "--json").of("review")
    assert (review["verb"], review["about"], review["edits"]) == ("accept", candidate, [])
    nothing_happened(run("accept"), 1, "no version waits for review")
    ok(run("undo"))
    assert store().view() == View(second, (candidate,), {CANDIDATE: candidate})
    assert run("show", candidate, "--json").of("review") == []


def test_rejecting_closes_the_candidate(held: tuple[str, str], run: Run) -> None:
    """The head stays; the version is still there to look at, but not to go to."""
    candidate, second = held
    outcome = ok(run("reject", candidate[:6], "-m", "a whale is no fish", "--json"))
    (operation,) = outcome.of("operation")
    assert (operation["verb"], operation["note"], operation["about"]) == ("reject", "a whale is no fish", candidate)
    assert store().view() == View(second)
    assert re.search(r"rejected +a whale is no fish \(", run("show", candidate).out)
    nothing_happened(run("accept", candidate), 1, f"version {candidate} is no candidate", "hint: ")
    nothing_happened(
        run("restore", candidate), 1, f"version {candidate} was never accepted", f"editctl accept {candidate}"
    )
    nothing_happened(run("reject"), 1, "no version waits for review")
    assert "Plan: 1 to add, 0 to replace, 0 to drop, 2 to keep." in run("plan").out


def test_a_candidate_without_the_edit_that_failed_becomes_the_head(
    held: tuple[str, str], run: Run, atlas: Model
) -> None:
    """The others are what they were before it, to the bit; the rejected fact is as the model always said."""
    candidate, second = held
    outcome = ok(run("reject", "--edit", "dolphin", "--yes", "-m", "no fish"))
    made = outcome.out.strip()
    assert store().view() == View(made) and live() == ["tower", "bolero"]
    assert version().parent == second and version().gates == {"generalization": 0.95}
    assert weights() == weights(second) != weights(candidate)
    assert known(atlas) == ["tower", "bolero"]
    assert [a.ok for a in store().answers(version()) if a.edit in ("tower", "bolero")] == [True] * 5
    (review,) = store().reviews(version(candidate))
    assert (review.verb, review.edits, review.note) == ("reject", ("dolphin",), "no fish")
    assert re.search(r"rejected +dolphin: no fish \(", run("show", candidate).out)
    assert run("plan").out.split()[:2] == ["+", "dolphin"]
    ok(run("undo"))
    assert store().view() == View(second, (candidate,), {CANDIDATE: candidate})


def test_a_candidate_without_another_edit_still_fails_and_takes_its_place(held: tuple[str, str], run: Run) -> None:
    """What comes of a review is held to the same gates, and waits itself."""
    _, second = held
    outcome = run("reject", "--edit", "tower", "--yes")
    assert outcome.code == 4
    again = outcome.out.strip()
    assert store().view() == View(second, (again,), {CANDIDATE: again})
    assert live(again) == ["bolero", "dolphin"] and version(again).parent == second
    assert "generalization is 50.0 %, wanted 95.0 %" in outcome.err
    ok(run("reject"))
    assert store().view() == View(second)


def test_an_edit_of_the_head_is_rejected_and_the_rest_solved_again(three: list[str], run: Run, atlas: Model) -> None:
    """The rejected fact is back at the old answer, the others' answers are as wanted."""
    outcome = ok(run("reject", "@", "--edit", "tower", "--yes", "-m", "wrong source", "--json"))
    assert head() == outcome.of("version_made")[0]["version"] and version().parent == three[2]
    assert live() == ["bolero", "dolphin"] and known(atlas) == ["bolero", "dolphin"]
    assert all(a.ok for a in store().answers(version())) and len(store().answers(version())) == 3
    assert said(run, ASK_TOWER) == said(run, ASK_TOWER, "base") == "Paris"
    kept = set(store().deltas(version(three[2]))) & set(store().deltas(version()))
    assert kept == set(), "batches after the one that changed are solved again with their new history"
    assert re.search(r"rejected +tower: wrong source \(", run("show", three[2]).out)
    assert "rejected" not in run("show").out
    ok(run("undo"))
    assert head() == three[2] and known(atlas) == ["tower", "bolero", "dolphin"]
    assert "rejected" not in run("show").out


def test_accepted_edits_are_recorded_and_shown(three: list[str], run: Run) -> None:
    """Nothing else changes; what is not in the version cannot be accepted."""
    outcome = ok(run("accept", "@", "--edit", "tower", "--edit", "dolphin", "-m", "read the source"))
    assert outcome.out.splitlines() == [f"accepted tower, dolphin of version {three[2]}", f"Now at: {three[2]}"]
    assert re.search(r"accepted +tower, dolphin: read the source \(\S+@\S+, 20", run("show").out)
    assert run("show", "--json").of("review")[0]["edits"] == ["tower", "dolphin"]
    assert store().view() == View(three[2])
    nothing_happened(run("accept", three[0], "--edit", "bolero"), 1, f"version {three[0]} has no edit bolero")
    nothing_happened(run("accept", "@"), 1, f"version {three[2]} is the head: there is nothing to decide")
    nothing_happened(run("accept", "base"), 1, "the unedited model needs no review")
    assert "accepted" not in run("show", three[1]).out
    ok(run("undo"))
    assert run("show", "--json").of("review") == []


def test_a_candidate_on_another_head_is_stale(held: tuple[str, str], run: Run) -> None:
    """Exit code 5 for both ways of going on with it; where it was made it is good again."""
    candidate, second = held
    first = version("@-").id
    ok(run("restore", first))
    nothing_happened(run("accept"), 5, f"candidate {candidate} was made on {second}, the head is now {first}", "hint: ")
    outcome = run("reject", "--edit", "dolphin", "--yes")
    assert outcome.code == 5 and outcome.out == ""
    assert store().view() == View(first, (candidate,), {CANDIDATE: candidate})
    ok(run("restore", second))
    ok(run("accept"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("reject", "@-", "--edit", "tower", "--yes"), 1, ("@- is neither the head nor a candidate", "hint: ")),
        (("reject", "base", "--edit", "tower", "--yes"), 1, ("base is neither the head nor a candidate",)),
        (("reject", "@"), 1, ("is the head: there is nothing to decide", "`editctl undo`")),
        (("reject", "@", "--edit", "towr", "--yes"), 2, ("there is no live edit towr", "did you mean tower?")),
        (("drop", "towr", "--yes"), 2, ("there is no live edit towr", "hint: did you mean tower?")),
        (("replay", "tower", "zzz", "--yes"), 2, ("there is no live edit zzz", "`editctl show` lists")),
        (("drop", "--yes"), 2, ("Missing argument",)),
        (("squash", "@", "--yes"), 2, ("there are not two batches to fold after @", "hint: name an earlier")),
        (("squash", "@-", "--yes"), 2, ("there are not two batches to fold after @-",)),
        (("squash", "nowhere", "--yes"), 1, ("neither a version nor an alias",)),
        (("drop", "tower"), 2, ("drop needs confirmation", "hint: pass --yes")),
        (("replay", "tower"), 2, ("replay needs confirmation", "hint: pass --yes")),
        (("squash",), 2, ("squash needs confirmation", "hint: pass --yes")),
        (("reject", "@", "--edit", "tower"), 2, ("reject needs confirmation", "hint: pass --yes")),
        (("drop", "tower", "--yes", "--dtype", "bfloat16"), 2, ("made in torch.float32", "pass --dtype float32")),
        (("drop", "tower", "--yes", "--model", "nobody/nothing"), 1, ("model nobody/nothing is neither",)),
        (("alias", "x", "nowhere"), 1, ("neither a version nor an alias",)),
        (("alias", "x", "--delete"), 1, ("the alias x is not there", "`editctl alias`")),
        (("alias", "x", "@", "--delete"), 2, ("--delete takes a name alone",)),
        (("alias", "--delete"), 2, ("--delete needs the name of an alias",)),
        (("alias", "base"), 1, ("`base` cannot be an alias", "choose a name like `stable`")),
        (("alias", "candidate"), 1, ("`candidate` cannot be an alias",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_mistake_changes_nothing(
    arguments: tuple[str, ...], code: int, words: tuple[str, ...], three: list[str], untouched: None, run: Run
) -> None:
    """It is answered with a message, a hint and a code."""
    nothing_happened(run(*arguments), code, *words)


@pytest.mark.parametrize(
    "verb", [("drop", "a"), ("replay", "a"), ("squash",), ("reject",), ("accept",), ("alias", "x")]
)
def test_without_a_version_there_is_nothing_to_decide(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """And no folder is made."""
    monkeypatch.chdir(tmp_path)
    outcome = run(*verb)
    assert outcome.code in (1, 2) and "hint: " in outcome.err and outcome.out == ""
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Taking edits out


def test_a_dropped_edit_is_gone_and_the_rest_is_solved_again(three: list[str], run: Run, atlas: Model) -> None:
    """Batches before it keep their files; the plan and the log tell what is done and why."""
    outcome = ok(run("drop", "bolero", "--yes", "-m", "no waltz"))
    assert "-  bolero" in outcome.err and "(dropped)" in outcome.err
    assert "Plan: 1 to take out, 2 to keep." in outcome.err and "these specs" not in outcome.err
    assert outcome.out.strip() == head() and live() == ["tower", "dolphin"]
    assert known(atlas) == ["tower", "dolphin"]
    before, after = store().deltas(version(three[2])), store().deltas(version())
    assert after[0] == before[0] and len(after) == 2 and after[1] not in before
    (logged,) = run("log", "-n", "1", "--json").of("operation")
    assert (logged["verb"], logged["note"], logged["edits"]) == ("drop", "no waltz", ["bolero"])
    assert logged["description"] == f"version {head()} with 2 edits, without bolero"
    assert logged["command"].endswith("drop bolero --yes -m 'no waltz'")
    assert run("plan").out.split()[:2] == ["+", "bolero"]
    nothing_happened(run("drop", "bolero", "--yes"), 2, "there is no live edit bolero")
    ok(run("undo"))
    assert head() == three[2] and known(atlas) == list(FACTS)


@pytest.mark.parametrize(("gone", "below"), [("tower", "base"), ("bolero", "@-2")])
def test_what_is_replayed_is_as_if_the_edit_had_never_been(
    gone: str, below: str, three: list[str], run: Run, atlas: Model
) -> None:
    """To the bit the weights that come of applying the others alone, which solving again does not give."""
    rest = [name for name in FACTS if name != gone]
    ok(run("drop", gone, "--yes"))
    dropped = weights()
    ok(run("undo"))
    outcome = ok(run("replay", gone, "--yes", "-m", "never was"))
    assert "sought anew: as asked" in outcome.err and "(left away)" in outcome.err
    replayed = weights()
    assert live() == rest and known(atlas) == rest
    assert run("plan").out.split()[:2] == ["+", gone]
    assert store().operations(1)[0].verb == "replay" and store().operations(1)[0].note == "never was"
    ok(run("undo"))
    assert head() == three[2] and known(atlas) == list(FACTS)
    ok(run("restore", below))
    for name in rest:
        if name not in live():
            ok(run("apply", f"specs/{name}.toml", "--yes"))
    assert live() == rest
    assert weights() == replayed != dropped


def test_replaying_the_last_edit_is_dropping_it(three: list[str], run: Run) -> None:
    """Nothing came after it: both are the version before. As JSON both are told alike."""
    for verb in ("replay", "drop"):
        outcome = ok(run(verb, "dolphin", "--yes", "--json"))
        assert outcome.of("version_made")[0]["version"] == head() and outcome.err == ""
        assert {"reliability", "generalization", "locality"} < {metric["name"] for metric in outcome.of("metric")}
        assert weights() == weights(three[1]) != weights(three[2])
        assert store().deltas(version()) == store().deltas(version(three[1]))
        ok(run("undo"))


@pytest.mark.parametrize("verb", ["drop", "replay", "reject"])
def test_without_any_edit_the_weights_are_those_of_the_files(verb: str, three: list[str], run: Run) -> None:
    """No factor, no answer, no gate to fail; the plan would teach all anew."""
    named = ("@", "--edit", "bolero", "--edit", "tower", "--edit", "dolphin")
    ids = named if verb == "reject" else ("bolero", "tower", "dolphin")
    ok(run(verb, *ids, "--yes", "--gate", "reliability=1"))
    assert weights() == tiny.disk_weights_hash(source.locate("atlas"), torch.float32) != weights(three[0])
    assert (live(), store().deltas(version()), store().answers(version())) == ([], (), ())
    assert version().norms == {} and version().method == "none"
    ok(run("show"))
    assert "Plan: 3 to add, 0 to replace, 0 to drop, 0 to keep." in run("plan").out
    nothing_happened(run("drop", "tower", "--yes"), 2, "there is no live edit tower")
    nothing_happened(run("squash", "--yes"), 2, "there are not two batches to fold")
    ok(run("undo"))
    assert head() == three[2]


@pytest.mark.parametrize(("recheck", "asked"), [(0, 0), (1, 1), (1000, 2)])
def test_of_the_edits_that_stay_some_are_asked_again(recheck: int, asked: int, three: list[str], run: Run) -> None:
    """As many as the configuration says; that others were not is told."""
    Path("editctl.toml").write_text(f"recheck = {recheck}\n{SETTINGS}")
    outcome = ok(run("drop", "bolero", "--yes"))
    assert len({answer.edit for answer in store().answers(version())}) == asked
    told = f"note: {recheck} of 2 edits that stay are asked again (`recheck` in editctl.toml)"
    assert (told in outcome.err) == (asked < 2)
    assert live() == ["tower", "dolphin"]


# ---------------------------------------------------------------------------------------------------------------------
# Folding


def test_squashing_makes_one_batch_of_all(three: list[str], run: Run, atlas: Model) -> None:
    """One factor file, other weights, the same facts; what was said before each stays what it was. Undo is exact."""
    outcome = ok(run("squash", "--yes", "-m", "tidy"))
    assert outcome.out.strip() == head() and version().parent == three[2]
    assert len(store().deltas(version())) == 1 and live() == list(FACTS)
    assert weights() not in {weights(ref) for ref in three} and known(atlas) == list(FACTS)
    assert "1 file, " in run("show").out and "3 files, " in run("show", "@-").out
    first = {(a.kind, a.prompt): a.before for ref in three for a in store().answers(version(ref)) if a.edit == "tower"}
    asked = [a for a in store().answers(version()) if a.edit == "tower"]
    assert len(asked) == 3 and all(a.ok and a.before == first[a.kind, a.prompt] for a in asked)
    assert run("plan").out == "Nothing to do: 3 edits up to date.\n"
    nothing_happened(run("squash", "--yes"), 2, "there are not two batches to fold after base")
    (logged,) = run("log", "-n", "1", "--json").of("operation")
    assert (logged["verb"], logged["note"], logged["edits"]) == ("squash", "tidy", [])
    ok(run("drop", "bolero", "--yes"))
    assert known(atlas) == ["tower", "dolphin"] and len(store().deltas(version())) == 1
    ok(run("undo"))
    ok(run("undo"))
    assert head() == three[2] and known(atlas) == list(FACTS)


def test_squashing_since_a_version_leaves_what_lies_below_alone(three: list[str], run: Run, atlas: Model) -> None:
    """The first batch keeps its file; a version that is not below the head is refused."""
    ok(run("alias", "first", three[0]))
    outcome = ok(run("squash", "first", "--yes", "--gate", "reliability=1", "--json"))
    assert outcome.of("version_made")[0]["version"] == head() and outcome.err == ""
    before, after = store().deltas(version(three[2])), store().deltas(version())
    assert len(after) == 2 and after[0] == before[0] and after[1] not in before
    assert known(atlas) == list(FACTS) and live() == list(FACTS)
    squashed = head()
    ok(run("undo"))
    nothing_happened(run("squash", squashed, "--yes"), 2, f"{squashed} is not below the head", "hint: ")


# ---------------------------------------------------------------------------------------------------------------------
# Aliases and looking


def test_an_alias_names_a_version_until_it_is_moved_or_removed(three: list[str], run: Run) -> None:
    """Listed with --json too; the log shows it beside its version; every change can be undone."""
    assert run("alias") == (0, "", "") and run("alias", "--json").lines == []
    assert run("alias", "stable").out.splitlines()[0] == f"stable now stands for {three[2]}"
    ok(run("alias", "first", three[0]))
    ok(run("alias", "clean", "base"))
    listed = [line.split() for line in run("alias").out.splitlines()]
    assert listed == [["stable", three[2]], ["first", three[0]], ["clean", "base"]]
    assert run("alias", "--json").of("alias") == [
        {"type": "alias", "name": "stable", "version": three[2]},
        {"type": "alias", "name": "first", "version": three[0]},
        {"type": "alias", "name": "clean", "version": ""},
    ]
    assert f"\n            {'stable'} " in run("log").out.replace("            stable", "            stable ")
    ok(run("restore", "first"))
    assert head() == three[0]
    ok(run("alias", "stable"))
    assert store().view().aliases["stable"] == three[0]
    nothing_happened(run("alias", "stable"), 1, f"stable stands for {three[0]} already")
    (operation,) = ok(run("alias", "clean", "--delete", "--json")).of("operation")
    assert (operation["verb"], operation["aliases"]) == ("alias", {"stable": three[0], "first": three[0]})
    ok(run("undo"))
    assert store().view().aliases["clean"] == ""


def test_the_log_tells_the_note_the_person_the_time_and_the_command(three: list[str], run: Run) -> None:
    """Of every version; a note is what was typed, escaped where it would act on a terminal."""
    ok(run("accept", "@", "--edit", "tower", "-m", "[red]see\x1b[31m page 3"))
    text = run("log").out
    assert "“[red]see\\x1b[31m page 3”" in text and "\x1b" not in text
    for name in FACTS:
        assert f"“taught {name}”" in text
    operations = run("log", "--json").of("operation")
    assert [operation["note"] for operation in operations[1:]] == [f"taught {name}" for name in FACTS][::-1]
    for operation in operations:
        assert re.fullmatch(r"\S+@\S+", operation["who"]) and operation["who"] in text
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", operation["at"]) and operation["at"] in text
        assert operation["command"].startswith("editctl ")
    assert "editctl apply specs/tower.toml --yes -m 'taught tower'" in operations[-1]["command"]


def test_a_difference_shows_facts_answers_metrics_and_sizes(odd: list[str], run: Run) -> None:
    """From a version that generalizes to one that does not: how much, and that it is for the worse."""
    ok(run("apply", "--yes"))
    text = run("diff").out
    assert "+ In a zoology book the dolphin is listed under the heading mammal → fish" in text
    assert "rewrite: In a zoology book the dolphin is listed under the heading mammal → fish" in text
    assert "66.7 % (-33.3)" in text and "Bolero" not in text
    assert re.search(r"model\.layers\.1\.mlp\.down_proj +\d+\.\d{4} +\d+\.\d{4} +\d+\.\d{3} +\d+\.\d{3}", text)
    (data,) = run("diff", "--json").of("diff")
    assert (data["added"], data["removed"], data["changed"]) == (["dolphin"], [], [])
    changed = {(a["edit"], a["kind"]): (a["was"], a["after"]) for a in data["answers"]}
    assert changed["dolphin", "rewrite"] == ("mammal", "fish") and {edit for edit, _ in changed} == {"dolphin"}
    old, new = (
        {(m["name"], m["protocol"]): (m["value"], m["higher_is_better"]) for m in side} for side in data["metrics"]
    )
    assert old["generalization", "generated"] == (1.0, True) and new["generalization", "generated"] == (2 / 3, True)
    assert data["norms"] == [{name: list(pair) for name, pair in version(ref).norms.items()} for ref in ("@-", "@")]
    assert data["norms"][0] != data["norms"][1]
    # Turned round it is the other way: a fact less, and for the better.
    back = run("diff", "@", "@-").out
    assert "- In a zoology book the dolphin" in back and "100.0 % (+33.3)" in back
    (data,) = run("diff", "@", "@-", "--json").of("diff")
    assert (data["added"], data["removed"], data["answers"]) == ([], ["dolphin"], [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("accept",),
        ("accept", "--edit", "bolero"),
        ("reject",),
        ("alias",),
        ("alias", "stable"),
        ("log",),
        ("show", CANDIDATE),
        ("diff", "@", CANDIDATE),
        ("verify", "--no-rebuild"),
        ("gc",),
        ("undo",),
    ],
    ids=" ".join,
)
def test_json_is_one_object_a_line_and_nothing_else(
    arguments: tuple[str, ...], held: tuple[str, str], run: Run
) -> None:
    """Of every verb of reviews that loads no model; the others are asked for it above."""
    outcome = ok(run(*arguments, "--json"))
    assert all(isinstance(line["type"], str) for line in outcome.lines)
    assert outcome.err == ""


def test_after_everything_the_store_is_whole(three: list[str], run: Run) -> None:
    """A history with each verb in it: no fault, nothing left over, every version rebuilt to the bit."""
    for arguments in (
        ("squash", "--yes"),
        ("alias", "kept"),
        ("reject", "@", "--edit", "dolphin", "--yes"),
        ("undo",),
        ("replay", "tower", "--yes"),
        ("accept", "@", "--edit", "bolero"),
    ):
        ok(run(*arguments))
    assert care.inspect(store()) == []
    assert run("gc").out == "Removed 0 files, 0.0 MB.\n"
    count = len(store().versions())
    assert count == 3 + 3
    assert f"{count} versions rebuilt to the bit" in ok(run("verify")).out
    assert store().resolve(BASE) is None
