"""Dense attention against a float64 loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import MaskSpec, Tokens

BATCH, VIEWS, SIZE = 2, 2, 4
SEGMENT = {"cache": [[1] * 4, [0] * 4], "clean": [[1] * 4, [1] * 2 + [0] * 2], "noised": [[1] * 4, [1] * 4]}
START = {"cache": 0, "clean": 4, "noised": 8}  # a decoding step: cached blocks, the block just finished, the new one

attend = jax.jit(dense_attention)


def tokens(name, block_size=4):
    position = np.broadcast_to(START[name] + np.arange(4), (BATCH, 4))
    return Tokens(position, position // block_size, np.array(SEGMENT[name]), int(name == "noised"))


def arrays(key, shape, heads, kv_heads):
    draw = np.random.default_rng(key)
    return tuple(draw.normal(size=(*shape, n, SIZE)).astype(np.float32) for n in (heads, kv_heads, kv_heads))


def one_query(q_HxD, keys_PxGxD, values_PxGxD, visible_P):
    """Softmax attention of one query over the keys it sees, in float64; 0 when it sees none."""
    out = np.zeros(q_HxD.shape)
    if not visible_P.any():
        return out
    share = q_HxD.shape[0] // keys_PxGxD.shape[1]
    for head, q in enumerate(np.asarray(q_HxD, np.float64)):
        keys, values = (np.asarray(x, np.float64)[visible_P, head // share] for x in (keys_PxGxD, values_PxGxD))
        weights = np.exp(keys @ q / np.sqrt(q.size))
        out[head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
def test_decoding_step_equals_loop(heads, kv_heads):
    noised = arrays(0, (BATCH, VIEWS, 4), heads, kv_heads)
    clean = arrays(1, (BATCH, 4), heads, kv_heads)
    cache = arrays(2, (BATCH, 4), heads, kv_heads)[1:]
    spec = MaskSpec("causal", 4, False, False, tokens("noised"), tokens("clean"), tokens("cache"))
    slots_last = [jnp.moveaxis(x, 1, -1) for x in cache]
    noised_out, clean_out = map(np.asarray, attend(spec, noised, clean, slots_last))
    for b in range(BATCH):
        real = {name: np.array(SEGMENT[name][b]) > 0 for name in SEGMENT}
        before = [np.concatenate(pair) for pair in zip((x[b] for x in cache), (x[b] for x in clean[1:]))]
        for i in range(4):
            causal = np.concatenate([real["cache"], real["clean"] & (np.arange(4) <= i)]) & real["clean"][i]
            np.testing.assert_allclose(clean_out[b, i], one_query(clean[0][b, i], *before, causal), atol=1e-5)
            for noise_sample in range(VIEWS):
                keys, values = (np.concatenate([x, own[b, noise_sample]]) for x, own in zip(before, noised[1:]))
                visible = np.concatenate([real["cache"], real["clean"], real["noised"]])
                np.testing.assert_allclose(noised_out[b, noise_sample, i],
                                           one_query(noised[0][b, noise_sample, i], keys, values, visible), atol=1e-5)


def test_query_that_sees_nobody_is_exactly_zero():
    clean = arrays(3, (BATCH, 4), 2, 2)
    spec = MaskSpec("bidirectional", 4, True, False, None, tokens("clean"), None)

    def total(clean):
        return jnp.sum(jnp.sin(1 + dense_attention(spec, None, clean, None)[1]))

    out = attend(spec, None, clean, None)[1]
    gradients = jax.jit(jax.grad(total))(clean)
    padding = np.array(SEGMENT["clean"]) == 0
    assert np.all(np.asarray(out)[padding] == 0) and np.all(np.asarray(out)[~padding] != 0)
    for gradient in gradients:
        assert np.all(np.asarray(gradient)[padding] == 0)
        assert np.any(np.asarray(gradient)[~padding] != 0)


def test_keys_alone_give_no_clean_output():
    noised, clean = arrays(4, (BATCH, 1, 4), 2, 2), arrays(5, (BATCH, 4), 2, 2)
    spec = MaskSpec("block_causal", 4, False, False, tokens("noised"), tokens("clean"), None)
    both, _ = attend(spec, noised, clean, None)
    noised_out, clean_out = attend(spec, noised, (None, *clean[1:]), None)
    assert clean_out is None
    np.testing.assert_allclose(noised_out, both, atol=1e-6)
