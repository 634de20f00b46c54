"""Keys and states: read at the subject's last token, mixed over contexts, staged from the bottom up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import cache
from typing import Any

import builds
import pytest
import tiny
import torch
from torch import Tensor, nn

from editctl.delta import Factors
from editctl.engine.keys import Stage, Staged, residual_share
from editctl.engine.model import Editing, Model
from editctl.engine.prompts import Request, rows, split_answer, subject_row
from editctl.events import silent

LAYER, LAST = 1, 2
CONTEXTS = ("", "The dog ran away. ", "The dog sat. ", "Because of the river and the old road. ")
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "Oslo"),
)
"""The subject is followed by a space, by 's and by a comma."""
FALCON = "Falcon 7B (parallel, multi-query)"
KINDS = ("gpt2", "llama", "GPT-J", "Gemma 2", FALCON)
"""Blocks one after another and beside each other, with norms after them; Falcon writes over what its MLP put out."""


@cache
def build(name: str) -> Model:
    found = builds.BUILDS[name]
    deeper = replace(found, settings=found.settings | {"n_layer" if name == "GPT-J" else "num_hidden_layers": 4})
    return Model(deeper.net(), tiny.tokenizer(bos=False), name=name)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, loaded: Any) -> Model:
    """A model of 4 blocks of each kind, in float32."""
    name: str = request.param
    model: Model = loaded(name) if name in ("gpt2", "llama") else build(name)
    return model


def stage(
    model: Model,
    layer: int = LAYER,
    requests: Sequence[Request] = REQUESTS,
    contexts: Sequence[str] = CONTEXTS,
    last: int = LAST,
) -> Stage:
    """A first stage, nothing known from before."""
    return Staged(model, requests, contexts, last, silent).stage(layer)


def by_full_forward(
    model: Model, layer: int = LAYER, requests: Sequence[Request] = REQUESTS, shift: int = 0, last: int = LAST
) -> Stage:
    """The same by the book: whole texts, one at a time; `shift` misplaces the reading."""
    seen: dict[str, Tensor] = {}

    def note(name: str, value: Any) -> None:
        hidden = value[0] if isinstance(value, tuple) else value
        seen[name] = hidden.reshape(-1, hidden.shape[-1]).clone()

    down, end = model.blocks[layer].down, model.blocks[last]
    handles = [
        down.register_forward_pre_hook(lambda _m, args: note("key", args[0])),
        down.register_forward_hook(lambda _m, _a, out: note("write", out)),
        end.down.register_forward_hook(lambda _m, _a, out: note("last_write", out)),
        end.module.register_forward_hook(lambda _m, _a, out: note("state", out)),
    ]
    found: dict[str, list[Tensor]] = {name: [] for name in ("key", "write", "state", "last_write")}
    try:
        for request in requests:
            before, after = request.template.split("{}")
            for context in CONTEXTS:
                ids = model.tokenizer.encode(f"{context}{before}{request.subject}{after} {request.target}")
                at = len(model.tokenizer.encode(f"{context}{before}{request.subject}")) - 1 + shift
                with torch.no_grad():
                    model.net(input_ids=torch.tensor([ids]))
                for name, values in found.items():
                    values.append(seen[name][at])
    finally:
        for handle in handles:
            handle.remove()
    by = {name: torch.stack(values).view(len(requests), len(CONTEXTS), -1) for name, values in found.items()}
    key = by["key"]
    plain = (by[name][:, 0] for name in ("write", "state", "last_write"))
    return Stage(*(part.T for part in (key[:, 0], key.mean(1), key[:, 1:].mean(1), *plain)))


def apart(found: Stage, wanted: Stage) -> dict[str, float]:
    """By field, the largest relative distance of two columns."""
    pairs = {field.name: (getattr(found, field.name), getattr(wanted, field.name)) for field in fields(Stage)}
    return {name: float(((a - b).norm(dim=0) / b.norm(dim=0)).max()) for name, (a, b) in pairs.items()}


