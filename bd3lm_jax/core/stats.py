"""Error bars: intervals over documents, standard errors over draws."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from bd3lm_jax.core.errors import UserError

MIN_DOCUMENTS = 3  # two give an interval 13 standard errors wide to either side, which says nothing
ROUNDING = float(np.finfo(np.float32).eps)  # relative; losses are computed in float32


class Interval(NamedTuple):
    """An estimate with its confidence interval; its standard error is the root of document_se**2 + mc_se**2.

    p_value: two-sided, for the hypothesis that the value is 0; 1 for a difference that is rounding. low, high,
    document_se and p_value are nan where documents or draws are too few; then missing says why, else it is "".
    """

    value: float
    low: float
    high: float
    document_se: float
    mc_se: float
    p_value: float
    missing: str = ""

    def non_negative(self) -> "Interval":
        """The same for a quantity that is never below 0: an interval that reaches below is none."""
        if not self.low < 0:
            return self
        return self._replace(low=math.nan, high=math.nan, missing=(
            "no interval: the documents are too few, or too unequal in length, to tell more than that the value lies "
            f"below {self.high:.3g}"))


class Estimates(NamedTuple):
    """U independent noisy estimates (draws) of the numerators of a ratio, and what they are divided by.

    documents_UxN: of each document. rows_UxR: their sums over the rows of noise that are independent of each other (a
    document may lie in several rows, a row hold several documents). U = 1 means exact. denominators_N: by document.
    """

    documents_UxN: np.ndarray
    rows_UxR: np.ndarray
    denominators_N: np.ndarray

    def ratio(self) -> float:
        """sum(numerators) / sum(denominators), the mean over draws. UserError unless the denominators are positive."""
        total = self.denominators_N.sum()
        if not total > 0:
            raise UserError(f"nothing to average: the denominators of {len(self.denominators_N)} documents sum to "
                            f"{total}")
        return float(self.documents_UxN.mean(0).sum() / total)


def ratio_interval(numerators_N: np.ndarray, denominators_N: np.ndarray,
                   level: float = 0.95) -> tuple[float, float, float]:
    """sum(numerators) / sum(denominators) with a confidence interval: (ratio, low, high).

    One entry a document, the unit that is drawn independently: nats and tokens give nats per token, nats and bytes
    nats per byte. See `_interval`; low and high are nan for fewer than MIN_DOCUMENTS. Raises UserError on shapes that
    differ or denominators that do not sum to more than 0.
    """
    numerators_N, denominators_N = (np.asarray(x, np.float64) for x in (numerators_N, denominators_N))
    if numerators_N.ndim != 1 or numerators_N.shape != denominators_N.shape:
        raise UserError(f"a ratio needs two equal lists, one entry a document: got shapes {numerators_N.shape} "
                        f"and {denominators_N.shape}")
    return two_part_interval(numerators_N[None], numerators_N[None], denominators_N, level)[:3]


def two_part_interval(documents_UxN: np.ndarray, rows_UxR: np.ndarray, denominators_N: np.ndarray,
                      level: float = 0.95) -> Interval:
    """sum(numerators) / sum(denominators) with errors from the choice of documents and from noise draws apart.

    Arguments as in `Estimates`. The spread of the documents' means holds the noise of each document; what that noise
    explains is taken off, and what the draws leave in the total is added: mc_se**2.
    """
    estimate = Estimates(*(np.asarray(x, np.float64) for x in (documents_UxN, rows_UxR, denominators_N)))
    influence_UxN, rows_UxR = _influence(estimate), estimate.rows_UxR / estimate.denominators_N.sum()
    return _interval(estimate.ratio(), influence_UxN.mean(0), _noise(influence_UxN), _noise(rows_UxR).sum(),
                     estimate.denominators_N / estimate.denominators_N.sum(), level)


def difference_interval(model: Estimates, baseline: Estimates, same_rows: bool, level: float = 0.95) -> Interval:
    """The ratio of one model less that of another, paired by document; each with denominators of its own.

    Estimate u of one is paired with estimate u of the other, an exact one with all of them; of unequal numbers the
    noise is that of two separate runs. same_rows: row r of both is one row, scored on the same noise (or exactly).
    """
    sides = [Estimates(*(np.asarray(x, np.float64) for x in side)) for side in (model, baseline)]
    ratios, totals = [side.ratio() for side in sides], [side.denominators_N.sum() for side in sides]
    influences = [_influence(side) for side in sides]
    rows = [side.rows_UxR / total for side, total in zip(sides, totals)]
    counts = {len(x) for x in influences if len(x) > 1}
    if len(counts) < 2:
        noise_N = _noise(influences[0] - influences[1])
    else:
        noise_N = _noise(influences[0]) + _noise(influences[1])
    if len(counts) < 2 and same_rows:
        noise = _noise(rows[0] - rows[1]).sum()
    else:
        noise = sum(_noise(side).sum() for side in rows)
    value = ratios[0] - ratios[1]
    shares = [side.denominators_N / total for side, total in zip(sides, totals)]
    estimate = _interval(value, influences[0].mean(0) - influences[1].mean(0), noise_N, noise,
                         (shares[0] + shares[1]) / 2, level)
    is_rounding = abs(value) <= ROUNDING * sum(map(abs, ratios))
    return estimate._replace(p_value=1.0) if is_rounding and not estimate.missing else estimate


def _influence(estimates: Estimates) -> np.ndarray:
    """What each document adds to the error of the ratio, `[U, N]`: (numerator - ratio denominator) / sum of them."""
    return (estimates.documents_UxN - estimates.ratio() * estimates.denominators_N) / estimates.denominators_N.sum()


def _noise(estimates_UxN: np.ndarray) -> np.ndarray:
    """Variance of the mean of U independent estimates, `[N]`; 0 for exact ones."""
    draws = len(estimates_UxN)
    return np.var(estimates_UxN, axis=0, ddof=1) / draws if draws > 1 else np.zeros(estimates_UxN.shape[1])


def _interval(value: float, influence_N: np.ndarray, noise_N: np.ndarray, mc_variance: float, share_N: np.ndarray,
              level: float) -> Interval:
    """The interval of a ratio, or of a difference of two, from the influence of its documents on it.

    noise_N: the part of its variance that draws make. mc_variance: what they make of the variance of the value.
    share_N: the part of the denominators that a document has. A long document pulls the ratio towards itself, so that
    its residual is too small by 1 - share, and a few long ones tell less than many equal ones: variance and degrees of
    freedom of Student's t are those of Bell and McCaffrey (Survey Methodology 28, 2002) for a ratio whose residuals
    vary like their denominators. For equal documents these are n/(n-1) and n - 1 (Cochran, Sampling Techniques, 1977,
    sec. 6.4).
    """
    n, mc_se = int(np.count_nonzero(share_N)), math.sqrt(mc_variance)
    if n < MIN_DOCUMENTS:
        reason = f"no interval over {n} document{'s' * (n > 1)}: it takes at least {MIN_DOCUMENTS}"
        return Interval(value, math.nan, math.nan, math.nan, mc_se, math.nan, reason)
    weight_N = 1 / (1 - share_N)
    variance = max(float(np.sum(weight_N * (influence_N**2 - noise_N))), 0.0)
    se, degrees_of_freedom = math.sqrt(variance + mc_variance), _degrees_of_freedom(share_N, weight_N)
    margin = float(stdtrit(degrees_of_freedom, (1 + level) / 2)) * se
    p_value = t_p_value(value / se, degrees_of_freedom) if se > 0 else float(value == 0)
    return Interval(value, value - margin, value + margin, math.sqrt(variance), mc_se, p_value)


def _degrees_of_freedom(share_N: np.ndarray, weight_N: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of sum(weight residual**2), where residuals vary like their share."""
    pairs = np.sum(weight_N * share_N**2) ** 2 - np.sum(weight_N**2 * share_N**4)
    return float(1 / (np.sum(share_N**2) + pairs))


