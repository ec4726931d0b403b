"""The adversary's masks against sums over orders, its gradient against enumerated losses, its weights against the
enumerated bound."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_runs import END, LENGTH, MASK, network, quick_jit, toy_config

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import OBJECTIVE_PARAMS, TrainState
from bd3lm_jax.diffusion.adversarial import Adversarial
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import forward
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring import parameters
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.step import make_step

SIZE, VOCAB, WIDTH = 4, 6, 3
PLAIN = Adversarial(block_size=SIZE, rate=0.5, complement=False, importance=False, hidden_size=5, score_limit=3.0)


@functools.cache
def scorer(scale=0.8):
    """A scorer with weights everywhere, and the embedding table that it reads."""
    draw = np.random.default_rng(0)
    learned_params = {"token": draw.normal(size=(WIDTH, 5)), "place": draw.normal(size=(SIZE, 5)),
                      "out": scale * draw.normal(size=5), "embedding": draw.normal(size=(VOCAB, WIDTH))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), learned_params)


def orders(odds, count):
    """Every order of `count` of the tokens with its Plackett-Luce probability."""
    for order in itertools.permutations(np.flatnonzero(odds), count):
        probability, rest = 1.0, odds.sum()
        for token in order:
            probability *= odds[token] / rest
            rest -= odds[token]
        yield order, probability


def set_probability(odds, subset):
    return sum(p for order, p in orders(odds, len(subset)) if set(order) == set(subset))


ROWS = np.array([[0, 1, 2, 3, 5, 5, 1, 0], [3, 3, 4, 0, 2, 1, 0, 0]], np.int32)
SEGMENT = np.array([[1] * 8, [1] * 7 + [0]], np.int32)


def test_the_probability_of_a_set_is_the_sum_over_its_orders():
    score = np.asarray(PLAIN.scores(scorer(), ROWS), np.float64)
    assert score.std() > 0.3 and np.abs(score).max() < 3
    subsets = [(0,), (1, 3), (0, 1, 2), (0, 1, 2, 3)]
    masked = np.zeros((2, len(subsets), 8), bool)
    for view, subset in enumerate(subsets):
        masked[:, view, list(subset)] = masked[:, view, [SIZE + i for i in subset if i < 3]] = True
    found = quick_jit(PLAIN.set_prob)(score.astype(np.float32), masked, np.broadcast_to(SEGMENT[:, None] != 0,
                                                                                        masked.shape))
    for b, view, k in np.ndindex(*found.shape):
        block = np.s_[k * SIZE:(k + 1) * SIZE]
        odds = np.where(SEGMENT[b, block] != 0, np.exp(score[b, block]), 0)
        expected = set_probability(odds, np.flatnonzero(masked[b, view, block]))
        assert found[b, view, k] == pytest.approx(expected, rel=1e-5)


def drawn(it, noise_samples, number, learned_params=None, seed=0):
    """`number` noised copies of one block of tokens, the third of which may not be masked."""
    x0 = np.broadcast_to(ROWS[0, :SIZE], (number, SIZE))
    segment = np.broadcast_to(np.array([1, 1, 0, 1]), x0.shape)
    return quick_jit(lambda key: it.corrupt(key, x0, segment, noise_samples, VOCAB, END,
                                            learned_params=learned_params))(
        jax.random.key(seed))


@pytest.mark.parametrize("told", [False, True])
def test_masks_follow_the_scores(told):
    """Chi-square over the sets of two of three tokens; uniform without a scorer."""
    it = dataclasses.replace(PLAIN, rate=0.6)
    noised = drawn(it, 2, 3000, scorer() if told else None)
    masked = np.asarray(noised.weight_BxMxL).reshape(-1, SIZE) > 0
    score = np.asarray(PLAIN.scores(scorer(), ROWS[:1]), np.float64)[0, :SIZE] if told else np.zeros(SIZE)
    odds, statistic = np.exp(score) * [1, 1, 0, 1], 0.0
    for subset in ((0, 1), (0, 3), (1, 3)):
        p = set_probability(odds, subset)
        assert told or p == pytest.approx(1 / 3)
        count = np.sum((masked == np.isin(np.arange(SIZE), subset)).all(1))
        statistic += (count - len(masked) * p) ** 2 / (len(masked) * p)
    assert statistic < 18.4  # 1e-4 of chi-square with 2 degrees; every mask is one of the three sets
    assert np.all(masked.sum(1) == 2)


@pytest.mark.parametrize("rate, counts", [(0.5, [0, 1, 1, 2, 2]), (0.75, [0, 1, 2, 2, 3]), (1.0, [0, 1, 2, 3, 4]),
                                          (0.1, [0, 1, 1, 1, 1])])
def test_the_rate_is_kept_exactly_and_complements_share_out(rate, counts):
    it = dataclasses.replace(PLAIN, rate=rate, complement=True)
    x0 = np.random.default_rng(1).integers(0, VOCAB, size=(6, 12)).astype(np.int32)
    segment = (np.arange(12) < np.array([12, 11, 10, 9, 5, 8])[:, None]).astype(np.int32)
    noised = quick_jit(lambda: it.corrupt(jax.random.key(0), x0, segment, 4, VOCAB, END, learned_params=scorer()))()
    masked = np.asarray(noised.xt_BxMxL) == VOCAB
    np.testing.assert_array_equal(masked, np.asarray(noised.weight_BxMxL) > 0)
    n = segment.reshape(6, 3, SIZE).sum(-1)
    for pair in (0, 2):
        np.testing.assert_array_equal(masked[:, pair].astype(int) + masked[:, pair + 1], segment)
        np.testing.assert_array_equal(masked[:, pair].reshape(6, 3, SIZE).sum(-1), np.array(counts)[n])
    alone = dataclasses.replace(it, complement=False)
    noise_samples = quick_jit(lambda: alone.corrupt(jax.random.key(0), x0, segment, 2, VOCAB, END,
                                                    learned_params=scorer()))()
    assert noise_samples.capacity == 3 * counts[SIZE] >= (np.asarray(noise_samples.weight_BxMxL) > 0).sum(-1).max()


CE = np.random.default_rng(2).uniform(0.2, 5, size=(2**SIZE, SIZE))  # cross-entropy of each token under each mask
REAL = (0, 1, 3)  # tokens of `drawn` that may be masked


def number_of(masked):
    return np.asarray(masked) @ (1 << np.arange(SIZE))


def test_reinforce_is_the_derivative_of_the_enumerated_loss():
    """All pairs of ordered draws of two tokens of three, weighted by their probabilities; the derivative in every
    weight of the scorer by finite differences in float64."""
    learned_params = scorer()

    def expected_loss(own):
        x = np.asarray(learned_params["embedding"], np.float64)[ROWS[0, :SIZE]]
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        raw = x @ own["token"] + own["place"]
        gelu = 0.5 * raw * (1 + np.tanh(np.sqrt(2 / np.pi) * (raw + 0.044715 * raw**3)))
        odds = np.exp(3 * np.tanh(gelu @ own["out"] / 3)) * np.isin(np.arange(SIZE), REAL)
        total = 0.0
        for order, p in orders(odds, 2):
            mask = np.isin(np.arange(SIZE), order)
            total += p * CE[number_of(mask)][mask].mean()
        return total, odds

    own = {name: np.asarray(x, np.float64) for name, x in learned_params.items() if name != "embedding"}
    _, odds = expected_loss(own)
    both = list(itertools.product(orders(odds, 2), repeat=2))
    ranks, losses = np.full((len(both), 2, SIZE), SIZE - 1, np.int32), np.zeros((len(both), 2, SIZE))
    for row, pair in enumerate(both):
        probability = pair[0][1] * pair[1][1]
        for view, (order, _) in enumerate(pair):
            left = [i for i in range(SIZE) if i not in order]
            ranks[row, view, [*order, *sorted(left, key=lambda i: i not in REAL)]] = np.arange(SIZE)
            losses[row, view] = probability * CE[number_of(np.isin(np.arange(SIZE), order))]
    masked = ranks < 2
    noised = Noised(None, jnp.asarray(masked, jnp.float32), None, SIZE, extra=jnp.asarray(ranks))
    x0 = np.broadcast_to(ROWS[0, :SIZE], (len(both), SIZE))
    segment = np.broadcast_to(np.isin(np.arange(SIZE), REAL).astype(np.int32), x0.shape)
    found = quick_jit(PLAIN.noise_gradient)(learned_params, noised, x0, segment, jnp.asarray(losses, jnp.float32))
    assert set(found) == set(own)
    for name, array in own.items():
        for index in list(np.ndindex(array.shape))[::3]:
            moved = []
            for sign in (1, -1):
                changed = array.copy()
                changed[index] += sign * 1e-5
                moved.append(expected_loss({**own, name: changed})[0])
            slope = (moved[0] - moved[1]) / 2e-5
            # Two copies of a block of three tokens: the gradient of minus the sum over copies of n f.
            assert found[name][index] == pytest.approx(-2 * 3 * slope, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_importance_weights_give_the_loss_of_uniform_masks(rate, complement):
    """The mean of many draws, in their interval; with all counts it is the enumerated bound."""
    it = dataclasses.replace(PLAIN, rate=rate, complement=complement, importance=True)
    noised = drawn(it, 4, 6000, scorer())
    weight = np.asarray(noised.weight_BxMxL, np.float64)
    nats = np.sum(weight * CE[number_of(weight > 0)], axis=-1).mean(1)

    def uniform(k):
        return np.mean([CE[number_of(np.isin(np.arange(SIZE), subset))][list(subset)].sum()
                        for subset in itertools.combinations(REAL, k)])

    expected = sum(uniform(k) / k for k in (1, 2, 3)) if rate == 0 else 3 * uniform(2) / 2
    if rate > 0 and complement:
        expected = (expected + 3 * uniform(1)) / 2
    assert abs(nats.mean() - expected) < 4.5 * nats.std() / math.sqrt(len(nats))
    if complement:  # what one copy has too much of the other has too little of: hardly a bias on this toy
        return
    plain = np.asarray(drawn(dataclasses.replace(it, importance=False), 4, 6000, scorer()).weight_BxMxL, np.float64)
    biased = np.sum(plain * CE[number_of(plain > 0)], axis=-1).mean(1)
    assert abs(biased.mean() - expected) > 6 * biased.std() / math.sqrt(len(biased))


def test_levels_fit_the_counts():
    """Beta(k, n - k + 1): its mean k / (n + 1)."""
    noised = drawn(dataclasses.replace(PLAIN, rate=0.6), 2, 3000)
    level = 1 - np.exp(-np.asarray(noised.sigma_BxMxK, np.float64)).ravel()
    assert abs(level.mean() - 2 / 4) < 4 * level.std() / math.sqrt(len(level))
    assert level.var() == pytest.approx(2 * 2 / (16 * 5), rel=0.1)


def test_when_it_is_a_bound_and_what_is_refused():
    bound = dataclasses.replace(PLAIN, rate=0.0, importance=True)
    assert bound.is_bound
    for changes in ({"rate": 0.5}, {"importance": False}):
        assert not dataclasses.replace(bound, **changes).is_bound
    for changes, message in (({"rate": 1.2}, "rate is 1.2"), ({"rate": -0.1}, "rate is -0.1"),
                             ({"hidden_size": 0}, "hidden_size"), ({"score_limit": 0.0}, "score_limit"),
                             ({"importance": True, "block_size": 16}, "block_size is 16, expected at most 8")):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(PLAIN, **changes)
    with pytest.raises(UserError, match="3 copies .*multiple of 2 copies"):
        drawn(PLAIN, 3, 2)


def trained():
    """A network and its adversary on rows whose even letters are all the same: masks of the others cost more."""
    section = {"kind": "adversarial", "block_size": 8}
    config = toy_config(Path("unused"), {"diffusion": section, "train.noise_samples": 2, "train.batch_size": 8,
                                         "compute.microbatch": 4, "optim.ema_decay": 0.0})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=MASK + 1))
    model, params = network(config, scale=0.1)
    params = params | {
        OBJECTIVE_PARAMS: parameters.init(model, config.diffusion, 0, jax.random.key(0))[OBJECTIVE_PARAMS]
    }
    tx = optax.adam(2e-2)
    step = quick_jit(make_step(config, model, tx, SpecialIds(MASK, END)))
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))
    losses = []
    for seed in range(60):
        tokens = np.random.default_rng(seed).integers(97, 113, size=(8, LENGTH)).astype(np.int32)
        tokens[:, ::2] = 97
        position, segment = forward.single_document_rows(tokens)
        state, metrics = step(state, {"tokens": tokens, "positions": position, "segments": segment})
        losses.append(float(metrics["loss"]))
    return config, params, state, losses


@pytest.mark.ci_slow
def test_the_adversary_learns_what_is_hard():
    config, params, state, losses = trained()
    assert np.all(np.asarray(params[OBJECTIVE_PARAMS]["out"]) == 0) and np.all(np.isfinite(losses))
    tokens = np.tile([97, 105], (1, LENGTH // 2)).astype(np.int32)
    told = {**state.params[OBJECTIVE_PARAMS], "embedding": state.params["embed"]["embedding"]}
    score = np.asarray(config.diffusion.scores(told, tokens))[0]
    assert score[1::2].mean() > score[::2].mean() + 0.5


def test_its_parameters_are_replicated():
    specs = sharding.param_specs({OBJECTIVE_PARAMS: PLAIN.init_learned_params(jax.random.key(0), VOCAB, WIDTH)}, ())
    assert all(not tuple(spec) for spec in jax.tree.leaves(specs[OBJECTIVE_PARAMS]))
