"""A codebook at one block: where a key is near an edit's, the block puts out that edit's value (GRACE).

Hartvigsen et al. 2023, Aging with GRACE, eq. 1 and algorithm 1: a key is what a block's down-projection reads at the
last token of an edit's prompt, a value what the down-projection shall put out there instead. Every key has a deferral
radius; at a position whose key lies within the radius of the nearest one, that one's value is put out. At a model's
last block a value decides the first token of an answer alone, since no block above carries it on to the next.

Each edit keeps a key and a value of its own, sought on the weights without any codebook, so they depend on no other
edit. Which of them serve, and how far, follows from all entries in order and is worked out when the codebook is opened:
taking one edit out gives the codebook that never had it, bit for bit. Knows: these rules, and the search for a value.
Refuses: more than one block.

Four things differ from the published code. It looks at the last token of a prompt; here every position is looked at,
so an answer does not depend on how a text is cut into passes. Its radius is absolute; here it is a share of the key's
norm, so that one setting serves all models. It compares labels by the mean of their token ids; here by their text. It
trains the value of a key on by every edit that joins it; here the value stays that of the key's own edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from editctl.delta import Overlay
from editctl.engine.memory import in_chunks
from editctl.engine.methods import Codebook
from editctl.engine.model import Model
from editctl.engine.overlay import Hit
from editctl.engine.passes import Beginnings, after, resuming, taps
from editctl.engine.prompts import Request, row
from editctl.engine.statistics import pad_right
from editctl.engine.writing import Job, Written
from editctl.errors import InvalidInput, ModelError
from editctl.events import StageStarted, TargetStep, silent

KIND = "grace"
APART = 1e-5
"""How far short of the middle a key stops that another label comes near, as a share of half the way."""
ROWS = 128
"""Prompts in one pass."""
PAIRS = 2**22
"""Most pairs of keys that are looked at at once: 16 MiB a tensor."""
COARSE = 1e-4
"""How wrong a squared distance by a matrix product may be, as a share of the squared norms. Measured in fp32: 1e-6."""


def write(job: Job) -> Written:
    """A batch as entries of the codebook at the one block of the settings.

    Raises:
        InvalidInput: the settings name more than one block.
    """
    settings, layers = job.settings.own, job.settings.layers
    assert isinstance(settings, Codebook)
    if len(layers) != 1:
        raise InvalidInput(
            f"{job.settings.method} has its codebook at one block, not {len(layers)}", "for example layers = [5]"
        )
    job.emit(StageStarted("target", len(job.requests), job.number))
    keys, values, losses = [], [], []
    for i, request in enumerate(job.requests):
        # One at a time: in a batch the bits of one would depend on the others.
        key, value, loss = seek(job.model, layers[0], request, settings)
        keys.append(key)
        values.append(value)
        losses.append(loss)
        job.emit(TargetStep(job.number, i, math.fsum(losses) / len(losses), len(job.requests) - i - 1))
    entries = tuple({"id": r.id, "prompt": r.prompt, "target": r.target} for r in job.requests)
    tensors = {"keys": torch.stack(keys), "values": torch.stack(values)}
    return Written(overlay=Overlay(KIND, entries, tensors, "", {"layer": layers[0], "radius": settings.radius}))


# ---------------------------------------------------------------------------------------------------------------------
# A key and its value


def seek(model: Model, layer: int, request: Request, settings: Codebook) -> tuple[Tensor, Tensor, float]:
    """The key (d_k) and value (d) of one edit at a block, fp32 on the CPU, and the target's NLL with it, nats a token.

    The value begins as what the down-projection puts out and follows the gradient of the target's cross-entropy,
    teacher-forced, the value being put out at the prompt's last token alone: by Adam with step `value_rate` times the
    beginning's root mean square, until the NLL is at most `value_stop`. Positions before that token, and blocks below
    the edited one, are read once.

    Raises:
        ModelError: the key is not finite.
    """
    one = row(model, request, "")
    last, device = one.answer - 1, model.device
    prompt = torch.tensor([one.ids[: one.answer]], device=device)
    key = model.read(prompt, torch.ones_like(prompt), keys=[layer])[0][layer][0, -1].float().cpu()
    if not key.isfinite().all():
        raise ModelError(f"block {layer} of {model.name} computes numbers that are not finite", "use another dtype")
    with torch.no_grad():
        begun = Beginnings(model, [one.ids], [0], [last]).read()
    ids = torch.tensor([one.ids[last:-1]], device=device)
    window, target = after(begun, ids, torch.ones_like(ids)), torch.tensor(one.target, device=device)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        # Falcon adds attention's output to this very tensor.
        return lambda value: seen.__setitem__(name, value.clone())

    places = {(layer, kind): note(kind) for kind in ("input", "write", "output")}
    with torch.no_grad(), taps(model, places) as found:
        window.call(model)
    window = window.above(layer)
    state, written = seen["input"], seen["write"]
    value = written.reshape(ids.shape[1], -1)[0].to(torch.promote_types(written.dtype, torch.float32))
    step = settings.value_rate * float(value.pow(2).mean().sqrt())

    def put(output: Tensor) -> Tensor:
        rest = output.reshape(ids.shape[1], -1)[1:]
        return torch.cat([value[None].to(rest.dtype), rest]).reshape(output.shape)

    optimizer = torch.optim.Adam([value.requires_grad_()], lr=step)
    for number in range(settings.value_steps + 1):
        with (
            torch.enable_grad(),
            taps(model, {(layer, "write"): put}),
            resuming(model, layer, state, tuples=found.tuples),
        ):
            logits = window.call(model)[0]
            loss = functional.cross_entropy(logits.to(value.dtype), target)
        said = float(loss.detach())
        if said <= settings.value_stop or number == settings.value_steps:
            break
        (value.grad,) = torch.autograd.grad(loss, value)
        optimizer.step()
    return key, value.detach().float().cpu(), said


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def bounds(some: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Between which bounds the squared distances of keys (P × d_k and n × d_k, fp32) lie, P × n each.

    By a matrix product, which is quick and loses the last digits of small distances: it says which pairs to measure.
    """
    squares = some.pow(2).sum(1, keepdim=True) + keys.pow(2).sum(1)
    rough = squares - 2 * some @ keys.T
    return rough - COARSE * squares, rough + COARSE * squares


