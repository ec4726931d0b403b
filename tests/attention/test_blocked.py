"""Blocked attention against the dense oracle, values and gradients, over layouts of the row; its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from oracle import (
    assert_equal_to_dense,
    assert_padding_is_nothing,
    make_stream,
    make_tokens,
    one_stream_spec,
    streams_for,
    two_stream_spec,
)

from bd3lm_jax.attention import blocked
from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import MaskSpec


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles in short rows."""
    monkeypatch.setattr(blocked, "TILE", 16)
    monkeypatch.setattr(blocked, "OWN_TILE", 8)


# length, block size, documents of each row, heads, key heads, copies, is the clean stream's own output wanted
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


@pytest.mark.parametrize("length, block_size, rows, heads, kv_heads, noise_samples, clean_output",
                         some(TWO_STREAM, 0, 4, 7))
def test_two_streams(small_tiles, length, block_size, rows, heads, kv_heads, noise_samples, clean_output):
    spec = two_stream_spec(rows, length, block_size)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, heads, kv_heads, noise_samples, clean_output))


@pytest.mark.ci_slow
def test_one_document_is_a_promise_not_a_need(small_tiles):
    """The tiles whose mask is left out are those that need none."""
    spec = two_stream_spec([[48], [21]], 48, 4)
    for promised in (True, False):
        assert_equal_to_dense(blocked_attention, spec.replace(one_document=promised), *streams_for(spec, 1, 1, 1, True))


@pytest.mark.parametrize("length", some([12, 40], 1))
def test_one_block_needs_no_clean_stream(small_tiles, length):
    spec = two_stream_spec([[length], [length - 5]], length, length)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 2, 1, 2, False))


@pytest.mark.parametrize("rule, block_size", some([("causal", 1), ("block_causal", 4), ("bidirectional", 40)], 0, 2))
@pytest.mark.parametrize("rows", [[[40]], [[8, 20, 12], [20, 16]]])
def test_one_stream(small_tiles, rule, block_size, rows):
    spec = one_stream_spec(rule, rows, 40, block_size)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 2, 1, 0, True))


@pytest.mark.ci_slow
def test_causal_clean_stream_beside_a_noised_one(small_tiles):
    spec = two_stream_spec([[48]], 48, 4, rule="causal")
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 1, 1, 1, True))


@pytest.mark.parametrize("length, block_size", some([(300, 4), (384, 128), (512, 256)], 0))
def test_tiles_of_the_shipped_size(length, block_size):
    spec = two_stream_spec([[length - 7]], length, block_size)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 1, 1, 1, True))


@pytest.mark.parametrize("documents", some([[24, 9], [29], []], 0))
def test_padding_gives_exact_zeros(small_tiles, documents):
    spec = two_stream_spec([documents, [48]], 48, 4)
    found = assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 2, 1, 2, True))
    assert_padding_is_nothing(spec, found)


def test_extreme_scores_stay_finite(small_tiles):
    spec = one_stream_spec("causal", [[40]], 40, 1)
    q, k, v = make_stream(8, (1, 40), 1, 1)
    found = assert_equal_to_dense(blocked_attention, spec, None, (300 * q, 300 * k, v), atol=1e-2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_bfloat16_is_close_to_float32(small_tiles):
    spec = one_stream_spec("block_causal", [[40]], 40, 4)
    clean = make_stream(9, (1, 40), 2, 2)
    exact = jax.jit(dense_attention)(spec, None, clean, None)[1]
    rounded = jax.jit(blocked_attention)(spec, None, tuple(jnp.asarray(x, jnp.bfloat16) for x in clean), None)[1]
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), exact, atol=0.03)


def test_memory_far_below_dense():
    spec = two_stream_spec([[1024]], 1024, 16)
    streams = streams_for(spec, 2, 2, 1, True)

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
        spec = MaskSpec("causal", 4, False, False, tokens.replace(noise_sample=1), tokens, None)
        blocked_attention(spec, tuple(x[:, None] for x in stream), stream, None)
