"""The kernel: one constrained ridge problem serves every closed-form editing method.

Knows: the algebra of one layer. Refuses: models, prompts, files.

For a batch of n edits with keys K (d_k × n) and residuals R (d_v × n) the update D (d_v × d_k) minimises

    ‖D K − R‖² + ‖D K_p‖² + tr(D (λ C + ρ I) Dᵀ)    subject to  D = D P,

K_p being the keys of earlier edits (with `history`), C = Q diag(c) Qᵀ the second moment of the layer's keys and P the
projector on the eigenvectors of C that hold the least energy. (MEMIT, Meng et al. 2023, eq. 14: P = I, ρ = 0, no
history. AlphaEdit, Fang et al. 2025, eq. 11: λ = 0, ρ = 1, with history. EMMET, Gupta et al. 2024, eq. 11: MEMIT with
a small λ.)

With the filter F = Q diag(f) Qᵀ, f_i = [i in P] / (λ c_i + ρ), and S = F before any edit, each batch is exactly

    T = S K,   M = I + Kᵀ T,   D = R M⁻¹ Tᵀ,   S ← S − T M⁻¹ Tᵀ,

so nothing larger than n × n is factorised. ROME (Meng et al. 2022, eq. 2) is the limit in which the values are met
exactly: M = Kᵀ T. S is carried as F − L Lᵀ until L has more than d_k / 2 columns, from then on as it is. Tall matrices
have the dtype of the basis (fp32 in runs), n × n ones are fp64.

Two rows of the table need more. NSE confines D to some neurons s, which no longer commutes with Q: its system of |s|
equations is factorised. BetaEdit takes P anew from preserved and edited keys after some edits: one eigendecomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editctl.delta import Factors
from editctl.engine.methods import NullSpace, Ridge, Write
from editctl.engine.statistics import Moment, precise_device
from editctl.errors import InvalidInput, ModelError

FLOOR = 1e-6
"""Smallest eigenvalue the filter divides by, as a share of their mean: C of a finite corpus is singular."""
PLAIN = Write()


class Projector:
    """P = U Uᵀ = I − V Vᵀ of one layer, kept as the thinner of U (d_k × rank) and V (d_k × (d_k − rank)).

    Raises:
        InvalidInput: the rule keeps no direction, or all.
    """

    def __init__(self, moment: Moment, null_space: NullSpace, device: torch.device) -> None:
        self.rank, self.width = moment.null_rank(null_space), len(moment.eigenvalues)
        self._inside = self.rank <= self.width // 2
        side = moment.basis[:, : self.rank] if self._inside else moment.basis[:, self.rank :]
        # A copy, which lets go of the rest of the basis.
        self._side = side.to(device, copy=True)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (… × d_k) projected, wherever they are."""
        side = self._side.to(rows.dtype)
        near = rows.to(side.device)
        part = (near @ side) @ side.T
        return (part if self._inside else near.sub(part)).to(rows.device)


