"""Priority masks against draws enumerated token by token, the bound they promise and the rate they keep."""

import collections
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.priority import Priority, PriorityUniforms, dense_count_probability, rates

MASK, END = 99, 0
ROWS, VIEWS, SIZE, LENGTH = 256, 2, 4, 64  # one shape, so that each objective compiles once
PLAIN = dict(block_size=SIZE, form="exact_count", weight=2.0, hard=False, complement=False, importance=False,
             rate_low=1e-3, rate_high=1.0)
VARIANTS = {
    "soft": {},
    "less": dict(weight=0.25),
    "hard": dict(hard=True),
    "pairs": dict(complement=True),
    "importance": dict(importance=True, weight=3.0),
    "importance_pairs": dict(importance=True, complement=True),
    "bernoulli": dict(form="bernoulli"),
    "bernoulli_hard": dict(form="bernoulli", hard=True),
    "bernoulli_pairs": dict(form="bernoulli", complement=True, rate_low=0.1, rate_high=0.8),
    "band": dict(rate_low=0.4, rate_high=0.8),
}

corrupt = jax.jit(Priority.corrupt, static_argnums=(0, 4, 5, 6))
dense_law = jax.jit(dense_count_probability, static_argnums=(4, 5))
corrupt_masked = jax.jit(Masked.corrupt, static_argnums=(0, 4, 5, 6))


def objective(**changes):
    return Priority(**PLAIN | changes)