def same(found: Stage, wanted: Stage) -> set[str]:
    """The fields that agree in every bit."""
    return {f.name for f in fields(Stage) if torch.equal(getattr(found, f.name), getattr(wanted, f.name))}


EVERY = {field.name for field in fields(Stage)}


def write(model: Model, editing: Editing, layer: int, seed: int) -> None:
    """Some update of the layer's weight, of about a tenth of its size."""
    generator = torch.Generator().manual_seed(seed)
    block = model.blocks[layer]
    high, wide = block.weight.shape
    left, right = torch.randn(high, 1, generator=generator), torch.randn(1, wide, generator=generator)
    scale = 0.1 * block.weight.norm() / (left.norm() * right.norm())
    editing.add(block.down_name, Factors(torch.zeros(wide, 1), left, scale * right))


# One stage


def test_a_stage_is_what_full_forwards_show_at_the_subjects_last_token(kind: Model) -> None:
    """Keys in the plain prompt and over contexts, and what this block and the last put out in the plain prompt."""
    for layer in (LAYER, LAST):
        found, wanted = stage(kind, layer), by_full_forward(kind, layer)
        assert max(apart(found, wanted).values()) < 1e-5
        assert found.plain.shape == (kind.blocks[layer].weight.shape[1], len(REQUESTS))


@pytest.mark.parametrize("shift", [1, -1])
def test_a_stage_of_the_neighbouring_token_is_another(model: Model, shift: int) -> None:
    """Control: one token to the right, or to the left where there is one, nothing agrees."""
    requests = [r for r in REQUESTS if rows(model, r, CONTEXTS)[0].lookup + shift >= 0]
    assert len(requests) >= 3
    found = stage(model, requests=requests)
    assert min(apart(found, by_full_forward(model, requests=requests, shift=shift)).values()) > 1e-2


def test_keys_are_mixed_as_the_methods_ask(model: Model) -> None:
    """`mixed`: half the plain prompt's key, half the mean over the other contexts; `mean` and `rome`: over all."""
    found = stage(model)
    each = [stage(model, contexts=[context]).plain for context in CONTEXTS]
    mixtures = {
        "mixed": (each[0] + sum(each[1:]) / 3) / 2,
        "mean": sum(each) / 4,
        "rome": sum(each) / 4,
    }
    for name, wanted in mixtures.items():
        torch.testing.assert_close(found.keys(name), wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found.keys("mixed"), mixtures["mean"], rtol=1e-4, atol=1e-6)


def test_without_contexts_all_keys_are_the_plain_ones(model: Model) -> None:
    """There is nothing to mix with; with contexts there is."""
    single, several = stage(model, contexts=[""]), stage(model)
    assert torch.equal(single.mean, single.plain) and torch.equal(single.others, single.plain)
    assert not torch.allclose(several.others, several.plain, rtol=1e-2)
    torch.testing.assert_close(single.plain, several.plain, rtol=1e-4, atol=1e-6)


def test_a_stage_does_not_depend_on_who_else_is_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the batch, nor on its order, nor on how it is cut into passes."""
    together = stage(model)
    for i, request in enumerate(REQUESTS):
        one = stage(model, requests=[request])
        part = Stage(*(getattr(together, field.name)[:, [i]] for field in fields(Stage)))
        assert max(apart(part, one).values()) < 1e-5
    turned = stage(model, requests=REQUESTS[::-1])
    assert max(apart(Stage(*(getattr(turned, f.name).flip(1) for f in fields(Stage))), together).values()) < 1e-5
    monkeypatch.setattr("editctl.engine.keys.CHUNK", 3)
    assert max(apart(stage(model), together).values()) < 1e-5
    assert min(apart(stage(model, requests=REQUESTS[::-1]), together).values()) > 1e-2, "columns must differ"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_stages_are_in_float32_at_least(loaded: Any, dtype: str) -> None:
    """Means are taken in float32 whatever the weights' type, and near those of a float32 model."""
    found, wanted = stage(loaded("llama", dtype)), stage(loaded("llama"))
    kept = torch.float64 if dtype == "float64" else torch.float32
    assert {getattr(found, field.name).dtype for field in fields(Stage)} == {kept}
    assert max(apart(found, wanted).values()) < (0.1 if dtype == "bfloat16" else 1e-5)


