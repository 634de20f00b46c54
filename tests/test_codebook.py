"""GRACE: the published rules, values that say the target, bits beside the keys, and no edit that depends on another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import builds
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from editctl.delta import Overlay
from editctl.engine import codebook, families, methods, speak
from editctl.engine.asking import request_of
from editctl.engine.codebook import APART, Book, bounds, radii, seek, write
from editctl.engine.methods import Codebook
from editctl.engine.model import Model, load
from editctl.engine.prompts import Request, row
from editctl.engine.writing import Job
from editctl.errors import InvalidInput, ModelError
from editctl.events import Event, TargetStep, silent
from editctl.studies import sequential

LAYER = 2
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "the city of Oslo"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
)
"""Prompts and targets of different lengths."""
SHORT = tuple(
    replace(request, target=target) for request, target in zip(REQUESTS, ("London", "a", "Paris", "the"), strict=True)
)
"""Targets of one token: what a model that was never trained can be made to say."""
FAR = ("What did the fox", "The quick brown", "In the", "Oslo is the capital of Norway.")
"""Texts that are about none of them."""
EXACT = torch.finfo(torch.float64).eps


def a_job(
    model: Model,
    requests: Sequence[Request] = REQUESTS,
    layers: Sequence[int] = (LAYER,),
    emit: Any = silent,
    **own: Any,
) -> Job:
    config = {"num_hidden_layers": len(model.blocks)}
    settings = methods.settings(config, "grace", {"layers": list(layers), "value_steps": 3, **own})
    return Job(
        model=model,
        requests=requests,
        settings=settings,
        number=1,
        emit=emit,
        library=Path(),
        projector=lambda layer: None,
    )


def an_overlay(model: Model, requests: Sequence[Request] = REQUESTS, **own: Any) -> Overlay:
    overlay = write(a_job(model, requests, **own)).overlay
    assert overlay is not None
    return overlay


def by_hand(keys: Tensor, values: Tensor, targets: Sequence[str], radius: float = 0.2, layer: int = LAYER) -> Overlay:
    """An overlay whose entries are called by their numbers."""
    entries = tuple({"id": str(i), "prompt": "", "target": target} for i, target in enumerate(targets))
    return Overlay(codebook.KIND, entries, {"keys": keys, "values": values}, "", {"layer": layer, "radius": radius})


def keys_of(model: Model, ids: Sequence[int], layer: int = LAYER) -> Tensor:
    """At every position of one text, T × d_k."""
    read = torch.tensor([ids])
    return model.read(read, torch.ones_like(read), keys=[layer])[0][layer][0]


def logits_of(model: Model, text: str) -> Tensor:
    return model.net(torch.tensor([model.encode(text)]), use_cache=False).logits[0]


def put_out(model: Model, ids: Sequence[int], layer: int = LAYER) -> Tensor:
    """What the block's down-projection puts out at every position of one text, T × d."""
    seen: list[Tensor] = []

    def hook(_module: object, _args: object, output: Tensor) -> None:
        seen.append(output.reshape(len(ids), -1).clone())

    with model.hooked([(model.blocks[layer].down, "output", hook)]):
        model.net(torch.tensor([ids]), use_cache=False)
    return seen[0]


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def published(keys: Tensor, labels: Sequence[str], share: float) -> dict[int, float]:
    """Algorithm 1 and the authors' code, written out: a list of entries that grows, distances one by one."""
    book: list[dict[str, Any]] = []
    for i, key in enumerate(keys.double()):
        epsilon = share * float(key.norm())
        distances = [float((key - entry["key"]).pow(2).sum().sqrt()) for entry in book]
        smallest = min(distances, default=float("inf"))
        entry = {"key": key, "label": labels[i], "epsilon": epsilon, "edit": i}
        if not book or smallest > epsilon + book[distances.index(smallest)]["epsilon"]:
            book.append(entry)
            continue
        nearest = book[distances.index(smallest)]
        if nearest["label"] == labels[i]:
            if smallest > nearest["epsilon"]:
                nearest["epsilon"] = smallest
        else:
            nearest["epsilon"] = smallest / 2 - 1e-5
            book.append({**entry, "epsilon": smallest / 2})
    return {entry["edit"]: entry["epsilon"] for entry in book}


