"""Blocked attention against the dense oracle, values and gradients, over layouts of the row; its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax.attention import blocked
from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import MaskSpec, Tokens

SMALL_TILE = 16  # many tiles in short rows
SIZE = 4


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocked, "TILE", SMALL_TILE)


def make_tokens(rows, length, block_size, view):
    """rows: for each row the lengths of its documents; the rest is padding."""
    position, segment = np.zeros((2, len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for index, size in enumerate(documents):
            position[row, start:start + size] = np.arange(size)
            segment[row, start:start + size] = index + 1
            start += size
    return Tokens(position, position // block_size, segment, view)


def two_stream_spec(rows, length, block_size):
    """The training layout: the clean stream lacks its last block."""
    noised = make_tokens(rows, length, block_size, 1)
    kept = length - block_size
    clean = Tokens(noised.position[:, :kept], noised.block[:, :kept], noised.segment[:, :kept], 0)
    return MaskSpec("block_causal", block_size, True, False, noised, clean, None)


def make_stream(seed, shape, heads, kv_heads):
    draw = np.random.default_rng(seed)
    return tuple(draw.normal(size=(*shape, n, SIZE)).astype(np.float32) for n in (heads, kv_heads, kv_heads))


def assert_equal_to_dense(spec, noised, clean, atol=2e-5):
    """Outputs, and gradients of a random projection of them, on both backends."""
    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, streams):
        def projected(streams):
            outputs = attend(spec, *streams, None)
            return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(outputs)), outputs
        (_, outputs), gradients = jax.value_and_grad(projected, has_aux=True)(streams)
        return outputs, gradients

    dense, tiled = (run(attend, (noised, clean)) for attend in (dense_attention, blocked_attention))
    assert jax.tree.structure(dense) == jax.tree.structure(tiled)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=atol), tiled, dense)
    return tiled


# length, block size, documents of each row, heads, key heads, views, is the clean stream's own output wanted
TWO_STREAM = [
    (48, 4, [[48]], 2, 2, 1, True),
    (40, 1, [[40]], 1, 1, 1, True),
    (40, 8, [[40], [37]], 2, 1, 2, False),
    (48, 16, [[48]], 4, 2, 2, True),
    (64, 32, [[64]], 1, 1, 2, True),  # a block over several tiles
    (60, 20, [[60]], 2, 2, 1, False),  # blocks that straddle tiles
    (20, 4, [[8, 12], [4, 4, 8]], 1, 1, 1, True),  # packed documents, padding
    (48, 4, [[12, 28], [4, 44]], 2, 1, 3, False),
    (36, 1, [[5, 1, 30], [36]], 1, 1, 2, True),
    (80, 40, [[40, 33], [80]], 1, 1, 1, True),
]


@pytest.mark.parametrize("length, block_size, rows, heads, kv_heads, views, clean_output", TWO_STREAM)
def test_two_streams(small_tiles, length, block_size, rows, heads, kv_heads, views, clean_output):
    batch, kept = len(rows), length - block_size
    spec = two_stream_spec(rows, length, block_size)
    noised = make_stream(0, (batch, views, length), heads, kv_heads)
    clean = make_stream(1, (batch, kept), heads, kv_heads)
    if not clean_output:
        clean = (None, *clean[1:])
    assert_equal_to_dense(spec, noised, clean)


@pytest.mark.parametrize("length", [12, 40])
def test_one_block_needs_no_clean_stream(small_tiles, length):
    spec = MaskSpec("block_causal", length, True, False, make_tokens([[length], [length - 5]], length, length, 1), None, None)
    assert_equal_to_dense(spec, make_stream(2, (2, 2, length), 2, 1), None)


@pytest.mark.parametrize("rule, block_size", [("causal", 1), ("block_causal", 4), ("bidirectional", 40)])
@pytest.mark.parametrize("rows", [[[40]], [[8, 20, 12], [20, 16]]])
def test_one_stream(small_tiles, rule, block_size, rows):
    spec = MaskSpec(rule, block_size, True, False, None, make_tokens(rows, 40, block_size, 0), None)
    assert_equal_to_dense(spec, None, make_stream(3, (len(rows), 40), 2, 1))


@pytest.mark.parametrize("length, block_size", [(300, 4), (384, 128), (512, 256)])
def test_tiles_of_the_shipped_size(length, block_size):
    spec = two_stream_spec([[length - 7]], length, block_size)
    noised, clean = make_stream(4, (1, 1, length), 1, 1), make_stream(5, (1, length - block_size), 1, 1)
    assert_equal_to_dense(spec, noised, clean)


def test_padding_gives_exact_zeros(small_tiles):
    spec = two_stream_spec([[24, 9]], 48, 4)
    noised, clean = make_stream(6, (1, 2, 48), 2, 1), make_stream(7, (1, 44), 2, 1)
    outputs, gradients = assert_equal_to_dense(spec, noised, clean)
    padding = spec.noised.segment[0] == 0
    for noised_array, clean_array in ((outputs[0], outputs[1]), *zip(*gradients)):
        assert np.all(np.asarray(noised_array)[0][:, padding] == 0)
        assert np.all(np.asarray(clean_array)[0][padding[:44]] == 0)
        assert np.all(np.any(np.asarray(noised_array)[0][:, ~padding] != 0, axis=(-1, -2)))


def test_extreme_scores_stay_finite(small_tiles):
    spec = MaskSpec("causal", 1, True, False, None, make_tokens([[40]], 40, 1, 0), None)
    q, k, v = make_stream(8, (1, 40), 1, 1)
    outputs, gradients = assert_equal_to_dense(spec, None, (300 * q, 300 * k, v), atol=1e-2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((outputs, gradients)))


def test_bfloat16_is_close_to_float32(small_tiles):
    spec = MaskSpec("block_causal", 4, True, False, None, make_tokens([[40]], 40, 4, 0), None)
    clean = make_stream(9, (1, 40), 2, 2)
    exact = jax.jit(dense_attention)(spec, None, clean, None)[1]
    rounded = jax.jit(blocked_attention)(spec, None, tuple(jnp.asarray(x, jnp.bfloat16) for x in clean), None)[1]
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), exact, atol=0.03)


def test_memory_far_below_dense():
    length, block_size = 1024, 16
    spec = two_stream_spec([[length]], length, block_size)
    streams = make_stream(10, (1, 1, length), 2, 2), make_stream(11, (1, length - block_size), 2, 2)

    def temporary_bytes(attend):
        def total(streams):
            return sum(jnp.sum(x * x) for x in attend(spec, *streams, None))
        return jax.jit(jax.grad(total)).lower(streams).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(blocked_attention) < 0.1 * temporary_bytes(dense_attention)


def test_decoding_is_refused():
    tokens = make_tokens([[8]], 8, 4, 0)
    stream = make_stream(12, (1, 8), 1, 1)
    with pytest.raises(ValueError, match="no cache"):
        blocked_attention(MaskSpec("causal", 1, False, False, None, tokens, tokens), None, stream, stream[1:])
    with pytest.raises(ValueError, match="aligned"):
        spec = MaskSpec("causal", 4, False, False, tokens.replace(view=1), tokens, None)
        blocked_attention(spec, tuple(x[:, None] for x in stream), stream, None)
