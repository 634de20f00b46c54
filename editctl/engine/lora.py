"""Low-rank adapters of down-projections, trained through peft on the prompts of a batch.

Knows: how peft's layers stand in for the model's own while they are trained, and how fast each of their matrices may
move. Refuses: to leave anything of them in the model; losses and passes are those of `tune`.

LoRA (Hu et al. 2022, eq. 3): W + B A, A drawn at random and B zero, so that the update begins at nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.engine.prompts import Row
from editctl.engine.tune import BETAS, CHUNK, EPSILON, descend, losses_of, rows_of
from editctl.engine.writing import Job, Written
from editctl.errors import InvalidInput, ModelError
from editctl.events import StageStarted

NAME = "editctl"
"""What the adapter is called within peft."""


def write(job: Job) -> Written:
    """A batch by training an adapter of rank `rank` on each block's down-projection, all of them at once.

    The update of a block is (B, A), d_out × rank and rank × d_in; with a null space A is projected at the end.

    Raises:
        InvalidInput: peft is not installed, or a setting asks for what an adapter cannot do.
        ModelError: peft knows no adapter for the model's linear maps.
    """
    model, settings, layers = job.model, job.settings.tune, job.settings.layers
    assert settings is not None
    if settings.box:
        raise InvalidInput("lora cannot bound the entries of its update", "leave box away, or use ft-l")
    rows = rows_of(model, job.requests, settings)
    job.emit(StageStarted("target", settings.epochs, job.number))
    seed = job.settings.seed + len(job.earlier)
    with adapted(model, layers, settings.rank, seed) as adapters:
        pairs = [_matrices(adapter) for adapter in adapters]
        parameters = [matrix for pair in pairs for matrix in pair]
        groups = []
        for layer, (a, b) in zip(layers, pairs, strict=True):
            weight, a_size = _rms(model.blocks[layer].weight), _rms(a)
            groups += [
                {"params": [a], "lr": settings.tune_rate * a_size},
                {"params": [b], "lr": settings.tune_rate * weight / (a_size * settings.rank**0.5)},
            ]
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON)

        def read(part: Sequence[Row]) -> tuple[list[float], list[Tensor]]:
            total = [torch.zeros_like(matrix) for matrix in parameters]

            def work(some: Sequence[Row]) -> list[float]:
                with torch.enable_grad():
                    losses = losses_of(model, some, settings.objective)
                    slopes = torch.autograd.grad(torch.stack(losses).sum(), parameters)
                for held, slope in zip(total, slopes, strict=True):
                    held.add_(slope / len(part))
                return [float(loss.detach()) for loss in losses]

            return in_chunks(part, CHUNK, work, job.emit, "requests"), total

        def step(slopes: list[Tensor], _number: int) -> None:
            for matrix, slope in zip(parameters, slopes, strict=True):
                matrix.grad = slope
            optimizer.step()

        descend(rows, settings, read, step, seed=seed, emit=job.emit, batch=job.number)
        updates = {}
        for layer, adapter, (a, b) in zip(layers, adapters, pairs, strict=True):
            left, right = (b.detach() * adapter.scaling[NAME]).float().cpu(), a.detach().float().cpu()
            projector = job.projector(layer)
            updates[layer] = (left, right if projector is None else projector(right))
    return Written(updates)


@contextmanager
def adapted(model: Model, layers: Sequence[int], rank: int, seed: int) -> Iterator[list[Any]]:
    """peft's layers in place of the blocks' down-projections for the time of `with`, in the order of the blocks.

    They are drawn on the CPU, so that every device draws alike; nobody else's random numbers change.

    Raises:
        InvalidInput: peft is not installed.
        ModelError: peft knows no adapter for one of the maps.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InvalidInput("lora needs peft", "pip install 'editctl[lora]'") from None
    blocks = [model.blocks[layer] for layer in layers]
    # peft replaces what it adapts within what it is given, and marks it: a list of the maps, never the model.
    held = nn.ModuleList([block.down for block in blocks])
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(len(held))], fan_in_fan_out=blocks[0].transposed
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, held, NAME)
    except ValueError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(f"peft cannot adapt the down-projections of {model.name}: {reason}", "use ft-m") from error
    adapters: list[Any] = list(held)
    for adapter in adapters:
        for part in (adapter.lora_A[NAME], adapter.lora_B[NAME]):
            # Steps of 1 % are lost in the 8 bits of a bf16 number.
            part.to(torch.promote_types(part.weight.dtype, torch.float32))
    try:
        for block, adapter in zip(blocks, adapters, strict=True):
            _put(model, block.down_name, adapter)
        yield adapters
    finally:
        for block in blocks:
            _put(model, block.down_name, block.down)


def _put(model: Model, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.net.get_submodule(parent), leaf, module)


def _matrices(adapter: Any) -> tuple[Tensor, Tensor]:
    """A (rank × d_in) and B (d_out × rank) of an adapter."""
    return adapter.lora_A[NAME].weight, adapter.lora_B[NAME].weight


def _rms(matrix: Tensor) -> float:
    return float(matrix.detach().float().pow(2).mean().sqrt())
