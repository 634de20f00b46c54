"""Keys and residuals: read at the subject's last token, mixed over contexts, staged from the bottom up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from editctl.delta import Factors
from editctl.engine.keys import keys_and_states, residual_share
from editctl.engine.model import Model
from editctl.engine.prompts import Request, rows, split_answer, subject_row

LAYER, LAST = 1, 2
CONTEXTS = ("", "The dog ran away. ", "You. ", "Because of the river and the old road. ")
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "Oslo"),
)
"""The subject is followed by a space, by 's and by a comma."""


def by_full_forward(model: Model, request: Request, shift: int = 0) -> tuple[Tensor, Tensor]:
    """The mixed key and the plain state, read from whole prompts one at a time; `shift` misplaces the reading."""
    net: Any = model.net
    before, after = request.template.split("{}")
    if hasattr(net, "transformer"):
        downs, blocks = [b.mlp.c_proj for b in net.transformer.h], net.transformer.h
    else:
        downs, blocks = [b.mlp.down_proj for b in net.model.layers], net.model.layers
    found, states = [], []
    handles = [
        downs[LAYER].register_forward_pre_hook(lambda _m, args: found.append(args[0][0])),
        blocks[LAST].register_forward_hook(
            lambda _m, _a, out: states.append((out[0] if type(out) is tuple else out)[0])
        ),
    ]
    picked = []
    try:
        for context in CONTEXTS:
            ids = model.tokenizer.encode(f"{context}{before}{request.subject}{after} {request.target}")
            at = len(model.tokenizer.encode(f"{context}{before}{request.subject}")) - 1 + shift
            with torch.no_grad():
                net(input_ids=torch.tensor([ids]))
            picked.append((found.pop()[at], states.pop()[at]))
    finally:
        for handle in handles:
            handle.remove()
    keys = [key for key, _ in picked]
    return (keys[0] + sum(keys[1:]) / len(keys[1:])) / 2, picked[0][1]


def assert_close(found: Tensor, wanted: Sequence[Tensor]) -> None:
    for request, column, other in zip(REQUESTS, found.T, wanted, strict=True):
        error = float((column - other).norm() / other.norm())
        assert error < 1e-5, f"{request.id} is off by {error:.1e}"


def test_keys_are_those_of_a_full_forward_at_the_subjects_last_token(model: Model) -> None:
    """Half the plain prompt's key, half the mean over contexts; states are the plain prompt's alone."""
    keys, states = keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)
    wanted = [by_full_forward(model, request) for request in REQUESTS]
    assert keys.shape == (model.blocks[LAYER].weight.shape[1], len(REQUESTS))
    assert_close(keys, [key for key, _ in wanted])
    assert_close(states, [state for _, state in wanted])


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.id)
def test_keys_of_the_neighbouring_token_are_others(model: Model, request_: Request) -> None:
    """Control: one token to the right, and to the left where there is one, nothing agrees."""
    keys, states = keys_and_states(model, LAYER, LAST, [request_], CONTEXTS)
    for shift in (1, -1):
        if rows(model, request_, CONTEXTS)[0].lookup + shift < 0:
            continue
        key, state = by_full_forward(model, request_, shift)
        assert float((keys[:, 0] - key).norm() / key.norm()) > 1e-2
        assert float((states[:, 0] - state).norm() / state.norm()) > 1e-2


def test_a_plain_mean_over_all_contexts_is_another_key(model: Model) -> None:
    """Control for the mixture: the plain prompt weighs as much as all contexts together."""
    keys, _ = keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)
    each = [keys_and_states(model, LAYER, LAST, REQUESTS, [context])[0] for context in CONTEXTS]
    assert_close(keys, ((each[0] + sum(each[1:]) / 3) / 2).T.unbind())
    with pytest.raises(AssertionError):
        assert_close(keys, (sum(each) / 4).T.unbind())


