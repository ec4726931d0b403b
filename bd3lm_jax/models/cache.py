"""Keys and values of finished tokens, as the trunk keeps them between calls."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from bd3lm_jax.attention import Tokens

DTYPES = ("compute", "float32", "bfloat16", "int8")  # "compute": that of the network


class Int8(NamedTuple):
    """Keys or values as integers, and a float32 scale for each token and head."""

    integers: jax.Array
    scale: jax.Array


class Cache(flax.struct.PyTreeNode):
    """Keys and values of finished tokens: by layer group, for each layer `[B, Hkv, Dh, P]` (an array or `Int8`), so
    that no call cuts a layer out of a stack or transposes it; what the mask needs `[B, P]`.

    empty (static): nothing is stored yet, so nothing attends to it.
    """

    keys: dict[str, tuple]
    values: dict[str, tuple]
    position: jax.Array
    block: jax.Array
    segment: jax.Array
    empty: bool = flax.struct.field(pytree_node=False)

    def tokens(self) -> Tokens:
        return Tokens(self.position, self.block, self.segment, 0)

    def write(self, stored: dict[str, tuple], stream: Any, start) -> "Cache":
        """The clean stream's keys and values (by group, stacked) put at slots `start`, `start` + 1, ... of each row.

        start: one for all, or of each row `[B]`.
        """
        def put(buffer, new):
            new = new.astype(buffer.dtype)
            if jnp.ndim(start):
                return jax.vmap(lambda *row: jax.lax.dynamic_update_slice_in_dim(*row, axis=-1))(buffer, new, start)
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis=-1)
        def put_all(buffers, which):
            return {name: tuple(jax.tree.map(put, buffer, quantize_like(jnp.moveaxis(pair[which][i], 1, -1), buffer))
                                for i, buffer in enumerate(buffers[name])) for name, pair in stored.items()}
        info = {name: put(getattr(self, name), getattr(stream, name)) for name in ("position", "block", "segment")}
        return Cache(keys=put_all(self.keys, 0), values=put_all(self.values, 1), empty=False, **info)

    def invalidate(self, start, count: int) -> "Cache":
        """Nobody attends to slots `start` to `start` + `count` - 1 any more."""
        no_segment = jnp.zeros((self.segment.shape[0], count), jnp.int32)
        return self.replace(segment=jax.lax.dynamic_update_slice_in_dim(self.segment, no_segment, start, axis=1))

    def shift_slots(self, shift) -> "Cache":
        """Slot i moves to slot i + `shift`, the last ones to the front."""
        return jax.tree.map(lambda x: jnp.roll(x, shift, axis=-1), self)


def quantize_like(x, like):
    """Keys or values as the cache keeps them."""
    if not isinstance(like, Int8):
        return x
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-2, keepdims=True).astype(jnp.float32), 1e-12) / 127
    return Int8(jnp.round(x.astype(jnp.float32) / scale), scale)


def dequantize(stored, dtype):
    """Inverse of `quantize_like`, in the dtype that is computed in."""
    if isinstance(stored, Int8):
        return (stored.integers.astype(jnp.float32) * stored.scale).astype(dtype)
    return stored.astype(dtype)
