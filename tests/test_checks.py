"""What is measured beside answers: what was asked for, before and after on the same texts, and once of the unedited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import an_edit

from editctl.engine import checks
from editctl.engine.checks import Checks, Side, Wanted
from editctl.engine.model import Model
from editctl.engine.recall import Recall
from editctl.errors import InvalidInput
from editctl.events import Event, Note, silent
from editctl.metrics import ability
from editctl.metrics.values import CHECKS, Metric
from editctl.spec import Edit

TEXTS = ("The river and the road. In the summer they were long.", "Rome is a city.")
BLOCK = "hidden states after block 1"
TOWER = an_edit(
    generation=("{} is", "In the summer {}"), references=("The city of Rome has a tower.",), essence="A tower in Rome."
)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve canaries of all families, short texts."""
    suite = ability.suite()[::30]
    monkeypatch.setattr(ability, "suite", lambda: suite)
    monkeypatch.setattr(checks.drift, "prompts", lambda: ("The river is long.", "People say that you know.", "I think"))


@pytest.fixture
def llama(loaded: Any) -> Iterator[Model]:
    """A tiny model whose weights are put back."""
    model: Model = loaded("llama")
    weight = model.blocks[1].weight
    old = weight.detach().clone()
    yield model
    with torch.no_grad():
        weight.copy_(old)


def damage(model: Model) -> None:
    """Weights that say something else."""
    with torch.no_grad():
        model.blocks[1].weight.add_(
            torch.randn(model.blocks[1].weight.shape, generator=torch.Generator().manual_seed(0))
        )


def compared(model: Model, *names: str, edits: tuple[Edit, ...] = (TOWER,), harm: bool = True) -> dict[Any, Metric]:
    """By key, what the checks say of a model before and after damage."""
    some = Checks(Wanted(names, TEXTS), edits, silent)
    before = some.side(model, 1)
    if harm:
        damage(model)
    return {metric.key: metric for metric in some.compare(before, some.side(model, 1))}


def test_each_check_yields_its_metrics_and_no_other(llama: Model) -> None:
    """Asked for one by one; together they are all there is."""
    wanted = {
        "drift": {"drift", "drift angle"},
        "perplexity": {"perplexity"},
        "ability": {"ability", "ability change"},
        "essence": {"essence"},
        "generation": {"fluency", "consistency"},
    }
    assert tuple(wanted) == CHECKS
    for name, metrics in wanted.items():
        assert {metric for metric, _, _ in compared(llama, name)} == metrics
    assert {metric for metric, _, _ in compared(llama, *CHECKS)} == set().union(*wanted.values())
    assert compared(llama) == {}


def test_what_the_model_had_before_stands_beside_it(llama: Model) -> None:
    """Damage shows in each; without it everything is as it was."""
    found = compared(llama, *CHECKS)
    for name, protocol in (("perplexity", "teacher-forced"), ("essence", "teacher-forced"), ("fluency", "sampled")):
        assert found[name, protocol, ""].value != found[name, protocol, "was"].value
    assert found["perplexity", "teacher-forced", ""].value > found["perplexity", "teacher-forced", "was"].value
    assert found["drift", BLOCK, ""].value > 0.01
    same = compared(llama, *CHECKS, harm=False)
    for key, metric in same.items():
        if key[2] == "was":
            assert metric.value == same[key[0], key[1], ""].value
    assert same["drift", BLOCK, ""].value == same["ability change", "probability", ""].value == 0


def test_what_no_edit_gives_a_text_for_is_absent(llama: Model) -> None:
    """No opening: no fluency. No reference: no consistency. No essence: none. Nothing is 0 instead."""
    found = compared(llama, *CHECKS, edits=(an_edit(),))
    assert {name for name, _, _ in found} == {"drift", "drift angle", "perplexity", "ability", "ability change"}
    found = compared(llama, *CHECKS, edits=(an_edit(generation=("{} is",)),))
    assert ("fluency", "sampled", "") in found and ("consistency", "sampled", "") not in found


def test_the_unedited_model_is_checked_once(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found of it comes back as it was; the edited one is always asked."""
    some = Checks(Wanted(CHECKS, TEXTS), (TOWER,), silent)
    first = some.side(llama, 1, Recall.of(llama, "base", tmp_path))

    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("asked again")

    for room, name in (("text", "perplexity"), ("text", "essences"), ("ability", "ability")):
        monkeypatch.setattr(getattr(checks, room), name, never)
    monkeypatch.setattr(checks, "sampled", never)
    again = some.side(llama, 1, Recall.of(llama, "base", tmp_path))
    assert again.alone == first.alone and again.ability == first.ability
    with pytest.raises(AssertionError, match="asked again"):
        some.side(llama, 1)


def test_an_opening_without_room_is_told_and_left_out(llama: Model) -> None:
    """Once; the others are gone on with, and a run does not fail for it."""
    long = an_edit("long", generation=("The river and the road. " * 60,))
    told: list[Event] = []
    some = Checks(Wanted(("generation",)), (TOWER, long), told.append)
    values = [next(m for m in some.side(llama, 1).alone if m.name == "fluency") for _ in range(2)]
    assert [metric.n for metric in values] == [2, 2]
    (note,) = (event.message for event in told if isinstance(event, Note))
    assert "1 openings leave no room" in note and "of long all" in note


def test_what_is_of_some_edits_says_so(llama: Model) -> None:
    """So that no value of some is compared with one of all; what is of the model is not concerned."""
    some = Checks(Wanted(CHECKS, TEXTS), (TOWER,), silent, "of new edits").side(llama, 1)
    protocols = {metric.name: metric.protocol for metric in some.alone}
    assert protocols["fluency"] == protocols["consistency"] == "sampled of new edits"
    assert protocols["essence"] == "teacher-forced of new edits" and protocols["perplexity"] == "teacher-forced"
    named = Checks(Wanted(("perplexity",), TEXTS, "book.txt 0123"), (), silent).side(llama, 1)
    assert [metric.protocol for metric in named.alone] == ["teacher-forced, book.txt 0123"]


def test_drift_after_different_blocks_is_not_compared(llama: Model) -> None:
    """Its protocol names the block."""
    some = Checks(Wanted(("drift",)), (), silent)
    sides = [some.side(llama, layer) for layer in (0, 1)]
    assert {m.protocol for side in sides for m in some.compare(side, side)} == {
        "hidden states after block 0",
        "hidden states after block 1",
    }
    with pytest.raises(ValueError, match="another block"):
        some.compare(*sides)


def test_a_harness_that_is_not_installed_is_said(llama: Model) -> None:
    """With the remedy; a task is measured on both sides where it is."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidInput, match="not installed"):
            Checks(Wanted(tasks=("hellaswag",)), (), silent).side(llama, 1)
    sides = [Side(alone=[Metric("task hellaswag", "lm-eval", value, 10, axis="acc")]) for value in (0.5, 0.25)]
    found = Checks(Wanted(), (), silent).compare(*sides)
    assert [(m.axis, m.value) for m in found] == [("acc", 0.25), ("was, acc", 0.5)]
