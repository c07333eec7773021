"""What scores are made of: the rules that several tasks share, and the interval of a mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import sqrt

from rect_lightning.metrics import normalised_words

_Z = 1.959964  # of 95 %
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Ratio:
    """What one record adds to a score that is a ratio of sums over records, or the mean of several such ratios."""

    numerators: tuple[float, ...]
    denominators: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float


def summarise(parts: Sequence[float | Ratio]) -> Score:
    """The mean over records, or the ratio of sums, with a 95 % interval.

    Shares, of records that are right or wrong, get Wilson's interval (1927). All else gets the percentiles of 1,000
    bootstrap resamples of the records (Efron 1979) with a fixed seed. Neither speaks of more than the choice of records.

    Args:
        parts: What each record gives, at least one.
    """
    ratios = [part if isinstance(part, Ratio) else Ratio((float(part),), (1.0,)) for part in parts]
    if all(ratio.denominators == (1.0,) and ratio.numerators[0] in (0.0, 1.0) for ratio in ratios):
        return _wilson(sum(ratio.numerators[0] for ratio in ratios), len(ratios))
    return _bootstrap(ratios)


def _wilson(hits: float, n: int) -> Score:
    share = hits / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Score(value=share, low=max(0.0, min(share, centre - half)), high=min(1.0, max(share, centre + half)))


def _bootstrap(ratios: Sequence[Ratio]) -> Score:
    import numpy as np

    above, below = (
        np.array([getattr(r, side) for r in ratios], dtype=float) for side in ("numerators", "denominators")
    )

    def values(times: np.ndarray) -> np.ndarray:
        """The score with each record taken so many times, ``[resamples]``; a group that has no data is left out."""
        sums, totals = times @ above, times @ below
        has = totals > 0
        each = np.divide(sums, totals, out=np.zeros_like(sums), where=has)
        return np.asarray(each.sum(1) / np.maximum(1, has.sum(1)))

    n = len(ratios)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low, high = np.percentile(values(draws), [2.5, 97.5])
    return Score(value=float(values(np.ones((1, n)))[0]), low=float(low), high=float(high))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, with commas between thousands, a sign and decimals understood; None without one."""
    found = re.findall(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\$?\.\d+", text)
    try:
        return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None
    except InvalidOperation:
        return None


def exact(text: str, answers: Sequence[str]) -> float:
    """Whether a text is one of the answers, both normalised as in SQuAD (Rajpurkar et al. 2016)."""
    return float(any(normalised_words(text) == normalised_words(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of a text's words, of the answer that it is nearest to; as in SQuAD."""

    def one(answer: str) -> float:
        said, wanted = Counter(normalised_words(text)), Counter(normalised_words(answer))
        if not said or not wanted:
            return float(said == wanted)
        return 2 * (said & wanted).total() / (said.total() + wanted.total())

    return max(one(answer) for answer in answers)


def rouge(text: str, reference: str) -> dict[str, float]:
    """The F-measures of ROUGE-1, -2 and -L (Lin 2004) by torchmetrics, without stemming."""
    from torchmetrics.functional.text import rouge_score

    found = rouge_score(text, reference, rouge_keys=("rouge1", "rouge2", "rougeL"))
    return {name: float(found[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")}
