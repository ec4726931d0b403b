"""Error bars: intervals over documents, standard errors over draws."""

import math

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


def monte_carlo_se(views_NxM: np.ndarray) -> float:
    """Standard error of sum over N of the mean over M, where row n holds M independent estimates of the same quantity.

    sqrt(sum_n var_n / M) with the unbiased variance of each row; nan if M < 2.
    """
    views_NxM = np.asarray(views_NxM, np.float64)
    draws = views_NxM.shape[1]
    if draws < 2:
        return math.nan
    return math.sqrt(float(np.sum(np.var(views_NxM, axis=1, ddof=1))) / draws)


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
