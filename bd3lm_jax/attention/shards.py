"""Attention on every device's own rows and heads, for calls that the compiler cannot divide by itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bd3lm_jax.attention.spec import MaskSpec
from bd3lm_jax.parallel.sharding import BATCH_AXES, divisible_axes


def per_device(attend: Callable, spec: MaskSpec, noised, clean):
    """`attend(spec, noised, clean)` without communication: rows split over the batch axes of the mesh in use and heads
    over its axis "tensor", as far as these divide them; without a mesh the plain call."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return attend(spec, noised, clean)
    keys = (noised or clean)[1]
    rows, heads = divisible_axes(mesh, BATCH_AXES, keys.shape[0]), divisible_axes(mesh, ("tensor",), keys.shape[-2])
    stream = {4: P(rows, None, heads), 5: P(rows, None, None, heads)}  # [B, C, H, Dh], [B, M, T, H, Dh]
    qkv = jax.tree.map(lambda x: stream[x.ndim], (noised, clean))
    tokens = jax.tree.map(lambda x: P(rows) if jnp.ndim(x) else P(), spec)
    outputs = tuple(None if x is None else x[0] for x in qkv)
    return jax.shard_map(attend, in_specs=(tokens, *qkv), out_specs=outputs, axis_names=set(mesh.auto_axes),
                         check_vma=False)(spec, noised, clean)
