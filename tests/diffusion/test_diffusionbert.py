"""The spindle schedule against NumPy, its masks by chi-square."""

import jax
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.diffusionbert import DiffusionBERT, spindle

MASK, END, ROWS, VIEWS, SIZE = 9, 8, 2048, 2, 4
DENSITY_L = np.array([0.9, 0.1, 0.5, 0.7, 1.0, 0.0, 0.4, 0.2], np.float32)  # of two blocks
SEGMENT_L = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.int32)  # the last token is padding
OBJECTIVE = DiffusionBERT(block_size=SIZE, strength=0.3)


def by_hand(t_MxL, strength=0.3):
    """alpha and its derivative by central differences, of the unclipped schedule; f less the mean of the block."""
    mean_L = np.repeat([DENSITY_L[:4].mean(), DENSITY_L[4:7].mean()], SIZE)

    def unclipped(t):
        return 1 - t + strength * np.sin(np.pi * t) * (DENSITY_L.astype(np.float64) - mean_L)

    alpha = np.clip(unclipped(t_MxL), 0, 0.999)
    return alpha, (unclipped(t_MxL + 1e-6) - unclipped(t_MxL - 1e-6)) / 2e-6


@pytest.fixture(scope="module")
def drawn():
    """Times, masks and weights `[rows * copies, 8]`, float64."""
    rows = (np.tile(x, (ROWS, 1)) for x in (np.arange(8), SEGMENT_L, DENSITY_L))
    noised = jax.jit(lambda ids, segments, density: OBJECTIVE.corrupt(
        jax.random.key(0), ids, segments, VIEWS, MASK, END, density))(*rows)
    t = 1 - np.exp(-np.asarray(noised.sigma_BxMxK, np.float64))
    masked = np.asarray(noised.xt_BxMxL) == MASK
    return (np.repeat(t, SIZE, axis=-1).reshape(-1, 8), masked.reshape(-1, 8),
            np.asarray(noised.weight_BxMxL, np.float64).reshape(-1, 8))


def test_weights_are_those_of_the_schedule(drawn):
    t, masked, weight = drawn
    alpha, slope = by_hand(t)
    safe = (t > 2e-3) & (t < 0.999)  # t comes from a float32 level
    assert np.all(weight[~masked] == 0) and np.all(weight[masked] > 0)
    np.testing.assert_allclose(weight[masked & safe], (-slope / (1 - alpha))[masked & safe], rtol=2e-3)


def test_masks_have_the_rates_of_the_schedule(drawn):
    """Chi-square over twenty bins of the time for each token: masks of many levels, independent given these."""
    t, masked, _ = drawn
    prob = 1 - by_hand(t)[0]
    for token in range(7):
        bins = np.minimum((t[:, token] * 20).astype(int), 19)
        seen, expected, variance = (np.bincount(bins, x[:, token]) for x in (masked, prob, prob * (1 - prob)))
        assert stats.chi2.sf(((seen - expected)**2 / variance).sum(), 20) > 1e-4
    assert not masked[:, 7].any()


def test_rare_tokens_are_masked_first(drawn):
    """At one time in each block, rates fall with the density; the mean rate stays the time itself."""
    t = np.full((1, 8), 0.4)
    rate = 1 - np.asarray(spindle(0.4, by_hand_deviation(), 0.3)[0], np.float64)
    for block in (slice(0, 4), slice(4, 7)):
        assert np.all(np.diff(rate[block][np.argsort(DENSITY_L[block])]) < 0)
        assert rate[block].mean() == pytest.approx(0.4, abs=1e-6)
    np.testing.assert_allclose(rate[:7], 1 - by_hand(t)[0][0, :7], atol=1e-6)
    _, masked, _ = drawn
    assert masked[:, 5].mean() - masked[:, 4].mean() > 0.15  # density 0 and 1


def by_hand_deviation():
    return DENSITY_L - np.repeat([DENSITY_L[:4].mean(), DENSITY_L[4:7].mean()], SIZE)


def test_tokens_of_one_density_have_the_uniform_schedule():
    alpha, slope = spindle(np.array([0.2, 0.7]), np.zeros(2), 0.3)
    np.testing.assert_allclose(alpha, [0.8, 0.3], rtol=1e-6)
    np.testing.assert_allclose(slope, -1)


def test_is_never_a_bound_and_needs_the_density():
    assert not OBJECTIVE.is_bound and OBJECTIVE.uses_mask_token and OBJECTIVE.extra_batch_keys == ("density",)


@pytest.mark.parametrize("strength", [-0.1, 0.32, float("nan")])
def test_a_schedule_that_would_turn_back_is_refused(strength):
    with pytest.raises(UserError, match="diffusion.strength is .*, expected 0 to 0.3183"):
        DiffusionBERT(block_size=4, strength=strength)
