"""How long an edit takes, by phase, against the plain path, and how near that is to what the machine can do.

Knows: the protocol. Both paths run in one process on the same requests; the plain one on some of them, since each costs
the same. FLOPs are counted by torch in passes of their own, the ceiling is the fastest of some large matrix products.
Refuses: the work; `plain` and the engine do it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from editctl.engine import methods, statistics
from editctl.engine.editor import Clock, Editor
from editctl.engine.keys import Staged
from editctl.engine.methods import Settings
from editctl.engine.model import DTYPES, Model, pick_device
from editctl.engine.prompts import Request, groups
from editctl.engine.run import peak_mb
from editctl.engine.statistics import Moment
from editctl.engine.target import optimise
from editctl.errors import InvalidInput
from editctl.events import Emit, StageStarted, silent
from editctl.studies import plain
from editctl.studies.shapes import SHAPES, random_model

if TYPE_CHECKING:
    from editctl.workspace import Workspace

CONTEXTS = (
    "",
    "The old harbour was quiet again after the storm. ",
    "Therefore we decided to stay another week in town. ",
    "Because it rained all day, nobody came to visit. ",
    "I have been reading about this for some time. ",
    "You can see the mountains from here on clear days. ",
)
"""Six, as MEMIT has them, of ten words each."""
PHASES = ("target", "keys", "solve", "write")
COUNTED = 16
"""Edits that FLOPs are counted on."""


def requests(count: int, counterfact: str, seed: int) -> list[Request]:
    """Requests of the shape of CounterFact's: from a file in its format, or made of atlas's facts.

    Raises:
        InvalidInput: the file cannot be read, or holds too few of them.
    """
    if counterfact:
        try:
            records = json.loads(Path(counterfact).read_text(encoding="utf-8"))
            found = [
                Request(f"case-{r['case_id']}", w["prompt"], w["subject"], w["target_new"]["str"])
                for r in records
                for w in [r["requested_rewrite"]]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{counterfact} is not CounterFact's JSON: {error!r}", "give counterfact.json") from None
    else:
        from editctl.atlas import knowledge

        known = knowledge.load()
        rng = random.Random(seed)
        facts = list({fact.subject: fact for fact in known.single()}.values())
        rng.shuffle(facts)
        found = [Request(f"made-{i}", f.seen[0], f.subject, f.object) for i, f in enumerate(facts)]
    # One subject once: shared targets are a saving of their own.
    found = list({request.subject: request for request in found}.values())
    if len(found) < count:
        raise InvalidInput(f"there are only {len(found)} different subjects, not {count}", "ask for fewer --edits")
    return found[:count]


def texts(some: Sequence[Request]) -> list[str]:
    """Everything these requests have the model read."""
    return [*CONTEXTS, *(f"{request.prompt} {request.target}" for request in some)]


def ceiling(model: Model) -> float:
    """FLOP/s of a large matrix product in the model's dtype on its device, the best of five."""
    size = 8192 if model.device.type == "cuda" else 1536
    a, b = (torch.rand(size, size, device=model.device).to(model.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        best = min(best, _timed(model, lambda: a @ b)[0])
    return 2 * size**3 / best


def _timed(model: Model, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds and result."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    begun = time.perf_counter()
    result = work(*arguments)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - begun, result


def _counted(work: Callable[[], Any]) -> float:
    """FLOPs of a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def measured(
    space: Workspace,
    shape: str,
    counterfact: str,
    *,
    edits: int,
    plain_edits: int,
    batches: Sequence[int],
    emit: Emit,
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The tables of `compare` for AlphaEdit on a model of a random shape.

    20 steps, none left out by an early stop; blocks 3 to 7 of the small shape and the published ones of the large.

    Raises:
        InvalidInput: the shape is not known.
    """
    if shape not in SHAPES:
        raise InvalidInput(f"unknown shape {shape}", f"one of: {', '.join(SHAPES)}")
    some = requests(edits, counterfact, seed=0)
    device = pick_device(space.config.device)
    dtype = {"auto": torch.float32 if device == "cpu" else torch.bfloat16, **DTYPES}[space.config.dtype]
    emit(StageStarted("load", 0))
    model = random_model(shape, texts(some), device=device, dtype=dtype)
    layers = [3, 4, 5, 6, 7] if shape == "gpt2-124m" else [4, 5, 6, 7, 8]
    own = {"layers": layers, "steps": 20, "stop": 0.0, **space.config.settings}
    settings = methods.settings(model.net.config.to_dict(), "alphaedit", own)
    width = max(model.blocks[layer].weight.shape[1] for layer in settings.layers)
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        rng = random.Random(0)
        words = " ".join(texts(some)).split()
        lines = (" ".join(rng.choices(words, k=100)) for _ in range(width // 20))
        corpus.write_text("\n".join(lines), encoding="utf-8")
        # Four tokens a dimension: what is measured is time, not what these random weights know.
        tokens, base = 4 * width, f"{model.name}"
        moments = statistics.moments(
            model, settings.layers, corpus=str(corpus), tokens=tokens, base=base, folder=Path(folder), emit=emit
        )
        return compare(model, settings, moments, some, plain_edits=plain_edits, batches=batches, emit=emit)


def compare(
    model: Model,
    settings: Settings,
    moments: Mapping[int, Moment],
    some: Sequence[Request],
    *,
    plain_edits: int,
    batches: Sequence[int],
    emit: Emit,
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """One row a phase and one in all; and one row a batch size of the engine alone."""
    top = ceiling(model)
    fast, deltas = _engine(model, settings, moments, some, emit)
    slow, errors = _plain(model, settings, moments, some, deltas, plain_edits)
    flops = _flops(model, settings, moments, some)
    rows: list[dict[str, object]] = []
    for phase in (*PHASES, "all"):
        mine = sum(fast.values()) if phase == "all" else fast[phase]
        theirs = sum(slow.values()) if phase == "all" else slow[phase]
        counted = flops.get(phase)
        row: dict[str, object] = {
            "phase": phase,
            "plain, s an edit": f"{theirs:.3f}",
            "engine, s an edit": f"{mine:.4f}",
        }
        row["plain ÷ engine"] = f"{theirs / mine:.1f}"
        row["GFLOP an edit, plain"] = f"{counted[0] / 1e9:.1f}" if counted else "–"
        row["GFLOP an edit, engine"] = f"{counted[1] / 1e9:.1f}" if counted else "–"
        row["FLOPs, plain ÷ engine"] = f"{counted[0] / counted[1]:.1f}" if counted else "–"
        row["engine's share of the matmul ceiling"] = f"{100 * counted[1] / mine / top:.0f} %" if counted else "–"
        row["largest relative difference"] = f"{errors[phase]:.1e}" if phase in errors else "–"
        rows.append(row)
    sizes = []
    for size in batches:
        clock, _ = _engine(model, settings, moments, some[:size], emit)
        parts = {f"{phase}, s an edit": f"{clock[phase]:.4f}" for phase in PHASES}
        total = f"{sum(clock.values()):.4f}"
        sizes.append({"batch": size, **parts, "all, s an edit": total, "peak, MB": f"{peak_mb(model.device):.0f}"})
    return rows, sizes


def _engine(
    model: Model, settings: Settings, moments: Mapping[int, Moment], some: Sequence[Request], emit: Emit
) -> tuple[dict[str, float], Any]:
    """Seconds an edit by phase of one batch through the engine, and what it wrote."""
    clock = Clock()
    with model.editing() as editing:
        editor = Editor(model, editing, lambda _: moments, CONTEXTS, emit, clock)
        delta = editor.edit(some, settings, 1)
    return {phase: clock.seconds.get(phase, 0.0) / len(some) for phase in PHASES}, delta


def _plain(
    model: Model,
    settings: Settings,
    moments: Mapping[int, Moment],
    some: Sequence[Request],
    delta: Any,
    count: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds an edit by phase on the plain path, and how far its results are from the engine's.

    Targets and keys are timed on `count` requests; the solve and the write on the engine's keys and residuals of the
    whole batch, which are compared with those of the `count`.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    errors = dict.fromkeys(("target", "keys", "solve"), 0.0)
    layers, last = settings.layers, settings.layers[-1]
    chosen = some[:: max(1, len(some) // count)][:count]
    engine = optimise(model, last, groups(chosen), CONTEXTS, settings.target, emit=silent)
    columns = [delta.columns[delta.edits.index(request.id)] for request in chosen]
    for request, found in zip(chosen, engine, strict=True):
        spent, change = _timed(model, plain.target, model, last, request, CONTEXTS, settings)
        seconds["target"] += spent / count
        errors["target"] = max(errors["target"], float((change - found.change).norm() / change.norm()))
    with plain.written(model) as write:
        for layer in layers:
            stored = delta.modules[model.blocks[layer].down_name]
            for request, column in zip(chosen, columns, strict=True):
                # The references read each block's keys twice: to write it, and afterwards for the history.
                spent, key = _timed(model, plain.key, model, layer, request, CONTEXTS)
                again, _ = _timed(model, plain.key, model, layer, request, CONTEXTS)
                once, _ = _timed(model, plain.state, model, last, request)
                seconds["keys"] += (spent + again + once) / count
                wanted = stored.keys[:, column].to(key.device)
                errors["keys"] = max(errors["keys"], float((key - wanted).norm() / key.norm()))
            keys, residuals = stored.keys.to(model.device), stored.residuals.to(model.device)
            moment = moments[layer]
            spent, change = _timed(model, plain.update, keys, residuals, moment, settings)
            seconds["solve"] += spent / len(some)
            thin = residuals @ stored.factor.to(model.device)
            errors["solve"] = max(errors["solve"], float((change - thin).norm() / change.norm()))
            spent, _ = _timed(model, write, layer, change)
            seconds["write"] += spent / len(some)
    return seconds, errors


def _flops(
    model: Model, settings: Settings, moments: Mapping[int, Moment], some: Sequence[Request]
) -> dict[str, tuple[float, float]]:
    """FLOPs an edit by phase on the plain path and in the engine."""
    layers, last = settings.layers, settings.layers[-1]
    part = some[:: max(1, len(some) // COUNTED)][:COUNTED]
    one = min(part, key=lambda r: abs(len(r.prompt) - sorted(len(x.prompt) for x in part)[len(part) // 2]))

    def staged() -> None:
        places = Staged(model, part, CONTEXTS, last, silent)
        for layer in layers:
            places.stage(layer)
            places.written(layer)

    targets = _counted(lambda: optimise(model, last, groups(part), CONTEXTS, settings.target, emit=silent)) / len(part)
    keys = _counted(staged) / len(part)
    slow_target = _counted(lambda: plain.target(model, last, one, CONTEXTS, settings))
    twice = 2 * _counted(lambda: plain.key(model, last, one, CONTEXTS))
    slow_keys = len(layers) * (twice + _counted(lambda: plain.state(model, last, one)))
    n, (d, width) = len(some), model.blocks[last].weight.shape
    rank = sum(moments[layer].null_rank(settings.null_space) for layer in layers) if settings.null_space else 0
    # Twice through the thinner side of the projector, then n equations; against P·(KKᵀ), LU and n columns of d_k.
    thin = sum(4 * min(r, width - r) * width * n for r in [rank // len(layers)] * len(layers))
    solve = (thin + len(layers) * (4 * width * n * n + n**3 / 3)) / n
    slow_solve = len(layers) * (2 * width**3 + 2 * width**2 * n + 2 / 3 * width**3 + 2 * width**2 * d) / n
    found = {"target": (slow_target, targets), "keys": (slow_keys, keys), "solve": (slow_solve, solve)}
    found["all"] = (sum(a for a, _ in found.values()), sum(b for _, b in found.values()))
    return found
