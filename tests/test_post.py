"""What is done to solved updates: RECT, PRUNE, SPHERE and projection against their formulas written out in full."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editctl.delta import Delta, Factors, compose, load, pack, save, unpack
from editctl.engine.methods import METHODS, NullSpace, Settings, Write, settings
from editctl.engine.post import SMALL, finish, project, prune, rect, sphere, sum_of, top_singular_value
from editctl.engine.solve import Kernel, Projector, strongest
from editctl.engine.statistics import Moment

CPU = torch.device("cpu")
SHAPES = [(10, 24), (24, 10)]
"""d_out × d_in, of wide and of tall weights."""
SIZES = (1, 3, 5, 4, 3)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_weight(shape: tuple[int, int] = SHAPES[0]) -> Tensor:
    return 0.3 * random(*shape, seed=99)


def an_update(n: int = 3, seed: int = 0, shape: tuple[int, int] = SHAPES[0], size: float = 0.2) -> Factors:
    out, wide = shape
    return Factors(random(wide, n, seed=seed), random(out, n, seed=seed + 1), size * random(n, wide, seed=seed + 2))


def whole(updates: Sequence[Factors]) -> Tensor:
    """Their sum in float64, by matrix products."""
    total = torch.zeros(updates[0].shape, dtype=torch.float64)
    for update in updates:
        part = update.residuals.double() @ update.factor.double()
        if update.left is not None and update.right is not None:
            part = part + update.left.double() @ update.right.double()
        if update.mask is not None:
            part = part * unpack(update.mask, update.shape)
        total += part if update.dense is None else update.dense.double()
    return total


def a_moment(width: int = SHAPES[0][1], dtype: torch.dtype = torch.float32) -> Moment:
    basis = torch.linalg.qr(random(width, width, seed=5).double()).Q
    return Moment(basis.to(dtype), torch.logspace(-4, 1, width, dtype=torch.float64), seen=1000)


def a_projector(width: int = SHAPES[0][1]) -> Projector:
    return Projector(a_moment(width), NullSpace("energy", 0.1), CPU)


def outside(update: Tensor, projector: Projector) -> float:
    """‖D (I − P)‖ / ‖D‖."""
    exact = update.double()
    return float((exact - projector(exact)).norm() / exact.norm())


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    error = float((one.double() - other.double()).norm() / other.double().norm())
    assert error <= tolerance, f"off by {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# RECT


def largest(scores: Tensor, share: float) -> Tensor:
    """A mask of that share of all entries, largest first, by sorting."""
    order = sorted(range(scores.numel()), key=lambda i: -float(scores.flatten()[i]))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: int(share * scores.numel())]] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9, 1.0])
def test_rect_keeps_exactly_the_share_that_changes_its_weight_most(share: float) -> None:
    """|D / W| decides, not |D|; what is kept keeps its bits, all else is zero."""
    factors, weight = an_update(), a_weight()
    plain, kept = factors.update(), rect(factors, weight, share)
    wanted = largest((plain / (weight + SMALL)).abs(), share)
    assert kept.mask is not None and kept.kind == "sparse"
    assert int(wanted.sum()) == int(share * plain.numel())
    assert torch.equal(unpack(kept.mask, kept.shape), wanted)
    assert torch.equal(kept.update(), torch.where(wanted, plain, torch.zeros_like(plain)))
    if share < 1:
        assert not torch.equal(unpack(kept.mask, kept.shape), largest(plain.abs(), share)), "control: |D| alone"


def test_rect_keeps_at_least_the_one_that_changes_most() -> None:
    """A share of less than one entry is one entry."""
    kept = rect(an_update(), a_weight(), 0.0)
    assert kept.mask is not None and int(unpack(kept.mask, kept.shape).sum()) == 1


def test_entries_that_rect_leaves_alone_keep_the_bits_of_the_weight(tmp_path: Path) -> None:
    """Composed, stored and composed again, the weight is W where the mask is 0 and that of the whole update where it
    is 1; one bit of the mask more is another weight and another file."""
    weight, factors = a_weight(), an_update()
    kept = rect(factors, weight, 0.4)
    assert kept.mask is not None
    mask, composed = unpack(kept.mask, kept.shape), compose(weight, [kept])
    assert torch.equal(composed, torch.where(mask, compose(weight, [factors]), weight))
    name = save(Delta(("a", "b", "c"), {"m": kept}, {}), tmp_path)
    back = load(name, tmp_path).modules["m"]
    assert back.kind == "sparse" and back.mask is not None
    assert back.mask.dtype == torch.uint8 and torch.equal(back.mask, kept.mask)
    assert torch.equal(compose(weight, [back]), composed)
    mask.view(-1)[int((~mask).flatten().nonzero()[0])] = True
    other = replace(kept, mask=pack(mask))
    assert not torch.equal(compose(weight, [other]), composed)
    assert save(Delta(("a", "b", "c"), {"m": other}, {}), tmp_path) != name


def stored(factors: Factors, folder: Path) -> int:
    """Bytes of tensors in the factor file."""
    data = (folder / f"{save(Delta(('a',), {'m': factors}, {}), folder)}.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("shape", [(10, 24), (7, 9), (128, 512)], ids=str)
def test_what_rect_costs_on_disk_is_one_bit_an_entry(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Thin parts and ⌈d_out · d_in / 8⌉ bytes, 1/32 of the fp32 matrix; projected afterwards it is that matrix."""
    (out, wide), n = shape, 2
    factors, weight = an_update(n, shape=shape), a_weight(shape)
    thin = 4 * n * (2 * wide + out)
    kept = rect(factors, weight, 0.4)
    dense = project(kept, a_projector(wide))
    assert stored(factors, tmp_path) == thin
    assert stored(kept, tmp_path) == thin + math.ceil(out * wide / 8)
    assert stored(dense, tmp_path) == thin + 4 * out * wide
    if shape == (128, 512):
        assert (stored(kept, tmp_path), stored(dense, tmp_path)) == (17408, 271360)


