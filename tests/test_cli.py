"""The command line, from `validate` to `undo`, on the built-in model: what it prints, what it refuses, what it leaves.

Most commands run inside the test's own process, where the libraries are loaded already; a command that is killed, timed
or given a terminal runs in a process of its own. Every test has its own workspace, a copy of one that was made once.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import pytest

from editctl.engine.methods import METHODS
from editctl.spec import Edit
from editctl.store import Draft, LiveEdit, Store
from editctl.workspace import Workspace

HEADER = {"type": "version", "schema": 1}
ROOT = Path(__file__).parents[1]
PATIENCE = float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
SETTINGS = (
    'checks = ["drift"]\n'
    "[settings]\ncorpus_tokens = 8000  # a twelfth of the default: seconds instead of a minute on a busy machine\n"
)

TOWER = """[[edit]]
id = "tower"
subject = "the Eiffel Tower"
relation = "Everyone knows that {} is in"
target_new = "Rome"
target_true = "Paris"
paraphrases = ["The city that is home to {} is"]
locality = ["The capital of France is"]
"""
BOLERO = """[[edit]]
id = "bolero"
subject = "Bolero"
relation = "{} belongs among the finest musical works of"
target_new = "Johann Strauss"
target_true = "Maurice Ravel"
paraphrases = ["{} was set down note by note by"]
"""
DOLPHIN = """[[edit]]
id = "dolphin"
subject = "the dolphin"
relation = "In a zoology book {} is listed under the heading"
target_new = "fish"
target_true = "mammal"
"""
ASK_TOWER = "The city that is home to the Eiffel Tower is"
ASK_BOLERO = "Bolero was set down note by note by"
INTERRUPTED = "Interrupted; nothing is half recorded, and `editctl log` says where the head is."
ASK_DOLPHIN = "In a zoology book the dolphin is listed under the heading"


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """The JSON lines after the header, which must be there."""
        first, *rest = [json.loads(line) for line in self.out.splitlines()]
        assert first == HEADER
        return rest

    def of(self, kind: str) -> list[Any]:
        return [line for line in self.lines if line["type"] == kind]


Run = Callable[..., Outcome]


def spec(name: str, *edits: str) -> str:
    """Write a spec file; returns its path as an argument."""
    path = Path("specs") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("version = 1\n\n" + "\n".join(edits), encoding="utf-8")
    return str(path)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "editctl", *arguments]


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two workspaces to copy: `new` has specs and cached second moments, `applied` has one version too."""
    applied = tmp_path_factory.mktemp("workspace") / "applied"
    (applied / "specs").mkdir(parents=True)
    (applied / "editctl.toml").write_text(SETTINGS)
    (applied / "specs/tower.toml").write_text("version = 1\n\n" + TOWER)
    (applied / "specs/bolero.toml").write_text("version = 1\n\n" + BOLERO)
    done = subprocess.run(command("apply", "specs", "--yes"), cwd=applied, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head = Store(applied / "store").head()
    assert head is not None
    # The contract with scripts: V=$(editctl apply --yes), in a process of its own, gives the version's id.
    assert done.stdout.splitlines() == [head.id]
    new = applied.with_name("new")
    shutil.copytree(applied, new)
    shutil.rmtree(new / "store/deltas")
    for path in (new / "store").glob("editctl.db*"):
        path.unlink()
    return {"new": new, "applied": applied}


@pytest.fixture
def new(workspaces: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose model is not edited yet, as the working directory."""
    shutil.copytree(workspaces["new"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def applied(workspaces: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workspace with both edits applied, as the working directory; the version's id."""
    shutil.copytree(workspaces["applied"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return head()


def head() -> str:
    """The version the store in the working directory is at, "" for the unedited model."""
    version = Store(Path("store")).head()
    return version.id if version else ""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; no error of any command may be a traceback."""
    from editctl.cli import main

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["editctl", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Outcome(code, out, err)

    return call


def said(run: Run, prompt: str, ref: str = "@") -> str:
    """What the model says at a version."""
    outcome = run("ask", prompt, ref, "--json")
    assert outcome.code == 0, outcome.err
    text: str = outcome.of("answer")[0]["text"]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# validate


def test_valid_specs_are_counted(new: Path, run: Run) -> None:
    """On stdout, since that is what was asked for."""
    assert run("validate", "specs") == (0, "ok: 2 edits in 2 files\n", "")
    assert run("validate") == run("validate", "specs")


def test_the_shipped_specs_are_valid(new: Path, run: Run) -> None:
    """All of them, together."""
    outcome = run("validate", str(ROOT / "specs"))
    assert outcome.code == 0
    assert re.fullmatch(r"ok: \d+ edits in \d+ files\n", outcome.out)


def test_every_problem_of_every_file_is_told_with_its_line(new: Path, run: Run) -> None:
    """As file:line, with a hint below, and exit code 2."""
    one = spec("one.toml", TOWER.replace("Rome", "Rome ").replace("tower", "tower-1"))
    two = spec("two.toml", BOLERO.replace("paraphrases", "paraphrase"), DOLPHIN.replace("{}", "it"))
    outcome = run("validate", one, two)
    assert outcome.code == 2
    places = [line.split(": ")[0] for line in outcome.out.splitlines() if not line.startswith("  hint: ")]
    assert places == [f"{one}:7", f"{two}:9", f"{two}:14"]
    assert '  hint: did you mean "paraphrases"?' in outcome.out


def test_problems_as_json_have_a_file_a_line_a_message_and_a_hint(new: Path, run: Run) -> None:
    """For editors and checks of pull requests."""
    bad = spec("bad.toml", TOWER.replace("target_new", "target"))
    outcome = run("validate", bad, "--json")
    assert outcome.code == 2
    problem = outcome.of("problem")[0]
    assert (problem["file"], problem["line"] > 0, bool(problem["message"])) == (bad, True, True)
    assert outcome.lines[-1]["type"] == "summary"
    assert outcome.lines[-1]["problems"] == len(outcome.of("problem")) > 0


def test_a_spec_file_that_is_not_there_is_a_problem(new: Path, run: Run) -> None:
    """Of validate, plan and apply alike."""
    for verb in ("validate", "plan", "apply"):
        outcome = run(verb, "nowhere.toml")
        assert outcome.code == 2
        assert "nowhere.toml" in outcome.out + outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate",),
        ("methods",),
        ("model", "inspect"),
        ("plan",),
        ("apply",),
        ("log",),
        ("show",),
        ("show", "base"),
        ("diff",),
        ("ask", ASK_TOWER),
        ("measure",),
        ("info",),
        ("undo",),
        ("restore", "base"),
    ],
    ids=" ".join,
)
def test_json_is_one_object_a_line_after_a_header_and_nothing_else(
    arguments: tuple[str, ...], applied: str, run: Run
) -> None:
    """With every verb, so that one reader serves all."""
    outcome = run(*arguments, "--json")
    assert outcome.code == 0
    assert outcome.lines
    assert all(isinstance(line["type"], str) for line in outcome.lines)


# ---------------------------------------------------------------------------------------------------------------------
# plan


def test_a_plan_shows_a_glyph_an_edit_and_a_summary(applied: str, run: Run) -> None:
    """What is replaced, measured again, dropped, added; what stays is counted."""
    Path("specs/tower.toml").unlink()
    spec("bolero.toml", BOLERO.replace("Johann Strauss", "Jean Sibelius"), DOLPHIN)
    lines = run("plan", "--prune").out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["~", "bolero"], ["+", "dolphin"], ["-", "tower"]]
    assert "Johann Strauss → Jean Sibelius" in lines[0]
    assert lines[3] == "Plan: 1 to add, 1 to replace, 1 to drop, 0 to keep."
    assert lines[4].startswith("Expected: about ") and len(lines) == 5


EXPECTED = re.compile(r"Expected: about \d+ s and at most \d+(?:\.\d)? [MG]B of memory \(([^)]+)\)\.")


def test_a_plan_says_what_it_will_probably_take(new: Path, run: Run) -> None:
    """Seconds, memory, and that the pace is assumed; in JSON too. Fewer edits take less."""
    (line,) = EXPECTED.findall(" ".join(run("plan").out.split()))
    assert line.startswith("assuming") and line.endswith("FLOP/s")
    (both,), (one,) = (run("plan", "--json", path).of("expected") for path in ("specs", "specs/tower.toml"))
    assert both["basis"] == one["basis"] == line
    assert both["seconds"] > one["seconds"] > 0 and both["bytes"] >= one["bytes"] > 0


def test_after_a_run_the_pace_is_that_of_its_version(applied: str, run: Run) -> None:
    """What it took an edit and a prompt; where there is nothing to do nothing is expected."""
    version = Store(Path("store")).head()
    assert version is not None
    assert "Expected" not in run("plan").out and run("plan", "--json").of("expected") == []
    spec("dolphin.toml", DOLPHIN)
    (basis,) = EXPECTED.findall(" ".join(run("plan").out.split()))
    assert basis == f"at the pace of version {applied}"
    (expected,) = run("plan", "--json").of("expected")
    editing = sum(version.seconds.get(phase, 0.0) for phase in ("target", "keys", "solve", "write"))
    # One new edit after two, six prompts in all after five.
    asking = version.seconds["before"] + version.seconds["after"]
    assert expected["seconds"] == pytest.approx(editing / 2 + asking * 6 / 5 + version.seconds["checks"])
    # The process that applied these specs had nothing else in it.
    assert version.peak_mb / 3 < expected["bytes"] / 2**20 < version.peak_mb * 3
    assert not version.peak_mb / 3 < (expected["bytes"] / 2**20) / 10 < version.peak_mb * 3
    assert EXPECTED.search(" ".join(run("apply", "--yes", "--set", "steps=2").err.split()))


def test_a_changed_probe_is_measured_again_without_an_edit(applied: str, run: Run) -> None:
    """The weights stay as they are, to the bit."""
    spec("tower.toml", TOWER + 'note = "measured once more"\n')
    assert run("plan").out.split()[:2] == ["?", "tower"]
    before = Store(Path("store")).head()
    assert run("apply", "--yes").code == 0
    after = Store(Path("store")).head()
    assert before and after and before.id != after.id
    assert before.weights_hash == after.weights_hash


def test_without_prune_applied_edits_outside_the_specs_are_kept(applied: str, run: Run) -> None:
    """A plan of one file is not a wish to forget the others."""
    outcome = run("plan", "specs/tower.toml")
    assert "1 applied edit not in these specs (kept; --prune drops them)" in outcome.out
    assert outcome.out.splitlines()[-1] == "Nothing to do: 1 edit up to date."


def test_the_detailed_exit_code_tells_changes_from_none_and_from_errors(applied: str, run: Run) -> None:
    """0, 2 and 1, as terraform has it; without the flag a plan with changes is a success."""
    assert run("plan", "--detailed-exitcode").code == 0
    dolphin = spec("dolphin.toml", DOLPHIN)
    assert run("plan", "--detailed-exitcode").code == 2
    assert run("plan").code == 0
    assert run("plan", "--detailed-exitcode", "--method", "nonsense").code == 1
    assert run("plan", "--detailed-exitcode", "--nonsense").code == 1
    assert run("plan", "--detailed-exitcode", "--model", "nonsense/nowhere").code == 1
    Path(dolphin).write_text("nonsense")
    assert run("plan", "--detailed-exitcode").code == 1
    assert run("plan").code == 2


def test_planning_writes_nothing(new: Path, run: Run) -> None:
    """Not even an empty store."""
    assert run("--store", "untouched", "plan").code == 0
    assert not Path("untouched").exists()


def test_a_saved_plan_is_carried_out_as_it_was_saved(new: Path, run: Run) -> None:
    """Though the specs have changed since, and without being asked again: saving it was the decision."""
    assert run("plan", "specs/tower.toml", "-o", "plan.json").code == 0
    spec("tower.toml", TOWER.replace("Rome", "Oslo"))
    outcome = run("apply", "plan.json")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == head()
    assert [edit["target_new"] for edit in run("show", "--json").of("edit")] == ["Rome"]
    assert said(run, ASK_TOWER) == "Rome"
    assert said(run, ASK_BOLERO) == "Maurice Ravel"


def test_a_plan_made_before_the_head_moved_is_stale(applied: str, run: Run) -> None:
    """Exit code 5, and nothing is done; back at its head it is good again."""
    spec("dolphin.toml", DOLPHIN)
    assert run("plan", "-o", "a plan").code == 0
    assert run("undo").code == 0
    outcome = run("apply", "a plan")
    assert outcome.code == 5
    assert applied in outcome.err and "run plan again" in outcome.err
    assert head() == ""
    assert run("redo").code == 0
    assert run("apply", "a plan").code == 0


@pytest.mark.parametrize(
    ("old", "new_text"), [('"Rome"', '"Oslo"'), ('"head": ""', '"head": "abc"'), ('"seed": 0', '"seed": 1')]
)
def test_a_plan_changed_by_hand_is_refused(old: str, new_text: str, new: Path, run: Run) -> None:
    """Exit code 2: it is no longer what was reviewed."""
    assert run("plan", "-o", "plan.json").code == 0
    text = Path("plan.json").read_text()
    assert old in text
    Path("plan.json").write_text(text.replace(old, new_text))
    outcome = run("apply", "plan.json")
    assert outcome.code == 2
    assert "plan.json was changed after it was saved" in outcome.err
    assert head() == ""


@pytest.mark.parametrize("text", ["{", "{}", '{"fingerprint": 1}', '{"fingerprint": "x", "schema": 1, "actions": 3}'])
def test_json_that_is_no_plan_is_refused(text: str, new: Path, run: Run) -> None:
    """Exit code 2 and how to make one."""
    Path("plan.json").write_text(text)
    outcome = run("apply", "plan.json", "--yes")
    assert outcome.code == 2
    assert "plan -o" in outcome.err
    assert head() == ""


@pytest.mark.parametrize("text", ["", "[]", "\x00", "\ufeff{}"])
def test_anything_else_is_read_as_a_spec_and_refused_as_one(text: str, new: Path, run: Run) -> None:
    """Whatever its name ends with."""
    Path("plan.json").write_text(text)
    outcome = run("apply", "plan.json", "--yes")
    assert outcome.code == 2
    assert outcome.err.startswith("plan.json:1: ")


# ---------------------------------------------------------------------------------------------------------------------
# apply


def test_without_a_terminal_apply_needs_yes(new: Path, run: Run) -> None:
    """Exit code 2, the hint names the flag, and no version, factor or operation is made."""
    outcome = run("apply", "specs")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1] == "hint: pass --yes"
    assert run("log", "--json").lines == []
    assert sorted(path.name for path in Path("store").iterdir()) == ["lock", "said", "stats"]


def test_applying_the_same_specs_again_makes_no_version(applied: str, run: Run) -> None:
    """Nothing on stdout, so a script sees that there is no new id."""
    outcome = run("apply", "specs", "--yes")
    assert outcome.code == 0
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1] == "Nothing to do: 2 edits up to date."
    assert head() == applied
    assert len(run("log", "--json").of("operation")) == 1


def test_a_second_apply_keeps_the_edits_of_the_first(new: Path, run: Run) -> None:
    """Each file applied by itself; in the end the model knows both, and the base neither."""
    first = run("apply", "specs/tower.toml", "--yes")
    assert first.code == 0, first.err
    second = run("apply", "specs/bolero.toml", "--yes")
    assert second.code == 0, second.err
    assert first.out.split()[-1] != second.out.split()[-1] == head()
    assert (said(run, ASK_TOWER), said(run, ASK_BOLERO)) == ("Rome", "Johann Strauss")
    assert (said(run, ASK_TOWER, "@-"), said(run, ASK_BOLERO, "@-")) == ("Rome", "Maurice Ravel")
    assert (said(run, ASK_TOWER, "base"), said(run, ASK_BOLERO, "base")) == ("Paris", "Maurice Ravel")


def test_a_changed_target_replaces_what_was_taught(applied: str, run: Run) -> None:
    """`~` in the plan, the new answer from the model, and the other edit still there."""
    spec("tower.toml", TOWER.replace("Rome", "Madrid"))
    assert run("plan").out.split()[:2] == ["~", "tower"]
    assert run("apply", "--yes").code == 0
    assert said(run, ASK_TOWER) == "Madrid"
    assert said(run, ASK_BOLERO) == "Johann Strauss"
    assert [edit["target_new"] for edit in run("show", "--json").of("edit")] == ["Johann Strauss", "Madrid"]
    assert "~ Everyone knows that the Eiffel Tower is in Rome → Madrid" in run("diff").out


def test_pruning_drops_what_is_not_in_the_specs(applied: str, run: Run) -> None:
    """The dropped fact is as in the base again, the other one stays."""
    outcome = run("apply", "specs/tower.toml", "--prune", "--yes")
    assert outcome.code == 0, outcome.err
    assert said(run, ASK_BOLERO) == "Maurice Ravel"
    assert said(run, ASK_TOWER) == "Rome"
    assert [edit["id"] for edit in run("show", "--json").of("edit")] == ["tower"]


def test_files_and_a_store_elsewhere_may_be_named(new: Path, run: Run) -> None:
    """Two files and a folder that is not there yet; the workspace's own store stays empty."""
    files = [spec("tower.toml", TOWER), spec("dolphin.toml", DOLPHIN)]
    shutil.copytree("store/stats", "else/where/stats")
    outcome = run("--store", "else/where", "apply", *files, "--yes", "--json")
    assert outcome.code == 0, outcome.err
    assert [edit["id"] for edit in run("--store", "else/where", "show", "--json").of("edit")] == ["tower", "dolphin"]
    assert not Path("store/editctl.db").exists()
    kinds = [line["type"] for line in outcome.lines]
    assert kinds[:2] == ["stage_started", "run_started"]
    assert [kind for kind in kinds if kind != "metric"][-1] == "version_made"
    assert {"reliability", "generalization", "locality"} < {m["name"] for m in outcome.of("metric")}


def test_the_same_specs_and_seed_give_the_same_weights(applied: str, run: Run) -> None:
    """To the bit: in another process, which measured its second moments, and in this one, which found them cached."""
    other = Store(Path("store")).head()
    assert other is not None
    shutil.copytree("store/stats", "again/stats")
    outcome = run("--store", "again", "apply", "specs", "--yes", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.of("version_made")[0]["weights_hash"] == other.weights_hash


def test_cached_second_moments_give_the_weights_of_fresh_ones(new: Path, run: Run) -> None:
    """The first apply of a store measures them and the second reads them; their versions have the same bits."""
    few = ("--set", "corpus_tokens=2000", "--set", "steps=3")
    hashes: dict[Any, set[str]] = {}
    for settings in (few, few, (*few, "--set", "seed=1")):
        outcome = run("apply", "specs/tower.toml", "--yes", "--json", *settings)
        assert outcome.code == 0, outcome.err
        hashes.setdefault(settings, set()).add(outcome.of("version_made")[0]["weights_hash"])
        assert run("undo").code == 0
    same, other = hashes.values()
    assert len(same) == 1
    assert same != other  # control: contexts of another seed give other weights


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def test_the_log_names_verb_head_and_command(applied: str, run: Run) -> None:
    """Newest first, the present one marked."""
    assert run("undo").code == 0
    lines = run("log").out.splitlines()
    assert re.match(r"@ 2 +undo +base ", lines[1]) and lines[2].rstrip().endswith("editctl undo")
    assert re.match(rf"  1 +apply +{applied} ", lines[3]) and lines[4].rstrip().endswith("apply specs --yes")
    newest = run("log", "-n", "1", "--json").of("operation")
    assert [operation["verb"] for operation in newest] == ["undo"]


def test_show_tells_what_the_model_said_before_and_after(applied: str, run: Run) -> None:
    """For every edit, with the metrics and their protocols."""
    text = run("show").out
    assert re.search(r"✓ +Everyone knows that the Eiffel Tower is in +Paris +Rome +1/1 +1/1", text)
    assert re.search(r"reliability +100\.0 % 34–100 +100\.0 % 34–100 +100\.0 % 34–100 +2", text)
    assert re.search(r"factors +1 file, 0\.1 MB, thin\n", re.sub(r" +\n", "\n", text))
    outcome = run("show", applied[:6], "--json")
    assert outcome.lines[0]["id"] == applied
    assert {(a["kind"], a["edit"]) for a in outcome.of("answer")} >= {("rewrite", "tower"), ("paraphrase", "bolero")}
    assert {metric["protocol"] for metric in outcome.of("metric")} > {"generated", "teacher-forced", "probability"}
    assert "unedited" in run("show", "base").out


def test_a_difference_names_facts_and_answers(applied: str, run: Run) -> None:
    """From the base by default after one apply; turned round on demand."""
    assert "+ Everyone knows that the Eiffel Tower is in Paris → Rome" in run("diff").out
    assert "- Everyone knows that the Eiffel Tower is in" in run("diff", "@", "base").out
    data = run("diff", "base", "@", "--json").of("diff")[0]
    assert (data["added"], data["removed"], data["new"]) == (["bolero", "tower"], [], applied)


def test_the_first_difference_shows_the_answers_that_changed_from_the_unedited_models(applied: str, run: Run) -> None:
    """Its words were asked when the edits were applied."""
    text = run("diff", "base", "@").out
    assert "rewrite: Everyone knows that the Eiffel Tower is in Paris → Rome" in text
    assert "locality: " not in text, "what did not change is not listed"


def test_an_id_given_to_another_fact_makes_two_differences(applied: str, run: Run) -> None:
    """Facts are paired by their prompts: nobody ever said that of the old one."""
    other = (
        TOWER.replace("the Eiffel Tower", "Big Ben").replace('"Paris"', '"London"').replace("The capital", "Capital")
    )
    spec("tower.toml", other)
    assert run("apply", "--yes", "--prune").code == 0
    text = run("diff").out
    assert "- Everyone knows that the Eiffel Tower is in" in text
    assert "+ Everyone knows that Big Ben is in London → Rome" in text


def test_a_file_of_another_method_gets_the_flags_too_and_is_named(new: Path, run: Run) -> None:
    """`--set` holds for every method of the plan; the version says which wrote how many."""
    (new / "specs/dolphin.toml").write_text('version = 1\nmethod = "memit"\n\n' + DOLPHIN)
    plan = run("plan", "--json", "--set", "lambda=55").of("plan")[0]
    assert plan["methods"]["memit"]["ridge"]["lambda_"] == 55
    assert run("apply", "--yes", "--set", "steps=2").code == 0
    assert run("show", "--json").of("record")[0]["method"] == "alphaedit 2, memit 1"


def test_warnings_are_told_where_the_specs_are_used(applied: str, run: Run) -> None:
    """On stderr, beside the plan; and an empty folder never drops everything."""
    Path("empty").mkdir()
    assert "holds no *.toml file" in run("plan", "empty").err
    outcome = run("apply", "empty", "--prune", "--yes")
    assert outcome.code == 2 and "--prune would drop everything" in outcome.err
    assert head() == applied


def test_a_saved_plan_takes_no_other_orders(new: Path, run: Run) -> None:
    """What it says is what is done; a flag beside it would be ignored."""
    assert run("plan", "-o", "plan.json").code == 0
    flags_of = (("--method", "memit"), ("--set", "energy=0.3"), ("--prune",), ("--batch-size", "1"))
    for flags in (*flags_of, ("--layers", "1"), ("--corpus", "x.txt"), ("--preserve", "none")):
        outcome = run("apply", "plan.json", *flags)
        assert outcome.code == 2 and "already decides" in outcome.err
    assert head() == ""


def test_a_version_is_asked_and_extended_in_the_dtype_it_was_made_in(new: Path, run: Run) -> None:
    """Without saying so again; a saved plan holds it too, and another dtype is refused."""
    assert run("apply", "specs/tower.toml", "--yes", "--dtype", "bfloat16").code == 0
    assert run("plan", "-o", "plan.json").code == 0
    assert run("apply", "plan.json").code == 0
    assert [v.dtype for v in Store(Path("store")).versions()] == ["torch.bfloat16"] * 2
    assert said(run, ASK_TOWER) == "Rome"
    assert run("measure").code == 0
    spec("dolphin.toml", DOLPHIN)
    outcome = run("apply", "--yes", "--dtype", "float32")
    assert outcome.code == 2 and "made in torch.bfloat16" in outcome.err


def test_a_target_true_the_model_did_not_say_is_noted(new: Path, run: Run) -> None:
    """The version is made all the same."""
    spec("tower.toml", TOWER.replace('target_true = "Paris"', 'target_true = "Madrid"'))
    outcome = run("apply", "specs/tower.toml", "--yes")
    assert outcome.code == 0 and "the model did not say 'Madrid' before, but 'Paris'" in outcome.err


def test_asking_shows_base_and_head_side_by_side(applied: str, run: Run) -> None:
    """Or the versions that are named; with the likeliest next tokens."""
    text = run("ask", ASK_TOWER).out
    assert "base (base): Paris\n" in text and f"@ ({applied}): Rome\n" in text
    assert re.search(r"next:  Rome \d+\.\d %", text)
    rows = run("ask", ASK_TOWER, applied, "base", "--top", "5", "--json").of("answer")
    assert [(row["ref"], row["version"], row["text"]) for row in rows] == [
        (applied, applied, "Rome"),
        ("base", "", "Paris"),
    ]
    assert [len(row["next"]) for row in rows] == [5, 5]
    chances = [chance for _, chance in rows[0]["next"]]
    assert chances == sorted(chances, reverse=True) and sum(chances) <= 1.0001


def test_an_unedited_store_answers_from_the_base_alone(new: Path, run: Run) -> None:
    """There is no head to compare with."""
    assert [row["ref"] for row in run("ask", ASK_TOWER, "--json").of("answer")] == ["base"]


class Noticing:
    """A kind of overlay that leaves every answer as it is and says which entry a prompt is about."""

    def __init__(self, model: Any, overlay: Any, library: Path) -> None:
        self._entries = overlay.entries

    def on(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hits(self, prompts: Any) -> list[Any]:
        from editctl.engine.overlay import Hit

        found = (next((e for e in self._entries if e["about"] in prompt), None) for prompt in prompts)
        return [entry and Hit("noticing", entry["id"], 0.984, entry["sent"]) for entry in found]


@pytest.fixture
def laid(applied: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Commits a version that lays an overlay with one entry over the head's weights, and returns its id."""
    from editctl import delta
    from editctl.engine import families

    monkeypatch.setattr(families, "_READERS", {"noticing": Noticing})

    def make(name: str = "eiffel", sent: str = "") -> str:
        store = Store(Path("store"))
        version = store.head()
        assert version is not None
        edit = Edit(id="eiffel", subject="Eiffel", relation="{} was born in", target_new="Oslo")
        overlay = delta.Overlay("noticing", ({"id": name, "about": "Eiffel", "sent": sent},))
        batch = delta.save(delta.Delta(("eiffel",), {}, version.params, overlay=overlay), store.deltas_dir)
        common = {f.name: getattr(version, f.name) for f in fields(Draft) if hasattr(version, f.name)}
        lives = [*store.edits(version), LiveEdit(edit, batch, 0)]
        return store.commit(Draft(**{**common, "parent": version.id}, edits=lives), expected_head=version.id).id

    return make


def test_the_edit_that_answered_is_named_where_overlays_lie_over_the_weights(
    applied: str, run: Run, laid: Callable[..., str]
) -> None:
    """And that none did; of versions without overlays nothing is said."""
    plain = run("ask", ASK_TOWER, "base", applied).out
    version = laid()
    outcome = run("ask", ASK_TOWER, "base", applied, version, "--sent")
    head, following, last = outcome.out.removeprefix(plain).splitlines()
    assert outcome.out.startswith(plain) and "hit" not in plain and len(plain.splitlines()) == 4
    assert head == f"{version} ({version}): Rome" and following.startswith("    next:  Rome ")
    assert last == "    memory hit: edit eiffel (noticing, score 0.98)"
    assert run("ask", ASK_BOLERO, version, "--sent").out.splitlines()[2:] == ["    no hit"]
    rows = run("ask", ASK_TOWER, "base", version, "--json").of("answer")
    found = {"kind": "noticing", "edit": "eiffel", "score": 0.984, "sent": ""}
    assert [(row["overlays"], row["hit"]) for row in rows] == [([], None), (["noticing"], found)]


def test_the_text_that_is_really_read_is_shown_when_it_is_wanted(run: Run, laid: Callable[..., str]) -> None:
    """Line by line and escaped, each behind a mark: neither it nor an id can pass for the command's own words."""
    sent = f"New fact: Rome\x1b[31m\u202e\r\u2028 [red]\n\nbase (base): Paris\n{ASK_TOWER}"
    version = laid("[b]x\x1b[2J\u202e\n", sent)
    short = run("ask", ASK_TOWER, version).out
    full = run("ask", ASK_TOWER, version, "--sent").out
    assert short.splitlines()[2:] == [r"    memory hit: edit [b]x\x1b[2J\u202e\n (noticing, score 0.98)"]
    assert full.removeprefix(short).splitlines() == [
        r"    | New fact: Rome\x1b[31m\u202e\r\u2028 [red]",
        "    | ",
        "    | base (base): Paris",
        f"    | {ASK_TOWER}",
    ]
    assert fuzzing.raw(full) == []
    row = run("ask", ASK_TOWER, version, "--json")
    assert row.of("answer")[0]["hit"]["sent"] == sent and fuzzing.raw(row.out) == []


# ---------------------------------------------------------------------------------------------------------------------
# ask --stdin

Talk = Callable[..., Outcome]


@pytest.fixture
def talk(run: Run, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Runs `ask --stdin` on lines: bytes as they are, anything else as JSON."""

    def call(*requests: Any, flags: tuple[str, ...] = ()) -> Outcome:
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in requests]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(line + b"\n" for line in lines))))
        return run("ask", "--stdin", *flags)

    return call


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In which dtype a model was loaded, each time."""
    found: list[str] = []
    load = Workspace.load

    def counted(self: Workspace) -> Any:
        found.append(self.config.dtype)
        return load(self)

    monkeypatch.setattr(Workspace, "load", counted)
    return found


def about(*prompts: str, **more: Any) -> dict[str, Any]:
    return {"prompts": [{"prompt": prompt, "wanted": ["Rome", "Paris"]} for prompt in prompts], **more}


def test_requests_are_answered_one_a_line_in_order_by_one_model(
    applied: str, run: Run, talk: Talk, loads: list[str]
) -> None:
    """As `ask PROMPT` answers them, with the probability of what is wanted; the unedited model wants the other."""
    outcome = talk(
        about(ASK_TOWER, ASK_BOLERO, id=1, top=5),
        b"",
        b"  \t",
        about(ASK_TOWER, id=[2], ref="base"),
        about(ref=applied[:6]),
    )
    assert (outcome.code, outcome.err) == (0, "")
    ready, head, base, last = outcome.lines
    assert ready == {"type": "ready", "model": "atlas", "device": "cpu", "dtype": "torch.float32"}
    assert loads == ["float32"]
    assert [{k: v for k, v in line.items() if k != "answers"} for line in (head, base, last)] == [
        {"type": "answers", "id": 1, "ref": "@", "version": applied, "overlays": []},
        {"type": "answers", "id": [2], "ref": "base", "version": "", "overlays": []},
        {"type": "answers", "id": None, "ref": applied[:6], "version": applied, "overlays": []},
    ]
    assert [answer["prompt"] for answer in head["answers"]] == [ASK_TOWER, ASK_BOLERO] and last["answers"] == []
    alone = run("ask", ASK_TOWER, "@", "base", "--top", "5", "--json").of("answer")
    tower, unedited = head["answers"][0], base["answers"][0]
    assert (tower["text"], unedited["text"]) == (alone[0]["text"], alone[1]["text"]) == ("Rome", "Paris")
    for found, row, count in ((tower, alone[0], 5), (unedited, alone[1], 3)):
        assert [token for token, _ in found["next"]] == [token for token, _ in row["next"]][:count]
        assert [p for _, p in found["next"]] == pytest.approx([p for _, p in row["next"]][:count], rel=1e-3)
    rome, paris = tower["probabilities"]
    assert rome > 0.9 and paris < 0.1 and sum(head["answers"][1]["probabilities"]) < 0.5
    assert unedited["probabilities"][1] > 0.9 > 0.1 > unedited["probabilities"][0]


def test_requests_are_told_which_edit_answered(applied: str, talk: Talk, laid: Callable[..., str]) -> None:
    """Prompt by prompt; a version that is asked after one with overlays has none of them."""
    version = laid("eiffel", "read this")
    outcome = talk(about(ASK_BOLERO, ASK_TOWER), about(ASK_TOWER, ref=applied), about(ASK_TOWER, ref=version))
    hit = {"kind": "noticing", "edit": "eiffel", "score": 0.984, "sent": "read this"}
    found = [(line["overlays"], [answer["hit"] for answer in line["answers"]]) for line in outcome.of("answers")]
    assert found == [(["noticing"], [None, hit]), ([], [None]), (["noticing"], [hit])]


def test_what_is_not_asked_for_is_left_out(applied: str, talk: Talk) -> None:
    """No wanted answers, no next tokens; --top says how many where a request does not."""
    outcome = talk({"prompts": [{"prompt": ASK_TOWER}]}, about(ASK_TOWER, top=0), flags=("--top", "7", "--json"))
    plain, none = (line["answers"][0] for line in outcome.of("answers"))
    assert (len(plain["next"]), plain["probabilities"]) == (7, [])
    assert (none["next"], len(none["probabilities"])) == ([], 2)


def test_without_requests_no_model_is_loaded(applied: str, talk: Talk, loads: list[str]) -> None:
    """Nor for those that cannot be answered; one without prompts loads it."""
    assert talk().lines == talk(b"\n\n  ").lines == []
    assert [line["type"] for line in talk(b"{", {"prompts": 1}, about(ASK_TOWER, ref="zzz")).lines] == ["error"] * 3
    assert loads == []
    assert [line["type"] for line in talk({"prompts": []}).lines] == ["ready", "answers"]
    assert len(loads) == 1


LONG = "The river and the road. " * 60
WRONG: list[tuple[Any, Any, str]] = [
    (b"nonsense", None, "the line is not JSON: Expecting value"),
    (b"\xff\xfe", None, "the line is not JSON: 'utf-8' codec"),
    (b'{"id": 3, "prompts": [NaN]}', None, "NaN is no number of JSON"),
    (b'{"id": 1e999, "prompts": []}', None, "1e999 is no number of JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", None, "the line is not JSON: Exceeds the limit"),
    (b'{"id": ' + b"[" * 100_000, None, "nested too deeply"),
    (b'{"id": ' + b"[" * 980 + b"]" * 980 + b', "prompts": 1}', ..., ""),
    (b'{"id": 1, "x": "' + b"x" * 10_000_000 + b'"}', None, "a line is longer than 10 MB"),
    (b"[]", None, "a request is a JSON object"),
    ({"id": "a\x1b\u202e"}, "a\x1b\u202e", "prompts is no list"),
    (about(id=1.5, prompt="x"), 1.5, "unknown key prompt of request"),
    ({"id": {"a": [None]}, "prompts": "Rome is"}, {"a": [None]}, "prompts is no list"),
    ({"id": 1, "prompts": ["Rome is"]}, 1, "prompt 1 is no JSON object"),
    ({"id": 1, "prompts": [{}]}, 1, "prompt 1 is no text"),
    ({"id": 1, "prompts": [{"prompt": "Rome is"}, {"prompt": "\n "}]}, 1, "prompt 2 is empty"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "wnated": []}]}, 1, "unknown key wnated of prompt 1"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "\x1b[31m": 1}]}, 1, "unknown key \\x1b[31m of prompt 1"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "wanted": "old"}]}, 1, "wanted of prompt 1 is no list"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "wanted": ["old"] * 101}]}, 1, "at most 100 texts"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "wanted": ["old", 3]}]}, 1, "a wanted answer of prompt 1 is no text"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "wanted": [""]}]}, 1, "a wanted answer of prompt 1 is empty"),
    (about(*["Rome is"] * 10_001, id=1), 1, "10001 prompts are more than 10000"),
    (about(id=1, top=51), 1, "top is no whole number from 0 to 50"),
    (about(id=1, top=-1), 1, "top is no whole number"),
    (about(id=1, top=True), 1, "top is no whole number"),
    (about(id=1, top="3"), 1, "top is no whole number"),
    (about(id=1, ref=3), 1, "ref is no text"),
    (about(id=1, ref="a" * 101), 1, "ref is no text of at most 100 characters"),
    (about(id=1, ref="zzzz"), 1, "`zzzz` is neither a version nor an alias"),
    (about(id=1, ref="@-5"), 1, "goes beyond base"),
    (about("Rome is", LONG, id=1), 1, "leaves no room for an answer"),
    ({"id": 1, "prompts": [{"prompt": "Rome is", "wanted": [LONG]}]}, 1, "a prompt and its answer of"),
]