def test_keys_depend_on_lower_layers_only(model: Model) -> None:
    """A change at the key's own layer or above leaves its bits; one below moves it. That makes staging exact."""
    plain = stage(model)

    def perturbed(layer: int) -> Stage:
        with model.editing() as editing:
            write(model, editing, layer, 0)
            return stage(model)

    keys = {"plain", "mean", "others"}
    assert same(perturbed(LAYER - 1), plain) == set()
    assert same(perturbed(LAYER), plain) == keys
    assert same(perturbed(LAST), plain) == keys | {"writes"}
    assert same(perturbed(3), plain) == EVERY
    assert same(stage(model), plain) == EVERY


# Stage after stage


def test_stages_between_writes_have_the_bits_of_first_stages(kind: Model) -> None:
    """Two rounds over three blocks, each resumed where the last write was, against nothing known at all."""
    with kind.editing() as editing:
        staged = Staged(kind, REQUESTS, CONTEXTS, LAST, silent)
        before = None
        for i, layer in enumerate((0, 1, 2, 0, 1, 2, 1, 1)):
            found = staged.stage(layer)
            assert same(found, stage(kind, layer)) == EVERY
            if layer == 1:
                assert max(apart(found, by_full_forward(kind, layer)).values()) < 1e-5
                assert before is None or apart(found, before)["states"] > 1e-3, "what was written must be seen"
                before = found
            write(kind, editing, layer, i)
            staged.written(layer)


