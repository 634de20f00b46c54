"""The kernel: what the recursion yields is what the textbook formula yields, and nothing else does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from editctl.engine.methods import METHODS, NullSpace, Ridge, Write, settings
from editctl.engine.solve import FLOOR, PLAIN, Kernel, Projector, strongest
from editctl.engine.statistics import Moment
from editctl.errors import InvalidInput, ModelError

KEY_WIDTH, WIDTH = 24, 10
SIZES = (1, 3, 5, 4, 3)
"""Edits in each batch: after the fourth the history has more than half as many columns as keys are wide."""
CPU = torch.device("cpu")
MODEL = {"num_hidden_layers": 8, "hidden_size": 64}


@dataclass(frozen=True)
class Problem:
    """What a kernel is made for."""

    ridge: Ridge
    null_space: NullSpace | None = None
    write: Write = PLAIN

    def kernel(self, moment: Moment) -> Kernel:
        return Kernel(moment, self.ridge, self.null_space, CPU, self.write)

    def __str__(self) -> str:
        ridge, space = self.ridge, self.null_space
        rule = f"{space.rule}={space.value:g}" if space else "none"
        told = f"lambda={ridge.lambda_:g} l2={ridge.l2:g} {rule} history={ridge.history}"
        return told if self.write.neurons == 1 else f"{told} neurons={self.write.neurons}"


def preset(name: str, **overrides: object) -> Problem:
    made = settings(MODEL, name, overrides)
    return Problem(made.ridge, made.null_space, made.write)


PRESETS = {name: preset(name) for name, method in METHODS.items() if method.tune is None and method.own is None}
RULES = (NullSpace("energy", 0.05), NullSpace("quantile", 0.6), NullSpace("threshold", 0.02))
GRID = [
    Problem(Ridge(lambda_, l2, history), null_space)
    for lambda_, l2, null_space, history in itertools.product(
        (0.0, 0.5, 100.0), (0.0, 0.02, 1.0), (None, *RULES), (False, True)
    )
    if lambda_ or l2
] + [
    Problem(Ridge(lambda_, l2, history), None, Write(neurons=0.6))
    for lambda_, l2, history in itertools.product((0.0, 0.5), (0.0, 0.02), (False, True))
    if lambda_ or l2
]


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


def neurons_of(problem: Problem, keys: Tensor) -> Tensor | None:
    return strongest(keys, problem.write.neurons) if problem.write.neurons < 1 else None


def solve_next(kernel: Kernel, problem: Problem, keys: Tensor, residuals: Tensor) -> Tensor:
    """The update D = R A (d_v × d_k) of one more batch by the kernel."""
    factors = kernel.solve(keys, residuals, neurons=neurons_of(problem, keys))
    return factors.residuals @ factors.factor


def solve_all(moment: Moment, problem: Problem) -> list[Tensor]:
    """The updates of all batches, one after another."""
    kernel = problem.kernel(moment)
    return [solve_next(kernel, problem, keys, residuals) for keys, residuals in batches()]


def rank_by(eigenvalues: Tensor, rule: NullSpace) -> int:
    """How many of the smallest eigenvalues the rule takes, counted one by one."""
    values, total = eigenvalues.tolist(), float(eigenvalues.sum())
    if rule.rule == "energy":
        return max(n for n in range(len(values) + 1) if sum(values[:n]) <= rule.value * total)
    if rule.rule == "quantile":
        return int(rule.value * len(values))
    return sum(value < rule.value for value in values)


def textbook(moment: Moment, problem: Problem) -> list[Tensor]:
    """The same updates by Dᵀ = [P (K Kᵀ + H + λ C) + ρ I]⁻¹ P K Rᵀ, everything d_k × d_k and formed in full.

    NSE's rows and columns of the strongest neurons are cut out of that; ROME's values are met exactly; BetaEdit's P is
    taken anew from (H / n + λ C) / (λ + 1).
    """
    ridge, rule, write = problem.ridge, problem.null_space, problem.write
    basis = moment.basis.double()
    floored = moment.eigenvalues.clamp_min(FLOOR * float(moment.eigenvalues.mean()))
    second = basis @ torch.diag(floored) @ basis.T
    identity = torch.eye(len(floored), dtype=torch.float64)
    rho = ridge.l2 * float(moment.eigenvalues.sum())
    free = identity if rule is None else basis[:, : rank_by(moment.eigenvalues, rule)]
    past, edited, renewed, updates = torch.zeros_like(identity), 0, 0, []
    for keys, residuals in batches():
        if rule is not None and write.refresh and edited - renewed >= write.refresh:
            eigenvalues, vectors = torch.linalg.eigh((past / edited + ridge.lambda_ * second) / (ridge.lambda_ + 1))
            free, renewed = vectors[:, : rank_by(eigenvalues, rule)], edited
        outer, onto = keys @ residuals.T, free @ free.T
        around = past + ridge.lambda_ * second
        inside = keys @ keys.T + around
        chosen = neurons_of(problem, keys)
        if chosen is not None:
            some = identity[:, chosen]
            system = some.T @ (inside + rho * identity) @ some
            transposed = some @ torch.linalg.solve(system, some.T @ outer)
        elif ridge.hard:
            spread = free @ torch.linalg.inv(free.T @ (around + rho * identity) @ free) @ free.T @ keys
            transposed = spread @ torch.linalg.inv(keys.T @ spread) @ residuals.T
        elif rule is not None and not rho:  # singular outside the projector's range, so the problem is posed within it
            transposed = free @ torch.linalg.solve(free.T @ inside @ free, free.T @ outer)
        else:
            transposed = torch.linalg.solve(onto @ inside + rho * identity, onto @ outer)
        updates.append(transposed.T)
        if ridge.history:
            past, edited = past + keys @ keys.T, edited + keys.shape[1]
    return updates


def assert_agree(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-8) -> None:
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error = float((one - other).norm() / other.norm())
        assert error <= tolerance, f"batch {i} is off by {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Parity with the textbook


@pytest.mark.parametrize("problem", [*PRESETS.values(), *GRID], ids=[*PRESETS, *map(str, GRID)])
def test_the_kernel_agrees_with_the_textbook_formula_over_five_batches(problem: Problem) -> None:
    """Relative error at most 1e-8 in float64, for every preset and every combination of λ, ρ, rank rule and history."""
    assert_agree(solve_all(a_moment(), problem), textbook(a_moment(), problem))


def flipped(rule: NullSpace | None) -> NullSpace | None:
    return NullSpace("energy", 0.05) if rule is None else None


def stretched(rule: NullSpace | None) -> NullSpace | None:
    return NullSpace("energy", 0.3) if rule is None else replace(rule, value=rule.value / 10)


def ridge_with(problem: Problem, **changes: float) -> Problem:
    ridge = problem.ridge
    return replace(problem, ridge=Ridge(**{**vars(ridge), **changes}))


SPOILERS: dict[str, Callable[[Problem], Problem]] = {
    "history dropped": lambda p: ridge_with(p, history=not p.ridge.history),
    "rho one percent off": lambda p: ridge_with(p, l2=p.ridge.l2 * 1.01 or 1e-4),
    "lambda one percent off": lambda p: ridge_with(p, lambda_=p.ridge.lambda_ * 1.01 or 1e-2),
    "met exactly or not": lambda p: ridge_with(p, hard=not p.ridge.hard),
    "projection switched": lambda p: replace(p, null_space=flipped(p.null_space)),
    "another rank": lambda p: replace(p, null_space=stretched(p.null_space)),
    "other neurons": lambda p: replace(p, write=replace(p.write, neurons=1.0 if p.write.neurons < 1 else 0.7)),
}
BLIND = {("nse", "met exactly or not"), ("nse", "projection switched"), ("nse", "another rank")} | {
    (name, "lambda one percent off") for name in ("rome", "r-rome")
}
"""What the formula itself does not know: NSE is projected after its solve, and ROME cancels λ."""
SPOILED = [pair for pair in itertools.product(PRESETS, SPOILERS) if pair not in BLIND]


@pytest.mark.parametrize(("name", "how"), SPOILED, ids=" ".join)
def test_the_agreement_notices_a_wrong_number(name: str, how: str) -> None:
    """Control: the same check fails for each number of each method set wrong in the formula."""
    with pytest.raises(AssertionError):
        assert_agree(solve_all(a_moment(), PRESETS[name]), textbook(a_moment(), SPOILERS[how](PRESETS[name])))


def test_single_precision_is_enough_for_what_runs_use() -> None:
    """Runs carry fp32 tall matrices: the presets stay within a thousandth of the float64 formula; bf16 does not."""
    for problem in PRESETS.values():
        single = solve_all(a_moment(dtype=torch.float32), problem)
        assert all(update.dtype == torch.float32 for update in single)
        assert_agree([update.double() for update in single], textbook(a_moment(), problem), 1e-3)
    rough = [update.bfloat16().double() for update in single]
    with pytest.raises(AssertionError):
        assert_agree(rough, textbook(a_moment(), problem), 1e-3)


def edit_twice(problem: Problem, dtype: torch.dtype) -> Kernel:
    """The kernel after batches of nearly the same keys."""
    kernel = problem.kernel(a_moment(dtype=dtype))
    keys = 30 * random(KEY_WIDTH, 6, seed=1)
    for i in range(4):
        kernel.solve(keys + 1e-6 * random(KEY_WIDTH, 6, seed=2 + i), random(WIDTH, 6, seed=3))
    return kernel


def test_what_single_precision_cannot_carry_is_told_with_a_remedy() -> None:
    """With next to no ρ, keys edited again and again leave nothing of S in fp32; float64, and more ρ, carry it."""
    weak = Problem(Ridge(0.0, 1e-9, True))
    with pytest.raises(ModelError, match="precision") as caught:
        edit_twice(weak, torch.float32)
    assert "l2" in caught.value.hint
    edit_twice(weak, torch.float64)
    edit_twice(Problem(Ridge(0.0, 0.02, True)), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# History


WITH_HISTORY = {name: problem for name, problem in PRESETS.items() if problem.ridge.history}


@pytest.mark.parametrize("name", PRESETS)
def test_absorbing_keys_counts_as_having_solved_them(name: str) -> None:
    """A kernel that absorbed four batches solves the fifth as one that solved them; one that did not, does not."""
    problem = PRESETS[name]
    *earlier, (keys, residuals) = batches()

    def last(absorbed: int) -> list[Tensor]:
        kernel = problem.kernel(a_moment())
        for old, _ in earlier[:absorbed]:
            kernel.absorb(old)
        return [solve_next(kernel, problem, keys, residuals)]

    expected = solve_all(a_moment(), problem)[-1:]
    assert_agree(last(4), expected, 1e-12)
    if problem.ridge.history:
        with pytest.raises(AssertionError):
            assert_agree(last(3), expected, 1e-12)
    else:
        assert torch.equal(last(0)[0], expected[0])


def test_keys_solved_for_in_rounds_belong_to_the_history_once() -> None:
    """Without `remember` a solve leaves no trace; absorbed afterwards the keys count as those of one solve."""
    problem = PRESETS["memit-history"]
    (first, values), (keys, residuals), *_ = batches()
    expected = textbook(a_moment(), problem)[1:2]

    def second(rounds: int, absorbed: int) -> list[Tensor]:
        kernel = problem.kernel(a_moment())
        for _ in range(rounds):
            kernel.solve(first, values, remember=False)
        for _ in range(absorbed):
            kernel.absorb(first)
        return [solve_next(kernel, problem, keys, residuals)]

    assert_agree(second(2, 1), expected)
    for rounds, absorbed in ((2, 0), (0, 2)):
        with pytest.raises(AssertionError):
            assert_agree(second(rounds, absorbed), expected)


@pytest.mark.parametrize("name", [name for name, p in WITH_HISTORY.items() if p.write.neurons == 1])
def test_with_history_many_batches_are_one(name: str) -> None:
    """Recursive least squares: five batches towards fixed values sum to the update that solves all at once."""
    problem = PRESETS[name]

    def summed(problem: Problem) -> Tensor:
        kernel, total = problem.kernel(a_moment()), torch.zeros(WIDTH, KEY_WIDTH, dtype=torch.float64)
        for keys, values in batches():
            total = total + solve_next(kernel, problem, keys, values - total @ keys)
        return total

    every = [torch.cat(parts, dim=1) for parts in zip(*batches(), strict=True)]
    once = problem.kernel(a_moment()).solve(*every)
    assert_agree([summed(problem)], [once.residuals @ once.factor])
    with pytest.raises(AssertionError):
        assert_agree([summed(ridge_with(problem, history=False))], [once.residuals @ once.factor])


def after_four(problem: Problem) -> tuple[Kernel, list[int]]:
    """A kernel that solved four batches, and how many columns its factors had after each; 0 once there are none."""
    kernel, columns = problem.kernel(a_moment()), []
    for keys, residuals in batches()[:4]:
        solve_next(kernel, problem, keys, residuals)
        columns.append(kernel._low.shape[1])
        assert (kernel._dense is None) == (columns[-1] > 0)
    return kernel, columns


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_a_long_history_is_carried_as_one_matrix_and_nothing_changes(name: str) -> None:
    """S is F − L Lᵀ until L has more than d_k / 2 columns; the matrix it then becomes is the same S."""
    problem, everything = WITH_HISTORY[name], torch.eye(KEY_WIDTH, dtype=torch.float64)
    kernel, columns = after_four(problem)
    assert columns == [1, 4, 9, 0], "13 of 24 columns are too many, 9 are not"
    assert kernel._dense is not None
    filter_ = problem.kernel(a_moment())._spread(everything)

    def remaining(count: int) -> Tensor:
        """S after that many batches in its dual form, from all keys at once."""
        keys = torch.cat([keys for keys, _ in batches()[:count]], dim=1)
        tall = filter_ @ keys
        inner = torch.eye(keys.shape[1], dtype=torch.float64) + keys.T @ tall
        left: Tensor = filter_ - tall @ torch.linalg.solve(inner, tall.T)
        return left

    assert_agree([kernel._dense], [remaining(4)])
    with pytest.raises(AssertionError):
        assert_agree([kernel._dense], [remaining(3)])
    thin = problem.kernel(a_moment())
    for keys, _ in batches()[:3]:
        thin.absorb(keys)
    assert thin._dense is None
    assert_agree([thin._spread(everything)], [remaining(3)])


@pytest.mark.parametrize("name", [name for name, p in WITH_HISTORY.items() if p.write.neurons == 1])
def test_the_matrix_is_what_the_next_batch_is_solved_with(name: str) -> None:
    """Control for parity beyond the collapse: with the matrix a thousandth off the fifth update is off too."""
    problem, last = WITH_HISTORY[name], batches()[4]
    expected = textbook(a_moment(), problem)[4:]
    assert_agree([solve_next(after_four(problem)[0], problem, *last)], expected)
    kernel, _ = after_four(problem)
    assert kernel._dense is not None
    kernel._dense.diagonal().mul_(1.001)
    with pytest.raises(AssertionError):
        assert_agree([solve_next(kernel, problem, *last)], expected)


# ---------------------------------------------------------------------------------------------------------------------
# ROME: values met exactly


ROME, MEMIT = PRESETS["rome"], PRESETS["memit"]


def second_moment(moment: Moment) -> Tensor:
    floored = moment.eigenvalues.clamp_min(FLOOR * float(moment.eigenvalues.mean()))
    return moment.basis @ torch.diag(floored) @ moment.basis.T


def rome(key: Tensor, residual: Tensor, at: Tensor) -> Tensor:
    """r uᵀ / (k_atᵀ u), u = C⁻¹ k."""
    u: Tensor = torch.linalg.inv(second_moment(a_moment())) @ key
    return residual @ u.T / (at.T @ u)


def product(problem: Problem, keys: Tensor, residuals: Tensor, at: Tensor | None = None) -> Tensor:
    factors = problem.kernel(a_moment()).solve(keys, residuals, at=at)
    return factors.residuals @ factors.factor


KEY, RESIDUAL, OTHER = random(KEY_WIDTH, 1, seed=70), random(WIDTH, 1, seed=71), random(KEY_WIDTH, 1, seed=72)


def test_rome_is_its_formula_and_meets_the_value() -> None:
    """D = r uᵀ / (kᵀ u) and D k = r; with C left out it is another update that meets the value too."""
    update = product(ROME, KEY, RESIDUAL)
    assert_agree([update, update @ KEY], [rome(KEY, RESIDUAL, KEY), RESIDUAL])
    flat = RESIDUAL @ KEY.T / (KEY.T @ KEY)
    assert_agree([flat @ KEY], [RESIDUAL])
    with pytest.raises(AssertionError):
        assert_agree([flat], [rome(KEY, RESIDUAL, KEY)])


def test_rome_is_the_limit_of_a_ridge_that_vanishes() -> None:
    """The gap to EMMET shrinks in proportion to λ, down to 1e-8; at its own λ it is an update far away."""

    def gap(lambda_: float) -> float:
        wanted = product(ROME, KEY, RESIDUAL)
        soft = product(ridge_with(PRESETS["emmet"], lambda_=lambda_), KEY, RESIDUAL)
        return float((soft - wanted).norm() / wanted.norm())

    strength = float(KEY.T @ torch.linalg.inv(second_moment(a_moment())) @ KEY)
    for share in (1e-2, 1e-4, 1e-6):
        assert gap(share * strength) == pytest.approx(share, rel=0.02)
    assert gap(1e-9 * strength) < 1e-8
    assert gap(strength) > 0.4


def test_rome_measures_the_value_at_another_key() -> None:
    """D = r uᵀ / (k_atᵀ u): the value is met there, not at the key that gives the direction."""
    update = product(ROME, KEY, RESIDUAL, OTHER)
    assert_agree([update, update @ OTHER], [rome(KEY, RESIDUAL, OTHER), RESIDUAL])
    with pytest.raises(AssertionError):
        assert_agree([update @ KEY], [RESIDUAL])
    with pytest.raises(AssertionError):
        assert_agree([update], [rome(KEY, RESIDUAL, KEY)])


def test_several_values_are_met_at_other_keys() -> None:
    """Two places of one subject are two columns: D K_at = R, each value at its own key, none at another's."""
    keys, residuals = random(KEY_WIDTH, 3, seed=73), random(WIDTH, 3, seed=74)
    others = keys + 0.3 * random(KEY_WIDTH, 3, seed=75)
    update = product(ROME, keys, residuals, others)
    assert_agree([update @ others], [residuals])
    for wrong in (keys, others.flip(1)):
        with pytest.raises(AssertionError):
            assert_agree([update @ wrong], [residuals])


