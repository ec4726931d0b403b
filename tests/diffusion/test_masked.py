"""The masked objective against enumeration of every mask of a block, published losses and the laws it promises."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from scipy import integrate, stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import Masked, cross_entropy_subs
from bd3lm_jax.diffusion.schedule import get_schedule

MASK, END = 99, 0
ROWS, VIEWS, LENGTH = 256, 2, 64  # one shape, so that each objective compiles once
PLAIN = dataclasses.asdict(Masked.uniform_counts(4))
VARIANTS = {
    "exact_count": {},
    "exact_count_shaped": dict(count_probs=(0.1, 0.2, 0.4, 0.3)),
    "exact_complement": dict(complement=True),
    "exact_complement_shaped": dict(complement=True, count_probs=(0.1, 0.2, 0.4, 0.3)),
    "bernoulli": dict(corruption="bernoulli"),
    "bernoulli_cosine": dict(corruption="bernoulli", schedule="cosine"),
    "clipped": dict(corruption="bernoulli", clip_low=0.45, clip_high=0.95),
    "clipped_square": dict(corruption="bernoulli", clip_low=0.3, clip_high=0.8, schedule="square"),
}


corrupt = jax.jit(Masked.corrupt, static_argnums=(0, 4, 5, 6))


def objective(**changes):
    return Masked(**{**PLAIN, **changes})


def noised_toy(model, seed, n):
    """A batch in which only the first n tokens of every block of 4 are real."""
    segment_BxL = np.tile(np.arange(4) < n, (ROWS, LENGTH // 4)).astype(np.int32)
    return corrupt(model, jax.random.key(seed), np.zeros_like(segment_BxL), segment_BxL, VIEWS, MASK, END)


def batch():
    """Random ids; the first rows end in 0, 1, 2, ... 64 padding tokens."""
    x0_BxL = np.random.default_rng(0).integers(0, MASK, (ROWS, LENGTH), np.int32)
    segment_BxL = (np.arange(LENGTH) < LENGTH - np.arange(ROWS)[:, None]).astype(np.int32)
    segment_BxL[LENGTH + 1:] = 1
    return x0_BxL, segment_BxL


# The toy: a table of cross-entropies for every set of masked tokens of a block of 4, the last 4 - n being padding.

TABLE_PxS = np.random.default_rng(7).exponential(2.0, (16, 4)) * (1 + np.arange(16)[:, None] / 8)


def pattern_loss(n, count):
    """Mean over the subsets of `count` of the first n tokens of the summed cross-entropy of the masked tokens."""
    subsets = itertools.combinations(range(n), count)
    return np.mean([TABLE_PxS[sum(2**i for i in subset), list(subset)].sum() for subset in subsets])


def integrated_bound(n, low, high):
    """The integral over mask probabilities p of (1/p) E[summed cross-entropy of the masked tokens]."""
    def integrand(p):
        return sum(math.comb(n, k) * p**k * (1 - p)**(n - k) * pattern_loss(n, k) for k in range(1, n + 1)) / p
    return integrate.quad(integrand, low, high, epsabs=1e-10)[0]


def clipped_loss(n, schedule, low, high):
    """The mean over times between two mask probabilities of weight * E[loss | fraction masked inside]."""
    schedule = get_schedule(schedule)
    times = schedule.inverse(low) + (schedule.inverse(high) - schedule.inverse(low)) * (np.arange(400) + 0.5) / 400
    terms = []
    for p, weight in zip(np.asarray(schedule.mask_prob(times)), np.asarray(schedule.weight(times))):
        law = {k: math.comb(n, k) * p**k * (1 - p)**(n - k) for k in range(n + 1) if low * n <= k <= high * n}
        law = law or {max(1, math.floor(p * n + 0.5)): 1.0}
        terms.append(weight * sum(law[k] * pattern_loss(n, k) for k in law if k) / sum(law.values()))
    return np.mean(terms)


def estimates(model, n):
    """Independent estimates of the toy's loss a block, each the mean of a stratified batch."""
    means = []
    for seed in range(20):
        noised = noised_toy(model, seed, n)
        pattern = (np.asarray(noised.xt_BxMxL).reshape(-1, 4) == MASK) @ 2 ** np.arange(4)
        means.append((np.asarray(noised.weight_BxMxL).reshape(-1, 4) * TABLE_PxS[pattern]).sum(-1).mean())
    return np.array(means)


