"""Target vectors: batched, cached and freezing as it is, the optimiser does what one plain loop a group does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import builds
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional

from editctl.engine.methods import TargetSettings
from editctl.engine.model import Model
from editctl.engine.passes import Window
from editctl.engine.prompts import Group, Request, groups
from editctl.engine.target import Target, optimise
from editctl.events import Event, TargetStep, silent

LAYER = 2
TOWER = "The Eiffel Tower"
CONTEXTS = ("", "The dog ran away. ", "The dog sat. ", "Because of the river and the old road. ")
REQUESTS = (
    Request("tower", "{} is located in the city of", TOWER, "Rome"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "the city of Oslo"),
    Request("the", "{} is", "The", "a"),
)
"""Subjects of one and of many tokens, at the start and in the middle, followed by a space, 's and a comma."""
SETTINGS = TargetSettings(steps=10, rate=0.5, clamp=1.5, decay=0.02, kl=0.0625, stop=0.0)


# The plain way


@dataclass(frozen=True)
class Ended:
    """Where a group stops."""

    change: Tensor
    steps: int
    nll: float
    """Of the new facts."""


@dataclass(frozen=True)
class Naive:
    """What each step led to, and what follows from it for any rule of stopping."""

    size: float
    """‖h₀‖."""
    path: tuple[tuple[Tensor, ...], ...]
    """The changes of all parts before each step and after the last."""
    losses: tuple[tuple[float, ...], ...]
    """NLL of every fact, likewise."""
    right: tuple[bool, ...]
    """Whether every target token was the most probable one, likewise."""
    new: int

    def ended(self, settings: TargetSettings) -> Ended:
        """The first state that may stop, or the last."""
        limits = [settings.stop] * self.new
        limits += [max(settings.stop, first + settings.stop) for first in self.losses[0][self.new :]]
        confirmed = 0
        for step, losses in enumerate(self.losses):
            confirmed += self.right[step]
            if all(loss < limit for loss, limit in zip(losses, limits, strict=True)):
                break
            if settings.confirm and confirmed >= settings.confirm:
                break
        return Ended(self.path[step][-1].float(), step, sum(losses[: self.new]) / self.new)


@dataclass(frozen=True)
class Parts:
    """What is changed."""

    modules: tuple[nn.Module, ...]
    """Those whose outputs are changed; the last one's change is the target."""
    origin: nn.Module
    """The one whose output is h₀, that the changes are relative to."""


def parts(model: Model, layer: int = LAYER, site: str = "block") -> Parts:
    block = model.blocks[layer]
    if site == "mlp":
        attention = model.attention_of(layer)
        assert attention is not None
        return Parts((attention, block.down), block.module)
    changed = block.down if model.response(layer).kind == "normed" else block.module
    return Parts((changed,), changed)


