"""Studies: the rows they print, and on the shipped specs the numbers that the built-in model has to reach."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editctl.delta import Factors
from editctl.engine import methods, prompts, source, speak
from editctl.engine.editor import Editor
from editctl.engine.target import optimise
from editctl.errors import InvalidInput, Locked
from editctl.metrics.text import perplexity
from editctl.metrics.values import Metric
from editctl.store import Store
from editctl.studies import journal, ratio, runtime, sequential, shapes, subjects, tables, timing
from editctl.studies.bench import Bench, Mark, Trial
from editctl.studies.journal import opened
from editctl.studies.tables import Result

ROOT = Path(__file__).parents[1]
SPEC = """version = 1

[[edit]]
id = "tower"
subject = "the Eiffel Tower"
relation = "Everyone knows that {} is in"
target_new = "Rome"
paraphrases = ["The city that is home to {} is"]
locality = ["The capital of France is", "Everyone knows that the Louvre is in"]

[[edit]]
id = "bolero"
subject = "Bolero"
relation = "{} belongs among the finest musical works of"
target_new = "Johann Strauss"
paraphrases = ["{} was set down note by note by"]

[[edit]]
id = "dolphin"
subject = "the dolphin"
relation = "In a zoology book {} is listed under the heading"
target_new = "fish"
"""

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store folder that all studies share, so that second moments are measured once."""
    return tmp_path_factory.mktemp("study") / "store"


