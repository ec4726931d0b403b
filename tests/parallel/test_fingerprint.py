"""Fingerprints of arrays: any bit and any place that changes is seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax.parallel.fingerprint import fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_fingerprint_sees_every_bit_and_every_swap(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 7)), dtype))
    before = fingerprints(x)[""]
    raw = x.view(np.uint8).reshape(-1)
    for position in range(0, raw.size, 3):
        for bit in range(1 if dtype == "bool" else 8):
            changed = raw.copy()
            changed[position] ^= 1 << bit
            assert fingerprints(changed.view(x.dtype).reshape(x.shape))[""] != before
    swapped = np.ascontiguousarray(x[::-1])
    assert fingerprints(swapped)[""] != before
    assert fingerprints(x.copy())[""] == before


def test_fingerprint_tells_zero_from_minus_zero():
    assert fingerprints(jnp.zeros(3)) != fingerprints(-jnp.zeros(3))
