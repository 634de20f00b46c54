"""UltraEdit: inputs and gradients are autograd's, the statistics those of all tokens so far, the update the ridge's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tune import REQUESTS, a_projector, hooks, off
from torch import Tensor
from torch.nn import functional

from editctl.engine import ultra as room
from editctl.engine.methods import METHODS, Normalised, settings
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.solve import Projector
from editctl.engine.ultra import Seen, _solved
from editctl.engine.writing import Job, Written
from editctl.errors import InvalidInput, StoreError
from editctl.events import Emit, Event, Note, TargetStep, silent

LAYERS = (1, 2)
OWN = Normalised(ultra_rate=0.4, ultra_ridge=0.7)


def write(
    model: Model,
    requests: Sequence[Request] = REQUESTS,
    own: Normalised = OWN,
    *,
    projector: Projector | None = None,
    emit: Emit = silent,
    earlier: Sequence[Mapping[str, object]] = (),
) -> Written:
    made = settings({"num_hidden_layers": 4}, "ultraedit", {"layers": list(LAYERS)})
    return room.write(
        Job(
            model=model,
            requests=requests,
            settings=replace(made, own=own),
            number=1,
            emit=emit,
            library=Path(),
            projector=lambda layer: projector,
            earlier=earlier,
        )
    )


def whole(written: Written) -> Tensor:
    assert list(written.updates) == list(LAYERS)
    return torch.stack([left @ right for left, right in written.updates.values()])


def by_the_book(
    model: Model, turns: Sequence[Sequence[Request]], own: Normalised = OWN, *, common: bool = False
) -> Tensor:
    """The update of the last turn, in float64: one text at a time without padding, gradients of a trainable bias at
    every position, statistics of all tokens of all turns at once, and the ridge as it stands in the paper.

    Args:
        common: whether the blocks share their statistics.
    """
    blocks = [model.blocks[layer] for layer in LAYERS]
    kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for turn, requests in enumerate(turns):
        for request in requests:
            prompt, text = model.encode(request.prompt), model.encode(f"{request.prompt} {request.target}")
            seen: list[tuple[Tensor, Tensor, Tensor]] = []

            def hook(_module: object, args: tuple[Tensor, ...], output: Tensor, seen: Any = seen) -> Tensor:
                bias = torch.zeros_like(output, requires_grad=True)
                seen.append((args[0].detach()[0], bias, output.detach()[0]))
                return output + bias

            with model.hooked([(block.down, "output", hook) for block in blocks]), torch.enable_grad():
                logits = model.net(torch.tensor([text]), use_cache=False).logits[0, len(prompt) - 1 : -1]
                loss = functional.cross_entropy(logits, torch.tensor(text[len(prompt) :]), reduction="sum")
                slopes = torch.autograd.grad(loss, [bias for _, bias, _ in seen])
            kept.setdefault(turn, []).extend(
                (h[:-1].double(), g[0, :-1].double(), o[:-1].double())
                for (h, _, o), g in zip(seen, slopes, strict=True)
            )
    n, updates = len(blocks), []
    for i in range(n):
        sides = [[torch.cat([one[side] for one in rows[i::n]]) for side in range(3)] for rows in kept.values()]
        h, g, output = sides[-1]
        every = [torch.cat(one[:2], 1) for rows in kept.values() for one in (rows if common else rows[i::n])]
        features = torch.cat(every)
        hat = (torch.cat([h, g], 1) - features.mean(0)) / features.std(0)
        h_hat, g_hat = hat[:, : h.shape[1]], hat[:, h.shape[1] :]
        size = output.pow(2).mean().sqrt()
        v = -own.ultra_rate * size * h_hat.pow(2).mean(1, keepdim=True) * g_hat
        rho = own.ultra_ridge * h.pow(2).sum(1).mean()
        updates.append(torch.linalg.solve(h.T @ h + rho * torch.eye(h.shape[1]), h.T @ v).T)
    return torch.stack(updates)


# ---------------------------------------------------------------------------------------------------------------------
# The update


def test_it_is_the_ridge_of_normalised_gradients(precise: Model) -> None:
    """Equal to a transcription of the paper's equations, for a Linear and a Conv1D; with another rate, ridge, one edit
    less or statistics that the blocks share it is not."""
    found = whole(write(precise))
    wanted = by_the_book(precise, [REQUESTS])
    assert off(found, wanted) < 1e-5
    assert off(found, by_the_book(precise, [REQUESTS], replace(OWN, ultra_rate=0.41))) > 0.01
    assert off(found, by_the_book(precise, [REQUESTS], replace(OWN, ultra_ridge=0.72))) > 1e-3
    assert off(found, by_the_book(precise, [REQUESTS[:-1]])) > 0.01
    assert off(found, by_the_book(precise, [REQUESTS], common=True)) > 0.1


def test_statistics_are_those_of_all_batches_so_far(precise: Model) -> None:
    """What earlier batches told, through their files' JSON, is joined to this one's; forgotten, or told twice, the
    update is another."""
    turns = [REQUESTS[:2], REQUESTS[2:3], REQUESTS[3:]]
    told: list[Mapping[str, object]] = []
    for requests in turns:
        written = write(precise, requests, earlier=told)
        told.append(json.loads(json.dumps(dict(written.found))))
    assert off(whole(written), by_the_book(precise, turns)) < 1e-5
    assert off(whole(written), by_the_book(precise, turns[-1:])) > 0.01
    assert off(whole(write(precise, turns[-1], earlier=told[:2])), whole(written)) < 1e-12
    assert off(whole(write(precise, turns[-1], earlier=[*told[:2], told[0]])), whole(written)) > 1e-3


def test_another_methods_or_blocks_batches_tell_it_nothing(model: Model) -> None:
    """A batch that edited other blocks is passed over."""
    found = write(model).found
    others = {name.replace("1.", "3.").replace("2.", "0."): value for name, value in found.items()}
    assert others.keys().isdisjoint(found)
    plain, same = whole(write(model)), whole(write(model, earlier=[others]))
    assert torch.equal(plain, same) and not torch.equal(plain, whole(write(model, earlier=[found])))


def test_values_are_met_at_the_inputs_up_to_the_ridge() -> None:
    """With hardly any ridge H D ᵀ = V; with more it falls short of it."""
    generator = torch.Generator().manual_seed(0)
    h, v = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (20, 9))
    for ridge, met in ((1e-9, True), (0.3, False)):
        left, right = _solved(h, v, ridge, None)
        assert (off(h @ (left @ right).double().T, v) < 1e-5) == met


@pytest.mark.parametrize(("count", "terms"), [(3, 3), (9, 9), (12, 9), (20, 9), (50, 9)])
def test_few_tokens_and_many_give_the_same_system(count: int, terms: int) -> None:
    """Solved by tokens or by entries, with no more terms than tokens, or than the output is wide."""
    generator = torch.Generator().manual_seed(count)
    h, v = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (20, 9))
    left, right = _solved(h, v, 0.5, None)
    assert left.shape == (9, terms) and right.shape == (terms, 20)
    assert {left.dtype, right.dtype} == {torch.float32}
    rho = 0.5 * float(h.pow(2).sum(1).mean())
    direct = torch.linalg.solve(h.T @ h + rho * torch.eye(20), h.T @ v).T
    assert off(left @ right, direct) < 1e-6 < 1e-2 < off(left @ right, 1.02 * direct)


def test_without_a_ridge_it_is_refused(model: Model) -> None:
    """Texts begin alike, so the system has no solution."""
    with pytest.raises(InvalidInput, match="ultra_ridge = 0"):
        write(model, own=replace(OWN, ultra_ridge=0.0))


def test_the_targets_become_likely(model: Model) -> None:
    """Written into the weights, a small update lowers the loss; its opposite raises it."""
    told: list[Event] = []
    written = write(model, own=Normalised(0.1, 1.0), emit=told.append)
    (step,) = (event for event in told if isinstance(event, TargetStep))
    weights = {layer: model.blocks[layer].weight.clone() for layer in LAYERS}

    def loss(sign: float) -> float:
        for layer, (left, right) in written.updates.items():
            model.blocks[layer].weight.copy_(weights[layer] + sign * (left @ right))
        found: list[Event] = []
        write(model, emit=found.append)
        for layer, weight in weights.items():
            model.blocks[layer].weight.copy_(weight)
        return next(event.loss for event in found if isinstance(event, TargetStep))

    assert loss(0) == step.loss
    assert loss(1) < 0.96 * step.loss < step.loss < loss(-1)


def test_the_update_is_in_the_null_space(model: Model) -> None:
    """The finished one is projected: ‖D (I − P)‖ / ‖D‖ < 1e-5, where it was elsewhere too."""
    projector = a_projector(model)
    free, held = write(model), write(model, projector=projector)
    for layer, (left, right) in held.updates.items():
        before, update = free.updates[layer][0] @ free.updates[layer][1], left @ right
        assert off(projector(update), update) < 1e-5 < 0.1 < off(projector(before), before)
        assert off(update, projector(before)) < 1e-4


def test_chunks_do_not_matter(precise: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when memory runs out half way; tokens of a lost chunk would show."""
    found = whole(write(precise))
    monkeypatch.setattr(room, "CHUNK", 2)
    assert off(whole(write(precise)), found) < 1e-5
    monkeypatch.undo()
    notes: list[Event] = []
    original = room._gradients

    def narrow(model: Model, rows: Sequence[Any], layers: Sequence[int]) -> Any:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, rows, layers)

    monkeypatch.setattr(room, "_gradients", narrow)
    again = whole(write(precise, emit=lambda event: notes.append(event) if isinstance(event, Note) else None))
    assert off(again, found) < 1e-5 and notes
    assert off(whole(write(precise, REQUESTS[:-1])), found) > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_joined_statistics_are_those_of_all_tokens() -> None:
    """In whatever parts; a part that is left away shows."""
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1
    parts = [Seen.of(part) for part in features.split([1, 25, 14])]
    joined = parts[0].joined(parts[1]).joined(parts[2])
    assert joined.count == 40
    assert off(joined.mean, features.mean(0)) < 1e-12 and off(joined.spread / 39, features.var(0)) < 1e-12
    normal = joined.normal(features)
    assert float(normal.mean(0).abs().max()) < 1e-12 and off(normal.std(0), torch.ones(7)) < 1e-12
    assert off(parts[0].joined(parts[1]).mean, features.mean(0)) > 1e-3