def some_keys(count: int = 60, width: int = 5) -> tuple[Tensor, list[str]]:
    """Keys in clusters of all densities, each with one of four labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, width, generator=generator)
    spread = torch.logspace(-2, 0, count)[:, None]
    keys = centres[torch.arange(count) % 8] + spread * torch.randn(count, width, generator=generator)
    return keys, [f"label {int(i)}" for i in torch.randint(4, (count,), generator=generator)]


def test_a_key_far_from_others_has_the_radius_of_its_norm() -> None:
    """Farther than both radii together; a hair nearer it is near."""
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([5.0, 4.0])
    own, other = 0.1 * 5, 0.1 * 41**0.5
    assert own + other < 2
    assert radii(torch.stack([first, second]), ["a", "b"], 0.1, EXACT) == pytest.approx({0: own, 1: other})
    near = 1.01 * 2 / (5 + 41**0.5)
    assert radii(torch.stack([first, second]), ["a", "b"], near, EXACT)[1] != pytest.approx(near * 41**0.5)


def test_near_and_the_same_label_the_nearest_reaches_farther() -> None:
    """The edit has no key of its own; a third within the radius changes nothing."""
    keys = torch.tensor([[10.0, 0.0], [13.0, 0.0], [12.0, 0.0]])
    assert radii(keys, ["a", "a", "a"], 0.2, EXACT) == pytest.approx({0: 3.0}, rel=1e-4)
    assert radii(keys[[0, 2]], ["a", "a"], 0.2, EXACT) == pytest.approx({0: 2.0}, rel=1e-4)
    assert len(radii(keys, ["a", "b", "a"], 0.2, EXACT)) > 1


def test_what_joined_is_reached_when_it_was_rounded_otherwise() -> None:
    """The radius grows by more than the distance, by four times the precision: half of all would be missed else."""
    keys = torch.tensor([[10.0, 0.0], [13.0, 0.0]])
    coarse = torch.finfo(torch.bfloat16).eps
    assert radii(keys, ["a", "a"], 0.2, coarse)[0] == pytest.approx(3 + 13 * 4 * coarse)
    generator = torch.Generator().manual_seed(0)
    again = keys[1].bfloat16().float() * (1 + coarse * (torch.rand(100, 2, generator=generator) - 0.5))
    ways = (again - keys[0]).norm(dim=1)
    assert bool((ways <= radii(keys, ["a", "a"], 0.2, coarse)[0]).all())
    assert not bool((ways <= 3.0).all())


def test_near_and_another_label_both_reach_half_the_way() -> None:
    """The earlier a hair less; alone each would reach farther."""
    keys = torch.tensor([[10.0, 0.0], [13.0, 0.0]])
    assert radii(keys, ["a", "b"], 0.2, EXACT) == {0: pytest.approx(1.5 * (1 - APART)), 1: 1.5}
    assert radii(keys[:1], ["a"], 0.2, EXACT) == pytest.approx({0: 2.0})
    assert radii(keys[1:], ["b"], 0.2, EXACT) == pytest.approx({0: 2.6})


def test_the_very_same_key_with_another_label_takes_the_place() -> None:
    """The later edit holds, as far as the earlier reached; with the same label the earlier stays."""
    keys = torch.tensor([[10.0, 0.0], [13.0, 0.0], [10.0, 0.0]])
    assert radii(keys, ["a", "x", "b"], 0.2, EXACT) == pytest.approx({1: 1.5, 2: 1.5 * (1 - APART)})
    assert radii(keys, ["a", "x", "a"], 0.2, EXACT) == pytest.approx({0: 1.5 * (1 - APART), 1: 1.5})


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_the_rules_are_the_published_ones(share: float) -> None:
    """On keys of all densities; with other labels or in another order they come to something else."""
    keys, labels = some_keys()
    found = radii(keys, labels, share, EXACT)
    wanted = published(keys, labels, share)
    assert list(found) == list(wanted)
    # Growing rounds up by 1e-5 of the norm, halving down by 1e-5.
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-3, abs=1e-4)
    assert published(keys, labels[1:] + labels[:1], share) != wanted
    reverse = published(keys.flip(0), labels[::-1], share)
    assert len(reverse) != len(wanted) or sorted(reverse.values()) != pytest.approx(sorted(wanted.values()), rel=1e-3)


def test_the_rules_do_not_depend_on_how_many_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, three rows of pairs at a time or all."""
    keys, labels = some_keys()
    whole = radii(keys, labels, 0.3, EXACT)
    monkeypatch.setattr(codebook, "PAIRS", 3 * len(keys))
    assert radii(keys, labels, 0.3, EXACT) == whole


