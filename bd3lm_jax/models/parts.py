"""Pieces that several networks share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def rotate(x, rotary):
    """RoPE, half-split layout (arXiv 2104.09864): x `[..., T, H, Dh]`, rotary cos and sin `[..., T, 1, R / 2]`.

    The first R <= Dh numbers of a head turn, the others stay.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def dropped(x, row_keys, index: int, rate: float):
    """Dropout with one key a row, so that the noise does not depend on how rows are grouped; row_keys None: none.

    index: tells the places of a layer apart.
    """
    if row_keys is None or rate == 0:
        return x
    kept = 1 - rate

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, index), kept, x.shape[1:])
    return jnp.where(jax.vmap(keep)(row_keys), x / kept, 0)


def float32_products(*args, **kwargs):
    """A matrix product that accumulates and returns float32 whatever the compute dtype: for output layers."""
    kwargs["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(*args, **kwargs)


def rms_norm(eps: float, dtype: Any) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), float32 inside."""
    return nn.RMSNorm(epsilon=eps, dtype=dtype)
