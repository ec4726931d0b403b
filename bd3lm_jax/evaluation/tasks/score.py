"""Accuracy over problems with its interval, and the paired difference of two models."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bd3lm_jax.core import stats


class PairedDifference(NamedTuple):
    """Ours less theirs. p_value: two-sided, that the difference is 0; NaN where there are too few problems."""

    difference: float
    low: float
    high: float
    p_value: float
    test: str


def mean_interval(scores_N: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the problems' scores in [0, 1] with a confidence interval over problems: (mean, low, high).

    Scores that are all 0 or 1 make a proportion: Wilson (1927). Else Student's t, cut to [0, 1].
    """
    scores_N = np.asarray(scores_N, np.float64)
    if np.isin(scores_N, (0, 1)).all():
        return wilson_interval(int(scores_N.sum()), len(scores_N), level)
    mean, low, high = stats.ratio_interval(scores_N, np.ones_like(scores_N), level)
    return mean, max(low, 0.0), min(high, 1.0)


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float, float]:
    """A proportion with Wilson's score interval: (proportion, low, high)."""
    z2, p = _z(level) ** 2, successes / trials
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    margin = math.sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return p, min(p, max(0.0, centre - margin)), max(p, min(1.0, centre + margin))


def paired(candidate_N: ArrayLike, baseline_N: ArrayLike, level: float = 0.95) -> PairedDifference:
    """Difference of two models' mean scores on the same problems.

    Scores that are all 0 or 1: exact McNemar test, interval of Bonett and Price (2012, the Wald interval after one
    problem was added to either kind that only one model solves). Else: paired t test and its interval.
    """
    candidate_N, baseline_N = np.asarray(candidate_N, np.float64), np.asarray(baseline_N, np.float64)
    n, difference_N = len(candidate_N), candidate_N - baseline_N
    if not np.isin((candidate_N, baseline_N), (0, 1)).all():
        interval = stats.two_part_interval(difference_N[None], difference_N[None], np.ones(n), level)
        return PairedDifference(interval.value, max(interval.low, -1.0), min(interval.high, 1.0), interval.p_value,
                                "paired t")
    only_candidate, only_baseline = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    p, q = (only_candidate + 1) / (n + 2), (only_baseline + 1) / (n + 2)
    margin = _z(level) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return PairedDifference((only_candidate - only_baseline) / n, max(p - q - margin, -1.0), min(p - q + margin, 1.0),
                            mcnemar_p_value(only_candidate, only_baseline), "exact McNemar")


def mcnemar_p_value(only_candidate: int, only_baseline: int) -> float:
    """Exact two-sided p-value that problems which only one model solves are as often ours as theirs (a fair coin)."""
    total = only_candidate + only_baseline
    tail = sum(math.comb(total, k) for k in range(min(only_candidate, only_baseline) + 1))
    return min(1.0, 2 * tail / 2**total)


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
