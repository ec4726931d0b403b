"""The self-test of a backend finds what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some

from bd3lm_jax.attention import check
from bd3lm_jax.attention.reference import dense_attention

SHAPE = {"length": 24, "block_size": 4, "heads": 2, "kv_heads": 1, "head_size": 8}


def test_example_lays_out_documents():
    spec, noised, clean = check.example([[8, 7], [24]], **SHAPE, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(spec.noised.segment[0], [1] * 8 + [2] * 7 + [0] * 9)
    np.testing.assert_array_equal(spec.noised.position[0], [*range(8), *range(7)] + [0] * 9)
    np.testing.assert_array_equal(spec.noised.block[1], np.repeat(range(6), 4))
    np.testing.assert_array_equal(spec.clean.segment, spec.noised.segment[:, :20])
    assert not spec.one_document and check.example([[24], [3]], **SHAPE, dtype=jnp.float32)[0].one_document
    assert [x.shape for x in noised] == [(2, 1, 24, n, 8) for n in (2, 1, 1)]
    assert [x.shape for x in clean] == [(2, 20, n, 8) for n in (2, 1, 1)]
    assert all(x.dtype == jnp.bfloat16 for x in (*noised, *clean))


def sees_a_key_more(spec, noised, clean, cache):
    return dense_attention(spec.replace(noised=spec.noised.replace(block=spec.noised.block + 1)), noised, clean, cache)


def drops_a_gradient(spec, noised, clean, cache):
    return dense_attention(spec, noised, (clean[0], jax.lax.stop_gradient(clean[1]), clean[2]), cache)


def not_finite(spec, noised, clean, cache):
    return jax.tree.map(lambda x: x.at[0].set(jnp.nan), dense_attention(spec, noised, clean, cache))


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16], 0))
@pytest.mark.parametrize("attend, right", [(dense_attention, True), (sees_a_key_more, False), (drops_a_gradient, False),
                                           (not_finite, False)])
def test_wrong_attention_is_beyond_tolerance(attend, right, dtype):
    found = check.largest_difference(attend, *check.example([[24], [15]], **SHAPE, dtype=dtype))
    assert (found <= check.tolerance(dtype)) == right
