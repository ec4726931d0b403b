"""Schedules from data against closed forms and enumeration of the masks of a block of known losses."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some

from bd3lm_jax.diffusion.clip import MAX_MEAN_COUNT_RATIO, RESOLUTION, ClipSearch, CountSchedule, relative_variance
from bd3lm_jax.diffusion.masked import Masked

MASK, END, SIZE = 99, 0, 4
ROWS, LENGTH = 64, 64
CLIPPED = Masked(block_size=SIZE, schedule="loglinear", corruption="bernoulli", count_probs=(), complement=False,
                 clip_low=0.0, clip_high=1.0, eps=1e-3)
UNIFORM = Masked.uniform_counts(SIZE)
# Cross-entropies of the toy: the masked tokens of a block pay TABLE[pattern], each pattern a row.
TABLE_PxS = np.random.default_rng(7).exponential(2.0, (16, SIZE)) * (1 + np.arange(16)[:, None] / 8)
TOKENS_BxL = np.zeros((ROWS, LENGTH), np.int32)
PADDED_BxL = np.ones((ROWS, LENGTH), np.int32)
PADDED_BxL[::2, -6:] = 0


def search(**changes):
    return ClipSearch(**{"block_size": SIZE, "low": 0.0, "high": 1.0, "widths": (0.5, 0.6, 0.7, 0.8, 0.9),
                         "stride": 0.05, **changes})


def table_losses(xt):
    """Cross-entropy of every token by the pattern of its block."""
    pattern = (xt.reshape(*xt.shape[:-1], -1, SIZE) == MASK) @ 2 ** np.arange(SIZE)
    return jnp.asarray(TABLE_PxS, jnp.float32)[pattern].reshape(xt.shape)


# ---- the clip search


def test_candidates_are_those_of_the_paper():
    found = search().candidates
    assert len(found) == 11 + 9 + 7 + 5 + 3
    assert [0.0, 0.5] in found.tolist() and [0.45, 0.95] in found.tolist() and [0.1, 1.0] in found.tolist()
    assert found.min() == 0 and found.max() == 1
    assert search(low=0.2, high=0.8, widths=(0.5, 0.9), stride=0.1).candidates.tolist() == [[0.2, 0.7], [0.3, 0.8]]
    assert search(low=0.2, high=0.6).candidates.tolist() == [[0.2, 0.6]]  # no width fits


def truth(interval, losses_of_count):
    """Var[X] / E[X]^2 of X = loss / t, t uniform in the interval, counts binomial and inside it."""
    low, high = interval
    t = low + (high - low) * (np.arange(2000) + 0.5) / 2000
    first, second = np.zeros_like(t), np.zeros_like(t)
    n = len(losses_of_count) - 1
    distribution = np.array([math.comb(n, k) * t**k * (1 - t)**(n - k) * (low * n - 1e-9 <= k <= high * n + 1e-9)
                             for k in range(n + 1)])
    distribution /= distribution.sum(0)
    for k in range(n + 1):
        first += distribution[k] * losses_of_count[k] / t
        second += distribution[k] * (losses_of_count[k] / t)**2
    return (second.mean() - first.mean()**2) / first.mean()**2


def test_the_interval_with_the_least_variance_is_found():
    """Each of k masked tokens costs 1 + k: the variance of every interval is an integral."""
    schedule = search(low=0.3, high=1.0, widths=(0.5, 0.6), stride=0.1)
    draw = jax.jit(lambda key, noise: CLIPPED.corrupt(key, TOKENS_BxL, TOKENS_BxL + 1, 8, MASK, END,
                                                      schedule.distribution(noise, LENGTH // SIZE)))
    costs = np.array([k * (1 + k) for k in range(SIZE + 1)], float)
    exact = [truth(interval, costs) for interval in schedule.candidates]
    moments = []
    for interval in schedule.candidates:
        noised = draw(jax.random.key(0), schedule.state_for_interval(interval))
        masked = np.asarray(noised.weight_BxMxL > 0).reshape(-1, SIZE)
        weight = np.asarray(noised.weight_BxMxL).reshape(-1, SIZE).max(-1)
        losses = weight * costs[masked.sum(-1)]
        moments.append((len(losses), losses.sum(), (losses**2).sum()))
    found = relative_variance(*np.array(moments).T)
    np.testing.assert_allclose(found, exact, rtol=0.06)
    assert np.argmin(found) == np.argmin(exact) and np.diff(np.sort(exact))[0] > 0.1 * min(exact)


def test_relative_variance():
    losses = np.array([1.0, 2.0, 6.0])
    moments = np.array([[3, losses.sum(), (losses**2).sum()], [3, 10 * losses.sum(), 100 * (losses**2).sum()],
                        [3, 0.0, 0.0]])
    np.testing.assert_allclose(relative_variance(*moments.T)[:2], losses.var() / 9)
    assert relative_variance(*moments.T)[2] == np.inf


def test_every_candidate_fits_the_capacity_and_draws_inside_without_a_new_program():
    schedule, traces = search(), []

    @jax.jit
    def draw(key, noise):
        traces.append(1)
        return CLIPPED.corrupt(key, TOKENS_BxL, PADDED_BxL, 2, MASK, END, schedule.distribution(noise, LENGTH // SIZE))

    for i, interval in enumerate(schedule.candidates):
        noised = draw(jax.random.key(i), schedule.state_for_interval(interval))
        fraction = np.asarray(noised.weight_BxMxL > 0).reshape(-1, SIZE).sum(-1).reshape(ROWS, 2, -1)[1::2] / SIZE
        assert interval[0] - 1e-3 <= fraction.min() and fraction.max() <= interval[1] + 1e-3
        assert (np.asarray(noised.weight_BxMxL) > 0).sum(-1).max() <= noised.capacity
    assert len(traces) == 1
    narrow = search(low=0.3, high=0.8)
    assert narrow.distribution(narrow.init_state(), 16).capacity == 16 * 3  # .8 of four tokens


def test_the_same_noise_as_a_fixed_clip():
    fixed = Masked(**{**vars(CLIPPED), "clip_low": 0.45, "clip_high": 0.95})
    schedule = search()
    arguments = TOKENS_BxL, PADDED_BxL, 2, MASK, END
    left = jax.jit(lambda key: fixed.corrupt(key, *arguments))(jax.random.key(3))
    right = jax.jit(lambda key, noise: CLIPPED.corrupt(key, *arguments, schedule.distribution(noise, LENGTH // SIZE)))(
        jax.random.key(3), schedule.state_for_interval(np.array([0.45, 0.95])))
    np.testing.assert_array_equal(left.xt_BxMxL, right.xt_BxMxL)
    np.testing.assert_allclose(left.weight_BxMxL, right.weight_BxMxL, rtol=1e-6)


# ---- the count schedule


def counts(floor=0.1, decay=0.9, size=SIZE):
    return CountSchedule(size, floor, decay)


@functools.partial(jax.jit, static_argnums=(0, 1))
def table_step(objective, schedule, key, state):
    """A training step without a network: the loss a block and copy, the state after it, the masked tokens a row."""
    noise_samples = 2
    noised = objective.corrupt(key, TOKENS_BxL, PADDED_BxL, noise_samples, MASK, END,
                               schedule.distribution(state, LENGTH // SIZE))
    losses, masked = table_losses(noised.xt_BxMxL), noised.weight_BxMxL > 0
    state = schedule.update_state(state, schedule.batch_statistics(losses, masked))
    estimates = (losses * noised.weight_BxMxL).reshape(ROWS, noise_samples, -1, SIZE).sum(-1)
    return estimates, state, masked.sum(-1), noised


def best_law():
    """pi* of the table by enumeration of all masks."""
    roots = []
    for k in range(1, SIZE + 1):
        subsets = itertools.combinations(range(SIZE), k)
        means = [TABLE_PxS[sum(2**i for i in subset), list(subset)].mean() for subset in subsets]
        roots.append(np.sqrt(np.mean(np.square(means))))
    return np.array(roots) / sum(roots)


def enumerated_bound(n):
    """Sum over k of the mean over masks of k of the first n tokens of their summed cross-entropy, over k."""
    total = 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        total += np.mean([TABLE_PxS[sum(2**i for i in s), list(s)].sum() for s in subsets]) / k
    return total


def test_the_law_converges_to_the_best_one():
    schedule, best = counts(floor=0.1, decay=0.99), best_law()
    state = schedule.init_state()
    # nothing known
    np.testing.assert_array_equal(schedule.distribution(state, 1).probs_S, np.full(SIZE, RESOLUTION // SIZE))
    for step in range(150):
        _, state, _, _ = table_step(UNIFORM, schedule, jax.random.key(step), state)
    middle = (SIZE + 1) / 2
    part = min(0.9, (MAX_MEAN_COUNT_RATIO - 1) * middle / max(best @ np.arange(1, SIZE + 1) - middle, 1e-9))
    expected = part * best + (1 - part) / SIZE
    assert np.abs(expected - 1 / SIZE).max() > 0.1
    np.testing.assert_allclose(schedule.as_metrics(state)["count_probs"], expected, rtol=0.03)


@pytest.mark.parametrize("complement", [False, True])
def test_the_loss_is_unbiased_while_the_law_changes(complement):
    """The first steps, in which the law moves most, over and over: each step's mean is the enumerated bound."""
    objective = Masked(**{**vars(UNIFORM), "complement": complement})
    schedule, means, moved = counts(floor=0.05, decay=0.5), [], []
    whole = np.asarray(PADDED_BxL.reshape(ROWS, -1, SIZE).sum(-1))
    expected = np.mean([enumerated_bound(n) for n in whole.ravel()])
    for run in range(12):
        state = schedule.init_state()
        for step in range(10):
            key = jax.random.fold_in(jax.random.key(run), step)
            estimates, state, _, _ = table_step(objective, schedule, key, state)
            means.append(float(estimates.mean()))
        moved.append(schedule.as_metrics(state)["count_probs"])
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert np.abs(np.array(moved) - 1 / SIZE).max() > 0.1
    assert abs(np.mean(means) - expected) < 4 * error and error < 0.01 * expected