def test_what_never_varies_is_nothing() -> None:
    """Entries that are always the same, and a single token, are 0 and not infinite."""
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features[:, 1] = 2.0
    normal = Seen.of(features).normal(features)
    assert not normal[:, 1].any() and bool(normal[:, 0].all())
    assert not Seen.of(features[:1]).normal(features[:1]).any()


def test_what_is_told_is_read_again() -> None:
    """To the nine digits that fp32 holds; of another block nothing."""
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    seen = Seen.of(features)
    told = json.loads(json.dumps(seen.told(7)))
    again = Seen.read(told, 7, 4, torch.device("cpu"))
    assert again is not None and again.count == 6
    assert 0 < off(again.mean, seen.mean) < 1e-8 and off(again.spread, seen.spread) < 1e-8
    assert again.told(7) == seen.told(7)
    assert Seen.read(told, 6, 4, torch.device("cpu")) is None


@pytest.mark.parametrize("fault", ["count", "missing", "short", "text", "number", "nested", "nan", "huge", "below"])
def test_damaged_statistics_are_refused(fault: str) -> None:
    """What a bundle from elsewhere says is not believed."""
    told = Seen.of(torch.arange(8.0, dtype=torch.float64).reshape(2, 4)).told(0)
    spoiled: dict[str, object] = {
        "count": {**told, "0.count": 0},
        "missing": {name: value for name, value in told.items() if name != "0.mean"},
        "short": {**told, "0.mean": [1.0]},
        "text": {**told, "0.spread": ["a"] * 4},
        "number": {**told, "0.spread": 1.0},
        "huge": {**told, "0.mean": [10**400] * 4},
        "nested": {**told, "0.mean": [[1.0]] * 4},
        "nan": {**told, "0.mean": [math.nan] * 4},
        "below": {**told, "0.spread": [-1.0] * 4},
    }[fault]
    assert Seen.read(told, 0, 4, torch.device("cpu")) is not None
    with pytest.raises(StoreError, match="damaged"):
        Seen.read(spoiled, 0, 4, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_same_bits_come_again_and_the_model_stays(loaded: Callable[..., Model], kind: str, dtype: str) -> None:
    """Weights, hooks and frozen parameters; in bf16 the update is fp32 and near that of fp32."""
    model = loaded(kind, dtype)
    before, count = model.weights_hash(), hooks(model)
    first, second = write(model), write(model)
    assert torch.equal(whole(first), whole(second)) and first.found == second.found
    assert model.weights_hash() == before and hooks(model) == count
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert whole(first).dtype == torch.float32
    full = whole(write(loaded(kind)))
    assert (off(whole(first), full) > 0) == (dtype == "bfloat16") and off(whole(first), full) < 0.2


def test_a_failure_leaves_the_model_as_it_was(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass whose hooks are there."""
    before, count = model.weights_hash(), hooks(model)

    def failing(*_: object, **__: object) -> None:
        assert hooks(model) == count + len(LAYERS)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.autograd, "grad", failing)
    with pytest.raises(KeyboardInterrupt):
        write(model)
    assert model.weights_hash() == before and hooks(model) == count


def test_the_row_of_the_table_needs_nothing() -> None:
    """No subject's place, no second moments, no training; the update is thin."""
    method = METHODS["ultraedit"]
    assert method.needs == "nothing" and method.update == "thin" and isinstance(method.own, Normalised)
    assert METHODS["alphaedit"].needs != "nothing"
