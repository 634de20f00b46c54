"""Studies: the rows they print, and on the shipped specs the numbers that the built-in model has to reach."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editctl.errors import InvalidInput
from editctl.store import Store
from editctl.studies import sequential

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
def study(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Rows:
    """Runs a study in this process and gives the rows of its table."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["editctl", "--store", str(store), "study", *arguments, "--json"])
        main()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == {"type": "version", "schema": 1}
        assert {line.pop("type") for line in lines[1:]} == {"row"}
        return lines[1:]

    return call


def percent(cell: str) -> float:
    return float(cell.split()[0])


def count(cell: str) -> int:
    """How many prompts a share is of."""
    return int(re.fullmatch(r"\d+\.\d \((\d+)\)", cell)[1])  # type: ignore[index]


def column(row: dict[str, Any], *words: str) -> str:
    """The cell of the one column whose name has these words."""
    (name,) = [name for name in row if all(word in name for word in words)]
    cell: str = row[name]
    return cell


QUICK = ("--set", "corpus_tokens=8000")


def test_a_sequential_study_counts_what_it_asks(study: Rows) -> None:
    """Twelve edits in two batches: each asked right after its batch and at the end, forty unrelated facts beside."""
    asked = ("--edits", "12", "--batch", "6", "--unrelated", "40", "--method", "alphaedit")
    rows = study("sequential", *asked, *QUICK)
    assert [(row["method"], row["edits"], row["batch"]) for row in rows] == [("alphaedit", 12, 6)]
    for row in rows:
        assert count(row["reliability right after"]) == 12
        assert count(row["generalization"]) == 24
        assert count(column(row, "unrelated")) == 40
        assert float(row["seconds an edit"]) >= 0
    at_end = [value for name, value in rows[0].items() if name.startswith("reliability") and "after" not in name]
    assert [count(value) for value in at_end] == [12]
    # Far below what is reached, far above what the unedited model says: 0 reliable, 100 kept.
    assert percent(rows[0]["reliability right after"]) >= 75
    assert percent(column(rows[0], "unrelated")) >= 75


def test_a_study_of_specs_takes_them_at_once_and_in_batches(study: Rows, tmp_path: Path) -> None:
    """One row a batch size; the counts are those of the specs."""
    (tmp_path / "three.toml").write_text(SPEC)
    methods = ("--method", "alphaedit", "--method", "memit")
    rows = study("specs", "three.toml", *methods, "--batch", "3", "--batch", "1", *QUICK)
    table = [(name, 3, size) for name in ("alphaedit", "memit") for size in (3, 1)]
    assert [(row["method"], row["edits"], row["batch"]) for row in rows] == table
    for row in rows:
        assert count(row["reliability right after"]) == 3
        assert (count(row["generalization"]), count(row["locality"])) == (2, 2)
    assert [percent(row["reliability right after"]) for row in rows[:2]] == [100, 100]


def test_a_study_records_nothing_but_second_moments(study: Rows, store: Path, tmp_path: Path) -> None:
    """No version, no operation, no factors."""
    (tmp_path / "three.toml").write_text(SPEC)
    study("specs", "three.toml", "--method", "memit", "--batch", "3", *QUICK)
    assert Store(store).operations() == []
    assert [path.name for path in store.iterdir()] == ["stats"]


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
        at_end = next(v for name, v in row.items() if name.startswith("reliability") and "after" not in name)
        assert percent(at_end) >= 97
        assert percent(row["generalization"]) >= 90
        assert percent(row["locality"]) >= 97


@pytest.mark.slow
def test_two_hundred_edits_in_a_row_hold_and_leave_the_rest_alone(study: Rows) -> None:
    """Batches of twenty, 400 unrelated facts: at the end both 90 of 100 at least."""
    (row,) = study("sequential", "--method", "alphaedit")
    assert (row["edits"], row["batch"], count(column(row, "unrelated"))) == (200, 20, 400)
    at_end = next(v for name, v in row.items() if name.startswith("reliability") and "after" not in name)
    assert percent(at_end) >= 90
    assert percent(column(row, "unrelated")) >= 90
