import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bd3lm_jax.errors import UserError
from bd3lm_jax.stats import mc_margin, monte_carlo_se, ratio_interval, t_p_value, t_quantile, two_part_interval


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30, 200, 5000, 1_000_000])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995])
def test_t_quantile_agrees_with_scipy(probability, freedom):
    assert t_quantile(probability, freedom) == pytest.approx(scipy_stats.t.ppf(probability, freedom), rel=1e-6)


def test_equal_denominators_give_the_t_interval_of_a_mean():
    values = np.array([1.0, 2.5, 0.5, 4.0, 2.0])
    ratio, low, high = ratio_interval(3 * values, np.full(5, 3.0))
    expected = scipy_stats.t.interval(0.95, 4, loc=values.mean(), scale=scipy_stats.sem(values))
    assert ratio == pytest.approx(2.0)
    assert (low, high) == pytest.approx(expected, rel=1e-6)


def test_two_documents_by_hand():
    # Ratio 6/4; residuals 1 - 1.5 and 5 - 4.5; variance 2 * (0.25 + 0.25) / 16; t(0.975, 1) = tan(0.475 pi).
    ratio, low, high = ratio_interval(np.array([1.0, 5.0]), np.array([1.0, 3.0]))
    assert ratio == 1.5
    assert high - ratio == pytest.approx(math.tan(0.475 * math.pi) * 0.25, rel=1e-6)
    assert ratio - low == pytest.approx(high - ratio)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_covers_the_truth_at_its_stated_rate(level):
    rng = np.random.default_rng(0)
    trials, documents, covered = 2000, 40, 0
    for _ in range(trials):
        tokens = rng.integers(20, 200, documents)
        per_token = 3.0 + 0.5 * rng.standard_normal(documents)  # a document's own NLL: tokens are not independent
        nats = tokens * per_token + np.sqrt(tokens) * rng.standard_normal(documents)
        _, low, high = ratio_interval(nats, tokens, level)
        covered += low <= 3.0 <= high
    assert abs(covered / trials - level) < 4 * math.sqrt(level * (1 - level) / trials) + 0.01


def test_one_document_has_no_interval():
    ratio, low, high = ratio_interval(np.array([6.0]), np.array([2.0]))
    assert ratio == 3.0 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("numerators, denominators, message", [
    ([1.0, 2.0], [1.0], r"\(2,\) and \(1,\)"),
    ([], [], "0 documents sum to 0.0"),
    ([1.0, 1.0], [0.0, 0.0], "2 documents sum to 0.0"),
])
def test_bad_ratios_name_the_numbers(numerators, denominators, message):
    with pytest.raises(UserError, match=message):
        ratio_interval(np.array(numerators), np.array(denominators))


def test_monte_carlo_se_by_hand():
    # Row variances 2 and 8, two draws: sqrt((2 + 8) / 2).
    assert monte_carlo_se(np.array([[0.0, 2.0], [1.0, 5.0]])) == pytest.approx(math.sqrt(5))


def test_monte_carlo_se_is_the_spread_of_repeated_totals():
    rng = np.random.default_rng(1)
    sigma_N = np.array([0.5, 1.0, 3.0, 2.0] * 25)
    views = 10.0 + sigma_N[None, :, None] * rng.standard_normal((3000, 100, 4))
    spread = views.mean(-1).sum(-1).std(ddof=1)
    assert monte_carlo_se(views[0]) == pytest.approx(spread, rel=0.2)
    assert np.sqrt(np.mean([monte_carlo_se(v) ** 2 for v in views[:300]])) == pytest.approx(spread, rel=0.05)


def test_one_draw_has_no_standard_error():
    assert math.isnan(monte_carlo_se(np.ones((3, 1))))


def noisy_documents(rng, documents, draws, noise):
    """Documents of 2 rows each: tokens, their nats, and noisy estimates of them by document and by row."""
    tokens = rng.integers(20, 200, documents)
    truth = tokens * (3.0 + 0.5 * rng.standard_normal(documents))
    errors = noise * rng.standard_normal((draws, documents, 2))
    rows = truth[None, :, None] / 2 + errors
    return tokens, truth, rows.sum(-1), rows.reshape(draws, -1)


def test_both_intervals_cover_their_truth_at_the_stated_rate():
    """Documents and draws: the population's ratio, 3 nats a token. Draws alone: the ratio of these documents."""
    rng = np.random.default_rng(1)
    trials, covered, covered_mc, parts = 600, 0, 0, []
    for _ in range(trials):
        tokens, truth, documents_UxN, rows_UxR = noisy_documents(rng, 40, 2, 30.0)
        found = two_part_interval(documents_UxN, rows_UxR, tokens)
        covered += found.low < 3.0 < found.high
        margin = mc_margin(rows_UxR) / tokens.sum()
        covered_mc += abs(found.value - truth.sum() / tokens.sum()) < margin
        parts.append((found.document_se**2, found.mc_se**2, found.value))
    assert 0.925 < covered / trials < 0.975 and 0.925 < covered_mc / trials < 0.975
    document, draws, value = np.array(parts).T
    assert document.mean() + draws.mean() == pytest.approx(value.var(ddof=1), rel=0.15)
    assert draws.mean() == pytest.approx(40 * 2 * 30.0**2 / 2 / (40 * 109.5)**2, rel=0.05)


def test_exact_estimates_leave_the_documents_alone():
    tokens, truth, _, _ = noisy_documents(np.random.default_rng(2), 30, 1, 0.0)
    found = two_part_interval(truth[None], truth[None], tokens)
    assert (found.value, found.low, found.high) == pytest.approx(ratio_interval(truth, tokens), rel=1e-9)
    assert found.mc_se == 0 and mc_margin(truth[None]) == 0


def test_noise_shared_by_the_documents_of_a_row_is_not_counted_as_documents():
    """Two documents a row whose noise cancels: no Monte-Carlo error, and the documents' own spread stays."""
    rng = np.random.default_rng(3)
    tokens, truth = np.full(400, 10), 30 + 2 * rng.standard_normal(400)
    noise = 8 * rng.standard_normal((8, 200))
    documents_UxN = truth + np.stack([noise, -noise], -1).reshape(8, 400)
    rows_UxR = documents_UxN.reshape(8, 200, 2).sum(-1)
    found = two_part_interval(documents_UxN, rows_UxR, tokens)
    assert found.mc_se == pytest.approx(0, abs=1e-9)
    assert found.document_se == pytest.approx(2 / 10 / math.sqrt(400), rel=0.3)  # with the noise: 1.7 times as much


@pytest.mark.parametrize("freedom", [1, 4, 50, 100_000])
@pytest.mark.parametrize("t", [-0.0, 0.3, -2.0, 8.0, 40.0])
def test_p_value_agrees_with_scipy(t, freedom):
    assert t_p_value(t, freedom) == pytest.approx(2 * scipy_stats.t.sf(abs(t), freedom), rel=1e-6, abs=1e-300)


def test_one_document_has_a_value_and_no_interval():
    found = two_part_interval(np.array([[4.0], [6.0]]), np.array([[4.0], [6.0]]), np.array([2.0]))
    assert found.value == 2.5 and found.mc_se == pytest.approx(0.5)
    assert np.isnan([found.low, found.high, found.document_se, found.p_value]).all()
