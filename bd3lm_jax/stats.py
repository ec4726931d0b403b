"""Error bars: intervals over documents, standard errors over draws."""

import functools
import math
from typing import NamedTuple

import numpy as np

from bd3lm_jax.errors import UserError


def ratio_interval(numerators_N: np.ndarray, denominators_N: np.ndarray,
                   level: float = 0.95) -> tuple[float, float, float]:
    """sum(numerators) / sum(denominators) with a confidence interval: (ratio, low, high).

    One entry a document, the unit that is drawn independently: nats and tokens give nats per token. Linearised
    variance of a ratio estimator with n/(n-1) (Cochran, Sampling Techniques, 1977, sec. 6.4) and Student's t with n-1
    degrees of freedom. With fewer than two documents low and high are nan. Raises UserError on shapes that differ or
    a denominator that is not positive.
    """
    numerators_N, denominators_N = (np.asarray(x, np.float64) for x in (numerators_N, denominators_N))
    if numerators_N.ndim != 1 or numerators_N.shape != denominators_N.shape:
        raise UserError(f"a ratio needs two equal lists, one entry a document: got shapes {numerators_N.shape} "
                        f"and {denominators_N.shape}")
    total = denominators_N.sum()
    if not total > 0:
        raise UserError(f"nothing to average: the denominators of {len(denominators_N)} documents sum to {total}")
    ratio = float(numerators_N.sum() / total)
    n = len(numerators_N)
    if n < 2:
        return ratio, math.nan, math.nan
    residuals_N = numerators_N - ratio * denominators_N
    se = math.sqrt(n / (n - 1) * float(np.sum(residuals_N**2))) / float(total)
    margin = t_quantile((1 + level) / 2, n - 1) * se
    return ratio, ratio - margin, ratio + margin


class Interval(NamedTuple):
    """A ratio with its confidence interval and the two parts of its standard error: se**2 = document_se**2 + mc_se**2.

    p_value: two-sided, for the hypothesis that the ratio is 0. NaN where there are too few documents or draws.
    """

    value: float
    low: float
    high: float
    document_se: float
    mc_se: float
    p_value: float


def two_part_interval(documents_UxN: np.ndarray, rows_UxR: np.ndarray, denominators_N: np.ndarray,
                      level: float = 0.95) -> Interval:
    """sum(numerators) / sum(denominators) with errors from the choice of documents and from noise draws apart.

    documents_UxN: U independent noisy estimates (draws) of each document's numerator. rows_UxR: their sums over the
    rows of noise that are independent of each other (a document may lie in several rows, a row hold several documents).
    U = 1 means exact. The spread of the documents' means holds the noise of each document; what that noise explains is
    taken off, and what the draws leave in the total is added: mc_se**2. As `ratio_interval` otherwise.
    """
    documents_UxN, rows_UxR = (np.asarray(x, np.float64) for x in (documents_UxN, rows_UxR))
    draws, n = documents_UxN.shape
    value, low, high = ratio_interval(documents_UxN.mean(0), denominators_N, level)
    total = float(np.sum(denominators_N))
    quantile = t_quantile((1 + level) / 2, n - 1) if n > 1 else math.nan
    document_variance, mc_se = ((high - low) / 2 / quantile) ** 2, 0.0
    if draws > 1:
        mc_se = monte_carlo_se(rows_UxR.T) / total
        noise = float(np.sum(np.var(documents_UxN, axis=0, ddof=1))) / draws / total**2
        document_variance = max(document_variance - noise, 0) if n > 1 else math.nan
    se = math.sqrt(document_variance + mc_se**2)
    p_value = t_p_value(value / se, n - 1) if se > 0 else math.nan
    return Interval(value, value - quantile * se, value + quantile * se, math.sqrt(document_variance), mc_se, p_value)


def mc_margin(rows_UxR: np.ndarray, level: float = 0.95) -> float:
    """Half width of the confidence interval of the sum over rows of the mean over U draws, as far as draws make it.

    0 if U = 1: an exact number.
    """
    draws, rows = rows_UxR.shape
    return 0.0 if draws == 1 else t_quantile((1 + level) / 2, rows * (draws - 1)) * monte_carlo_se(rows_UxR.T)


def monte_carlo_se(views_NxM: np.ndarray) -> float:
    """Standard error of sum over N of the mean over M, where row n holds M independent estimates of the same quantity.

    sqrt(sum_n var_n / M) with the unbiased variance of each row; nan if M < 2.
    """
    views_NxM = np.asarray(views_NxM, np.float64)
    draws = views_NxM.shape[1]
    if draws < 2:
        return math.nan
    return math.sqrt(float(np.sum(np.var(views_NxM, axis=1, ddof=1))) / draws)


@functools.lru_cache(maxsize=1024)  # the same few are asked for again and again
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, for probability in [0.5, 1).

    With t = sqrt(v) tan(a) the distribution function is 1/2 + c * integral_0^a cos(u)^(v-1) du: Gauss-Legendre
    for the integral, bisection on a.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        integral = angle / 2 * float(np.sum(weights * np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1)))
        low, high = (angle, high) if scale * integral < probability - 0.5 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def t_p_value(t: float, freedom: int) -> float:
    """Probability that |T| >= |t| for Student's t, as an incomplete beta function (Abramowitz and Stegun 26.7.1)."""
    from scipy.special import betainc  # comes with jax

    return float(betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))
