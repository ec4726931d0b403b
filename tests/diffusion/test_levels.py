"""Levels by position: the paper's formula, and the bound on a law that is enumerated."""

import jax
import numpy as np
import pytest
from scipy import stats
from toy_law import LENGTH, ToyLaw, blocks, subsets

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.levels import Levels, mask_prob_and_slope

LAW, MASK, RAMP = ToyLaw(), 99, 0.4


def published(n, time, length, steps):
    """AR-Diffusion's f(n, t) at a time of [0, N + T], with its two anchors, in the paper's units."""
    n_s, t_s = np.clip(length - time, 0, length), np.clip(time - length, 0, steps)
    return np.clip((steps - t_s) / (2 * length - n_s) * (n - n_s) + t_s, 0, steps)


@pytest.mark.parametrize(("length", "steps"), [(8, 12.0), (128, 2000.0)])
def test_levels_are_the_published_ones(length, steps):
    n, share = np.arange(1, length + 1), np.linspace(0, 1, 41)[:, None]
    f, slope = mask_prob_and_slope(n, share, length, length / (length + steps))
    expected = published(n, share * (length + steps), length, steps) / steps
    np.testing.assert_allclose(f, expected, atol=2e-6)
    assert np.all(np.diff(np.asarray(f), axis=1) >= -1e-6)  # left tokens ahead of right ones
    assert np.all(f[0] == 0) and np.all(np.abs(f[-1] - 1) < 1e-6)
    inside, h = share[1:-1] + 0.003, 1e-6  # between the kinks
    change = [published(n, (inside + s) * (length + steps), length, steps) / steps for s in (-h, h)]
    np.testing.assert_allclose(mask_prob_and_slope(n, inside, length, length / (length + steps))[1],
                               (change[1] - change[0]) / (2 * h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_integral_over_times_is_the_likelihood(size):
    """E_t sum over masked n of f' / f CE_n with the library's f and f', all masks enumerated, pieces between kinks."""
    kinks = [0.0, *(RAMP * k / size for k in range(1, size + 1)), 1.0]  # where a token's noise begins; the corner
    nodes, node_weights = np.polynomial.legendre.leggauss(24)
    total = np.zeros_like(LAW.probs)
    for low, high in zip(kinks, kinks[1:]):
        for t, part in zip(low + (high - low) * (nodes + 1) / 2, node_weights * (high - low) / 2):
            f, slope = (np.asarray(x, np.float64) for x in mask_prob_and_slope(np.arange(1, size + 1), t, size, RAMP))
            for places in blocks(size):
                for hidden in subsets(places):
                    inside = [i - places.start for i in hidden]
                    outside = [i for i in range(size) if i not in inside]
                    chance = f[inside].prod() * (1 - f[outside]).prod()
                    if chance:
                        observed = set(range(places.stop)) - hidden
                        total += part * chance * sum(slope[i - places.start] / f[i - places.start]
                                                     * LAW.cross_entropy(i, observed) for i in hidden)
    np.testing.assert_allclose(total, LAW.nats, rtol=1e-4)


@pytest.fixture(scope="module")
def drawn():
    objective, rows = Levels(block_size=LENGTH, ramp=RAMP), 2**15
    corrupt = jax.jit(lambda ids: objective.corrupt(jax.random.key(0), ids, np.ones((rows, LENGTH), int), 1, MASK, 0))
    noised = corrupt(np.zeros((rows, LENGTH), np.int32))
    assert objective.is_bound and noised.capacity == LENGTH
    return (np.asarray(noised.xt_BxMxL)[:, 0] == MASK, np.asarray(noised.weight_BxMxL, np.float64)[:, 0],
            1 - np.exp(-np.asarray(noised.sigma_BxMxK, np.float64))[:, 0])


def test_masks_have_the_levels_that_are_handed_on(drawn):
    masked, weight, prob = drawn
    for n in range(LENGTH):
        bins = np.minimum((prob[:, n] * 10).astype(int), 9)
        seen, expected, variance = (np.bincount(bins, x[:, n], 10) for x in (masked, prob, prob * (1 - prob)))
        used = variance > 5
        assert stats.chi2.sf(((seen - expected)**2 / np.where(used, variance, 1))[used].sum(), used.sum()) > 1e-4
    assert np.all((weight > 0) == masked)


def test_the_mean_loss_of_its_masks_is_the_likelihood(drawn):
    masked, weight, _ = drawn
    loss = np.zeros(len(masked))
    for pattern, rows in by_pattern(masked).items():
        hidden = set(np.flatnonzero(pattern))
        for i in hidden:
            loss[rows] += weight[rows, i] * LAW.mean(LAW.cross_entropy(i, set(range(LENGTH)) - hidden))
    assert abs(loss.mean() - LAW.mean(LAW.nats)) < 4 * loss.std() / np.sqrt(len(loss))


def by_pattern(masked):
    patterns, which = np.unique(masked, axis=0, return_inverse=True)
    return {tuple(pattern): np.flatnonzero(which.ravel() == i) for i, pattern in enumerate(patterns)}


def test_padding_is_never_masked():
    segment = np.array([[1] * 5 + [0] * 3])
    noised = Levels(block_size=8, ramp=0.5).corrupt(jax.random.key(1), np.zeros((1, 8), int), segment, 64, MASK, 0)
    masked = np.asarray(noised.xt_BxMxL)[0] == MASK
    assert masked[:, :5].any(0).all() and not masked[:, 5:].any()


@pytest.mark.parametrize("ramp", [0.0, 1.0, -1.0])
def test_bad_input(ramp):
    with pytest.raises(UserError, match="diffusion.ramp is .*, expected between 0 and 1"):
        Levels(block_size=4, ramp=ramp)
