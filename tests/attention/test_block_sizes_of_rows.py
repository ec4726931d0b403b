"""Rows with blocks of several sizes: the mask of each row by a loop, and blocked attention against the dense one."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_equal_to_dense, make_tokens, streams_for

from bd3lm_jax.attention import MaskSpec, Tokens, allowed, blocked, gpu, splash
from bd3lm_jax.attention.blocked import blocked_attention


def mixed_spec(sizes, documents, length, largest=None, min_block_size=None):
    """The training layout; the clean stream lacks its last smallest block."""
    rows = [make_tokens([documents], length, size, 1) for size in sizes]
    position, block, segment = (np.concatenate([getattr(row, name) for row in rows]) for name in (
        "position", "block", "segment"))
    largest, min_block_size = largest or max(sizes), min_block_size or min(sizes)
    clean = Tokens(*(x[:, :length - min_block_size] for x in (position, block, segment)), 0)
    return MaskSpec("block_causal", largest, True, len(documents) == 1, Tokens(position, block, segment, 1), clean,
                    None, min_block_size)


def test_each_row_has_the_mask_of_its_size():
    """BD3-LM's three rules, token by token."""
    sizes, length = (1, 2, 4), 8
    spec = mixed_spec(sizes, [length], length)
    for row, size in enumerate(sizes):
        noised, clean = (Tokens(x.position[row], x.block[row], x.segment[row], noise_sample)
                         for x, noise_sample in ((spec.noised, 1), (spec.clean, 0)))
        for q in range(length):
            own = [k for k in range(length) if allowed("block_causal", at(noised, q), at(noised, k))]
            earlier = [k for k in range(length - 1) if allowed("block_causal", at(noised, q), at(clean, k))]
            assert own == list(range(q // size * size, q // size * size + size))
            assert earlier == list(range(q // size * size))


def at(tokens, i):
    return Tokens(jnp.asarray(tokens.position[i]), jnp.asarray(tokens.block[i]), jnp.asarray(tokens.segment[i]),
                  tokens.noise_sample)


@pytest.mark.ci_slow
@pytest.mark.parametrize(("sizes", "documents", "length", "noise_samples", "clean_output"), [
    ((1, 2, 4, 8, 16), [48], 48, 1, True),
    ((1, 16), [41], 48, 2, True),
    ((4, 8, 32), [64], 64, 1, False),  # blocks over several tiles
    ((2, 20), [60], 60, 2, True),  # blocks that straddle tiles
    ((1, 4), [8, 12], 24, 1, True),  # packed documents, padding
    ((1, 40), [40], 40, 1, True),  # the largest is the row
    ((8,), [40], 40, 1, True),
])
def test_blocked_attention_is_dense_attention(monkeypatch, sizes, documents, length, noise_samples, clean_output):
    monkeypatch.setattr(blocked, "TILE", 16)
    monkeypatch.setattr(blocked, "OWN_TILE", 8)
    spec = mixed_spec(sizes, documents, length)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 2, 1, noise_samples, clean_output))


@pytest.mark.ci_slow
def test_a_batch_may_lack_some_of_the_sizes(monkeypatch):
    monkeypatch.setattr(blocked, "TILE", 16)
    spec = mixed_spec((4, 4), [48], 48, largest=16, min_block_size=1)
    assert_equal_to_dense(blocked_attention, spec, *streams_for(spec, 1, 1, 1, True))


def test_kernels_with_one_mask_for_all_rows_refuse():
    spec = mixed_spec((1, 4), [64], 64)
    for reason in (splash.unsupported_reason(spec, 64, jnp.float32, 64), gpu.unsupported_reason(spec, 64,
                                                                                                jnp.bfloat16)):
        assert "blocks of several sizes" in reason
    assert splash.unsupported_reason(spec.replace(min_block_size=None), 64, jnp.float32, 64) is None