def expected_loss(name, n):
    model = objective(**VARIANTS[name])
    if name.startswith("exact"):
        return integrated_bound(n, 0, 1)
    if name.startswith("bernoulli"):
        return integrated_bound(n, model.eps, 1)
    return clipped_loss(n, model.schedule, model.clip_low, model.clip_high)


@pytest.mark.parametrize("n", [4, 3, 1])
@pytest.mark.parametrize("name", VARIANTS)
def test_mean_is_the_enumerated_loss(name, n):
    draws = estimates(objective(**VARIANTS[name]), n)
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    assert abs(draws.mean() - expected_loss(name, n)) < 4 * error + 1e-4
    assert error < 0.01 * draws.mean()


def test_exact_count_varies_less_than_bernoulli():
    assert estimates(objective(), 4).var() < 0.3 * estimates(objective(corruption="bernoulli"), 4).var()


def test_only_unbiased_losses_are_bounds():
    bounds = {name for name, changes in VARIANTS.items() if objective(**changes).is_bound}
    assert bounds == {name for name in VARIANTS if name.startswith("exact")}
    assert not objective(count_probs=(0.0, 0.5, 0.5, 0.0)).is_bound  # counts that never occur are missing


def test_bound_by_counts_is_the_bound_by_levels():
    """The identity behind exact counts: integrating the level out of the NELBO leaves 1 / k."""
    assert sum(pattern_loss(4, k) / k for k in range(1, 5)) == pytest.approx(integrated_bound(4, 0, 1), abs=1e-8)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_masked(name):
    x0_BxL, segment_BxL = batch()
    model = objective(**VARIANTS[name])
    noised = corrupt(model, jax.random.key(0), x0_BxL, segment_BxL, VIEWS, MASK, END)
    xt, weight = np.asarray(noised.xt_BxMxL), np.asarray(noised.weight_BxMxL)
    assert xt.shape == weight.shape == (256, 2, 64) and noised.sigma_BxMxK.shape == (256, 2, 16)
    assert xt.dtype == np.int32 and weight.dtype == noised.sigma_BxMxK.dtype == np.float32
    np.testing.assert_array_equal(xt, np.where(weight > 0, MASK, x0_BxL[:, None]))
    assert not weight[np.broadcast_to(segment_BxL[:, None] == 0, weight.shape)].any()
    assert np.isfinite(weight).all() and np.isfinite(noised.sigma_BxMxK).all() and np.min(noised.sigma_BxMxK) >= 0
    assert (weight > 0).any() and (xt[:, 0] != xt[:, 1]).any()  # copies have their own noise


@pytest.mark.parametrize("name", VARIANTS)
def test_capacity_is_never_exceeded(name):
    x0_BxL, segment_BxL = batch()
    model = objective(**VARIANTS[name])
    noised = [corrupt(model, jax.random.key(seed), x0_BxL, segment_BxL, VIEWS, MASK, END) for seed in range(20)]
    totals = np.array([(np.asarray(draw.weight_BxMxL) > 0).sum(-1) for draw in noised])
    capacity = noised[0].capacity
    assert totals.max() <= capacity <= 64
    if name.startswith("exact"):
        assert totals.max() == capacity and np.ptp(totals[:, 65:], axis=(0, 1)).max() <= 3  # full rows: within S - 1
    if name.startswith("clipped"):
        assert capacity == 48


def test_capacity_of_long_rows_of_uniform_counts_is_the_mean():
    x0_BxL = np.zeros((2, 512), int)
    noised = jax.eval_shape(lambda key: objective().corrupt(key, x0_BxL, x0_BxL + 1, 1, MASK, END), jax.random.key(0))
    assert noised.capacity == 128 * 5 / 2


@pytest.mark.parametrize("name", ["exact_complement", "exact_complement_shaped"])
def test_complement_masks_what_was_left(name):
    x0_BxL, segment_BxL = batch()
    noised = corrupt(objective(**VARIANTS[name]), jax.random.key(0), x0_BxL, segment_BxL, 4, MASK, END)
    masked = np.asarray(noised.xt_BxMxL) == MASK
    np.testing.assert_array_equal(masked[:, 0] ^ masked[:, 1], segment_BxL == 1)
    np.testing.assert_array_equal(masked[:, 2] ^ masked[:, 3], segment_BxL == 1)
    assert (masked[:, 0] != masked[:, 2]).any() and not (masked[:, 0] & masked[:, 1]).any()


