"""Target vectors: batched, cached and freezing as it is, the optimiser does what one plain loop a request does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine.methods import TargetSettings
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.target import Target, optimise
from editctl.events import Event, TargetStep, silent

LAYER = 2
CONTEXTS = ("", "The dog ran away. ", "You. ", "Because of the river and the old road. ")
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "the city of Oslo"),
    Request("the", "{} is", "The", "a"),
)
"""Subjects of one and of many tokens, at the start and in the middle, followed by a space, 's and a comma."""
SETTINGS = TargetSettings(steps=10, rate=0.5, clamp=1.5, decay=0.02, kl=0.0625, stop=0.0)


@dataclass(frozen=True)
class Naive:
    vector: Tensor
    steps: int
    trace: tuple[float, ...]
    """NLL before each step and after the last."""


def naive(
    model: Model,
    request: Request,
    settings: TargetSettings,
    contexts: Sequence[str] = CONTEXTS,
    *,
    shift: int = 0,
) -> Naive:
    """One request by the book: full sequences, no padding, no cache, torch's own Adam.

    Args:
        shift: tokens by which the change is misplaced, for controls.
    """
    net: Any = model.net
    block = (net.transformer.h if hasattr(net, "transformer") else net.model.layers)[LAYER]
    before, after = request.template.split("{}")
    encode = model.tokenizer.encode

    def logits(ids: list[int], at: int, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of all positions, and the block's output at `at` before `delta` was added there."""
        seen: list[Tensor] = []

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden[0, at].detach())
            if delta is None:
                return None
            place = torch.zeros(hidden.shape[1], 1, dtype=hidden.dtype)
            place[at + shift] = 1
            hidden = hidden + place * delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(hook)
        try:
            return net(input_ids=torch.tensor([ids])).logits[0], seen[0]
        finally:
            handle.remove()

    texts = []
    for context in contexts:
        whole = encode(f"{context}{before}{request.subject}{after} {request.target}")
        at = len(encode(f"{context}{before}{request.subject}")) - 1
        texts.append((whole, at, len(encode(f"{context}{before}{request.subject}{after}"))))
    bare = encode(f"{request.subject} is a")
    bare_at = len(encode(request.subject)) - 1
    with torch.no_grad():
        calm = logits(bare, bare_at, None)[0][bare_at].log_softmax(-1)
        origin = logits(texts[0][0], texts[0][1], None)[1]
    size = origin.norm()
    delta = torch.zeros_like(origin, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=float(settings.rate * size / len(origin) ** 0.5))
    trace: list[float] = []
    for step in range(settings.steps + 1):
        nll = torch.zeros((), dtype=origin.dtype)
        for ids, at, start in texts:
            said = logits(ids, at, delta)[0][start - 1 : -1]
            nll = nll + functional.cross_entropy(said, torch.tensor(ids[start:])) / len(texts)
        trace.append(float(nll.detach()))
        if trace[-1] < settings.stop or step == settings.steps:
            break
        new = logits(bare, bare_at, delta)[0][bare_at].log_softmax(-1)
        drift = functional.kl_div(calm, new, log_target=True, reduction="sum")
        loss = nll + settings.kl * drift + settings.decay * (delta.norm() / size) ** 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > settings.clamp * size:
                delta *= settings.clamp * size / delta.norm()
    return Naive((origin + delta.detach()).float(), len(trace) - 1, tuple(trace))


def batched(model: Model, settings: TargetSettings, contexts: Sequence[str] = CONTEXTS) -> list[Target]:
    return optimise(model, LAYER, REQUESTS, contexts, settings, emit=silent)


def assert_agree(found: Sequence[Any], wanted: Sequence[Any], tolerance: float = 1e-6) -> None:
    for request, one, other in zip(REQUESTS, found, wanted, strict=True):
        error = float((one.vector - other.vector).norm() / other.vector.norm())
        assert error <= tolerance, f"{request.id} is off by {error:.1e}"
        assert one.steps == other.steps, f"{request.id} took {one.steps} steps, not {other.steps}"


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[TargetSettings, list[Naive]]]:
    """By model: settings under which some requests stop early and some do not, and each request by the book."""
    return {}


@pytest.fixture
def reference(precise: Model, references: dict[str, Any]) -> tuple[TargetSettings, list[Naive]]:
    if precise.name not in references:
        full = [naive(precise, request, SETTINGS) for request in REQUESTS]

        def stops(at: float) -> set[int]:
            return {next((i for i, nll in enumerate(one.trace) if nll < at), SETTINGS.steps) for one in full}

        # Halfway between two losses, so that rounding decides nothing: where the most different endings are seen.
        seen = sorted({nll for one in full for nll in one.trace})
        between = [(low + high) / 2 for low, high in itertools.pairwise(seen) if high - low > 1e-3]
        settings = replace(SETTINGS, stop=max(between, key=lambda at: len(stops(at) - {0})))
        references[precise.name] = settings, [naive(precise, request, settings) for request in REQUESTS]
    return references[precise.name]