def mc_margin(rows_UxR: np.ndarray, level: float = 0.95) -> float:
    """Half width of the confidence interval of the sum over rows of the mean over U draws, as far as draws make it.

    0 if U = 1: an exact number.
    """
    if len(rows_UxR) == 1:
        return 0.0
    return float(stdtrit(mc_degrees_of_freedom(rows_UxR), (1 + level) / 2)) * monte_carlo_se(rows_UxR.T)


def mc_degrees_of_freedom(rows_UxR: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of the variance of the draws: R (U - 1) where all rows vary alike, fewer where
    some vary more; inf for an exact number."""
    draws, rows = rows_UxR.shape
    if draws == 1:
        return math.inf
    variance_R = np.var(np.asarray(rows_UxR, np.float64), axis=0, ddof=1)
    largest = variance_R.max(initial=0)
    if not largest > 0:
        return float(rows * (draws - 1))
    relative_R = variance_R / largest
    return float(relative_R.sum() ** 2 / np.sum(relative_R**2 / (draws + 1)))  # (U-1)/(U+1) s**4 estimates sigma**4


def monte_carlo_se(samples_NxM: np.ndarray) -> float:
    """Standard error of sum over N of the mean over M, where row n holds M independent estimates of the same quantity.

    sqrt(sum_n var_n / M) with the unbiased variance of each row; nan if M < 2.
    """
    samples_NxM = np.asarray(samples_NxM, np.float64)
    draws = samples_NxM.shape[1]
    if draws < 2:
        return math.nan
    return math.sqrt(float(np.sum(np.var(samples_NxM, axis=1, ddof=1))) / draws)


def t_p_value(t: float, degrees_of_freedom: float) -> float:
    """Probability that |T| >= |t| for Student's t."""
    return float(2 * stdtr(degrees_of_freedom, -abs(t)))


def ppl_of(nats: float) -> float:
    """exp(nats), at most e^700; nan stays nan."""
    return math.exp(min(nats, 700.0))


def format_number(value: float | None, form: str) -> str:
    """A number for people; "-" for one that is missing, None or nan."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def format_interval(ends, form: str) -> str:
    """"low .. high" for people; "none" where an end is missing."""
    if any(end is None or math.isnan(end) for end in ends):
        return "none"
    low, high = (format(end, form) for end in ends)
    return f"{low} .. {high}"
