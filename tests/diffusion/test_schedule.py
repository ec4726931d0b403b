"""Schedules against float64 formulas and published numbers; draws of levels against the definition of a stratum."""

import jax
import numpy as np
import pytest
from places import GOLDEN
from scipy import stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.schedule import MAX_STRATA, get_schedule, stratified_uniform, systematic_uniform

PRIMITIVES = np.load(GOLDEN / "primitives.npz")
MASK_PROB = {  # written from the definitions, in float64
    "loglinear": lambda t: t,
    "cosine": lambda t: 1 - np.cos(np.pi * t / 2),
    "square": lambda t: t**2,
    "square_root": lambda t: np.sqrt(t),
    "logarithmic": lambda t: np.log(1 + t) / np.log(2),
    "sine": lambda t: 1 - (1 - np.cos(np.pi / 2 * (1 - t))),  # MD4's alpha
    "polynomial:3": lambda t: t**3,
    "polynomial:1.5": lambda t: t**1.5,
}
T = np.linspace(0.01, 0.999, 200)


@pytest.mark.parametrize("name", MASK_PROB)
def test_mask_prob_and_weight(name):
    schedule, mask_prob = get_schedule(name), MASK_PROB[name]
    slope = (mask_prob(T + 1e-6) - mask_prob(T - 1e-6)) / 2e-6
    np.testing.assert_allclose(schedule.mask_prob(T), mask_prob(T), atol=1e-6)
    np.testing.assert_allclose(schedule.weight(T), slope / mask_prob(T), rtol=1e-5)


@pytest.mark.parametrize("name", MASK_PROB)
def test_precise_near_zero(name):
    schedule, mask_prob, t = get_schedule(name), MASK_PROB[name], np.float32(1e-4)
    exact_t = np.float64(t)
    slope = (mask_prob(exact_t * 1.001) - mask_prob(exact_t * 0.999)) / (0.002 * exact_t)
    np.testing.assert_allclose(schedule.mask_prob(t), mask_prob(exact_t), rtol=1e-6)
    np.testing.assert_allclose(schedule.weight(t), slope / mask_prob(exact_t), rtol=1e-5)


@pytest.mark.parametrize("name", MASK_PROB)
def test_inverse(name):
    p = np.linspace(1e-3, 1, 100)
    np.testing.assert_allclose(MASK_PROB[name](np.asarray(get_schedule(name).inverse(p), np.float64)), p, rtol=2e-6)


@pytest.mark.parametrize("name, published", [
    ("loglinear", "loglinear"), ("square", "square"), ("square_root", "square_root"), ("logarithmic", "log")])
def test_published_schedules(name, published):
    """The published square schedule holds its mask probability at 1e-3 or more."""
    t, schedule = PRIMITIVES["noise/t"], get_schedule(name)
    mask_prob = np.maximum(schedule.mask_prob(t), 1e-3)
    np.testing.assert_allclose(mask_prob, PRIMITIVES[f"noise/{published}/mask_prob"], atol=2e-5)
    weight = schedule.weight(t) * schedule.mask_prob(t) / mask_prob
    np.testing.assert_allclose(-weight, PRIMITIVES[f"noise/{published}/loss_scale"], rtol=2e-5)
    unclamped = mask_prob > 1e-3
    np.testing.assert_allclose(schedule.weight(t)[unclamped], weight[unclamped], rtol=2e-5)


def test_published_cosine():
    """The published cosine is (1 - e) alpha with e = 1e-3, and adds e once more to the weight's denominator."""
    t, e, schedule = PRIMITIVES["noise/t"], 1e-3, get_schedule("cosine")
    mask_prob = 1 - (1 - e) * (1 - schedule.mask_prob(t))
    np.testing.assert_allclose(mask_prob, PRIMITIVES["noise/cosine/mask_prob"], atol=2e-5)
    loss_scale = -(1 - e) * schedule.weight(t) * schedule.mask_prob(t) / (mask_prob + e)
    # 1 - alpha cancels in float32 near t = 0, in the published code as well: 1e-7 in 2e-3.
    np.testing.assert_allclose(loss_scale, PRIMITIVES["noise/cosine/loss_scale"], rtol=1e-4)


@pytest.mark.parametrize("name, words", [
    ("cosin", "diffusion.schedule 'cosin': did you mean 'cosine'"),
    ("polynomal:3", "did you mean 'polynomial:3'"),
    ("polynomial", "'polynomial', expected a positive exponent"),
    ("polynomial:0", "'polynomial:0', expected a positive exponent"),
    ("polynomial:two", "'polynomial:two', expected a positive exponent"),
    ("polynomial:nan", "'polynomial:nan', expected a positive exponent"),
    ("loglinear:2", "diffusion.schedule 'loglinear:2': did you mean 'loglinear'"),
])
def test_unknown_schedule(name, words):
    with pytest.raises(UserError, match=words):
        get_schedule(name)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 11), (64, 64), (333, 333), (1024, 1000)])
def test_one_in_every_stratum(shape):
    u = np.asarray(jax.jit(stratified_uniform, static_argnums=1)(jax.random.key(0), shape))
    assert u.dtype == np.float32 and u.shape == shape and 0 < u.min() and u.max() < 1
    count = u.size
    np.testing.assert_array_equal(np.sort(np.floor(u.astype(np.float64) * count), axis=None), np.arange(count))


def test_strata_are_permuted_over_all_entries():
    """Every row and column of a batch sees noise levels from all over the range (known mistake: row-major strata)."""
    u = np.asarray(stratified_uniform(jax.random.key(1), (64, 64)))
    for axis in (0, 1):
        assert (np.ptp(u, axis=axis) > 0.75).all()
        assert stats.kstest(u.mean(axis), stats.norm(0.5, 1 / np.sqrt(12 * 64)).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "draw", [lambda key: stratified_uniform(key, (3, 4)), lambda key: systematic_uniform(key, 3, 4)])
def test_each_entry_is_uniform(draw):
    u = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 4000)))
    for b in range(3):
        for k in range(4):
            assert stats.kstest(u[:, b, k], "uniform").pvalue > 1e-4


@pytest.mark.parametrize("rows, blocks", [(1, 1), (1, 37), (37, 1), (5, 12), (64, 128)])
def test_systematic_rows(rows, blocks):
    u_RxK = np.asarray(systematic_uniform(jax.random.key(3), rows, blocks), np.float64)
    for row in u_RxK:
        np.testing.assert_array_equal(np.sort(np.floor(row * blocks)), np.arange(blocks))
    np.testing.assert_array_equal(np.sort(np.floor(u_RxK * rows * blocks), axis=None), np.arange(rows * blocks))


def test_systematic_rows_have_their_own_order():
    order_RxK = np.argsort(np.asarray(systematic_uniform(jax.random.key(4), 50, 16)), axis=1)
    assert len(set(map(tuple, order_RxK))) == 50


def test_too_many_strata():
    with pytest.raises(UserError, match=f"{MAX_STRATA + 1} blocks"):
        stratified_uniform(jax.random.key(0), (MAX_STRATA + 1,))
