"""Folding rows into blocks against a loop over blocks, for any flash call."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import make_stream, make_tokens

from bd3lm_jax.attention.parts import blockwise
from bd3lm_jax.attention.tiles import BackwardInputs, Flash

SIZE, LENGTH = 4, 10  # the last block is ragged


def recorded(calls):
    """A flash call whose results are its arguments."""
    def forward(q, k, v, q_tokens, kv_tokens):
        calls.append((q, k, v, q_tokens, kv_tokens))
        return 2 * q, q_tokens.segment[..., None] * jnp.ones(q.shape[:-1])

    def backward(q, k, v, q_tokens, kv_tokens, grad):
        return q + grad.d_out, 3 * k, 5 * v

    return Flash(forward, backward)


def test_every_block_meets_its_own_keys():
    calls = []
    flash = blockwise(recorded(calls), SIZE)
    q = np.stack([make_stream(seed, (2, LENGTH), 2, 1)[0] for seed in range(3)], axis=1)  # [B, G, N, H, Dh]
    _, k, v = make_stream(4, (2, LENGTH), 2, 1)
    tokens = make_tokens([[LENGTH], [7]], LENGTH, SIZE, 0).replace(noise_sample=np.zeros((2, LENGTH), int))
    q_tokens = jax.tree.map(lambda x: np.stack([x] * 3, axis=1), tokens)
    out, lse = flash.forward(q, k, v, q_tokens, tokens)
    np.testing.assert_array_equal(out, 2 * q)
    np.testing.assert_array_equal(lse[..., 0], q_tokens.segment)
    (folded_q, folded_k, folded_v, folded_tokens, folded_kv_tokens), = calls
    for row in range(2):
        for block in range(3):
            inside = slice(block * SIZE, min((block + 1) * SIZE, LENGTH))
            count = inside.stop - inside.start
            problem = row * 3 + block
            np.testing.assert_array_equal(folded_q[problem, :, :count], q[row, :, inside])
            np.testing.assert_array_equal(folded_k[problem, :count], k[row, inside])
            np.testing.assert_array_equal(folded_v[problem, :count], v[row, inside])
            np.testing.assert_array_equal(folded_kv_tokens.segment[problem, :count], tokens.segment[row, inside])
            np.testing.assert_array_equal(folded_tokens.position[problem, 1, :count], tokens.position[row, inside])
            assert not folded_kv_tokens.segment[problem, count:].any()
    grad = BackwardInputs(q, lse, np.cos(q), lse)
    dq, dk, dv = flash.backward(q, k, v, q_tokens, tokens, grad)
    for found, expected in ((dq, q + np.cos(q)), (dk, 3 * k), (dv, 5 * v)):
        np.testing.assert_array_equal(found, expected)
