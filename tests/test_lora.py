"""LoRA: its factors are what peft trained and would merge, and nothing of peft stays in the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tune import REQUESTS, a_projector, loss_of, off
from torch import Tensor

from editctl.engine import lora as room
from editctl.engine.methods import METHODS, Settings, Tune, settings
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.solve import Projector
from editctl.engine.writing import Job
from editctl.errors import InvalidInput, ModelError
from editctl.events import Emit, Event, Note, TargetStep, silent

LAYERS = (1, 2)
TUNE = Tune(epochs=4, tune_rate=0.05, tune_stop=0.0, rank=3)


def job(
    model: Model,
    tuned: Tune = TUNE,
    *,
    requests: Sequence[Request] = REQUESTS,
    projector: Projector | None = None,
    emit: Emit = silent,
    seed: int = 0,
    earlier: Sequence[dict[str, object]] = (),
) -> Job:
    made: Settings = settings({"num_hidden_layers": 4}, "lora", {"layers": list(LAYERS)})
    return Job(
        model=model,
        requests=requests,
        settings=replace(made, tune=tuned, seed=seed),
        number=1,
        emit=emit,
        library=Path(),
        projector=lambda layer: projector,
        earlier=earlier,
    )


def updates(model: Model, tuned: Tune = TUNE, **more: Any) -> dict[int, tuple[Tensor, Tensor]]:
    written = room.write(job(model, tuned, **more)).updates
    assert list(written) == list(LAYERS)
    return written  # type: ignore[return-value]


def whole(pairs: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([left @ right for left, right in pairs.values()])


def losses(model: Model, tuned: Tune = TUNE, **more: Any) -> list[float]:
    told: list[Event] = []
    updates(model, tuned, emit=told.append, **more)
    steps = [event for event in told if isinstance(event, TargetStep)]
    assert [event.step for event in steps] == list(range(len(steps)))
    return [event.loss for event in steps]


def worn(model: Model, pairs: dict[int, tuple[Tensor, Tensor]], objective: str = "target") -> float:
    """The mean loss with the updates in the weights."""
    before = {layer: model.blocks[layer].weight.clone() for layer in pairs}
    for layer, (left, right) in pairs.items():
        model.blocks[layer].weight.copy_(before[layer] + (left @ right).to(before[layer]))
    try:
        return sum(float(loss_of(model, request, objective)) for request in REQUESTS) / len(REQUESTS)
    finally:
        for layer, weight in before.items():
            model.blocks[layer].weight.copy_(weight)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def test_the_factors_are_what_peft_merges(precise: Model) -> None:
    """B·scale times A is peft's own merged weight less the base, for a Linear and for a Conv1D; transposed or scaled
    otherwise it is not."""
    merged: dict[int, Tensor] = {}

    def last_word(model: Model) -> None:
        for layer in LAYERS:
            adapter: Any = model.net.get_submodule(model.blocks[layer].down_name)
            delta = adapter.get_delta_weight(room.NAME).detach()
            merged[layer] = delta.T.clone() if model.blocks[layer].transposed else delta.clone()

    found = updates(precise, emit=lambda event: last_word(precise) if isinstance(event, TargetStep) else None)
    for layer, (left, right) in found.items():
        assert (left @ right).shape == precise.blocks[layer].weight.shape
        assert off(left @ right, merged[layer]) < 1e-6
        assert off(2 * left @ right, merged[layer]) > 0.1


def test_the_update_has_the_rank_that_is_asked_for(model: Model) -> None:
    """Thin factors, fp32 on the CPU, of exactly that rank, at every block; a larger rank has more."""
    for rank in (1, 3):
        for layer, (left, right) in updates(model, replace(TUNE, rank=rank)).items():
            rows, columns = model.blocks[layer].weight.shape
            assert left.shape == (rows, rank) and right.shape == (rank, columns)
            assert {left.dtype, right.dtype} == {torch.float32} and left.device.type == right.device.type == "cpu"
            assert torch.linalg.matrix_rank(left @ right) == rank


def by_torch(model: Model, tuned: Tune, seed: int = 0) -> Tensor:
    """The updates by torch's Adam on adapters made by hand, each loss from one text without padding."""
    generator = torch.Generator().manual_seed(seed)
    groups: list[dict[str, Any]] = []
    pairs = []
    for layer in LAYERS:
        weight = model.blocks[layer].weight
        # As peft's: two linear maps are made with torch's own start, then the first is drawn again.
        d_out, d_in = weight.shape
        bounds = [d_in**-0.5, tuned.rank**-0.5, d_in**-0.5]
        shapes = [(tuned.rank, d_in), (d_out, tuned.rank), (tuned.rank, d_in)]
        drawn = [torch.empty(s).uniform_(-b, b, generator=generator) for s, b in zip(shapes, bounds, strict=True)]
        a = drawn[-1].to(weight.dtype).requires_grad_()
        b = torch.zeros(d_out, tuned.rank, dtype=weight.dtype).requires_grad_()
        size, start = weight.pow(2).mean().sqrt(), a.detach().pow(2).mean().sqrt()
        groups += [
            {"params": [a], "lr": float(tuned.tune_rate * start)},
            {"params": [b], "lr": float(tuned.tune_rate * size / (start * tuned.rank**0.5))},
        ]
        pairs.append((a, b))
    optimiser = torch.optim.Adam(groups)

    def adding(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda _module, args, output: output + args[0] @ a.T @ b.T

    hooks: Any = [
        (model.blocks[layer].down, "output", adding(*pair)) for layer, pair in zip(LAYERS, pairs, strict=True)
    ]
    for _ in range(tuned.epochs):
        with model.hooked(hooks), torch.enable_grad():
            optimiser.zero_grad()
            torch.stack([loss_of(model, request, tuned.objective) for request in REQUESTS]).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return torch.stack([(b @ a).detach() for a, b in pairs])


@pytest.mark.parametrize("objective", ["target", "last"])
def test_the_steps_are_adams_on_the_mean_loss(precise: Model, objective: str) -> None:
    """As adapters made by hand are trained, each matrix at its own rate; with another rate, objective or seed not."""
    tuned = replace(TUNE, objective=objective)
    found = whole(updates(precise, tuned))
    assert off(found, by_torch(precise, tuned)) < 1e-3
    for other in (
        replace(tuned, tune_rate=0.052),
        replace(TUNE, objective={"target": "last", "last": "target"}[objective]),
    ):
        assert off(found, by_torch(precise, other)) > 5e-3
    assert off(found, by_torch(precise, tuned, seed=1)) > 0.1


def test_the_targets_become_likely(model: Model) -> None:
    """The loss told falls by a third and is that of the weights with the update; at a rate of zero both stay."""
    tuned = replace(TUNE, epochs=12, tune_rate=0.1)
    told = losses(model, tuned)
    assert len(told) == 13 and told[-1] < 0.67 * told[0]
    assert worn(model, updates(model, tuned)) == pytest.approx(told[-1], rel=1e-3)
    still = losses(model, replace(tuned, tune_rate=0.0))
    assert still[-1] == still[0] == pytest.approx(told[0], rel=1e-6)
    assert not whole(updates(model, replace(tuned, tune_rate=0.0))).any()


def test_it_stops_when_the_targets_are_said(model: Model) -> None:
    """At the first loss below the bound, whatever the number of passes."""
    tuned = replace(TUNE, epochs=12, tune_rate=0.1)
    told = losses(model, tuned)
    assert told[3] < min(told[:3])
    assert losses(model, replace(tuned, tune_stop=told[3] * (1 + 1e-6))) == told[:4]


def test_minibatches_and_ends_are_those_of_fine_tuning(model: Model) -> None:
    """A pass of minibatches takes as many steps as there are; the end of the text is asked for behind the target."""
    counted: list[int] = []
    original = room.losses_of

    def counting(model: Model, rows: Sequence[Any], objective: str) -> list[Tensor]:
        counted.append(len(rows))
        assert all(one.target[-1] == model.tokenizer.eos_token_id for one in rows)
        return original(model, rows, objective)

    room.losses_of = counting
    try:
        small = updates(model, replace(TUNE, epochs=1, minibatch=2, ending=True))
    finally:
        room.losses_of = original
    assert counted == [2, 2, 1] * 2
    assert off(whole(small), whole(updates(model, replace(TUNE, epochs=1, ending=True)))) > 0.1


def test_chunks_do_not_matter(precise: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when memory runs out half way; gradients of a lost chunk would show."""
    tuned = replace(TUNE, epochs=1)
    found = whole(updates(precise, tuned))
    monkeypatch.setattr(room, "CHUNK", 2)
    assert off(whole(updates(precise, tuned)), found) < 1e-5
    monkeypatch.undo()
    notes: list[Event] = []
    original = room.losses_of

    def narrow(model: Model, rows: Sequence[Any], objective: str) -> list[Tensor]:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, rows, objective)

    monkeypatch.setattr(room, "losses_of", narrow)
    again = updates(precise, tuned, emit=lambda event: notes.append(event) if isinstance(event, Note) else None)
    assert off(whole(again), found) < 1e-5 and notes
    assert off(whole(updates(precise, tuned, requests=REQUESTS[:-1])), found) > 0.01


def test_the_finished_update_is_in_the_null_space(model: Model) -> None:
    """A is projected and B is not another: ‖D (I − P)‖ / ‖D‖ < 1e-5, where the update was elsewhere too."""
    projector, free = a_projector(model), updates(model)
    for layer, (left, right) in updates(model, projector=projector).items():
        assert torch.equal(left, free[layer][0])
        update, before = left @ right, free[layer][0] @ free[layer][1]
        assert off(projector(update), update) < 1e-5 < 0.1 < off(projector(before), before)
        assert off(update, projector(before)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Chance


def test_the_same_bits_come_again_and_nobodys_chance_changes(model: Model) -> None:
    """By the seed and the number of batches before; the caller's random numbers go on as if nothing had been."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = updates(model)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    again = updates(model)
    assert all(torch.equal(x, y) for layer in LAYERS for x, y in zip(first[layer], again[layer], strict=True))
    assert off(whole(updates(model, seed=1)), whole(first)) > 0.1
    assert off(whole(updates(model, earlier=[{}])), whole(first)) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind


def state(model: Model) -> dict[str, Any]:
    """Everything of the model that peft touches."""
    modules = dict(model.net.named_modules())
    return {
        "weights": model.weights_hash(),
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.net.named_parameters()],
        "modules": [(name, id(m), type(m), m.training) for name, m in modules.items()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules.values()],
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "downs": [id(block.down) for block in model.blocks],
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(loaded: Callable[..., Model], kind: str, dtype: str) -> None:
    """Modules, parameters, attributes and bits; while it is trained the block's map is another, in fp32."""
    model = loaded(kind, dtype)
    before, kinds = state(model), set()

    def look(event: Event) -> None:
        if isinstance(event, TargetStep):
            during: Any = model.net.get_submodule(model.blocks[LAYERS[0]].down_name)
            assert state(model) != before and during.base_layer is model.blocks[LAYERS[0]].down
            kinds.update(p.dtype for p in during.parameters() if p.requires_grad)

    found = updates(model, emit=look)
    assert state(model) == before and kinds == {torch.float32}
    assert all(left.any() and left.dtype == torch.float32 for left, _ in found.values())


@pytest.mark.parametrize("where", ["event", "pass", "gradient", "peft"])
def test_a_failure_leaves_the_model_as_it_was(model: Model, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes from, after the first step."""
    before, calls = state(model), 0

    def failing(*args: Any, **_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    def broken(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: (failing(), work(*args, **more))[1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "pass":
            patch.setattr(room, "losses_of", broken(room.losses_of))
        elif where == "gradient":
            patch.setattr(torch.autograd, "grad", broken(torch.autograd.grad))
        elif where == "peft":
            patch.setattr(room, "_put", broken(room._put))
            calls = 0
        updates(model, emit=failing if where == "event" else silent)
    assert calls >= 2 and state(model) == before


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be done


def test_without_peft_it_says_how_to_get_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model is left alone."""
    before = state(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InvalidInput, match="lora needs peft") as error:
        updates(model)
    assert "pip install" in error.value.hint and state(model) == before


def test_a_map_that_peft_does_not_know_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With peft's reason in one line, not its traceback."""

    class Other(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = weight

    block = model.blocks[1]
    odd = replace(block, down=Other(block.weight))
    monkeypatch.setattr(model, "blocks", (model.blocks[0], odd, *model.blocks[2:]))
    with pytest.raises(ModelError, match="peft cannot adapt") as error:
        updates(model)
    assert "\n" not in error.value.message


def test_a_bound_on_entries_is_refused(model: Model) -> None:
    """An adapter has no entries to bound."""
    with pytest.raises(InvalidInput, match="cannot bound"):
        updates(model, replace(TUNE, box=0.5))


def test_the_row_of_the_table_is_an_adapters() -> None:
    """Its rank is not zero, so it is thin and peft can hold it; fine-tuning of the matrix is neither."""
    method = METHODS["lora"]
    assert method.tune is not None and method.tune.rank > 0
    assert method.update == "thin" and "peft" in method.exports
    assert METHODS["ft-m"].update == "dense" and "peft" not in METHODS["ft-m"].exports
