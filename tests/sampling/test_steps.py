"""Laws of the reveal steps: when, where and at which level, one block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.sampling.steps import STEPS, ancestral, first_hitting

PVALUE = 1e-3


def run_block(step, masked_S, steps, calls, count):
    """`count` independent blocks through `calls` steps: choices with leading [calls, count]."""
    def one_step(state, index, key):
        masked, level = state
        choice = step(jax.random.fold_in(key, index), masked, level, index, steps)
        return (masked & ~choice.reveal, choice.next_level), choice

    def block(key):
        start = (jnp.asarray(masked_S), jnp.ones(()))
        return jax.lax.scan(lambda state, index: one_step(state, index, key), start, jnp.arange(calls))[1]

    choices = jax.jit(jax.vmap(block, out_axes=1))(jax.random.split(jax.random.key(0), count))
    return jax.tree.map(np.asarray, choices)


@pytest.mark.parametrize("masked_S", [[True] * 4, [False, True, True, True], [False, True, False, False]])
def test_first_hitting_levels_are_order_statistics(masked_S):
    """n tokens are hit at independent uniform mask probabilities, the largest first."""
    n, count = sum(masked_S), 4000
    reveal, level, next_level = run_block(first_hitting, masked_S, 0, n, count)
    np.testing.assert_array_equal(reveal.sum(-1), 1)
    np.testing.assert_array_equal(reveal.sum(0), np.broadcast_to(masked_S, (count, len(masked_S))))
    np.testing.assert_array_equal(level, next_level)
    for i in range(n):
        assert stats.kstest(level[i], stats.beta(n - i, i + 1).cdf).pvalue > PVALUE
    # Together, not only one by one: at a random rank the levels are plain uniforms.
    rank = np.random.default_rng(0).permuted(np.tile(np.arange(n), (count, 1)), axis=1)
    shuffled = np.take_along_axis(level.T, rank, axis=1)
    cells = np.bincount((shuffled < 0.5) @ 2 ** np.arange(n), minlength=2**n)
    assert stats.chisquare(cells).pvalue > PVALUE


def test_first_hitting_order_is_uniform():
    reveal, *_ = run_block(first_hitting, [True, False, True, True], 0, 3, 6000)
    order = reveal.argmax(-1).T @ [16, 4, 1]
    _, seen = np.unique(order, return_counts=True)
    assert len(seen) == 6 and stats.chisquare(seen).pvalue > PVALUE


def test_first_hitting_with_nothing_left_reveals_nothing():
    choice = first_hitting(jax.random.key(0), jnp.zeros(4, bool), jnp.ones(()), 0, 0)
    assert not choice.reveal.any() and np.isfinite(choice.level)


def test_ancestral_reveal_times_are_independent_and_uniform():
    steps, count = 6, 6000
    reveal, *_ = run_block(ancestral, [True, True, False, True], steps, steps, count)
    times = reveal[:, :, [0, 1, 3]].argmax(0)  # [count, 3]
    np.testing.assert_array_equal(reveal.sum(0), np.broadcast_to([1, 1, 0, 1], (count, 4)))  # all, each once
    for i in range(3):
        assert stats.chisquare(np.bincount(times[:, i], minlength=steps)).pvalue > PVALUE
    pairs = np.bincount(times[:, 0] * steps + times[:, 2], minlength=steps**2)
    assert stats.chisquare(pairs).pvalue > PVALUE


def test_ancestral_levels_are_the_grid():
    _, level, next_level = run_block(ancestral, [True] * 2, 5, 5, 1)
    np.testing.assert_allclose(level[:, 0], [1, 0.8, 0.6, 0.4, 0.2], atol=1e-6)
    np.testing.assert_allclose(next_level[:, 0], [0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)


def test_one_ancestral_step_reveals_everything():
    choice = ancestral(jax.random.key(0), jnp.array([True, False, True]), jnp.ones(()), 0, 1)
    np.testing.assert_array_equal(choice.reveal, [True, False, True])


def test_registry():
    assert {name: sampler.single for name, sampler in STEPS.items()} == {"first_hitting": True, "ancestral": False}
