import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from toy_intervals import bell_mccaffrey

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import (
    Estimates,
    difference_interval,
    format_interval,
    format_number,
    mc_degrees_of_freedom,
    mc_margin,
    monte_carlo_se,
    ratio_interval,
    t_p_value,
    two_part_interval,
)


def test_equal_denominators_give_the_t_interval_of_a_mean():
    values = np.array([1.0, 2.5, 0.5, 4.0, 2.0])
    ratio, low, high = ratio_interval(3 * values, np.full(5, 3.0))
    expected = scipy_stats.t.interval(0.95, 4, loc=values.mean(), scale=scipy_stats.sem(values))
    assert ratio == pytest.approx(2.0)
    assert (low, high) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [3, 4, 12, 60])
def test_interval_of_documents_of_unequal_length(n):
    rng = np.random.default_rng(n)
    d_N = rng.lognormal(4, 1, n)
    y_N = 3 * d_N + d_N**0.8 * rng.standard_normal(n)
    ratio, se, freedom = bell_mccaffrey(y_N, d_N)
    assert freedom < n - 1
    found = two_part_interval(y_N[None], y_N[None], d_N)
    expected = scipy_stats.t.interval(0.95, freedom, loc=ratio, scale=se)
    assert (found.value, found.low, found.high) == pytest.approx((ratio, *expected), rel=1e-6)
    assert found.p_value == pytest.approx(2 * scipy_stats.t.sf(ratio / se, freedom), rel=1e-6)


@pytest.mark.parametrize("n, message", [(1, "no interval over 1 document: it takes at least 3"),
                                        (2, "no interval over 2 documents: it takes at least 3")])
def test_one_and_two_documents_have_a_sentence(n, message):
    found = two_part_interval(np.arange(2 * n).reshape(2, n), np.arange(2 * n).reshape(2, n), np.ones(n))
    assert np.isnan([found.low, found.high, found.document_se, found.p_value]).all() and found.mc_se > 0
    assert found.missing == message
    assert np.isnan(ratio_interval(np.ones(n), np.ones(n))[1:]).all()
    assert (format_number(found.low, ".2f"), format_interval((found.low, None), ".2f")) == ("-", "none")


def test_documents_without_tokens_do_not_count_as_documents():
    assert two_part_interval(np.array([[3.0, 0, 4, 0]]), np.ones((1, 1)), np.array([1.0, 0, 1, 0])).missing
    full, padded = (two_part_interval(np.array([y]), np.ones((1, 1)), np.array(d)) for y, d in (
        ([3.0, 4, 6], [1.0, 2, 2]), ([3.0, 0, 4, 6, 0], [1.0, 0, 2, 2, 0])))
    assert not padded.missing and padded[:6] == pytest.approx(full[:6], rel=1e-9)


def test_what_cannot_be_negative_has_no_interval_below_zero():
    found = two_part_interval(np.array([[1.0, 9.0, 20.0]]), np.ones((1, 1)), np.array([1.0, 1.0, 9.0]))
    assert found.low < 0 < found.high and not found.missing
    cut = found.non_negative()
    assert np.isnan([cut.low, cut.high]).all() and f"below {found.high:.3g}" in cut.missing
    safe = two_part_interval(np.array([[4.9, 5.0, 5.1]]), np.ones((1, 1)), np.ones(3))
    assert safe.non_negative() == safe


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


def paired_sides(rng, n, size):
    """Two models on n documents that leave out other tokens of each: the first one's nats are exact, the second one's
    two draws."""
    length = rng.lognormal(4, 0.7, n)
    topic = 0.5 * rng.standard_normal(n)
    sides = []
    for draws in (1, 2):
        scored = length * rng.uniform(0.8, 1.0, n)
        nats = scored * (3 + topic) + np.sqrt(scored) * rng.standard_normal((draws, n))
        sides.append(Estimates(nats, nats, scored))
    return sides


