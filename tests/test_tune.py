"""Fine-tuning: its gradient is autograd's, its steps are Adam's, its bounds hold, and the model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine import methods
from editctl.engine import tune as room
from editctl.engine.methods import METHODS, NullSpace, Tune
from editctl.engine.model import Model
from editctl.engine.prompts import Request, row
from editctl.engine.solve import Projector
from editctl.engine.statistics import Moment
from editctl.engine.tune import _slope, _worn, rows_of, tune
from editctl.engine.writing import Job
from editctl.errors import InvalidInput
from editctl.events import Emit, Event, Note, TargetStep, silent

LAYER = 2
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "the city of Oslo"),
    Request("the", "{} is", "The", "a"),
)
"""Prompts and targets of different lengths."""
SETTINGS = Tune(epochs=6, tune_rate=0.02, tune_stop=0.0)
OBJECTIVES = ("target", "last")
ROWS = {
    name: replace(
        method.tune,
        epochs=4,
        box=2.5 * method.tune.tune_rate if method.tune.box else 0.0,
        minibatch=2 if method.tune.minibatch else 0,
    )
    for name, method in METHODS.items()
    if method.tune is not None and not method.tune.rank
}
"""What fine-tuning rows run with, in a box that four steps reach and with several minibatches where there are any."""


def slope(model: Model, requests: Sequence[Request], objective: str) -> tuple[list[float], Tensor]:
    return _slope(model, LAYER, [row(model, request, "") for request in requests], objective)


def loss_of(model: Model, request: Request, objective: str, *, ending: bool = False) -> Tensor:
    """Nats a token by the book: one text, no padding, no hook; `last` reads every token from the prompt's end."""
    prompt = model.encode(request.prompt)
    whole = model.encode(f"{request.prompt} {request.target}") + [model.tokenizer.eos_token_id] * ending
    target = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt and target
    if objective == "target":
        said = model.net(torch.tensor([whole]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    else:
        said = model.net(torch.tensor([prompt]), use_cache=False).logits[0, -1:].repeat(len(target), 1)
    return functional.cross_entropy(said, torch.tensor(target))


def autograd(
    model: Model, requests: Sequence[Request], objective: str, *, ending: bool = False
) -> tuple[list[float], Tensor]:
    """Losses, and torch's gradient of their sum for the weight itself, out × in."""
    block = model.blocks[LAYER]
    parameter: Any = block.down.weight
    parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            losses = [loss_of(model, request, objective, ending=ending) for request in requests]
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), parameter)
    finally:
        parameter.requires_grad_(False)
    return [float(loss.detach()) for loss in losses], gradient.T if block.transposed else gradient


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def run(
    model: Model, settings: Tune = SETTINGS, *, projector: Projector | None = None, emit: Emit = silent, seed: int = 0
) -> tuple[Tensor, list[float]]:
    """The update, and the mean loss of every pass."""
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, TargetStep):
            assert event.step == len(losses)
            losses.append(event.loss)
        emit(event)

    return tune(model, LAYER, REQUESTS, settings, projector=projector, emit=note, batch=1, seed=seed), losses


def size(model: Model) -> float:
    """Root mean square of the weight."""
    return float(model.blocks[LAYER].weight.double().pow(2).mean().sqrt())


