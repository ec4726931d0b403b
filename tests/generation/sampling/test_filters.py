"""Filters against sorted lists in NumPy and published nucleus probabilities; draws against their law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from scipy import special, stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.sampling.filters import (
    Filters,
    apply_repetition_penalty,
    check_filters,
    filter_logits,
    sample_categorical,
)

PRIMITIVES = np.load(GOLDEN / "primitives.npz")
LOGITS_NxV = PRIMITIVES["logits"].reshape(-1, PRIMITIVES["logits"].shape[-1])


def probabilities(logits_NxV, *filters, **more):
    filtered = filter_logits(jnp.asarray(logits_NxV), Filters(*filters, **more))
    return special.softmax(np.asarray(filtered, np.float64), -1)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature_divides_logits(temperature):
    expected = special.softmax(LOGITS_NxV.astype(np.float64) / temperature, -1)
    np.testing.assert_allclose(probabilities(LOGITS_NxV, temperature), expected, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 7, 41, 100])
def test_top_k_keeps_the_most_probable(top_k):
    expected = special.softmax(LOGITS_NxV.astype(np.float64), -1)
    for row in expected:
        row[np.argsort(-row)[top_k:]] = 0
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities(LOGITS_NxV, top_k=top_k), expected, atol=1e-6)


@pytest.mark.parametrize("top_p", ["0.5", "0.9", "0.99"])
def test_nucleus_is_the_published_one_and_the_token_that_crosses(top_p):
    """The published sampler stops one token short of `top_p`, except that it keeps the first."""
    published = PRIMITIVES[f"nucleus/{top_p}"].reshape(LOGITS_NxV.shape)
    plain = special.softmax(LOGITS_NxV.astype(np.float64), -1)
    for ours, theirs, plain_V in zip(probabilities(LOGITS_NxV, top_p=float(top_p)), published, plain, strict=True):
        kept, order = theirs > 0, np.argsort(-plain_V)
        if plain_V[order[0]] < float(top_p):
            crossing = order[kept.sum()]
            assert plain_V[kept].sum() < float(top_p) <= plain_V[kept].sum() + plain_V[crossing]
            kept[crossing] = True
        np.testing.assert_array_equal(ours > 0, kept)
        np.testing.assert_allclose(ours, np.where(kept, plain_V, 0) / plain_V[kept].sum(), atol=1e-6)


def by_a_loop(logits_V, top_k=None, top_p=None, min_p=None):
    """Which tokens stay, one after the other by falling probability and rising id, in float64."""
    p = special.softmax(np.asarray(logits_V, np.float64))
    order = sorted(range(len(p)), key=lambda i: (-logits_V[i], i))[:top_k]
    total, kept = sum(p[i] for i in order), []
    for i in order:
        if top_p is None or not kept or sum(p[j] for j in kept) / total < top_p - 1e-9:
            kept.append(i)
    return {i for i in kept if min_p is None or p[i] >= min_p * p.max() * (1 - 1e-7)}


@pytest.mark.parametrize("setting", [{"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.25}, {"top_p": 1e-3}, {"top_k": 1},
                                     {"top_k": 3}, {"top_k": 7}, {"min_p": 0.5}, {"min_p": 1.0}, {"min_p": 0.25},
                                     {"top_k": 5, "top_p": 0.5}, {"top_k": 6, "top_p": 0.4, "min_p": 0.5}])
def test_ties_go_to_the_first(setting):
    """Flat logits and logits of few values, so that the border always runs between equals."""
    steps = np.log(2) * np.random.default_rng(0).integers(0, 3, size=(40, 10))
    for logits_V in [*steps.astype(np.float32), *(np.full(n, 3.7, np.float32) for n in (2, 3, 4, 10, 100, 1000, 3001))]:
        found = np.flatnonzero(np.asarray(filter_logits(jnp.asarray(logits_V[None]), Filters(**setting)))[0] > -np.inf)
        assert set(found.tolist()) == by_a_loop(logits_V, **setting)


def test_nucleus_at_the_ends():
    np.testing.assert_array_equal(probabilities(LOGITS_NxV, top_p=1.0), probabilities(LOGITS_NxV))
    smallest = probabilities(LOGITS_NxV, top_p=1e-6)
    np.testing.assert_array_equal(smallest, np.eye(41)[LOGITS_NxV.argmax(-1)])


def test_filters_apply_in_order():
    """Temperature 2 flattens before top-k = 3 and nucleus 0.6 count: of square roots 4, 3, 2 : 1 two of three stay."""
    logits = 2 * np.log([[4.0, 3.0, 2.0, 1.0]])
    np.testing.assert_allclose(probabilities(logits, 2.0, 3, 0.6), [[4 / 7, 3 / 7, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(probabilities(logits, 1.0, 3, 0.5), [[1, 0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_keeps_what_is_so_probable_as_a_part_of_the_likeliest(min_p):
    expected = special.softmax(LOGITS_NxV.astype(np.float64) / 0.7, -1)
    for row in expected:
        row[row < min_p * row.max() * (1 - 1e-5)] = 0
    assert min_p == 1 or 2 < (expected > 0).sum(-1).mean() < 40
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities(LOGITS_NxV, 0.7, min_p=min_p), expected, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_penalty_moves_seen_tokens_down(penalty):
    seen = np.random.default_rng(0).random(LOGITS_NxV.shape) < 0.4
    expected = LOGITS_NxV.astype(np.float64)
    for row, token in np.argwhere(seen):
        expected[row, token] *= penalty if expected[row, token] < 0 else 1 / penalty
    np.testing.assert_allclose(apply_repetition_penalty(jnp.asarray(LOGITS_NxV), seen, penalty), expected, rtol=1e-6)
    impossible = apply_repetition_penalty(jnp.array([[-jnp.inf, 0.0]]), jnp.ones((1, 2), bool), penalty)
    np.testing.assert_array_equal(impossible, [[-np.inf, 0.0]])


def test_temperature_zero_is_the_most_probable_token():
    filtered = filter_logits(jnp.asarray(LOGITS_NxV), Filters(0, 5, 0.9))
    drawn = [np.asarray(sample_categorical(keys(len(LOGITS_NxV), seed), filtered)) for seed in range(3)]
    np.testing.assert_array_equal(drawn, np.broadcast_to(LOGITS_NxV.argmax(-1), (3, len(LOGITS_NxV))))


def test_excluded_tokens_stay_excluded():
    logits = jnp.array([[-jnp.inf, 0.0, 1.0, -jnp.inf]])
    for setting in ((0,), (1.0, 3), (1.0, None, 0.99), (0.1,), (1.0, None, None, 0.01)):
        np.testing.assert_array_equal(probabilities(logits, *setting)[0, [0, 3]], 0)


@pytest.mark.parametrize("setting", [(), (0.7, 6), (1.0, None, 0.8), (1.0, None, None, 0.1)])
def test_law_of_draws(setting):
    logits_V, count = LOGITS_NxV[0], 20_000
    filtered = jnp.broadcast_to(filter_logits(jnp.asarray(logits_V[None]), Filters(*setting)), (count, len(logits_V)))
    seen = np.bincount(jax.jit(sample_categorical)(keys(count), filtered), minlength=len(logits_V))
    expected = probabilities(logits_V[None], *setting)[0]
    assert seen[expected == 0].sum() == 0
    assert stats.chisquare(seen[expected > 0], count * expected[expected > 0]).pvalue > 1e-3


def test_a_row_depends_on_its_own_key_alone():
    filtered = filter_logits(jnp.asarray(LOGITS_NxV), Filters())
    together = sample_categorical(keys(len(LOGITS_NxV)), filtered)
    alone = [int(sample_categorical(key[None], row[None])[0]) for key, row in zip(keys(len(LOGITS_NxV)), filtered)]
    np.testing.assert_array_equal(together, alone)
    assert together.dtype == jnp.int32


@pytest.mark.ci_slow
def test_half_precision_logits_get_float32_noise():
    """Noise rounded to bfloat16 has few values: among 4096 equal logits the largest would often be a tie."""
    half = jnp.zeros((256, 4096), jnp.bfloat16)
    assert filter_logits(half, Filters(1.0, 10, 0.9, 0.1)).dtype == jnp.float32
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (4096,), jnp.float32))(keys(256))
    rounded = noise.astype(jnp.bfloat16)
    assert ((rounded == rounded.max(-1, keepdims=True)).sum(-1) > 1).any()
    np.testing.assert_array_equal(sample_categorical(keys(256), half), noise.argmax(-1))


@pytest.mark.parametrize("setting, message", [
    ({"temperature": -1}, "temperature is -1, expected at least 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_k": 0}, "top_k is 0, expected at least 1"),
    ({"top_p": 0}, r"top_p is 0, expected in \(0, 1\]"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"min_p": 0}, r"min_p is 0, expected in \(0, 1\]"),
    ({"min_p": float("nan")}, "min_p is nan"),
    ({"repetition_penalty": 0}, r"repetition_penalty is 0, expected above 0"),
])
def test_bad_settings(setting, message):
    with pytest.raises(UserError, match=message):
        check_filters(Filters(**setting))


@pytest.mark.parametrize("setting", [(0,), (1.0, 1, 1.0), (2.5, 10**6, 1e-9), (1.0, None, None, 1.0, 0.5)])
def test_good_settings(setting):
    check_filters(Filters(*setting))