def test_a_difference_is_that_of_the_two_ratios_and_covers_at_its_rate():
    rng, covered, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        ours, theirs = paired_sides(rng, 40, 100)
        found = difference_interval(ours, theirs, same_rows=False)
        assert found.value == pytest.approx(ours.ratio() - theirs.ratio(), abs=1e-12)
        covered += found.low < 0 < found.high
    assert 0.93 < covered / trials < 0.98


def test_a_difference_of_equal_denominators_is_the_paired_one():
    rng = np.random.default_rng(1)
    a, b, size = rng.gamma(50, 0.1, (4, 30)), rng.gamma(50, 0.1, (4, 30)), rng.integers(5, 90, 30)
    found = difference_interval(Estimates(a, a, size), Estimates(b, b, size), same_rows=True)
    assert found[:6] == pytest.approx(two_part_interval(a - b, a - b, size)[:6], rel=1e-9)
    apart = difference_interval(Estimates(a, a, size), Estimates(b, b, size), same_rows=False)
    assert apart.mc_se == pytest.approx(two_part_interval(a, np.concatenate([a, b], 1), size).mc_se, rel=1e-9)


def test_a_different_number_of_draws_is_two_separate_runs():
    rng = np.random.default_rng(2)
    a, b, size = rng.gamma(50, 0.1, (4, 30)), rng.gamma(50, 0.1, (6, 30)), np.full(30, 9.0)
    found = difference_interval(Estimates(a, a, size), Estimates(b, b, size), same_rows=True)
    assert found.value == pytest.approx((a.mean(0) - b.mean(0)).sum() / size.sum())
    assert found.mc_se == pytest.approx(math.hypot(*(monte_carlo_se(x.T) / size.sum() for x in (a, b))))


@pytest.mark.parametrize("n, p_value", [(40, 1.0), (2, math.nan)])
def test_equal_costs_a_byte_make_no_difference_whatever_is_scored(n, p_value):
    """1.4 nats a byte; sums of float32 losses in another order differ by rounding, of which no test may be made."""
    rng = np.random.default_rng(3)
    few, more = rng.integers(5, 50, n), rng.integers(50, 90, n)
    ours, theirs = (Estimates(1.4 * size[None] * (1 + 1e-8 * rng.standard_normal(n)), np.ones((1, 5)), size)
                    for size in (few, more))
    found = difference_interval(ours, theirs, same_rows=False)
    assert found.value == pytest.approx(0, abs=1e-7) and found.p_value == pytest.approx(p_value, nan_ok=True)


def test_a_difference_without_spread_is_certain():
    size = np.array([1.0, 2, 3, 4])
    ours, theirs = (Estimates(cost * size[None], np.ones((1, 1)), size) for cost in (4.0, 5.0))
    found = difference_interval(ours, theirs, same_rows=True)
    assert (found.value, found.low, found.high) == pytest.approx((-1, -1, -1)) and found.p_value < 1e-9


@pytest.mark.parametrize("scale_R, freedom", [(np.ones(200), 200 * 3), (np.array([100.0] + [1.0] * 199), 3)])
def test_few_rows_that_vary_most_are_what_is_known_of_the_draws(scale_R, freedom):
    rng = np.random.default_rng(4)
    found = [mc_degrees_of_freedom(scale_R * rng.standard_normal((4, 200))) for _ in range(400)]
    assert 1 / np.mean(1 / np.array(found)) == pytest.approx(freedom, rel=0.9 if freedom < 10 else 0.1)
    assert mc_degrees_of_freedom(np.ones((1, 5))) == math.inf and mc_degrees_of_freedom(np.ones((3, 5))) == 10


@pytest.mark.parametrize("freedom", [1, 1.5, 4, 50, 100_000])
@pytest.mark.parametrize("t", [-0.0, 0.3, -2.0, 8.0, 40.0])
def test_p_value_agrees_with_scipy(t, freedom):
    assert t_p_value(t, freedom) == pytest.approx(2 * scipy_stats.t.sf(abs(t), freedom), rel=1e-6, abs=1e-300)