@cache
def naive(
    model: Model,
    group: Group,
    settings: TargetSettings,
    contexts: tuple[str, ...] = CONTEXTS,
    *,
    at: Parts | None = None,
    shift: int = 0,
    most: int = 3,
) -> Naive:
    """One group by the book, all steps: full sequences, no padding, no cache, torch's own Adam.

    Args:
        shift: tokens by which the change is misplaced, for controls.
        most: facts and kept answers for which there is room and time.
    """
    net, encode, at = model.net, model.tokenizer.encode, at or parts(model)
    several = min(len(group.facts) + len(group.kept), most)

    def logits(ids: list[int], place: int, changes: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Logits of all positions, and h₀ at `place` before the changes were added there."""
        seen: list[Tensor] = []

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden.reshape(len(ids), -1)[place].detach().clone())

        def push(module: nn.Module, _args: Any, output: Any) -> Any:
            if changes is None:
                return None
            hidden, part = output[0] if isinstance(output, tuple) else output, at.modules.index(module)
            one = torch.zeros(len(ids), 1, dtype=hidden.dtype)
            one[place + shift] = 1
            hidden = hidden + (one * changes[part]).view_as(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles = [at.origin.register_forward_hook(look)]
        handles += [module.register_forward_hook(push) for module in at.modules]
        try:
            return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0], seen[0]
        finally:
            for handle in handles:
                handle.remove()

    spoken = []
    for fact in (*group.facts, *group.kept):
        before, after = fact.template.split("{}")
        rows = []
        for context in ("",) if fact in group.kept else contexts:
            whole = encode(f"{context}{before}{fact.subject}{after} {fact.target}")
            last = len(encode(f"{context}{before}{fact.subject}")) - 1
            rows.append((whole, last, len(encode(f"{context}{before}{fact.subject}{after}"))))
        spoken.append(rows)
    bare, bare_last = encode(f"{group.subject} is a"), len(encode(group.subject)) - 1
    with torch.no_grad():
        calm = logits(bare, bare_last, None)[0][bare_last].log_softmax(-1)
        origin = logits(*spoken[0][0][:2], None)[1]
    size, room = origin.norm(), settings.clamp * origin.norm() * several**0.5
    changes = [torch.zeros_like(origin, requires_grad=True) for _ in at.modules]
    rate = settings.rate if settings.published else float(settings.rate * size / len(origin) ** 0.5)
    adam = torch.optim.Adam(changes, lr=rate)
    path, trace, right = [], [], []
    for step in range(several * settings.steps + 1):
        losses, missed = [], False
        for rows in spoken:
            loss = torch.zeros((), dtype=torch.float64)
            for ids, last, start in rows:
                said, wanted = logits(ids, last, changes)[0][start - 1 : -1], torch.tensor(ids[start:])
                loss = loss + functional.cross_entropy(said, wanted) / len(rows)
                missed |= bool((said.argmax(-1) != wanted).any())
            losses.append(loss)
        path.append(tuple(d.detach().clone() for d in changes))
        trace.append(tuple(float(loss.detach()) for loss in losses))
        right.append(not missed)
        if step == several * settings.steps:
            break
        now = logits(bare, bare_last, changes)[0][bare_last].log_softmax(-1)
        total: Any = sum(losses) + settings.kl * functional.kl_div(calm, now, log_target=True, reduction="sum")
        for d in changes:
            total = total + settings.decay * (d.norm() / size**2 if settings.published else (d.norm() / size) ** 2)
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            for d in changes:
                if d.norm() > room:
                    d *= room / d.norm()
    return Naive(float(size), tuple(path), tuple(trace), tuple(right), group.new)


def alone(request: Request) -> Group:
    return Group(request.subject, (request,), 1)


def batched(model: Model, settings: TargetSettings, contexts: Sequence[str] = CONTEXTS) -> list[Target]:
    return optimise(model, LAYER, groups(REQUESTS), contexts, settings, emit=silent)


def off(found: Any, wanted: Any) -> float:
    """Relative distance of two results."""
    return float((found.change - wanted.change).norm() / wanted.change.norm().clamp_min(1e-30))


def assert_agree(found: Sequence[Any], wanted: Sequence[Any], tolerance: float = 1e-6) -> None:
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert off(one, other) <= tolerance, f"group {i} is off by {off(one, other):.1e}"
        assert one.steps == other.steps, f"group {i} took {one.steps} steps, not {other.steps}"


def between(values: Iterator[float]) -> list[float]:
    """Halfway between neighbours that lie apart, so that rounding decides nothing."""
    return [(low + high) / 2 for low, high in itertools.pairwise(sorted(set(values))) if high - low > 1e-3]


def parting(full: Sequence[Naive], settings: TargetSettings) -> TargetSettings:
    """The settings with the stop at which the most different numbers of steps are seen."""

    def endings(stop: float) -> set[int]:
        return {one.ended(replace(settings, stop=stop)).steps for one in full} - {0}

    stops = between(losses[0] for one in full for losses in one.losses)
    return replace(settings, stop=max(stops, key=lambda stop: len(endings(stop))))


@pytest.fixture
def reference(precise: Model) -> tuple[TargetSettings, list[Ended]]:
    """Settings under which some requests stop early and some do not, and each request by the book."""
    full = [naive(precise, alone(request), SETTINGS) for request in REQUESTS]
    settings = parting(full, SETTINGS)
    return settings, [one.ended(settings) for one in full]


# One fact a subject


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
        assert one.nll == pytest.approx(other.nll, rel=1e-6)


def test_a_float64_model_is_asked_in_float64_throughout(loaded: Any) -> None:
    """The loss agrees to twelve digits: no share of a mean passes through a shorter type, as in a float32 model."""
    settings, contexts = replace(SETTINGS, steps=0), CONTEXTS[:3]
    for kind, digits in (("float64", 1e-12), ("float32", 1e-4)):
        found = optimise(loaded("gpt2", kind), LAYER, groups(REQUESTS), contexts, settings, emit=silent)
        wanted = [naive(loaded("gpt2", "float64"), alone(request), settings, contexts) for request in REQUESTS]
        errors = [abs(one.nll / other.losses[0][0] - 1) for one, other in zip(found, wanted, strict=True)]
        assert max(errors) < digits and (max(errors) > 1e-9) == (kind == "float32")


def test_a_batch_agrees_with_the_same_optimiser_on_each_request_alone(precise: Model, reference: Any) -> None:
    """Who else is in the batch does not matter, nor in which order."""
    settings, _ = reference
    single = [optimise(precise, LAYER, groups([r]), CONTEXTS, settings, emit=silent)[0] for r in REQUESTS]
    assert_agree(batched(precise, settings), single)
    turned = optimise(precise, LAYER, groups(REQUESTS[::-1]), CONTEXTS, settings, emit=silent)
    assert_agree(turned[::-1], single)


def test_without_freezing_the_vectors_differ(precise: Model, reference: Any) -> None:
    """Control: a request that should have stopped but went on is far off, by more than a thousandth."""
    settings, wanted = reference
    never = batched(precise, replace(settings, stop=0.0))
    early = [i for i, one in enumerate(wanted) if one.steps < settings.steps]
    assert early and all(off(never[i], wanted[i]) > 1e-3 for i in early)
    with pytest.raises(AssertionError):
        assert_agree(never, wanted)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_change_at_the_wrong_position_gives_other_vectors(precise: Model, shift: int) -> None:
    """Control: one token off and no request agrees."""
    settings, requests = replace(SETTINGS, steps=2), [r for r in REQUESTS if " " in r.subject]
    right = optimise(precise, LAYER, groups(requests), CONTEXTS, settings, emit=silent)
    for request, one in zip(requests, right, strict=True):
        other = naive(precise, alone(request), settings, shift=shift).ended(settings)
        assert off(other, one) > 1e-3


@pytest.mark.parametrize(
    "change",
    [{"kl": 0.0}, {"decay": 0.0}, {"clamp": 0.3}, {"rate": 0.45}, {"published": True}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_takes_part(loaded: Any, change: dict[str, Any]) -> None:
    """Control: with any one setting changed in the reference alone, the agreement breaks."""
    model, group, plain = loaded("llama", "float64"), alone(REQUESTS[2]), replace(SETTINGS, steps=4)
    found = optimise(model, LAYER, [group], CONTEXTS, plain, emit=silent)
    assert_agree(found, [naive(model, group, plain).ended(plain)])
    with pytest.raises(AssertionError):
        assert_agree(found, [naive(model, group, replace(plain, **change)).ended(plain)])


@pytest.mark.parametrize("change", [{"published": False}, {"decay": 0.0}, {"rate": 0.03}], ids=str)
def test_published_settings_are_those_of_the_papers_code(loaded: Any, change: dict[str, Any]) -> None:
    """An absolute rate and a decay by ‖δ‖ / ‖h₀‖², not its square; with another setting the agreement breaks."""
    model, group = loaded("llama", "float64"), alone(REQUESTS[2])
    settings = replace(SETTINGS, published=True, rate=0.05, decay=2.0, steps=4)
    found = optimise(model, LAYER, [group], CONTEXTS, settings, emit=silent)
    assert_agree(found, [naive(model, group, settings).ended(settings)])
    with pytest.raises(AssertionError):
        assert_agree(found, [naive(model, group, replace(settings, **change)).ended(settings)])


def test_a_subject_at_the_first_position_needs_no_prefix(loaded: Any) -> None:
    """In GPT-2, which has no start token, a one-token subject opens the prompt and nothing lies before it."""
    model, request, settings = loaded("gpt2", "float64"), REQUESTS[1], replace(SETTINGS, steps=5)
    assert model.subject_last(request.prompt, 0, len(request.subject)) == 0
    found = optimise(model, LAYER, groups([request]), ("",), settings, emit=silent)
    assert_agree(found, [naive(model, alone(request), settings, ("",)).ended(settings)])
    elsewhere = naive(model, alone(request), settings, ("",), shift=1).ended(settings)
    assert off(found[0], elsewhere) > 1e-3


def test_more_requests_than_a_chunk_holds_give_the_same(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks bound the memory, not the result."""
    model, settings = loaded("llama", "float64"), replace(SETTINGS, steps=4)
    whole = batched(model, settings)
    monkeypatch.setattr("editctl.engine.target.CHUNK", 2)
    assert_agree(batched(model, settings), whole)


def test_a_change_never_leaves_its_ball(precise: Model) -> None:
    """‖δ‖ ≤ clamp · ‖h₀‖, and with a fast rate the bound is reached; no clamp would let it out."""
    settings = replace(SETTINGS, rate=2.0, clamp=0.5, steps=6)
    sizes = [naive(precise, alone(request), replace(settings, steps=0)).size for request in REQUESTS]

    def assert_held(moved: Sequence[Target]) -> None:
        for size, one in zip(sizes, moved, strict=True):
            assert 0.4 < float(one.change.norm()) / size <= 0.5 + 1e-6

    assert_held(batched(precise, settings))
    with pytest.raises(AssertionError):
        assert_held(batched(precise, replace(settings, clamp=5.0)))


# Architectures


CAPPED = replace(
    builds.BUILDS["Gemma 2"],
    settings=builds.BUILDS["Gemma 2"].settings
    | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 20},
)
KINDS = {
    **{name: builds.BUILDS[name] for name in ("GPT-J", "OPT", "BLOOM", "MPT", "Granite", "Cohere")},
    **{name: build for name, build in builds.BUILDS.items() if name.startswith("Falcon")},
    "Gemma 2": CAPPED,
}
"""Attention beside the MLP, flattened positions, ALiBi from the mask and from the cache, factors on what a block and
the head put out, one and several key heads, norms and caps; some texts are longer than Gemma's window."""
COARSE = {"BLOOM": 1e-5, "MPT": 1e-5}
"""These compute attention in float32 whatever the type of the weights."""


