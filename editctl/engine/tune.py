"""Fine-tuning of one down-projection on the prompts of a batch: FT, FT-L, FT-M, LocFT-BF.

Knows: the loss, the optimiser, the bound on each entry and the projection of every step. Refuses: keys, solves.

FT and FT-L (Zhu et al. 2020, Modifying Memories; Meng et al. 2022, code) ask for every token of the target at the
prompt's last position; FT-M (KnowEdit, Zhang et al. 2024, code) is cross-entropy of the target as it is spoken.
LocFT-BF (arXiv 2509.22072, code) is FT-M with many steps a pass, each on a few edits, and a target behind which the
text ends. With a null space each of Adam's steps is projected, since Adam's scaling by entry leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine.memory import in_chunks
from editctl.engine.methods import Tune
from editctl.engine.model import Model
from editctl.engine.prompts import Request, Row, row
from editctl.engine.solve import Projector
from editctl.engine.statistics import pad_right
from editctl.engine.writing import Job, Written
from editctl.errors import InvalidInput
from editctl.events import Emit, StageStarted, TargetStep

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 32
"""Requests in one pass; their gradients add up."""
T = TypeVar("T")


def tune(
    model: Model,
    layer: int,
    requests: Sequence[Request],
    settings: Tune,
    *,
    projector: Projector | None,
    emit: Emit,
    batch: int,
    seed: int = 0,
) -> Tensor:
    """The update (d_out × d_in, fp32, on the CPU) of block `layer`'s down-projection; the weights stay as they are.

    Args:
        seed: of the order in which minibatches are drawn.

    Raises:
        InvalidInput: the targets shall be followed by the end of the text, and the tokenizer has no token for it.
    """
    block = model.blocks[layer]
    start = block.weight.detach().float()
    size = start.pow(2).mean().sqrt()
    bound = settings.box * size
    change = torch.zeros_like(start)
    momentum, variance = torch.zeros_like(start), torch.zeros_like(start)

    def read(part: Sequence[Row]) -> tuple[list[float], Tensor]:
        gradient = torch.zeros_like(start)

        def work(rows: Sequence[Row]) -> list[float]:
            losses, slope = _slope(model, layer, rows, settings.objective)
            gradient.add_(slope / len(part))
            return losses

        with _worn(block.weight, start + change):
            return in_chunks(part, CHUNK, work, emit, "requests"), gradient

    def step(gradient: Tensor, number: int) -> None:
        nonlocal change, momentum, variance
        momentum = BETAS[0] * momentum + (1 - BETAS[0]) * gradient
        variance = BETAS[1] * variance + (1 - BETAS[1]) * gradient**2
        m, v = momentum / (1 - BETAS[0] ** number), variance / (1 - BETAS[1] ** number)
        change = change - settings.tune_rate * size * m / (v.sqrt() + EPSILON)
        if settings.box:
            change = change.clamp(-bound, bound)
        if projector is not None:
            change = projector(change)
            if settings.box:
                # Projected entries can be out of bounds again; a whole row made smaller stays projected.
                change = change * (bound / change.abs().amax(1, keepdim=True).clamp_min(bound))

    descend(rows_of(model, requests, settings), settings, read, step, seed=seed, emit=emit, batch=batch)
    return change.cpu()


def rows_of(model: Model, requests: Sequence[Request], settings: Tune) -> list[Row]:
    """What is read of the requests: prompts without context and targets, with the end of the text if they shall end.

    Raises:
        InvalidInput: the tokenizer has no token for the end of a text.
    """
    rows = [row(model, request, "") for request in requests]
    if not settings.ending:
        return rows
    end = model.tokenizer.eos_token_id
    if end is None:
        raise InvalidInput(f"the tokenizer of {model.name} has no token that ends a text", "set ending = false")
    return [replace(one, ids=(*one.ids, end)) for one in rows]


def descend(
    rows: Sequence[Row],
    settings: Tune,
    read: Callable[[Sequence[Row]], tuple[list[float], T]],
    step: Callable[[T, int], None],
    *,
    seed: int,
    emit: Emit,
    batch: int,
) -> None:
    """Pass over the rows again and again until their mean loss is below `tune_stop`, at most `epochs` times, and once
    more to tell the loss that the last pass left.

    With minibatches the loss of a pass is that of each row when it was read, as in LocFT-BF's code, and so is it that
    a minibatch whose loss is below `tune_stop` is no step.

    Args:
        read: the loss of each of some rows, nats a token, and what `step` takes, such as a gradient.
        step: moves what is tuned; given the number of the step, from 1.
    """
    generator = torch.Generator().manual_seed(seed)
    some = settings.minibatch or len(rows)
    taken = 0
    for epoch in range(settings.epochs + 1):
        order = torch.randperm(len(rows), generator=generator).tolist() if settings.minibatch else range(len(rows))
        losses: list[float] = []
        for begin in range(0, len(rows), some):
            found, slope = read([rows[i] for i in order[begin : begin + some]])
            losses += found
            if epoch < settings.epochs and sum(found) / len(found) >= settings.tune_stop:
                taken += 1
                step(slope, taken)
        loss = sum(losses) / len(losses)
        emit(TargetStep(batch, epoch, loss, len(rows)))
        if loss < settings.tune_stop:
            break


def write(job: Job) -> Written:
    """A batch by fine-tuning one down-projection."""
    (layer,), settings = job.settings.layers, job.settings.tune
    assert settings is not None
    job.emit(StageStarted("target", settings.epochs, job.number))
    update = tune(
        job.model,
        layer,
        job.requests,
        settings,
        projector=job.projector(layer),
        emit=job.emit,
        batch=job.number,
        seed=job.settings.seed,
    )
    return Written({layer: update})


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


def losses_of(model: Model, rows: Sequence[Row], objective: str) -> list[Tensor]:
    """The loss of every row, nats a token; scalars in fp32, with a gradient where the model has one."""
    ids, mask = pad_right(
        [list(r.ids[:-1]) if objective == "target" else list(r.ids[: r.answer]) for r in rows], model.device
    )
    logits = model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = []
    for i, one in enumerate(rows):
        target = torch.tensor(one.target, device=model.device)
        last = one.answer - 1
        said = (
            logits[i, last : last + len(target)] if objective == "target" else logits[i, last].expand(len(target), -1)
        )
        losses.append(functional.cross_entropy(said.float(), target))
    return losses


def _slope(model: Model, layer: int, rows: Sequence[Row], objective: str) -> tuple[list[float], Tensor]:
    """Loss of every row, nats a token, and the gradient of their sum for the weight (d_out × d_in, fp32).

    The gradient is that of the down-projection's output times its input, so no parameter has to be made trainable.
    """
    seen: dict[str, Tensor] = {}

    def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["keys"], seen["push"] = args[0].detach(), torch.zeros_like(output, requires_grad=True)
        return output + seen["push"]

    with model.hooked([(model.blocks[layer].down, "output", hook)]), torch.enable_grad():
        losses = losses_of(model, rows, objective)
        (pushed,) = torch.autograd.grad(torch.stack(losses).sum(), seen["push"])
    keys, pushed = seen["keys"].flatten(0, -2).float(), pushed.flatten(0, -2).float()
    return [float(loss.detach()) for loss in losses], pushed.T @ keys
