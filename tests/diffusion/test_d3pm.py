"""D3PM against the enumerated bound of its chain, written from posteriors of single steps, and MDLM's bound."""

import itertools
import math

import jax
import numpy as np
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import D3PM, MD4

MASK, SIZE = 9, 3
LETTERS = 3
TARGET = np.array([1, 0, 2])
NET = np.random.default_rng(3).dirichlet(np.ones(LETTERS), (2**SIZE, SIZE))  # p(letter) at every token for every mask
TABLE = -np.log(NET[:, range(SIZE), TARGET]) * (np.arange(2**SIZE)[:, None] >> np.arange(SIZE) & 1)


def chain_bound(steps):
    """Sum over steps of the mean KL of q(x_{i-1} | x_i, x0) from p(x_{i-1} | x_i), token by token over all values."""
    total = 0.0
    for i in range(1, steps + 1):
        stays = (i - 1) / i  # of a masked token in one reverse step
        for pattern in range(2**SIZE):
            masked = [token for token in range(SIZE) if pattern >> token & 1]
            chance = (i / steps)**len(masked) * (1 - i / steps)**(SIZE - len(masked))
            for token in masked:
                q = np.append((1 - stays) * np.eye(LETTERS)[TARGET[token]], stays)
                p = np.append((1 - stays) * NET[pattern, token], stays)
                total += chance * sum(a * math.log(a / b) for a, b in zip(q, p) if a > 0)
    return total


def mdlm_bound():
    return sum(TABLE[sum(2**i for i in chosen)].sum() / k / math.comb(SIZE, k)
               for k in range(1, SIZE + 1) for chosen in itertools.combinations(range(SIZE), k))


corrupt = jax.jit(lambda objective, key, x0, segment: objective.corrupt(key, x0, segment, 2, MASK, 0), static_argnums=0)


def estimate(objective, seeds=20):
    """Mean of the weighted loss of a block, and its standard error."""
    x0, means = np.tile(TARGET, (256, 16)).astype(np.int32), []
    for seed in range(seeds):
        noised = corrupt(objective, jax.random.key(seed), x0, np.ones_like(x0))
        pattern = (np.asarray(noised.xt_BxMxL).reshape(-1, SIZE) == MASK) @ 2**np.arange(SIZE)
        means.append((np.asarray(noised.weight_BxMxL).reshape(-1, SIZE) * TABLE[pattern]).sum(-1).mean())
    return np.mean(means), np.std(means, ddof=1) / math.sqrt(seeds)


def d3pm(steps, hybrid=0.0):
    return D3PM(block_size=SIZE, steps=steps, hybrid=hybrid)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_mean_is_the_bound_of_the_chain(steps):
    mean, error = estimate(d3pm(steps))
    assert abs(mean - chain_bound(steps)) < 4 * error + 1e-4 and error < 0.02 * mean


def test_many_steps_are_masked_diffusion():
    gaps = [abs(chain_bound(steps) - mdlm_bound()) for steps in (4, 40, 400)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] and gaps[2] < 0.001 * mdlm_bound()
    mean, error = estimate(d3pm(400))
    assert abs(mean - mdlm_bound()) < 4 * error + gaps[2]


def test_hybrid_adds_the_plain_cross_entropy():
    x0 = np.tile(TARGET, (8, 4)).astype(np.int32)
    plain, hybrid = (corrupt(d3pm(5, weight), jax.random.key(0), x0, np.ones_like(x0)) for weight in (0.0, 0.01))
    np.testing.assert_array_equal(plain.xt_BxMxL, hybrid.xt_BxMxL)
    difference = np.asarray(hybrid.weight_BxMxL) - np.asarray(plain.weight_BxMxL)
    np.testing.assert_allclose(difference, np.where(np.asarray(plain.xt_BxMxL) == MASK, 0.01, 0), atol=1e-6)
    assert d3pm(5).is_bound and not d3pm(5, 0.01).is_bound and d3pm(5, 0.01).bound == d3pm(5)


def test_levels_are_the_steps():
    x0 = np.tile(TARGET, (32, 10)).astype(np.int32)
    noised = corrupt(d3pm(4), jax.random.key(1), x0, np.ones_like(x0))
    level, count = np.unique(np.round(1 - np.exp(-np.asarray(noised.sigma_BxMxK, np.float64)), 4), return_counts=True)
    np.testing.assert_allclose(level, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_array_equal(count, 160)  # stratified
    assert np.isfinite(noised.sigma_BxMxK).all()


MD4_PROB = {"linear": lambda t: t, "cosine": lambda t: np.cos(np.pi / 2 * (1 - t)), "polynomial:2": lambda t: t**2}


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("schedule", MD4_PROB)
def test_md4_is_the_bound_between_its_clips(schedule, clip):
    mean, error = estimate(MD4(block_size=SIZE, schedule=schedule, clip=clip))
    t = (np.arange(20_000) + 0.5) / 20_000
    p = clip + (1 - 2 * clip) * MD4_PROB[schedule](t)
    weight = np.gradient(p, t) / p
    chance = [np.prod([p if x >> i & 1 else 1 - p for i in range(SIZE)], axis=0) for x in range(2**SIZE)]
    expected = sum(np.mean(weight * q) * TABLE[x].sum() for x, q in enumerate(chance))
    assert abs(mean - expected) < 4 * error + 2e-3 and error < 0.02 * mean
    if clip == 0:
        assert expected == pytest.approx(mdlm_bound(), abs=2e-3)


def test_md4_is_a_bound_without_a_clip_only():
    clipped = MD4(block_size=4, schedule="cosine", clip=1e-4)
    assert not clipped.is_bound and clipped.bound == MD4(block_size=4, schedule="cosine", clip=0.0)
    assert clipped.bound.is_bound


@pytest.mark.parametrize("make, words", [
    (lambda: d3pm(0), "diffusion.steps is 0"),
    (lambda: D3PM(0, 5, 0.0), "diffusion.block_size is 0"),
    (lambda: d3pm(5, -1.0), "diffusion.hybrid is -1.0"),
    (lambda: MD4(4, "loglinear", 0.0), "diffusion.schedule is 'loglinear', expected linear, cosine or polynomial:p"),
    (lambda: MD4(4, "polynomial:x", 0.0), "expected a positive exponent"),
    (lambda: MD4(4, "linear", 0.5), "diffusion.clip is 0.5"),
    (lambda: MD4(4, "linear", 0.1).corrupt(jax.random.key(0), np.zeros((1, 6)), np.ones((1, 6)), 1, MASK, 0),
     "length 6 is not a multiple of diffusion.block_size=4: pad the rows to 8 tokens"),
    (lambda: MD4(3, "linear", 0.1).corrupt(jax.random.key(0), np.zeros((1, 6)), np.ones((1, 6)), 0, MASK, 0),
     "noise_samples is 0"),
])
def test_bad_settings(make, words):
    with pytest.raises(UserError, match=words):
        make()