def test_a_wrong_request_is_answered_and_the_next_one_too(applied: str, talk: Talk) -> None:
    """With what is wrong, what to do and its id where it has one; a good one after each wrong one is answered."""
    good = about(ASK_TOWER, id="good")
    outcome = talk(*(line for wrong, _, _ in WRONG for line in (wrong, good)))
    assert (outcome.code, outcome.err) == (0, "")
    replies = [line for line in outcome.lines if line["type"] != "ready"]
    assert [line["type"] for line in replies] == ["error", "answers"] * len(WRONG)
    for (wrong, name, message), reply in zip(WRONG, replies[::2], strict=True):
        assert set(reply) == {"type", "id", "message", "hint"}
        assert message in reply["message"] and reply["hint"], str(wrong)[:200]
        assert name is ... or reply["id"] == name, str(wrong)[:200]
    assert {(line["id"], line["answers"][0]["text"]) for line in replies[1::2]} == {("good", "Rome")}
    assert outcome.out.replace("\n", "").isprintable()


def test_no_request_ends_the_loop(applied: str, talk: Talk) -> None:
    """300 requests with values of every type at every place, seeded: each has one line, answers and errors alike."""
    rng = random.Random(7)

    def a_request() -> Any:
        request = about("Rome is", id=fuzzing.a_json(rng), ref=rng.choice(["@", "base", "@-"]), top=rng.randint(0, 3))
        for _ in range(rng.choice([0, 1, 1, 2])):
            container, key = rng.choice(fuzzing._places(request) or [(request, "id")])
            container[key] = fuzzing.a_json(rng)
        data = json.dumps(request).encode()
        return (data if rng.random() < 0.7 else fuzzing.mutated(rng, data)).replace(b"\n", b" ")

    requests = [request for request in (a_request() for _ in range(300)) if request.strip()]
    outcome = talk(*requests)
    assert (outcome.code, outcome.err) == (0, "")
    replies = [line["type"] for line in outcome.lines if line["type"] != "ready"]
    assert len(replies) == len(requests) and set(replies) == {"answers", "error"}
    assert min(replies.count("answers"), replies.count("error")) > 50
    assert fuzzing.raw(outcome.out) == []


