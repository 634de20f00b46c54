"""What lies over a model's weights and acts when it is asked: the protocol, and texts that something else reads.

Knows: what every kind of overlay can do (`Laid`), and how some texts are led around the model while all others pass
through it bit for bit (`Detours`). Refuses: which texts those are and what reads them; each kind's room knows.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from editctl.engine.model import Model


@dataclass(frozen=True)
class Hit:
    """An entry of an overlay that answers a text."""

    kind: str
    edit: str
    """Id of the edit."""
    score: float
    """How sure the overlay is that the text is about the edit, 0 to 1."""
    sent: str = ""
    """The text that is really read, "" where it is the text itself."""


class Laid(Protocol):
    """All entries of one kind that lie over a model's weights."""

    def on(self) -> AbstractContextManager[None]:
        """They act for the time of `with`."""

    def hits(self, prompts: Sequence[str]) -> list[Hit | None]:
        """For each prompt the entry that answers it; None where the model does as if there were no overlay."""


@dataclass(frozen=True)
class Detour:
    """What is read in front of a text, and for which edit."""

    edit: str
    score: float
    prefix: tuple[int, ...]
    """Token ids, the start token included where the reader wants one."""


class Detours(ABC):
    """An overlay that has some texts read by something else, with more in front of them.

    A text is what the first pass over it reads: whoever goes on from its attention cache goes on with the same reader.
    The model itself reads everything too, so what passes through it has the bits it would have without the overlay.
    """

    kind: str

    def __init__(self, model: Model) -> None:
        self.model = model

    @abstractmethod
    def find(self, texts: Sequence[tuple[int, ...]]) -> list[Detour | None]:
        """For each text (token ids, start token included) its detour, or None."""

    @abstractmethod
    def read(self, ids: Tensor, keep: int) -> Tensor:
        """Logits (B × keep × vocabulary) at the last `keep` positions of ids (B × T), by whatever reads instead.

        A position that is nan keeps the model's own.
        """

    @contextmanager
    def on(self) -> Iterator[None]:
        """See `Laid`."""
        net = self.model.net
        # An attribute of the instance's own would cover the class's method for good.
        covered = "forward" in vars(net)
        self._inner = net.forward

        @functools.wraps(self._inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._passed(args, kwargs)

        net.forward = forward
        try:
            yield
        finally:
            if covered:
                net.forward = self._inner
            else:
                del net.forward

    def hits(self, prompts: Sequence[str]) -> list[Hit | None]:
        """See `Laid`."""
        texts = [tuple(self.model.encode(prompt)) for prompt in prompts]
        return [
            None if detour is None else Hit(self.kind, detour.edit, detour.score, self._sent(detour, ids))
            for ids, detour in zip(texts, self.find(texts), strict=True)
        ]

    def _sent(self, detour: Detour, ids: Sequence[int]) -> str:
        """What is read of a text, without start tokens and the like."""
        return str(self.model.tokenizer.decode([*detour.prefix, *self._own(ids)], skip_special_tokens=True)).strip()

    def _own(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A text's tokens without its start token."""
        return tuple(ids[1:] if ids and ids[0] == self.model.tokenizer.bos_token_id else ids)

    def _passed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pass through the model, the logits of some rows replaced."""
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        trail = self._trail(cache)
        begins = cache is None or (trail is None and cache.get_seq_length() == 0)
        result = self._inner(*args, **kwargs)
        if ids is None or not (begins or trail):
            return result
        mask = kwargs.get("attention_mask") if begins else None
        read = [_there(row, None if mask is None else mask[i]) for i, row in enumerate(ids.tolist())]
        if begins:
            found = self.find([tuple(tokens for _, tokens in row) for row in read])
            rows = [None if one is None else _Way(one, ()) for one in found]
        else:
            assert trail is not None
            rows = trail.rows
        ways = [
            None if way is None else replace(way, read=(*way.read, *(tokens for _, tokens in row)))
            for way, row in zip(rows, read, strict=True)
        ]
        if any(ways):
            result.logits = self._replaced(result.logits, ways, [[place for place, _ in row] for row in read], ids)
        made = getattr(result, "past_key_values", None)
        if trail is not None:
            trail.rows = ways
        elif made is not None:
            made.layers.append(_Trail(self, ways))
        return result

    @torch.no_grad()
    def _replaced(
        self, logits: Tensor, ways: Sequence[_Way | None], places: Sequence[Sequence[int]], ids: Tensor
    ) -> Tensor:
        """The logits with those of the reader in rows that have a way.

        Args:
            logits: B × K × vocabulary, of the last K of the T positions of this pass.
            places: for each row the positions of this pass that hold tokens.
            ids: B × T.
        """
        logits = logits.clone()
        first = ids.shape[1] - logits.shape[1]
        by_length: dict[int, list[int]] = {}
        texts = {}
        for i, way in enumerate(ways):
            if way is not None:
                texts[i] = [*way.detour.prefix, *self._own(way.read)]
                by_length.setdefault(len(texts[i]), []).append(i)
        wanted = [[place - first for place in row if place >= first] for row in places]
        for length, rows in by_length.items():
            # The start token's place has the logits of the prefix's last.
            most = min(max(len(wanted[i]) for i in rows), length)
            if not most:
                continue
            said = self.read(torch.tensor([texts[i] for i in rows], device=ids.device), most)
            for row, i in enumerate(rows):
                here = wanted[i][-most:]
                own = said[row, most - len(here) :].to(logits)
                logits[i, here] = torch.where(own.isnan(), logits[i, here], own)
        return logits

    def _trail(self, cache: Any) -> _Trail | None:
        """The trail that these detours left in a cache; others may have left theirs."""
        trails = (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, _Trail))
        return next((trail for trail in trails if trail.owner is self), None)


@dataclass(frozen=True)
class _Way:
    """A row's detour and what was read of its text so far."""

    detour: Detour
    read: tuple[int, ...]


class _Trail:
    """The detours of a cache's rows: a further layer of the cache, so that whatever picks rows picks these too."""

    is_sliding = False
    is_compileable = False
    is_initialized = True
    keys = values = None

    def __init__(self, owner: Detours, rows: list[_Way | None]) -> None:
        self.owner = owner
        self.rows = rows

    def reorder_cache(self, chosen: Tensor) -> None:
        """The rows with these numbers, which may be named more than once."""
        self.rows = [self.rows[i] for i in chosen.tolist()]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, times: int) -> None:
        """Every row so many times."""
        self.rows = [row for row in self.rows for _ in range(times)]

    def get_seq_length(self) -> int:
        """No tokens of its own."""
        return 0


def _there(row: Sequence[int], mask: Tensor | None) -> list[tuple[int, int]]:
    """The places of a row that hold tokens, and the tokens."""
    there = [True] * len(row) if mask is None else mask[-len(row) :].bool().tolist()
    return [(place, token) for place, (token, is_there) in enumerate(zip(row, there, strict=True)) if is_there]
