"""Fine-tuning of one down-projection on the prompts of a batch: FT, FT-L, FT-M.

Knows: the loss, the optimiser, the bound on each entry and the projection of every step. Refuses: keys, solves.

FT and FT-L (Zhu et al. 2020, Modifying Memories; Meng et al. 2022, code) ask for every token of the target at the
prompt's last position; FT-M (KnowEdit, Zhang et al. 2024, code) is cross-entropy of the target as it is spoken. With a
null space each of Adam's steps is projected, since Adam's scaling by entry leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine.memory import in_chunks
from editctl.engine.methods import Tune
from editctl.engine.model import Model
from editctl.engine.prompts import Request, Row, row
from editctl.engine.solve import Projector
from editctl.engine.statistics import pad_right
from editctl.events import Emit, TargetStep

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 32
"""Requests in one pass; their gradients add up."""


def tune(
    model: Model,
    layer: int,
    requests: Sequence[Request],
    settings: Tune,
    *,
    projector: Projector | None,
    emit: Emit,
    batch: int,
) -> Tensor:
    """The update (d_out × d_in, fp32, on the CPU) of block `layer`'s down-projection; the weights stay as they are."""
    block = model.blocks[layer]
    start = block.weight.detach().float()
    size = start.pow(2).mean().sqrt()
    bound = settings.box * size
    rows = [row(model, request, "") for request in requests]
    change = torch.zeros_like(start)
    momentum, variance = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(settings.epochs + 1):
        gradient = torch.zeros_like(start)

        def work(part: Sequence[Row], gradient: Tensor = gradient) -> list[float]:
            losses, slope = _slope(model, layer, part, settings.objective)
            gradient += slope / len(rows)
            return losses

        with _worn(block.weight, start + change):
            losses = in_chunks(rows, CHUNK, work, emit, "requests")
        loss = sum(losses) / len(losses)
        emit(TargetStep(batch, step, loss, len(rows)))
        if loss < settings.tune_stop or step == settings.epochs:
            break
        momentum = BETAS[0] * momentum + (1 - BETAS[0]) * gradient
        variance = BETAS[1] * variance + (1 - BETAS[1]) * gradient**2
        m, v = momentum / (1 - BETAS[0] ** (step + 1)), variance / (1 - BETAS[1] ** (step + 1))
        change = change - settings.tune_rate * size * m / (v.sqrt() + EPSILON)
        if settings.box:
            change = change.clamp(-bound, bound)
        if projector is not None:
            change = projector(change)
            if settings.box:
                # Projected entries can be out of bounds again; a whole row made smaller stays projected.
                change = change * (bound / change.abs().amax(1, keepdim=True).clamp_min(bound))
    return change.cpu()


@contextmanager
def _worn(weight: Tensor, values: Tensor) -> Iterator[None]:
    """Other values in a weight for the time of `with`."""
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _slope(model: Model, layer: int, rows: Sequence[Row], objective: str) -> tuple[list[float], Tensor]:
    """Loss of every row, nats a token, and the gradient of their sum for the weight (d_out × d_in, fp32).

    The gradient is that of the down-projection's output times its input, so no parameter has to be made trainable.
    """
    ids, mask = pad_right(
        [list(r.ids[:-1]) if objective == "target" else list(r.ids[: r.answer]) for r in rows], model.device
    )
    down = model.blocks[layer].down
    seen: dict[str, Tensor] = {}

    def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["keys"], seen["push"] = args[0].detach(), torch.zeros_like(output, requires_grad=True)
        return output + seen["push"]

    with model.hooked([(down, "output", hook)]), torch.enable_grad():
        logits = model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = []
        for i, one in enumerate(rows):
            target = torch.tensor(one.target, device=model.device)
            last = one.answer - 1
            said = (
                logits[i, last : last + len(target)]
                if objective == "target"
                else logits[i, last].expand(len(target), -1)
            )
            losses.append(functional.cross_entropy(said.float(), target))
        (pushed,) = torch.autograd.grad(torch.stack(losses).sum(), seen["push"])
    keys, pushed = seen["keys"].flatten(0, -2).float(), pushed.flatten(0, -2).float()
    return [float(loss.detach()) for loss in losses], pushed.T @ keys
