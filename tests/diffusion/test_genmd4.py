"""GenMD4 against the likelihood of an enumerated law, MD4 with one schedule, and finite differences of its bound."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import MASK, make_ids, make_lm
from toy_runs import toy_config

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import MD4, GenMD4
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Loss
from bd3lm_jax.models.forward import DEFAULT_EXECUTION, single_document_rows
from bd3lm_jax.scoring.score import score, total_loss

LETTERS, SIZE = 3, 2
BLANK = LETTERS  # the mask
W = np.array([0.5, 1.0, 2.5])
JOINT = np.random.default_rng(5).dirichlet(np.full(LETTERS**SIZE, 0.7)).reshape(LETTERS, LETTERS)
PATTERNS = list(itertools.product((False, True), repeat=SIZE))


def genmd4(block_size=SIZE, power=1.0, eps=0.0):
    return GenMD4(block_size=block_size, power=power, eps=eps)


def learned_params(w_V):
    return {"log_w": jnp.log(jnp.asarray([*w_V, 1.0], jnp.float32))}


def chance(x, masked, t, w_V):
    """q(masked | x, t)."""
    return np.prod([t**w_V[v] if hidden else 1 - t**w_V[v] for v, hidden in zip(x, masked)])


def exact(x, masked, t, w_V):
    """mu of every token: p(x_i | which tokens are masked, and what the others are)."""
    law = np.zeros_like(JOINT)
    for y in itertools.product(range(LETTERS), repeat=SIZE):
        if all(hidden or y[i] == x[i] for i, hidden in enumerate(masked)):
            law[y] = JOINT[y] * chance(y, masked, t, w_V)
    return np.stack([law.sum(1), law.sum(0)]) / law.sum()


def block_loss(x, masked, t, w_V, mu):
    """(1/t) sum over masked of w_x (CE - 1) + w . mu, float64."""
    return sum(w_V[x[i]] * (-math.log(mu[i, x[i]]) - 1) + w_V @ mu[i] for i in range(SIZE) if masked[i]) / t


def losses_of(x, masked, t, w_V, mu):
    """The same by the objective."""
    logits = jnp.pad(jnp.log(jnp.asarray(mu, jnp.float32)), ((0, 0), (0, 1)), constant_values=4.0)
    losses = GenMD4.token_loss(logits, jnp.asarray(x), None, None, BLANK, learned_params(w_V))
    return float(jnp.sum(jnp.where(jnp.asarray(masked), losses, 0)) / t)


def test_bound_with_the_exact_posterior_is_the_likelihood():
    """Although the schedules differ from token to token: the vector weight is right."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    for x in [(0, 2), (1, 1)]:
        total = 0.0
        for u, weight in zip((nodes + 1) / 2, weights / 2):
            t = u**3  # smooths the powers of t at 0
            total += 3 * u**2 * weight * sum(
                chance(x, masked, t, W) * losses_of(x, masked, t, W, exact(x, masked, t, W))
                for masked in PATTERNS if any(masked))
        assert total == pytest.approx(-math.log(JOINT[x]), abs=1e-3)


def test_formula():
    mu = np.random.default_rng(0).dirichlet(np.ones(LETTERS), SIZE)
    for masked in PATTERNS:
        assert losses_of((2, 0), masked, 0.3, W, mu) == pytest.approx(block_loss((2, 0), masked, 0.3, W, mu), rel=1e-5)


MU = {masked: np.random.default_rng(number).dirichlet(np.ones(LETTERS), SIZE) for number, masked in enumerate(PATTERNS)}


def expected_loss(x, t, log_w):
    w_V = np.exp(log_w)
    return sum(chance(x, masked, t, w_V) * block_loss(x, masked, t, w_V, MU[masked]) for masked in PATTERNS)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_gradient_of_the_schedules_is_that_of_the_enumerated_bound(t):
    """Both parts of it, in the mean over all pairs of masks, with their probabilities."""
    x, objective, log_w = (2, 0), genmd4(), np.log(W)
    pairs = list(itertools.product(PATTERNS, PATTERNS))
    prob_P = np.array([chance(x, a, t, W) * chance(x, b, t, W) for a, b in pairs])
    masked_PxMxL = np.array(pairs)
    x0_PxL = np.tile(x, (len(pairs), 1)).astype(np.int32)
    noised = Noised(jnp.where(masked_PxMxL, BLANK, x0_PxL[:, None]), jnp.where(masked_PxMxL, 1 / t, 0.0),
                    jnp.full((len(pairs), 2, 1), -math.log1p(-t)), SIZE)
    mu = np.array([[MU[a], MU[b]] for a, b in pairs])
    logits = jnp.asarray(np.pad(np.log(mu), [(0, 0)] * 3 + [(0, 1)]), jnp.float32)
    targets = jnp.asarray(np.broadcast_to(x0_PxL[:, None], masked_PxMxL.shape).reshape(-1))

    def expected_losses(own):
        losses = objective.token_loss(logits.reshape(-1, LETTERS + 1), targets, None, None, BLANK, own)
        return losses.reshape(masked_PxMxL.shape) * prob_P[:, None, None]

    own = learned_params(W)
    direct = jax.grad(lambda own: jnp.sum(noised.weight_BxMxL * expected_losses(own)))(own)["log_w"]
    through_masks = objective.noise_gradient(own, noised, x0_PxL, np.ones_like(x0_PxL), expected_losses(own))["log_w"]
    found = np.asarray(direct + through_masks)[:LETTERS] / 2  # a mean over the copies of a pair
    expected = [(expected_loss(x, t, log_w + step) - expected_loss(x, t, log_w - step)) / 2e-5
                for step in 1e-5 * np.eye(LETTERS)]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert np.abs(np.asarray(through_masks)[:LETTERS]).max() > 0.01


