"""Uniform-state diffusion: with exact conditionals the integrated loss is -log p(x), by enumeration and quadrature."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import MASK, make_ids, make_lm

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import SEDDUniform, Uniform

LETTERS, SIZE = 3, 2
IDS = [0, 1, 3]  # ids of the letters; 2 is the mask
JOINT = np.random.default_rng(5).dirichlet(np.full(LETTERS**SIZE, 0.7)).reshape(LETTERS, LETTERS)


def uniform(block_size=SIZE, vocab_size=LETTERS + 1, eps=0.0, kind=Uniform):
    return kind(block_size=block_size, vocab_size=vocab_size, eps=eps)


def noise(alpha):
    """q(z | x) of one token `[LETTERS, LETTERS]`."""
    return alpha * np.eye(LETTERS) + (1 - alpha) / LETTERS


def posteriors(alpha):
    """For every z of two letters, p(x_i | the other letter of z) `[SIZE, LETTERS]`."""
    found = {}
    for z in itertools.product(range(LETTERS), repeat=SIZE):
        p = np.stack([JOINT @ noise(alpha)[:, z[1]], JOINT.T @ noise(alpha)[:, z[0]]])
        found[z] = p / p.sum(1, keepdims=True)
    return found


def logits_of(p_NxK):
    """Logits over four ids, the mask with the largest."""
    logits = np.full((len(p_NxK), LETTERS + 1), 5.0)
    logits[:, IDS] = np.log(p_NxK)
    return jnp.asarray(logits, jnp.float32)


def scores_of(p_NxK, z_N, alpha):
    """Log scores over four ids: log q(y) / q(z) by the conditionals, 0 at the own letter."""
    q = LETTERS * alpha * p_NxK + 1 - alpha
    scores = np.full((len(p_NxK), LETTERS + 1), 5.0)
    scores[:, IDS] = np.log(q / q[np.arange(len(q)), z_N][:, None])
    return jnp.asarray(scores, jnp.float32)


def expected_loss(kind, x, alpha):
    """b E_z of the summed losses of a text x at this alpha, by the network with exact conditionals; b = 1 / alpha."""
    total, table = 0.0, posteriors(alpha)
    p = np.concatenate([table[z] for z in table])
    z = np.array([token for z in table for token in z])
    ids, targets = np.array(IDS)[z], np.tile(np.array(IDS)[list(x)], len(table))
    network = logits_of(p) if kind is Uniform else scores_of(p, z, alpha)
    losses = np.asarray(kind.token_loss(network, jnp.asarray(targets), jnp.asarray(ids),
                                        jnp.full(len(z), -math.log(alpha), jnp.float32), 2), np.float64)
    for number, state in enumerate(table):
        chance = np.prod([noise(alpha)[token, after] for token, after in zip(x, state)])
        total += chance * losses[SIZE * number:SIZE * number + SIZE].sum()
    return total / alpha


@pytest.mark.parametrize("kind", [Uniform, SEDDUniform])
def test_bound_with_exact_conditionals_is_the_likelihood(kind):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u, weights = (nodes + 1) / 2, weights / 2
    for x in [(0, 0), (1, 2), (2, 1)]:
        # t = u^3: the integrand has a logarithm at t = 0.
        total = sum(w * 3 * v**2 * expected_loss(kind, x, 1 - v**3) for v, w in zip(u, weights))
        assert total == pytest.approx(-math.log(JOINT[x]), abs=2e-4)


def closed_form(p_K, x, z, alpha):
    """DUO's negative bound at one token (arXiv 2506.10892), without -alpha' / alpha, float64."""
    q, guess = (LETTERS * alpha * law + 1 - alpha for law in (np.eye(LETTERS)[x], p_K))
    terms = [q[j] / q[z] * math.log(guess[z] * q[j] / (guess[j] * q[z])) for j in range(LETTERS)]
    return -(LETTERS / q[z] - LETTERS / guess[z] - sum(terms)) / LETTERS


def test_published_closed_form():
    draw = np.random.default_rng(0)
    p, x, z = draw.dirichlet(np.ones(LETTERS), 60), draw.integers(0, LETTERS, 60), draw.integers(0, LETTERS, 60)
    alpha = draw.uniform(0.02, 0.98, 60)
    found = Uniform.token_loss(logits_of(p), jnp.asarray(IDS)[x], jnp.asarray(IDS)[z],
                               jnp.asarray(-np.log(alpha), jnp.float32), 2)
    np.testing.assert_allclose(found, [closed_form(*row) for row in zip(p, x, z, alpha)], rtol=1e-4, atol=1e-5)


def test_without_a_mask_token_all_ids_are_letters():
    p = np.random.default_rng(1).dirichlet(np.ones(LETTERS), 5)
    with_mask = Uniform.token_loss(logits_of(p), jnp.asarray([0, 1, 3, 3, 0]), jnp.asarray([0, 3, 3, 1, 1]),
                                   jnp.full(5, 0.4), 2)
    plain = Uniform.token_loss(jnp.asarray(np.log(p), jnp.float32), jnp.asarray([0, 1, 2, 2, 0]),
                               jnp.asarray([0, 2, 2, 1, 1]), jnp.full(5, 0.4), -1)
    np.testing.assert_allclose(with_mask, plain, rtol=1e-5)


@pytest.mark.parametrize("mask_id, letters", [(2, IDS), (3, [0, 1, 2]), (0, [1, 2, 3])])
def test_what_is_drawn(mask_id, letters):
    """Every letter equally likely where a token jumps, never the mask; padding stays; weights and levels belong."""
    x0 = np.full((512, 16), letters[0], np.int32)
    segment = np.tile(np.arange(16) < 15, (512, 1)).astype(np.int32)
    noised = uniform(4, eps=0.1).corrupt(jax.random.key(0), x0, segment, 2, mask_id, 0)
    xt, alpha = np.asarray(noised.xt_BxMxL), np.exp(-np.asarray(noised.sigma_BxMxK, np.float64))
    assert not (xt == mask_id).any() and (xt[..., 15] == letters[0]).all()
    assert not np.asarray(noised.weight_BxMxL)[..., 15].any()
    np.testing.assert_allclose(np.asarray(noised.weight_BxMxL)[..., :3], np.broadcast_to(
        0.8 / alpha[..., :1], (512, 2, 3)), rtol=1e-4)
    assert 0.1 <= alpha.min() + 1e-6 and alpha.max() <= 0.9 + 1e-6
    expected = np.array([(1 + 2 * alpha.mean()) / 3, *[(1 - alpha.mean()) / 3] * 2])
    seen = np.array([(xt[..., :15] == letter).mean() for letter in letters])
    np.testing.assert_allclose(seen, expected, atol=0.01)
    assert np.corrcoef((xt[..., :4] == x0[0, 0]).mean(-1).ravel(), alpha[..., 0].ravel())[0, 1] > 0.5


@pytest.mark.ci_slow
def test_native_is_the_bound_of_a_network():
    """By quadrature over the level and enumeration of the letters: a random network, one block of two tokens."""
    lm = make_lm(Uniform(2, MASK + 1, 1e-3), time_conditioning=True)
    ids = make_ids(1, 2)
    states = np.array(list(itertools.product(range(MASK), repeat=2)), np.int32)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    total = 0.0
    for u, w in zip((nodes + 1) / 2, weights / 2):
        t = u**3
        alpha, sigma = 1 - t, -math.log(1 - t)
        net = lm.logits(states, np.repeat(ids, len(states), 0), sigma=np.full((len(states), 1), sigma))
        losses = np.asarray(Uniform.token_loss(net.reshape(-1, MASK + 1), jnp.asarray(np.tile(ids[0], len(states))),
                                               jnp.asarray(states.ravel()), jnp.full(states.size, sigma), MASK))
        chance = (alpha * (states == ids) + (1 - alpha) / MASK).prod(1)
        total += 3 * u**2 * w / alpha * np.sum(chance * losses.reshape(-1, 2).sum(1))
    found = lm.nll(ids, estimator="native", draws=600)
    half = (found.ci95[1] - found.ci95[0]) / 2
    assert abs(found.mean - total / 2) < 2 * half and half < 0.1 * found.mean


def test_what_needs_masks_is_refused():
    lm = make_lm(Uniform(4, MASK + 1, 1e-3))
    scores = make_lm(SEDDUniform(4, MASK + 1, 1e-3), time_conditioning=True)
    for use, words in [(lambda: lm.generate(length=8, sampler="first_hitting"),
                       "'first_hitting' reveals masks.* kind 'uniform' .* use uniform"),
                       (lambda: scores.generate(length=8, sampler="uniform"),
                        "'uniform' reads probabilities.* kind 'sedd_uniform' .* use uniform_scores"),
                       (lambda: lm.generate(length=8, sampler="uniform_scores"), "needs the log scores .* use uniform"),
                       (lambda: lm.generate(length=8, sampler="uniform", guidance=1.0), "leave constraint, guidance"),
                       (lambda: make_lm().generate(length=8, sampler="uniform"), "redraws letters.* use ancestral"),
                       (lambda: lm.nll(make_ids(1, 4)), "estimator 'exact_count' masks tokens.* use native"),
                       (lambda: lm.score([[1]], [[2]]), "a model of kind 'uniform' predicts no masked tokens")]:
        with pytest.raises(UserError, match=words):
            use()
    assert uniform(eps=1e-3).bound == uniform() and uniform().is_bound and not uniform(eps=1e-3).is_bound


@pytest.mark.parametrize("make, words", [
    (lambda: uniform(block_size=0), "diffusion.block_size is 0"),
    (lambda: uniform(vocab_size=2), "diffusion.vocab_size is 2"),
    (lambda: uniform(eps=0.5), "diffusion.eps is 0.5"),
    (lambda: uniform(vocab_size=-1).corrupt(jax.random.key(0), np.zeros((1, 2)), np.ones((1, 2)), 1, 2, 0),
     "diffusion.vocab_size is -1"),
    (lambda: make_lm(Uniform(4, 7, 0.0)), "diffusion.vocab_size=7 is not model.vocab_size=13"),
    (lambda: make_lm(SEDDUniform(4, -1, 0.0)), "diffusion.kind='sedd_uniform' needs the noise level"),
])
def test_bad_settings(make, words):
    with pytest.raises(UserError, match=words):
        make()