@cache
def build(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return Model(KINDS[name].net().to(dtype), tiny.tokenizer(bos=False), name=name)


@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_agrees(name: str) -> None:
    """With its own heads, positions and norms, and subjects that stop at different steps; one token off none does."""
    model, requests, contexts = build(name), REQUESTS[:3], CONTEXTS[:3]
    settings = replace(SETTINGS, steps=3)
    full = [naive(model, alone(r), settings, contexts, at=parts(model, 1)) for r in requests]
    settings = parting(full, settings)
    wanted = [one.ended(settings) for one in full]
    assert len({one.steps for one in wanted}) > 1
    found = optimise(model, 1, groups(requests), contexts, settings, emit=silent)
    assert_agree(found, wanted, COARSE.get(name, 1e-6))
    last = next(i for i in (2, 0, 1) if wanted[i].steps)
    shifted = naive(model, alone(requests[last]), settings, contexts, at=parts(model, 1), shift=1)
    assert off(shifted.ended(settings), wanted[last]) > 1e-3


def test_what_passes_a_norm_is_changed_before_it() -> None:
    """In Gemma 2 δ goes through the norm that follows the down-projection; added after it, it is another vector."""
    model, group, settings = build("Gemma 2"), alone(REQUESTS[2]), replace(SETTINGS, steps=3)
    down, module = model.blocks[1].down, model.blocks[1].module
    assert model.response(1).kind == "normed"
    found = optimise(model, 1, [group], CONTEXTS, settings, emit=silent)
    assert_agree(found, [naive(model, group, settings, at=Parts((down,), down)).ended(settings)])
    assert off(found[0], naive(model, group, settings, at=Parts((module,), module)).ended(settings)) > 1e-3


def test_caps_on_logits_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the cap that Gemma 2 puts on its logits the vectors are others."""
    model, group, settings = build("Gemma 2"), alone(REQUESTS[2]), replace(SETTINGS, steps=3)
    capped = optimise(model, 1, [group], CONTEXTS, settings, emit=silent)
    monkeypatch.setattr(model.net.config, "final_logit_softcapping", None)
    assert off(optimise(model, 1, [group], CONTEXTS, settings, emit=silent)[0], capped[0]) > 1e-3


@pytest.mark.parametrize("name", ["GPT-J", "Gemma 2"])
@pytest.mark.parametrize("site", ["block", "mlp"])
def test_the_last_block_can_be_changed(name: str, site: str) -> None:
    """Above it nothing but the head is asked; only the token after the subject can then be changed."""
    model, settings = build(name), replace(SETTINGS, steps=3)
    requests = [
        Request("a", "People see {}", "The Eiffel Tower", "Rome"),
        Request("b", "{}", "Ada Lovelace", "is long"),
    ]
    found = optimise(model, 2, groups(requests), CONTEXTS[:3], settings, emit=silent, site=site)
    at = parts(model, 2, site)
    assert_agree(found, [naive(model, alone(r), settings, CONTEXTS[:3], at=at).ended(settings) for r in requests])
    assert off(found[0], naive(model, alone(requests[0]), settings, CONTEXTS[:3], at=at, shift=-1).ended(settings)) > 1


# The MLP's output with attention's beside it


@pytest.mark.parametrize("name", ["gpt2", "llama", "Falcon 7B (parallel, multi-query)", "Gemma 2"])
def test_two_changes_are_sought_and_the_mlps_is_returned(loaded: Any, name: str) -> None:
    """Attention's (PMET) is another vector, but where both stand side by side; so is the MLP's sought alone."""
    model = build(name) if name in KINDS else loaded(name, "float64")
    settings = replace(SETTINGS, steps=5, clamp=0.8)
    at = parts(model, 1, "mlp")
    full = [naive(model, alone(r), settings, CONTEXTS[:3], at=at) for r in REQUESTS[:3]]
    settings = parting(full, settings)
    wanted = [one.ended(settings) for one in full]
    assert len({one.steps for one in wanted}) > 1
    found = optimise(model, 1, groups(REQUESTS[:3]), CONTEXTS[:3], settings, emit=silent, site="mlp")
    assert_agree(found, wanted)
    longest = max(range(3), key=lambda i: wanted[i].steps)
    attention = full[longest].path[wanted[longest].steps][0]
    distance = float((found[longest].change - attention).norm() / attention.norm())
    assert (distance > 0.1) == ("parallel" not in name)
    mlp = Parts(at.modules[1:], at.origin)
    single = naive(model, alone(REQUESTS[longest]), settings, CONTEXTS[:3], at=mlp).ended(settings)
    assert off(single, wanted[longest]) > 1e-3


def test_each_of_two_changes_is_held_in_a_ball(loaded: Any) -> None:
    """Both balls are measured by what the block puts out."""
    model, settings = loaded("llama", "float64"), replace(SETTINGS, rate=2.0, clamp=0.5, steps=4)
    found = optimise(model, 1, groups(REQUESTS), CONTEXTS, settings, emit=silent, site="mlp")
    for request, one in zip(REQUESTS, found, strict=True):
        size = naive(model, alone(request), replace(settings, steps=0), at=parts(model, 1, "mlp")).size
        assert 0.4 < float(one.change.norm()) / size <= 0.5 + 1e-6


# Several facts of one subject

NEW = (
    Request("tower", "{} is located in the city of", TOWER, "Rome", (("{} stands near", "the road"),)),
    Request("ada", "In the summer, {} was built by", "Ada Lovelace", "a machine"),
    Request("sees", "People see {}", TOWER, "London"),
)
EARLIER = (
    Request("built", "Because of the river {} was", TOWER, "built", (("The roof of {}'s house is", "quick"),)),
    Request("road", "{} is", "Rome", "long"),
)


@pytest.fixture
def family(precise: Model) -> tuple[TargetSettings, list[Group], list[Naive]]:
    """A subject with two new facts, an earlier one and two kept answers, and one of a single fact."""
    settings, found = replace(SETTINGS, steps=3, clamp=0.6), groups(NEW, EARLIER)
    return settings, found, [naive(precise, group, settings) for group in found]


def test_facts_of_one_subject_share_a_vector_that_a_plain_joint_loop_finds(precise: Model, family: Any) -> None:
    """The loss is the sum over facts of the mean over contexts; a subject of one fact beside it is not disturbed."""
    settings, found, full = family
    assert [len(group.facts) + len(group.kept) for group in found] == [5, 1]
    wanted = [one.ended(settings) for one in full]
    sought = optimise(precise, LAYER, found, CONTEXTS, settings, emit=silent)
    assert_agree(sought, wanted)
    for one, other in zip(sought, wanted, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-6)


def test_every_fact_takes_part_in_the_shared_vector(precise: Model, family: Any) -> None:
    """Control: without a new fact, the earlier one or a kept answer, or with kept ones in contexts, it is another."""
    settings, (group, _), (full, _) = family
    settings = replace(settings, steps=1)
    found = optimise(precise, LAYER, [group], CONTEXTS, settings, emit=silent)
    assert float((found[0].change - full.path[3][-1]).norm() / found[0].change.norm()) < 1e-6
    others = [
        replace(group, facts=group.facts[1:], new=1),
        replace(group, facts=group.facts[:2]),
        replace(group, kept=group.kept[1:]),
        replace(group, facts=group.facts + group.kept, kept=()),
    ]
    for other in others:
        assert off(naive(precise, other, settings).ended(settings), found[0]) > 1e-4


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_vector_for_several_facts_has_more_room_and_time(loaded: Any, family: Any, most: int) -> None:
    """Up to three times the steps and √3 of the radius; with those of another number it is another vector."""
    settings, (group, single), _ = family
    model = loaded("llama", "float64")
    found = optimise(model, LAYER, [single, group], CONTEXTS, settings, emit=silent)
    assert [one.steps for one in found] == [settings.steps, 3 * settings.steps]
    size = naive(model, group, settings).size
    assert 0.7 * settings.clamp * 3**0.5 < float(found[1].change.norm()) / size <= settings.clamp * 3**0.5 + 1e-6
    assert off(naive(model, group, settings, most=most).ended(settings), found[1]) > 1e-3
    assert_agree(found[:1], [naive(model, single, settings, most=most).ended(settings)])


@pytest.mark.parametrize("kind", ["earlier", "kept"])
def test_a_group_goes_on_while_what_was_there_is_worse_than_it_was(kind: str) -> None:
    """New facts end below the stop, the others at most the stop above where they began; a rule for new facts alone
    would have ended before, and one that lets nothing get worse would have gone on."""
    net = builds.BUILDS["GPT-2"].net().double()
    with torch.no_grad():
        # A model that is sure of what it says has something to lose.
        net.transformer.ln_f.weight.mul_(4)
    model = Model(net, tiny.tokenizer(bos=False), name="sure")
    new, old = Request("new", "People see {}", TOWER, "I"), Request("old", "You see {}", TOWER, "city")
    group = Group(TOWER, (new, old), 1) if kind == "earlier" else Group(TOWER, (new,), 1, (old,))
    settings, contexts = replace(SETTINGS, steps=5, clamp=4.0), CONTEXTS[:2]
    full = naive(model, group, settings, contexts, at=parts(model, 1))
    first = full.losses[0][1]

    def ending(stop: float, limit: float) -> int:
        meets = (i for i, (new, old) in enumerate(full.losses) if new < stop and old < limit)
        return next(meets, len(full.losses) - 1)

    stops = between(limit for new, old in full.losses for limit in (new, old, old - first) if limit > 0)
    careless = [s for s in stops if ending(s, float("inf")) < ending(s, max(s, first + s)) < len(full.losses) - 1]
    strict = [s for s in stops if ending(s, max(s, first)) > ending(s, max(s, first + s)) > 0]
    assert careless and strict, "something that was there must be worse for a while"
    for stop in (careless[0], careless[-1], strict[0], strict[-1]):
        settings = replace(settings, stop=stop)
        found = optimise(model, 1, [group], contexts, settings, emit=silent)
        assert_agree(found, [full.ended(settings)])
        assert found[0].steps == ending(stop, max(stop, first + stop))


@pytest.mark.parametrize("confirm", [1, 3])
def test_a_group_stops_when_its_words_have_been_the_most_probable_often_enough(precise: Model, confirm: int) -> None:
    """In every context and at every position; without the rule, or with one more confirmation, it goes on."""
    requests = (
        Request("tower", "People see {}", TOWER, "London"),
        Request("ada", "I think of {}", "Ada", "the"),
        Request("rome", "{} is located in the city of", "Rome", "Paris"),
    )
    settings = replace(SETTINGS, steps=8, clamp=4.0, confirm=confirm)
    full = [naive(precise, alone(r), replace(settings, confirm=0)) for r in requests]
    wanted = [one.ended(settings) for one in full]
    found = optimise(precise, LAYER, groups(requests), CONTEXTS, settings, emit=silent)
    assert_agree(found, wanted)
    stopped = [i for i, one in enumerate(wanted) if one.steps < settings.steps]
    assert stopped and len({one.steps for one in wanted}) > 1
    for i in stopped:
        assert full[i].ended(replace(settings, confirm=confirm + 1)).steps > wanted[i].steps
        assert full[i].ended(replace(settings, confirm=0)).steps == settings.steps


# Which facts are sought together


def fact(id: str, template: str = "{} is", subject: str = "Rome", target: str = "x", **more: Any) -> Request:
    return Request(id, template, subject, target, **more)


def test_facts_are_grouped_by_subject_in_order_of_first_mention() -> None:
    """New facts in their order, then the earlier ones of the same subject; other subjects' earlier facts stay out."""
    new = [fact("a"), fact("b", subject="Oslo"), fact("c", "The {} was")]
    earlier = [fact("d", "A {}"), fact("e", subject="Paris"), fact("f", "I like {}")]
    found = groups(new, earlier)
    assert [(g.subject, [f.id for f in g.facts], g.new) for g in found] == [
        ("Rome", ["a", "c", "d", "f"], 2),
        ("Oslo", ["b"], 1),
    ]


def test_facts_can_be_kept_apart() -> None:
    """Each by itself, whatever its subject, with nothing earlier and nothing kept."""
    new = [fact("a", keep=(("{} was", "old"),)), fact("b", "The {} was")]
    found = groups(new, [fact("c", "A {}")], joint=False)
    assert found == [Group("Rome", (new[0],), 1), Group("Rome", (new[1],), 1)]


def test_a_prompt_that_is_written_anew_is_earlier_no_more() -> None:
    """Nor is its own answer kept; of two earlier facts with one prompt the last one holds."""
    new = [fact("new", target="Oslo")]
    earlier = [fact("old", target="Paris"), fact("first", "A {}", target="y"), fact("second", "A {}", target="z")]
    (found,) = groups(new, earlier)
    assert [f.id for f in found.facts] == ["new", "second"]


def test_an_answer_stays_unless_its_prompt_is_a_fact() -> None:
    """Whichever fact asks for it to stay, once each; what is replaced asks for nothing."""
    keep = (("{} was", "old"), ("{} is", "Paris"), ("The {} was", "long"))
    new = [fact("a", target="Oslo", keep=keep), fact("b", "In {} is", keep=(("{} was", "old"), ("Here {} was", "new")))]
    earlier = [fact("c", "The {} was", keep=(("So {} was", "good"),)), fact("d", keep=(("But {} was", "bad"),))]
    (found,) = groups(new, earlier)
    assert [(f.template, f.subject, f.target) for f in found.kept] == [
        ("{} was", "Rome", "old"),
        ("Here {} was", "Rome", "new"),
        ("So {} was", "Rome", "good"),
    ]


def test_places_are_the_different_beginnings_of_new_facts() -> None:
    """Facts that differ only after the subject share a place; an earlier fact has none."""
    new = [fact("a"), fact("b", "{} was"), fact("c", "In {} is"), fact("d", "In {} was")]
    (found,) = groups(new, [fact("e", "So {} is")])
    assert found.places == ("Rome", "In Rome")


# What it costs, and what it leaves


@contextmanager
def counting(model: Model) -> Iterator[dict[int | str, int]]:
    """Positions that pass each block's down-projection and the head."""
    counts: dict[int | str, int] = {}

    def count(name: int | str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + output.shape[:-1].numel()

        return hook

    hooks: list[tuple[nn.Module, str, Any]] = [(b.down, "output", count(i)) for i, b in enumerate(model.blocks)]
    with model.hooked([*hooks, (model.net.get_output_embeddings(), "output", count("head"))]):
        yield counts


def head_everywhere(model: Model, flat: Tensor) -> AbstractContextManager[None]:
    """What `passes.head_at` gives, wastefully."""
    head = model.net.get_output_embeddings()
    return model.hooked([(head, "output", lambda _module, _args, output: output.flatten(0, -2)[flat][None])])


@pytest.mark.parametrize("control", ["", "resuming", "head_at"])
def test_a_step_reads_only_what_it_can_change(precise: Model, monkeypatch: pytest.MonkeyPatch, control: str) -> None:
    """Blocks above the changed one, tokens from the subject's last to the target's last but one, the head where a
    target or the KL is; with passes that begin at the first block, or a head asked everywhere, it is more."""
    requests, contexts, encode = REQUESTS[:3], CONTEXTS[:3], precise.encode
    # What it has to know of the model is measured once.
    precise.response(LAYER)
    if control == "resuming":
        monkeypatch.setattr("editctl.engine.target.resuming", lambda *_, **__: nullcontext())
    elif control == "head_at":
        monkeypatch.setattr("editctl.engine.target.head_at", head_everywhere)

    def counted(steps: int) -> dict[int | str, int]:
        with counting(precise) as counts:
            optimise(precise, LAYER, groups(requests), contexts, replace(SETTINGS, steps=steps), emit=silent)
        return counts

    few, many = counted(1), counted(3)
    more = {name: many[name] - few[name] for name in few}
    lengths = [len(encode(f"{r.prompt} {r.target}")) for r in requests]
    width = max(n - len(encode(r.place)) for n, r in zip(lengths, requests, strict=True))
    answers = sum(n - len(encode(r.prompt)) for n, r in zip(lengths, requests, strict=True))
    # A bare subject has a row of its own where no prompt begins with it.
    rows = len(requests) * len(contexts) + sum(not r.template.startswith("{}") for r in requests)
    lean: dict[int | str, int] = {
        **dict.fromkeys(range(LAYER + 1), 0),
        **dict.fromkeys(range(LAYER + 1, len(precise.blocks)), 2 * rows * width),
        "head": 2 * (len(contexts) * answers + len(requests)),
    }
    assert (more == lean) == (not control)


def test_steps_are_told_as_they_happen(precise: Model, reference: Any) -> None:
    """One event a step with the mean over subjects, finished ones as they ended, and how many are still at work."""
    told: list[Event] = []
    settings, wanted = reference
    optimise(precise, LAYER, groups(REQUESTS), CONTEXTS, settings, emit=told.append, batch=3)
    full = [naive(precise, alone(request), SETTINGS) for request in REQUESTS]
    assert len(told) == settings.steps + 1
    for step, event in enumerate(told):
        assert isinstance(event, TargetStep)
        losses = [one.losses[min(step, end.steps)][0] for one, end in zip(full, wanted, strict=True)]
        assert event.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        # At the last step nothing more is done, but what is not below the stop counts as active.
        active = sum(end.steps > step or end.nll >= settings.stop for end in wanted)
        assert (event.batch, event.step, event.active) == (3, step, active)


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("fails", [False, True])
def test_optimising_leaves_the_model_as_it_was(
    precise: Model, monkeypatch: pytest.MonkeyPatch, site: str, fails: bool
) -> None:
    """Its weights, hooks and forward passes, also when it fails in the middle of a step."""

    def state() -> tuple[str, list[int], list[nn.Module]]:
        modules = list(precise.net.modules())
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
        return precise.weights_hash(), hooks, [module for module in modules if "forward" in vars(module)]

    before = state()
    assert before[2] == []
    steps = replace(SETTINGS, steps=2)
    if fails:
        passes, call = iter(range(100)), Window.call

        def broken(window: Window, model: Model) -> Tensor:
            # The first pass reads what no step changes.
            assert next(passes) < 2, "on purpose"
            return call(window, model)

        monkeypatch.setattr(Window, "call", broken)
    with pytest.raises(AssertionError, match="on purpose") if fails else nullcontext():
        optimise(precise, LAYER, groups(REQUESTS), CONTEXTS, steps, emit=silent, site=site)
    assert state() == before


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_bfloat16_the_change_is_near_that_of_float32(loaded: Any, kind: str) -> None:
    """It is finite and in float32; that of another request is not near."""
    settings, requests = replace(SETTINGS, steps=4, stop=1.0, rate=0.2), REQUESTS[:4]
    coarse, fine = (
        optimise(loaded(kind, dtype), LAYER, groups(requests), CONTEXTS, settings, emit=silent)
        for dtype in ("bfloat16", "float32")
    )
    for one in coarse:
        assert one.change.dtype == torch.float32 and bool(one.change.isfinite().all()) and one.nll < 100
    near = [float(functional.cosine_similarity(a.change, b.change, dim=0)) for a, b in zip(coarse, fine, strict=True)]
    other = [
        float(functional.cosine_similarity(a.change, b.change, dim=0))
        for a, b in zip(coarse, fine[1:] + fine[:1], strict=True)
    ]
    assert min(near) > 0.9, near
    assert max(other) < 0.9, other