def test_projected_rect_is_the_masked_update_times_the_projector() -> None:
    """mask(D) P lies in the null space and is dense; mask(D) alone does not, nor would mask(D P)."""
    factors, weight, projector = an_update(), a_weight(), a_projector()
    made = finish(factors, Write(post=("rect",)), base=weight, weight=weight, earlier=[], projector=projector)
    kept = rect(factors, weight, 0.4)
    free = a_moment(dtype=torch.float64).basis[:, : projector.rank]
    assert made.kind == "dense" and made.mask is None
    assert_close(made.update(), kept.update().double() @ free @ free.T)
    assert outside(made.update(), projector) < 1e-6
    for unprojected in (kept, rect(project(factors, projector), weight, 0.4)):
        assert outside(unprojected.update(), projector) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# PRUNE


def conditioned(total: Tensor, base: Tensor) -> Tensor:
    """The sum with singular values s > σ made ln s − ln σ + σ, by a full decomposition."""
    limit = float(torch.linalg.matrix_norm(base.double(), 2))
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    kept = torch.tensor([math.log(s) - math.log(limit) + limit if s > limit else s for s in values.tolist()])
    result: Tensor = left @ torch.diag(kept.double()) @ right
    return result


def batches(shape: tuple[int, int], size: float = 0.5) -> list[Factors]:
    return [an_update(n, 10 * i, shape, size) for i, n in enumerate(SIZES)]


def prune_all(base: Tensor, updates: Sequence[Factors]) -> list[Factors]:
    made: list[Factors] = []
    for factors in updates:
        made.append(prune(factors, base, made))
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_of_pruned_updates_is_the_conditioned_one_after_every_batch(shape: tuple[int, int]) -> None:
    """Over five batches, against a full SVD of the sum so far; every part stays thin."""
    base, total = a_weight(shape), torch.zeros(shape, dtype=torch.float64)
    limit, made = float(torch.linalg.matrix_norm(base, 2)), prune_all(base, batches(shape))
    for i, plain in enumerate(batches(shape)):
        grown = total + whole([plain])
        most = float(torch.linalg.matrix_norm(grown, 2))
        total = conditioned(grown, base)
        assert_close(whole(made[: i + 1]), total)
        left = made[i].left
        assert made[i].kind == "thin" and left is not None and most > limit, "the updates are to be large enough"
        top = float(torch.linalg.matrix_norm(compose(torch.zeros(shape), made[: i + 1]), 2))
        assert top == pytest.approx(math.log(most) - math.log(limit) + limit, rel=1e-5)
        over = int((torch.linalg.svdvals(grown) > limit).sum())
        assert left.shape[1] == over < min(shape)


