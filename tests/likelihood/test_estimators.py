"""Every estimator against enumeration, on a table that gives each token of a block its cross-entropy for each mask."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import make_lm, masked
from toy_runs import AR, toy_config

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import Masked
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.scoring.score import SpecialIds

SIZE, BLOCKS, ROWS = 4, 8, 2000
LENGTH = SIZE * BLOCKS
SPECIAL = SpecialIds(mask=99, end=98)
TABLE_PxS = np.random.default_rng(7).exponential(2.0, (2**SIZE, SIZE)) * (1 + np.arange(2**SIZE)[:, None] / 8)
COMPLEMENT = dataclasses.replace(Masked.uniform_counts(SIZE), complement=True)
SHAPED = dataclasses.replace(COMPLEMENT, count_probs=(1.0, 5.0, 2.0, 8.0))
SAMPLED = {
    "exact_count": estimators.MonteCarlo("exact_count", COMPLEMENT),
    "importance": estimators.MonteCarlo("importance", SHAPED),
    "bernoulli": estimators.MonteCarlo("bernoulli", dataclasses.replace(Masked.uniform_counts(SIZE),
                                                                        corruption="bernoulli", eps=1e-3)),
}
# Real tokens of the blocks of a row: whole ones, short ones, none.
REAL_K = np.array([4, 4, 3, 4, 2, 1, 4, 0])
SEGMENTS_L = (np.arange(SIZE) < REAL_K[:, None]).reshape(-1).astype(np.int32)
TOKENS_L = np.arange(LENGTH) % 50


def bound(n):
    """The definition: over k, 1/k times the mean over the sets of k of n tokens of their summed cross-entropy."""
    total = 0.0
    for k in range(1, n + 1):
        sets = list(itertools.combinations(range(n), k))
        total += np.mean([TABLE_PxS[sum(2**i for i in s), list(s)].sum() for s in sets]) / k
    return total


def small_levels(n, eps):
    """What t below eps adds: the integral of (1/t) E[summed cross-entropy of the masked] up to eps."""
    t = eps * (np.arange(2000) + 0.5) / 2000
    total = 0.0
    for k in range(1, n + 1):
        sets = list(itertools.combinations(range(n), k))
        loss = np.mean([TABLE_PxS[sum(2**i for i in s), list(s)].sum() for s in sets])
        total += np.mean(math.comb(n, k) * t**(k - 1) * (1 - t)**(n - k)) * eps * loss
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def estimates(estimator, draws, seed):
    """Nats `[rows, replicates, K]` of independent rows, and how far the masked tokens exceed the capacity."""
    def one_pass(key, index):
        noised = estimator.noised(key, index, draws, jnp.asarray(TOKENS_L), jnp.asarray(SEGMENTS_L), SPECIAL)
        hidden = (noised.xt_BxMxL == SPECIAL.mask).reshape(-1, BLOCKS, SIZE)
        losses = jnp.asarray(TABLE_PxS, jnp.float32)[(hidden * 2**jnp.arange(SIZE)).sum(-1)]
        nats = (losses * noised.weight_BxMxL.reshape(hidden.shape)).sum(-1)
        over = hidden.sum((1, 2)).max() - noised.capacity
        return nats.reshape(estimator.replicates, -1, BLOCKS).mean(1), over

    keys = jax.random.split(jax.random.key(seed), ROWS)
    passes = jnp.arange(estimator.num_passes(draws))
    nats, over = jax.vmap(lambda key: jax.vmap(functools.partial(one_pass, key))(passes))(keys)
    return nats.mean(1), over.max()


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", SAMPLED)
def test_mean_is_the_enumerated_bound(name, draws):
    estimator = SAMPLED[name]
    nats, over = estimates(estimator, draws, 0)
    nats = np.asarray(nats, np.float64).reshape(-1, BLOCKS)
    omitted = estimator.measure.eps if name == "bernoulli" else 0
    expected = np.array([bound(n) - small_levels(n, omitted) for n in REAL_K])
    error = nats.std(0, ddof=1) / math.sqrt(len(nats))
    assert np.all(np.abs(nats.mean(0) - expected) < 4.5 * error + 1e-4)
    assert np.all(error[:-1] < 0.04 * expected[:-1]) and over <= 0


def test_variances_order_as_they_should():
    """Equal draws cost the same: counts instead of times gain much, stratified draws more than their number."""
    variance = {name: [np.var(estimates(estimator, draws, 1)[0].sum(-1)) for draws in (1, 4)]
                for name, estimator in SAMPLED.items()}
    assert variance["exact_count"][0] < variance["bernoulli"][0] / 4
    assert variance["exact_count"][1] < variance["exact_count"][0] / 4.4


def test_replicates_are_independent():
    nats = np.asarray(estimates(SAMPLED["exact_count"], 1, 2)[0]).sum(-1)
    assert abs(np.corrcoef(nats.T)[0, 1]) < 4 / math.sqrt(ROWS)


def test_enumeration_is_the_bound_of_every_row():
    estimator = estimators.Exhaustive(SIZE)
    nats, over = estimates(estimator, 1, 0)
    np.testing.assert_allclose(nats[0, 0], [bound(n) for n in REAL_K], rtol=1e-5)
    np.testing.assert_array_equal(nats[0], nats[-1])  # nothing is random
    assert over <= 0 and estimator.noise_samples == 15 and estimator.num_passes(1) == 1


@pytest.mark.parametrize("size", range(1, 9))
def test_enumeration_meets_every_mask_of_every_block_once(size):
    """For S = 8 the 255 masks come in 16 passes of 16 copies; one copy is left over."""
    estimator = estimators.Exhaustive(size)
    tokens, segments = jnp.zeros(4 * size, int), jnp.ones(4 * size, int)
    noise_samples = [estimator.noised(None, i, 1, tokens, segments, SPECIAL) for i in range(estimator.num_passes(1))]
    hidden = np.concatenate([np.asarray(view.xt_BxMxL) == SPECIAL.mask for view in noise_samples]).reshape(-1, 4, size)
    weight = np.concatenate([np.asarray(view.weight_BxMxL) for view in noise_samples]).reshape(-1, 4, size)
    assert len(hidden) <= 256 and estimator.noise_samples <= 16
    for block in range(4):
        patterns = (hidden[:, block] * 2**np.arange(size)).sum(-1)
        assert sorted(patterns[patterns > 0]) == list(range(1, 2**size))
    k = hidden.sum(-1)
    ways = np.array([math.comb(size, i) for i in range(size + 1)])
    expected = len(hidden) / (np.maximum(k, 1) * ways[k])
    np.testing.assert_allclose(weight, np.where(hidden, expected[..., None], 0), rtol=1e-6)
    assert hidden.sum((1, 2)).max() == noise_samples[0].capacity


def test_lattice_is_systematic_in_every_draw_and_over_draws():
    blocks, draws = 6, 5
    points = np.array([estimators.lattice(jax.random.key(seed), jnp.arange(draws), draws, blocks)
                       for seed in range(400)])
    assert points.shape == (400, draws, blocks) and 0 <= points.min() and points.max() < 1
    cells = np.sort((points * blocks).astype(int), axis=-1)
    np.testing.assert_array_equal(cells, np.broadcast_to(np.arange(blocks), cells.shape))
    np.testing.assert_allclose(np.diff(np.sort(points, axis=1), axis=1), 1 / draws, atol=1e-6)
    np.testing.assert_allclose(points.mean(0), 0.5, atol=4 * math.sqrt(1 / 12 / 400))  # each is uniform by itself
    np.testing.assert_allclose(points.var(0), 1 / 12, rtol=0.25)


def test_too_many_draws_for_the_grid():
    with pytest.raises(UserError, match="5000000 draws of 2 blocks a row, expected at most 4194304"):
        estimators.lattice(jax.random.key(0), jnp.arange(1), 5_000_000, 2)


# ---- learning the count law


def pilot(sd_by_class, pairs, size, seed=0):
    """Counts and means of one pair of copies in each of `pairs` blocks, of normal pair means with known sd."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, size + 1, pairs)
    nats = draw.normal(5, [sd_by_class[max(k, size - k)] for k in counts])
    others = size - counts
    return np.stack([counts, others], 1), np.stack([nats, np.where(others > 0, nats, 0)], 1)