def toy(tags, n):
    """Rows of blocks with these densities, of which the first n tokens are real."""
    segment_BxL = np.tile(np.arange(SIZE) < n, (ROWS, LENGTH // SIZE)).astype(np.int32)
    return np.zeros_like(segment_BxL), segment_BxL, np.tile(np.float32(tags), (ROWS, LENGTH // SIZE))


def draw_toy(model, seed, tags, n):
    x0, segment, density = toy(tags, n)
    return corrupt(model, jax.random.key(seed), x0, segment, VIEWS, MASK, END, density)


def batch():
    """Random ids and tags; the first rows end in 0, 1, 2, ... 64 padding tokens."""
    rng = np.random.default_rng(0)
    x0_BxL = rng.integers(0, MASK, (ROWS, LENGTH), np.int32)
    segment_BxL = (np.arange(LENGTH) < LENGTH - np.arange(ROWS)[:, None]).astype(np.int32)
    segment_BxL[LENGTH + 1:] = 1
    return x0_BxL, segment_BxL, (rng.random((ROWS, LENGTH)) < 0.3).astype(np.float32)


def mask_law(tags, n, k, weight):
    """{mask: probability} of k tokens drawn one by one, by enumeration of the orders."""
    law = collections.Counter()
    for order in itertools.permutations(range(n), k):
        chance, left = 1.0, set(range(n))
        for token in order:
            rates_left = {i: 1 + (weight - 1) * tags[i] for i in left}
            chance *= rates_left[token] / sum(rates_left.values())
            left.remove(token)
        law[frozenset(order)] += chance
    return law


def masks_of(noised, view):
    return [frozenset(np.flatnonzero(block)) for block in
            (np.asarray(noised.xt_BxMxL)[:, view] == MASK).reshape(-1, SIZE)]


@pytest.mark.parametrize("weight", [2.0, 0.3, 1.0, 20.0])
def test_dense_counts_are_those_of_sequential_draws(weight):
    for n, dense in ((5, 2), (5, 5), (4, 1), (3, 0)):
        tags = [1] * dense + [0] * (n - dense)
        for k in range(1, n + 1):
            expected = collections.Counter()
            for mask, chance in mask_law(tags, n, k, weight).items():
                expected[sum(tags[i] for i in mask)] += chance
            found = dense_law(jnp.arange(6), *(jnp.full(6, x) for x in (k, dense, n - dense)), weight, 6)
            np.testing.assert_allclose(found, [expected[i] for i in range(6)], atol=1e-6)


def test_without_a_weight_dense_counts_are_hypergeometric():
    a = jnp.arange(13)
    found = dense_law(a, *(jnp.full(13, x) for x in (20, 12, 20)), 1.0, 32)
    np.testing.assert_allclose(found, stats.hypergeom(32, 12, 20).pmf(np.arange(13)), rtol=1e-5)


@pytest.mark.parametrize("name, n", [("soft", 4), ("soft", 3), ("less", 4), ("importance_pairs", 4)])
def test_masks_follow_sequential_draws(name, n):
    model, tags = objective(**VARIANTS[name]), [1, 0, 0, 1]
    seen = collections.Counter()
    for seed in range(6):
        seen.update(masks_of(draw_toy(model, seed, tags, n), 0))
    for k in range(1, n):
        law = mask_law(tags, n, k, model.weight)
        found = [seen[mask] for mask in law]
        assert sum(found) == sum(count for mask, count in seen.items() if len(mask) == k) > 2000
        assert stats.chisquare(found, sum(found) * np.array(list(law.values()))).pvalue > 1e-4


def test_densities_between_0_and_1():
    """One token of a block is masked in proportion to 1 + (w - 1) C."""
    tags = np.array([0.0, 0.25, 0.5, 1.0])
    masks = [mask for seed in range(6) for mask in masks_of(draw_toy(objective(weight=5.0), seed, tags, 4), 0)]
    found = [masks.count(frozenset([i])) for i in range(4)]
    weight = 1 + 4 * tags
    assert stats.chisquare(found, sum(found) * weight / weight.sum()).pvalue > 1e-4


@pytest.mark.parametrize("n", [4, 3, 1])
@pytest.mark.parametrize("tags", [(1, 0, 0, 1), (0, 1, 0, 0)])
@pytest.mark.parametrize("name", ["importance", "importance_pairs"])
def test_importance_weights_restore_the_bound(name, tags, n):
    """Sum over all masks of P(M) weight(M) loss(M), P by enumeration of draws, loss a random table."""
    model = objective(**VARIANTS[name])
    rng = np.random.default_rng(7)
    table = {frozenset(m): rng.exponential(2.0, n).cumsum()[len(m) - 1] for k in range(1, n + 1)
             for m in itertools.combinations(range(n), k)}
    bound = sum(loss / len(m) / math.comb(n, len(m)) for m, loss in table.items())
    weights = [{}, {}]
    for seed in range(3):
        noised = draw_toy(model, seed, tags, n)
        for view in range(2):
            numbers = np.asarray(noised.weight_BxMxL)[:, view].reshape(-1, SIZE).max(1)
            for mask, number in zip(masks_of(noised, view), numbers):
                assert weights[view].setdefault(mask, number) == pytest.approx(number, rel=1e-6)
    mean = 0.0
    for k in range(1, n + 1):
        for mask, chance in mask_law(tags, n, k, model.weight).items():
            chance /= n
            first = weights[0][mask] * table[mask]
            left = frozenset(range(n)) - mask
            pair = (first + (weights[1][left] * table[left] if left else 0.0)) / 2
            mean += chance * (pair if model.complement else first)
    assert mean == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(complement=True)])
def test_weight_1_is_the_uniform_mask(changes):
    """The same law and the same loss weights as masked diffusion, with or without importance weights."""
    plain = dataclasses.replace(Masked.uniform_counts(SIZE), **changes)
    x0, segment, _ = toy([0, 1, 1, 0], 4)
    reference = corrupt_masked(plain, jax.random.key(1), x0, segment, VIEWS, MASK, END)
    for importance in (False, True):
        noised = draw_toy(objective(weight=1.0, importance=importance, **changes), 0, [0, 1, 1, 0], 4)
        tables = []
        for one in (reference, noised):
            mask = np.asarray(one.weight_BxMxL[:, 0] > 0).reshape(-1, SIZE)
            tables.append(np.bincount(mask @ 2 ** np.arange(SIZE), minlength=16))
            weight = np.asarray(one.weight_BxMxL)[:, 0].reshape(-1, SIZE).max(1)
            full = 2 if changes else 1  # the complement of a full mask is empty: pi(0) = 0
            np.testing.assert_allclose(weight, np.where(mask.all(1), full, SIZE / mask.sum(1)), rtol=1e-5)
        ways = [math.comb(4, bin(i).count("1")) for i in range(1, 16)]
        expected = ROWS * LENGTH / SIZE / 4 / np.array(ways)
        for table in tables:
            assert stats.chisquare(table[1:], expected).pvalue > 1e-4


@pytest.mark.parametrize("name", ["soft", "hard", "importance_pairs", "bernoulli", "bernoulli_hard"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_equal_densities_are_uniform_masks(name, density):
    model = objective(**VARIANTS[name])
    uniform = dataclasses.replace(model, weight=1.0, hard=False)
    x0, segment, tags = batch()
    one, other = (corrupt(x, jax.random.key(3), x0, segment, VIEWS, MASK, END, np.full_like(tags, density))
                  for x in (model, uniform))
    differ = np.mean(np.asarray(one.xt_BxMxL) != np.asarray(other.xt_BxMxL))
    assert differ < 1e-3  # but for the rounding of the keys
    same = np.asarray((one.weight_BxMxL > 0) & (other.weight_BxMxL > 0))
    np.testing.assert_allclose(np.asarray(one.weight_BxMxL)[same], np.asarray(other.weight_BxMxL)[same], rtol=1e-5)


@pytest.mark.parametrize("form", ["exact_count", "bernoulli"])
def test_hard_is_the_limit_of_soft(form):
    x0, segment, tags = batch()
    hard, soft = (corrupt(objective(form=form, **changes), jax.random.key(4), x0, segment, VIEWS, MASK, END, tags)
                  for changes in (dict(hard=True), dict(weight=1e7)))
    np.testing.assert_array_equal(hard.xt_BxMxL, soft.xt_BxMxL)
    np.testing.assert_allclose(hard.weight_BxMxL, soft.weight_BxMxL, rtol=1e-6)


def test_hard_masks_take_dense_tokens_first():
    x0, segment, tags = batch()
    noised = corrupt(objective(hard=True), jax.random.key(5), x0, segment, VIEWS, MASK, END, tags)
    masked = (np.asarray(noised.xt_BxMxL) == MASK).reshape(ROWS, VIEWS, -1, SIZE)
    dense = np.broadcast_to((tags * segment)[:, None] > 0, noised.xt_BxMxL.shape).reshape(masked.shape)
    np.testing.assert_array_equal((masked & dense).sum(-1), np.minimum(masked.sum(-1), dense.sum(-1)))


@pytest.mark.parametrize("weight", [1.0, 2.0, 5.0, 0.1, math.inf])
def test_rates_keep_the_overall_rate(weight):
    rate, dense = (x.ravel() for x in np.meshgrid(np.linspace(1e-3, 1, 60), np.arange(33) / 32))
    low, high = (np.asarray(x, np.float64) for x in rates(jnp.float32(rate), jnp.float32(dense), weight))
    np.testing.assert_allclose((1 - dense) * low + dense * high, rate, atol=1e-6)
    some, other = dense > 0, dense < 1
    assert (low[other] >= -1e-7).all() and (low[other] <= 1 + 1e-6).all()
    assert (high[some] >= -1e-7).all() and (high[some] <= 1 + 1e-6).all()
    both = some & other
    if math.isinf(weight):
        assert (np.isclose(low, 0, atol=1e-6) | np.isclose(high, 1, atol=1e-6))[both].all()
    else:
        ratio = np.isclose(high, weight * low, rtol=1e-5)
        assert (ratio | np.isclose(high, 1, atol=1e-6) | np.isclose(low, 1, atol=1e-6))[both].all()
        assert ratio[both].any()


def test_rates_by_hand():
    """w = 2, d = 1/4, r = 1/2: 0.4 and 0.8; hard: 1/3 and 1."""
    masked = {}
    for name, changes in (("soft", {}), ("hard", dict(hard=True))):
        model = objective(form="bernoulli", rate_low=0.5, rate_high=0.5 + 1e-6, **changes)
        noised = draw_toy(model, 0, [0, 0, 1, 0], 4)
        masked[name] = (np.asarray(noised.xt_BxMxL) == MASK).reshape(-1, SIZE).sum(0)
    draws = ROWS * VIEWS * LENGTH // SIZE
    for found, p in zip(masked["soft"], (0.4, 0.4, 0.8, 0.4)):
        assert abs(found - p * draws) < 4.5 * math.sqrt(p * (1 - p) * draws)
    assert masked["hard"][2] == draws and abs(masked["hard"][0] - draws / 3) < 4.5 * math.sqrt(draws * 2 / 9)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_masked(name):
    x0, segment, tags = batch()
    model = objective(**VARIANTS[name])
    for seed in range(8):
        noised = corrupt(model, jax.random.key(seed), x0, segment, VIEWS, MASK, END, tags)
        masked, weight = np.asarray(noised.xt_BxMxL) == MASK, np.asarray(noised.weight_BxMxL)
        np.testing.assert_array_equal(masked, weight > 0)
        np.testing.assert_array_equal(noised.xt_BxMxL, np.where(masked, MASK, x0[:, None]))
        assert not (masked & (segment[:, None] == 0)).any()
        assert np.isfinite(weight).all() and np.isfinite(noised.sigma_BxMxK).all() and np.min(noised.sigma_BxMxK) >= 0
        assert masked.sum(-1).max() <= noised.capacity <= LENGTH
        if model.complement:
            np.testing.assert_array_equal(masked[:, 0] ^ masked[:, 1], segment == 1)
            assert not (masked[:, 0] & masked[:, 1]).any()
        if name in ("soft", "hard", "importance"):
            counts = masked.reshape(-1, SIZE).sum(1)
            weights = weight.reshape(-1, SIZE).max(1)
            full = np.repeat(segment.reshape(ROWS, 1, -1, SIZE).all(-1), VIEWS, axis=1).ravel()
            assert set(counts[full]) == {1, 2, 3, 4}
            if not model.importance:
                np.testing.assert_allclose(weights[full], 4 / counts[full], rtol=1e-6)


def test_the_count_follows_the_rates():
    noised = draw_toy(objective(rate_low=0.4, rate_high=0.8), 0, [1, 0, 0, 0], 4)
    assert {len(mask) for mask in masks_of(noised, 0)} == {2, 3}
    assert noised.capacity == 40  # 16 blocks, 2.5 tokens each


@pytest.mark.parametrize("view, changes", [(0, dict(hard=True)), (1, dict(complement=True))])
def test_level_given_the_count_does_not_depend_on_the_mask(view, changes):
    noised = draw_toy(objective(**changes), 5, [1, 0, 0, 1], 4)
    masked = (np.asarray(noised.xt_BxMxL)[:, view] == MASK).reshape(-1, SIZE)
    prob = -np.expm1(-np.asarray(noised.sigma_BxMxK)[:, view].ravel())
    for k in range(1, 5 - view):
        inside = masked.sum(1) == k
        assert stats.kstest(prob[inside], stats.beta(k, 5 - k).cdf).pvalue > 1e-3
    two = masked.sum(1) == 2
    if view:
        assert stats.ks_2samp(prob[two & masked[:, 0]], prob[two & ~masked[:, 0]]).pvalue > 1e-3


def test_one_draw_does_not_depend_on_other_rows():
    x0, segment, tags = batch()
    rng = np.random.default_rng(0)
    uniforms = PriorityUniforms(*(jnp.asarray(rng.random((ROWS, 1, n)), jnp.float32) for n in (16, LENGTH, LENGTH)))
    draw = jax.jit(Priority.corrupt_with, static_argnums=(0, 5))
    first = np.arange(ROWS)[:, None] < 3
    one = draw(objective(importance=True), uniforms, x0, segment, tags, MASK)
    other = draw(objective(importance=True), uniforms, x0, np.where(first, segment, 0), np.where(first, tags, 0), MASK)
    np.testing.assert_array_equal(one.xt_BxMxL[:3], other.xt_BxMxL[:3])
    np.testing.assert_array_equal(one.weight_BxMxL[:3], other.weight_BxMxL[:3])


def test_only_importance_weights_are_a_bound():
    assert {name for name, changes in VARIANTS.items() if objective(**changes).is_bound} == {
        "importance", "importance_pairs"}


@pytest.mark.parametrize("changes, words", [
    (dict(block_size=0), "diffusion.block_size is 0, expected at least 1"),
    (dict(form="gumbel"), "diffusion.form is 'gumbel', expected one of 'exact_count', 'bernoulli'"),
    (dict(weight=0.0), "diffusion.weight is 0.0, expected a positive number"),
    (dict(weight=math.inf), "diffusion.hard=True is its limit"),
    (dict(rate_low=0.0), "diffusion.rate_low=0.0 and diffusion.rate_high=1.0: expected 0 < rate_low"),
    (dict(rate_high=1.2), "diffusion.rate_high=1.2"),
    (dict(rate_low=0.6, rate_high=0.5), "diffusion.rate_low=0.6"),
    (dict(importance=True, hard=True), "diffusion.importance=True does not go with diffusion.hard=True"),
    (dict(importance=True, form="bernoulli"), "diffusion.importance=True needs diffusion.form='exact_count'"),
    (dict(importance=True, rate_low=0.5), "diffusion.importance=True needs every number of masked tokens"),
])
def test_bad_hyperparameters(changes, words):
    with pytest.raises(UserError) as error:
        objective(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_shapes():
    x0, segment, tags = batch()
    key = jax.random.key(0)
    with pytest.raises(UserError, match="length 64 is not a multiple of diffusion.block_size=5"):
        objective(block_size=5).corrupt(key, x0, segment, 2, MASK, END, tags)
    with pytest.raises(UserError, match="noise_samples is 3, diffusion.complement needs an even number"):
        objective(complement=True).corrupt(key, x0, segment, 3, MASK, END, tags)
    with pytest.raises(UserError, match=r"density has shape \(256, 63\), expected one number a token, \(256, 64\)"):
        objective().corrupt(key, x0, segment, 2, MASK, END, tags[:, 1:])
