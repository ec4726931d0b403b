"""Attention of both streams in parts with separate keys, merged by log-sum-exp and differentiated as a whole.

Each part's flash backward needs the *global* output, log-sum-exp and d output, and public attention calls drop the
gradient of their log-sum-exp: hence one `custom_vjp` around all parts. What a backend chooses is its list of parts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bd3lm_jax.attention.spec import MaskSpec
from bd3lm_jax.attention.tiles import BackwardInputs

SAVED = "attended"  # checkpoint name of outputs and log-sum-exps: a remat policy that saves it recomputes no attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged_attention(parts_of: Callable, spec: MaskSpec, noised, clean):
    """Same contract as `reference.dense_attention`, without a cache and with aligned streams.

    parts_of(spec, noised, clean) -> parts. A part has forward() -> (output, log-sum-exp) of the noised and of the
    clean stream (None: nothing to add), and backward(noised Grad, clean Grad) -> float32 gradients of (q, k, v) of
    both streams (None each: no share).
    """
    return _merged_forward(parts_of, spec, noised, clean)[0]


def _merged_forward(parts_of, spec, noised, clean):
    results = zip(*(part.forward() for part in parts_of(spec, noised, clean)))
    dtypes = (None if noised is None else noised[0].dtype, None if clean is None else clean[1].dtype)
    merged = tuple(_merge(partial, dtype) for partial, dtype in zip(results, dtypes))
    merged = checkpoint_name(merged, SAVED)
    return tuple(out for out, _ in merged), (spec, noised, clean, merged)


def _merge(partial, dtype):
    """[(output, log-sum-exp) or None] of one stream -> the same of all its keys together."""
    partial = [result for result in partial if result is not None]
    if not partial:
        return None, None
    outs, lses = zip(*partial)
    lse = functools.reduce(jnp.logaddexp, lses)
    if len(outs) == 1:
        return outs[0].astype(dtype), lse
    out = sum((out * jnp.exp(x - lse)[..., None] for out, x in zip(outs, lses)), jnp.zeros((), jnp.float32))
    return out.astype(dtype), lse


def _merged_backward(parts_of, residuals, d_outs):
    spec, noised, clean, merged = residuals
    grads = [_global(out, lse, d_out) for (out, lse), d_out in zip(merged, d_outs)]
    d_noised, d_clean = [None] * 3, [None] * 3
    for part in parts_of(spec, noised, clean):
        of_noised, of_clean = part.backward(*grads)
        d_noised, d_clean = list(map(_add, d_noised, of_noised)), list(map(_add, d_clean, of_clean))
    return _no_gradient(spec), _cast_like(d_noised, noised), _cast_like(d_clean, clean)


merged_attention.defvjp(_merged_forward, _merged_backward)


def _global(out, lse, d_out) -> BackwardInputs | None:
    if out is None:
        return None
    d_out = d_out.astype(jnp.float32)
    return BackwardInputs(out, lse, d_out, jnp.sum(d_out * out, axis=-1))


def _add(total, share):
    return total if share is None else share if total is None else total + share


def _cast_like(grads, values):
    return None if values is None else tuple(None if x is None else d.astype(x.dtype) for d, x in zip(grads, values))


def _no_gradient(spec: MaskSpec):
    """The cotangent that integers take."""
    return jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), spec)
