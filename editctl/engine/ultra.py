"""UltraEdit: updates solved from one gradient, normalised by what every edit so far had.

Knows: the inputs and gradients of down-projections at the tokens of a batch, their running statistics and the ridge
problem. Refuses: subjects, second moments of a corpus, a second step.

UltraEdit (arXiv 2505.14679, eq. 6 to 8, code). At every token h is the input of a down-projection and g the gradient
of the edits' loss for its output; ĥ and ĝ are h and g less their mean over the tokens of all batches so far, over their
standard deviation. With the values v = −η ‖ĥ‖² ĝ as rows of V and the h of this batch as rows of H the update is
Dᵀ = (HᵀH + ρ I)⁻¹ HᵀV.

Three things differ from the published code, which has absolute numbers and modules chosen for each model: η is a share
of the root mean square of what the block puts out and ‖ĥ‖² is taken per entry; ρ is a share of the mean squared norm of
the inputs; and every block has statistics of its own, where the code has those of blocks of one shape in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from editctl.engine.memory import in_chunks
from editctl.engine.methods import Normalised
from editctl.engine.model import Model
from editctl.engine.prompts import Row, row
from editctl.engine.solve import Projector
from editctl.engine.statistics import precise_device
from editctl.engine.tune import CHUNK, losses_of
from editctl.engine.writing import Job, Update, Written
from editctl.errors import InvalidInput, StoreError
from editctl.events import StageStarted, TargetStep


@dataclass(frozen=True)
class Seen:
    """What the tokens so far were like at one block: inputs (d_in) and gradients (d_out), one behind the other."""

    count: int
    """Tokens."""
    mean: Tensor
    """Of every entry, d_in + d_out, fp64."""
    spread: Tensor
    """Squared distances from the mean, added up."""

    @classmethod
    def of(cls, features: Tensor) -> Seen:
        """The statistics of some tokens (n × (d_in + d_out))."""
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).square().sum(0))

    def joined(self, other: Seen) -> Seen:
        """The statistics of the tokens of both (Chan et al. 1979)."""
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Seen(count, mean, self.spread + other.spread + apart.square() * self.count * other.count / count)

    def normal(self, features: Tensor) -> Tensor:
        """Features (n × (d_in + d_out)) less their mean over their standard deviation; 0 where they never vary."""
        size = (self.spread / max(self.count - 1, 1)).sqrt()
        return torch.where(size > 0, (features - self.mean) / size, 0.0)

    def told(self, layer: int) -> dict[str, object]:
        """As numbers for the batch's file, with the nine digits that fp32 holds."""
        kept = {"mean": self.mean, "spread": self.spread}
        lists = {f"{layer}.{name}": [float(f"{x:.9g}") for x in part.tolist()] for name, part in kept.items()}
        return {f"{layer}.count": self.count, **lists}

    @classmethod
    def read(cls, found: Mapping[str, object], layer: int, width: int, device: torch.device) -> Seen | None:
        """What an earlier batch told of a block; None when it did not edit it.

        Raises:
            StoreError: it is not what `told` makes.
        """
        if f"{layer}.count" not in found:
            return None
        try:
            count = int(found[f"{layer}.count"])  # type: ignore[call-overload]
            lists = [[float(x) for x in found[f"{layer}.{name}"]] for name in ("mean", "spread")]  # type: ignore[attr-defined]
            mean, spread = torch.tensor(lists, dtype=torch.float64, device=device)
            finite = bool(mean.isfinite().all()) and bool(spread.isfinite().all())
            if count > 0 and len(mean) == width and finite and float(spread.min()) >= 0:
                return cls(count, mean, spread)
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise StoreError(
            f"what an earlier batch found out about block {layer} is damaged", "restore the store from a backup"
        )


def write(job: Job) -> Written:
    """A batch by one gradient: every block is solved for by itself, on the weights as they are before the batch.

    An update has as many terms as the batch has tokens, or as the block is wide where that is less; with a null space
    it is projected at the end. What is found out is the statistics of this batch alone.

    Raises:
        InvalidInput: the ridge is too small for the system to be solved.
        StoreError: what an earlier batch found out is damaged.
    """
    model, own, layers = job.model, job.settings.own, job.settings.layers
    assert isinstance(own, Normalised)
    rows = [row(model, request, "") for request in job.requests]
    job.emit(StageStarted("target", 1, job.number))
    losses, read = _read(job, rows, layers)
    job.emit(TargetStep(job.number, 0, sum(losses) / len(losses), len(rows)))
    device = precise_device(model.device)
    updates: dict[int, Update] = {}
    found: dict[str, object] = {}
    for layer, (h, g, size) in read.items():
        features = torch.cat([h, g], 1).to(device, torch.float64)
        now = Seen.of(features)
        found |= now.told(layer)
        earlier = (Seen.read(told, layer, features.shape[1], device) for told in job.earlier)
        normal = reduce(Seen.joined, [*filter(None, earlier), now]).normal(features)
        h_hat, g_hat = normal[:, : h.shape[1]], normal[:, h.shape[1] :]
        values = -own.ultra_rate * size * h_hat.square().mean(1, keepdim=True) * g_hat
        updates[layer] = _solved(features[:, : h.shape[1]], values, own.ultra_ridge, job.projector(layer))
    return Written(updates, found=found)


