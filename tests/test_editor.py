"""The engine on every architecture of docs/models.md: two facts sought, written and undone, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builds
import pytest
import torch

from editctl.engine import methods, run
from editctl.engine.keys import Staged
from editctl.engine.model import Model, load
from editctl.engine.prompts import Request
from editctl.engine.run import Editor
from editctl.engine.statistics import Moment
from editctl.events import silent

LAYERS = [1]
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("curie", "In the summer, {} lived in", "Marie Curie", "Oslo"),
)


def flat(model: Model) -> dict[int, Moment]:
    """Second moments of keys that use every direction alike."""
    width = model.blocks[LAYERS[0]].weight.shape[1]
    return {layer: Moment(torch.eye(width), torch.ones(width, dtype=torch.float64), 1000) for layer in LAYERS}


def edited(model: Model, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> tuple[float, float, list[float]]:
    """How far block outputs at the subjects end from where they were to go, before and after the edit, as a share of
    the wanted movement; and the targets' loss by step."""
    goals: list[Any] = []
    seek = Editor._goal

    def noted(self: Editor, *arguments: Any) -> Any:
        goals.append(seek(self, *arguments))
        return goals[-1]

    monkeypatch.setattr(run.Editor, "_goal", noted)
    config = {"num_hidden_layers": len(model.blocks)}
    settings = methods.settings(config, "memit", {"layers": LAYERS, "lambda": 1e-4, "steps": 6, **overrides})

    def states() -> torch.Tensor:
        return Staged(model, REQUESTS, ("",), LAYERS[0], silent).stage(LAYERS[0]).states

    before, losses = states(), []
    with model.editing() as editing:
        editor = Editor(model, editing, lambda _: flat(model), ("",), lambda e: losses.append(getattr(e, "loss", None)))
        editor.edit(REQUESTS, settings, 1)
        after = states()
    wanted = goals[0].values
    size = (wanted - before).norm()
    return float((before - wanted).norm() / size), float((after - wanted).norm() / size), [x for x in losses if x]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model by its architecture's name, loaded from a folder."""
    root: Path = tmp_path_factory.mktemp("models")
    known: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in known:
            known[name] = load(str(builds.BUILDS[name].write(root / str(len(known)))), device="cpu")
        return known[name]

    return get


@pytest.mark.parametrize("name", builds.BUILDS)
def test_targets_are_found_reached_and_undone(opened: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, the edited block puts out what was sought for both subjects, and the weights come back."""
    model = opened(name)
    base = model.weights_hash()
    before, after, losses = edited(model, monkeypatch)
    assert losses[-1] < losses[0]
    assert before == pytest.approx(1) and after < 0.01
    assert model.weights_hash() == base


@pytest.mark.parametrize("name", ["GPT-2", "Granite", "Gemma 2"])
def test_a_weak_solve_does_not_reach_them(opened: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with preserved keys weighing far more than the edits, the block stays short of what was sought."""
    _, after, _ = edited(opened(name), monkeypatch, **{"lambda": 1e3})
    assert after > 0.05
