"""What the unedited model said is asked once, and never taken for what another model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import FACTS

from editctl.engine import asking, speak
from editctl.engine.asking import ask_all
from editctl.engine.model import Model
from editctl.engine.recall import Recall
from editctl.events import Event, StageStarted, silent
from editctl.metrics.edits import questions

ASKED = [question for edit in FACTS for question in questions(edit)]


@pytest.fixture
def llama(loaded: Any) -> Model:
    """A tiny model."""
    model: Model = loaded("llama")
    return model


def asked_of(told: list[Event]) -> list[int]:
    return [event.total for event in told if isinstance(event, StageStarted)]


def test_what_was_said_is_not_asked_again(llama: Model, tmp_path: Path) -> None:
    """Neither by the same program nor by the next one, and it is what would be said; new prompts are asked."""
    told: list[Event] = []
    plain = ask_all(llama, ASKED, "before", silent)
    some = ask_all(llama, ASKED[:4], "before", told.append, Recall.of(llama, "base", tmp_path))
    more = ask_all(llama, ASKED, "before", told.append, Recall.of(llama, "base", tmp_path))
    again = ask_all(llama, ASKED, "before", told.append, Recall.of(llama, "base", tmp_path))
    first, second, third = asked_of(told)
    assert first > 0 and second > 0 and third == 0
    assert some.words == {q: plain.words[q] for q in ASKED[:4]}
    assert more.words == again.words == plain.words
    for question in ASKED:
        assert again.scored[question].argmax == plain.scored[question].argmax
        assert (again.scored[question].nll or 0) == pytest.approx(plain.scored[question].nll or 0, rel=1e-4)
    assert again.scored == more.scored, "what is read back is what was measured, to the last bit"


def test_another_model_dtype_or_length_of_answers_is_asked(
    llama: Model, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a file of its own."""
    ask_all(llama, ASKED, "before", silent, Recall.of(llama, "base", tmp_path))
    told: list[Event] = []
    ask_all(llama, ASKED, "before", told.append, Recall.of(llama, "other", tmp_path))
    ask_all(llama, ASKED, "before", told.append, Recall.of(loaded("llama", "float64"), "base", tmp_path))
    monkeypatch.setattr("editctl.engine.recall.NEW_TOKENS", 3)
    ask_all(llama, ASKED, "before", told.append, Recall.of(llama, "base", tmp_path))
    assert all(asked_of(told)) and len(list((tmp_path / "said").iterdir())) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"words"', b'"wrods"'),
        lambda data: data.replace(b"{", b"[", 5),
        lambda data: b"\xff\x00" + data,
        lambda data: b"",
        lambda data: data + b'\n{"prompt": 3}\n[]\nnull\n{"key"',
    ],
    ids=["cut", "other names", "no JSON", "another head", "empty", "rubbish at the end"],
)
def test_a_damaged_file_costs_time_and_nothing_else(llama: Model, tmp_path: Path, spoil: Any) -> None:
    """What cannot be read is asked again, and kept again."""
    plain = ask_all(llama, ASKED, "before", silent, Recall.of(llama, "base", tmp_path))
    (path,) = (tmp_path / "said").iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    told: list[Event] = []
    for _ in range(2):
        assert ask_all(llama, ASKED, "before", told.append, Recall.of(llama, "base", tmp_path)).words == plain.words
    first, second = asked_of(told)
    assert first >= 0 and second == 0


def test_a_folder_that_cannot_be_written_is_none(llama: Model, tmp_path: Path) -> None:
    """As on a read-only disk: it is asked, and nothing fails."""
    (tmp_path / "said").write_text("a file in its place")
    told: list[Event] = []
    for _ in range(2):
        ask_all(llama, ASKED[:2], "before", told.append, Recall.of(llama, "base", tmp_path))
    assert all(asked_of(told))


def test_values_are_found_once(llama: Model, tmp_path: Path) -> None:
    """By name and by what they depend on."""
    found: list[str] = []

    def find(value: str) -> str:
        found.append(value)
        return value

    for _ in range(2):
        for of in (["a"], ["b"]):
            recall = Recall.of(llama, "base", tmp_path)
            assert recall.value("perplexity", of, lambda of=of: find(of[0])) == of[0]  # type: ignore[misc]
    assert found == ["a", "b"]


def test_equal_prompts_are_read_once(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """For words and the scores of all answers together: as many texts go into the model as there are prompts."""
    read: list[int] = []
    heard = speak._heard

    def counted(model: Model, stems: Any, *others: Any) -> Any:
        read.append(len(stems))
        return heard(model, stems, *others)

    monkeypatch.setattr(speak, "_heard", counted)
    asking.ask_all(llama, [*ASKED, *ASKED], "before", silent)
    assert sum(read) == len({question.prompt for question in ASKED})