def test_keys_do_not_depend_on_who_else_is_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the batch nor on how it is cut into passes."""
    together, _ = keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)
    alone = [keys_and_states(model, LAYER, LAST, [request], CONTEXTS)[0][:, 0] for request in REQUESTS]
    assert_close(together, alone)
    monkeypatch.setattr("editctl.engine.keys.CHUNK", 3)
    assert_close(keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)[0], alone)


def test_keys_depend_on_lower_layers_only(model: Model) -> None:
    """A change at the key's own layer or above leaves its bits; one below moves it. That makes staging exact."""
    plain, plain_states = keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)
    generator = torch.Generator().manual_seed(0)

    def perturbed(layer: int) -> tuple[Tensor, Tensor]:
        rows_, columns = model.blocks[layer].weight.shape
        noise = Factors(
            torch.zeros(columns, 1),
            torch.randn(rows_, 1, generator=generator),
            torch.randn(1, columns, generator=generator),
        )
        with model.editing() as editing:
            editing.add(model.blocks[layer].down_name, noise)
            return keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)

    for layer in (LAYER, LAST, 3):
        keys, states = perturbed(layer)
        assert torch.equal(keys, plain)
        assert torch.equal(states, plain_states) == (layer > LAST)
    assert not torch.allclose(perturbed(LAYER - 1)[0], plain, rtol=1e-2)
    assert torch.equal(keys_and_states(model, LAYER, LAST, REQUESTS, CONTEXTS)[0], plain)


def test_the_residual_is_spread_over_the_layers_still_to_come() -> None:
    """Written in full at every stage, the shares close the gap; a share by the number of all layers does not."""
    generator = torch.Generator().manual_seed(0)
    targets, start = (torch.randn(8, 3, generator=generator) for _ in range(2))

    def left(share: Any) -> float:
        states = start
        for stage in range(3):
            states = states + share(states, stage)
        return float((targets - states).norm() / (targets - start).norm())

    assert left(lambda states, stage: residual_share(targets, states, stage, 3)) < 1e-6
    assert left(lambda states, stage: (targets - states) / 3) > 0.2


# Where things lie in a prompt


@pytest.mark.parametrize("after", [" is", "'s road is", ", of the river, is", "! He is", " (the first) is"])
@pytest.mark.parametrize("before", ["", "In the summer, ", "The city of "])
@pytest.mark.parametrize("subject", ["Ada Lovelace", "Rome", "The Eiffel Tower", "a Ĝödel"])
def test_the_lookup_is_the_subjects_last_token(model: Model, before: str, subject: str, after: str) -> None:
    """Whatever follows the subject and wherever it stands: the text up to that token ends with the subject."""
    request = Request("x", before + "{}" + after, subject, "long")
    for context in CONTEXTS:
        (row,) = rows(model, request, [context])
        read = model.tokenizer.decode(row.ids[: row.lookup + 1], skip_special_tokens=True)
        assert read == context + before + subject
        shorter = model.tokenizer.decode(row.ids[: row.lookup], skip_special_tokens=True)
        assert shorter != context + before + subject, "one token earlier the subject must be incomplete"


def test_a_subject_named_twice_is_looked_up_where_the_slot_is(model: Model) -> None:
    """The slot decides, not the first occurrence of the words."""
    request = Request("x", "People in Rome say that {} is", "Rome", "long")
    (row,) = rows(model, request, [""])
    read = model.tokenizer.decode(row.ids[: row.lookup + 1], skip_special_tokens=True)
    assert read == "People in Rome say that Rome"


def test_the_answer_begins_where_the_prompt_ends(model: Model) -> None:
    """A prompt with and without a space at its end has the same answer, and the row's target decodes to it."""
    for prompt in ("The capital of Norway is", "The capital of Norway is "):
        ids, start = split_answer(model, prompt, "Oslo now")
        assert model.tokenizer.decode(ids[start:]).strip() == "Oslo now"
        assert model.tokenizer.decode(ids[:start], skip_special_tokens=True).strip() == prompt.strip()


def test_the_bare_subject_ends_at_its_last_token(model: Model) -> None:
    """Nothing that follows can be seen from there, so nothing that follows is read."""
    row = subject_row(model, "Marie Curie")
    assert model.tokenizer.decode(row.ids, skip_special_tokens=True) == "Marie Curie"
    assert row.lookup == len(row.ids) - 1 and row.target == ()
