"""Which tokens are masked: pure functions of uniforms, any leading dimensions (here B), static shapes.

L tokens are K = L / S blocks of S tokens. `maskable` marks real tokens: padding is never masked. Uniforms `u` are in
[0, 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, xlog1py, xlogy

# Counts are whole: rounding of `low * n` and `high * n` must not exclude a count on the boundary.
COUNT_SLACK = 1e-3


class MaskCountDistribution(NamedTuple):
    """A law of the count: `probs_S`, whole relative probabilities of the counts 1..S (traced if it changes while
    training), and the most tokens that a row of systematic counts masks, and that it leaves unmasked."""

    probs_S: jax.Array | np.ndarray
    capacity: int
    complement_capacity: int


class ClippedRange(NamedTuple):
    """A clipped schedule: its mask probabilities (traced if they change), and the most tokens that a row masks."""

    low: jax.Array | float
    high: jax.Array | float
    capacity: int


def bernoulli(u_BxL: jax.Array, prob_BxK: jax.Array, maskable_BxL: jax.Array) -> jax.Array:
    """Masks each token independently with its block's probability. Returns bool [B, L]."""
    return (_blocks(u_BxL, prob_BxK.shape[-1]) < prob_BxK[..., None]).reshape(u_BxL.shape) & maskable_BxL


def exact_count(u_BxL: jax.Array, counts_BxK: jax.Array, maskable_BxL: jax.Array) -> jax.Array:
    """Masks the `counts` maskable tokens of each block that have the smallest uniforms: a uniformly random subset.

    Counts above the number of maskable tokens mask them all. Returns bool [B, L].
    """
    u_BxKxS = _blocks(jnp.where(maskable_BxL, u_BxL, jnp.inf), counts_BxK.shape[-1])
    rank_BxKxS = jnp.argsort(jnp.argsort(u_BxKxS, axis=-1), axis=-1)
    return (rank_BxKxS < counts_BxK[..., None]).reshape(u_BxL.shape) & maskable_BxL


