"""The kernel: one constrained ridge problem serves every closed-form editing method.

Knows: the algebra of one layer. Refuses: models, prompts, files.

For a batch of n edits with keys K (d_k × n) and residuals R (d_v × n) the update D (d_v × d_k) minimises

    ‖D K − R‖² + ‖D K_p‖² + tr(D (λ C + ρ I) Dᵀ)    subject to  D = D P,

K_p being the keys of earlier edits (with `history`), C = Q diag(c) Qᵀ the second moment of the layer's keys and P the
projector on the eigenvectors of C that hold the least energy. (MEMIT, Meng et al. 2023, eq. 14: P = I, ρ = 0, no
history. AlphaEdit, Fang et al. 2025, eq. 11: λ = 0, ρ = 1, with history.)

With the filter F = Q diag(f) Qᵀ, f_i = [i in P] / (λ c_i + ρ), and S = F before any edit, each batch is exactly

    T = S K,   M = I + Kᵀ T,   D = R M⁻¹ Tᵀ,   S ← S − T M⁻¹ Tᵀ,

so nothing larger than n × n is factorised. S is carried as F − L Lᵀ. Tall matrices have the dtype of the basis (fp32 in
runs), n × n ones are fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editctl.delta import Factors
from editctl.engine.methods import Ridge
from editctl.engine.statistics import Moment, precise_device
from editctl.errors import InvalidInput, ModelError

FLOOR = 1e-6
"""Smallest eigenvalue the filter divides by, as a share of their mean: C of a finite corpus is singular."""


class Kernel:
    """The solver of one layer, with its history.

    Raises:
        InvalidInput: λ and ρ are both 0, or the null space is empty or everything.
        ModelError: from `solve` and `absorb`, when fp32 no longer carries S.
    """

    def __init__(self, moment: Moment, ridge: Ridge, device: torch.device) -> None:
        eigenvalues = moment.eigenvalues
        if not (ridge.lambda_ or ridge.l2):
            raise InvalidInput("lambda and l2 are both 0, so nothing holds the update back", "set one of them")
        weight = ridge.lambda_ * eigenvalues.clamp_min(FLOOR * float(eigenvalues.mean())) + ridge.l2 * moment.scale
        rank = len(eigenvalues) if ridge.energy is None else moment.null_rank(ridge.energy)
        self._history = ridge.history
        self._precise = precise_device(device)
        # F = half · halfᵀ, d_k × rank.
        self._half = (moment.basis[:, :rank] * weight[:rank].rsqrt().to(moment.basis.dtype)).to(device)
        self._low = self._half.new_zeros(self._half.shape[0], 0)
        """L, d_k × (columns so far): S = F − L Lᵀ."""

    def _spread(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """T = S K (d_k × n) and the Cholesky factor of M = I + Kᵀ S K (n × n)."""
        tall = self._half @ (self._half.T @ keys) - self._low @ (self._low.T @ keys)
        inner = keys.to(self._precise, torch.float64).T @ tall.to(self._precise, torch.float64)
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if failed:
            raise ModelError(
                "the solve lost its precision: I + KᵀSK is not positive definite any more",
                "raise l2 or lambda, or measure more corpus tokens",
            )
        return tall, factor

    def absorb(self, keys: Tensor) -> None:
        """Take keys (d_k × n) that were edited earlier into the history; nothing happens without history."""
        if self._history:
            self._remember(*self._spread(keys.to(self._half)))

    def _remember(self, tall: Tensor, factor: Tensor) -> None:
        grown = torch.linalg.solve_triangular(factor, tall.to(self._precise, torch.float64).T, upper=False).T
        self._low = torch.cat([self._low, grown.to(self._low)], dim=1)

    def solve(self, keys: Tensor, residuals: Tensor) -> Factors:
        """The update for keys K (d_k × n) and residuals R (d_v × n), which then belong to the history."""
        keys = keys.to(self._half)
        tall, factor = self._spread(keys)
        thin = torch.cholesky_solve(tall.to(self._precise, torch.float64).T, factor).to(keys.dtype)
        if self._history:
            self._remember(tall, factor)
        return Factors(keys=keys.cpu(), residuals=residuals.to(keys.dtype).cpu(), factor=thin.cpu())