@pytest.mark.ci_slow
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_one_schedule_for_all_is_md4(power):
    """Loss and gradient of the network on the same masks; and MD4's weights and levels are these."""
    objective, plain = genmd4(4, power), MD4(block_size=4, schedule=f"polynomial:{power}", clip=0.0)
    lm, x0 = make_lm(plain), jnp.asarray(make_ids(3, 8))
    position, segment = single_document_rows(x0)
    own = objective.init_learned_params(None, MASK + 1, 0)
    noised = objective.corrupt(jax.random.key(1), x0, segment, 2, MASK, -1, own)

    def total(params, noised, token_loss):
        rows = {"tokens": x0, "positions": position, "segments": segment}
        scored = score(lm.model, params, plain, noised, rows, DEFAULT_EXECUTION)
        return total_loss(lm.model, params, scored, MASK, 0, Loss(token_loss))

    t = -jnp.expm1(-noised.sigma_BxMxK)
    weight = jnp.where(noised.weight_BxMxL > 0, jnp.repeat(power / t, 4, axis=-1), 0)

    def learnt_loss(*arguments, mask_id):
        return objective.token_loss(*arguments, mask_id, own)

    loss, grads = jax.value_and_grad(total)(lm.params, noised, learnt_loss)
    expected, expected_grads = jax.value_and_grad(total)(lm.params, noised.replace(weight_BxMxL=weight), None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(loss)), grads, expected_grads)
    drawn = plain.corrupt(jax.random.key(2), x0, segment, 1, MASK, -1)
    some = np.asarray(drawn.weight_BxMxL).reshape(3, 2, 4).max(-1) > 0
    level = -np.expm1(-np.asarray(drawn.sigma_BxMxK, np.float64))[:, 0]
    np.testing.assert_allclose(np.asarray(drawn.weight_BxMxL).reshape(3, 2, 4).max(-1)[some],
                               (power / level**(1 / power))[some], rtol=1e-4)


def test_what_is_masked():
    """Both copies of a pair at one time, token v with probability (1-e) t^w_v."""
    x0 = np.tile(np.arange(LETTERS), (4000, 2)).astype(np.int32)
    segment = np.tile(np.arange(6) < 5, (4000, 1)).astype(np.int32)
    noised = genmd4(3, eps=0.2).corrupt(jax.random.key(0), x0, segment, 2, BLANK, 0, learned_params(W))
    masked, sigma = np.asarray(noised.xt_BxMxL) == BLANK, np.asarray(noised.sigma_BxMxK, np.float64)
    np.testing.assert_array_equal(sigma[:, 0], sigma[:, 1])
    assert (masked[:, 0] != masked[:, 1]).any() and not masked[..., 5].any()
    np.testing.assert_array_equal(np.asarray(noised.weight_BxMxL) > 0, masked)
    t = -np.expm1(-sigma[:, 0, 0]) / 0.8
    for v in range(LETTERS):
        np.testing.assert_allclose(masked[:, :, v].mean(), np.mean(0.8 * t**W[v]), atol=0.02)
        high = t > 0.7
        np.testing.assert_allclose(masked[high, :, v].mean(), np.mean(0.8 * t[high]**W[v]), atol=0.03)


@pytest.mark.parametrize("make, words", [
    (lambda: genmd4(0), "diffusion.block_size is 0"),
    (lambda: genmd4(power=0.0), "diffusion.power is 0.0"),
    (lambda: genmd4(eps=0.5), "diffusion.eps is 0.5"),
    (lambda: genmd4().corrupt(jax.random.key(0), np.zeros((1, 2)), np.ones((1, 2)), 1, 2, 0, learned_params(W)),
     "noise_samples is 1, diffusion.kind='genmd4' needs an even number"),
    (lambda: make_lm(genmd4(4)).nll(make_ids(1, 4), estimator="native"), "estimator 'native'.* use exact_count"),
    (lambda: toy_config(Path("unused"), {"diffusion": {"kind": "genmd4", "block_size": 4, "power": 1.0, "eps": 0.0}}),
     "train.noise_samples=1 is no multiple of 2: diffusion.kind='genmd4'"),
])
def test_bad_settings(make, words):
    with pytest.raises(UserError, match=words):
        make()
