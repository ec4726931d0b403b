"""Masks and counts against enumeration, exact arithmetic and chi-square."""

import itertools
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.diffusion.corrupt import (
    bernoulli,
    count_capacity,
    counts_from_probs,
    exact_count,
    maskable_counts,
    truncated_binomial_counts,
    truncated_capacity,
)

GRID = ((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)  # a uniform, enumerated
truncated = jax.jit(truncated_binomial_counts, static_argnums=(3, 4, 5))


def frequencies(counts, size):
    return np.bincount(np.asarray(counts), minlength=size) / len(counts)


def test_bernoulli_is_a_threshold_per_block():
    rng = np.random.default_rng(0)
    u, prob, maskable = rng.random((3, 2, 12)), rng.random((3, 2, 4)), rng.random((3, 2, 12)) < 0.7
    masked = np.asarray(bernoulli(u, prob, maskable))
    for b, m, i in np.ndindex(3, 2, 12):
        assert masked[b, m, i] == (maskable[b, m, i] and u[b, m, i] < prob[b, m, i // 3])


def test_exact_count_masks_that_many_with_the_smallest_uniforms():
    rng = np.random.default_rng(1)
    u, maskable = rng.random((3, 2, 20)), rng.random((3, 2, 20)) < 0.7
    counts = rng.integers(0, 6, (3, 2, 4))
    masked = np.asarray(exact_count(u, counts, maskable))
    np.testing.assert_array_equal(maskable_counts(maskable, 5), maskable.reshape(3, 2, 4, 5).sum(-1))
    for b, m, k in np.ndindex(3, 2, 4):
        tokens = [i for i in range(5 * k, 5 * k + 5) if maskable[b, m, i]]
        chosen = sorted(tokens, key=lambda i: u[b, m, i])[:counts[b, m, k]]
        assert set(np.flatnonzero(masked[b, m, 5 * k:5 * k + 5]) + 5 * k) == set(chosen)


@pytest.mark.parametrize("maskable, count", [((1, 1, 1, 1), 2), ((1, 0, 1, 1, 1), 2), ((0, 1, 1, 1, 0, 1), 1)])
def test_every_subset_is_equally_likely(maskable, count):
    tokens = np.flatnonzero(maskable)
    u = jax.random.uniform(jax.random.key(2), (6000, len(maskable)))
    masked = np.asarray(exact_count(u, np.full((6000, 1), count), np.broadcast_to(np.array(maskable, bool), u.shape)))
    seen = [int((masked.nonzero()[1].reshape(-1, count) == subset).all(1).sum())
            for subset in itertools.combinations(tokens, count)]
    assert sum(seen) == 6000 and stats.chisquare(seen).pvalue > 1e-3


@pytest.mark.parametrize("probs", [(1, 1, 1, 1), (5, 1, 0, 2), (0, 3, 1, 0), (0, 0, 0, 7), (0.3, 0.2, 0.25, 0.25)])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_counts_follow_the_restricted_probabilities(probs, n):
    counts, pi = counts_from_probs(GRID, np.array(probs, np.float32), np.full(GRID.shape, n))
    kept = np.array(probs[:n], float)
    law = kept / kept.sum() if kept.sum() else np.full(n, 1 / n)
    np.testing.assert_allclose(frequencies(counts, n + 1), [0, *law], atol=1e-4)
    np.testing.assert_allclose(pi, law[np.asarray(counts) - 1], rtol=1e-6)
    assert (np.diff(counts) >= 0).all()


def test_the_smallest_uniform_never_draws_an_impossible_count():
    counts, pi = counts_from_probs(np.zeros(1, np.float32), np.array([0, 0, 1, 1], np.float32), np.array([4]))
    assert counts.tolist() == [3] and pi.tolist() == [0.5]


def test_a_block_of_padding_has_count_zero():
    counts, pi = counts_from_probs(GRID[::200], np.ones(4, np.float32), np.zeros(100, int))
    assert not np.any(counts) and np.all(pi == 1)


def exact_row_total(probs, blocks, offset):
    """Sum over j of the quantile at (j + offset) / K, in exact arithmetic."""
    below = list(itertools.accumulate(int(p) for p in probs))
    return sum(1 + sum(b <= Fraction(j + offset) / blocks * below[-1] for b in below) for j in range(blocks))


@pytest.mark.parametrize("size, blocks", [(1, 5), (2, 3), (4, 1), (4, 16), (5, 7), (16, 4), (7, 12)])
def test_capacity_is_the_largest_row_total(size, blocks):
    rng = np.random.default_rng(size * 100 + blocks)
    for probs in [np.ones(size, int), *(rng.integers(1, 50, size) for _ in range(5))]:
        total = int(probs.sum())
        jumps = {Fraction(int(b) * blocks, total) % 1 for b in np.cumsum(probs)}
        offsets = sorted(jumps | {Fraction(0), 1 - Fraction(1, 10**9)})
        totals = [exact_row_total(probs, blocks, offset) for offset in offsets]
        assert count_capacity(probs, blocks) == max(totals)
        assert max(totals) - min(totals) <= size - 1


@pytest.mark.parametrize("size, low, high", [(4, 0.45, 0.95), (10, 0.3, 0.8), (7, 0.5, 1.0), (3, 0.0, 0.5)])
def test_truncated_binomial(size, low, high):
    for n, p in itertools.product(range(1, size + 1), (low + 0.01, (low + high) / 2, high)):
        law = [math.comb(n, k) * p**k * (1 - p)**(n - k) * (Fraction(str(low)) * n <= k <= Fraction(str(high)) * n)
               for k in range(n + 1)]
        if not sum(law):
            law[min(max(math.floor(p * n + 0.5), 1), n)] = 1
        counts = truncated(GRID, np.full(GRID.shape, p, np.float32), np.full(GRID.shape, n), low, high, size)
        np.testing.assert_allclose(frequencies(counts, n + 1), np.array(law) / sum(law), atol=1e-4)
        assert (np.diff(counts) >= 0).all()


def test_truncated_binomial_of_a_long_block():
    n, p, low, high = 1024, 0.6, 0.45, 0.62
    law = stats.binom.pmf(np.arange(n + 1), n, p)
    law[(np.arange(n + 1) < low * n) | (np.arange(n + 1) > high * n)] = 0
    grid = GRID[::10]
    counts = truncated(grid, np.full(grid.shape, p, np.float32), np.full(grid.shape, n), low, high, n)
    np.testing.assert_allclose(np.cumsum(frequencies(counts, n + 1)), np.cumsum(law) / law.sum(), atol=2e-3)


def test_same_law_as_redrawing_blocks():
    """Bernoulli masks redrawn until their fraction lies in [low, high], the published procedure."""
    rng, n, p, low, high = np.random.default_rng(5), 8, 0.5, 0.3, 0.8
    drawn = rng.binomial(n, p, 40_000)
    redrawn = frequencies(drawn[(drawn >= low * n) & (drawn <= high * n)], n + 1)
    counts = truncated(GRID, np.full(GRID.shape, p, np.float32), np.full(GRID.shape, n), low, high, n)
    np.testing.assert_allclose(frequencies(counts, n + 1), redrawn, atol=0.01)


def test_a_block_of_padding_has_no_truncated_count():
    assert not np.any(truncated(GRID[:9], np.full(9, 0.7), np.zeros(9, int), 0.45, 0.95, 4))


@pytest.mark.parametrize(
    "size, low, high", [(4, 0.45, 0.95), (3, 0.4, 0.6), (1, 0.3, 0.8), (16, 0.3, 0.8), (10, 0.1, 0.3)])
def test_truncated_capacity_is_reached_and_not_exceeded(size, low, high):
    u, p, n = np.meshgrid(GRID[::500].tolist() + [0.0, 1 - 2**-24], np.linspace(low, high, 41), np.arange(size + 1))
    counts = truncated(u.astype(np.float32), p.astype(np.float32), n, low, high, size)
    assert np.max(counts) == truncated_capacity(low, high, size)