def test_distances_that_a_product_loses_are_measured() -> None:
    """Of keys 1e-4 of their norm apart it takes one for another; but its bounds hold, and the nearest is found."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 400, generator=generator) + 1e-4 * torch.randn(50, 400, generator=generator)
    low, high = bounds(keys, keys)
    true = (keys.double()[:, None] - keys.double()).pow(2).sum(-1)
    assert bool((low <= true).all()) and bool((true <= high).all())
    rough = (low + high) / 2
    assert not bool((rough.argmin(1) == torch.arange(50)).all())
    book = object.__new__(Book)
    book._keys, book._radii = keys, torch.full((50,), 1e-3)
    inside, chosen, _ = book._found(keys)
    assert bool(inside.all()) and bool((chosen == torch.arange(50)).all())


@pytest.mark.parametrize("pairs", [2**22, 100])
def test_the_nearest_key_decides_even_where_another_reaches_farther(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all distances one by one say, in parts of any size; taking any key that reaches there says otherwise."""
    monkeypatch.setattr(codebook, "PAIRS", pairs)
    generator = torch.Generator().manual_seed(1)
    some, keys = torch.randn(300, 6, generator=generator), torch.randn(40, 6, generator=generator)
    book = object.__new__(Book)
    book._keys, book._radii = keys, torch.rand(40, generator=generator) * 3
    inside, chosen, score = book._found(some)
    ways = (some.double()[:, None] - keys.double()).norm(dim=-1)
    gap, nearest = ways.min(1)
    wanted = gap <= book._radii[nearest]
    assert bool((inside == wanted).all()) and 50 < int(inside.sum()) < 250
    assert bool((chosen == nearest)[inside].all())
    assert torch.allclose(score[inside].double(), (1 - gap / book._radii[nearest])[inside], atol=1e-5)
    assert not bool((inside == (ways <= book._radii).any(1)).all())


# ---------------------------------------------------------------------------------------------------------------------
# Values


def by_full_passes(model: Model, request: Request, settings: Codebook, layer: int = LAYER) -> tuple[Tensor, float]:
    """A value by the book: the whole text in every step, torch's gradient for what a hook puts in place, float64."""
    one = row(model, request, "")
    last = one.answer - 1
    value = put_out(model, one.ids[: one.answer], layer)[-1].double().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([value], lr=settings.value_rate * float(value.detach().pow(2).mean().sqrt()))

    def hook(_module: object, _args: object, output: Tensor) -> Tensor:
        flat = output.reshape(len(one.ids) - 1, -1)
        return torch.cat([flat[:last], value[None].to(flat.dtype), flat[last + 1 :]]).reshape(output.shape)

    for step in range(settings.value_steps + 1):
        with model.hooked([(model.blocks[layer].down, "output", hook)]), torch.enable_grad():
            logits = model.net(torch.tensor([one.ids[:-1]]), use_cache=False).logits[0, last:]
            loss = functional.cross_entropy(logits, torch.tensor(one.target))
        if loss <= settings.value_stop or step == settings.value_steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return value.detach(), float(loss.detach())


