"""SEDD against published outputs, its formula in float64, quadrature over the noise level, and MDLM's bound."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from places import GOLDEN
from scipy import integrate
from toy_lm import MASK, make_ids, make_lm

from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import SEDD
from bd3lm_jax.models.forward import DEFAULT_EXECUTION, single_document_rows
from bd3lm_jax.scoring.score import score, total_loss
from configs import tiny

EPS = 1e-3


def sedd(block_size=4, corruption="bernoulli", eps=EPS):
    return SEDD(block_size=block_size, corruption=corruption, eps=eps)


def published_loss(net_V, target, sigma):
    """Score entropy of one masked token in nats, float64, without sigma'; the mask token is the last one."""
    log_s_V = np.asarray(net_V, np.float64) - np.log(np.expm1(sigma)) - np.log(len(net_V) - 1)
    r = 1 / np.expm1(sigma)
    return np.exp(log_s_V[:-1]).sum() - r * log_s_V[target] + r * (np.log(r) - 1)


def our_loss(net_NxV, target_N, mask_id):
    return SEDD.token_loss(jnp.asarray(net_NxV, jnp.float32), jnp.asarray(target_N), None, None, mask_id)


def test_published_checkpoint():
    io = np.load(GOLDEN / "sedd/io.npz")
    masked = io["xt"] == io["mask_id"]
    r = np.broadcast_to(1 / np.expm1(io["sigma"])[:, None], masked.shape)[masked]
    losses = our_loss(io["logits"][masked], io["x0"][masked], int(io["mask_id"]))
    np.testing.assert_allclose(r * losses, io["score_entropy"][masked], rtol=2e-5, atol=2e-5)
    assert not io["score_entropy"][~masked].any()


def test_published_primitive():
    golden = np.load(GOLDEN / "primitives.npz")
    masked = golden["xt"] == golden["mask_id"]
    sigma = np.broadcast_to(golden["sigma"].reshape(-1, 1), masked.shape)[masked]
    losses = our_loss(golden["logits"][masked], golden["x0"][masked], int(golden["mask_id"]))
    np.testing.assert_allclose(losses / np.expm1(sigma), golden["sedd/score_entropy"][masked], rtol=3e-5, atol=2e-5)


def test_formula():
    draw = np.random.default_rng(0)
    net, target, sigma = draw.normal(size=(50, 9)), draw.integers(0, 8, 50), draw.uniform(0.01, 5, 50)
    expected = [published_loss(*row) * np.expm1(row[2]) for row in zip(net, target, sigma)]
    np.testing.assert_allclose(our_loss(net, target, 8), expected, rtol=1e-5, atol=1e-6)


# A block of three tokens, four letters, and a network that is a table: a score for every set of masked tokens.

SIZE, LETTERS = 3, 4
TARGET = np.array([2, 0, 3])
NET = np.random.default_rng(1).normal(size=(2**SIZE, SIZE, LETTERS + 1)) + math.log(LETTERS)


def tied(net):
    """The same network with scores that are probabilities: Z = 1."""
    return net - np.log(np.exp(net[..., :-1]).sum(-1, keepdims=True)) + np.log(LETTERS)


def score_entropy_bound(net, low, high):
    """The integral over the mask probability of sigma' E[score entropy], the formula as published."""
    def integrand(p):  # sigma = -log(1 - p), d sigma = dp / (1 - p)
        sigma, total = -math.log1p(-p), 0.0
        for pattern in range(1, 2**SIZE):
            masked = [i for i in range(SIZE) if pattern >> i & 1]
            chance = p**len(masked) * (1 - p)**(SIZE - len(masked))
            total += chance * sum(published_loss(net[pattern, i], TARGET[i], sigma) for i in masked)
        return total / (1 - p)
    return integrate.quad(integrand, low, high, epsabs=1e-10)[0]


def mdlm_bound(net):
    """By counts: 1/k times the mean over the sets of k tokens of their summed cross-entropy."""
    total = 0.0
    for k in range(1, SIZE + 1):
        sets = list(itertools.combinations(range(SIZE), k))
        for chosen in sets:
            logits = net[sum(2**i for i in chosen)][:, :-1]
            ce = np.log(np.exp(logits).sum(-1)) - logits[range(SIZE), TARGET]
            total += ce[list(chosen)].sum() / k / len(sets)
    return total


def test_bound_is_that_of_mdlm_where_scores_are_tied_to_probabilities():
    assert score_entropy_bound(tied(NET), 0, 1) == pytest.approx(mdlm_bound(NET), abs=1e-5)


def test_bound_is_never_below_that_of_the_normalised_scores():
    for seed in range(5):
        net = np.random.default_rng(seed).normal(size=NET.shape) + math.log(LETTERS)
        assert score_entropy_bound(net, 0, 1) > mdlm_bound(net) + 1e-3


@pytest.mark.parametrize("corruption, low, high", some([
    ("bernoulli", EPS * (1 - EPS), 1 - EPS), ("exact_count", 0, 1)], 0))
def test_mean_of_the_weighted_loss_is_the_integral(corruption, low, high):
    losses = np.zeros((2**SIZE, SIZE))
    for pattern in range(1, 2**SIZE):
        losses[pattern] = our_loss(NET[pattern], TARGET, LETTERS)
    x0 = np.tile(TARGET, (256, 16)).astype(np.int32)
    corrupt = jax.jit(SEDD.corrupt, static_argnums=(0, 4, 5, 6))
    means = []
    for seed in range(20):
        noised = corrupt(sedd(SIZE, corruption), jax.random.key(seed), x0, np.ones_like(x0), 2, LETTERS, 0)
        pattern = (np.asarray(noised.xt_BxMxL).reshape(-1, SIZE) == LETTERS) @ 2**np.arange(SIZE)
        means.append((np.asarray(noised.weight_BxMxL).reshape(-1, SIZE) * losses[pattern]).sum(-1).mean())
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    assert abs(np.mean(means) - score_entropy_bound(NET, low, high)) < 4 * error + 1e-4
    assert error < 0.02 * np.mean(means)