def a_projector(model: Model) -> Projector:
    """The null space of a made-up moment of the layer's keys: half of all directions."""
    width = model.blocks[LAYER].weight.shape[1]
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3))).Q
    moment = Moment(basis, torch.logspace(-4, 1, width, dtype=torch.float64), seen=1000)
    return Projector(moment, NullSpace("quantile", 0.5), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_that_of_a_trainable_weight(precise: Model, objective: str) -> None:
    """Losses and gradient equal torch's own for a Linear and for a Conv1D; the other objective's, or those without one
    request, do not."""
    losses, gradient = slope(precise, REQUESTS, objective)
    expected, wanted = autograd(precise, REQUESTS, objective)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert gradient.shape == precise.blocks[LAYER].weight.shape and gradient.dtype == torch.float32
    assert off(gradient, wanted) < 1e-6
    other = next(name for name in OBJECTIVES if name != objective)
    assert off(gradient, autograd(precise, REQUESTS, other)[1]) > 0.1
    assert off(gradient, autograd(precise, REQUESTS[1:], objective)[1]) > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_how_many_passes_the_gradient_is_taken_does_not_matter(precise: Model, objective: str) -> None:
    """Rows padded together, two by two and alone add up to the same; with one pass missing they do not."""
    losses, gradient = slope(precise, REQUESTS, objective)
    for chunk in (1, 2):
        parts = [slope(precise, REQUESTS[start : start + chunk], objective) for start in range(0, len(REQUESTS), chunk)]
        assert [loss for part, _ in parts for loss in part] == pytest.approx(losses, rel=1e-6)
        total = torch.stack([part for _, part in parts]).sum(0)
        assert off(total, gradient) < 1e-6 < 1e-2 < off(total - parts[-1][1], gradient)


def test_chunks_change_neither_losses_nor_update(precise: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when memory runs out half way and the pass is repeated with fewer rows; a lost row would show."""
    settings = replace(SETTINGS, epochs=1)
    update, losses = run(precise, settings)
    for chunk in (1, 2):
        monkeypatch.setattr(room, "CHUNK", chunk)
        again, found = run(precise, settings)
        assert found == pytest.approx(losses, rel=1e-5) and off(again, update) < 1e-4
    monkeypatch.undo()
    notes: list[Event] = []

    def narrow(model: Model, layer: int, rows: Sequence[Any], objective: str) -> tuple[list[float], Tensor]:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _slope(model, layer, rows, objective)

    monkeypatch.setattr(room, "_slope", narrow)
    again, found = run(precise, settings, emit=lambda event: notes.append(event) if isinstance(event, Note) else None)
    assert found == pytest.approx(losses, rel=1e-5) and off(again, update) < 1e-4 and notes

    def lossy(model: Model, layer: int, rows: Sequence[Any], objective: str) -> tuple[list[float], Tensor]:
        losses, gradient = _slope(model, layer, rows, objective)
        return losses, gradient - _slope(model, layer, rows[-1:], objective)[1]

    monkeypatch.setattr(room, "_slope", lossy)
    assert off(run(precise, settings)[0], update) > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# The steps


def drawn(settings: Tune, generator: torch.Generator) -> list[tuple[Request, ...]]:
    """The requests of each step of a pass."""
    if not settings.minibatch:
        return [REQUESTS]
    order = torch.randperm(len(REQUESTS), generator=generator)
    return [tuple(REQUESTS[i] for i in part) for part in order.split(settings.minibatch)]


def by_torch(model: Model, settings: Tune, projector: Projector | None = None, seed: int = 0) -> Tensor:
    """The update by torch's own Adam and the naive gradient, float64, bounded and projected after every step."""
    block = model.blocks[LAYER]
    start = block.weight.detach().double().clone()
    bound, change = settings.box * size(model), torch.zeros_like(start).requires_grad_(True)
    optimiser = torch.optim.Adam([change], lr=settings.tune_rate * size(model))
    generator = torch.Generator().manual_seed(seed)
    for part in (part for _ in range(settings.epochs) for part in drawn(settings, generator)):
        with _worn(block.weight, start + change.detach()):
            losses, gradient = autograd(model, part, settings.objective, ending=settings.ending)
        if sum(losses) / len(part) < settings.tune_stop:
            continue
        change.grad = gradient / len(part)
        optimiser.step()
        with torch.no_grad():
            if settings.box:
                change.clamp_(-bound, bound)
            if projector is not None:
                change.copy_(projector(change))
    return change.detach()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_adam_on_the_mean_loss(precise: Model, name: str) -> None:
    """The steps are those of torch's Adam with a rate relative to the weight; with another rate they are not."""
    settings = ROWS[name]
    update, _ = run(precise, settings)
    assert update.dtype == torch.float32 and update.device.type == "cpu"
    assert off(update, by_torch(precise, settings)) < 1e-3
    rate = replace(settings, tune_rate=1.02 * settings.tune_rate)
    objective = replace(settings, objective="last" if settings.objective == "target" else "target")
    for other in (rate, objective):
        assert off(update, by_torch(precise, other)) > 1e-3


def test_the_loss_told_is_that_of_the_weight_with_the_update(precise: Model) -> None:
    """Before the first step it is the model's own, after the last that with the whole update written."""
    update, losses = run(precise)
    block = precise.blocks[LAYER]

    def mean() -> float:
        return sum(float(loss_of(precise, request, "target")) for request in REQUESTS) / len(REQUESTS)

    assert losses[0] == pytest.approx(mean(), rel=1e-5)
    with _worn(block.weight, block.weight.double() + update.double()):
        assert losses[-1] == pytest.approx(mean(), rel=1e-5)
    assert losses[-1] != pytest.approx(mean(), rel=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls(model: Model, objective: str) -> None:
    """By more than a third in twelve steps; with a rate of zero it stays."""
    settings = replace(SETTINGS, epochs=12, tune_rate=0.05, objective=objective)
    _, losses = run(model, settings)
    assert len(losses) == 13 and losses[-1] < 0.67 * losses[0]
    update, still = run(model, replace(settings, tune_rate=0.0))
    assert not update.any() and still[-1] == still[0]


def test_the_two_objectives_ask_for_different_things(model: Model) -> None:
    """They agree for a target of one token, said from the prompt's end, and differ for longer ones."""
    one = [r for r in REQUESTS if len(row(model, r, "").target) == 1]
    more = [r for r in REQUESTS if r not in one]
    assert one and more
    for requests, same in ((one, True), (more, False)):
        (bag, first), (spoken, second) = (slope(model, requests, objective) for objective in ("last", "target"))
        assert (bag == pytest.approx(spoken, rel=1e-4)) == same
        assert (off(first, second) < 1e-4) == same


# ---------------------------------------------------------------------------------------------------------------------
# Minibatches and ends


@pytest.mark.parametrize(("objective", "ending"), [("target", True), ("last", False)])
def test_minibatches_are_steps_drawn_anew_in_every_pass(precise: Model, objective: str, ending: bool) -> None:
    """Three steps a pass, in an order that the seed alone decides; the same order in every pass is another update."""
    settings = replace(SETTINGS, epochs=2, minibatch=2, objective=objective, ending=ending)
    update, losses = run(precise, settings)
    assert len(losses) == 3
    assert off(update, by_torch(precise, settings)) < 1e-3
    assert torch.equal(update, run(precise, settings)[0])
    other = run(precise, settings, seed=1)[0]
    assert off(other, by_torch(precise, settings, seed=1)) < 1e-3 < 1e-2 < off(other, update)
    once = replace(settings, epochs=1)
    assert off(run(precise, replace(once, minibatch=0))[0], run(precise, once)[0]) > 0.1
    assert off(update, by_torch(precise, replace(settings, ending=not ending))) > 1e-2


def test_the_loss_of_a_pass_is_that_of_its_rows_when_they_were_read(precise: Model) -> None:
    """The first minibatch's on the weights as they were, the last on those that the others moved; the pass after the
    last moves nothing."""
    settings = replace(SETTINGS, epochs=1, minibatch=2)
    parts = drawn(settings, torch.Generator().manual_seed(0))
    update, losses = run(precise, settings)
    block = precise.blocks[LAYER]

    def mean(requests: Sequence[Request]) -> float:
        return sum(float(loss_of(precise, request, "target")) for request in requests) / len(requests)

    assert losses[0] != pytest.approx(mean(REQUESTS), rel=1e-4)
    read: list[float] = []

    def watched(model: Model, layer: int, rows: Sequence[Any], objective: str) -> tuple[list[float], Tensor]:
        found, gradient = _slope(model, layer, rows, objective)
        read.extend(found)
        return found, gradient

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_slope", watched)
        run(precise, settings)
    assert sum(read[:2]) / 2 == pytest.approx(mean(parts[0]), rel=1e-5)
    assert losses == pytest.approx([sum(read[:5]) / 5, sum(read[5:]) / 5], rel=1e-6)
    with _worn(block.weight, block.weight.double() + update.double()):
        assert losses[1] == pytest.approx(mean(REQUESTS), rel=1e-5)


def test_a_minibatch_that_is_said_already_is_no_step(precise: Model) -> None:
    """A bound between the losses of a pass leaves out the steps below it; one above them all makes none."""
    settings = replace(SETTINGS, epochs=1, minibatch=1)
    bound = sorted(float(loss_of(precise, request, "target")) for request in REQUESTS)[2]
    update = run(precise, replace(settings, tune_stop=bound))[0]
    assert off(update, by_torch(precise, replace(settings, tune_stop=bound))) < 1e-3
    assert off(update, by_torch(precise, settings)) > 0.1
    assert not run(precise, replace(settings, tune_stop=1e9))[0].any()


def test_with_an_ending_the_text_ends_behind_the_target(model: Model) -> None:
    """The end of the text becomes likely there, more than e² times as likely as without an ending."""
    end = model.tokenizer.eos_token_id
    rows = rows_of(model, REQUESTS, replace(SETTINGS, ending=True))
    plain = rows_of(model, REQUESTS, SETTINGS)
    assert [one.ids for one in rows] == [(*one.ids, end) for one in plain]
    assert [(one.answer, one.lookup) for one in rows] == [(one.answer, one.lookup) for one in plain]

    def ends(update: Tensor) -> float:
        """Mean log-probability of the end behind the target."""
        block = model.blocks[LAYER]
        with _worn(block.weight, block.weight + update):
            said = [model.net(torch.tensor([one.ids])).logits[0, -1].log_softmax(-1)[end] for one in plain]
        return float(torch.stack(said).mean())

    settings = replace(SETTINGS, epochs=12, tune_rate=0.05)
    assert ends(run(model, replace(settings, ending=True))[0]) > ends(run(model, settings)[0]) + 2


def test_a_tokenizer_without_an_end_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where an ending is asked for."""
    endless = copy.deepcopy(model.tokenizer)
    endless.eos_token = None
    monkeypatch.setattr(model, "tokenizer", endless)
    assert rows_of(model, REQUESTS, SETTINGS)
    with pytest.raises(InvalidInput, match="no token that ends a text"):
        rows_of(model, REQUESTS, replace(SETTINGS, ending=True))


def test_the_seed_of_a_run_is_that_of_its_minibatches(model: Model) -> None:
    """What a job says goes into the steps; another seed, or another block, is another update."""
    made = methods.settings({"num_hidden_layers": 4}, "locft-bf", {"minibatch": 2, "epochs": 1, "layers": [LAYER]})

    def write(seed: int) -> Tensor:
        job = Job(
            model=model,
            requests=REQUESTS,
            settings=replace(made, seed=seed),
            number=1,
            emit=silent,
            library=Path(),
            projector=lambda layer: None,
        )
        (update,) = room.write(job).updates.values()
        assert isinstance(update, Tensor)
        return update

    assert made.tune is not None and made.tune.ending
    assert torch.equal(write(5), run(model, made.tune, seed=5)[0]) and not torch.equal(write(5), write(6))


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize("box", [0.005, 0.05])
def test_no_entry_changes_by_more_than_the_box(model: Model, box: float) -> None:
    """‖D‖_∞ ≤ ε · rms(W), reached by some entries; unbounded the same steps go further."""
    settings = replace(SETTINGS, box=box)
    update, _ = run(model, settings)
    bound = box * size(model)
    assert float(update.abs().max()) == pytest.approx(bound, rel=1e-5)
    assert float((update.abs() > 0.999 * bound).float().mean()) > 0.1
    assert float(run(model)[0].abs().max()) > 1.5 * bound


def outside(update: Tensor, projector: Projector) -> float:
    """‖D (I − P)‖ / ‖D‖."""
    return float((update - projector(update)).norm() / update.norm())


@pytest.mark.parametrize("name", ROWS)
def test_every_row_keeps_to_a_null_space(model: Model, name: str) -> None:
    """‖D (I − P)‖ / ‖D‖ < 1e-5 and the loss still falls; without a projector the update is not in it."""
    settings, projector = ROWS[name], a_projector(model)
    update, losses = run(model, settings, projector=projector)
    assert outside(update, projector) < 1e-5 < 0.1 < outside(run(model, settings)[0], projector)
    assert losses[-1] < losses[0]


def test_every_step_is_projected_not_the_sum(precise: Model) -> None:
    """Gradients are taken where the projected weight is; projecting once at the end is another update."""
    projector = a_projector(precise)
    update, _ = run(precise, projector=projector)
    assert off(update, by_torch(precise, SETTINGS, projector)) < 1e-3
    assert off(update, projector(by_torch(precise, SETTINGS))) > 1e-2


def test_the_box_holds_in_a_null_space_too(model: Model) -> None:
    """Both at once, though projection alone carries entries out of the box again."""
    projector, box = a_projector(model), 0.005
    update, losses = run(model, replace(SETTINGS, box=box), projector=projector)
    bound = box * size(model)
    assert 0.9 * bound < float(update.abs().max()) <= bound * (1 + 1e-5)
    assert outside(update, projector) < 1e-5 and losses[-1] < losses[0]
    clamped = run(model, replace(SETTINGS, box=box))[0]
    assert float(projector(clamped).abs().max()) > 1.1 * bound, "control: what the projection alone would leave"


# ---------------------------------------------------------------------------------------------------------------------
# When it stops


def test_it_stops_at_the_first_loss_below_the_bound(model: Model) -> None:
    """Whatever the number of epochs; the update is that of as many steps as were made."""
    settings = replace(SETTINGS, epochs=12, tune_rate=0.05)
    _, losses = run(model, settings)
    assert losses[4] < min(losses[:4])
    update, found = run(model, replace(settings, tune_stop=losses[4] * (1 + 1e-6)))
    assert found == losses[:5]
    assert torch.equal(update, run(model, replace(settings, epochs=4))[0])
    assert not torch.equal(update, run(model, replace(settings, epochs=5))[0])


def test_what_is_said_already_is_not_tuned(model: Model) -> None:
    """A loss below the bound from the start changes nothing; just above it, one step is made."""
    first = run(model, replace(SETTINGS, epochs=1))[1][0]
    update, losses = run(model, replace(SETTINGS, tune_stop=first * (1 + 1e-6)))
    assert not update.any() and len(losses) == 1
    assert run(model, replace(SETTINGS, tune_stop=first * (1 - 1e-6)))[0].any()


@pytest.mark.parametrize("epochs", [1, 3])
def test_it_makes_at_most_so_many_steps(model: Model, epochs: int) -> None:
    """The loss is told once more than steps are made."""
    update, losses = run(model, replace(SETTINGS, epochs=epochs))
    assert len(losses) == epochs + 1 and update.any()


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind


def hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.net.modules())


def assert_untouched(model: Model, work: Callable[[], object]) -> None:
    before, count = model.weights_hash(), hooks(model)
    work()
    assert model.weights_hash() == before and hooks(model) == count
    assert not any(parameter.requires_grad for parameter in model.net.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(loaded: Callable[..., Model], kind: str, dtype: str) -> None:
    """Weights bit for bit, hooks and frozen parameters, in bf16 too; a weight that changed is noticed."""
    model = loaded(kind, dtype)
    assert_untouched(model, lambda: run(model))
    weight = model.blocks[LAYER].weight
    before = weight.clone()
    with pytest.raises(AssertionError):
        assert_untouched(model, lambda: weight[0, 0].add_(1))
    weight.copy_(before)


@pytest.mark.parametrize("where", ["between steps", "in a pass", "on the way back"])
def test_a_failure_leaves_the_model_as_it_was(model: Model, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it comes from an event, from the model or from autograd, at a step where the weight is another one."""
    calls = 0

    def failing(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        assert where == "between steps" or calls < 3 or not torch.equal(model.blocks[LAYER].weight, plain)
        if calls == 3:
            raise KeyboardInterrupt

    def broken(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            failing()
            return work(*args, **kwargs)

        return wrapped

    plain = model.blocks[LAYER].weight.clone()
    if where == "in a pass":
        monkeypatch.setattr(model.net, "forward", broken(model.net.forward))
    elif where == "on the way back":
        monkeypatch.setattr(torch.autograd, "grad", broken(torch.autograd.grad))

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            run(model, emit=failing if where == "between steps" else silent)
        assert calls == 3

    assert_untouched(model, work)