STEPS = Codebook(value_steps=6, value_rate=0.3, value_stop=0.0)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.id)
def test_a_value_is_that_of_full_passes(precise: Model, request_: Request) -> None:
    """Reading beginnings and lower blocks once changes nothing; another rate or one step less does."""
    key, value, loss = seek(precise, LAYER, request_, STEPS)
    wanted, said = by_full_passes(precise, request_, STEPS)
    assert off(value, wanted) < 1e-6 and loss == pytest.approx(said, rel=1e-6)
    assert off(key, keys_of(precise, precise.encode(request_.prompt))[-1]) < 1e-6
    for other in (replace(STEPS, value_rate=0.31), replace(STEPS, value_steps=5)):
        assert off(value, by_full_passes(precise, request_, other)[0]) > 1e-3


BLOCKS = ("OPT", "Falcon 7B (parallel, multi-query)", "Gemma 2", "GPT-NeoX, Pythia", "Granite")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_value_is_that_of_full_passes_in_every_kind_of_block(name: str) -> None:
    """Flattened positions, sums in place, norms behind and parallel attention; the codebook acts there too."""
    model = Model(builds.BUILDS[name].net().double(), tiny.tokenizer(bos=False), name=name)
    request = REQUESTS[2]
    key, value, _ = seek(model, 1, request, STEPS)
    assert off(value, by_full_passes(model, request, STEPS, 1)[0]) < 1e-6
    ids = model.encode(request.prompt)
    book = Book(model, by_hand(key[None], value[None], ["x"], 0.01, layer=1), Path())
    with book.on():
        there = put_out(model, ids, 1)
    assert torch.equal(there[-1], value.to(there.dtype)) and torch.equal(there[:-1], put_out(model, ids, 1)[:-1])


def said(model: Model, overlay: Overlay, requests: Sequence[Request]) -> list[bool]:
    """Whether each target is said, greedily."""
    with families.laid(model, [overlay], Path()):
        words = speak.answers(model, [request.prompt for request in requests])
    return [words.startswith(request.target) for words, request in zip(words, requests, strict=True)]


def test_values_make_the_model_say_the_target(model: Model) -> None:
    """All of them; without the codebook none, and with the values moved round others."""
    overlay = an_overlay(model, SHORT, value_rate=0.5, value_steps=50, value_stop=0.5)
    assert said(model, overlay, SHORT) == [True] * 4
    assert not any(said(model, overlay.only([]), SHORT))
    moved = {**overlay.tensors, "values": overlay.tensors["values"].roll(1, 0)}
    assert not any(said(model, replace(overlay, tensors=moved), SHORT))


def test_values_make_a_trained_model_say_targets_of_several_tokens() -> None:
    """At a block below the last; without the codebook none is said."""
    atlas = load("atlas", device="cpu")
    edits, _ = sequential.make(100, 0, 0)
    long = [request_of(edit) for edit in edits]
    long = [request for request in long if len(row(atlas, request, "").target) > 2][:3]
    overlay = an_overlay(atlas, long, layers=(5,), value_rate=0.5, value_steps=50)
    assert len(long) == 3 and said(atlas, overlay, long) == [True] * 3
    assert not any(said(atlas, overlay.only([]), long))


def test_at_the_last_block_a_value_reaches_the_first_token_alone(model: Model) -> None:
    """Whatever is put out there, the tokens behind are as likely as before; one block below they are not."""
    request, last = REQUESTS[2], len(model.blocks) - 1

    def behind(layer: int) -> Tensor:
        key, value, _ = seek(model, layer, request, replace(STEPS, value_steps=2))
        one = row(model, request, "")
        with Book(model, by_hand(key[None], value[None], ["x"], 0.01, layer=layer), Path()).on():
            return model.net(torch.tensor([one.ids])).logits[0, one.answer :]

    one = row(model, request, "")
    plain = model.net(torch.tensor([one.ids])).logits[0, one.answer :]
    assert torch.equal(behind(last), plain) and not torch.equal(behind(last - 1), plain)


