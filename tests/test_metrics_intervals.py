"""Intervals: published values, and what happens where textbooks stop: nothing measured, all alike, one edit."""

from __future__ import annotations

import math
import random

import pytest

from editctl.metrics.intervals import change, clustered, clustered_mean, mcnemar, mean_interval, student, wilson

SHARES = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
"""Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
POINTS = [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)]
"""The 97.5 % points of Student's t, as printed in every table."""


@pytest.mark.parametrize(("hits", "n", "low", "high"), SHARES)
def test_a_share_has_the_published_interval(hits: int, n: int, low: float, high: float) -> None:
    """And, turned round, that of its complement. Control: the normal one would leave the range."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert 0 <= wilson(hits, n)[0] <= hits / n <= wilson(hits, n)[1] <= 1


def test_all_and_none_right_still_have_an_interval() -> None:
    """Exact at their end; nothing asked may be anything."""
    assert wilson(7, 7)[1] == 1.0 and 0.6 < wilson(7, 7)[0] < 0.7
    assert wilson(0, 7)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("hits", "n"), [(-1, 4), (5, 4), (math.nan, 4), (1, math.nan), (math.inf, math.inf)])
def test_what_is_no_share_is_refused(hits: float, n: float) -> None:
    """Rather than given an interval."""
    with pytest.raises(ValueError, match="is no share"):
        wilson(hits, n)


def test_prompts_of_one_edit_are_not_counted_as_so_many_edits() -> None:
    """Ten prompts that fail together are worth one; ten that fail as they like are worth ten."""
    together = [[1.0] * 10, [0.0] * 10] * 5
    worth = 10 * 0.9 * (1.959963984540054 / 2.262157162798205) ** 2  # Student's point for 9 degrees of freedom
    assert clustered(together) == pytest.approx(wilson(worth / 2, worth), abs=1e-9)
    generator = random.Random(0)
    apart = [[float(generator.random() < 0.5) for _ in range(10)] for _ in range(50)]
    n, hits = 500, sum(map(sum, apart))
    narrow = wilson(hits, n)
    assert clustered(apart)[1] - clustered(apart)[0] < 1.25 * (narrow[1] - narrow[0])
    assert clustered(together)[1] - clustered(together)[0] > 2 * (wilson(50, 100)[1] - wilson(50, 100)[0])


def test_the_interval_of_few_groups_holds_what_it_promises() -> None:
    """Of shares that vary between 5 groups of 10 at least 93 % of the intervals hold the true one; without Student's
    factor it is nine in ten."""
    generator, held = random.Random(1), 0
    for _ in range(1000):
        groups = []
        for _ in range(5):
            share = generator.betavariate(1.2, 1.2)
            groups.append([float(generator.random() < share) for _ in range(10)])
        low, high = clustered(groups)
        held += low <= 0.5 <= high
    assert held >= 930


def test_the_mean_of_groups_has_the_interval_of_its_sums() -> None:
    """By hand: two groups, mean 1, sums less their share 2 and −2, variance 2·8/36, one degree of freedom."""
    low, high = clustered_mean([[2.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    reach = 12.7062047 * math.sqrt(2 / 1 * (2**2 + 2**2) / 36)
    assert (low, high) == pytest.approx((1 - reach, 1 + reach), rel=1e-6)
    assert clustered_mean([[0.5], [0.7]], -1, 1)[1] == 1
    assert clustered_mean([[1.0, 2.0]]) == clustered_mean([[math.nan], [1.0]]) == clustered_mean([]) == (None, None)


def test_groups_of_one_value_are_plain_shares() -> None:
    """One prompt an edit, up to the one degree of freedom that the variance between edits costs."""
    found = clustered([[1.0]] * 30 + [[0.0]] * 10)
    assert found == pytest.approx(wilson(30, 40), abs=0.01)
    assert found[0] <= wilson(30, 40)[0] and found[1] >= wilson(30, 40)[1]


def test_values_that_are_all_alike_count_by_their_groups() -> None:
    """And nothing at all, or one group, may be nearly anything; a value outside 0 to 1 is refused."""
    assert clustered([[1.0] * 10] * 4) == wilson(4, 4)
    assert clustered([[1.0, 0.0]]) == wilson(0.5, 1)
    assert clustered([]) == clustered([[]]) == (0.0, 1.0)
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="is no share"):
            clustered([[0.5, wrong]])


@pytest.mark.parametrize(("freedom", "point"), POINTS)
def test_the_points_of_students_t_are_those_of_the_tables(freedom: int, point: float) -> None:
    """To the printed digits."""
    assert student(freedom) == pytest.approx(point, abs=5.1e-4)


def test_the_sum_and_the_expansion_of_students_t_meet() -> None:
    """And both come down to the normal distribution's point."""
    assert student(200) - student(201) == pytest.approx(student(199) - student(200), rel=0.05)
    assert student(10**9) == pytest.approx(1.959964, abs=1e-6)


def test_a_mean_has_students_interval() -> None:
    """By hand: 1, 2, 3 have mean 2, s = 1, so 2 ± 4.30265 / √3. One value has none, nor has what is no number."""
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert mean_interval([5.0] * 4) == (5.0, 5.0)
    for values in ([], [1.0], [1.0, math.nan], [1.0, math.inf]):
        assert mean_interval(values) == (None, None)


def test_the_interval_of_a_mean_holds_the_mean_in_95_of_100_draws() -> None:
    """With five values each; half the t would hold it far less often."""
    generator, held, less = random.Random(3), 0, 0
    for _ in range(1000):
        values = [generator.gauss(0, 1) for _ in range(5)]
        low, high = mean_interval(values)
        assert low is not None and high is not None
        held += low < 0 < high
        less += abs(sum(values) / 5) < (high - low) / 4
    assert 930 <= held <= 970
    assert less < 850


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (5, 15, 0.041389465), (8, 1, 0.0390625)],
)
def test_the_test_of_paired_answers_is_binomial(lost: int, gained: int, p: float) -> None:
    """Two-sided with a half: 5 of 20 by hand is 2 · 21700 / 2²⁰; the order does not matter."""
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(p, abs=1e-8)


def test_the_test_of_paired_answers_takes_any_counts_but_negative_ones() -> None:
    """Thousands would overflow a float on the way."""
    assert 0.0 < mcnemar(5000, 5300) < 0.01
    with pytest.raises(ValueError, match="no counts"):
        mcnemar(-1, 3)


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    rows = [(True, True)] * both + [(False, True)] * gained + [(True, False)] * lost + [(False, False)] * neither
    return [before for before, _ in rows], [after for _, after in rows]


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((18, 14, 0, 18), 0.1441, 0.3963),
        ((54, 0, 0, 0), -0.0664, 0.0664),
    ],
)
def test_a_change_of_paired_shares_has_newcombes_interval(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    """Newcombe 1998, Statistics in Medicine 17:2635, method 10, by his formula for r, s, t, u; the other way round it
    is its mirror image."""
    before, after = pairs(*counts)
    assert change(before, after) == pytest.approx((low, high), abs=5e-5)
    assert change(after, before) == pytest.approx((-high, -low), abs=5e-5)


def test_nothing_changed_has_a_width_and_what_is_not_paired_is_refused() -> None:
    """Since twenty answers cannot show that nothing ever changes."""
    low, high = change([True] * 20, [True] * 20)
    assert -0.2 < low < 0 < high < 0.2
    assert change([], []) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="argument 2"):
        change([True], [])
