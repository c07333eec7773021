"""Student's t: the interval of a mean over a few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, cos, exp, inf, isclose, isfinite, log, pi, sin, sqrt
from statistics import fmean, stdev


def mean_and_interval(
    values: Sequence[float], *, ratio: bool = False, low: float = -inf, high: float = inf
) -> tuple[float, float | None, float | None]:
    """A mean over seeds with its 95 % t interval; without one where there is one value, or all are equal or not finite.

    Args:
        values: One a seed.
        ratio: Whether only quotients of them mean something, as of perplexities: mean and interval are those of the logarithms.
        low: The least that there can be.
        high: The most.
    """
    if ratio and min(values) > 0 and max(values) < inf:
        mean, first, last = mean_and_interval([log(value) for value in values])
        return exp(mean), None if first is None else exp(first), None if last is None else exp(last)
    mean = fmean(values)
    if not all(map(isfinite, values)) or isclose(min(values), max(values), abs_tol=1e-9):
        return mean, None, None
    lower, upper = t_interval(values)
    return mean, max(lower, low), min(upper, high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, ``mean ± t · s / √n`` with n - 1 degrees of freedom.

    Args:
        values: At least two, taken independently, such as one a seed.
    """
    half = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """How many standard errors a two-sided interval reaches, by bisection.

    Args:
        degrees: Degrees of freedom, at least 1.
        confidence: Between 0 and 1.
    """
    low, high = 0.0, 1e9
    while high - low > 1e-9 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """The chance of -t … t: the finite series of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(degrees))
    odd = degrees % 2
    term = cos(angle) if odd else 1.0
    total = 0.0
    for i in range(1 + odd, degrees, 2):
        total += term
        term *= cos(angle) ** 2 * i / (i + 1)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