def test_rome_in_a_null_space_meets_the_value_there() -> None:
    """u = P (P C P)⁺ P k: the value is still met, and nothing outside P is touched."""
    update = product(preset("rome", energy=0.05), KEY, RESIDUAL)
    outside = a_moment().basis[:, a_moment().null_rank(NullSpace("energy", 0.05)) :]
    assert_agree([update @ KEY], [RESIDUAL])
    assert float((update @ outside).norm() / update.norm()) < 1e-12
    assert float((product(ROME, KEY, RESIDUAL) @ outside).norm()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# BetaEdit: the null space taken anew


def renewing(refresh: int, rule: NullSpace = RULES[0]) -> Problem:
    base = PRESETS["betaedit"]
    return Problem(replace(base.ridge, lambda_=3.0), rule, Write(refresh=refresh))


def renewals(problem: Problem, solve: bool = True) -> list[int]:
    """Batches, from 0, before which the kernel takes its null space anew."""
    kernel, found = problem.kernel(a_moment()), []
    for i, (keys, residuals) in enumerate(batches()):
        before = kernel.projector
        if solve:
            kernel.solve(keys, residuals)
        else:
            kernel.absorb(keys)
        if kernel.projector is not before:
            found.append(i)
    return found


@pytest.mark.parametrize("rule", [NullSpace("energy", 0.05), NullSpace("quantile", 0.6), NullSpace("threshold", 0.2)])
@pytest.mark.parametrize(("refresh", "when"), [(6, [3]), (4, [2, 3, 4]), (1, [1, 2, 3, 4]), (13, [4]), (14, [])])
def test_a_renewed_null_space_is_that_of_preserved_and_edited_keys(
    rule: NullSpace, refresh: int, when: list[int]
) -> None:
    """P from the eigenvectors of (H / n + λ C) / (λ + 1), all stored keys in the history, at the batch that is due."""
    problem = renewing(refresh, rule)
    assert renewals(problem) == renewals(problem, solve=False) == when
    assert_agree(solve_all(a_moment(), problem), textbook(a_moment(), problem))


@pytest.mark.parametrize("other", [0, 4, 13], ids=lambda n: f"refresh={n}")
def test_the_agreement_notices_when_the_null_space_is_renewed(other: int) -> None:
    """Control: never renewed, or at another batch, the updates differ from that batch on and not before."""
    found, wanted = solve_all(a_moment(), renewing(6)), textbook(a_moment(), renewing(other))
    first = {0: 3, 4: 2, 13: 3}[other]
    assert_agree(found[:first], wanted[:first])
    with pytest.raises(AssertionError):
        assert_agree(found[first : first + 1], wanted[first : first + 1])


def test_a_renewed_null_space_survives_being_absorbed() -> None:
    """A kernel made later, which absorbs the batches, renews at the same place and solves the rest alike."""
    problem = renewing(4)
    *earlier, (keys, residuals) = batches()
    expected = textbook(a_moment(), problem)[-1:]

    def last(kernel: Kernel) -> list[Tensor]:
        for old, _ in earlier:
            kernel.absorb(old)
        return [solve_next(kernel, problem, keys, residuals)]

    assert_agree(last(problem.kernel(a_moment())), expected)
    with pytest.raises(AssertionError):
        assert_agree(last(renewing(0).kernel(a_moment())), expected)


# ---------------------------------------------------------------------------------------------------------------------
# NSE: some neurons only


def test_the_strongest_neurons_hold_at_most_the_share() -> None:
    """Summed |k| over the keys, strongest first, as long as the share is not passed; never none."""
    keys = torch.tensor([[1.0, -1.0], [0.0, 3.0], [-5.0, 0.0], [0.5, 0.0]])  # 2, 3, 5, 0.5 of 10.5
    assert strongest(keys, 0.8).tolist() == [2, 1], "8 of 10.5 are held; with 10 it would be more than 0.8"
    assert strongest(keys, 0.96).tolist() == [2, 1, 0]
    assert strongest(keys, 0.5).tolist() == strongest(keys, 0.0).tolist() == [2]
    assert strongest(-keys[[3, 2, 1, 0]], 0.8).tolist() == [1, 2]


def test_only_the_chosen_neurons_change() -> None:
    """The other columns of the update are exactly zero; without a choice none is. Parity is tested above."""
    problem = PRESETS["nse"]
    keys, residuals = batches()[2]
    chosen = strongest(keys, problem.write.neurons)
    assert 0 < len(chosen) < KEY_WIDTH
    others = [i for i in range(KEY_WIDTH) if i not in chosen.tolist()]
    update = solve_next(problem.kernel(a_moment()), problem, keys, residuals)
    assert not update[:, others].any() and bool((update[:, chosen] != 0).all())
    assert bool((product(problem, keys, residuals)[:, others] != 0).all())


def test_the_history_holds_on_the_chosen_neurons_too() -> None:
    """Earlier keys weigh in the cut-out system whatever neurons they were edited with; forgotten, they do not."""
    problem, ((first, values), (keys, residuals), *_) = PRESETS["nse"], batches()

    def moved(kernel: Kernel) -> float:
        kernel.solve(first, values, neurons=strongest(first, 0.5))
        factors = kernel.solve(keys, residuals, neurons=strongest(keys, 0.8))
        return float((factors.residuals @ factors.factor @ first).norm())

    weak = ridge_with(problem, lambda_=1e-3)
    assert moved(weak.kernel(a_moment())) < 0.5 * moved(ridge_with(weak, history=False).kernel(a_moment()))


# ---------------------------------------------------------------------------------------------------------------------
# Null-space projection


def measured(width: int = 40, used: int = 12) -> tuple[Moment, Callable[[int], Tensor]]:
    """A moment measured on keys that lie, but for a little noise, in a subspace; and a source of more such keys."""
    directions: Tensor = torch.linalg.qr(random(width, used, seed=3)).Q

    def draw(seed: int) -> Tensor:
        return directions @ random(used, 2000, seed=seed) + 1e-3 * random(width, 2000, seed=seed + 1)

    keys = draw(11)
    eigenvalues, basis = torch.linalg.eigh(keys @ keys.T / keys.shape[1])
    return Moment(basis, eigenvalues.clamp_min(0), seen=1000), draw


def effect(rule: NullSpace | None) -> tuple[float, float]:
    """How far an update moves the outputs at preserved keys that it has not seen, and at its own."""
    moment, draw = measured()
    keys, residuals = random(40, 5, seed=21), random(WIDTH, 5, seed=22)
    factors = Problem(Ridge(0.0, 0.02, True), rule).kernel(moment).solve(keys, residuals)
    update = factors.residuals @ factors.factor
    return float((update @ draw(31)).norm()), float((update @ keys).norm() / residuals.norm())


def assert_preserves(rule: NullSpace | None) -> None:
    (moved, done), (unprojected, _) = effect(rule), effect(None)
    print(f"{rule}: outputs at held-out preserved keys move by {moved:.3g}, unprojected by {unprojected:.3g}")
    assert moved < 0.01 * unprojected
    assert done > 0.5, "an update that does nothing preserves everything"


@pytest.mark.parametrize(
    "rule", [NullSpace("energy", 1e-3), NullSpace("quantile", 0.7), NullSpace("threshold", 1e-4)], ids=str
)
def test_projection_leaves_the_outputs_at_unseen_preserved_keys_alone(rule: NullSpace) -> None:
    """The projected update moves them by less than a hundredth of what the same update unprojected does."""
    assert_preserves(rule)


@pytest.mark.parametrize(
    "rule",
    [None, NullSpace("energy", 0.5), NullSpace("quantile", 0.9), NullSpace("threshold", 1.0)],
    ids=str,
)
def test_without_projection_they_move(rule: NullSpace | None) -> None:
    """Control: the check fails for an unprojected update, and for rules that let used directions go."""
    with pytest.raises(AssertionError, match="assert"):
        assert_preserves(rule)


def assert_within(rule: NullSpace | None, rank: int, moment: Moment) -> None:
    outside = moment.basis[:, rank:]
    for update in solve_all(moment, Problem(Ridge(1.0, 0.02, True), rule)):
        assert float((update @ outside).norm() / update.norm()) < 1e-12


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.rule))
def test_every_projected_update_lies_in_the_null_space(rule: NullSpace) -> None:
    """D (I − P) = 0 for each batch, also once S is one matrix; without projection, or for a smaller P, it is not."""
    moment = a_moment()
    rank = rank_by(moment.eigenvalues, rule)
    assert 0 < rank < KEY_WIDTH
    assert_within(rule, rank, moment)
    with pytest.raises(AssertionError):
        assert_within(None, rank, moment)
    with pytest.raises(AssertionError):
        assert_within(rule, rank - 1, moment)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.51, 0.9])