def radii(keys: Tensor, labels: Sequence[str], share: float, precision: float) -> dict[int, float]:
    """Which edits have a key that serves, by their number, and how far it reaches (Hartvigsen et al. 2023, alg. 1).

    With ε = `share` · ‖key‖, a new key is near the nearest one before it when their distance is at most ε and that
    one's radius together. Near none, it gets the radius ε. Near one of the same label, it does not serve, and that one
    reaches as far as to it. Near one of another label, both reach half the way. The very same key with another label,
    of which the paper does not speak, takes the earlier one's place.

    Args:
        keys: of all edits in order, n × d_k, fp32.
        labels: their answers.
        precision: relative, of the numbers that the keys were computed with. Read in other company a key is another by
            rounding, and one that another reaches just as far as to would be missed half the time.
    """
    # Measured on atlas: 1.5 times the precision in bf16 and fp16, 6e-7 of the norm in fp32.
    slack = max(4 * precision, 1e-5)
    found: dict[int, float] = {}
    norms = [float(key.norm()) for key in keys]
    rows = max(1, PAIRS // max(1, len(keys)))
    for start in range(0, len(keys), rows):
        low, high = bounds(keys[start : start + rows], keys[: start + rows])
        for i in range(start, min(start + rows, len(keys))):
            own, held = share * norms[i], list(found)
            if not held:
                found[i] = own
                continue
            here = low[i - start, held], high[i - start, held]
            likely = (here[0] <= here[1].min()).nonzero().flatten().tolist()
            # One pair at a time: among others a sum might be rounded otherwise.
            way, nearest = min((float((keys[i] - keys[held[j]]).norm()), held[j]) for j in likely)
            if way > own + found[nearest]:
                found[i] = own
            elif labels[i] == labels[nearest]:
                found[nearest] = max(found[nearest], way + slack * norms[i])
            elif way:
                found[i], found[nearest] = way / 2, way / 2 * (1 - APART)
            else:
                found[i] = found.pop(nearest)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The codebook


class Book:
    """All entries of codebooks at one block (see `Laid`)."""

    def __init__(self, model: Model, overlay: Overlay, library: Path) -> None:
        """
        Args:
            library: where trained files lie; it reads none.
        """
        self._model, self._layer = model, int(overlay.settings["layer"])
        keys, values = (overlay.tensors[name].to(model.device) for name in ("keys", "values"))
        labels = [str(entry["target"]) for entry in overlay.entries]
        reach = radii(keys, labels, float(overlay.settings["radius"]), torch.finfo(model.dtype).eps)
        self._edits = [str(overlay.entries[i]["id"]) for i in reach]
        self._keys, self._values = keys[list(reach)], values[list(reach)]
        self._radii = torch.tensor(list(reach.values()), device=model.device)

    @contextmanager
    def on(self) -> Iterator[None]:
        """See `Laid`."""

        def replaced(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inside, chosen, _ = self._found(args[0].flatten(0, -2))
            flat = output.flatten(0, -2)
            return torch.where(inside[:, None], self._values[chosen].to(flat.dtype), flat).view_as(output)

        hooks = [(self._model.blocks[self._layer].down, "output", replaced)] if self._edits else []
        with self._model.hooked(hooks):
            yield

    def hits(self, prompts: Sequence[str]) -> list[Hit | None]:
        """See `Laid`; an edit whose key does not serve answers as the one that reaches as far as to it."""
        texts = [self._model.encode(prompt) for prompt in prompts]

        def work(part: Sequence[list[int]]) -> list[Hit | None]:
            ids, mask = pad_right(list(part), self._model.device)
            keys = self._model.read(ids, mask, keys=[self._layer])[0][self._layer]
            ends = mask.sum(1) - 1
            inside, chosen, score = self._found(keys[torch.arange(len(part)), ends])
            found = zip(inside.tolist(), chosen.tolist(), score.tolist(), strict=True)
            return [Hit(KIND, self._edits[at], value) if there else None for there, at, value in found]

        return in_chunks(texts, ROWS, work, silent, "prompts") if self._edits else [None] * len(prompts)

    @torch.no_grad()
    def _found(self, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For keys (P × d_k) whether one of the codebook reaches there, which, and 1 − distance / radius; P each."""
        parts = [self._measured(part) for part in torch.split(some.float(), max(1, PAIRS // len(self._keys)))]
        inside, chosen, score = (torch.cat(column) for column in zip(*parts, strict=True))
        return inside, chosen, score

    def _measured(self, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = bounds(some, self._keys)
        likely = low <= high.min(1, keepdim=True).values
        within = (likely & (low <= self._radii**2)).any(1, keepdim=True)
        rows, at = (likely & within).nonzero(as_tuple=True)
        ways = (some[rows] - self._keys[at]).norm(dim=1)
        shortest = ways.new_full((len(some),), math.inf).scatter_reduce(0, rows, ways, "amin")
        chosen = torch.zeros(len(some), dtype=torch.long, device=some.device)
        best = ways == shortest[rows]
        chosen[rows[best]] = at[best]
        reach = self._radii[chosen]
        return shortest <= reach, chosen, 1 - shortest / reach.clamp_min(1e-30)
