"""Forward passes that share, resume and end early give what whole passes give, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import builds
import pytest
import tiny
import torch
from torch import Tensor, nn

from editctl.engine import passes
from editctl.engine.model import Model
from editctl.engine.passes import Beginnings, Window, after, head_at, resuming, shared_lengths, taps

KINDS = ("gpt2", "llama", "GPT-J", "OPT", "MPT", "Falcon RW (sequential, ALiBi)", "Mistral", "GPT-Neo")
"""Places told by the mask, by ids of positions, by rotation, and by where a token stands in the cache."""
COARSE = {"GPT-J": 1e-6, "MPT": 1e-6, "GPT-Neo": 1e-6}
"""These compute something of attention in float32 whatever the type of the weights."""
WINDOW = {"Mistral": {"sliding_window": 12}, "GPT-Neo": {"window_size": 12}}
"""Shorter than the longest text, so that it matters which tokens are near."""


@cache
def build(name: str) -> Model:
    found = builds.BUILDS[name]
    made = builds.Build(**{**vars(found), "settings": found.settings | WINDOW.get(name, {})})
    return Model(made.net().double(), tiny.tokenizer(bos=False), name=name)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, loaded: Any) -> Model:
    """Each kind in float64."""
    name: str = request.param
    model: Model = loaded(name, "float64") if name in ("gpt2", "llama") else build(name)
    return model


def texts(seed: int = 0) -> tuple[list[list[int]], list[int], list[int]]:
    """Token ids, number of the beginning, and how many tokens lie before what is read.

    Two beginnings of 6 and 4 tokens, each shared by three texts that go on differently; two texts with none to share,
    of which one begins with what is read.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> list[int]:
        return torch.randint(2, builds.SIZE, (n,), generator=generator).tolist()

    long, short = some(6), some(4)
    bodies = [(long, 5), (long, 0), (long, 2), (short, 7), (short, 1), (short, 3), ([], 3), ([], 0)]
    found = [[*head, *some(n)] for head, n in bodies]
    return (
        [[*begun, *some(4 - i % 3)] for i, begun in enumerate(found)],
        [0, 0, 0, 1, 1, 1, 2, 2],
        list(map(len, found)),
    )


