"""The two factors of a gradient: their product is autograd's gradient, and its rank is bounded by the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine import slopes as room
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.slopes import Slope, slopes

LAYERS = (1, 3)
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
)


def autograd(model: Model, request: Request, layer: int) -> Tensor:
    """torch's gradient of the target's mean loss for the weight itself, out × in."""
    block = model.blocks[layer]
    parameter: Any = block.down.weight
    prompt, whole = model.encode(request.prompt), model.encode(f"{request.prompt} {request.target}")
    parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            said = model.net(torch.tensor([whole]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            loss = functional.cross_entropy(said, torch.tensor(whole[len(prompt) :]))
            (gradient,) = torch.autograd.grad(loss, parameter)
    finally:
        parameter.requires_grad_(False)
    return gradient.T if block.transposed else gradient


def product(slope: Slope, layer: int) -> Tensor:
    u, g = slope.parts[layer]
    return g.T @ u


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_the_product_of_the_factors_is_the_gradient(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each request alone, though they are read together; with every token's term to the last digits."""
    monkeypatch.setattr(room, "NEGLIGIBLE", 0.0)
    for request, slope in zip(REQUESTS, slopes(model, LAYERS, REQUESTS), strict=True):
        for layer in LAYERS:
            assert off(product(slope, layer), autograd(model, request, layer)) < 1e-4


def test_another_request_has_another_gradient(model: Model) -> None:
    """Control: the comparison tells requests apart."""
    slope = slopes(model, LAYERS, REQUESTS)[0]
    assert off(product(slope, 1), autograd(model, REQUESTS[1], 1)) > 0.5


def test_leaving_small_terms_away_changes_little(model: Model) -> None:
    """Terms under a tenth of the largest: fewer tokens, nearly the same matrix."""
    for request, slope in zip(REQUESTS, slopes(model, LAYERS, REQUESTS), strict=True):
        for layer in LAYERS:
            assert off(product(slope, layer), autograd(model, request, layer)) < 0.4


def test_its_rank_is_at_most_the_number_of_tokens(model: Model) -> None:
    """Of autograd's own matrix, counted by singular values; a random matrix of the shape has full rank (control)."""
    for request in REQUESTS:
        tokens = len(model.encode(f"{request.prompt} {request.target}")) - 1
        gradient = autograd(model, request, 1)
        assert torch.linalg.matrix_rank(gradient, rtol=1e-4) <= tokens < min(gradient.shape)
        assert torch.linalg.matrix_rank(torch.randn(gradient.shape)) == min(gradient.shape)


def test_it_says_what_the_model_says_and_leaves_it_alone(model: Model) -> None:
    """The old answer is the most probable token at each place of the new one; the weights keep their bits."""
    before = model.weights_hash()
    slope = slopes(model, LAYERS, REQUESTS)[1]
    whole = model.encode("Rome was not built in London by night")
    start = len(model.encode("Rome was not built in"))
    logits = model.net(torch.tensor([whole]), use_cache=False).logits[0]

    assert slope.said == tuple(logits[start - 1 : -1].argmax(-1).tolist())
    assert slope.target == tuple(whole[start:]) and slope.prompt == tuple(whole[:start])
    assert model.weights_hash() == before and not any(p.requires_grad for p in model.net.parameters())


def test_one_at_a_time_has_the_same_bits_whatever_came_before(model: Model) -> None:
    """What is kept of a lesson must not depend on which lessons were read before it."""
    alone = slopes(model, LAYERS, REQUESTS[2:], rows=1)[0]
    among = slopes(model, LAYERS, REQUESTS, rows=1)[2]
    for layer in LAYERS:
        assert all(torch.equal(a, b) for a, b in zip(alone.parts[layer], among.parts[layer], strict=True))
