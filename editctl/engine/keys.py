"""Keys and states, block by block, as each block is written.

Knows: that the key of a place at a block is half its key in the plain prompt and half the mean over contexts (Meng et
al. 2023, eq. 19 and code) or another mixture, and that a stage resumes at the lowest block that was written since: what
lies below has not changed. Refuses: solving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.engine.passes import Beginnings, after, end, resuming, taps
from editctl.engine.prompts import Request, rows
from editctl.events import Emit

CHUNK = 64
"""Places read in one forward pass, each after every context."""


@dataclass(frozen=True)
class Stage:
    """What one block's update is solved from, in fp32 at least."""

    plain: Tensor
    """Keys in the plain prompts, d_k × n."""
    mean: Tensor
    """Mean keys over all contexts, the empty one among them, d_k × n."""
    others: Tensor
    """Mean keys over the contexts that are not empty, d_k × n; the plain ones if there are none."""
    writes: Tensor
    """Outputs of the block's down-projection in the plain prompts, d × n."""
    states: Tensor
    """Outputs of the last block in the plain prompts, d × n."""
    last_writes: Tensor
    """Outputs of the last block's down-projection in the plain prompts, d × n."""

    def keys(self, mixture: str) -> Tensor:
        """The keys an update is written at (`methods.Write.keys`), d_k × n."""
        return (self.plain + self.others) / 2 if mixture == "mixed" else self.mean


class Staged:
    """The places of a batch, each read anew only as far as a write has changed it.

    Args:
        places: for each place a request that stands there.
        last: block whose output is the state.
    """

    def __init__(self, model: Model, places: Sequence[Request], contexts: Sequence[str], last: int, emit: Emit) -> None:
        self._model, self._last, self._emit, self._contexts = model, last, emit, len(contexts)
        texts = [[r.ids[: r.lookup + 1] for r in rows(model, place, contexts)] for place in places]
        # Texts are padded to the longest of their chunk.
        self._order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
        self._texts = [texts[i] for i in self._order]
        self._parts: list[tuple[_Part, _Part | None]] = []
        self._changed: int | None = None

    def written(self, layer: int) -> None:
        """The weights of `layer` have changed."""
        self._changed = layer if self._changed is None else min(layer, self._changed)

    def stage(self, layer: int) -> Stage:
        """Keys at `layer`, and states, on the weights the model wears now."""

        def read(parts: tuple[_Part, _Part | None]) -> list[tuple[Tensor, ...]]:
            plain, others = parts
            found = plain.read(layer, self._last, self._changed)
            key, write, state, last_write = (
                found[kind]
                for kind in (("key", layer), ("write", layer), ("output", self._last), ("write", self._last))
            )
            mean = (
                key
                if others is None
                else others.read(layer, layer, self._changed)["key", layer].view(len(key), -1, key.shape[1]).mean(1)
            )
            return list(zip(key, mean, write, state, last_write, strict=True))

        def work(places: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[Tensor, ...]]:
            after = [text for place in places for text in place[1:]]
            heads = [j for place in places for j in range(1, len(place))]
            plain = _Part(self._model, [place[0] for place in places], [0] * len(places))
            parts = (plain, _Part(self._model, after, heads) if after else None)
            found = read(parts)
            self._parts.append(parts)
            return found

        if self._parts:
            found = [place for parts in self._parts for place in read(parts)]
        else:
            found = in_chunks(self._texts, CHUNK, work, self._emit, "places")
        self._changed = None
        back = torch.tensor(self._order).argsort()
        plain, others, write, state, last_write = (
            _precise(torch.stack(values))[back.to(values[0].device)].T for values in zip(*found, strict=True)
        )
        mean = (plain + (self._contexts - 1) * others) / self._contexts
        return Stage(plain, mean, others, write, state, last_write)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Part:
    """Some texts, and what enters the blocks at which a pass over them may resume."""

    def __init__(self, model: Model, texts: Sequence[tuple[int, ...]], heads: Sequence[int]) -> None:
        self._model = model
        self._beginnings = Beginnings(model, texts, heads, [len(text) - 1 for text in texts])
        self._lookups = torch.tensor([[text[-1]] for text in texts], device=model.device)
        self._inputs: dict[int, dict[str, Tensor]] = {}
        """By block: what enters it in each pass."""
        self._tuples = False

    @torch.no_grad()
    def read(self, layer: int, last: int, changed: int | None) -> dict[tuple[str, int], Tensor]:
        """What passes the last token of each text (B × width each): key and down-projection output of `layer`, block
        and down-projection output of `last`, beyond which nothing is computed.

        Args:
            changed: lowest block written since the last reading.
        """
        model = self._model
        limit = layer if changed is None else min(layer, changed)
        start = max((block for block in self._inputs if block <= limit), default=0)
        kept: dict[str, Tensor] = {}

        @contextmanager
        def around(name: str) -> Iterator[None]:
            places: dict[tuple[int, str], Callable[[Tensor], object]] = {}
            places[layer, "input"] = lambda value: kept.__setitem__(name, value)
            places[last, "output"] = end
            with self._from(start, name), taps(model, places):
                yield

        before = self._beginnings.read(around)
        window = after(before, self._lookups, torch.ones_like(self._lookups)).above(start)
        seen: dict[tuple[str, int], Tensor] = {}

        def note(kind: str, block: int) -> Callable[[Tensor], None]:
            # Falcon adds attention's output in place to what its down-projection put out.
            return lambda value: seen.__setitem__((kind, block), value.reshape(len(self._lookups), -1).clone())

        def finish(value: Tensor) -> None:
            note("output", last)(value)
            end(value)

        places = {(layer, "key"): note("key", layer), (layer, "write"): note("write", layer)}
        places |= {(last, "write"): note("write", last), (last, "output"): finish}
        places[layer, "input"] = lambda value: kept.__setitem__("last", value)
        with self._from(start, "last"), taps(model, places) as found:
            window.fill(model)
        self._tuples |= found.tuples
        self._inputs = {block: values for block, values in self._inputs.items() if block <= start}
        self._inputs[layer] = kept
        return seen

    @contextmanager
    def _from(self, start: int, name: str) -> Iterator[None]:
        """A pass that resumes at `start`."""
        with ExitStack() as stack:
            if start:
                stack.enter_context(resuming(self._model, start, self._inputs[start][name], tuples=self._tuples))
            yield


def residual_share(missing: Tensor, stage: int, stages: int, spread: str) -> Tensor:
    """R for stage 0, 1, … of `stages`: the share of what is still missing (d × n) that this block writes."""
    left = stages - stage
    shares: dict[str, float] = {"even": left, "root": left**0.5, "full": 1}
    return missing / shares[spread]