def test_a_batch_agrees_with_one_plain_loop_a_request(precise: Model, reference: Any) -> None:
    """Vectors within 1e-6 and the same number of steps, though some requests stop long before others."""
    settings, wanted = reference
    steps = {one.steps for one in wanted}
    assert len(steps - {0}) >= 3 and max(steps) == settings.steps, (
        "early stopping must fire for some, at different steps"
    )
    found = batched(precise, settings)
    assert_agree(found, wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.nll == pytest.approx(other.trace[-1], rel=1e-5)


def test_a_batch_agrees_with_the_same_optimiser_on_each_request_alone(precise: Model, reference: Any) -> None:
    """Who else is in the batch does not matter, nor in which order."""
    settings, _ = reference
    alone = [optimise(precise, LAYER, [r], CONTEXTS, settings, emit=silent)[0] for r in REQUESTS]
    assert_agree(batched(precise, settings), alone)
    turned = optimise(precise, LAYER, REQUESTS[::-1], CONTEXTS, settings, emit=silent)
    assert_agree(turned[::-1], alone)


def test_without_freezing_the_vectors_differ(precise: Model, reference: Any) -> None:
    """Control: a request that should have stopped but went on is far off, by more than a thousandth."""
    settings, wanted = reference
    never = batched(precise, replace(settings, stop=0.0))
    early = [i for i, one in enumerate(wanted) if one.steps < settings.steps]
    for i in early:
        assert float((never[i].vector - wanted[i].vector).norm() / wanted[i].vector.norm()) > 1e-3
    with pytest.raises(AssertionError):
        assert_agree(never, wanted)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_change_at_the_wrong_position_gives_other_vectors(precise: Model, reference: Any, shift: int) -> None:
    """Control: one token off and no request agrees."""
    settings, wanted = reference
    moved = [(r, one) for r, one in zip(REQUESTS, wanted, strict=True) if one.steps > 3 and " " in r.subject]
    assert moved
    for request, one in moved:
        other = naive(precise, request, settings, shift=shift)
        assert float((other.vector - one.vector).norm() / one.vector.norm()) > 1e-3


@pytest.mark.parametrize("change", [{"kl": 0.0}, {"decay": 0.0}, {"clamp": 0.3}, {"rate": 0.45}])
def test_every_setting_takes_part(loaded: Any, change: dict[str, float]) -> None:
    """Control: with any one setting changed in the reference alone, the agreement breaks."""
    model, request, plain = loaded("llama", "float64"), REQUESTS[2], replace(SETTINGS, steps=6)
    found = optimise(model, LAYER, [request], CONTEXTS, plain, emit=silent)[0]

    def assert_same(other: Naive) -> None:
        assert float((found.vector - other.vector).norm() / other.vector.norm()) <= 1e-6

    assert_same(naive(model, request, plain))
    with pytest.raises(AssertionError):
        assert_same(naive(model, request, replace(plain, **change)))


def test_a_subject_at_the_first_position_needs_no_prefix(loaded: Any) -> None:
    """In GPT-2, which has no start token, a one-token subject opens the prompt and nothing lies before it."""
    model, request = loaded("gpt2", "float64"), REQUESTS[1]
    assert model.subject_last(request.prompt, 0, len(request.subject)) == 0
    found = optimise(model, LAYER, [request], ("",), SETTINGS, emit=silent)[0]
    wanted = naive(model, request, SETTINGS, ("",))
    assert float((found.vector - wanted.vector).norm() / wanted.vector.norm()) <= 1e-6
    elsewhere = naive(model, request, SETTINGS, ("",), shift=1)
    assert float((found.vector - elsewhere.vector).norm() / wanted.vector.norm()) > 1e-3


def test_more_requests_than_a_chunk_holds_give_the_same(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks bound the memory, not the result."""
    model, settings = loaded("llama", "float64"), replace(SETTINGS, steps=4)
    whole = batched(model, settings)
    monkeypatch.setattr("editctl.engine.target.CHUNK", 2)
    assert_agree(batched(model, settings), whole)


def test_a_change_never_leaves_its_ball(precise: Model) -> None:
    """‖δ‖ ≤ clamp · ‖h₀‖, and with a fast rate the bound is reached; no clamp would let it out."""
    settings = replace(SETTINGS, rate=2.0, clamp=0.5, steps=6)
    still = batched(precise, replace(settings, steps=0))

    def assert_held(moved: Sequence[Target]) -> None:
        for origin, one in zip(still, moved, strict=True):
            share = float((one.vector - origin.vector).norm() / origin.vector.norm())
            assert 0.4 < share <= 0.5 + 1e-6

    assert_held(batched(precise, settings))
    with pytest.raises(AssertionError):
        assert_held(batched(precise, replace(settings, clamp=5.0)))


def test_steps_are_told_as_they_happen(loaded: Any, reference: Any) -> None:
    """One event a step, counting those still at work, and the target's NLL falls."""
    told: list[Event] = []
    settings = replace(SETTINGS, steps=5)
    optimise(loaded("llama", "float64"), LAYER, REQUESTS, CONTEXTS, settings, emit=told.append, batch=3)
    assert [(e.batch, e.step, e.active) for e in told if isinstance(e, TargetStep)] == [(3, i, 5) for i in range(6)]
    assert told[-1].loss < told[0].loss  # type: ignore[attr-defined]


def test_optimising_changes_no_weight(precise: Model) -> None:
    """Nor does it leave a hook behind."""

    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in precise.net.modules()]

    before, hung = precise.weights_hash(), hooks()
    batched(precise, replace(SETTINGS, steps=2))
    assert precise.weights_hash() == before and hooks() == hung
