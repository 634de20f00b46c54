"""Forward passes over many texts at once, without reading anything twice.

Knows: texts that begin alike and are read alike only once, passes that resume at a block and end at another, the head
asked only where it is needed. All of it through the model's own modules. Refuses: losses, keys, weights.

Three facts make each saving exact: a position sees only positions before it; a block's input depends only on blocks
below it; the head looks at one position at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editctl.engine.model import Model, first_tensor, with_first
from editctl.errors import ModelError

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of attention, one pair a block."""


class _Ended(Exception):
    """Ends a forward pass early; never leaves this room."""


@dataclass(frozen=True)
class Window:
    """Token ids of many rows (B × T) with what lies before them in the cache."""

    ids: Tensor
    seen: Tensor
    """B × (cached + T): 1 where a position holds a token, of the cache and of the ids."""
    positions: Tensor
    """B × T, of each token in its text."""
    cache: Cache

    def rows(self, chosen: Tensor) -> Window:
        """Only these rows (indices or mask)."""
        picked: dict[int, tuple[Tensor, Tensor]] = {}
        for keys, values in self.cache:
            if id(keys) not in picked:
                picked[id(keys)] = (keys[chosen], values[chosen])
        cache = [picked[id(keys)] for keys, _ in self.cache]
        return Window(self.ids[chosen], self.seen[chosen], self.positions[chosen], cache)

    def above(self, block: int) -> Window:
        """For passes that resume at `block`: the blocks below it are not read again, so one cache stands for theirs."""
        cache = [self.cache[0]] * block + self.cache[block:] if self.cache else []
        return Window(self.ids, self.seen, self.positions, cache)

    def call(self, model: Model) -> Tensor:
        """Logits of the model's own forward pass."""
        from transformers import DynamicCache

        cache = {"past_key_values": DynamicCache(self.cache)} if self.cache else {}
        logits: Tensor = model.net(**self._inputs(model), use_cache=bool(self.cache), **cache).logits
        return logits

    def fill(self, model: Model) -> Window:
        """What later windows follow on: the cache that a pass over this one leaves, up to where a tap ends it.

        Each row's tokens stand together at the right end, since some models (MPT, sliding windows) tell how far apart
        two tokens are by where they stand in the cache.
        """
        from transformers import DynamicCache

        # A plain cache, since a model's own may forget what lies outside a sliding window.
        cache = DynamicCache(self.cache) if self.cache else DynamicCache()
        few = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
        with suppress(_Ended):
            model.net(**self._inputs(model), use_cache=True, past_key_values=cache, **few)
        longest = int(self.seen.sum(1).max())
        order = self.seen.argsort(dim=1, stable=True)[:, -longest:]
        seen = self.seen.gather(1, order)
        # A row without tokens attends to nothing and may hold NaN, which a zero attention weight would not remove.
        there = seen.bool()[:, None, :, None]

        def moved(states: Tensor) -> Tensor:
            return torch.where(there, states.take_along_dim(order[:, None, :, None], dim=2), 0)

        pairs = [(moved(layer.keys), moved(layer.values)) if _filled(layer, self) else None for layer in cache.layers]
        # Blocks below where the pass resumed were not read; only their length is ever asked for.
        known = next(pair for pair in pairs if pair is not None)
        return Window(self.ids, seen, self.positions, [pair or known for pair in pairs])

    def _inputs(self, model: Model) -> dict[str, Any]:
        more = {"position_ids": self.positions} if "position_ids" in _parameters(model) else {}
        return {"input_ids": self.ids, "attention_mask": self.seen, **more}


def _filled(layer: Any, window: Window) -> bool:
    """Whether a pass over the window has extended this layer of the cache."""
    keys = getattr(layer, "keys", None)
    return keys is not None and keys.dim() == 4 and keys.shape[2] == window.seen.shape[1]


def _parameters(model: Model) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.net.forward).parameters