def test_levels_are_the_published_schedule():
    x0 = np.zeros((64, 32), np.int32)
    noised = sedd(8).corrupt(jax.random.key(0), x0, x0 + 1, 1, MASK, 0)
    t = np.sort(np.asarray(1 - np.exp(-np.asarray(noised.sigma_BxMxK, np.float64))).ravel() / (1 - EPS))
    np.testing.assert_allclose(t, EPS + (1 - EPS) * (np.arange(t.size) + 0.5) / t.size, atol=3e-3)
    weight = np.asarray(noised.weight_BxMxL)[:, 0].reshape(64, 4, 8).max(-1)
    t_BxK = (1 - np.exp(-np.asarray(noised.sigma_BxMxK[:, 0], np.float64))) / (1 - EPS)
    some = weight > 0
    np.testing.assert_allclose(weight[some], (1 - EPS) / t_BxK[some], rtol=1e-4)


def test_padding_is_never_masked():
    segment = np.tile(np.arange(12) < 7, (8, 1)).astype(np.int32)
    for corruption in ("bernoulli", "exact_count"):
        noised = sedd(4, corruption).corrupt(jax.random.key(0), segment, segment, 2, MASK, 0)
        assert not np.asarray(noised.weight_BxMxL)[..., 7:].any()
        np.testing.assert_array_equal(np.asarray(noised.xt_BxMxL)[..., 7:], 0)


@pytest.mark.ci_slow
def test_training_loss_is_the_published_formula_on_the_networks_output():
    objective = sedd()
    lm, x0 = make_lm(objective, time_conditioning=True), jnp.asarray(make_ids(3, 8))
    position, segment = single_document_rows(x0)
    noised = objective.corrupt(jax.random.key(2), x0, segment, 1, MASK, -1)
    rows = {"tokens": x0, "positions": position, "segments": segment}
    scored = score(lm.model, lm.params, objective, noised, rows, DEFAULT_EXECUTION)
    total = total_loss(lm.model, lm.params, scored, MASK, 5, objective.loss())
    sigma = np.asarray(noised.sigma_BxMxK[:, 0], np.float64)
    net = np.asarray(lm.logits(noised.xt_BxMxL[:, 0], x0, sigma=sigma))
    expected = 0.0
    for row, place in np.argwhere(np.asarray(noised.xt_BxMxL[:, 0]) == MASK):
        level = sigma[row, place // 4]
        t = -math.expm1(-level) / (1 - EPS)
        slope = (1 - EPS) / (1 - (1 - EPS) * t)  # sigma'(t); times stretch 1 - e of the drawn times
        expected += (1 - EPS) * slope * published_loss(net[row, place], x0[row, place], level)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.ci_slow
def test_likelihoods_of_a_model():
    """Quadrature over the level, with the highest one that the network may see, against both estimators."""
    lm, ids = make_lm(sedd(2, eps=0.2), time_conditioning=True), make_ids(1, 2)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    p = np.concatenate([0.4 + 0.4 * nodes, 0.9 + 0.1 * nodes])  # sigma has a kink at 1 - e
    weights = np.concatenate([0.4 * weights, 0.1 * weights])
    sigma = np.minimum(-np.log1p(-p), -math.log(0.2))
    native = common = 0.0
    for masked in ([0], [1], [0, 1]):
        xt = ids.copy()
        xt[0, masked] = MASK
        net = np.asarray(lm.logits(np.repeat(xt, len(p), 0), np.repeat(ids, len(p), 0), sigma=sigma), np.float64)
        chance = weights * p**(len(masked) - 1) * (1 - p)**(2 - len(masked))
        for i in masked:
            z = np.exp(net[:, i, :-1] - math.log(MASK))
            native += np.sum(chance * (z.sum(-1) - 1 - np.log(z[:, ids[0, i]])))
            common += np.sum(chance * (np.log(z.sum(-1)) - np.log(z[:, ids[0, i]])))
    for estimator, expected in (("native", native), ("exact_count", common)):
        found = lm.nll(ids, estimator=estimator, draws=400)
        half = (found.ci95[1] - found.ci95[0]) / 2
        assert abs(found.mean - expected / 2) < 2 * half and half < 0.05 * found.mean
    assert native > common


def test_needs_sigma():
    for make in (lambda: make_lm(sedd()),
                 lambda: Config.from_dict({**tiny.get_config("algo=sedd").to_dict(),
                                           "model": tiny.get_config().model.to_dict()})):
        with pytest.raises(UserError, match=r"^model.time_conditioning is False: diffusion.kind='sedd' needs the noise "
                                            r"level \(sigma\), use True$"):
            make()


@pytest.mark.parametrize("changes, words", [
    (dict(block_size=0), "diffusion.block_size is 0"),
    (dict(corruption="half"), "diffusion.corruption is 'half'"),
    (dict(eps=0.0), "diffusion.eps is 0.0"),
    (dict(eps=0.5), "diffusion.eps is 0.5"),
])
def test_bad_settings(changes, words):
    with pytest.raises(UserError, match=words):
        sedd(**changes)
