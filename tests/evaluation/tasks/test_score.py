"""Intervals and tests over problems, against other implementations, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from bd3lm_jax.evaluation.tasks import score


@pytest.mark.parametrize("successes, trials", [(0, 164), (3, 164), (82, 164), (164, 164), (1, 1), (7, 20)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_interval_is_that_of_scipy(successes, trials, level):
    wanted = binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert score.wilson_interval(successes, trials, level) == pytest.approx(
        (successes / trials, wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize("ours, theirs", list(itertools.product([0, 1, 4, 11], repeat=2)))
def test_mcnemar_is_the_binomial_test(ours, theirs):
    wanted = binomtest(ours, ours + theirs, 0.5).pvalue if ours + theirs else 1.0
    assert score.mcnemar_p_value(ours, theirs) == pytest.approx(wanted)


def test_one_draw_uses_wilson_and_several_use_t():
    assert score.mean_interval([1, 0, 0, 1]) == score.wilson_interval(2, 4)
    scores = np.array([0.5, 0.25, 0, 1, 0.75, 0.5])
    wanted = ttest_1samp(scores, 0).confidence_interval(0.95)
    assert score.mean_interval(scores) == pytest.approx((0.5, wanted.low, wanted.high))
    assert score.mean_interval([0.9, 1, 1, 0.2])[2] == 1.0


def test_identical_models_do_not_differ():
    found = score.paired([1, 0, 1, 0, 0], [1, 0, 1, 0, 0])
    assert found.difference == 0 and found.p_value == 1 and found.low < 0 < found.high


def test_several_draws_are_compared_by_a_paired_t_test():
    ours, theirs = np.array([0.5, 0.25, 0, 1, 0.75]), np.array([0.25, 0.5, 0, 0.5, 0.25])
    wanted = ttest_1samp(ours - theirs, 0)
    found = score.paired(ours, theirs)
    assert found.test == "paired t" and found.p_value == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))


@pytest.mark.parametrize("both, only_ours, only_theirs", [(0.3, 0.2, 0.05), (0.02, 0.04, 0.01), (0.8, 0.05, 0.05)])
def test_paired_interval_covers_the_truth(both, only_ours, only_theirs):
    draw = np.random.default_rng(0)
    neither = 1 - both - only_ours - only_theirs
    kinds = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])[
        draw.choice(4, p=[both, only_ours, only_theirs, neither], size=(2000, 100))]
    found = [score.paired(trial[:, 0], trial[:, 1]) for trial in kinds]
    covered = np.mean([one.low <= only_ours - only_theirs <= one.high for one in found])
    assert 0.93 <= covered <= 0.995  # 95 %, a little more where few problems differ
    assert [one.difference for one in found] == pytest.approx((kinds[..., 0] - kinds[..., 1]).mean(1).tolist())


def test_mcnemar_is_exact_under_the_null():
    """Equal models are told apart at 5 % in at most 5 % of all outcomes, whatever the number of discordant problems."""
    for total in range(1, 30):
        rejected = [k for k in range(total + 1) if score.mcnemar_p_value(k, total - k) <= 0.05]
        assert sum(math.comb(total, k) for k in rejected) / 2**total <= 0.05