def rest_of(rows: Sequence[Sequence[int]], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What follows the beginnings, padded at the right, and where it is."""
    rests = [torch.tensor(row[end:]) for row, end in zip(rows, ends, strict=True)]
    there = [torch.ones_like(rest) for rest in rests]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(rests), pad(there)


@torch.no_grad()
def whole(model: Model, row: Sequence[int], end: int) -> Tensor:
    """Logits of one text from `end` on, in one plain pass."""
    logits: Tensor = model.net(input_ids=torch.tensor([row]), use_cache=False).logits
    return logits[0, end:]


@torch.no_grad()
def rested(model: Model, rows: Sequence[Sequence[int]], heads: Sequence[int], ends: Sequence[int]) -> list[Tensor]:
    """Logits of the rests, all texts at once, beginnings read once."""
    ids, there = rest_of(rows, ends)
    before = Beginnings(model, rows, heads, ends).read()
    logits = after(before, ids, there).call(model)
    return [logits[i, : int(there[i].sum())] for i in range(len(rows))]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# What texts share


@pytest.mark.parametrize(
    ("rows", "heads", "most", "lengths"),
    [
        (["abcd", "abxy"], [0, 0], [4, 4], {0: 2}),
        (["abcd", "abcd"], [0, 0], [3, 4], {0: 3}),
        (["abcd", "abcd", "xbcd"], [0, 0, 0], [3, 4, 2], {0: 0}),
        (["abcd", "xy", "abce", "xyz"], [0, 1, 0, 1], [4, 1, 4, 2], {0: 3, 1: 1}),
        (["ab", "abcd"], [0, 0], [2, 4], {0: 2}),
        (["ab", "abcd"], [0, 0], [0, 4], {0: 0}),
        (["abcd"], [5], [3], {5: 3}),
    ],
)
def test_what_texts_of_one_head_begin_with_alike(
    rows: list[str], heads: list[int], most: list[int], lengths: dict[int, int]
) -> None:
    """Up to the first difference, and never more than any of them may give away."""
    assert shared_lengths([list(map(ord, row)) for row in rows], heads, most) == lengths


@pytest.mark.parametrize("share", [True, False])
def test_what_texts_share_is_read_once(model: Model, share: bool) -> None:
    """As many positions pass the first block as there are heads and what each text has of its own; read as if each
    text had a head of its own, they are as many as all beginnings together."""
    rows, heads, ends = texts()
    read: list[int] = []
    hook = (model.blocks[0].down, "output", lambda _m, _a, out: read.append(out.shape[:-1].numel()))
    with model.hooked([hook]), torch.no_grad():
        before = Beginnings(model, rows, heads if share else range(len(rows)), ends).read()
    # Padding counts: heads of 6, 4 and 0 tokens in one pass; 7 own tokens at most in another.
    assert read == ([3 * 6, 8 * 7] if share else [8 * 11])
    # What follows looks back on no more than the longest of them.
    assert before is not None and before.seen.shape == (8, 11)
    assert {states.shape[2] for pair in before.cache for states in pair} == {11}


def test_beginnings_that_all_share_are_read_in_one_row(model: Model) -> None:
    """A context before many prompts is one row of work; nothing of it is left to each."""
    rows, read = [[5, 6, 7, 8 + i] for i in range(20)], []
    hook = (model.blocks[0].down, "output", lambda _m, _a, out: read.append(out.shape[:-1].numel()))
    with model.hooked([hook]), torch.no_grad():
        before = Beginnings(model, rows, [0] * 20, [3] * 20).read()
    assert read == [3]
    assert before is not None and before.seen.tolist() == [[1, 1, 1]] * 20


def test_texts_with_nothing_before_need_no_reading(model: Model) -> None:
    """There is no window to follow on."""
    assert Beginnings(model, [[3, 4], [5]], [0, 0], [0, 0]).read() is None


# Parts of passes against whole ones


def test_beginnings_read_once_lead_to_the_logits_of_whole_texts(kind: Model) -> None:
    """However ragged they are, and whatever stands in the padding; also where a text has no beginning."""
    rows, heads, ends = texts()
    tolerance = COARSE.get(kind.name, 1e-12)
    found = rested(kind, rows, heads, ends)
    for row, end, logits in zip(rows, ends, found, strict=True):
        assert off(logits, whole(kind, row, end)) < tolerance
    for row, head, end, logits in zip(rows, heads, ends, found, strict=True):
        (alone,) = rested(kind, [row], [head], [end])
        assert off(logits, alone) < tolerance
    wrong = rested(kind, rows, heads, ends[1:] + ends[:1])
    assert off(wrong[0][:1], found[0][:1]) > 1e-3, "another end must lead elsewhere"


def with_padding(before: Window, at: int, filler: float) -> Window:
    """The same beginnings with three more positions that hold no token, before cached position `at`."""

    def wider(states: Tensor, value: float) -> Tensor:
        pad = torch.full_like(states[:, :, :3], value)
        return torch.cat([states[:, :, :at], pad, states[:, :, at:]], dim=2)

    seen = wider(before.seen[:, None, :, None], 0)[:, 0, :, 0]
    cache = [(wider(keys, filler), wider(values, filler)) for keys, values in before.cache]
    return Window(before.ids, seen, before.positions, cache)


@pytest.mark.parametrize(
    ("name", "minds"), [("MPT", True), ("Mistral", True), ("GPT-Neo", True), ("OPT", False), ("GPT-J", False)]
)
def test_tokens_must_not_stand_apart_in_the_cache(name: str, minds: bool) -> None:
    """Control: with padding between what was read and what follows, models that tell distances by place are wrong;
    padding before it all disturbs none."""
    model, (rows, heads, ends) = build(name), texts()
    ids, there = rest_of(rows, ends)
    with torch.no_grad():
        before = Beginnings(model, rows, heads, ends).read()
        assert before is not None
        wanted = after(before, ids, there).call(model)[there.bool()]
        outside, between = (
            after(with_padding(before, at, 0.0), ids, there).call(model)[there.bool()]
            for at in (0, before.seen.shape[1])
        )
    assert off(outside, wanted) < 1e-6
    assert (off(between, wanted) > 1e-3) == minds


def poisoned(model: Model, window: Window) -> AbstractContextManager[Any]:
    """NaN comes out of every block at positions that attend to nothing."""
    nothing = (window.seen.cumsum(1) == 0)[:, -window.ids.shape[1] :]
    assert bool(nothing.any())

    def spoil(hidden: Tensor) -> Tensor:
        return torch.where(nothing[..., None], torch.nan, hidden.view(*nothing.shape, -1)).view_as(hidden)

    return taps(model, {(i, "output"): spoil for i in range(len(model.blocks))})


def test_not_a_number_where_a_text_has_no_beginning_stays_there(model: Model) -> None:
    """Attention over nothing may give NaN, and zero times NaN is NaN: left in the cache it would spread."""
    rows, heads, ends = texts()
    ids, there = rest_of(rows, ends)
    beginnings = Beginnings(model, rows, heads, ends)
    assert beginnings.head is not None
    with torch.no_grad():
        head = beginnings.head.fill(model).rows(beginnings.picks)
        windows = {"head": beginnings.head, "own": after(head, beginnings.own_ids, beginnings.own_there)}
        before = beginnings.read(lambda name: poisoned(model, windows[name]))
        assert before is not None
        found = after(before, ids, there).call(model)[there.bool()]
        left = after(with_padding(before, 0, torch.nan), ids, there).call(model)
    wanted = torch.cat([whole(model, row, end) for row, end in zip(rows, ends, strict=True)])
    assert off(found, wanted) < 1e-5
    assert not bool(left.isfinite().all())


@pytest.mark.parametrize("block", [1, 2])
def test_a_resumed_pass_ends_like_the_whole_one(kind: Model, block: int) -> None:
    """Given what enters the block; what is read below does not matter, what enters does."""
    rows, heads, ends = texts()
    ids, there = rest_of(rows, ends)
    with torch.no_grad():
        window = after(Beginnings(kind, rows, heads, ends).read(), ids, there)
        entered: list[Tensor] = []
        with taps(kind, {(block, "input"): entered.append, (block, "output"): lambda _: None}) as found:
            wanted = window.call(kind)
        other = Window(torch.full_like(ids, 7), window.seen, window.positions, window.cache).above(block)
        with resuming(kind, block, entered[0], tuples=found.tuples):
            assert off(other.call(kind), wanted) < 1e-12
        with resuming(kind, block, 1.01 * entered[0], tuples=found.tuples):
            assert off(other.call(kind), wanted) > 1e-6
        assert off(other.call(kind), wanted) > 1e-3


def test_the_head_asked_at_some_positions_says_what_it_says_at_all(kind: Model) -> None:
    """In float64 to twelve digits, each position's own, whatever the head does after its product."""
    rows, heads, ends = texts()
    ids, there = rest_of(rows, ends)
    flat = torch.tensor([5, 0, 17, 5, ids.numel() - 1])
    with torch.no_grad():
        window = after(Beginnings(kind, rows, heads, ends).read(), ids, there)
        wanted = window.call(kind).flatten(0, 1)
        with head_at(kind, flat):
            found = window.call(kind)
    assert found.shape == (1, len(flat), wanted.shape[1])
    assert off(found[0], wanted[flat]) < 1e-12
    assert off(found[0], wanted[flat + torch.tensor([1, 1, 1, 1, -1])]) > 1e-3


def test_only_the_rows_chosen_go_on(model: Model) -> None:
    """By index or by mask, with what lies before them."""
    rows, heads, ends = texts()
    ids, there = rest_of(rows, ends)
    with torch.no_grad():
        window = after(Beginnings(model, rows, heads, ends).read(), ids, there)
        logits = window.call(model)
        mask = torch.tensor([i in (1, 4, 7) for i in range(len(rows))])
        for chosen in (mask, mask.nonzero()[:, 0]):
            assert off(window.rows(chosen).call(model), logits[mask]) < 1e-5
        assert off(window.rows(~mask).call(model)[:3], logits[mask]) > 1e-3


# Taps


def test_taps_see_what_passes_a_block(kind: Model) -> None:
    """Its input and output, its key and what is made of it; the output of one block is the input of the next."""
    rows, _, _ = texts()
    ids, seen = torch.tensor([rows[0]]), dict[tuple[int, str], Tensor]()

    def note(place: tuple[int, str]) -> Callable[[Tensor], None]:
        return lambda value: seen.__setitem__(place, value.clone())

    places = [(0, "output"), (1, "input"), (1, "output"), (1, "key"), (1, "write"), (1, "attention")]
    with torch.no_grad(), taps(kind, {place: note(place) for place in places}):
        kind.net(input_ids=ids, use_cache=False)
    assert torch.equal(seen[0, "output"].view(-1), seen[1, "input"].view(-1))
    block = kind.blocks[1]
    made = seen[1, "key"] @ block.weight.T
    bias = getattr(block.down, "bias", None)
    assert off(made if bias is None else made + bias, seen[1, "write"]) < 1e-12
    # In all of these kinds a block adds to its input what attention and the MLP write, however they are arranged.
    gained = (seen[1, "output"] - seen[1, "input"]).view_as(seen[1, "attention"])
    assert off(seen[1, "attention"] + seen[1, "write"].view_as(gained), gained) < 1e-12
    assert off(seen[1, "write"].view_as(gained), gained) > 1e-3


def test_what_a_tap_returns_takes_the_outputs_place(kind: Model) -> None:
    """What is pushed into the attention, the MLP and the block reaches the logits, by the same push alike."""
    rows, _, _ = texts()
    ids = torch.tensor([rows[0]])
    push = torch.randn(builds.WIDTH, generator=torch.Generator().manual_seed(1)).double()

    def logits(block: int, kind_: str) -> Tensor:
        with torch.no_grad(), taps(kind, {(block, kind_): lambda value: value + push}):
            result: Tensor = kind.net(input_ids=ids, use_cache=False).logits
            return result

    plain = whole(kind, rows[0], 0)[None]
    pushed = logits(1, "output")
    assert off(pushed, plain) > 1e-2
    assert off(logits(1, "write"), pushed) < 1e-12
    assert off(whole(kind, rows[0], 0)[None], plain) == 0


def test_a_tap_can_end_a_pass(model: Model) -> None:
    """What is above does no work, and the cache below is what a whole pass leaves."""
    rows, _, _ = texts()
    ids, called = torch.tensor([rows[0]]), []
    hooks = [(b.down, "output", lambda _m, _a, _o, i=i: called.append(i)) for i, b in enumerate(model.blocks)]
    window = after(None, ids, torch.ones_like(ids))
    with torch.no_grad(), model.hooked(hooks):
        with taps(model, {(1, "output"): passes.end}):
            short = window.fill(model)
        assert called == [0, 1]
        full = window.fill(model)
        assert called == [0, 1, 0, 1, 2, 3]
    assert len(full.cache) == 4
    for found, wanted in zip(short.cache[:2], full.cache, strict=False):
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


# What is left behind


def ways(model: Model) -> dict[str, AbstractContextManager[Any]]:
    """Everything that reaches into the model."""
    kinds = ("input", "output", "key", "write", "attention")
    return {
        "resuming": resuming(model, 2, torch.zeros(1, 3, 32), tuples=False),
        "taps": taps(model, {(i, kind): lambda _: None for i in range(4) for kind in kinds}),
        "head_at": head_at(model, torch.tensor([0])),
    }


@pytest.mark.parametrize("way", ["resuming", "taps", "head_at"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_in_the_model(model: Model, way: str, fails: bool) -> None:
    """Neither hooks nor forward passes of its modules, also when something fails inside; inside there are some."""

    def reached() -> int:
        modules = list(model.net.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)

    # transformers leaves hooks of its own once it was asked for hidden states.
    before, wanted = reached(), whole(model, [3, 4, 5], 0)
    try:
        with ways(model)[way]:
            assert reached() - before == {"resuming": 2, "taps": 20, "head_at": 1}[way]
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert reached() == before
    assert torch.equal(whole(model, [3, 4, 5], 0), wanted)


def test_a_place_that_is_not_found_leaves_no_taps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were asked for beside it are not hung either."""
    monkeypatch.setattr(Model, "attention_of", lambda *_: None)
    before = [len(module._forward_hooks) for module in model.net.modules()]
    with (
        pytest.raises(Exception, match="attention writes in block 1"),
        taps(model, {(0, "output"): print, (1, "attention"): print}),
    ):
        pytest.fail("must not be entered")
    assert [len(module._forward_hooks) for module in model.net.modules()] == before