def test_the_check_of_the_sum_notices_what_is_not_conditioned() -> None:
    """Control: left out for one batch, or with another limit, the sum is another; the published code's sum too, which
    has the conditioned sum beside the whole one."""
    base = a_weight()
    plain, made = batches(SHAPES[0]), prune_all(base, batches(SHAPES[0]))
    total = torch.zeros(SHAPES[0], dtype=torch.float64)
    for factors in plain:
        total = conditioned(total + whole([factors]), base)
    published = whole(plain) + conditioned(whole(plain), base)
    assert_close(whole(made), total)
    for wrong in (whole([*made[:4], plain[4]]), whole(prune_all(1.05 * base, plain)), published):
        with pytest.raises(AssertionError):
            assert_close(wrong, total)
    top = torch.linalg.matrix_norm(published, 2)
    assert float(top) > 2 * float(torch.linalg.matrix_norm(whole(made), 2)), "adding twice outgrows what it bounds"


def test_small_updates_are_not_touched() -> None:
    """No singular value above σ: the very factors come back. One above, and they do not."""
    base = a_weight()
    small = batches(SHAPES[0], size=1e-3)
    assert all(prune(one, base, small[:i]) is one for i, one in enumerate(small))
    assert prune(small[0], base, batches(SHAPES[0])) is not small[0]


def test_only_the_base_sets_the_limit() -> None:
    """σ is that of the unedited weight, so that a grown weight does not allow more growth."""
    base, factors = a_weight(), an_update()
    write = Write(post=("prune",))
    made = finish(factors, write, base=base, weight=9 * base, earlier=[], projector=None)
    assert_close(made.update(), conditioned(whole([factors]), base))
    with pytest.raises(AssertionError):
        assert_close(made.update(), conditioned(whole([factors]), 9 * base))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_of_other_kinds_count_in_the_sum(shape: tuple[int, int]) -> None:
    """Masked and dense updates before it, or a masked one itself, are conditioned as the matrices that they are."""
    base, before, factors = a_weight(shape), an_update(2, 30, shape), an_update(3, 0, shape)
    for kind in ("thin", "sparse", "dense"):
        earlier = {
            "thin": before,
            "sparse": rect(before, base, 0.3),
            "dense": replace(before, dense=before.update()),
        }[kind]
        for own in (factors, rect(factors, base, 0.4), replace(factors, dense=2 * factors.update())):
            made = prune(own, base, [earlier])
            wanted = conditioned(whole([earlier, own]), base)
            assert_close(whole([earlier, made]), wanted)
            assert_close(compose(torch.zeros(shape), [earlier, made]), wanted)
            with pytest.raises(AssertionError):
                assert_close(whole([earlier, own]), wanted)
    tall, wide = sum_of([before, factors])
    assert tall.shape == (shape[0], 5) and wide.shape == (5, shape[1]), "thin ones are summed thin"
    assert_close(tall @ wide, whole([before, factors]), 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_singular_value_is_that_of_a_decomposition(shape: tuple[int, int]) -> None:
    """From the smaller Gram matrix, to twelve digits; the Frobenius norm is another number."""
    weight = a_weight(shape)
    assert float(top_singular_value(weight)) == pytest.approx(
        float(torch.linalg.svdvals(weight.double())[0]), rel=1e-12
    )
    assert float(top_singular_value(weight)) < 0.9 * float(weight.norm())


# ---------------------------------------------------------------------------------------------------------------------
# SPHERE


def spared(update: Tensor, weight: Tensor, energy: float, strength: float, *, unit: bool = True) -> Tensor:
    """D (I − α U Uᵀ) with U from the d_in × d_in second moment of W's rows."""
    second = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for row in weight.double():
        direction = row / row.norm() if unit else row
        second += torch.outer(direction, direction) / weight.shape[0]
    values, vectors = torch.linalg.eigh(second)
    held, count = 0.0, 0
    while held <= energy * float(values.sum()):
        count += 1
        held += float(values[-count])
    principal: Tensor = vectors[:, -count:]
    return update - strength * update @ principal @ principal.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("energy", "strength"), [(0.5, 0.5), (0.5, 1.0), (0.1, 0.5), (0.9, 0.3)])
