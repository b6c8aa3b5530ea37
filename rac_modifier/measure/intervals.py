"""Errors of measured figures: 95 % intervals, tests and standard errors."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import fmean

import numpy as np

Z = 1.959964  # 97.5th percentile of the normal distribution
LEAST_ROWS = 16  # completions from which a standard error is reported
Interval = tuple[float, float]


def share_interval(shares: Sequence[float]) -> Interval:
    """Return the interval of the mean of `shares`, the share of right answers of each problem.

    A bootstrap over problems. With an answer per problem, or equal shares: Wilson's interval.
    """
    if set(shares) <= {0.0, 1.0} or len(set(shares)) == 1:
        return _wilson_interval(math.fsum(shares), len(shares))
    return ratio_interval(shares, [1.0] * len(shares))


def difference_interval(differences: Sequence[float]) -> Interval:
    """Return the interval of the mean of paired differences, -1 to 1, one per problem.

    A bootstrap over problems. With an answer per problem, or equal differences: Tango's interval.
    """
    if set(differences) <= {-1.0, 0.0, 1.0} or len(set(differences)) == 1:
        lost = -math.fsum(min(value, 0.0) for value in differences)
        gained = math.fsum(max(value, 0.0) for value in differences)
        return _tango_interval(lost, gained, len(differences))
    return ratio_interval(differences, [1.0] * len(differences))


def _wilson_interval(correct: float, total: int) -> Interval:
    """Return Wilson's score interval of a proportion, which is valid near 0 and 1 too."""
    share, spread = correct / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # without this, rounding could put a perfect score outside its own interval
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def _tango_interval(lost: float, gained: float, total: int) -> Interval:
    """Return Tango's score interval of (gained - lost) / total (Statistics in Medicine 17, 1998).

    |gained - lost - total d| = Z sqrt(total (2 p + d (1 - d))) at its bounds d, where p is the
    likeliest probability of `lost` under the difference d.
    """
    difference = (gained - lost) / total

    def score(d: float) -> float:
        b = gained + lost - d * (2 * total - gained + lost)
        root = math.sqrt(max(b * b + 8 * total * lost * d * (1 - d), 0.0))
        p = max((b + root) / (4 * total), -d, 0.0)
        error = gained - lost - total * d
        variance = total * (2 * p + d * (1 - d))
        return error / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, error)

    return (
        _bisect(lambda d: score(d) > Z, -1.0, difference),
        _bisect(lambda d: score(d) > -Z, difference, 1.0),
    )


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the interval of sum(above) / sum(below): 10,000 bootstraps over problems."""
    pairs = np.asarray([above, below], dtype=np.float64)
    chance, count = np.random.default_rng(0), len(above)
    ratios = []
    for _ in range(20):
        sums = pairs[:, chance.integers(count, size=(500, count))].sum(axis=2)
        ratios.append(sums[0] / sums[1])
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p value of McNemar's test, a binomial test with chance 1/2."""
    discordant, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(discordant, i) for i in range(fewer + 1)) / 2**discordant
    return min(1.0, 2 * tail)


def _pass_at_k(correct: int, samples: int, k: int) -> float:
    """Estimate the chance that one of k answers is right (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at(counts: Sequence[int], samples: int) -> dict[str, float]:
    """Return pass@k over problems for k = 1, 2, 4 ... `samples`; `counts` are right answers."""
    ks = sorted({min(2**power, samples) for power in range(samples.bit_length() + 1)})
    return {str(k): fmean(_pass_at_k(count, samples, k) for count in counts) for k in ks}


def mean_over_tokens(rows: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the mean over all tokens of all rows, and its standard error over rows.

    The error is None below 16 rows. With residuals r_i = sum_i - mean * n_i of m rows it is
    sqrt(m / (m - 1) * sum r_i^2) / sum n_i (Cochran, Sampling Techniques, 1977, 6.3).
    """
    mean = fmean(chain.from_iterable(rows))
    m, count = len(rows), sum(map(len, rows))
    if m < LEAST_ROWS:
        return mean, None
    squares = math.fsum((math.fsum(row) - mean * len(row)) ** 2 for row in rows)
    return mean, math.sqrt(m / (m - 1) * squares) / count


def _bisect(true_below: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds below a point of [low, high] ends."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if true_below(middle) else (low, middle)
    return (low + high) / 2
