"""Laws and definitions of the reveal steps, one block at a time; the choosers against loops over sorted lists."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from scipy import stats

from bd3lm_jax.generation.sampling.steps import SAMPLERS, Row, TokenStats

PVALUE = 1e-3


def make_row(masked_S, level=1.0, index=0, written=False, confidence=1.0):
    masked = jnp.asarray(masked_S)
    return Row(masked, jnp.broadcast_to(jnp.asarray(written), masked.shape),
               jnp.broadcast_to(jnp.asarray(confidence, jnp.float32), masked.shape), jnp.asarray(level), index)


def run_block(sampler, masked_S, steps, calls, count, threshold=0.0):
    """`count` independent blocks through `calls` plans, all of which is revealed: plans, and what is masked after each,
    with leading [calls, count]. Confidences of tokens are their place's, 0.1, 0.2, ..."""
    place = jnp.arange(1, len(masked_S) + 1) / 10

    def one_step(state, index, key):
        masked, level = state
        written = jnp.asarray(masked_S) & ~masked
        plan = SAMPLERS[sampler].plan(jax.random.fold_in(key, index), Row(masked, written, place, level, index), steps,
                                      threshold)
        masked = (masked & ~plan.reveal) | plan.remask
        return (masked, plan.next_level), (plan, masked)

    def block(key):
        begin = (jnp.asarray(masked_S), jnp.ones(()))
        return jax.lax.scan(lambda state, index: one_step(state, index, key), begin, jnp.arange(calls))[1]

    result = jax.jit(jax.vmap(block, out_axes=1))(jax.random.split(jax.random.key(0), count))
    return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize("masked_S", [[True] * 4, [False, True, False, False]])
def test_first_hitting_levels_are_order_statistics(masked_S):
    """n tokens are hit at independent uniform mask probabilities, the largest first."""
    n, count = sum(masked_S), 4000
    plan, _ = run_block("first_hitting", masked_S, 0, n, count)
    np.testing.assert_array_equal(plan.reveal.sum(-1), 1)
    np.testing.assert_array_equal(plan.reveal.sum(0), np.broadcast_to(masked_S, (count, len(masked_S))))
    np.testing.assert_array_equal(plan.level, plan.next_level)
    for i in range(n):
        assert stats.kstest(plan.level[i], stats.beta(n - i, i + 1).cdf).pvalue > PVALUE
    # Together, not only one by one: at a random rank the levels are plain uniforms.
    rank = np.random.default_rng(0).permuted(np.tile(np.arange(n), (count, 1)), axis=1)
    shuffled = np.take_along_axis(plan.level.T, rank, axis=1)
    cells = np.bincount((shuffled < 0.5) @ 2 ** np.arange(n), minlength=2**n)
    assert stats.chisquare(cells).pvalue > PVALUE


def test_first_hitting_order_is_uniform():
    plan, _ = run_block("first_hitting", [True, False, True, True], 0, 3, 6000)
    order = plan.reveal.argmax(-1).T @ [16, 4, 1]
    _, seen = np.unique(order, return_counts=True)
    assert len(seen) == 6 and stats.chisquare(seen).pvalue > PVALUE


@pytest.mark.parametrize("masked_S, steps, counts", [([True] * 5, 3, [2, 2, 1]), ([True, False, True, True, True], 3,
                                                     [2, 1, 1]), ([True, False, False, False, True], 4, [1, 1, 0, 0])])