def test_sphere_spares_the_principal_directions_of_unit_rows(
    shape: tuple[int, int], energy: float, strength: float
) -> None:
    """Against the formula in full, for wide weights (by the small Gram matrix) and tall ones; thin stays thin."""
    weight = a_weight(shape) * torch.logspace(-1, 1, shape[0])[:, None]
    factors = an_update(3, 0, shape)
    made, wanted = sphere(factors, weight, energy, strength), whole([factors])
    assert made.kind == "thin" and made.residuals is factors.residuals
    assert_close(made.update(), spared(wanted, weight, energy, strength))
    controls = {
        "rows as long as they are": spared(wanted, weight, energy, strength, unit=False),
        "more directions": spared(wanted, weight, 0.97, strength),
        "less taken away": spared(wanted, weight, energy, 0.9 * strength),
        "nothing taken away": wanted,
    }
    for other in controls.values():
        with pytest.raises(AssertionError):
            assert_close(made.update(), other, 1e-3)


@pytest.mark.parametrize("kind", ["with a low-rank part", "sparse", "dense"])
def test_sphere_spares_all_of_an_update(kind: str) -> None:
    """PRUNE's part as well as the rest, and the matrix that a masked update is."""
    weight, factors = a_weight(), an_update()
    made = {
        "with a low-rank part": prune(factors, weight, []),
        "sparse": rect(factors, weight, 0.4),
        "dense": replace(factors, dense=random(*SHAPES[0], seed=40)),
    }[kind]
    found = sphere(made, weight, 0.5, 0.5)
    assert found.kind == ("thin" if kind == "with a low-rank part" else "dense")
    assert_close(found.update(), spared(whole([made]), weight, 0.5, 0.5))
    with pytest.raises(AssertionError):
        assert_close(found.update(), spared(whole([factors]), weight, 0.5, 0.5))


