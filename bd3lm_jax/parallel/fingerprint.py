"""Sums over the bits of arrays: whether they are the same, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.parallel.sharding import block_until_ready_if_simulated


def fingerprints(tree: Any) -> dict[str, int]:
    """Path of every leaf -> a 32-bit sum over its bits that depends on values and positions, not on sharding.

    Any single wrong element changes it for certain, other damage is missed with probability 2^-32.
    """
    return {path: sums[0] for path, sums in fingerprints_by_device(tree).items()}


def fingerprints_by_device(tree: Any) -> dict[str, list[int]]:
    """`fingerprints` as each device of this process computes them, of its own replica of what is not sharded."""
    sums = {path: block_until_ready_if_simulated(_fingerprint(leaf)) for path, leaf in named_leaves(tree)}
    by_device = jax.device_get({path: [shard.data for shard in value.addressable_shards]
                                for path, value in sums.items()})
    return {path: list(map(int, values)) for path, values in by_device.items()}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum of (bits of the element) times (odd hash of its position), modulo 2^32."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = (position ^ (position >> 16)) * jnp.uint32(0x7FEB352D)
    position = (position ^ (position >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(bits * ((position ^ (position >> 16)) | 1), dtype=jnp.uint32)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf; the parts of a path are joined by a slash."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]