def test_a_value_stops_at_the_wanted_loss(model: Model) -> None:
    """After the first step with at most the bound; what is said already is what the block puts out."""
    request, settings = SHORT[0], Codebook(value_rate=0.1, value_stop=0.0)

    def after(steps: int, stop: float = 0.0) -> tuple[Tensor, float]:
        return seek(model, LAYER, request, replace(settings, value_steps=steps, value_stop=stop))[1:]

    losses = [after(steps)[1] for steps in range(5)]
    assert losses == sorted(losses, reverse=True)
    value, loss = after(50, losses[3])
    assert loss == losses[3] and torch.equal(value, after(3)[0]) and not torch.equal(value, after(4)[0])
    own, _ = after(50, 1.01 * losses[0])
    assert off(own, put_out(model, model.encode(request.prompt))[-1]) < 1e-5
    assert off(value, own) > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# No edit depends on another


TWINS = (*REQUESTS[:2], replace(REQUESTS[2], target="Rome"), REQUESTS[3])
"""Two of the four have one target, so that with a large radius one joins the other."""
WIDE = 0.95
"""A radius at which the tiny models' keys are near each other."""


def test_a_key_and_a_value_do_not_depend_on_the_batch(model: Model) -> None:
    """Bit for bit those of the edit alone; with another target the value is another."""
    overlay = an_overlay(model)
    for i, request in enumerate(REQUESTS):
        alone = an_overlay(model, [request])
        assert all(torch.equal(alone.tensors[name][0], overlay.tensors[name][i]) for name in ("keys", "values"))
    other = an_overlay(model, [replace(REQUESTS[0], target="Oslo")])
    assert torch.equal(other.tensors["keys"][0], overlay.tensors["keys"][0])
    assert not torch.equal(other.tensors["values"][0], overlay.tensors["values"][0])


@pytest.mark.parametrize("gone", range(4))
def test_an_edit_that_goes_leaves_what_never_making_it_leaves(model: Model, gone: int) -> None:
    """Bit for bit, the entries and what the codebook does, where edits join and halve each other's radii."""
    stay = [i for i in range(4) if i != gone]
    left = an_overlay(model, TWINS, radius=WIDE).only(stay)
    never = an_overlay(model, [TWINS[i] for i in stay], radius=WIDE)
    assert left.digest() == never.digest()
    texts = [*(request.prompt for request in TWINS), *FAR]

    def read(overlay: Overlay) -> list[Tensor]:
        with Book(model, overlay, Path()).on():
            return [logits_of(model, text) for text in texts]

    assert all(torch.equal(one, other) for one, other in zip(read(left), read(never), strict=True))


def test_taking_a_key_out_of_the_opened_codebook_would_not_do(model: Model) -> None:
    """Control for the test above: the radii that the others have with an edit are not those they have without it."""
    whole = an_overlay(model, TWINS, radius=WIDE)
    reach = radii_of(Book(model, whole, Path()))
    assert 1 < len(reach) < 4
    changed = 0
    for gone in range(4):
        without = radii_of(Book(model, whole.only([i for i in range(4) if i != gone]), Path()))
        changed += without != {edit: radius for edit, radius in reach.items() if edit != TWINS[gone].id}
    assert changed >= 2


def radii_of(book: Book) -> dict[str, float]:
    return dict(zip(book._edits, book._radii.tolist(), strict=True))


def test_the_order_of_edits_decides_who_joins_whom(model: Model) -> None:
    """Control for the test above: the same edits in another order are another codebook."""
    whole = an_overlay(model, TWINS, radius=WIDE)
    forth, back = (Book(model, whole.only(order), Path()) for order in ([0, 1, 2, 3], [3, 2, 1, 0]))
    assert {*forth._edits} != {*back._edits}


# ---------------------------------------------------------------------------------------------------------------------
# Where it acts