def test_sphere_looks_at_the_weight_as_it_is_now() -> None:
    """Not at the base, as AlphaEdit's updates go to the current weight."""
    base, factors = a_weight(), an_update()
    now = base + random(*SHAPES[0], seed=41)
    write = Write(post=("sphere",))
    made = finish(factors, write, base=base, weight=now, earlier=[], projector=None)
    assert_close(made.update(), spared(whole([factors]), now, 0.5, 0.5))
    with pytest.raises(AssertionError):
        assert_close(made.update(), spared(whole([factors]), base, 0.5, 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Together


def test_projection_keeps_thin_what_is_thin() -> None:
    """A and PRUNE's right part are multiplied by P, R and left stay; masks and matrices become matrices."""
    factors, weight, projector = an_update(), a_weight(), a_projector()
    free = a_moment(dtype=torch.float64).basis[:, : projector.rank]
    parts = {
        "thin": factors,
        "pruned": prune(factors, weight, []),
        "sparse": rect(factors, weight, 0.4),
        "dense": replace(factors, dense=random(*SHAPES[0], seed=40)),
    }
    for name, part in parts.items():
        made = project(part, projector)
        assert made.kind == ("thin" if name in ("thin", "pruned") else "dense")
        assert made.residuals is part.residuals and made.left is (part.left if made.kind == "thin" else None)
        assert_close(made.update(), whole([part]) @ free @ free.T)
        assert outside(made.update(), projector) < 1e-6 < 0.1 < outside(part.update(), projector)


@pytest.mark.parametrize("post", [p for n in (1, 2, 3) for p in itertools.permutations(("rect", "prune", "sphere"), n)])
@pytest.mark.parametrize("projected", [False, True], ids=["free", "projected"])
def test_steps_are_done_in_the_order_they_are_named(post: tuple[str, ...], projected: bool) -> None:
    """Every order equals the formulas one after another on whole matrices; another order is another update."""
    base, factors, earlier = a_weight(), an_update(), [an_update(2, 30)]
    weight = compose(base, earlier)
    projector = a_projector() if projected else None
    if projector is not None:
        factors, earlier = project(factors, projector), [project(earlier[0], projector)]

    def formulas(order: Sequence[str]) -> Tensor:
        update, before = whole([factors]), whole(earlier)
        for name in order:
            if name == "rect":
                update = update * largest((update / (weight + SMALL)).abs(), 0.4)
            elif name == "prune":
                update = conditioned(before + update, base) - before
            else:
                update = spared(update, weight, 0.5, 0.5)
        if projector is None or tuple(order) == ("prune",):
            return update
        return projector(update)

    made = finish(factors, Write(post=post), base=base, weight=weight, earlier=earlier, projector=projector)
    assert_close(made.update(), formulas(post))
    if len(post) > 1:
        with pytest.raises(AssertionError):
            assert_close(made.update(), formulas(post[::-1]), 1e-3)
    if projector is not None:
        assert outside(made.update(), projector) < 1e-5


def test_nothing_to_do_leaves_the_update_alone() -> None:
    """Methods that keep to the null space in their solve are not projected once more."""
    factors, weight = an_update(), a_weight()
    for projector in (None, a_projector()):
        made = finish(factors, Write(), base=weight, weight=weight, earlier=[], projector=projector)
        assert made is factors


# ---------------------------------------------------------------------------------------------------------------------
# Every method keeps to the null space


def carried_out(made: Settings, moment: Moment) -> list[tuple[Factors, Projector | None]]:
    """The updates of four batches of a method on one layer as an `Editor` makes them, with the projector each had."""
    out, wide = SHAPES[0]
    base, write = a_weight(), made.write
    kernel = Kernel(moment, made.ridge, made.null_space, CPU, write)
    written: list[Factors] = []
    found = []
    for i, n in enumerate(SIZES[:4]):
        n = 1 if made.ridge.hard else n
        keys, goal = random(wide, n, seed=60 + i), 3 * random(out, n, seed=70 + i)
        first = len(written)
        for round_ in range(write.rounds):
            missing = goal if not round_ else goal - compose(torch.zeros(out, wide), written[first:]) @ keys
            factors = kernel.solve(
                keys,
                missing,
                at=keys + 0.3 * random(wide, n, seed=80 + i) if write.keys == "rome" else None,
                neurons=strongest(keys, write.neurons) if write.neurons < 1 else None,
                remember=write.rounds == 1,
            )
            projector, now = kernel.projector, compose(base, written)
            done = finish(factors, write, base=base, weight=now, earlier=list(written), projector=projector)
            written.append(done)
            found.append((done, projector))
        if write.rounds > 1:
            kernel.absorb(keys)
    return found


MODEL = {"num_hidden_layers": 8, "hidden_size": 64}
CLOSED = [name for name, method in METHODS.items() if method.tune is None and method.own is None]


def assert_keeps_to_it(updates: Sequence[tuple[Factors, Projector | None]], allowed: Projector) -> None:
    for factors, projector in updates:
        assert factors.norm() > 0
        assert outside(factors.update(), projector or allowed) < 1e-5


@pytest.mark.parametrize("name", CLOSED)
def test_every_method_writes_into_the_null_space_only(name: str) -> None:
    """‖D (I − P)‖ / ‖D‖ < 1e-5 for the finished update of every batch with `preserve = "null-space"`, in fp32; not
    with `none`. BetaEdit's P is the one it has at that batch."""
    rule = {"preserve": "null-space", "energy": 0.1, "lambda": 0.5, "refresh": 4 if name == "betaedit" else 0}
    made = settings(MODEL, name, rule)
    assert made.null_space is not None
    moment = a_moment()
    allowed = Projector(moment, made.null_space, CPU)
    updates = carried_out(made, moment)
    assert_keeps_to_it(updates, allowed)
    assert len({id(projector) for _, projector in updates}) == (3 if name == "betaedit" else 1)
    assert name != "prune" or all(factors.left is not None for factors, _ in updates)
    bare = settings(MODEL, name, {**rule, "preserve": "none"})
    assert bare == replace(made, null_space=None)
    with pytest.raises(AssertionError):
        assert_keeps_to_it(carried_out(bare, moment), allowed)