@pytest.mark.parametrize("probs", [(1.0, 1.0, 1.0, 1.0), (0.5, 0.0, 0.0, 0.5), (0.05, 0.05, 0.1, 0.8)])
def test_padded_rows_leave_no_more_than_the_capacity(probs):
    """Fewer maskable tokens change the law of the count; what is left must still fit."""
    model = objective(complement=True, count_probs=probs)
    for n in (4, 3, 2, 1):
        noised = noised_toy(model, n, n)
        assert (np.asarray(noised.weight_BxMxL) > 0).sum(-1).max() <= noised.capacity <= LENGTH


@pytest.mark.parametrize("view, changes", [(0, {}), (1, dict(complement=True))])
@pytest.mark.parametrize("n", [4, 3])
def test_level_given_the_count(n, view, changes):
    """A network that sees the level gets one with the posterior law given the count: Beta(k, n - k + 1)."""
    noised = noised_toy(objective(**changes), 5, n)
    count = np.asarray(noised.weight_BxMxL > 0)[:, view].reshape(-1, 4).sum(-1)
    prob = -np.expm1(-np.asarray(noised.sigma_BxMxK)[:, view].ravel())
    for k in range(1, n + 1 - view):
        assert (count == k).sum() > 500
        assert stats.kstest(prob[count == k], stats.beta(k, n - k + 1).cdf).pvalue > 1e-3


def test_level_does_not_tell_which_tokens_are_masked():
    noised = noised_toy(objective(), 6, 4)
    masked = np.asarray(noised.weight_BxMxL > 0).reshape(-1, 4)
    sigma = np.asarray(noised.sigma_BxMxK).ravel()
    two = masked.sum(-1) == 2
    for token in range(4):
        assert stats.ks_2samp(sigma[two & masked[:, token]], sigma[two & ~masked[:, token]]).pvalue > 1e-3


@pytest.mark.parametrize("name, low, high", [("bernoulli", 1e-3, 1), ("bernoulli_cosine", 1e-3, 1),
                                             ("clipped", 0.45, 0.95), ("clipped_square", 0.3, 0.8)])
def test_levels_and_weights_of_bernoulli(name, low, high):
    model = objective(**VARIANTS[name])
    schedule = get_schedule(model.schedule)
    noised = noised_toy(model, 7, 4)
    prob_N = -np.expm1(-np.asarray(noised.sigma_BxMxK, np.float64)).ravel()
    assert low - 1e-6 <= prob_N.min() and prob_N.max() <= high + 1e-6
    t_N, t_low, t_high = (np.asarray(schedule.inverse(p), np.float64) for p in (prob_N, low, high))
    u_N = (t_N - t_low) / (t_high - t_low)
    strata_N = (np.arange(u_N.size) + 0.5) / u_N.size
    np.testing.assert_allclose(np.sort(u_N), strata_N, atol=1e-3)  # one in each, over the whole batch
    factor = 1 if model.clip_low else 1 - t_low
    weight_NxS = np.asarray(noised.weight_BxMxL).reshape(-1, 4)
    expected_NxS = np.where(weight_NxS > 0, factor * np.asarray(schedule.weight(t_N))[:, None], 0)
    np.testing.assert_allclose(weight_NxS, expected_NxS, rtol=1e-4)


def test_whole_sequence_as_one_block():
    x0_BxL, segment_BxL = batch()
    noised = corrupt(objective(block_size=LENGTH), jax.random.key(8), x0_BxL, segment_BxL, VIEWS, MASK, END)
    weight = np.asarray(noised.weight_BxMxL)[:, 0]
    n, count = segment_BxL.sum(1), (weight > 0).sum(1)
    np.testing.assert_allclose(weight.sum(1), n, rtol=1e-6)  # k tokens of weight 1 / (k / n)
    assert noised.capacity == LENGTH and len(set(count)) > 30


def test_single_token_blocks_are_always_masked():
    x0_BxL, segment_BxL = batch()
    noised = corrupt(objective(block_size=1), jax.random.key(9), x0_BxL, segment_BxL, VIEWS, MASK, END)
    np.testing.assert_array_equal(noised.weight_BxMxL[:, 1], segment_BxL)


def test_subs_published_log_probs():
    golden = np.load(GOLDEN / "primitives.npz")
    masked = golden["xt"] == golden["mask_id"]
    logits_NxV, log_probs_NxV = golden["logits"][masked], golden["subs/log_probs"][masked]
    for token in range(int(golden["mask_id"])):
        ce_N = cross_entropy_subs(logits_NxV, np.full(len(logits_NxV), token), int(golden["mask_id"]))
        np.testing.assert_allclose(-np.asarray(ce_N), log_probs_NxV[:, token], atol=2e-5)