def test_what_is_put_out_elsewhere_has_its_own_bits(model: Model) -> None:
    """At each prompt's last token the value, at all other positions what the block puts out; a text about no edit
    passes bit for bit. With a radius that holds everything none does."""
    overlay = an_overlay(model)
    book = Book(model, overlay, Path())
    for i, request in enumerate(REQUESTS):
        ids = model.encode(request.prompt)
        plain = put_out(model, ids)
        with book.on():
            there = put_out(model, ids)
        assert torch.equal(there[-1], overlay.tensors["values"][i]) and not torch.equal(there[-1], plain[-1])
        assert torch.equal(there[:-1], plain[:-1])
    before = [logits_of(model, text) for text in FAR]
    with book.on():
        assert all(torch.equal(logits_of(model, text), one) for text, one in zip(FAR, before, strict=True))
    with Book(model, replace(overlay.only([0]), settings={"layer": LAYER, "radius": 9.0}), Path()).on():
        assert not any(torch.equal(logits_of(model, text), one) for text, one in zip(FAR, before, strict=True))


def test_rows_of_a_batch_do_not_touch_each_other(model: Model) -> None:
    """A text beside one that an edit is about is read as beside itself, bit for bit, and the other as alone."""
    prompt = REQUESTS[0].prompt
    length = len(model.encode(prompt))
    ids = model.encode(" ".join(FAR))[:length]
    assert len(ids) == length
    with Book(model, an_overlay(model), Path()).on():
        mixed = model.net(torch.tensor([model.encode(prompt), ids])).logits
        alone = logits_of(model, prompt)
    plain = model.net(torch.tensor([ids, ids])).logits
    assert torch.equal(mixed[1], plain[1]) and off(mixed[0], alone) < 1e-5
    assert off(mixed[0], logits_of(model, prompt)) > 1e-2


def test_going_on_from_a_cache_gives_what_the_whole_text_gives(model: Model) -> None:
    """Cut anywhere, also right before and behind the prompt's last token; without the codebook it is another text."""
    one = row(model, REQUESTS[2], "")
    with Book(model, an_overlay(model), Path()).on():
        whole = model.net(torch.tensor([one.ids]), use_cache=False).logits[0]
        for cut in (1, one.answer - 1, one.answer, one.answer + 1):
            first = model.net(torch.tensor([one.ids[:cut]]), use_cache=True)
            rest = model.net(torch.tensor([one.ids[cut:]]), past_key_values=first.past_key_values).logits[0]
            assert off(torch.cat([first.logits[0], rest]), whole) < 1e-5
    assert off(model.net(torch.tensor([one.ids])).logits[0], whole) > 1e-2


def test_a_hit_names_the_edit_and_how_near(model: Model) -> None:
    """1 at its own prompt, less beside it, by the distance in radii; none where nothing is near. Padding is no text."""
    overlay = an_overlay(model)
    prompts = [request.prompt for request in REQUESTS]
    hits = Book(model, overlay, Path()).hits([*prompts, *FAR])
    assert [hit and hit.edit for hit in hits] == [*(request.id for request in REQUESTS), *[None] * len(FAR)]
    for hit in hits[:4]:
        assert hit is not None and hit.kind == "grace" and hit.sent == "" and hit.score == pytest.approx(1, abs=1e-4)
    near = {**overlay.tensors, "keys": overlay.tensors["keys"] * torch.tensor([1.05, 1.0, 0.9, 1.3])[:, None]}
    beside = Book(model, replace(overlay, tensors=near), Path()).hits(prompts)
    # The radius is 0.2 of the key's own norm, so 0.21 for a way of 0.05; and 0.26 for one of 0.3.
    scores = [hit.score if hit else None for hit in beside]
    assert scores[:3] == pytest.approx([1 - 0.05 / 0.21, 1, 1 - 0.1 / 0.18], abs=1e-3) and scores[3] is None
    assert Book(model, overlay.only([]), Path()).hits(prompts) == [None] * 4


