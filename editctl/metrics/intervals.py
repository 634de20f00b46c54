"""95 % intervals: how far a share, a mean or a change may be from what was measured.

Knows: the counts and the values. Refuses: where they come from. All intervals are two-sided at 95 %; none is symmetric
by force and none leaves the range its quantity can have. Values that belong together (the prompts of one edit) are no
independent draws: `clustered` says what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
_SERIES = 200
"""Degrees of freedom up to which Student's distribution is summed; beyond it the expansion is exact to ten digits."""


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927; Newcombe 1998, method 3).

    Also for a mean of values from 0 to 1, with their sum as hits: such values vary at most as much as zeros and ones
    of the same mean do, so the interval is wide enough. All or nothing right still gives an interval.

    Args:
        hits: how many counted, 0 to n.
        n: of how many; without any the share may be everything.

    Raises:
        ValueError: the hits are no number from 0 to n.
    """
    if not (0 <= hits <= n and math.isfinite(n)):
        raise ValueError(f"{hits} of {n} is no share")
    if not n:
        return 0.0, 1.0
    share, spread = hits / n, Z * Z / n
    middle = share + spread / 2
    reach = math.sqrt(spread * (share * (1 - share) + spread / 4))
    # The ends are exact where rounding would leave 1e-17 of a share that is none.
    low = 0.0 if hits == 0 else (middle - reach) / (1 + spread)
    high = 1.0 if hits == n else (middle + reach) / (1 + spread)
    return low, high


def clustered(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Wilson's interval of a mean of values from 0 to 1 that come in groups, each group one independent draw.

    Ten neighbourhood prompts of one edit fail together; counted as ten draws they promise too narrow an interval. The
    count is divided by the design effect, the variance between groups over that of independent values (Kish 1965), at
    least 1, and by Student's factor for so many groups; with all values alike it is unknown and the groups are counted
    (Korn and Graubard 1998).

    Args:
        groups: the values of each group; empty groups count for nothing.

    Raises:
        ValueError: a value is no number from 0 to 1.
    """
    groups = [group for group in groups if group]
    n, total, many = sum(map(len, groups)), math.fsum(value for group in groups for value in group), len(groups)
    if not all(0 <= value <= 1 for group in groups for value in group):
        raise ValueError("a value is no share")
    if not n:
        return wilson(0, 0)
    share = min(1.0, total / n)
    spread = share * (1 - share)
    if not spread or many == 1:
        return wilson(share * many, many)
    between = many / (many - 1) * math.fsum((math.fsum(g) - share * len(g)) ** 2 for g in groups) / n**2
    # Few groups tell little of how much they vary: Student's factor (Korn and Graubard 1998, equation 3).
    effective = n / max(1.0, between * n / spread) * (Z / student(many - 1)) ** 2
    return wilson(share * effective, effective)


def clustered_mean(
    groups: Sequence[Sequence[float]], least: float = -math.inf, most: float = math.inf
) -> tuple[float | None, float | None]:
    """Student's interval of the mean of all values that come in groups, each group one independent draw.

    The variance of the mean is that of the groups' sums less their share of it (Kish 1965), with as many degrees of
    freedom as groups less one.

    Args:
        least: what the mean can be at least.
        most: and at most.

    Returns:
        Two numbers, or twice None: fewer than two groups, or a value that is not finite, have no interval.
    """
    groups = [group for group in groups if group]
    n, many = sum(map(len, groups)), len(groups)
    mean = math.fsum(value for group in groups for value in group) / n if n else 0.0
    if many < 2 or not math.isfinite(mean):
        return None, None
    between = many / (many - 1) * math.fsum((math.fsum(g) - mean * len(g)) ** 2 for g in groups) / n**2
    reach = student(many - 1) * math.sqrt(between)
    return max(least, mean - reach), min(most, mean + reach)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Student's interval of a mean: mean ± t·s/√n with n − 1 degrees of freedom.

    For values without bounds; those from 0 to 1 have `wilson`, which is not empty when all are alike.

    Returns:
        Two numbers, or twice None: fewer than two values, or one that is not finite, have no interval.
    """
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None, None
    mean = math.fsum(values) / n
    reach = student(n - 1) * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean - reach, mean + reach


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t distribution.

    Args:
        freedom: degrees of freedom, 1 or more. Up to 200 the finite sum is inverted (Abramowitz and Stegun 26.7.3 and
            26.7.4); beyond, the expansion about the normal point (26.7.5).
    """
    if freedom > _SERIES:
        z2 = Z * Z
        terms = (
            (z2 + 1) / 4,
            ((5 * z2 + 16) * z2 + 3) / 96,
            (((3 * z2 + 19) * z2 + 17) * z2 - 15) / 384,
            ((((79 * z2 + 776) * z2 + 1482) * z2 - 1920) * z2 - 945) / 92160,
        )
        return Z * (1 + math.fsum(term / float(freedom) ** power for power, term in enumerate(terms, 1)))
    low, high = 0.0, math.pi / 2
    # Each halving is one bit: 60 leave nothing of a double.
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < 0.95 else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < √freedom · tan angle): a finite sum of powers of the cosine."""
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if freedom == 1:
        total = 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * cosine**2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact test of paired answers: how likely a change this uneven is when both ways are as likely.

    Args:
        lost: right before, wrong after.
        gained: wrong before, right after. Answers that stayed say nothing.

    Returns:
        The two-sided p of the binomial distribution with a half; 1 when nothing changed.
    """
    changed, fewer = lost + gained, min(lost, gained)
    if fewer < 0:
        raise ValueError(f"{lost} lost and {gained} gained are no counts")
    ways, tail = 1, 1
    for count in range(fewer):
        ways = ways * (changed - count) // (count + 1)
        tail += ways
    # Whole numbers to the end, since the ways of a thousand changes are more than a float can hold.
    return min(1.0, 2 * tail / (1 << changed))


def change(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Newcombe's interval of a difference of paired shares, after − before (Newcombe 1998, paired data, method 10).

    It joins the Wilson intervals of both shares by their correlation, so it has a width when nothing changed and stays
    within −1 to 1.

    Raises:
        ValueError: the answers are not paired.
    """
    pairs = list(zip(before, after, strict=True))
    n = len(pairs)
    if not n:
        return -1.0, 1.0
    both, neither = sum(b and a for b, a in pairs), sum(not b and not a for b, a in pairs)
    lost = sum(b and not a for b, a in pairs)
    gained = n - both - neither - lost
    first, second = both + gained, both + lost
    margins = first * (n - first) * second * (n - second)
    product = both * neither - lost * gained
    # Newcombe's continuity correction of the correlation, only where it is positive.
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    correlation = corrected / math.sqrt(margins) if margins else 0.0
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    p1, p2 = first / n, second / n
    down = (p1 - low1) ** 2 - 2 * correlation * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * correlation * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    return p1 - p2 - math.sqrt(max(0.0, down)), p1 - p2 + math.sqrt(max(0.0, up))