@pytest.mark.parametrize("folder", ["bd3lm_block4", "bd3lm_time_conditioned", "bd3lm_block32_is_mdlm"])
def test_published_token_loss(folder):
    golden = np.load(GOLDEN / folder / "io.npz")
    mask_id, vocabulary = int(golden["mask_id"]), golden["logits"].shape[-1]
    ce_N = cross_entropy_subs(golden["logits"].reshape(-1, vocabulary), golden["x0"].ravel(), mask_id)
    weight_N = np.where(golden["xt"] == mask_id, get_schedule("loglinear").weight(golden["t"]), 0).ravel()
    np.testing.assert_allclose(weight_N * np.asarray(ce_N), golden["token_loss"].ravel(), rtol=2e-5, atol=2e-5)


def test_cross_entropy_without_a_mask_token():
    logits_NxV, target_N = np.random.default_rng(3).normal(size=(5, 7)), np.array([0, 6, 3, 3, 1])
    probs_NxV = np.exp(logits_NxV) / np.exp(logits_NxV).sum(1, keepdims=True)
    ce_N = cross_entropy_subs(jnp.asarray(logits_NxV, jnp.float32), target_N, -1)
    np.testing.assert_allclose(ce_N, -np.log(probs_NxV[np.arange(5), target_N]), rtol=1e-5)


def test_mask_logit_has_no_gradient_and_a_masked_target_is_finite():
    logits_NxV = jnp.asarray(np.random.default_rng(4).normal(size=(3, 7)), jnp.bfloat16)
    ce_N, pullback = jax.vjp(lambda logits: cross_entropy_subs(logits, jnp.array([1, 2, 0]), 5), logits_NxV)
    (gradient_NxV,) = pullback(jnp.ones_like(ce_N))
    assert ce_N.dtype == jnp.float32 and not gradient_NxV[:, 5].any() and gradient_NxV[:, 4].all()
    assert np.isfinite(cross_entropy_subs(logits_NxV, jnp.array([5, 5, 5]), 5)).all()


@pytest.mark.parametrize("changes, words", [
    (dict(block_size=0), "diffusion.block_size is 0, expected at least 1"),
    (dict(schedule="loglinaer"), "diffusion.schedule 'loglinaer': did you mean 'loglinear'"),
    (dict(corruption="gaussian"), "diffusion.corruption is 'gaussian', expected 'exact_count' or 'bernoulli'"),
    (dict(eps=0.0), "diffusion.eps is 0.0"),
    (dict(eps=float("nan")), "diffusion.eps is nan"),
    (dict(corruption="bernoulli", clip_low=0.6, clip_high=0.5), "diffusion.clip_low=0.6 and diffusion.clip_high=0.5"),
    (dict(corruption="bernoulli", clip_low=-0.1), "diffusion.clip_low=-0.1"),
    (dict(corruption="bernoulli", clip_high=1.5), "diffusion.clip_high=1.5"),
    (dict(corruption="bernoulli", clip_high=0.1, eps=0.2), "diffusion.eps is 0.2, expected below"),
    (dict(clip_low=0.3, clip_high=0.8), "no effect with diffusion.corruption='exact_count'"),
    (dict(corruption="bernoulli", count_probs=(1.0, 1.0, 1.0, 1.0)), "diffusion.count_probs has no effect"),
    (dict(corruption="bernoulli", complement=True), "diffusion.complement has no effect"),
    (dict(count_probs=(1.0, 2.0)), "diffusion.count_probs has 2 numbers, expected diffusion.block_size=4"),
    (dict(count_probs=(1.0, -2.0, 1.0, 1.0)), "diffusion.count_probs is"),
    (dict(count_probs=(0.0, 0.0, 0.0, 0.0)), "not all 0"),
    (dict(count_probs=(1.0, float("nan"), 1.0, 1.0)), "diffusion.count_probs is"),
])
def test_bad_hyperparameters(changes, words):
    with pytest.raises(UserError) as error:
        objective(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_shapes():
    x0_BxL, segment_BxL = batch()
    with pytest.raises(UserError, match="length 64 is not a multiple of diffusion.block_size=5.* 65 tokens"):
        objective(block_size=5).corrupt(jax.random.key(0), x0_BxL, segment_BxL, 1, MASK, END)
    with pytest.raises(UserError, match="noise_samples is 0"):
        objective().corrupt(jax.random.key(0), x0_BxL, segment_BxL, 0, MASK, END)
