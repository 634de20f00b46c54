"""Training what a method reads, to the same weights however often it was interrupted.

Knows: the schedule, the checkpoint, the loss curve, and that a trained file says how well it does on edits it never
saw. What is learned is a `Task`'s; it draws everything at random by the number of the step alone. Refuses: to call
something trained that was not measured.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from editctl.artifacts import DRAFT, KEY, Artifact
from editctl.delta import read_tensors, write_tensors
from editctl.engine.asking import answers_of, ask_all, request_of
from editctl.engine.editor import Editor
from editctl.engine.families import laid
from editctl.engine.lessons import Lesson
from editctl.engine.methods import Settings
from editctl.engine.model import Model
from editctl.engine.prompts import sample_contexts
from editctl.errors import Locked
from editctl.events import Emit, Note, Progress, StageStarted, TrainStep, silent
from editctl.files import digest_of
from editctl.metrics import edits as edit_metrics
from editctl.metrics.values import Metric
from editctl.spec import Edit
from editctl.store.connection import utc_now

FORMAT = 1
SAVE_EVERY = 20.0
"""Seconds of training that a killed process loses at most."""
POINTS = 50
"""Points of a loss curve."""
MEASURED = 100
"""Held-out edits that it is usual to measure, at most."""
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    rate: float
    warmup: float = 0.02
    """Share of the steps in which the rate rises."""
    cool: float = 0.5
    """Share of the steps in which it falls, at the end."""
    clip: float = 1.0
    """Largest norm of a gradient."""

    def rate_at(self, step: int) -> float:
        """Adam's step size at a step, from 0."""
        rising = (step + 1) / max(1.0, self.warmup * self.steps)
        falling = (self.steps - step) / max(1.0, self.cool * self.steps)
        return self.rate * min(1.0, rising, falling)


