"""What some methods do to a solved update before it is written: RECT, PRUNE, SPHERE, and projection after the solve.

Knows: the update of one layer and the weight it goes to. Refuses: solving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from editctl.delta import Factors, pack
from editctl.engine.methods import Write
from editctl.engine.solve import Projector

SMALL = 1e-8
"""Added to weights that RECT divides by."""


def finish(
    factors: Factors,
    write: Write,
    *,
    base: Tensor,
    weight: Tensor,
    earlier: Sequence[Factors],
    projector: Projector | None,
) -> Factors:
    """The update as it is written.

    Args:
        base: the layer's unedited weight, d_out × d_in.
        weight: the weight as it is now.
        earlier: updates it already carries.
        projector: the null space, where one is to be kept to.
    """
    steps: dict[str, Callable[[Factors], Factors]] = {
        "rect": lambda f: rect(f, weight, write.rect),
        "prune": lambda f: prune(f, base, earlier),
        "sphere": lambda f: sphere(f, weight, write.sphere_energy, write.sphere),
    }
    for name in write.post:
        factors = steps[name](factors)
    # PRUNE's part lies in the span of the updates it conditions.
    outside = "rect" in write.post or "sphere" in write.post or write.neurons < 1
    return project(factors, projector) if projector is not None and outside else factors


def project(factors: Factors, projector: Projector) -> Factors:
    """D P: thin updates stay thin, others become dense."""
    if factors.kind == "thin":
        right = None if factors.right is None else projector(factors.right)
        return replace(factors, factor=projector(factors.factor), right=right)
    return replace(factors, mask=None, left=None, right=None, dense=projector(factors.update()))


def rect(factors: Factors, weight: Tensor, share: float) -> Factors:
    """Only the `share` of entries with the largest |D / W| is written (RECT, Gu et al. 2024, eq. 5)."""
    update = factors.update()
    relative = (update / (weight.detach().float().cpu() + SMALL)).abs()
    count = max(1, int(share * relative.numel()))
    least = relative.flatten().kthvalue(relative.numel() - count + 1).values
    return replace(factors, mask=pack(relative >= least))


def prune(factors: Factors, base: Tensor, earlier: Sequence[Factors]) -> Factors:
    """The sum of all updates with singular values s above σ = σ_max(W) made ln s − ln σ + σ (PRUNE, Ma et al. 2025,
    eq. 10), by a part of low rank beside the new update.

    The published code adds the conditioned sum to the weights that carry the sum already; here it replaces it.
    """
    limit = top_singular_value(base)
    left, values, right = _singular(sum_of([*earlier, factors]))
    over = values > limit
    if not over.any():
        return factors
    kept = values[over].log() - limit.log() + limit
    change = left[:, over] * (kept - values[over])
    if factors.kind != "thin":
        whole = factors.update() + (change @ right[over]).float()
        return replace(factors, mask=None, left=None, right=None, dense=whole)
    return replace(factors, left=change.float(), right=right[over].float())


def top_singular_value(weight: Tensor) -> Tensor:
    """σ_max of a matrix, fp64, from the smaller of its Gram matrices."""
    precise = weight.detach().cpu().double()
    gram = precise @ precise.T if precise.shape[0] <= precise.shape[1] else precise.T @ precise
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values[-1].sqrt()


def sum_of(updates: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Updates as one product of a tall and a wide matrix, fp64; whole matrices where one of them is not thin."""
    if any(update.kind != "thin" for update in updates):
        total = torch.zeros(updates[0].shape, dtype=torch.float64)
        for update in updates:
            total += update.update()
        return total, torch.eye(total.shape[1], dtype=torch.float64)
    parts = [(u.residuals, u.factor) for u in updates]
    parts += [(u.left, u.right) for u in updates if u.left is not None and u.right is not None]
    return torch.cat([a for a, _ in parts], dim=1).double(), torch.cat([b for _, b in parts]).double()


def _singular(product: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of a product of two matrices, without forming it."""
    tall, wide = product
    left, upper = torch.linalg.qr(tall)
    right, lower = torch.linalg.qr(wide.T)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner_left, values, inner_right @ right.T


def sphere(factors: Factors, weight: Tensor, energy: float, strength: float) -> Factors:
    """D (I − α U Uᵀ), U (d_in × u) the principal directions of W's rows at unit length that hold `energy` of their
    second moment (SPHERE 2026, arXiv 2510.01172)."""
    rows = functional.normalize(weight.detach().cpu().double(), dim=1)
    held, vectors = torch.linalg.eigh(rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T)
    held, vectors = held.flip(0), vectors.flip(1)
    count = int((held.cumsum(0) / held.sum() <= energy).sum()) + 1
    principal = vectors[:, :count].T
    if rows.shape[1] > rows.shape[0]:
        principal = functional.normalize(principal @ rows, dim=1)
    principal = principal.float()

    def spare(part: Tensor) -> Tensor:
        return part.sub((part @ principal.T) @ principal, alpha=strength)

    right = None if factors.right is None else spare(factors.right)
    if factors.kind == "thin":
        return replace(factors, factor=spare(factors.factor), right=right)
    return replace(factors, mask=None, left=None, right=None, dense=spare(factors.update()))