def test_stages_in_chunks_have_the_bits_of_first_stages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk keeps what it may resume from."""
    monkeypatch.setattr("editctl.engine.keys.CHUNK", 3)
    with model.editing() as editing:
        staged = Staged(model, REQUESTS, CONTEXTS, LAST, silent)
        for layer in (0, 1, 2):
            assert same(staged.stage(layer), stage(model, layer)) == EVERY
            write(model, editing, layer, layer)
            staged.written(layer)


@pytest.mark.parametrize("told", [None, 1, 0], ids=["nothing", "one too high", "what is so"])
def test_a_stage_that_is_not_told_the_lowest_write_is_stale(kind: Model, told: int | None) -> None:
    """Control: without a word of a write, or with one of a block too high, the keys are those of before it."""
    with kind.editing() as editing:
        staged = Staged(kind, REQUESTS, CONTEXTS, LAST, silent)
        before = [staged.stage(layer) for layer in (0, 1)][1]
        write(kind, editing, 0, 0)
        if told is not None:
            staged.written(told)
        found, wanted = staged.stage(1), stage(kind, 1)
    if told == 0:
        assert same(found, wanted) == EVERY
    else:
        assert same(found, before) == EVERY
        assert min(apart(found, wanted).values()) > 1e-3


def test_of_several_writes_the_lowest_counts(model: Model) -> None:
    """In whatever order they are told."""
    with model.editing() as editing:
        for order in ((0, 2), (2, 0)):
            staged = Staged(model, REQUESTS, CONTEXTS, LAST, silent)
            for layer in (0, 1, 2):
                staged.stage(layer)
            for layer in order:
                write(model, editing, layer, layer)
                staged.written(layer)
            assert same(staged.stage(2), stage(model, 2)) == EVERY


def test_what_a_write_has_made_stale_is_never_resumed_from(model: Model) -> None:
    """Also when the stage right after the write ends below it, and when stages go down."""
    with model.editing() as editing:
        staged = Staged(model, REQUESTS, CONTEXTS, LAST, silent)
        before = [staged.stage(layer) for layer in (0, 1, 2)]
        write(model, editing, 0, 0)
        staged.written(0)
        for layer in (0, 2, 1):
            found = staged.stage(layer)
            assert same(found, stage(model, layer)) == EVERY
            assert apart(found, before[layer])["states"] > 1e-3


@contextmanager
def counting(model: Model) -> Iterator[list[int]]:
    """By block, how often its attention or its down-projection is called."""
    counts = [0] * len(model.blocks)

    def count(i: int) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            counts[i] += 1

        return hook

    modules = [(i, m) for i, b in enumerate(model.blocks) for m in (model.attention_of(i), b.down)]
    assert all(module is not None for _, module in modules)
    with model.hooked([(module, "output", count(i)) for i, module in modules if module is not None]):
        yield counts


def test_nothing_is_computed_that_was_not_changed_or_is_not_asked(kind: Model) -> None:
    """No module of a block below the lowest write or above the last block does any work; a first stage begins at the
    first block, and contexts end at the block whose keys are sought."""
    with kind.editing() as editing, counting(kind) as counts:

        def work(staged: Staged, layer: int) -> list[bool]:
            counts[:] = [0] * len(counts)
            staged.stage(layer)
            return [count > 0 for count in counts]

        staged = Staged(kind, REQUESTS, CONTEXTS, LAST, silent)
        assert work(staged, 0) == [True, True, True, False]
        plain_only = counts[1]
        write(kind, editing, 0, 0)
        staged.written(0)
        assert work(staged, 1) == [True, True, True, False]
        assert counts[2] == plain_only < counts[1]
        write(kind, editing, 1, 0)
        staged.written(1)
        assert work(staged, 2) == [False, True, True, False]
        write(kind, editing, 2, 0)
        staged.written(2)
        assert work(staged, 2) == [False, False, True, False]
        assert work(Staged(kind, REQUESTS, CONTEXTS, LAST, silent), 2) == [True, True, True, False]
        write(kind, editing, 0, 1)
        staged.written(0)
        assert work(staged, 2) == [True, True, True, False]
        assert work(Staged(kind, REQUESTS, CONTEXTS, 3, silent), 2) == [True, True, True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_staging_leaves_the_model_as_it_was(model: Model, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Its weights, hooks and forward passes, also when it fails while a pass is resumed."""

    def state() -> tuple[str, list[int], list[nn.Module]]:
        modules = list(model.net.modules())
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
        return model.weights_hash(), hooks, [module for module in modules if "forward" in vars(module)]

    before, staged = state(), Staged(model, REQUESTS, CONTEXTS, LAST, silent)
    assert before[2] == []
    staged.stage(0)
    staged.stage(1)
    if fails:
        down = model.blocks[LAST].down
        monkeypatch.setattr(type(down), "forward", lambda *_: pytest.fail("on purpose"))
    with pytest.raises(pytest.fail.Exception, match="on purpose") if fails else nullcontext():
        staged.stage(1)
    monkeypatch.undo()
    assert state() == before


# What is missing


@pytest.mark.parametrize(
    ("spread", "shares"), [("even", (1 / 3, 1 / 2, 1)), ("root", (3**-0.5, 2**-0.5, 1)), ("full", (1, 1, 1))]
)
def test_the_residual_is_spread_over_the_layers_still_to_come(spread: str, shares: tuple[float, ...]) -> None:
    """Written in full at every stage, the shares close the gap; a share by the number of all layers does not."""
    generator = torch.Generator().manual_seed(0)
    targets, start = (torch.randn(8, 3, generator=generator) for _ in range(2))

    def left(share: Any) -> float:
        states = start
        for number in range(3):
            states = states + share(targets - states, number)
        return float((targets - states).norm() / (targets - start).norm())

    assert left(lambda missing, number: residual_share(missing, number, 3, spread)) < 1e-6
    assert left(lambda missing, number: missing / 3) > 0.2
    for number, share in enumerate(shares):
        torch.testing.assert_close(residual_share(targets, number, 3, spread), targets * share)


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