@pytest.fixture
def said(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Rows:
    """Runs a study in this process and gives the lines it prints as JSON."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["editctl", "--store", str(store), "study", *arguments, "--json"])
        capsys.readouterr()
        main()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == {"type": "version", "schema": 1}
        return lines[1:]

    return call


@pytest.fixture
def study(said: Rows) -> Rows:
    """Runs a study in this process and gives its rows."""

    def call(*arguments: str) -> list[dict[str, Any]]:
        lines = said(*arguments)
        assert {line.pop("type") for line in lines} == {"row"}
        return lines

    return call


def metric(row: dict[str, Any], name: str, protocol: str = "generated") -> dict[str, Any]:
    """The one metric of that name and protocol in a row."""
    (found,) = [
        m
        for m in (*row["answers"], *row["beside"])
        if m["name"] == name and m["protocol"] == protocol and not m["axis"]
    ]
    return found


def percent(row: dict[str, Any], name: str) -> float:
    return 100 * float(metric(row, name)["value"])


def count(row: dict[str, Any], name: str) -> int:
    """How many prompts a share is of."""
    return int(metric(row, name)["n"])


def names(row: dict[str, Any]) -> set[str]:
    return {m["name"] for m in (*row["answers"], *row["beside"])}


QUICK = ("--set", "corpus_tokens=8000")
UNRELATED = sequential.UNRELATED


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models say and begin with few words, where only the number of questions counts."""
    monkeypatch.setattr(speak, "NEW_TOKENS", 2)
    monkeypatch.setattr(prompts, "CONTEXT_TOKENS", 2)


LITTLE = ("--check", "drift", "--set", "steps=2", *QUICK)
"""What is quick where only the order of things counts."""


@pytest.fixture(scope="module")
def on_tiny(folders: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments that put a study on four specs of a tiny random model, where only the order of things counts."""
    file = tmp_path_factory.mktemp("tiny") / "four.toml"
    facts = [
        ("Ada", "{} was born in", "Oslo"),
        ("Rome", "The road to {} is", "long"),
        ("fox", "The {} ran over", "Paris"),
    ]
    facts.append(("Warsaw", "In {} they built", "roads"))
    edits = [
        f'[[edit]]\nid = "{subject.lower()}"\nsubject = "{subject}"\nrelation = "{relation}"\ntarget_new = "{target}"\n'
        'target_true = "river"\nlocality = [{ prompt = "Norway\'s capital is", answer = "Oslo" }, "The river near"]\n'
        for subject, relation, target in facts
    ]
    file.write_text("\n".join(["version = 1\n", *edits]))
    quick = ("--set", "steps=2", "--set", "corpus_tokens=3000", "--check", "drift")
    return (str(file), "--model", str(folders["llama"]), "--corpus", str(corpus), *quick)


def test_a_sequential_study_counts_what_it_asks(study: Rows) -> None:
    """Eight edits in two batches: each asked right after its batch and at the end, twenty unrelated facts beside;
    every number with its protocol, count and interval."""
    asked = ("--edits", "8", "--batch", "4", "--unrelated", "20", "--method", "alphaedit")
    (row,) = study("sequential", *asked, "--check", "drift", *QUICK)
    assert (row["method"], row["edits"], row["batch"], row["null space"]) == ("alphaedit", 8, 4, "energy 0.1")
    assert {name: count(row, name) for name in ("reliability right after", "reliability", "generalization")} == {
        "reliability right after": 8,
        "reliability": 8,
        "generalization": 16,
    }
    assert (count(row, "first batch"), count(row, UNRELATED)) == (4, 20)
    # Far below what is reached, far above what the unedited model says: 0 reliable, 100 kept.
    assert percent(row, "reliability right after") >= 75 and percent(row, UNRELATED) >= 75
    for protocol in ("generated", "teacher-forced", "probability"):
        found = metric(row, "reliability", protocol)
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1 and found["n"] == 8
    assert {"seconds an edit", "corpus tokens"} <= names(row) and "perplexity" not in names(row)
    drift = {m["axis"]: m["value"] for m in row["beside"] if m["name"] == "drift"}
    assert drift and all(value > 0 for value in drift.values())
    free = {m["axis"]: (m["value"], m["n"]) for m in row["beside"] if m["name"] == "free directions"}
    assert set(free) == {"block 1", "block 2", "block 3"}
    assert all(0 < rank < 1280 and tokens == 8000 for rank, tokens in free.values())


def test_a_study_of_specs_takes_them_at_once_and_in_batches(study: Rows, on_tiny: tuple[str, ...]) -> None:
    """One row a batch size; the counts are those of the specs, or of as many edits and probes as are asked for."""
    rows = study("specs", *on_tiny, "--method", "alphaedit", "--method", "memit", "--batch", "4", "--batch", "1")
    table = [(name, 4, size) for name in ("alphaedit", "memit") for size in (4, 1)]
    assert [(row["method"], row["edits"], row["batch"]) for row in rows] == table
    for row in rows:
        assert (count(row, "reliability right after"), count(row, "locality")) == (4, 8)
    two = ("--edits", "2", "--probes", "1", "--batch", "2")
    (row,) = study("methods", *on_tiny, "--method", "memit", *two)
    assert (row["edits"], count(row, "reliability"), count(row, "locality")) == (2, 2, 2)


def test_more_edits_than_the_specs_hold_are_refused(tmp_path: Path) -> None:
    """And so are made-up edits of a model that is not the built-in one."""
    from editctl.studies.session import matter
    from editctl.workspace import Workspace

    (tmp_path / "three.toml").write_text(SPEC)
    asked: dict[str, Any] = {"made": 5, "unrelated": 0, "seed": 0, "probes": 0}
    with pytest.raises(InvalidInput, match="hold 3 edits, not 4"):
        matter(Workspace(), [str(tmp_path / "three.toml")], edits=4, **asked)
    with pytest.raises(InvalidInput, match="what atlas knows"):
        matter(Workspace(model=str(tmp_path)), [], edits=4, **asked)


def test_a_study_records_nothing_but_what_the_unedited_model_says(
    study: Rows, store: Path, on_tiny: tuple[str, ...]
) -> None:
    """And its second moments: no version, no operation, no factors."""
    study("specs", *on_tiny, "--method", "memit", "--batch", "4")
    assert Store(store).operations() == []
    assert sorted(path.name for path in store.iterdir() if path.is_dir()) == ["said", "stats"]


def test_every_row_is_printed_when_it_is_made(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """After one header: whoever reads a long study sees it grow."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.toml").write_text(SPEC)
    seen: list[list[str]] = []

    def run(self: Bench, trial: Trial) -> list[Mark]:
        seen.append(capsys.readouterr().out.splitlines())
        return [Mark(trial.batch, 0.0, ())]

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr(Bench, "unedited", lambda self, trial: Mark(0, 0.0, ()))
    arguments = ["study", "specs", "three.toml", "--method", "memit", "--json"]
    sizes = [part for size in ("1", "2", "3") for part in ("--batch", size)]
    monkeypatch.setattr(sys, "argv", ["editctl", "--store", str(store), *arguments, *sizes])
    main()
    seen.append(capsys.readouterr().out.splitlines())
    found = [[json.loads(line) for line in lines] for lines in seen]
    assert found[0] == [{"type": "version", "schema": 1}]
    assert [[line["edits"] for line in lines] for lines in found[1:]] == [[1], [2], [3]]


def test_a_study_takes_blocks_and_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both decide what is measured; the default would be atlas's own blocks and text."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.toml").write_text(SPEC)
    (tmp_path / "text.txt").write_text("The Eiffel Tower stands in Paris, and Bolero is by Maurice Ravel.\n" * 120)
    flags = ["--method", "alphaedit", "--layers", "2", "--corpus", "text.txt", "--batch", "3", "--check", "drift"]
    quick = ["--set", "steps=1", "--set", "corpus_tokens=1400"]
    monkeypatch.setattr(sys, "argv", ["editctl", "--store", "own", "study", "specs", "three.toml", *flags, *quick])
    main()
    out = capsys.readouterr().out
    assert "| alphaedit |" in out and "| unedited |" in out
    base = source.identity(source.locate("atlas"))
    (found,) = Store(Path("own")).measured(base)
    assert (found["layer"], found["source"]) == (2, "text.txt")


def test_the_study_of_projection_has_a_row_with_preservation_and_one_without(
    study: Rows, on_tiny: tuple[str, ...]
) -> None:
    """With the first batch asked again at the end; fine-tuning that nothing holds moves the hidden states more."""
    chosen = ("--method", "memit", "--method", "ft-m", "--layers", "2", "--batch", "2")
    rows = study("projection", *on_tiny, *chosen)
    table = [(name, rule) for name in ("memit", "ft-m") for rule in ("energy 0.1", "none")]
    assert [(row["method"], row["null space"]) for row in rows] == table
    for row in rows:
        assert (row["edits"], row["batch"], count(row, "first batch")) == (4, 2, 2)
    drift = [max(m["value"] for m in row["beside"] if m["name"] == "drift" and m["axis"] != "angle") for row in rows]
    assert drift[3] > drift[2] > 0
    assert ["free directions" in names(row) for row in rows] == [True, False, True, False]


def test_the_study_of_methods_has_a_row_a_method_as_it_is_shipped(study: Rows, on_tiny: tuple[str, ...]) -> None:
    """Its own null space or none, every batch size."""
    chosen = ("--method", "memit", "--method", "ft-m", "--batch", "2", "--batch", "1", "--edits", "2", "--layers", "2")
    rows = study("methods", *on_tiny, *chosen)
    assert [(row["batch"], row["method"], row["null space"]) for row in rows] == [
        (size, name, "none") for size in (2, 1) for name in ("memit", "ft-m")
    ]


@pytest.mark.slow
def test_the_study_of_subjects_has_a_row_a_target_and_order(study: Rows, few_words: None) -> None:
    """Shared or one each, both facts of a subject in one batch or the second in a later one; whatever size is asked
    for, pairs are not parted in the one and all are in the other."""
    rows = study("subjects", "--subjects", "2", "--batch", "3", "--set", "steps=1", *QUICK)
    targets, orders = ("shared", "one each"), ("same batch", "later batch")
    assert [(row["target"], row["second edit"]) for row in rows] == [(t, o) for o in orders for t in targets]
    assert [row["batch"] for row in rows] == [4, 4, 2, 2]
    assert {row["edits"] for row in rows} == {4}
    for row in rows:
        assert count(row, subjects.NAMED) == 2 and count(row, "locality") == 2
    assert ["first batch" in names(row) for row in rows] == [False, False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, and going on


class Stopped(Exception):
    """A kill."""


FOUR = ("--batch", "1", "--every", "2", "--method", "memit-history")


def test_a_study_that_was_interrupted_goes_on_to_the_same_numbers(
    study: Rows, on_tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a trial, after its first point: the batches before it are put on again, later ones are solved with
    their history; a third run solves nothing. Control: what is written later changes the numbers."""
    four = ("sequential", *on_tiny, *FOUR)
    whole = study(*four)
    assert [row["edits"] for row in whole] == [2, 4]
    real, edited = Editor.edit, []

    def edit(self: Editor, requests: Any, settings: Any, number: int) -> Any:
        edited.append(number)
        if edited == [1, 2, 3, 4]:
            raise Stopped
        return real(self, requests, settings, number)

    monkeypatch.setattr(Editor, "edit", edit)
    monkeypatch.setattr("editctl.plots.SUFFIXES", ())
    with pytest.raises(Stopped):
        study(*four, "-o", "kept")
    (line,) = (tmp_path / "kept" / "parts.jsonl").read_text().splitlines()
    assert json.loads(line)["edits"] == 2 and len(list((tmp_path / "kept" / "deltas").iterdir())) == 3
    edited.clear()
    again = study(*four, "-o", "kept")
    assert edited == [3, 4]

    def plain(rows: list[dict[str, Any]]) -> list[Any]:
        clock = ("seconds an edit", "peak memory, MB")
        beside = [[m for m in row["beside"] if m["name"] not in clock] for row in rows]
        return [[row["edits"], row["answers"], more, row["forgotten"]] for row, more in zip(rows, beside, strict=True)]

    assert plain(again) == plain(whole)
    assert plain(again)[1][2] != plain(again)[0][2], "control"
    edited.clear()
    assert plain(study(*four, "-o", "kept")) == plain(whole) and edited == []
    assert not (tmp_path / "kept" / "deltas").exists()


def test_a_folder_holds_one_configuration(
    study: Rows, on_tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other edits, settings or checks are refused by name, and so is a folder of something else. What is left there:
    rows as JSON and tables."""
    two = ("methods", *on_tiny, "--batch", "2", "--method", "memit")
    rows = study(*two, "-o", "kept")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    for folder, more, why in (
        ("kept", ("--edits", "2"), "what differs: edits"),
        ("kept", ("--set", "seed=3"), "what differs: trials"),
        ("kept", ("--check", "perplexity"), "what differs: checks"),
        ("other", (), "something else than a study"),
    ):
        with pytest.raises(SystemExit) as error:
            study(*two, *more, "-o", folder)
        assert error.value.code == 2 and why in " ".join(capsys.readouterr().err.split())
    kept = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert [row["answers"] for row in kept["rows"]] == [row["answers"] for row in rows]
    assert "| memit | none | 2 | 4 |" in (tmp_path / "kept" / "table.md").read_text()


def test_a_journal_survives_a_cut_line_and_keeps_others_out(tmp_path: Path) -> None:
    """Half a line is taken away; a second process is told who is there; another configuration by what differs."""
    with opened(tmp_path / "s", {"a": 1, "b": 2}) as journal:
        journal.add({"trial": "x", "n": 1})
        with pytest.raises(Locked), opened(tmp_path / "s", {"a": 1, "b": 2}):
            pass
    with (tmp_path / "s" / "parts.jsonl").open("a") as file:
        file.write('{"trial": "x", "n"')
    with opened(tmp_path / "s", {"a": 1, "b": 2}) as journal:
        assert journal.of("x") == [{"trial": "x", "n": 1}] and journal.of("y") == []
        journal.add({"trial": "y", "n": 2})
    with opened(tmp_path / "s", {"a": 1, "b": 2}) as journal:
        assert [line["n"] for line in journal.lines] == [1, 2]
    with pytest.raises(InvalidInput, match="what differs: b"), opened(tmp_path / "s", {"a": 1, "b": 3}):
        pass
    (tmp_path / "s" / "study.json").write_text("[")
    with pytest.raises(InvalidInput, match="damaged"), opened(tmp_path / "s", {"a": 1, "b": 2}):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Rows, tables, curves


def a_mark(edits: int, **values: float) -> Mark:
    """Reliability, generalization and locality of 100 prompts each, half-width of their interval 0.05."""
    answers = [Metric(name, "generated", at, 100, True, "", at - 0.05, at + 0.05) for name, at in values.items()]
    answers.append(Metric("reliability", "probability", 1.0, 100, True, "", 0.96, 1.0))
    beside = (
        Metric("corpus tokens", "statistics", 500.0, 500),
        Metric("perplexity", "teacher-forced", math.inf, 9, False),
    )
    return Mark(edits, 1.0, tuple(answers), beside, ("a",))


def a_result(share: int, *marks: Mark, refused: str = "") -> Result:
    settings = methods.settings({"num_hidden_layers": 4}, "alphaedit", {})
    trial = Trial(settings=settings, edits=(), batch=5, labels={ratio.SHARE: share})
    return Result(trial, marks, refused=refused)


def test_a_mark_survives_its_journey_through_json() -> None:
    """What is no finite number too."""
    mark = a_mark(3, reliability=0.5)
    assert Mark.from_json(json.loads(json.dumps(mark.to_json(), allow_nan=False))) == mark


def test_protocols_stand_in_tables_of_their_own() -> None:
    """Each value in one of them, with its count; a trial that was refused says why."""
    found = tables.sheets([a_result(100, a_mark(5, reliability=0.5)), a_result(1, refused="too few tokens")])
    assert list(found) == ["generated", "probability", tables.BESIDE]
    assert [row["reliability"] for row in found["generated"]] == ["50.0 (100)", "too few tokens"]
    assert [row["reliability"] for row in found["probability"]] == ["100.0 (100)", "too few tokens"]
    assert [row["perplexity"] for row in found[tables.BESIDE]] == ["inf", "–"]
    assert all(len({tuple(row) for row in rows}) == 1 for rows in found.values()), "rows have equal columns"


def test_curves_join_the_values_of_one_metric_and_protocol() -> None:
    """In the order of x, in percent; what never changes is no curve."""
    result = a_result(100, a_mark(10, reliability=0.5, locality=0.9), a_mark(5, reliability=0.25, locality=0.9))
    found = tables.curves([result], lambda _, mark: mark.edits, lambda _: "one")
    assert found == {("reliability, percent", "generated"): {"one": [(5, 25.0), (10, 50.0)]}}


def test_the_smallest_safe_corpus_is_the_one_from_which_on_nothing_falls() -> None:
    """By hand: floors are 0.85, 0.65 and 0.75. A share that is safe below one that is not does not count."""

    def results(*values: tuple[int, float, float, float]) -> list[Result]:
        return [a_result(share, a_mark(5, reliability=a, generalization=b, locality=c)) for share, a, b, c in values]

    whole = (100, 0.90, 0.70, 0.80)
    assert ratio.smallest_safe(results(whole, (50, 0.86, 0.66, 0.76), (10, 0.9, 0.7, 0.75))) == 10
    assert ratio.smallest_safe(results(whole, (50, 0.86, 0.66, 0.76), (10, 0.9, 0.7, 0.74))) == 50
    assert ratio.smallest_safe(results(whole, (50, 0.84, 0.7, 0.8), (10, 0.9, 0.7, 0.8))) == 100
    assert ratio.smallest_safe([*results(whole, (50, 0.9, 0.7, 0.8)), a_result(10, refused="too few")]) == 50


def test_the_study_of_ratio_takes_shares_of_the_corpus(
    said: Rows, on_tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole first; half of it has half the tokens; what is too little is refused in its row, and the study says
    which share is safe."""
    monkeypatch.setattr("editctl.plots.SUFFIXES", (".svg",))
    lines = said("ratio", *on_tiny, "--batch", "4", "--share", "50", "--share", "1", "-o", "kept")
    rows, last = lines[:-1], lines[-1]
    assert [row[ratio.SHARE] for row in rows] == [100, 50, 1]
    assert [metric(row, "corpus tokens", "statistics")["n"] for row in rows[:2]] == [3000, 1500]
    free = [{m["axis"]: m["value"] for m in row["beside"] if m["name"] == "free directions"} for row in rows[:2]]
    assert free[0] != free[1] and set(free[0]) == set(free[1])
    assert "too few" in rows[2]["refused"]
    assert last["type"] == "smallest safe corpus, percent" and set(last["value"]) == {"alphaedit, batch 4"}
    assert ratio.RULE in (tmp_path / "kept" / "table.md").read_text()
    pictures = list((tmp_path / "kept" / "plots").glob("statistics-free-directions-*.svg"))
    assert len(pictures) >= 1 and all("<svg" in picture.read_text() for picture in pictures)


def test_timing_takes_turns_and_tells_medians() -> None:
    """By hand: three turns of two methods."""
    turn = dict.fromkeys(runtime.PHASES, 0.0)
    spent = {
        ("memit", 10): [{**turn, "target": 1.0}, {**turn, "target": 3.0}, {**turn, "target": 2.0}],
        ("alphaedit", 10): [{**turn, "target": 1.0, "solve": 4.0}, {**turn, "target": 2.0, "solve": 2.0}],
    }
    one, other = timing.rows(spent)
    assert (one["all"], one["least"], one["most"], one["times memit"], one["times"]) == (2.0, 1.0, 3.0, 1.0, 3)
    assert (other["target"], other["solve"], other["all"], other["times memit"]) == (1.5, 3.0, 4.5, 2.25)
    assert timing.table([other])[0]["all, s an edit"] == "4.5000 (4.0000 to 5.0000)"


def test_the_study_of_runtime_times_methods_on_the_same_specs(
    study: Rows, on_tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row a method and batch size; more than the specs hold is refused; what was timed is kept."""
    monkeypatch.setattr("editctl.plots.SUFFIXES", ())
    asked = ("runtime", *on_tiny, "--method", "memit", "--method", "alphaedit", "--repeat", "2")
    rows = study(*asked, "--batch", "1", "--batch", "3", "-o", "kept")
    table = [(name, size, 2) for name in ("memit", "alphaedit") for size in (1, 3)]
    assert [(row["method"], row["batch"], row["times"]) for row in rows] == table
    assert all(0 < row["least"] <= row["all"] <= row["most"] for row in rows)
    assert study(*asked, "--batch", "1", "--batch", "3", "-o", "kept") == rows
    for refused in ((*asked, "--batch", "5"), ("runtime", "--method", "memit"), ("runtime", "-o", "other")):
        with pytest.raises(SystemExit) as error:
            study(*refused)
        assert error.value.code == 2


def test_made_pairs_are_of_one_subject_and_different_facts() -> None:
    """Those with most facts first; of a third fact the second edit says in its spec, in a phrasing of training, that it
    shall stay, and it is asked in another; so are further facts, which no spec names."""
    first, second, asked = subjects.make(20, seed=0)
    assert [edit.subject for edit in first] == [edit.subject for edit in second]
    assert len({edit.subject for edit in first}) == 20 and len({edit.id for edit in (*first, *second)}) == 40
    for one, two in zip(first, second, strict=True):
        assert one.relation != two.relation and one.locality == ()
        for edit in (one, two):
            assert edit.target_new != edit.target_true and edit.relation not in edit.paraphrases
    named, unnamed = asked[subjects.NAMED], asked[subjects.UNNAMED]
    probes = [probe for edit in second for probe in edit.locality]
    assert [probe.answer for probe in probes] == [question.wanted for question in named]
    prompts = {edit.prompt for edit in (*first, *second)} | {probe.prompt for probe in probes}
    assert not prompts & {question.prompt for question in (*named, *unnamed)}
    assert not {q.prompt for q in named} & {q.prompt for q in unnamed}
    assert subjects.make(20, seed=0) == (first, second, asked) != subjects.make(20, seed=1)
    with pytest.raises(InvalidInput, match="atlas knows"):
        subjects.make(5000, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity

TEXTS = ("The Eiffel Tower is located in the city of Paris.", "Ada was born in London", "quick brown fox " * 40)


def plain_perplexity(model: Any, texts: tuple[str, ...]) -> tuple[float, int]:
    """Token by token, each from a pass over what stands before it; and how many."""
    losses = []
    for text in texts:
        ids = model.encode(text)[: model.context_length]
        for place in range(1, len(ids)):
            logits = model.net(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(-1)[ids[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_perplexity_is_that_of_a_plain_loop(loaded: Any, kind: str) -> None:
    """exp of the mean negative log-likelihood over all tokens of all texts, long ones cut where the model ends.
    Controls: neither the mean over texts nor a model whose last block is edited has it."""
    model = loaded(kind)
    with torch.no_grad():
        wanted, tokens = plain_perplexity(model, TEXTS)
        alone = [plain_perplexity(model, (text,))[0] for text in TEXTS]
    assert tokens > model.context_length, "the long text counts most, and is cut"
    found = perplexity(model, TEXTS)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found == pytest.approx(perplexity(model, TEXTS[::-1]), rel=1e-6)
    assert found != pytest.approx(sum(alone) / len(alone), rel=1e-2)
    block = model.blocks[-1]
    with model.editing() as editing:
        out, wide = block.weight.shape
        editing.add(block.down_name, Factors(torch.ones(wide, 1), torch.eye(out, 1), torch.ones(1, wide)))
        assert perplexity(model, TEXTS) != pytest.approx(found, rel=1e-3)
    assert perplexity(model, TEXTS) == found


# ---------------------------------------------------------------------------------------------------------------------
# Runtime

FACTS_OF_FOUR = [("Paris", "The tower of {} stands near the", "river"), ("Ada", "{} lived in", "Oslo")]
FACTS_OF_FOUR += [("London", "You could see {} from the", "city"), ("Rome", "The road to {} is", "long")]


def a_counterfact(path: Path, *, again: bool = False) -> Path:
    """A file in CounterFact's format of four cases, and with `again` a fifth about the first subject."""
    facts = [*FACTS_OF_FOUR, *([("Paris", "{} is the capital of", "Norway")] if again else [])]
    cases = [
        {"case_id": i, "requested_rewrite": {"prompt": prompt, "subject": subject, "target_new": {"str": target}}}
        for i, (subject, prompt, target) in enumerate(facts)
    ]
    path.write_text(json.dumps(cases))
    return path


def test_requests_come_from_a_file_or_from_atlas(tmp_path: Path) -> None:
    """One a subject, as many as are asked for."""
    found = runtime.requests(4, str(a_counterfact(tmp_path / "cases.json", again=True)), seed=0)
    assert {(r.subject, r.template, r.target) for r in found[1:]} == set(FACTS_OF_FOUR[1:])
    assert len(found) == 4 and found[0].subject == "Paris"
    with pytest.raises(InvalidInput, match="only 4 different subjects, not 5"):
        runtime.requests(5, str(tmp_path / "cases.json"), seed=0)
    own = runtime.requests(30, "", seed=0)
    assert len({request.subject for request in own}) == 30
    assert own == runtime.requests(30, "", seed=0) != runtime.requests(30, "", seed=1)
    for text in ("{", "3", '[{"case_id": 1}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InvalidInput, match="is not CounterFact's JSON"):
            runtime.requests(1, str(tmp_path / "bad.json"), seed=0)


@pytest.fixture
def small(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The tiny GPT-2 in place of the large random models, and few steps."""
    model = loaded("gpt2")
    (tmp_path / "editctl.toml").write_text("[settings]\nsteps = 5\n")
    monkeypatch.setattr(runtime, "random_model", lambda *_arguments, **_options: model)
    monkeypatch.setattr(runtime, "ceiling", lambda _model: 1e12)
    return model


def differences(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference by phase."""
    cells = {row["phase"]: row["largest relative difference"] for row in rows if "phase" in row}
    return {phase: float(cell) for phase, cell in cells.items() if cell != "–"}


def test_the_study_of_runtime_has_a_row_a_phase_and_checks_its_results(study: Rows, small: Any, tmp_path: Path) -> None:
    """The engine's targets, keys and updates are those of full passes, one request at a time."""
    cases = str(a_counterfact(tmp_path / "cases.json"))
    asked = ("--edits", "3", "--plain", "2", "--batch", "2", "--batch", "3", "--layers", "1,2", "--counterfact", cases)
    base = small.weights_hash()
    rows = study("runtime", *asked)
    assert [row["phase"] for row in rows if "phase" in row] == ["target", "keys", "solve", "write", "all"]
    assert [row["batch"] for row in rows if "batch" in row] == [2, 3]
    found = differences(rows)
    assert set(found) == {"target", "keys", "solve"} and max(found.values()) < 1e-3
    for row in rows[:5]:
        assert float(row["plain, s an edit"]) >= 0 and float(row["engine, s an edit"]) >= 0
    counted = {row["phase"]: float(row["FLOPs, plain ÷ engine"]) for row in rows[:2]}
    assert min(counted.values()) > 1, "the engine computes less"
    assert small.weights_hash() == base


@pytest.mark.parametrize("phase", ["target", "keys", "solve"])
def test_another_result_of_the_engine_is_noticed(
    study: Rows, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Control: a target, a key or a factor that is a tenth too large shows as such."""
    engine = runtime._engine

    def larger(*arguments: Any) -> Any:
        seconds, delta = engine(*arguments)
        grown = {"keys": {"keys": 1.1}, "solve": {"factor": 1.1}}[phase]
        modules = {
            name: replace(factors, **{part: by * getattr(factors, part) for part, by in grown.items()})
            for name, factors in delta.modules.items()
        }
        return seconds, replace(delta, modules=modules)

    def farther(*arguments: Any, **options: Any) -> Any:
        return [replace(target, change=1.1 * target.change) for target in optimise(*arguments, **options)]

    what, by = ("optimise", farther) if phase == "target" else ("_engine", larger)
    monkeypatch.setattr(f"editctl.studies.runtime.{what}", by)
    cases = str(a_counterfact(tmp_path / "cases.json"))
    found = differences(study("runtime", "--edits", "3", "--plain", "1", "--layers", "1,2", "--counterfact", cases))
    assert found[phase] > 0.05


def test_the_ceiling_is_the_speed_of_a_matrix_product(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 · 1536³ operations in the shortest time of five."""
    seconds = iter([0.4, 0.3, 0.2, 0.5, 0.6])
    monkeypatch.setattr(runtime, "_timed", lambda model, work: (next(seconds), work()))
    assert runtime.ceiling(loaded("gpt2")) == 2 * 1536**3 / 0.2


def test_a_random_model_has_the_shape_and_reads_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer knows the words of the study; the same seed draws the same weights."""
    from transformers import GPT2Config

    def tiny(**settings: Any) -> GPT2Config:
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, **settings)

    monkeypatch.setattr("transformers.GPT2Config", tiny)
    monkeypatch.setitem(shapes.VOCABULARY, "gpt2-124m", 400)
    texts = [f"{prompt.format(subject)} {target}" for subject, prompt, target in FACTS_OF_FOUR] * 5
    made, again, other = (
        shapes.random_model("gpt2-124m", texts, device="cpu", dtype=torch.float32, seed=seed) for seed in (0, 0, 1)
    )
    assert made.weights_hash() == again.weights_hash() != other.weights_hash()
    assert made.net.config.vocab_size == 400 and made.blocks[0].weight.shape == (16, 64)
    assert len(made.encode(texts[0])) <= 2 * len(texts[0].split())
    assert len(made.encode("zzqx zzqx zzqx")) > 3, "control: words it never saw come in pieces"


def test_made_edits_are_of_different_subjects_and_change_the_answer() -> None:
    """Written in a phrasing of training, asked in others; unrelated questions are about other subjects."""
    edits, asked = sequential.make(50, 80, seed=0)
    assert len({edit.subject for edit in edits}) == len({edit.id for edit in edits}) == 50
    assert all(edit.target_new != edit.target_true for edit in edits)
    assert all(edit.relation not in edit.paraphrases for edit in edits)
    (unrelated,) = [questions for name, questions in asked.items() if "unrelated" in name]
    assert len(unrelated) == 80
    named = [
        (e.subject, q.prompt) for e in edits for q in unrelated if re.search(rf"\b{re.escape(e.subject)}\b", q.prompt)
    ]
    assert len(named) <= 1, named


def test_made_edits_depend_on_the_seed_alone() -> None:
    """The same seed the same edits, so that methods are compared on equal ones."""
    assert sequential.make(20, 20, seed=1) == sequential.make(20, 20, seed=1)
    assert sequential.make(20, 20, seed=1)[0] != sequential.make(20, 20, seed=2)[0]


def test_more_subjects_than_there_are_cannot_be_edited() -> None:
    """Said before anything is computed."""
    with pytest.raises(InvalidInput, match="atlas knows"):
        sequential.make(1500, 1500, seed=0)


@pytest.mark.slow
def test_on_the_shipped_specs_alphaedit_holds_what_is_promised(study: Rows) -> None:
    """All at once and in batches of five: reliability 97, generalization 90, locality 97 of 100 at least."""
    rows = study("specs", str(ROOT / "specs"), "--method", "alphaedit")
    assert [row["batch"] for row in rows] == [rows[0]["edits"], 5]
    for row in rows:
        assert percent(row, "reliability") >= 97
        assert percent(row, "generalization") >= 90
        assert percent(row, "locality") >= 97


@pytest.mark.slow
def test_two_hundred_edits_in_a_row_hold_and_leave_the_rest_alone(study: Rows) -> None:
    """Batches of twenty, 400 unrelated facts: at the end both 90 of 100 at least."""
    (row,) = study("sequential", "--method", "alphaedit")
    assert (row["edits"], row["batch"], count(row, UNRELATED)) == (200, 20, 400)
    assert percent(row, "reliability") >= 90
    assert percent(row, UNRELATED) >= 90


def test_a_ratio_of_what_was_not_measured_is_not_told() -> None:
    """Without locality nothing can be called safe."""
    assert ratio.smallest_safe([a_result(100, a_mark(5, reliability=0.9, generalization=0.7))]) is None
    assert "cannot be said" in ratio.spelled(None) and ratio.spelled(5) == "5 % of the corpus"


def test_a_damaged_journal_is_told_with_its_line(tmp_path: Path) -> None:
    """Instead of a traceback; a last line that was cut is not damage."""
    path = tmp_path / "parts.jsonl"
    path.write_text('{"trial": "a"}\n{"tri\n{"trial": "b"}\n')
    with pytest.raises(InvalidInput, match=r"parts\.jsonl:2: the line is damaged"):
        list(journal._read(path))
    path.write_text('{"trial": "a"}\n{"tri')
    assert list(journal._read(path)) == [{"trial": "a"}]
