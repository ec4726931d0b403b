"""A backend against the dense oracle on small random examples, outputs and gradients, on the device at hand."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import MaskSpec, Tokens


def example(rows: Sequence[Sequence[int]], length: int, block_size: int, heads: int, kv_heads: int, head_size: int,
            dtype) -> tuple[MaskSpec, tuple, tuple]:
    """Training attention: mask, noised (q, k, v) `[B, 1, L, H, Dh]`, clean (q, k, v) `[B, L - S, H, Dh]`, random.

    rows: for each row the lengths of its documents, every one but the last a multiple of block_size; the rest of the
    row is padding.
    """
    position_BxL, segment_BxL = np.zeros((2, len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        ends = np.cumsum(documents)
        for index, (size, end) in enumerate(zip(documents, ends)):
            position_BxL[row, end - size:end] = np.arange(size)
            segment_BxL[row, end - size:end] = index + 1
    noised = Tokens(position_BxL, position_BxL // block_size, segment_BxL, 1)
    clean_length = length - block_size
    clean = Tokens(*(x[:, :clean_length] for x in (position_BxL, position_BxL // block_size, segment_BxL)),
                   noise_sample=0)
    spec = MaskSpec("block_causal", block_size, True, all(len(row) == 1 for row in rows), noised, clean, None)
    rng = np.random.default_rng(0)
    def stream(*shape):
        return tuple(jnp.asarray(rng.normal(size=(*shape, n, head_size)), dtype) for n in (heads, kv_heads, kv_heads))
    return spec, stream(len(rows), 1, length), stream(len(rows), clean_length)


def tolerance(dtype) -> float:
    """The largest difference that is rounding: about 5e-7 in float32 and 0.005 in bfloat16 are usual, while a merge
    that loses the gradient of its log-sum-exp is 0.1 off."""
    return 1e-4 if jnp.dtype(dtype) == jnp.float32 else 0.02


def largest_difference(attend: Callable, spec: MaskSpec, noised, clean) -> float:
    """The worst |x - x'| / |x'| (Euclidean norms) of an output or gradient x of `attend`, x' from the dense oracle.

    The oracle computes from the same values in float32. NaN if anything is not finite.
    """
    def run(attend, streams):
        def projected(streams):
            outputs = attend(spec, *streams, None)
            return sum(jnp.sum(jnp.sin(3.0 * x.astype(jnp.float32))) for x in outputs), outputs
        gradients, outputs = jax.grad(projected, has_aux=True)(streams)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (outputs, gradients))

    def error(actual, expected):
        return jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda streams: run(dense_attention, streams))(
            jax.tree.map(lambda x: x.astype(jnp.float32), (noised, clean)))
        actual = jax.jit(lambda streams: run(attend, streams))((noised, clean))
        return float(jnp.max(jnp.stack([error(*pair) for pair in zip(*map(jax.tree.leaves, (actual, expected)))])))