def test_an_edit_that_joined_answers_as_the_one_it_joined(model: Model) -> None:
    """Its own prompt is within that one's radius, which without it would not reach so far."""
    pair = [TWINS[0], TWINS[2]]
    overlay = an_overlay(model, pair, radius=0.7)
    book = Book(model, overlay, Path())
    assert book._edits == [pair[0].id]
    hits = book.hits([request.prompt for request in pair])
    assert [hit and hit.edit for hit in hits] == [pair[0].id] * 2
    assert hits[1] is not None and 0 < hits[1].score < 0.02
    assert Book(model, overlay.only([0]), Path()).hits([pair[1].prompt]) == [None]


def test_an_empty_codebook_does_nothing(model: Model) -> None:
    """All its edits went; one that is there does something."""
    overlay = an_overlay(model, REQUESTS[:1])
    before = logits_of(model, REQUESTS[0].prompt)
    for some, same in ((overlay.only([]), True), (overlay, False)):
        with Book(model, some, Path()).on():
            assert torch.equal(logits_of(model, REQUESTS[0].prompt), before) == same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_half_precision_an_edit_is_found_in_any_company(loaded: Callable[..., Model], kind: str, dtype: str) -> None:
    """Beside longer texts and shorter ones, where its key is rounded otherwise, as is that of an edit that joined."""
    model = loaded(kind, dtype)
    overlay = an_overlay(model, TWINS)
    prompts = [request.prompt for request in TWINS]
    assert [hit and hit.edit for hit in Book(model, overlay, Path()).hits(prompts)] == [r.id for r in TWINS]
    wide = Book(model, replace(overlay.only([0, 2]), settings={"layer": LAYER, "radius": WIDE}), Path())
    assert [hit and hit.edit for hit in wide.hits(prompts)[::2]] == [TWINS[0].id] * 2
    with wide.on():
        assert torch.isfinite(logits_of(model, prompts[0])).all()


# ---------------------------------------------------------------------------------------------------------------------
# A batch


def test_a_batch_says_how_far_it_is(model: Model) -> None:
    """Each edit once, with the mean loss of those that are done; the entries are the edits in order."""
    events: list[Event] = []
    overlay = write(a_job(model, emit=events.append)).overlay
    steps = [event for event in events if isinstance(event, TargetStep)]
    assert [(step.step, step.active) for step in steps] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    losses = [seek(model, LAYER, request, Codebook(value_steps=3))[2] for request in REQUESTS]
    assert [step.loss for step in steps] == pytest.approx([sum(losses[: i + 1]) / (i + 1) for i in range(4)])
    assert overlay is not None and overlay.artifact == "" and overlay.settings["layer"] == LAYER
    assert [entry["id"] for entry in overlay.entries] == [request.id for request in REQUESTS]
    assert overlay.tensors["keys"].shape == (4, model.blocks[LAYER].weight.shape[1])
    assert overlay.tensors["values"].shape == (4, model.blocks[LAYER].weight.shape[0])


def test_two_blocks_are_refused(model: Model) -> None:
    """One is not."""
    with pytest.raises(InvalidInput, match="one block, not 2"):
        write(replace(a_job(model), settings=replace(a_job(model).settings, layers=(1, 2))))
    assert write(a_job(model, REQUESTS[:1])).overlay is not None


def test_a_model_that_computes_no_numbers_is_refused(model: Model) -> None:
    """Rather than keeping a key that nothing is near to."""

    def broken(_module: object, _args: object, output: Tensor) -> Tensor:
        return output * float("inf")

    with model.hooked([(model.blocks[0].down, "output", broken)]), pytest.raises(ModelError, match="not finite"):
        seek(model, LAYER, REQUESTS[0], STEPS)


def test_the_model_is_left_as_it_was(model: Model) -> None:
    """Weights, hooks and forward functions, also when a codebook was on while something failed."""

    def state() -> tuple[str, int, int]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.net.modules())
        return model.weights_hash(), hooks, sum("forward" in vars(m) for m in model.net.modules())

    before = state()
    overlay = an_overlay(model, REQUESTS[:1])
    assert state() == before
    with pytest.raises(KeyboardInterrupt), Book(model, overlay, Path()).on():
        assert state() != before
        raise KeyboardInterrupt
    assert state() == before
