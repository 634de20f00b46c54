"""The kernel: what the recursion yields is what the textbook formula yields, and nothing else does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from editctl.engine.methods import METHODS, Ridge
from editctl.engine.solve import FLOOR, Kernel
from editctl.engine.statistics import Moment
from editctl.errors import InvalidInput

KEY_WIDTH, WIDTH = 24, 10
SIZES = (1, 3, 2, 4, 3)
"""Edits in each batch."""
CPU = torch.device("cpu")
GRID = [
    Ridge(lambda_, l2, energy, history)
    for lambda_, l2, energy, history in itertools.product((0.0, 0.5, 100.0), (0.0, 0.02, 1.0), (None, 0.05), (0, 1))
    if lambda_ or l2
]
PRESETS = [method.ridge for method in METHODS.values()]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_moment(seed: int = 0, width: int = KEY_WIDTH, dtype: torch.dtype = torch.float64) -> Moment:
    """A second moment whose eigenvalues span five decades; the smallest lies below the kernel's floor."""
    basis, _ = torch.linalg.qr(random(width, width, seed=seed))
    eigenvalues = torch.logspace(-4, 1, width, dtype=torch.float64)
    eigenvalues[0] = 0
    return Moment(basis.to(dtype), eigenvalues, seen=1000)


def batches(seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Keys and residuals of five batches."""
    return [(random(KEY_WIDTH, n, seed=seed + i), random(WIDTH, n, seed=seed + 50 + i)) for i, n in enumerate(SIZES)]


def solve_all(moment: Moment, ridge: Ridge) -> list[Tensor]:
    """The updates D = R A (d_v × d_k) of all batches, one after another, by the kernel."""
    kernel = Kernel(moment, ridge, CPU)
    made = [kernel.solve(keys, residuals) for keys, residuals in batches()]
    return [factors.residuals @ factors.factor for factors in made]


def textbook(moment: Moment, ridge: Ridge) -> list[Tensor]:
    """The same updates by Dᵀ = [P (K Kᵀ + H + λ C) + ρ I]⁻¹ P K Rᵀ, everything d_k × d_k and formed in full."""
    basis = moment.basis.double()
    floored = moment.eigenvalues.clamp_min(FLOOR * float(moment.eigenvalues.mean()))
    second = basis @ torch.diag(floored) @ basis.T
    rho = ridge.l2 * float(moment.eigenvalues.sum())
    identity = torch.eye(len(floored), dtype=torch.float64)
    past = torch.zeros_like(identity)
    updates = []
    for keys, residuals in batches():
        inside = keys @ keys.T + past + ridge.lambda_ * second
        if ridge.energy is None:
            transposed = torch.linalg.solve(inside + rho * identity, keys @ residuals.T)
        elif rho:
            free = basis[:, : moment.null_rank(ridge.energy)]
            onto = free @ free.T
            transposed = torch.linalg.solve(onto @ inside + rho * identity, onto @ keys @ residuals.T)
        else:  # the matrix is singular outside the projector's range, so the problem is posed within it
            free = basis[:, : moment.null_rank(ridge.energy)]
            transposed = free @ torch.linalg.solve(free.T @ inside @ free, free.T @ keys @ residuals.T)
        updates.append(transposed.T)
        if ridge.history:
            past = past + keys @ keys.T
    return updates


def assert_agree(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-8) -> None:
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error = float((one - other).norm() / other.norm())
        assert error <= tolerance, f"batch {i} is off by {error:.1e}"


def told(ridge: Ridge) -> str:
    return f"lambda={ridge.lambda_:g} l2={ridge.l2:g} energy={ridge.energy} history={bool(ridge.history)}"


@pytest.mark.parametrize("ridge", PRESETS + GRID, ids=told)
def test_the_kernel_agrees_with_the_textbook_formula_over_five_batches(ridge: Ridge) -> None:
    """Relative error at most 1e-8 in float64, for every preset and every combination of the four numbers."""
    assert_agree(solve_all(a_moment(), ridge), textbook(a_moment(), ridge))


SPOILERS: dict[str, Callable[[Ridge], Ridge]] = {
    "history dropped": lambda ridge: replace(ridge, history=not ridge.history),
    "rho one percent off": lambda ridge: replace(ridge, l2=ridge.l2 * 1.01 if ridge.l2 else 1e-4),
    "lambda one percent off": lambda ridge: replace(ridge, lambda_=ridge.lambda_ * 1.01 if ridge.lambda_ else 1e-2),
    "projection switched": lambda ridge: replace(ridge, energy=0.05 if ridge.energy is None else None),
    "another threshold": lambda ridge: replace(ridge, energy=0.01 if ridge.energy else 0.3),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
@pytest.mark.parametrize("ridge", PRESETS, ids=METHODS)
def test_the_agreement_notices_a_wrong_number(ridge: Ridge, spoil: Callable[[Ridge], Ridge]) -> None:
    """Control: the same check fails for each of the four numbers set wrong in the formula."""
    with pytest.raises(AssertionError):
        assert_agree(solve_all(a_moment(), ridge), textbook(a_moment(), spoil(ridge)))


def test_single_precision_is_enough_for_what_runs_use() -> None:
    """Runs carry fp32 tall matrices: the presets then stay within a thousandth of the float64 formula."""
    for ridge in PRESETS:
        single = solve_all(a_moment(dtype=torch.float32), ridge)
        assert all(update.dtype == torch.float32 for update in single)
        assert_agree([update.double() for update in single], textbook(a_moment(), ridge), 1e-3)


@pytest.mark.parametrize("ridge", PRESETS, ids=METHODS)
def test_absorbing_keys_counts_as_having_solved_them(ridge: Ridge) -> None:
    """A kernel that absorbed four batches solves the fifth as one that solved them; one that did not, does not."""
    *earlier, (keys, residuals) = batches()

    def last(absorbed: int) -> list[Tensor]:
        kernel = Kernel(a_moment(), ridge, CPU)
        for old, _ in earlier[:absorbed]:
            kernel.absorb(old)
        return [kernel.solve(keys, residuals).factor]

    wanted = Kernel(a_moment(), ridge, CPU)
    for old in earlier:
        wanted.solve(*old)
    expected = [wanted.solve(keys, residuals).factor]
    assert_agree(last(4), expected, 1e-12)
    if ridge.history:
        with pytest.raises(AssertionError):
            assert_agree(last(3), expected, 1e-12)
    else:
        assert torch.equal(last(0)[0], expected[0])


@pytest.mark.parametrize("ridge", [r for r in PRESETS if r.history], ids=told)
def test_with_history_many_batches_are_one(ridge: Ridge) -> None:
    """Recursive least squares: five batches towards fixed values sum to the update that solves all at once."""

    def summed(ridge: Ridge) -> Tensor:
        kernel, total = Kernel(a_moment(), ridge, CPU), torch.zeros(WIDTH, KEY_WIDTH, dtype=torch.float64)
        for keys, values in batches():
            factors = kernel.solve(keys, values - total @ keys)
            total = total + factors.residuals @ factors.factor
        return total

    every = [torch.cat(parts, dim=1) for parts in zip(*batches(), strict=True)]
    once = Kernel(a_moment(), ridge, CPU).solve(*every)
    assert_agree([summed(ridge)], [once.residuals @ once.factor])
    with pytest.raises(AssertionError):
        assert_agree([summed(replace(ridge, history=False))], [once.residuals @ once.factor])


# Null-space projection


def measured(width: int = 40, used: int = 12) -> tuple[Moment, Callable[[int], Tensor]]:
    """A moment measured on keys that lie, but for a little noise, in a subspace; and a source of more such keys."""
    directions, _ = torch.linalg.qr(random(width, used, seed=3))

    def draw(seed: int) -> Tensor:
        return directions @ random(used, 2000, seed=seed) + 1e-3 * random(width, 2000, seed=seed + 1)

    keys = draw(11)
    eigenvalues, basis = torch.linalg.eigh(keys @ keys.T / keys.shape[1])
    return Moment(basis, eigenvalues.clamp_min(0), seen=1000), draw


def effect(energy: float | None) -> float:
    """How far an update moves the outputs at preserved keys that it has not seen."""
    moment, draw = measured()
    kernel = Kernel(moment, Ridge(0.0, 0.02, energy, True), CPU)
    factors = kernel.solve(random(40, 5, seed=21), random(WIDTH, 5, seed=22))
    return float((factors.residuals @ factors.factor @ draw(31)).norm())


def assert_preserves(energy: float | None) -> None:
    assert effect(energy) < 0.01 * effect(None)


def test_projection_leaves_the_outputs_at_unseen_preserved_keys_alone() -> None:
    """The projected update moves them by less than a hundredth of what the same update unprojected does."""
    assert_preserves(1e-3)


def test_without_projection_they_move() -> None:
    """Control: the check fails for an unprojected update, and for a threshold that lets half of the energy go."""
    for energy in (None, 0.5):
        with pytest.raises(AssertionError):
            assert_preserves(energy)


def assert_within(energy: float | None, rank: int, moment: Moment) -> None:
    kernel = Kernel(moment, Ridge(1.0, 0.02, energy, True), CPU)
    outside = moment.basis[:, rank:]
    for keys, residuals in batches():
        update = residuals @ kernel.solve(keys, residuals).factor
        assert float((update @ outside).norm() / update.norm()) < 1e-12


def test_every_projected_update_lies_in_the_null_space() -> None:
    """D (I − P) = 0 for each batch; without projection, or for a smaller P, it is not."""
    moment = a_moment()
    rank = moment.null_rank(0.05)
    assert 0 < rank < KEY_WIDTH
    assert_within(0.05, rank, moment)
    with pytest.raises(AssertionError):
        assert_within(None, rank, moment)
    with pytest.raises(AssertionError):
        assert_within(0.05, rank - 1, moment)


def test_the_null_space_holds_at_most_its_share_of_the_energy() -> None:
    """The rank is the greatest whose eigenvalues sum to no more than the share."""
    moment = a_moment()
    for energy in (0.001, 0.05, 0.3, 0.6):
        rank = moment.null_rank(energy)
        held = float(moment.eigenvalues[:rank].sum()) / moment.scale
        more = float(moment.eigenvalues[: rank + 1].sum()) / moment.scale
        assert held <= energy < more


@pytest.mark.parametrize(("energy", "why"), [(1.0, "every direction"), (0.0, "no direction")])
def test_a_threshold_that_frees_all_or_nothing_is_refused(energy: float, why: str) -> None:
    """Neither no protection nor no editing happens silently."""
    moment = Moment(a_moment().basis, a_moment().eigenvalues + 1e-3, seen=1000)
    with pytest.raises(InvalidInput, match=why):
        Kernel(moment, Ridge(0.0, 0.02, energy, True), CPU)


def test_a_ridge_without_any_weight_is_refused() -> None:
    """λ = ρ = 0 divides by zero: that is told, not left to a failing factorisation."""
    with pytest.raises(InvalidInput):
        Kernel(a_moment(), Ridge(0.0, 0.0, 0.05, True), CPU).solve(*batches()[0])
