"""Layers that see a window: the predicate against enumeration, blocked attention against the dense oracle, the tiles
that are left out, and who refuses."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from oracle import assert_equal_to_dense, make_tokens, one_stream_spec, streams_for, two_stream_spec

from bd3lm_jax.attention import blocked, choose, gpu, splash
from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import RULES, allowed
from bd3lm_jax.attention.tiles import all_tiles, prefix_tiles, restrict_to_window
from bd3lm_jax.core.errors import UserError


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocked, "TILE", 8)
    monkeypatch.setattr(blocked, "OWN_TILE", 8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [0, 2, 30])
def test_the_window_is_counted_in_places_of_the_document(rule, window):
    tokens = make_tokens([[7, 5]], 14, 2, 0)
    q, kv = tokens.expand(2), tokens.expand(1)
    found, without = allowed(rule, q, kv, window)[0], np.asarray(allowed(rule, q, kv))[0]
    places, documents = [*range(7), *range(5)], [1] * 7 + [2] * 5
    for i in range(12):
        for j in range(12):
            near = documents[i] == documents[j] and -window <= places[i] - places[j] <= window
            assert bool(found[i, j]) == (bool(without[i, j]) and near)
    assert not found[12:].any() and not found[:, 12:].any()


def test_dense_attention_looks_no_further():
    """Averages of the values in sight, as all keys are alike."""
    spec = one_stream_spec("bidirectional", [[9]], 9, 9).replace(window=2)
    values = np.arange(9, dtype=np.float32).reshape(1, 9, 1, 1)
    same = np.ones((1, 9, 1, 1), np.float32)
    _, found = dense_attention(spec, None, (same, same, values), None)
    expected = [np.mean([j for j in range(9) if abs(i - j) <= 2]) for i in range(9)]
    np.testing.assert_allclose(found[0, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("window", some([1, 9], 0))
@pytest.mark.parametrize("length, block_size, rows, noise_samples", [
    (48, 4, [[48]], 1), (40, 40, [[37]], 1), (64, 32, [[64], [50]], 2), (48, 4, [[12, 28], [4, 44]], 1),
])
def test_two_streams(small_tiles, window, length, block_size, rows, noise_samples):
    spec = two_stream_spec(rows, length, block_size).replace(window=window)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 2, 1, noise_samples, True))


@pytest.mark.parametrize("rule, block_size", some([("causal", 1), ("block_causal", 4), ("bidirectional", 40)], 1))
def test_one_stream(small_tiles, rule, block_size):
    spec = one_stream_spec(rule, [[40], [8, 20, 12]], 40, block_size).replace(window=5)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 2, 1, 0, True))


@pytest.mark.parametrize("window", [0, 3, 8, 17])
@pytest.mark.parametrize("shift", [0, 4])
def test_tiles_are_exactly_those_with_a_pair_in_the_window(window, shift):
    """Clean queries stand at their row index, noised ones `shift` later."""
    found = restrict_to_window(window, shift, functools.partial(all_tiles, 8))(40, 40)
    i, j = np.arange(40)[:, None], np.arange(40)[None]
    seen = (abs(i - j) <= window) | (abs(i + shift - j) <= window)
    expected = {(a // 8, b // 8) for a, b in np.argwhere(seen)}
    listed = {tuple(pair) for pair in found.masked.tolist()}
    assert len(found.unmasked) == 0 and expected <= listed
    assert listed == expected or shift  # queries between the two streams' places may cost a tile more
    assert len(listed) < 25


def test_work_grows_with_the_window_and_not_with_the_square_of_the_length():
    tiles_of = functools.partial(prefix_tiles, "causal", 1, True, 128)
    assert len(restrict_to_window(128, 0, tiles_of)(8192, 8192).masked) == 2 * 64 - 1
    assert restrict_to_window(None, 0, tiles_of) is tiles_of


def test_other_backends_refuse():
    spec = one_stream_spec("bidirectional", [[80]], 80, 80).replace(window=4)
    streams = streams_for(spec, 1, 1, 0, True)
    assert "4 tokens to either side" in splash.unsupported_reason(spec, 64, jnp.float32, 80)
    assert "4 tokens to either side" in gpu.unsupported_reason(spec, 64, jnp.bfloat16)
    with pytest.raises(UserError, match="'splash' cannot run here: a layer sees 4 tokens to either side"):
        choose("splash", spec, *streams, "cpu")
    for platform in ("cpu", "tpu", "gpu"):
        assert choose("auto", spec, *streams, platform).name == "blocked"