def test_the_law_follows_the_standard_deviations():
    first = estimators.Importance("importance", COMPLEMENT)
    learnt = first.from_pilot(*pilot({2: 1.0, 3: 2.0, 4: 4.0}, 40000, SIZE))
    probs = np.array(learnt.measure.count_probs)
    np.testing.assert_allclose(probs / probs.sum(), np.array([2, 1, 2, 4]) / 9, atol=0.01)
    assert not learnt.needs_pilot and learnt.measure.complement and np.all(probs == np.round(probs))


def test_no_count_is_left_out():
    learnt = estimators.Importance("importance", COMPLEMENT).from_pilot(*pilot({2: 0.0, 3: 0.0, 4: 9.0}, 4000, SIZE))
    probs = np.array(learnt.measure.count_probs)
    assert probs.min() >= 0.2 * probs.mean()


@pytest.mark.parametrize(("size", "pairs"), [(4, 10), (4, 0), (64, 100)])
def test_a_small_pilot_changes_nothing(size, pairs):
    """Too few pairs to tell counts apart: they share one standard deviation."""
    measure = dataclasses.replace(Masked.uniform_counts(size), complement=True)
    sds = {k: 1.0 + k for k in range(size + 1)}
    probs = estimators.Importance("importance", measure).from_pilot(*pilot(sds, pairs, size)).measure.count_probs
    assert len(probs) == size and len(set(probs)) == 1