def test_the_projector_is_that_of_its_eigenvectors_whichever_side_is_kept(share: float) -> None:
    """U Uᵀ and I − V Vᵀ are one projector; that of one more direction is another."""
    moment, rows = a_moment(), random(5, KEY_WIDTH, seed=8)
    projector = Projector(moment, NullSpace("quantile", share), CPU)
    free = moment.basis[:, : int(share * KEY_WIDTH)]
    assert projector.rank == free.shape[1]
    assert_agree([projector(rows), projector(projector(rows))], 2 * [rows @ free @ free.T], 1e-12)
    more = moment.basis[:, : projector.rank + 1]
    with pytest.raises(AssertionError):
        assert_agree([projector(rows)], [rows @ more @ more.T], 1e-2)


def test_the_null_space_holds_what_its_rule_says() -> None:
    """The rank is the one counted by hand, for each rule; the energy rule's is the greatest within its share."""
    moment = a_moment()
    for rule, value in itertools.product(("energy", "quantile", "threshold"), (0.001, 0.05, 0.3, 0.6)):
        if 0 < rank_by(moment.eigenvalues, NullSpace(rule, value)) < KEY_WIDTH:
            assert moment.null_rank(NullSpace(rule, value)) == rank_by(moment.eigenvalues, NullSpace(rule, value))
    rank = moment.null_rank(NullSpace("energy", 0.3))
    shares = moment.eigenvalues.cumsum(0) / moment.scale
    assert shares[rank - 1] <= 0.3 < shares[rank]