def maskable_counts(maskable_BxL: jax.Array, block_size: int) -> jax.Array:
    """Number of maskable tokens in each block, int32 [B, K]."""
    return _blocks(maskable_BxL, maskable_BxL.shape[-1] // block_size).sum(-1, dtype=jnp.int32)


def counts_from_probs(u_BxK: jax.Array, probs_S: jax.Array, n_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts k in 1..n by inverse cumulative distribution of u, from `probs_S` restricted to 1..n and renormalised.

    Where the restriction leaves nothing, the counts 1..n are equally likely; n = 0 gives k = 0 with probability 1.

    Args:
        probs_S: relative probabilities of the counts 1..S. Whole numbers with a sum below 2**24 are handled exactly.

    Returns:
        counts int32 [B, K], and the probability of each drawn count, float32 [B, K].
    """
    counts_BxK = jnp.where(n_BxK > 0, _sample_categorical(u_BxK, _restricted(probs_S, n_BxK)) + 1, 0)
    return counts_BxK, jnp.where(n_BxK > 0, count_probability(counts_BxK, probs_S, n_BxK), 1)


def count_probability(counts_BxK: jax.Array, probs_S: jax.Array, n_BxK: jax.Array) -> jax.Array:
    """The probability of each count under the law of `counts_from_probs`, float32 [B, K]; 0 for the count 0."""
    probs_BxKxS = _restricted(probs_S, n_BxK)
    drawn_BxK = jnp.take_along_axis(probs_BxKxS, jnp.maximum(counts_BxK - 1, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(counts_BxK > 0, drawn_BxK / jnp.where(counts_BxK > 0, probs_BxKxS.sum(-1), 1), 0)


def _restricted(probs_S, n_BxK):
    """Relative probabilities [B, K, S] of the counts 1..n; equal where the restriction leaves nothing."""
    possible_BxKxS = jnp.arange(probs_S.shape[0]) < n_BxK[..., None]
    probs_BxKxS = jnp.where(possible_BxKxS, probs_S, 0)
    return jnp.where(probs_BxKxS.sum(-1, keepdims=True) == 0, possible_BxKxS, probs_BxKxS)


def count_capacity(probs_S: np.ndarray, blocks: int) -> int:
    """The most tokens a row masks when its counts come from `systematic_uniform` and `counts_from_probs`.

    The j-th smallest uniform of a row lies below j / K, so its count is at most the quantile there. The sum of these
    is within S - 1 of the mean row. Exact for whole `probs_S`; blocks with fewer maskable tokens never mask more.
    """
    below_S = np.cumsum(probs_S.astype(np.int64))
    return sum(1 + int(np.searchsorted(below_S * blocks, j * below_S[-1])) for j in range(1, blocks + 1))


def complement_capacity(probs_S: np.ndarray, blocks: int) -> int:
    """The most tokens that a row leaves unmasked under the law of `count_capacity`, whatever its padding.

    The j-th smallest uniform lies at or above j / K, j from 0; a block of n maskable tokens leaves n less its quantile
    there.
    """
    def unmasked_count(n, j):
        probs = probs_S[:n] if probs_S[:n].sum() else np.ones(n)
        below = np.cumsum(probs.astype(np.int64))
        return n - 1 - int(np.searchsorted(below * blocks, j * below[-1], side="right"))
    return sum(max(unmasked_count(n, j) for n in range(1, len(probs_S) + 1)) for j in range(blocks))


def truncated_binomial_counts(u_BxK: jax.Array, prob_BxK: jax.Array, n_BxK: jax.Array, low: float, high: float,
                              block_size: int) -> jax.Array:
    """Counts k ~ Binomial(n, prob) given low <= k/n <= high, by inverse cumulative distribution of u.

    The law of redrawing a block until its masked fraction lies in [low, high] (BD3-LM, arXiv 2503.09573),
    without the loop. Where no count of an n lies inside, the count nearest to prob * n, at least 1.
    Returns int32 [B, K].
    """
    k = jnp.arange(block_size + 1)
    n, prob = n_BxK[..., None], prob_BxK[..., None]
    inside = (k <= n) & (k >= low * n - COUNT_SLACK) & (k <= high * n + COUNT_SLACK)
    log_ways = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(jnp.maximum(n - k, 0) + 1.0)
    log_prob = jnp.where(inside, log_ways + xlogy(k, prob) + xlog1py(n - k, -prob), -jnp.inf)
    some_BxK = inside.any(-1)
    drawn_BxK = _sample_categorical(u_BxK, jnp.exp(log_prob - jnp.where(some_BxK, log_prob.max(-1), 0)[..., None]))
    nearest_BxK = jnp.floor(prob_BxK * n_BxK + 0.5).astype(jnp.int32)
    return jnp.where(some_BxK, drawn_BxK, jnp.minimum(jnp.maximum(nearest_BxK, 1), n_BxK))


def truncated_capacity(low: float, high: float, block_size: int) -> int:
    """The most tokens `truncated_binomial_counts` masks in one block whose prob is at most `high`."""
    most = 1
    for n in range(1, block_size + 1):
        k = int(high * n + COUNT_SLACK)
        empty = k < low * n - COUNT_SLACK
        most = max(most, int(high * n + 0.5 + COUNT_SLACK) if empty else k)
    return most


def interleave(first_BxPxL: jax.Array, second_BxPxL: jax.Array) -> jax.Array:
    """`[B, P, ...]` twice -> `[B, 2 P, ...]`: first, second, first, ..."""
    return jnp.stack([first_BxPxL, second_BxPxL], axis=2).reshape(first_BxPxL.shape[0], -1, *first_BxPxL.shape[2:])


def _blocks(array_BxL, blocks):
    return array_BxL.reshape(*array_BxL.shape[:-1], blocks, -1)


def _sample_categorical(u, probs):
    """Index of the outcome whose slice of the cumulative distribution (last axis, unnormalised) holds u."""
    below = jnp.cumsum(probs, axis=-1)
    index = (below <= u[..., None] * below[..., -1:]).sum(-1, dtype=jnp.int32)
    return jnp.minimum(index, probs.shape[-1] - 1)