def _read(
    job: Job, rows: Sequence[Row], layers: Sequence[int]
) -> tuple[list[float], dict[int, tuple[Tensor, Tensor, float]]]:
    """The loss of every row, nats a token, and of every block the inputs (n × d_in) and gradients (n × d_out) at all
    tokens but the last, which foretells nothing, with the root mean square of what it puts out there."""
    model = job.model
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    power = dict.fromkeys(layers, 0.0)

    def work(some: Sequence[Row]) -> list[float]:
        losses, taken = _gradients(model, some, layers)
        for layer, (h, g, output) in taken.items():
            parts[layer].append((h.cpu(), g.cpu()))
            power[layer] += float(output.square().sum())
        return losses

    losses = in_chunks(rows, CHUNK, work, job.emit, "requests")
    read = {}
    for layer, pairs in parts.items():
        h, g = (torch.cat(side) for side in zip(*pairs, strict=True))
        read[layer] = (h, g, (power[layer] / g.numel()) ** 0.5)
    return losses, read


def _gradients(
    model: Model, rows: Sequence[Row], layers: Sequence[int]
) -> tuple[list[float], dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """The loss of every row, nats a token, and of every block the inputs, the gradients for the outputs and the outputs
    at the rows' tokens but the last, fp32.

    Gradients are of the sum over all tokens of the targets: one of a long target counts as much as one of a short.
    """
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(layer: int) -> Callable[..., Tensor]:
        def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            push = torch.zeros_like(output, requires_grad=True)
            seen[layer] = (args[0].detach(), push, output.detach())
            return output + push

        return hook

    hooks = [(model.blocks[layer].down, "output", watch(layer)) for layer in layers]
    with model.hooked(hooks), torch.enable_grad():
        losses = losses_of(model, rows, "target")
        total = torch.stack([loss * len(one.target) for loss, one in zip(losses, rows, strict=True)]).sum()
        pushed = torch.autograd.grad(total, [seen[layer][1] for layer in layers])
    width = max(len(one.ids) for one in rows) - 1
    there = torch.tensor([[place < len(one.ids) - 1 for place in range(width)] for one in rows]).flatten()
    taken = {}
    for layer, push in zip(layers, pushed, strict=True):
        h, _, output = seen[layer]
        # OPT flattens its positions before the MLP.
        at = (part.flatten(0, -2)[there.to(part.device)].float() for part in (h, push, output))
        taken[layer] = (next(at), next(at), next(at))
    return [float(loss.detach()) for loss in losses], taken


def _solved(inputs: Tensor, values: Tensor, ridge: float, projector: Projector | None) -> Update:
    """(HᵀH + ρ I)⁻¹ HᵀV, transposed, as two factors in fp32 on the CPU.

    With no more tokens than entries Hᵀ (H Hᵀ + ρ I)⁻¹ V, the same, is cheaper, and its factors are there already.

    Args:
        inputs: H, n × d_in, fp64.
        values: V, n × d_out.
        ridge: ρ as a share of the rows' mean squared norm.

    Raises:
        InvalidInput: it is too small for the system to be solved.
    """
    count, width = inputs.shape
    square = inputs @ inputs.T if count <= width else inputs.T @ inputs
    square.diagonal().add_(ridge * inputs.square().sum() / count)
    root, fault = torch.linalg.cholesky_ex(square)
    # Texts that begin alike have equal inputs there, whose system only rounding could solve.
    if not ridge or fault:
        raise InvalidInput(f"ultra_ridge = {ridge:g} holds no update back", "set a larger one")
    if count <= width:
        left, right = torch.cholesky_solve(values, root).T, inputs
    if count > min(width, values.shape[1]):
        # The product as one factor, beside the identity, has fewer terms than there are tokens.
        whole = left @ right if count <= width else torch.cholesky_solve(inputs.T @ values, root).T
        left, right = torch.eye(len(whole)), whole
    right = right.float()
    return left.float().cpu(), (right if projector is None else projector(right)).cpu()