class Task(Protocol):
    """What is learned for one method on one model."""

    @property
    def net(self) -> nn.Module:
        """Its parameters are trained; with its buffers they are what the trained file holds."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What decides the result beside lessons and schedule, and what a reader must know; JSON values."""

    def loss(self, step: int) -> dict[str, Tensor]:
        """The loss of a step under `loss`, and its parts by their names; scalars. Random by `step` alone."""

    def stepped(self, parts: Mapping[str, float]) -> None:
        """The weights have moved; the parts of the loss are those before."""

    def state(self) -> dict[str, float]:
        """What the task knows beside its weights, for a checkpoint."""

    def take(self, state: Mapping[str, float]) -> None:
        """Back from `state`."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """Everything that is decided before training begins."""

    settings: Settings
    """Of the method, its trained file unnamed."""
    base: str
    """Content of the model."""
    model: str
    """The model as the user named it."""
    name: str
    schedule: Schedule
    seed: int
    share: float
    """Of the subjects that are held out."""
    taught: Sequence[Lesson]
    held_out: Sequence[Edit]

    def about(self, task: Task | None) -> dict[str, Any]:
        """What decides the weights, as JSON values."""
        taught = json.dumps([asdict(lesson) for lesson in self.taught], sort_keys=True)
        layers = {"layers": list(self.settings.layers)} if self.settings.layers else {}
        return {
            "format": FORMAT,
            "method": self.settings.method,
            "base": self.base,
            "model": self.model,
            "name": self.name,
            **layers,
            "seed": self.seed,
            "schedule": asdict(self.schedule),
            "taught": {"edits": len(self.taught), "content": sha256(taught.encode()).hexdigest()[:16]},
            "held_out_share": self.share,
            "torch": torch.__version__,
            **(json.loads(json.dumps(dict(task.about))) if task else {}),
        }


def train(model: Model, course: Course, task: Task | None, root: Path, emit: Emit) -> Artifact:
    """Train, measure on the held-out edits, and put the file among the store's trained ones.

    A killed run goes on from its checkpoint under `root`/training and comes to the same weights on the same machine.

    Args:
        task: None for a method that only has to keep the lessons.
        root: the store's folder.

    Raises:
        Locked: another process trains the same.
        StoreError: a file cannot be written.
    """
    about = course.about(task)
    name = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder, library = root / "training" / name, root / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            begun = time.perf_counter()
            before, curve = _learn(task, course, folder, emit) if task else (0.0, [])
            tensors = _tensors(task, course)
            # A method without a network has its lessons for demonstrations.
            told = {} if task else {"lessons": [asdict(lesson) for lesson in course.taught]}
            found = {**about, **told, "curve": curve, "seconds": round(before + time.perf_counter() - begun, 1)}
            draft = folder / f"{DRAFT}.safetensors"
            write_tensors(draft, tensors, {KEY: found})
            metrics = measure(model, course, draft, emit)
            final = {**found, "held_out": [_told(m) for m in metrics], "created_at": utc_now().isoformat()}
            final = json.loads(json.dumps(final))
            part = folder / "finished.safetensors"
            write_tensors(part, tensors, {KEY: final})
            content = digest_of(part)
            library.mkdir(parents=True, exist_ok=True)
            part.replace(library / f"{content}.safetensors")
    except Timeout:
        raise Locked(f"another process is training in {folder}", "wait for it to end") from None
    shutil.rmtree(folder, ignore_errors=True)
    return Artifact(content, final)


def _told(metric: Metric) -> dict[str, Any]:
    kept = ("name", "protocol", "axis", "value", "n", "low", "high")
    return {name: getattr(metric, name) for name in kept if getattr(metric, name) not in ("", None)}


def _learn(task: Task, course: Course, folder: Path, emit: Emit) -> tuple[float, list[dict[str, float]]]:
    """Take the steps that are left; seconds that were spent before, and the loss curve."""
    schedule, parameters = course.schedule, dict(task.net.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=schedule.rate)
    step, seconds, curve = _taken_up(task, optimizer, folder / CHECKPOINT)
    if step:
        emit(Note(f"going on after step {step} of {schedule.steps}"))
    emit(StageStarted("train", schedule.steps))
    begun = saved = time.perf_counter()
    every = max(1, schedule.steps // POINTS)
    sums: dict[str, float] = curve.pop() if curve and step % every else {}
    while step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        with torch.enable_grad():
            parts = task.loss(step)
            optimizer.zero_grad(set_to_none=True)
            parts["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters.values(), schedule.clip)
        optimizer.step()
        step += 1
        said = {name: float(value.detach()) for name, value in parts.items()}
        task.stepped(said)
        for name, value in said.items():
            sums[name] = sums.get(name, 0.0) + value
        sums["count"] = sums.get("count", 0.0) + 1
        emit(Progress("train", step, schedule.steps))
        if step % every == 0 or step == schedule.steps:
            count = sums.pop("count")
            means = {key: value / count for key, value in sums.items()}
            curve.append({"step": step, **means})
            emit(TrainStep(step, schedule.steps, means))
            sums = {}
        if time.perf_counter() - saved > SAVE_EVERY:
            saved = time.perf_counter()
            _save(
                task, optimizer, folder / CHECKPOINT, step, seconds + saved - begun, [*curve, sums] if sums else curve
            )
    return seconds, curve


def _save(
    task: Task, optimizer: torch.optim.Optimizer, path: Path, step: int, seconds: float, curve: Sequence[Any]
) -> None:
    tensors = {f"weight.{name}": value for name, value in task.net.state_dict().items()}
    for name, parameter in task.net.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    write_tensors(path, tensors, {"step": step, "seconds": seconds, "curve": list(curve), "state": task.state()})


def _taken_up(task: Task, optimizer: torch.optim.Optimizer, path: Path) -> tuple[int, float, list[dict[str, float]]]:
    """The step, seconds and curve of a checkpoint, its weights and moments put in place; zeros where there is none."""
    if not path.exists():
        return 0, 0.0, []
    tensors, found = read_tensors(path)
    step = int(found["step"])
    task.net.load_state_dict({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    for name, parameter in task.net.named_parameters():
        moments = {key: tensors[f"{key}.{name}"].to(parameter, copy=True) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    task.take(found["state"])
    return step, float(found["seconds"]), list(found["curve"])


def _tensors(task: Task | None, course: Course) -> dict[str, Tensor]:
    if task is not None:
        return {name: value.float().cpu().clone() for name, value in task.net.state_dict().items()}
    # A file of texts alone; safetensors holds at least one tensor.
    return {"lessons": torch.tensor([float(len(course.taught))])}


def measure(model: Model, course: Course, file: Path, emit: Emit) -> tuple[Metric, ...]:
    """How edits that were held out fare under a trained file: written in batches, then all asked, as a run does it.

    Args:
        file: the trained file, whatever its name.
    """
    edits = course.held_out
    if not edits:
        return ()
    settings = replace(course.settings, artifact=file.stem)
    questions = [q for edit in edits for q in edit_metrics.questions(edit)]
    before = ask_all(model, questions, "before", emit)
    emit(StageStarted("after", 0))
    with model.editing() as editing:
        none: Callable[..., Any] = dict
        editor = Editor(model, editing, none, sample_contexts(model, settings.seed), silent, library=file.parent)
        for start in range(0, len(edits), settings.batch_size):
            part = edits[start : start + settings.batch_size]
            editor.edit([request_of(edit) for edit in part], settings, 1 + start // settings.batch_size)
        with laid(model, editing.overlays, file.parent):
            after = ask_all(model, questions, "after", emit)
    return edit_metrics.summary(answers_of(questions, before, after))


def table(made: Artifact) -> list[dict[str, object]]:
    """How the held-out edits fare under a trained file, a row a metric and protocol."""
    rows = []
    for metric in made.about["held_out"]:
        axis = metric.get("axis", "")
        name = f"{metric['name']} ({axis})" if axis else metric["name"]
        value = f"{100 * metric['value']:.1f} %" if metric["value"] <= 1 else f"{metric['value']:.3g}"
        rows.append({"held-out edits": name, "protocol": metric["protocol"], "value": value, "prompts": metric["n"]})
    return rows