class Kernel:
    """The solver of one layer, with its history.

    Raises:
        InvalidInput: λ and ρ are both 0, or the null space is empty or everything.
        ModelError: from `solve` and `absorb`, when fp32 no longer carries S.
    """

    def __init__(
        self, moment: Moment, ridge: Ridge, null_space: NullSpace | None, device: torch.device, write: Write = PLAIN
    ) -> None:
        if not (ridge.lambda_ or ridge.l2):
            raise InvalidInput("lambda and l2 are both 0, so nothing holds the update back", "set one of them")
        self._ridge, self._null_space, self._device = ridge, null_space, device
        self._precise = precise_device(device)
        self._dtype = moment.basis.dtype
        floor = FLOOR * float(moment.eigenvalues.mean())
        self._weights = ridge.lambda_ * moment.eigenvalues.clamp_min(floor)
        """λ c, d_k."""
        self._l2 = ridge.l2 * moment.scale
        self.projector = None if null_space is None else Projector(moment, null_space, device)
        self._keeps_keys = bool(write.refresh) or write.neurons < 1
        self._moment = moment if self._keeps_keys else None
        """Held only for rows of the table that need C again."""
        self._half = self._spectral(moment) if ridge.lambda_ else None
        """F = half · halfᵀ, d_k × rank; None when F = P / ρ."""
        self._low = self._no_columns()
        """L, d_k × (columns so far): S = F − L Lᵀ."""
        self._dense: Tensor | None = None
        """S itself, once that is smaller."""
        self._refresh, self._old = write.refresh, 0
        self._keys: list[Tensor] = []
        """Keys of earlier edits, d_k × n each, kept only for rows of the table that need them again."""

    def _no_columns(self) -> Tensor:
        return torch.zeros(len(self._weights), 0, dtype=self._dtype, device=self._device)

    def _spectral(self, moment: Moment) -> Tensor:
        rank = len(self._weights) if self.projector is None else self.projector.rank
        scales = (self._weights[:rank] + self._l2).rsqrt().to(self._dtype)
        return (moment.basis[:, :rank] * scales).to(self._device)

    def _filter(self, tall: Tensor) -> Tensor:
        """F · tall."""
        if self._half is not None:
            return self._half @ (self._half.T @ tall)
        return (tall if self.projector is None else self.projector(tall.T).T) / self._l2

    def _spread(self, keys: Tensor) -> Tensor:
        """T = S K, d_k × n."""
        if self._dense is not None:
            return self._dense @ keys
        return self._filter(keys) - self._low @ (self._low.T @ keys)

    def _inner(self, keys: Tensor, tall: Tensor) -> Tensor:
        """Kᵀ S K, n × n, fp64."""
        return keys.to(self._precise, torch.float64).T @ tall.to(self._precise, torch.float64)

    def _factorised(self, keys: Tensor, tall: Tensor) -> Tensor:
        """The Cholesky factor of M = I + Kᵀ S K, or of Kᵀ S K, n × n."""
        inner = self._inner(keys, tall)
        inner = (inner + inner.T) / 2
        if not self._ridge.hard:
            inner.diagonal().add_(1)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(inner)
        if failed:
            raise ModelError(
                "the solve lost its precision: I + KᵀSK is not positive definite any more",
                "raise l2 or lambda, or measure more corpus tokens",
            )
        return factor

    def absorb(self, keys: Tensor) -> None:
        """Take keys (d_k × n) that were edited earlier into the history; nothing happens without history."""
        if self._ridge.history:
            self._renew_if_due()
            keys = keys.to(self._device, self._dtype)
            tall = self._spread(keys)
            self._remember(keys, tall, self._factorised(keys, tall))

    def _remember(self, keys: Tensor, tall: Tensor, factor: Tensor) -> None:
        """S ← S − T M⁻¹ Tᵀ."""
        if self._keeps_keys:
            self._keys.append(keys)
        grown = torch.linalg.solve_triangular(factor, tall.to(self._precise, torch.float64).T, upper=False).T
        grown = grown.to(self._low)
        if self._dense is None:
            self._low = torch.cat([self._low, grown], dim=1)
            if 2 * self._low.shape[1] <= self._low.shape[0]:
                return
            everything = torch.eye(self._low.shape[0], dtype=self._dtype, device=self._device)
            self._dense, grown, self._low = self._filter(everything), self._low, self._no_columns()
        self._dense -= grown @ grown.T

    def solve(
        self,
        keys: Tensor,
        residuals: Tensor,
        *,
        at: Tensor | None = None,
        neurons: Tensor | None = None,
        remember: bool = True,
    ) -> Factors:
        """The update for keys K (d_k × n) and residuals R (d_v × n), which then belong to the history.

        Args:
            at: keys at which the values are measured, where they are not those that give the direction (ROME).
            neurons: indices of the d_k neurons whose weights may change (NSE); by default all.
            remember: False when the keys will be solved for again, and absorbed then.
        """
        self._renew_if_due()
        keys = keys.to(self._device, self._dtype)
        tall = self._spread(keys)
        wide = tall.to(self._precise, torch.float64).T
        if neurons is not None:
            thin = self._confined(keys, neurons)
        elif at is not None:
            # (Kᵀ S K_at): its columns are where the values are measured, so that D K_at = R when they are met exactly.
            inner = self._inner(at.to(self._device, self._dtype), tall).T.contiguous()
            if not self._ridge.hard:
                inner.diagonal().add_(1)
            thin = torch.linalg.solve(inner, wide)
        else:
            thin = torch.cholesky_solve(wide, self._factorised(keys, tall))
        if self._ridge.history and remember:
            self._remember(keys, tall, self._factorised(keys, tall))
        return Factors(keys=keys.cpu(), residuals=residuals.to(keys.dtype).cpu(), factor=thin.to(keys.dtype).cpu())

    def _confined(self, keys: Tensor, neurons: Tensor) -> Tensor:
        """Kᵀ (λ C + ρ I + K_p K_pᵀ + K Kᵀ)⁻¹ on the neurons s alone, n × d_k, zero elsewhere."""
        some = neurons.to(self._precise)
        assert self._moment is not None
        basis = self._moment.basis.to(self._precise, torch.float64)[some]
        system = (basis * self._weights.to(basis)) @ basis.T
        system.diagonal().add_(self._l2)
        for part in (*self._keys, keys):
            rows = part.to(basis)[some]
            system += rows @ rows.T
        answers = torch.linalg.solve(system, keys.to(basis)[some])
        thin = torch.zeros(keys.shape[1], keys.shape[0], dtype=torch.float64, device=self._precise)
        thin[:, some] = answers.T
        return thin

    def _renew_if_due(self) -> None:
        """P anew from (λ C + mean of K_p K_pᵀ) / (λ + 1) when `refresh` edits were made since it was last taken."""
        made = sum(part.shape[1] for part in self._keys)
        if not self._refresh or self._null_space is None or made - self._old < self._refresh:
            return
        assert self._moment is not None
        self._old = made
        earlier = torch.cat(self._keys, dim=1)
        basis = self._moment.basis.to(self._precise, torch.float64)
        second = (basis * self._weights.to(basis)) @ basis.T
        edited = earlier.to(basis) @ earlier.to(basis).T / made
        eigenvalues, vectors = torch.linalg.eigh((second + edited) / (self._ridge.lambda_ + 1))
        fresh = Moment(vectors.to("cpu", self._dtype).contiguous(), eigenvalues.clamp_min(0).cpu(), self._moment.seen)
        self.projector = Projector(fresh, self._null_space, self._device)
        # P and C no longer share eigenvectors: the filter is that of λ C + ρ I seen from inside P.
        free = vectors[:, : self.projector.rank]
        weights, turn = torch.linalg.eigh(free.T @ second @ free)
        self._half = (free @ (turn * (weights.clamp_min(0) + self._l2).rsqrt())).to(self._device, self._dtype)
        self._low, self._dense, self._keys = self._no_columns(), None, []
        tall = self._spread(earlier)
        self._remember(earlier, tall, self._factorised(earlier, tall))


def strongest(keys: Tensor, share: float) -> Tensor:
    """Neurons that hold `share` of the keys' absolute sum (K, d_k × n), strongest first (NSE, Jiang et al. 2025)."""
    scores, order = keys.abs().sum(1).sort(descending=True)
    held = scores.cumsum(0) <= share * scores.sum()
    return order[: max(int(held.sum()), 1)]
