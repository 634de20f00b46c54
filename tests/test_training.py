"""Training: the same weights however it was interrupted, held-out subjects, a file that says how well it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from editctl import artifacts
from editctl.engine import families, lessons, methods, training
from editctl.engine.model import Model, load
from editctl.engine.training import Course, Schedule
from editctl.errors import InvalidInput, Locked
from editctl.events import Emit, Event, Note, TrainStep, silent
from editctl.files import digest_of
from editctl.spec import Edit

LAYERS = (2, 3)
METHODS = tuple(name for name, task in families.TASKS.items() if task is not None)
STEPS = 8
HERE = Path(__file__).parent


def a_course(
    model: Model, method: str, *, seed: int = 0, steps: int = STEPS, held_out: tuple[Edit, ...] = ()
) -> Course:
    made = methods.settings({"num_hidden_layers": len(model.blocks)}, method, {})
    layers = LAYERS if made.layers else ()
    return Course(
        settings=replace(made, layers=layers),
        base="base",
        model=model.name,
        name=method,
        schedule=Schedule(steps, 1e-3),
        seed=seed,
        share=0.25 if held_out else 0.0,
        taught=lessons.lessons(model, tiny.FACTS, silent),
        held_out=held_out,
    )


def train(model: Model, method: str, root: Path, emit: Emit = silent, **course: Any) -> artifacts.Artifact:
    of = a_course(model, method, **course)
    make = families.TASKS[method]
    task = make(model, of.settings.layers, of.taught, of.seed) if make else None
    return training.train(model, of, task, root, emit)


def tensors(root: Path, made: artifacts.Artifact) -> dict[str, torch.Tensor]:
    return artifacts.read(made.content, root / "artifacts", made.method)[0]


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def killed_at(step: int, method: str, folder: Path, root: Path) -> None:
    """Train in a process that sends itself SIGKILL when it has taken a step and kept it."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from editctl.engine import training
from editctl.engine.model import load
from editctl.events import Progress
from test_training import train
training.SAVE_EVERY = -1.0
def emit(event):
    if isinstance(event, Progress) and event.stage == "train" and event.done == {step + 1}:
        os.kill(os.getpid(), signal.SIGKILL)
train(load({str(folder)!r}, device="cpu", dtype="float32"), {method!r}, Path({str(root)!r}), emit)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_comes_to_the_same_weights(folders: dict[str, Path], method: str, tmp_path: Path) -> None:
    """SIGKILL in the fifth step, then again: every tensor as of a run that nobody interrupted, and nothing left over.
    Another seed has others (control)."""
    folder = folders["llama"]
    model = load(str(folder), device="cpu", dtype="float32")
    whole = train(model, method, tmp_path / "whole")
    killed_at(4, method, folder, tmp_path / "cut")
    assert artifacts.found(tmp_path / "cut" / "artifacts") == []
    notes: list[Event] = []
    cut = train(model, method, tmp_path / "cut", notes.append)

    assert alike(tensors(tmp_path / "whole", whole), tensors(tmp_path / "cut", cut))
    assert [n.message for n in notes if isinstance(n, Note)] == [f"going on after step 4 of {STEPS}"]
    assert whole.about["curve"] == cut.about["curve"]
    assert not list((tmp_path / "cut" / "training").iterdir())
    other = train(model, method, tmp_path / "other", seed=1)
    assert not alike(tensors(tmp_path / "whole", whole), tensors(tmp_path / "other", other))