NOTHING, ALL = "no direction is left", "every direction counts"


@pytest.mark.parametrize(
    ("rule", "value", "why"),
    [
        ("energy", 0.0, NOTHING),
        ("energy", 1.0, ALL),
        ("quantile", 0.0, NOTHING),
        ("quantile", 0.04, NOTHING),
        ("quantile", 1.0, ALL),
        ("quantile", 7.0, ALL),
        ("threshold", 0.0, NOTHING),
        ("threshold", 1e-9, NOTHING),
        ("threshold", 100.0, ALL),
    ],
)
def test_a_rule_that_frees_all_or_nothing_is_refused(rule: str, value: float, why: str) -> None:
    """Neither no protection nor no editing happens silently, and the remedy names the rule's own setting."""
    moment = Moment(a_moment().basis, a_moment().eigenvalues + 1e-3, seen=1000)
    for make in (lambda s: Kernel(moment, Ridge(0.0, 0.02, True), s, CPU), lambda s: Projector(moment, s, CPU)):
        with pytest.raises(InvalidInput, match=why) as caught:
            make(NullSpace(rule, value))
        assert rule in caught.value.hint


def test_a_ridge_without_any_weight_is_refused() -> None:
    """λ = ρ = 0 divides by zero: that is told, not left to a failing factorisation."""
    with pytest.raises(InvalidInput):
        Kernel(a_moment(), Ridge(0.0, 0.0, True), RULES[0], CPU)
    Kernel(a_moment(), Ridge(0.0, 1e-9, True), RULES[0], CPU)