def test_short_blocks_teach_nothing():
    counts, means = pilot({2: 1.0, 3: 2.0, 4: 4.0}, 4000, SIZE)
    short = np.array([[2, 1]] * 4000), np.array([[100.0, -100.0]] * 4000) * np.arange(4000)[:, None]
    first = estimators.Importance("importance", COMPLEMENT)
    both = first.from_pilot(np.concatenate([counts, short[0]]), np.concatenate([means, short[1]]))
    assert both == first.from_pilot(counts, means)


# ---- which model takes which


def make(name, **changes):
    return estimators.make(name, make_lm(**changes).config)


@pytest.mark.parametrize("name", ["exact_count", "importance", "exact", "nll"])
@pytest.mark.parametrize("objective", ["ar", 1])
def test_where_one_pass_is_exact_it_is_taken(name, objective, tmp_path):
    changes = {"diffusion": AR, "model.adaln": False} if objective == "ar" else {"diffusion.block_size": 1}
    config = toy_config(tmp_path, changes)
    estimator = estimators.make(name, config)
    assert (estimator.name, estimator.num_passes(9), estimator.noise_samples) == ("nll", 1, 1)
    assert estimators.default_estimator(config) == "nll"


def test_block_size_one_by_the_published_estimator():
    assert make("bernoulli", objective=masked(1)).measure.corruption == "bernoulli"


def test_a_single_token_that_sees_the_level_is_sampled():
    assert make("exact_count", objective=masked(1), time_conditioning=True).replicates == 2


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("elbo", {}, "unknown estimator 'elbo': known: bernoulli, exact, exact_count, importance, native, nll"),
    ("exactcount", {}, "unknown estimator 'exactcount': did you mean 'exact_count'"),
    ("nll", {}, "'nll' is exact only for AR and for block size 1 .* this model has block size 4"),
    ("exact", {"objective": masked(12)}, r"all 2\^S - 1 masks .* this model has block size 12, expected at most 8"),
    ("exact", {"time_conditioning": True}, "enumerates masks, but this model also sees the noise level"),
])
def test_wrong_requests(name, changes, message):
    with pytest.raises(UserError, match=message):
        make(name, **changes)


def test_bernoulli_of_an_autoregressive_model(tmp_path):
    with pytest.raises(UserError, match="'bernoulli' masks tokens, which an autoregressive model does not"):
        estimators.make("bernoulli", toy_config(tmp_path, {"diffusion": AR, "model.adaln": False}))