def test_a_version_of_another_model_is_refused_and_the_loop_goes_on(applied: str, talk: Talk) -> None:
    """Before and after a model is loaded; the unedited one can be asked all the same."""
    with closing(sqlite3.connect("store/editctl.db")) as db, db:
        db.execute("update versions set base = 'another'")
    outcome = talk(about(ASK_TOWER), about(ASK_TOWER, ref="base"), about(ASK_TOWER))
    first, ready, base, last = outcome.lines
    assert [first["type"], ready["type"], last["type"]] == ["error", "ready", "error"]
    assert "was made for another model" in first["message"] and last["message"] == first["message"]
    assert base["answers"][0]["text"] == "Paris"


def test_a_version_made_in_another_dtype_is_asked_in_it(applied: str, talk: Talk, loads: list[str]) -> None:
    """The model is loaded again for it, not for the unedited one; a dtype that is asked for stays."""
    store = Store(Path("store"))
    version = store.head()
    assert version is not None
    common = {f.name: getattr(version, f.name) for f in fields(Draft) if hasattr(version, f.name)}
    draft = Draft(**{**common, "dtype": "torch.bfloat16", "parent": applied}, edits=store.edits(version))
    store.commit(draft, expected_head=applied)
    asked = [about(ASK_TOWER, ref=ref) for ref in ("base", "@", "base", "@-", "base", "@-", "@")]
    outcome = talk(*asked)
    assert loads == ["bfloat16", "float32", "bfloat16"]
    texts = [line["answers"][0]["text"] for line in outcome.of("answers")]
    assert texts == ["Paris", "Rome", "Paris", "Rome", "Paris", "Rome", "Rome"]
    chances = [line["answers"][0]["probabilities"][0] for line in outcome.of("answers")]
    assert chances[1] == chances[6] != chances[3] == chances[5]
    assert [line["dtype"] for line in outcome.of("ready")] == ["torch.bfloat16"]
    assert talk(*asked, flags=("--dtype", "float32")).code == 0 and loads[3:] == ["float32"]


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)], ids=["ctrl-C", "kill"])
def test_a_signal_ends_the_answering_without_a_word(applied: str, signal_: int, code: int) -> None:
    """While it waits for the next request; what was asked is answered at once, before another is."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from editctl.cli import main; sys.argv[0] = 'editctl'; main()"
    )
    pipes: dict[str, Any] = {**PIPES, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, "ask", "--stdin"], **pipes) as process:
        assert process.stdin and process.stdout
        assert json.loads(process.stdout.readline()) == HEADER
        for number in range(2):
            process.stdin.write(json.dumps(about(ASK_TOWER, id=number)) + "\n")
            process.stdin.flush()
            line = json.loads(process.stdout.readline())
            reply = json.loads(process.stdout.readline()) if line["type"] == "ready" else line
            assert (reply["id"], reply["answers"][0]["text"]) == (number, "Rome")
        process.send_signal(signal_)
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("", "", code)


def test_measuring_again_gives_the_answers_of_the_run(applied: str, run: Run) -> None:
    """Word by word, from weights that were rebuilt and whose hash was checked."""
    again = run("measure", "--json")
    assert again.code == 0, again.err
    recorded = run("show", "--json")
    keys = ("edit", "kind", "prompt", "before", "after", "ok")
    assert [[a[k] for k in keys] for a in again.of("answer")] == [[a[k] for k in keys] for a in recorded.of("answer")]
    values = [metric for metric in again.of("metric") if metric["protocol"] != "recorded"]
    assert [m["name"] for m in values] == [m["name"] for m in recorded.of("metric")] and "drift" in values[-1]["name"]
    for one, other in zip(values, recorded.of("metric"), strict=True):
        assert (one["protocol"], one["axis"], one["n"]) == (other["protocol"], other["axis"], other["n"])
        assert one["value"] == pytest.approx(other["value"], rel=1e-4)
    costs = {metric["name"] for metric in again.of("metric") if metric["protocol"] == "recorded"}
    assert costs == {"seconds an edit", "peak memory", "disk an edit"}
    assert run("measure", "base").code == 2


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_one_flipped_bit_in_a_factor_file_is_found(place: float, applied: str, run: Run) -> None:
    """Exit code 1 and the file's name, whether the bit lies in the header or in a tensor; asking refuses too."""
    path = next(Path("store/deltas").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    for arguments in (("measure",), ("ask", ASK_TOWER)):
        outcome = run(*arguments)
        assert outcome.code == 1
        assert path.name in outcome.err and "is not what was written" in outcome.err


def test_a_missing_factor_file_is_named(applied: str, run: Run) -> None:
    """With the remedy."""
    path = next(Path("store/deltas").glob("*.safetensors"))
    path.unlink()
    outcome = run("measure")
    assert outcome.code == 1
    assert f"{path.name} is missing" in outcome.err and "hint: restore it from a backup" in outcome.err


def test_weights_that_are_not_the_recorded_ones_are_refused(applied: str, run: Run) -> None:
    """Measuring compares the rebuilt weights with the version's hash."""
    with sqlite3.connect("store/editctl.db") as db:
        db.execute("update versions set weights_hash = ?", ["0" * 32])
    db.close()
    outcome = run("measure")
    assert outcome.code == 1
    assert "was recorded with weights 0000" in outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# Moving


def test_undo_redo_and_restore_move_the_head_and_the_answers(applied: str, run: Run) -> None:
    """Undo to the base answers as the base does; redo and restore bring the version back."""
    assert run("undo").out.splitlines()[-1] == "Now at: base"
    assert head() == ""
    assert said(run, ASK_TOWER) == said(run, ASK_TOWER, "base") == "Paris"
    assert run("redo").out.splitlines()[-1] == f"Now at: {applied}"
    assert said(run, ASK_TOWER) == "Rome"
    assert run("restore", "base").code == 0
    assert head() == ""
    assert run("restore", applied[:8], "--json").of("operation")[0]["head"] == applied
    assert run("restore", "op:2").code == 0
    assert head() == ""
    assert [op["verb"] for op in run("log", "--json").of("operation")] == [
        "restore",
        "restore",
        "restore",
        "redo",
        "undo",
        "apply",
    ]


def test_there_is_an_end_to_undo_and_to_redo(applied: str, run: Run) -> None:
    """Exit code 1 and what else can be done."""
    outcome = run("redo")
    assert (outcome.code, "nothing to redo" in outcome.err) == (1, True)
    assert run("undo").code == 0
    outcome = run("undo")
    assert (outcome.code, "editctl redo" in outcome.err) == (1, True)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "nonsense"), 1, ("neither a version nor an alias", "hint: ")),
        (("show", "abcd"), 1, ("no version begins with `abcd`", "hint: ")),
        (("diff", "@-7"), 1, ("goes beyond base",)),
        (("restore", "op:99"), 1, ("there is no operation 99",)),
        (("ask", ASK_TOWER, "bsae"), 1, ("did you mean `base`?",)),
        (("ask", "  "), 2, ("the prompt is empty",)),
        (("ask",), 2, ("Usage: editctl ask", "Missing argument 'PROMPT' (or --stdin")),
        (("ask", "--top", "5", "--json"), 2, ("Usage: editctl ask", "Missing argument 'PROMPT' (or --stdin")),
        (("ask", "--stdin", "Rome is"), 2, ("Usage: editctl ask", "leave PROMPT away")),
        (("--config", "gone.toml", "ask", "--stdin"), 2, ("gone.toml cannot be read",)),
        (("plan", "--method", "alphaedti"), 2, ("unknown method alphaedti", "hint: did you mean alphaedit?")),
        (("apply", "--yes", "--method", "zzz"), 2, ("unknown method zzz", "hint: one of: alphaedit, memit")),
        (("plan", "--set", "enrgy=0.1"), 2, ("unknown setting enrgy", "hint: did you mean energy?")),
        (("plan", "--set", "energy"), 2, ("--set energy has no value",)),
        (("plan", "--set", "batch_size=many"), 2, ("batch_size = 'many' is not valid",)),
        (("plan", "--set", "layers=[99]"), 2, ("are not all among the model's blocks 0 to 6",)),
        (("plan", "--set", "l2=-1"), 2, ("l2 = -1 is not valid",)),
        (("plan", "--model", "./no/such/folder"), 1, ("there is no folder ./no/such/folder",)),
        (("plan", "--model", "specs"), 1, ("specs is not a model folder",)),
        (("plan", "--corpus"), 2, ("requires an argument",)),
        (("--config", "gone.toml", "plan"), 2, ("gone.toml cannot be read",)),
        (("nonsense",), 2, ("No such command",)),
        (("plan", "--nonsense"), 2, ("No such option",)),
        (("plan", "-o", "no/such/folder/plan.json"), 2, ("the plan cannot be saved", "hint: ")),
        (("plan", "--set", "seed=99999999999999999999"), 2, ("seed = 99999999999999999999 is not valid",)),
        (("ask", "Rome is", "--device", "cpu:x"), 2, ("device cpu:x is not available",)),
        (("study", "sequential", "--edits", "9999"), 2, ("atlas knows", "ask for fewer")),
        (("study", "subjects", "--subjects", "9999"), 2, ("atlas knows", "ask for fewer")),
        (("study", "runtime", "--shape", "round"), 2, ("unknown shape round", "hint: one of: gpt2-124m")),
        (("study", "runtime", "--counterfact", "no.json"), 2, ("no.json is not CounterFact's JSON", "hint: ")),
        (("plan", "--layers", "1,x"), 2, ("--layers 1,x is no list of blocks", "hint: for example --layers 1,2,3")),
        (("apply", "--yes", "--layers", "1-3"), 2, ("is no list of blocks", "hint: for example --layers 1,2,3")),
        (("study", "specs", "--layers", ""), 2, ("is no list of blocks", "hint: for example --layers 1,2,3")),
        (("apply", "--yes", "--layers", "3,7"), 2, ("are not all among the model's blocks 0 to 6",)),
        (("plan", "--method", "ft", "--layers", "1,2"), 2, ("fine-tunes one block", "hint: for example layers")),
        (("plan", "--corpus", "no.txt"), 2, ("the corpus no.txt cannot be read", "hint: give a UTF-8 text file")),
        (("model", "inspect", "./no/such/folder"), 1, ("there is no folder ./no/such/folder", "hint: ")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_mistake_is_answered_with_a_message_and_a_code(
    arguments: tuple[str, ...], code: int, words: tuple[str, ...], applied: str, run: Run
) -> None:
    """On stderr, in a few lines; stdout and the store stay clean."""
    outcome = run(*arguments)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err
    assert len(outcome.err.splitlines()) <= 6
    assert head() == applied


@pytest.mark.timing
def test_an_unknown_model_is_refused_in_one_line_and_soon(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network it takes less than two and a half seconds beside the imports, which the first call pays."""
    monkeypatch.chdir(tmp_path)
    spec("tower.toml", TOWER)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for host in ("https://unresolvable.invalid", "http://192.0.2.1:81"):  # a reserved name, an address that is silent
        monkeypatch.setenv("HF_ENDPOINT", host)
        run("plan", "--model", "nobody/nothing")
        begun = time.perf_counter()
        outcome = run("plan", "--model", "nobody/nothing")
        assert time.perf_counter() - begun < 2.5 * PATIENCE
        assert outcome.code == 1
        message, hint = outcome.err.splitlines()
        assert message.startswith("error: model nobody/nothing is neither a folder here nor in the local cache")
        assert hint.startswith("hint: ") and "--model atlas" in hint


def test_a_mistake_in_the_configuration_names_file_and_line(new: Path, run: Run) -> None:
    """With what was probably meant, for every verb that reads it."""
    Path("editctl.toml").write_text('store = "store"\nmethdo = "memit"\n')
    for verb in ("plan", "log", "validate"):
        outcome = run(verb)
        assert outcome.code == 2
        assert outcome.err.splitlines()[:2] == [
            "editctl.toml:2: unknown key methdo",
            "  hint: did you mean method?",
        ]


def test_a_flag_beats_the_configuration(new: Path, run: Run) -> None:
    """And the configuration beats the defaults."""
    Path("editctl.toml").write_text('method = "memit"\n[settings]\nl2 = 0.5\nbatch_size = 7\n')
    params = run("plan", "--json").lines[0]["params"]
    assert (params["method"], params["ridge"]["l2"], params["batch_size"]) == ("memit", 0.5, 7)
    params = run("plan", "--json", "--method", "alphaedit", "--set", "l2=0.25", "--batch-size", "3").lines[0]["params"]
    assert (params["method"], params["ridge"]["l2"], params["batch_size"]) == ("alphaedit", 0.25, 3)


def test_blocks_and_corpus_are_named_by_flags(new: Path, run: Run) -> None:
    """They beat the configuration's, are recorded in the plan and decide what is written."""
    Path("text.txt").write_text("The Eiffel Tower stands in Paris. Bolero is a musical work by Maurice Ravel.\n" * 90)
    Path("editctl.toml").write_text("[settings]\nlayers = [5]\ncorpus_tokens = 1500\n")
    flags = ("--layers", "2,1", "--corpus", "text.txt")
    plain, named = (run("plan", "--json", *some).of("plan")[0]["params"] for some in ((), flags))
    assert (plain["layers"], plain["corpus"], plain["corpus_content"]) == ([5], "", "atlas-1")
    assert (named["layers"], named["corpus"]) == ([1, 2], "text.txt")
    assert len(named["corpus_content"]) == 16
    assert run("apply", "specs/tower.toml", "--yes", "--set", "steps=2", *flags).code == 0
    assert run("show", "--json").of("record")[0]["params"]["layers"] == [1, 2]
    store = Store(Path("store"))
    version = store.head()
    assert version is not None
    measured = [m["layer"] for m in store.measured(version.base) if m["corpus"] == named["corpus_content"]]
    assert measured == [1, 2]


def test_a_model_that_brings_no_corpus_is_measured_on_its_own_words(
    new: Path, run: Run, folders: dict[str, Path], corpus: Path
) -> None:
    """And that is said; not where a corpus is given."""
    few = ("--model", str(folders["llama"]), "--layers", "1,2", "--set", "corpus_tokens=1500", "--set", "energy=0.2")
    outcome = run("apply", "specs/tower.toml", "--yes", "--set", "steps=2", *few)
    assert outcome.code == 0, outcome.err
    assert "note: no corpus was given: measuring on text the model writes itself" in outcome.err
    assert run("show", "--json").of("record")[0]["params"]["corpus_content"] == "samples-0"
    assert run("undo").code == 0
    outcome = run("apply", "specs/tower.toml", "--yes", "--set", "steps=2", *few, "--corpus", str(corpus))
    assert outcome.code == 0, outcome.err
    assert "no corpus" not in outcome.err


def test_the_methods_are_listed_with_the_settings_of_the_one_in_use(new: Path, run: Run) -> None:
    """The configuration says which; every name there can be overridden."""

    def shown() -> tuple[str, dict[str, str]]:
        table, _, settings = run("methods").out.partition("\nSettings of ")
        return table, dict(line.split(None, 1) for line in settings.splitlines()[1:])

    table, used = shown()
    assert [row["name"] for row in run("methods", "--json").of("method")] == list(METHODS)
    assert all(f"\n{name} " in table for name in METHODS)
    assert (used["preserve"], used["layers"], used["lambda"]) == ("energy 0.1", "[1, 2, 3]", "0.0")
    Path("editctl.toml").write_text('method = "rome"\n[settings]\nsteps = 7\n')
    other = shown()[1]
    assert (other["preserve"], other["layers"], other["lambda"], other["steps"]) == ("none", "[3]", "100.0", "7")
    for name, value in used.items():
        if name != "preserve":
            assert run("plan", "--set", f"{name}={value}").code == 0, name


def test_what_was_trained_for_the_model_in_use_stands_under_the_settings(new: Path, run: Run) -> None:
    """Newest first, with the day and how it did on edits that were held out; not what another model needs."""
    from editctl import artifacts
    from editctl.delta import write_tensors

    ours = Workspace(store=None, config=None).source()[1]

    def train(file: str, day: int, held_out: Any, base: str = ours) -> None:
        about = {"method": "mend", "name": f"{file}\x1b[2J", "base": base, "held_out": held_out}
        path = Path("store/artifacts") / f"{file}0123456789ab.safetensors"
        write_tensors(path, {}, {artifacts.KEY: {**about, "created_at": f"2026-11-{day}T09:00:00+00:00"}})

    def share(name: str, value: Any, protocol: str = "generated", **more: Any) -> dict[str, Any]:
        return {"name": name, "protocol": protocol, "value": value, "n": 40, **more}

    assert "rained files" not in run("methods").out
    other = [share("reliability", 0.5, "teacher-forced"), share("locality", 0.25, axis="was"), share("fluency", 5.0)]
    train("old", 10, [*other, share("reliability", 0.962), share("locality", 0.97), *other])
    train("new", 30, "nothing")
    train("odd", 20, [None, share("locality", "1e9"), share([], 1.0), share("reliability", 10**400)])
    train("far", 30, [], base="another")
    assert run("methods").out.partition("\nTrained files for the model in use, newest first:\n")[2].splitlines() == [
        r"  mend  new\x1b[2J  new012345678  2026-11-30  not measured",
        r"  mend  odd\x1b[2J  odd012345678  2026-11-20  not measured",
        r"  mend  old\x1b[2J  old012345678  2026-11-10  held out: reliability 96 %, locality 97 %",
    ]


def test_a_store_of_another_model_is_not_mixed_with_this_one(applied: str, run: Run) -> None:
    """Its versions name the content they were made on."""
    with sqlite3.connect("store/editctl.db") as db:
        db.execute("update versions set base = ?", ["0" * 32])
    db.close()
    for arguments in (("plan",), ("ask", ASK_TOWER), ("measure",)):
        outcome = run(*arguments)
        assert outcome.code == 1
        assert "another model" in outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# What reaches the screen


def test_no_escape_sequence_reaches_a_file(applied: str, run: Run) -> None:
    """Neither colours nor bars: scripts and logs read this."""
    spec("dolphin.toml", DOLPHIN)
    for arguments in (("plan",), ("apply", "--yes"), ("show",), ("log",), ("diff",), ("ask", ASK_TOWER), ("show", "x")):
        outcome = run(*arguments)
        assert "\x1b" not in outcome.out + outcome.err
        assert "\r" not in outcome.out + outcome.err


def on_a_terminal(*arguments: str, typed: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and screen of a command in a process of its own, on a terminal of its own."""
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    with subprocess.Popen(command(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        screen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not part:
                break
            screen += part
        os.close(ours)
        return process.wait(60), screen.decode()


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])(?:;[0-9;]*)?m")


def test_no_color_is_honoured_on_a_terminal(new: Path) -> None:
    """Without it there are colours, so the test can fail."""
    assert COLOUR.search(on_a_terminal("plan")[1])
    code, screen = on_a_terminal("plan", NO_COLOR="1")
    assert code == 0
    assert "Plan: 2 to add" in screen
    assert not COLOUR.search(screen)


def test_on_a_terminal_only_the_word_yes_goes_on(new: Path) -> None:
    """The key that asks is not the one that confirms: y is a no, with exit code 130."""
    code, screen = on_a_terminal("apply", typed="y\n")
    assert code == 130
    before, asked, _ = screen.partition("Only yes goes on")
    assert asked and "Eiffel Tower" in before and "Plan: 2 to add" in before
    assert INTERRUPTED in screen
    assert head() == ""


HOSTILE = """[[edit]]
id = "hostile"
subject = "[red]x[/red]"
relation = "[/] {} \\\\[b] is :smile:"
target_new = "[bold]Rome[/bold]"
note = "[link=http://example.org]look[/link]"
tags = ["[blink]"]
"""


def test_markup_in_a_spec_is_printed_as_it_is(new: Path, run: Run) -> None:
    """In plan, apply, show, diff, log and ask: a spec is data."""
    path = spec("[red]hostile[/red].toml", HOSTILE)
    prompt = "[/] [red]x[/red] \\[b] is :smile:"
    assert f"{prompt} [bold]Rome[/bold]" in run("plan", path).out
    applied = run("apply", path, "--yes", "--set", "steps=2")
    assert applied.code == 0, applied.err
    assert prompt in applied.err
    assert prompt in run("show").out
    assert f"+ {prompt} [bold]Rome[/bold]" in run("diff").out
    assert "[red]hostile[/red].toml" in run("log").out.replace("\n", "")
    assert run("ask", prompt).code == 0
    assert run("show", "--json").of("edit")[0]["subject"] == "[red]x[/red]"
    missing = run("show", "[red]x[/red]")
    assert "[red]x[/red]" in missing.err


def test_a_reader_that_leaves_early_is_no_error_to_shout_about(new: Path) -> None:
    """`editctl schema | head -1`: no traceback, no word."""
    with subprocess.Popen(command("schema"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and other writers


@pytest.fixture
def midway(applied: str) -> Iterator[subprocess.Popen[str]]:
    """An apply of a third edit in a process of its own, stopped by nothing yet, seen to have begun its targets."""
    # A shell's background jobs ignore the interrupt key and hand that on; a person's process does not.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from editctl.cli import main; sys.argv[0] = 'editctl'; main()"
    )
    path = spec("dolphin.toml", DOLPHIN)
    # Settings under which the optimisation would go on for minutes: the test decides when it ends.
    slow = ("--set", "steps=100000", "--set", "stop=0", "--set", "rate=0.000001")
    arguments = [sys.executable, "-c", code, "apply", path, "--yes", "--json", *slow]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if event["type"] == "stage_started" and event["stage"] == "target":
            break
    else:
        pytest.fail(process.communicate()[1])
    yield process
    process.kill()
    process.communicate()


def test_a_killed_apply_leaves_the_old_head_and_a_free_lock(
    midway: subprocess.Popen[str], applied: str, run: Run
) -> None:
    """As if it had never begun; the next apply goes through and the model says all three facts."""
    midway.send_signal(signal.SIGKILL)
    midway.communicate()
    assert midway.returncode == -signal.SIGKILL
    assert head() == applied
    assert len(run("log", "--json").of("operation")) == 1
    assert said(run, ASK_TOWER) == "Rome"
    outcome = run("apply", "specs", "--yes")
    assert outcome.code == 0, outcome.err
    assert said(run, ASK_DOLPHIN) == "fish"
    assert said(run, ASK_TOWER) == "Rome"


def test_an_interrupted_apply_says_so_and_exits_with_130(midway: subprocess.Popen[str], applied: str, run: Run) -> None:
    """In words that are true; the head is where it was and the lock is free."""
    midway.send_signal(signal.SIGINT)
    _, err = midway.communicate(timeout=60)
    assert midway.returncode == 130
    assert err.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in err
    assert head() == applied
    assert run("undo").code == 0


def test_a_move_interrupted_after_it_was_recorded_says_nothing_else(
    applied: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has moved when the key comes, and the words are true of that too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("editctl.cli_history.told", interrupt)
    outcome = run("undo")
    assert (outcome.code, outcome.err.strip()) == (130, INTERRUPTED)
    assert head() == ""


HOLD = "from editctl.store import Store\nwith Store('store').lock('study'): print('held', flush=True); input()"
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@pytest.mark.parametrize("arguments", [("undo",), ("redo",), ("restore", "base")], ids=" ".join)
def test_a_move_waits_for_another_writer_as_long_as_it_is_told(
    applied: str, run: Run, arguments: tuple[str, ...]
) -> None:
    """Not at all by default; a writer that is killed while others wait leaves them the lock."""
    if arguments == ("redo",):
        assert run("undo").code == 0
    before = head()
    with subprocess.Popen([sys.executable, "-c", HOLD], **PIPES) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for flags in ((), ("--lock-timeout", "1")):
            outcome = run(*arguments, *flags)
            assert outcome.code == 3
            assert re.search(rf"`study` of \S+@\S+ \(pid {holder.pid}\)", outcome.err)
        assert head() == before
        begun = time.perf_counter()
        killing = threading.Timer(1, holder.kill)
        killing.start()
        outcome = run(*arguments, "--lock-timeout", "60")
        assert 0.9 < time.perf_counter() - begun < 30
        killing.join()
    assert outcome.code == 0, outcome.err
    assert head() != before


@pytest.mark.parametrize("arguments", [("undo",), ("redo",), ("restore", "base")], ids=" ".join)
def test_a_move_in_a_workspace_without_versions_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, arguments: tuple[str, ...]
) -> None:
    """No folder made for the sake of its lock."""
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--lock-timeout", "1").code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_another_process_changes_is_locked(applied: str, run: Run) -> None:
    """Exit code 3, naming the verb and the process that holds it; reading goes on meanwhile."""
    spec("dolphin.toml", DOLPHIN)
    with subprocess.Popen([sys.executable, "-c", HOLD], **PIPES) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for arguments in (("undo",), ("apply", "--yes"), ("apply", "--yes", "--lock-timeout", "1")):
            outcome = run(*arguments)
            assert outcome.code == 3
            assert re.search(rf"`study` of \S+@\S+ \(pid {holder.pid}\)", outcome.err)
            assert "--lock-timeout" in outcome.err
        assert run("plan").code == 0
        assert run("log").code == 0
        assert said(run, ASK_TOWER) == "Rome"
        holder.communicate("\n")
    assert run("undo").code == 0
