"""The plain path: what the engine does, done as the references do it, one request and one whole pass at a time.

Knows: full forward passes of every prompt up to the logits of every position, all blocks, no cache, no batching over
requests, keys read anew for every block and again for the history, the normal equations solved as they stand (Fang et
al. 2025, code). It is what `study runtime` measures the engine against, and what it checks the engine's results with.
Refuses: savings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from editctl.engine.methods import Settings
from editctl.engine.model import Model, first_tensor, with_first
from editctl.engine.prompts import Request, Row, rows, subject_row
from editctl.engine.solve import Projector
from editctl.engine.statistics import Moment, pad_right


def target(model: Model, layer: int, request: Request, contexts: Sequence[str], settings: Settings) -> Tensor:
    """δ of one request (d): Adam on the whole model, every prompt in one padded batch."""
    texts, bare = rows(model, request, contexts), subject_row(model, request.subject)
    ids, mask = pad_right([list(text.ids) for text in (*texts, bare)], model.device)
    lookups = torch.tensor([text.lookup for text in (*texts, bare)], device=model.device)
    everyone = torch.arange(len(lookups), device=model.device)
    labels = torch.full(ids.shape, -100, device=model.device)
    for i, text in enumerate(texts):
        labels[i, text.answer - 1 : len(text.ids) - 1] = torch.tensor(text.target, device=model.device)
    seen: list[Tensor] = []
    delta = torch.zeros(model.blocks[layer].weight.shape[0], device=model.device, requires_grad=True)

    def push(_module: nn.Module, _args: object, output: Any) -> Any:
        hidden = first_tensor(output)
        seen.append(hidden[0, lookups[0]].detach().float())
        change = torch.zeros_like(hidden)
        change[everyone, lookups] = delta.to(hidden.dtype)
        return with_first(output, hidden + change)

    options = settings.target
    optimiser: torch.optim.Adam | None = None
    calm = size = torch.zeros(0)
    with model.hooked([(model.blocks[layer].module, "output", push)]):
        for step in range(options.steps + 1):
            logits = model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            per_token = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
            )
            counted = (labels != -100).sum(1)[:-1]
            nll = (per_token.view(labels.shape).sum(1)[:-1] / counted).mean()
            new = logits[-1, bare.lookup].log_softmax(-1)
            if optimiser is None:
                calm, size = new.detach(), seen[0].norm()
                optimiser = torch.optim.Adam([delta], lr=float(options.rate * size / len(delta) ** 0.5))
            if float(nll.detach()) < options.stop or step == options.steps:
                break
            drift = (new.exp() * (new - calm)).sum()
            loss = nll + options.kl * drift + options.decay * ((delta / size) ** 2).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                delta *= (options.clamp * size / delta.norm().clamp_min(1e-30)).clamp_max(1)
    return delta.detach()


@torch.no_grad()
def key(model: Model, layer: int, request: Request, contexts: Sequence[str]) -> Tensor:
    """Key of one request at `layer` (d_k): a whole pass over its whole prompts."""
    keys = _read(model, rows(model, request, contexts), model.blocks[layer].down, "input")
    return (keys[0] + keys[1:].mean(0)) / 2


@torch.no_grad()
def state(model: Model, last: int, request: Request) -> Tensor:
    """State of one request's plain prompt at block `last` (d): another whole pass."""
    return _read(model, rows(model, request, ("",)), model.blocks[last].module, "output")[0]


def _read(model: Model, texts: Sequence[Row], module: nn.Module, kind: str) -> Tensor:
    found: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        found.append(first_tensor(output) if kind == "output" else args[0])

    ids, mask = pad_right([list(text.ids) for text in texts], model.device)
    with model.hooked([(module, kind, note)]):
        model.net(input_ids=ids, attention_mask=mask, use_cache=False)
    return found[0][torch.arange(len(texts)), [text.lookup for text in texts]].float()


def update(keys: Tensor, residuals: Tensor, moment: Moment, settings: Settings) -> Tensor:
    """D (d × d_k) of an AlphaEdit batch without history, from d_k equations (Fang et al. 2025, code)."""
    assert settings.null_space is not None
    width = keys.shape[0]
    project = Projector(moment, settings.null_space, keys.device)
    projection = project(torch.eye(width, device=keys.device))
    system = projection @ (keys @ keys.T) + settings.ridge.l2 * moment.scale * torch.eye(width, device=keys.device)
    transposed: Tensor = torch.linalg.solve(system, projection @ keys @ residuals.T)
    return transposed.T


@contextmanager
def written(model: Model) -> Iterator[Callable[[int, Tensor], None]]:
    """Updates may be written to blocks; the weights are as before afterwards."""
    base: dict[int, Tensor] = {}

    def write(layer: int, change: Tensor) -> None:
        weight = model.blocks[layer].weight
        base.setdefault(layer, weight.detach().clone())
        with torch.no_grad():
            weight += change.to(weight.dtype)

    try:
        yield write
    finally:
        with torch.no_grad():
            for layer, weight in base.items():
                model.blocks[layer].weight.copy_(weight)
