"""The bound of a network that is right: with exact conditionals the continuous-time bound is -log p(x) at every S.

Reverse steps of finite number reveal several tokens at once from a product law, and pay for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_law import LENGTH, ToyLaw, blocks, subsets

from bd3lm_jax.diffusion.schedule import get_schedule
from bd3lm_jax.likelihood.estimators import Exhaustive
from bd3lm_jax.scoring.score import SpecialIds

LAW, MASK = ToyLaw(), 9
SIZES = (1, 2, 4)


def expected_nats(size: int, prob: float) -> np.ndarray:
    """Of every text: expected cross-entropy of its masked tokens where each is masked with that probability."""
    return sum(prob**len(hidden) * (1 - prob)**(size - len(hidden)) * LAW.masked_nats(hidden, size)
               for places in blocks(size) for hidden in subsets(places))


def bound_in_steps(size: int, steps: int, schedule: str) -> np.ndarray:
    """NELBO of every text by reverse steps t -> t - 1/T: sum over steps of (alpha_s - alpha_t) / (1 - alpha_t) times
    the expected cross-entropy (D3PM, arXiv 2107.03006, with the masked network of BD3-LM)."""
    schedule = get_schedule(schedule)
    masked = [0.0, *(float(schedule.mask_prob(t)) for t in np.arange(1, steps + 1) / steps)]
    return sum((after - before) / after * expected_nats(size, after) for before, after in zip(masked, masked[1:]))


@pytest.mark.parametrize("size", SIZES)
def test_enumeration_of_masks_is_the_likelihood(size):
    """The weights are the library's, the cross-entropies those of the law."""
    estimator, total = Exhaustive(size), np.zeros_like(LAW.probs)
    for index in range(estimator.num_passes(1)):
        noised = estimator.noised(jax.random.key(0), index, 1, jnp.arange(LENGTH), jnp.ones(LENGTH, int),
                                  SpecialIds(MASK, -1))
        for xt_L, weight_L in zip(np.asarray(noised.xt_BxMxL), np.asarray(noised.weight_BxMxL, np.float64)):
            hidden = set(np.flatnonzero(xt_L == MASK))
            for i in hidden:
                start = i // size * size  # earlier blocks are clean, whatever is masked there
                observed = set(range(start + size)) - {j for j in hidden if j >= start}
                total += weight_L[i] * LAW.cross_entropy(i, observed)
    np.testing.assert_allclose(total / (estimator.num_passes(1) * estimator.noise_samples), LAW.nats, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["loglinear", "cosine", "square"])
@pytest.mark.parametrize("size", SIZES)
def test_integral_over_levels_is_the_likelihood(size, schedule):
    """weight(t) dt = d(mask probability) / (mask probability), whatever the schedule."""
    nodes, node_weights = np.polynomial.legendre.leggauss(30)
    total = np.zeros_like(LAW.probs)
    for t, part in zip((nodes + 1) / 2, node_weights / 2):
        prob, weight = (float(f(t)) for f in (get_schedule(schedule).mask_prob, get_schedule(schedule).weight))
        total += part * weight * expected_nats(size, prob)
    np.testing.assert_allclose(total, LAW.nats, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_steps_cost_more_in_larger_blocks_and_less_if_there_are_many(schedule):
    entropy = LAW.mean(LAW.nats)
    steps = (1, 2, 4, 16, 64)
    cost = {size: [LAW.mean(bound_in_steps(size, number, schedule)) - entropy for number in steps] for size in SIZES}
    np.testing.assert_allclose(cost[1], 0, atol=1e-6)  # one token a block: autoregression, in any number of steps
    for few, many in zip(cost[2], cost[4]):
        assert 1e-4 * entropy < few < many
    for size in (2, 4):
        assert np.all(np.diff(cost[size]) < 0)
        assert cost[size][-1] < 0.03 * cost[size][0]
        assert cost[size][-2] / cost[size][-1] == pytest.approx(4, rel=0.15)  # the excess falls as 1 / T


def test_one_step_is_a_product_of_marginals():
    marginals = sum(LAW.cross_entropy(i, set()) for i in range(LENGTH))
    np.testing.assert_allclose(bound_in_steps(LENGTH, 1, "loglinear"), marginals, rtol=1e-6)