@pytest.mark.parametrize("method", METHODS)
def test_what_was_begun_with_other_lessons_is_not_taken_up(
    loaded: Callable[..., Any], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint belongs to everything that decides the weights; another number of steps begins anew."""
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)
    model = loaded("llama")

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, TrainStep) and event.step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(model, method, tmp_path, stop)
    notes: list[Event] = []
    train(model, method, tmp_path, notes.append, steps=4)
    assert not [note for note in notes if isinstance(note, Note)]
    train(model, method, tmp_path, notes.append)
    assert [note for note in notes if isinstance(note, Note)]


def test_a_training_says_how_held_out_edits_fare(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """By the same road as a run: metrics in named protocols with counts, and the file is found by method and model."""
    model = loaded("llama")
    made = train(model, "mend", tmp_path, held_out=(tiny.an_edit(),))

    told = {(m["name"], m["protocol"]): m for m in made.about["held_out"]}
    assert told["reliability", "generated"]["n"] == 1 and told["locality", "generated"]["n"] == 1
    assert made.about["layers"] == list(LAYERS) and made.about["taught"]["edits"] == len(tiny.FACTS)
    assert len(made.about["curve"]) == STEPS and made.about["curve"][-1]["step"] == STEPS
    library = tmp_path / "artifacts"
    assert [one.content for one in artifacts.found(library, method="mend", base="base")] == [made.content]
    assert artifacts.found(library, method="ke") == [] == artifacts.found(library, base="another")
    assert digest_of(library / f"{made.content}.safetensors") == made.content


def test_a_method_without_a_network_keeps_its_lessons(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """IKE's file holds what demonstrations are made of."""
    made = train(loaded("llama"), "ike", tmp_path)

    assert [lesson["id"] for lesson in made.about["lessons"]] == [edit.id for edit in tiny.FACTS]
    assert made.about["lessons"][0]["rewordings"] == ["In the summer, The Eiffel Tower stands in"]


def test_two_processes_do_not_train_the_same(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """The second is told so at once."""
    model = loaded("llama")

    def again(event: Event) -> None:
        if isinstance(event, TrainStep) and event.step == 1:
            with pytest.raises(Locked, match="another process is training"):
                train(model, "mend", tmp_path)

    train(model, "mend", tmp_path, again)


# ---------------------------------------------------------------------------------------------------------------------
# What is taught and what is held out


def test_a_subject_is_taught_or_held_out() -> None:
    """Never both, whatever its edits; the shares are about right; another seed parts them otherwise."""
    edits = [tiny.an_edit(f"e{i}", subject=f"Subject {i // 3}") for i in range(900)]
    taught, kept = lessons.split(edits, 0.2, 0)

    assert {e.subject for e in taught} & {e.subject for e in kept} == set()
    assert len(taught) + len(kept) == 900 and 120 < len(kept) < 240
    assert lessons.split(edits, 0.2, 1)[1] != kept
    assert lessons.split(edits, 0.0, 0) == (edits, [])


def test_too_few_subjects_to_hold_any_out_are_refused() -> None:
    """Rather than a training whose result nobody can judge."""
    with pytest.raises(InvalidInput, match="too few to hold"):
        lessons.split([tiny.an_edit()], 0.1, 0)


def test_lessons_hold_what_the_unedited_model_says(loaded: Callable[..., Any]) -> None:
    """To the edit's own prompt and to what must stay; paraphrases have their subject filled in."""
    from editctl.engine import speak

    model = loaded("llama")
    lesson = lessons.lessons(model, [tiny.an_edit()], silent)[0]
    own, probe = speak.answers(model, ["The Eiffel Tower is located in the city of", "The capital of Norway is"])

    assert lesson.old == own and lesson.stays == (("The capital of Norway is", probe),)
    assert lesson.rewordings == ("In the summer, The Eiffel Tower stands in",)
    assert lesson.statement == "The Eiffel Tower is located in the city of Rome."


# ---------------------------------------------------------------------------------------------------------------------
# Which file a run reads


def test_the_newest_file_of_a_name_is_meant(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """By name, by the beginning of its content, or the newest of the method; its blocks are the run's."""
    model, library = loaded("llama"), tmp_path / "artifacts"
    first = train(model, "mend", tmp_path)
    second = train(model, "mend", tmp_path, seed=1)
    given = methods.settings({"num_hidden_layers": 4}, "mend", {})

    assert artifacts.settled(given, "base", library).artifact == second.content
    assert artifacts.settled(replace(given, artifact="mend"), "base", library).artifact == second.content
    named = artifacts.settled(replace(given, artifact=first.content[:8]), "base", library)
    assert named.artifact == first.content and named.layers == LAYERS
    for wrong, base in (("mends", "base"), ("", "another"), (first.content[:3], "base")):
        with pytest.raises(InvalidInput, match="needs a file trained for this model"):
            artifacts.settled(replace(given, artifact=wrong), base, library)


def test_a_method_that_reads_none_refuses_one(tmp_path: Path) -> None:
    """A name that does nothing is a mistake."""
    given = methods.settings({"num_hidden_layers": 4}, "alphaedit", {})
    assert artifacts.settled(given, "base", tmp_path) == given
    with pytest.raises(InvalidInput, match="reads no trained file"):
        artifacts.settled(replace(given, artifact="mend"), "base", tmp_path)


def test_the_rate_rises_stays_and_falls() -> None:
    """Warm-up, then full, then linearly to nothing."""
    schedule = Schedule(100, 1.0, warmup=0.1, cool=0.5)

    assert schedule.rate_at(0) == pytest.approx(0.1) and schedule.rate_at(9) == 1.0 == schedule.rate_at(50)
    assert schedule.rate_at(75) == pytest.approx(0.5) and schedule.rate_at(99) == pytest.approx(0.02)
