"""The cache of the trunk: decoding is the pass over whole rows, and smaller dtypes round and do nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_trunk import BLOCK, LENGTH, batch_of_two, make_stream, network, run

from bd3lm_jax.models import trunk
from bd3lm_jax.models.cache import DTYPES


def test_cached_blocks_equal_the_two_stream_pass():
    model, params = network()
    noised, clean = batch_of_two()
    whole = run(model, params, noised, clean).noised
    cache = trunk.new_cache(model, params, batch=2, capacity=LENGTH, dtype="compute")

    finished = None
    for b in range(LENGTH // BLOCK):
        where = slice(b * BLOCK, (b + 1) * BLOCK)
        block = jax.tree.map(lambda x: x[..., where], noised.replace(sigma=None))
        block = block.replace(sigma=noised.sigma[..., b:b + 1])
        out = run(model, params, block, finished, cache=cache, write_at=max(0, (b - 1) * BLOCK))
        cache = out.cache
        np.testing.assert_allclose(out.noised, whole[:, :, where], atol=2e-5)
        finished = jax.tree.map(lambda x: x[:, where], clean)


def test_cached_tokens_equal_one_causal_pass():
    model, params = network()
    clean = make_stream(np.random.default_rng(3).integers(0, 31, size=(2, LENGTH)), 1)
    whole = run(model, params, None, clean, rule="causal", block_size=1).clean
    cache = trunk.new_cache(model, params, 2, LENGTH + 3, "compute")  # unused slots are seen by nobody

    for i in range(LENGTH):
        token = jax.tree.map(lambda x: x[:, i:i + 1], clean)
        out = run(model, params, None, token, rule="causal", block_size=1, cache=cache, write_at=i)
        cache = out.cache
        np.testing.assert_allclose(out.clean[:, 0], whole[:, i], atol=2e-5)


def cached_step(dtype, sigma=None, rounding=None):
    """A cache that holds the first block, changed by `rounding`; what the second one stores; the third one's outcome
    when the second is stored in the same call, without levels (sigma None) or with a level for every stream."""
    model, params = network()
    clean = make_stream(np.random.default_rng(4).integers(0, 31, size=(2, LENGTH)), BLOCK)
    parts = [jax.tree.map(lambda x, b=b: x[:, b * BLOCK:(b + 1) * BLOCK], clean) for b in range(3)]
    cache = trunk.new_cache(model, params, 2, LENGTH, dtype)
    cache = run(model, params, None, parts[0], cache=cache, write_at=0).cache
    if rounding is not None:
        cache = cache.replace(**{part: jax.tree.map(rounding, getattr(cache, part)) for part in ("keys", "values")})
    noised = parts[2].replace(ids=parts[2].ids[:, None], sigma=sigma)
    return run(model, params, noised, parts[1].replace(sigma=None if sigma is None else sigma[:, 0]), cache=cache,
               write_at=BLOCK)


def assert_close(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


@pytest.mark.ci_slow
def test_streams_that_share_their_weights_are_two_streams():
    """One row of both streams' tokens, or each on its own because levels were given, all of them 0."""
    assert_close(cached_step("compute"), cached_step("compute", sigma=np.zeros((2, 1, 1), np.float32)))


@pytest.mark.ci_slow
def test_several_views_with_a_cache_are_single_ones():
    model, params = network()
    first, *_ = batch_of_two()
    cache = cached_step("compute").cache
    clean = make_stream(np.random.default_rng(5).integers(0, 31, size=(2, BLOCK)), BLOCK)
    noised = jax.tree.map(lambda x: x[..., :BLOCK], first.replace(sigma=None))
    both = run(model, params, noised, clean, cache=cache, write_at=0).noised
    for view in range(2):
        one = noised.replace(ids=noised.ids[:, view:view + 1])
        alone = run(model, params, one, clean, cache=cache, write_at=0).noised
        np.testing.assert_allclose(both[:, view:view + 1], alone, atol=2e-5)


def slots_last(values):
    """Arrays of slots `[..., Dh, P]`, one a layer."""
    return [np.asarray(x, np.float64) for x in values["blocks"]]


@pytest.mark.ci_slow
def test_int8_keeps_each_token_and_head_to_a_127th_of_its_largest():
    """Against NumPy: integers and scales of what the float32 cache holds; half a step is the most that is lost."""
    exact, small = (cached_step(dtype).cache for dtype in ("float32", "int8"))
    step = 2 * BLOCK  # slots that are filled
    for part in ("keys", "values"):
        for x, stored in zip(slots_last(getattr(exact, part)), getattr(small, part)["blocks"], strict=True):
            assert stored.integers.dtype == jnp.int8 and stored.scale.dtype == jnp.float32
            x, scale = x[..., :BLOCK], np.abs(x[..., :BLOCK]).max(-2, keepdims=True) / 127
            np.testing.assert_allclose(stored.scale[..., :BLOCK], scale, rtol=1e-5)
            error = np.abs(stored.integers[..., :BLOCK] * scale - x) / scale
            assert error.max() <= 0.5 + 1e-3 and np.abs(stored.integers[..., :step]).max() == 127
    jax.tree.map(np.testing.assert_array_equal, (exact.position, exact.block, exact.segment),
                 (small.position, small.block, small.segment))


def rounded_to_int8(x):
    x = np.asarray(x, np.float64)
    scale = np.maximum(np.abs(x).max(-2, keepdims=True), 1e-12) / 127
    return jnp.asarray(np.round(x / scale) * scale, jnp.float32)


def rounded_to_bfloat16(x):
    """Round to nearest even at 8 bits, by integers."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return jnp.asarray(((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32))


@pytest.mark.ci_slow
@pytest.mark.parametrize("dtype, rounding", [("int8", rounded_to_int8), ("bfloat16", rounded_to_bfloat16)])
def test_a_small_cache_is_a_rounded_one(dtype, rounding):
    """What attends to it sees the rounded keys and values, and computes as before."""
    found, expected = cached_step(dtype).noised, cached_step("float32", rounding=rounding).noised
    np.testing.assert_allclose(found, expected, atol=2e-5)
    exact = np.asarray(cached_step("float32").noised)
    assert 1e-3 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_cache_bytes():
    model, params = network()
    sizes = {dtype: sum(x.nbytes for x in jax.tree.leaves(trunk.new_cache(model, params, 2, LENGTH, dtype).keys))
             for dtype in DTYPES}
    heads, width = 2, 8
    tokens = 3 * 2 * LENGTH * heads
    assert sizes == {"compute": 4 * tokens * width, "float32": 4 * tokens * width, "bfloat16": 2 * tokens * width,
                     "int8": tokens * (width + 4)}
    half, _ = network(dtype=jnp.bfloat16)
    assert jax.tree.leaves(trunk.new_cache(half, params, 2, LENGTH, "compute").keys)[0].dtype == jnp.bfloat16