def _packed(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (B × T), padded with zeros at the right."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    there = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            ids[i, : len(row)] = torch.tensor(row)
            there[i, : len(row)] = 1
    return ids.to(device), there.to(device)


def after(before: Window | None, ids: Tensor, there: Tensor) -> Window:
    """The window of ids (B × T) that follow what `before` read; `there` is 1 where they are tokens."""
    if before is None:
        return Window(ids, there, (there.cumsum(1) - 1).clamp_min(0), [])
    positions = before.seen.sum(1, keepdim=True) + there.cumsum(1) - 1
    return Window(ids, torch.cat([before.seen, there], dim=1), positions.clamp_min(0), before.cache)


def shared_lengths(texts: Sequence[Sequence[int]], heads: Sequence[int], most: Sequence[int]) -> dict[int, int]:
    """How many tokens all texts with the same head begin with alike.

    Args:
        heads: which texts are expected to begin alike.
        most: for each text, the most tokens it may give away.
    """
    lengths: dict[int, int] = {}
    first: dict[int, Sequence[int]] = {}
    for text, head, limit in zip(texts, heads, most, strict=True):
        model_text = first.setdefault(head, text)
        length = min(lengths.get(head, limit), limit)
        alike = next((i for i in range(length) if text[i] != model_text[i]), length)
        lengths[head] = alike
    return lengths


class Beginnings:
    """The tokens before a position of many texts, read once: what texts share is read once for all of them."""

    def __init__(self, model: Model, texts: Sequence[Sequence[int]], heads: Sequence[int], ends: Sequence[int]) -> None:
        """Args:
        texts: token ids.
        heads: number of the context each text begins with.
        ends: how many tokens of each text lie before what is to be read.
        """
        self.model, device = model, model.device
        lengths = shared_lengths(texts, heads, ends)
        order = list(lengths)
        firsts = {head: texts[list(heads).index(head)] for head in order}
        ids, there = _packed([firsts[head][: lengths[head]] for head in order], device)
        self.head = after(None, ids, there) if ids.shape[1] else None
        self.picks = torch.tensor([order.index(head) for head in heads], device=device)
        own = [text[lengths[head] : end] for text, head, end in zip(texts, heads, ends, strict=True)]
        self.own_ids, self.own_there = _packed(own, device)

    def read(self, around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()) -> Window | None:
        """Read the beginnings; None if the texts have nothing before.

        Args:
            around: in what the pass over the part `head` (what is shared) or `own` (the rest) is made.
        """
        known: Window | None = None
        if self.head is not None:
            with around("head"):
                known = self.head.fill(self.model).rows(self.picks)
        if self.own_ids.shape[1]:
            own = after(known, self.own_ids, self.own_there)
            with around("own"):
                known = own.fill(self.model)
        return known


@contextmanager
def resuming(model: Model, block: int, hidden: Tensor, *, tuples: bool) -> Iterator[None]:
    """Passes start at `block` with the input `hidden` (B × T × d); the blocks below it do nothing.

    Args:
        tuples: whether the model's blocks return tuples.
    """

    def skip(*args: Any, **kwargs: Any) -> Any:
        # Only the block right below matters: what the others return is its input, which it ignores.
        return (hidden, None, None) if tuples else hidden

    modules = [b.module for b in model.blocks[:block]]
    try:
        for module in modules:
            module.forward = skip
        yield
    finally:
        for module in modules:
            del module.forward


@dataclass
class Found:
    """What taps learn about the model."""

    tuples: bool = False
    """Whether blocks return tuples; known once an `output` was tapped."""


@contextmanager
def taps(model: Model, places: Mapping[tuple[int, str], Callable[[Tensor], Any]]) -> Iterator[Found]:
    """Look at, or replace, what passes through blocks.

    Args:
        places: by (block, kind): `input` and `output` of the block, `key` (input of its down-projection), `write` (its
            output) and `attention` (what attention adds); what the function returns takes the place of an output.
    """
    found, handles = Found(), []

    def module_of(i: int, kind: str) -> nn.Module:
        block = model.blocks[i]
        if kind == "attention":
            attention = model.attention_of(i)
            if attention is None:
                raise ModelError(
                    f"what attention writes in block {i} of {model.name} was not found", "use another method"
                )
            return attention
        return block.module if kind in ("input", "output") else block.down

    # Some modules are found by a pass of their own, which no tap must see.
    modules = {place: module_of(*place) for place in places}
    for (i, kind), use in places.items():
        module = modules[i, kind]
        if kind in ("input", "key"):

            def before(_module: Any, args: tuple[Any, ...], kwargs: Any, use: Any = use) -> None:
                use(args[0] if args else kwargs["hidden_states"])

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_module: Any, _args: Any, output: Any, use: Any = use, kind: str = kind) -> Any:
                if kind == "output":
                    found.tuples = isinstance(output, tuple)
                changed = use(first_tensor(output))
                return None if changed is None else with_first(output, changed)

            handles.append(module.register_forward_hook(after))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def end(_value: Tensor) -> None:
    """A tap: nothing above is needed."""
    raise _Ended


@contextmanager
def head_at(model: Model, flat: Tensor) -> Iterator[None]:
    """The head is asked only at these positions (P, of B × T flattened): logits come as 1 × P × vocabulary."""
    head = model.net.get_output_embeddings()

    def gather(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, -2)[flat][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