def test_random_order_reveals_equal_parts_at_random(masked_S, steps, counts):
    """No step reveals more than positions over steps, for which the head runs; every split of the masks is alike."""
    n, count, most = sum(masked_S), 4000, SAMPLERS["random_order"].most(len(masked_S), steps)
    plan, masked = run_block("random_order", masked_S, steps, steps, count)
    np.testing.assert_array_equal(plan.reveal.sum(-1), np.broadcast_to(np.array(counts)[:, None], (steps, count)))
    assert max(counts) <= most == -(-len(masked_S) // steps)
    np.testing.assert_array_equal(plan.reveal.sum(0), np.broadcast_to(masked_S, (count, len(masked_S))))
    np.testing.assert_allclose(plan.level[:, 0], 1 - np.cumsum([0, *counts[:-1]]) / n, atol=1e-6)
    times = plan.reveal.argmax(0)[:, masked_S]  # [count, n]
    _, seen = np.unique(times @ steps ** np.arange(n), return_counts=True)
    splits = math.factorial(n) // math.prod(math.factorial(c) for c in counts)
    assert len(seen) == splits and stats.chisquare(seen).pvalue > PVALUE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_nothing_to_write_nothing_happens(sampler):
    plan = SAMPLERS[sampler].plan(jax.random.key(0), make_row([False] * 4), 3, 0.5)
    assert not plan.reveal.any() and not plan.remask.any() and np.isfinite(plan.level)


def test_ancestral_reveal_times_are_independent_and_uniform():
    steps, count = 6, 6000
    plan, _ = run_block("ancestral", [True, True, False, True], steps, steps, count)
    times = plan.reveal[:, :, [0, 1, 3]].argmax(0)  # [count, 3]
    np.testing.assert_array_equal(plan.reveal.sum(0), np.broadcast_to([1, 1, 0, 1], (count, 4)))  # all, each once
    assert not plan.remask.any()
    for i in range(3):
        assert stats.chisquare(np.bincount(times[:, i], minlength=steps)).pvalue > PVALUE
    pairs = np.bincount(times[:, 0] * steps + times[:, 2], minlength=steps**2)
    assert stats.chisquare(pairs).pvalue > PVALUE


GRIDS = {
    "ancestral": [1, 0.8, 0.6, 0.4, 0.2, 0], "remdm_cap": [1, 0.8, 0.6, 0.4, 0.2, 0],
    "ancestral_cosine": [1, np.cos(np.pi / 10), np.cos(np.pi / 5), np.cos(np.pi * 0.3), np.cos(np.pi * 0.4), 0],
    "remdm_loop": [1, 0.6, 0.2, 0.1, 0.1, 0],  # 0.1 after 0.45 of the steps and up to 0.95
}


@pytest.mark.parametrize("sampler", GRIDS)
def test_levels_are_the_grid(sampler):
    plan, _ = run_block(sampler, [True] * 2, 5, 5, 1)
    np.testing.assert_allclose(plan.level[:, 0], GRIDS[sampler][:-1], atol=1e-6)
    np.testing.assert_allclose(plan.next_level[:, 0], GRIDS[sampler][1:], atol=1e-6)


def test_one_ancestral_step_reveals_everything():
    plan = SAMPLERS["ancestral"].plan(jax.random.key(0), make_row([True, False, True]), 1, 0.0)
    np.testing.assert_array_equal(plan.reveal, [True, False, True])


@pytest.mark.parametrize("sampler, threshold", [
    ("ancestral_cosine", 0.0), ("remdm_cap", 0.4), ("remdm_rescale", 0.8), ("remdm_loop", 0.08)])
def test_masks_are_those_of_the_grid(sampler, threshold):
    """After every step each position is a mask with the grid's probability, on its own, masked again or not."""
    size, count = 3, 5000
    plan, masked = run_block(sampler, [True] * size, 5, 5, count, threshold)
    assert plan.remask.any() == sampler.startswith("remdm")
    grid = GRIDS.get(sampler, GRIDS["remdm_cap"])
    for level, masked_NxS in zip(grid[1:-1], masked[:-1], strict=True):
        chances = [np.prod([level if m else 1 - level for m in cell])
                   for cell in itertools.product((0, 1), repeat=size)]
        cells = np.bincount(masked_NxS @ [4, 2, 1], minlength=2**size)
        assert stats.chisquare(cells, count * np.array(chances)).pvalue > PVALUE
    assert not masked[-1].any()


def again(sampler, t, s, eta, confidence_S):
    """Chance of a token to be masked again, by the words of the ReMDM paper."""
    most = min(1.0, s / (1 - t))
    share = np.exp(-confidence_S) / np.exp(-confidence_S).sum()
    if sampler == "remdm_confidence":
        return share * eta * most
    chance = {"remdm_cap": min(eta, most), "remdm_rescale": eta * most, "remdm_loop": min(eta, most) * (s == t)}
    return np.full(len(confidence_S), chance[sampler])


@pytest.mark.parametrize("sampler, index, t, s", some([
    ("remdm_cap", 3, 0.4, 0.2), ("remdm_cap", 1, 0.8, 0.6), ("remdm_rescale", 3, 0.4, 0.2), ("remdm_loop", 3, 0.1, 0.1),
    ("remdm_loop", 1, 0.6, 0.2), ("remdm_confidence", 2, 0.6, 0.4)], 0, 2))
def test_chances_of_one_step(sampler, index, t, s):
    """Two masked positions, two written ones; the chances are those of ReMDM's equations 5 to 7."""
    count, eta, confidence = 8000, 0.5, np.array([0.9, 0.1, 0.9, 0.2])
    row = make_row([True, True, False, False], t, index, [False, False, True, True], confidence)
    plan = jax.jit(jax.vmap(lambda key: SAMPLERS[sampler].plan(key, row, 5, eta)))(
        jax.random.split(jax.random.key(1), count))
    sigma = again(sampler, t, s, eta, confidence[2:])
    hidden = 0.0 if sampler == "remdm_confidence" else sigma[0]  # masks have no confidence, and no share
    reveal = (t - s + (1 - t) * hidden) / t
    reveals, remasks = np.asarray(plan.reveal).sum(0), np.asarray(plan.remask).sum(0)
    for seen, chance in zip([*reveals[:2], *remasks[2:]], [reveal, reveal, *sigma]):
        assert stats.binomtest(int(seen), count, min(chance, 1.0)).pvalue > PVALUE
    assert not reveals[2:].any() and not remasks[:2].any()


def test_iterative_masks_a_shrinking_part_that_is_drawn_at_random():
    """Of 5 positions floor(5 (1 - n / steps)) after step n, every choice alike; all are redrawn in each step."""
    steps, count, wanted = 4, 4000, [True, True, False, True, True, True]
    plan, masked = run_block("iterative", wanted, steps, steps, count)
    np.testing.assert_array_equal(masked.sum(-1), np.broadcast_to([[3], [2], [1], [0]], (steps, count)))
    np.testing.assert_array_equal(plan.reveal, np.broadcast_to(wanted, plan.reveal.shape))
    np.testing.assert_allclose(plan.level, np.broadcast_to([[1], [0.75], [0.5], [0.25]], (steps, count)))
    _, seen = np.unique(masked[1] @ 2 ** np.arange(6), return_counts=True)
    assert len(seen) == 10 and stats.chisquare(seen).pvalue > PVALUE
    apart = np.bincount(masked[0, :, 0] * 2 + masked[1, :, 0], minlength=4)  # chances 3/5 and 2/5, independent
    assert stats.chisquare(apart, count * np.array([6, 4, 9, 6]) / 25).pvalue > PVALUE


@functools.partial(jax.jit, static_argnums=(0, 3))
def choose(sampler, planned_NxS, token_stats, steps, index_N, threshold_N):
    def one(planned, token_stats, index, threshold):
        row = Row(planned, ~planned, token_stats.confidence, jnp.ones(()), index)
        return SAMPLERS[sampler].choose(row, planned, token_stats, steps, threshold)
    return jax.vmap(one)(planned_NxS, token_stats, index_N, threshold_N)


def expected_choice(sampler, planned, token_stats, steps, index, threshold):
    """Places that the papers' words reveal, from lists of Python."""
    places = [i for i in range(len(planned)) if planned[i]]
    if sampler in ("confidence", "margin", "entropy"):
        score = {"confidence": token_stats.confidence, "margin": token_stats.margin,
                 "entropy": -token_stats.entropy}[sampler]
        places.sort(key=lambda i: -score[i])
        return set(places[:-(-len(places) // (steps - index))])
    if sampler == "entropy_bound":
        places.sort(key=lambda i: token_stats.entropy[i])
        sums = np.cumsum([0.0, *(token_stats.entropy[i] for i in places)])[:-1]  # the largest of each set left out
        return set(places[:max(1, int((sums <= threshold).sum()))])
    places.sort(key=lambda i: -token_stats.confidence[i])
    if sampler == "threshold":
        return {places[0]} | {i for i in places if token_stats.confidence[i] >= threshold}
    chosen = places[:1]
    for r, place in enumerate(places[1:], start=2):
        if token_stats.confidence[place] < 1 - threshold / (r + 1):
            break
        chosen.append(place)
    return set(chosen)


CHOOSERS = [name for name, sampler in SAMPLERS.items() if sampler.choose is not None and not sampler.predicts_scores]


@pytest.mark.parametrize("sampler", CHOOSERS)
def test_choices_are_the_papers(sampler):
    draw, rows, size, steps = np.random.default_rng(0), 300, 7, 5
    planned = draw.random((rows, size)) < 0.7
    planned[~planned.any(1), 3] = True
    confidence = draw.beta(3, 1, (rows, size)).astype(np.float32)
    token_stats = TokenStats(confidence, *draw.random((2, rows, size)).astype(np.float32))
    index, threshold = draw.integers(0, steps, rows), (draw.random(rows) * 1.5).astype(np.float32)
    found = np.asarray(choose(sampler, planned, token_stats, steps, index, threshold))
    expected = [expected_choice(sampler, planned[i], TokenStats(*(x[i] for x in token_stats[:3])), steps, index[i],
                                threshold[i]) for i in range(rows)]
    assert [set(np.flatnonzero(row).tolist()) for row in found] == expected
    assert len({len(chosen) for chosen in expected}) > 3


@pytest.mark.parametrize("sampler", CHOOSERS)
def test_candidates_are_all_masks_and_ties_go_to_the_left(sampler):
    row = make_row([False, True, True, True, False], written=[False, False, False, False, True])
    plan = SAMPLERS[sampler].plan(jax.random.key(0), row, 3, 0.5)
    np.testing.assert_array_equal(plan.reveal, row.masked)
    assert plan.level == pytest.approx(3 / 4)  # of what is not given
    alike, just_one = jnp.full(5, 0.3), 0.31 if sampler == "threshold" else 0.29
    shown = SAMPLERS[sampler].choose(row, row.masked, TokenStats(alike, alike, alike), 3, just_one)
    np.testing.assert_array_equal(shown, [False, True, False, False, False])


@pytest.mark.parametrize("sampler", CHOOSERS)
@pytest.mark.parametrize("level", some([1e-5, 0.01, 0.5, 1.0], 1))
def test_rounding_does_not_order_positions(sampler, level):
    """Groups of positions of which the network says the same but for the last bits, as an untrained one does."""
    draw, size = np.random.default_rng(0), 12
    group = draw.integers(0, 3, (200, size))
    planned, index = np.ones((200, size), bool), np.zeros(200, int)
    plain = [np.array([level, 0.7 * level, 0.4 * level])[group], np.array([0.3, 0.2, 0.1])[group] * level,
             np.array([0.1, 0.7, 7.0])[group]]
    noisy = [x + draw.uniform(-3e-7, 3e-7, x.shape) * scale
             for x, scale in zip(plain, (level, level, np.maximum(plain[2], 1)))]
    threshold = np.full(200, 0.37, np.float32)  # none of the sums of entropies, which 0.3 is
    expected, found = (
        np.asarray(choose(sampler, planned, TokenStats(*(np.float32(x) for x in token_stats)), 5, index, threshold))
        for token_stats in (plain, noisy))
    np.testing.assert_array_equal(found, expected)