def test_it_varies_less_than_uniform_counts():
    """By the second moment of a block's estimate, sum_k E[mean^2 | k] / pi(k)."""
    schedule, state, squares = counts(floor=0.02, decay=0.99), counts().init_state(), {}
    for step in range(60):
        _, state, _, _ = table_step(UNIFORM, schedule, jax.random.key(step), state)
    for name, noise in (("uniform", schedule.init_state()), ("learnt", state)):
        draws = [np.square(table_step(UNIFORM, schedule, jax.random.key(1000 + i), noise)[0][1::2]).mean()
                 for i in range(60)]
        squares[name] = np.mean(draws)
    assert squares["learnt"] < 0.97 * squares["uniform"]


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("size, blocks", some([(1, 16), (4, 16), (16, 4), (64, 1)], 0, 2))
def test_no_state_overflows_the_capacity_or_drops_a_count(size, blocks, complement):
    """Also states that no network would give: everything at one end, or one count alone."""
    objective = Masked(**{**vars(Masked.uniform_counts(size)), "complement": complement})
    schedule = counts(floor=0.1, size=size)
    length = size * blocks
    segments = np.ones((ROWS, length), np.int32)
    segments[::2, length - length // 3:] = 0
    draw = jax.jit(lambda key, state: objective.corrupt(key, segments * 0, segments, 2, MASK, END,
                                                        schedule.distribution(state, blocks)))
    for end in (0, size // 2, size - 1):
        state = {"squares_S": jnp.zeros(size).at[end].set(1e12), "blocks_S": jnp.full(size, 1e3)}
        probs = np.asarray(schedule.distribution(state, blocks).probs_S)
        assert probs.sum() == RESOLUTION and probs.min() >= 0.99 * 0.1 * RESOLUTION / size
        assert probs @ np.arange(1, size + 1) / RESOLUTION <= MAX_MEAN_COUNT_RATIO * (size + 1) / 2 + 1e-3
        for seed in range(3):
            noised = draw(jax.random.key(seed), state)
            totals = (np.asarray(noised.weight_BxMxL) > 0).sum(-1)
            assert totals.max() <= noised.capacity <= length


def test_what_is_seen_is_the_squared_mean_of_masked_tokens_by_count():
    losses = jnp.asarray([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]])
    masked = jnp.asarray([[[True, False, True, False, True, True, True, True]]])
    batch_statistics = counts().batch_statistics(losses, masked)
    np.testing.assert_allclose(batch_statistics["squares_S"], [0, 4, 0, 6.5**2])
    np.testing.assert_array_equal(batch_statistics["blocks_S"], [0, 1, 0, 1])
    again = counts(decay=0.5).update_state(batch_statistics, counts().batch_statistics(losses, jnp.zeros_like(masked)))
    np.testing.assert_allclose(again["squares_S"], [0, 2, 0, 6.5**2 / 2])
