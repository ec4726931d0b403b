"""Cross-entropy of a network's output layer without the matrix of all logits.

Positions go through the output layer in chunks. The gradient is found in the forward pass, where the chunk's softmax is
at hand: three matrix products in all, as many as backpropagation needs, and no logits kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.attention import target_platform

NEG_INF = -1e30  # logit of what cannot be predicted; finite, so that its gradient is 0 and not NaN
CPU_LOGITS, ACCELERATOR_LOGITS = 34 * 2**20, 256 * 2**20  # bytes of a chunk's logits: few, and enough work a chunk
GRADIENT_SLICES = 8  # the output layer's gradient grows by slices of its rows: no second copy of it


class OutputLayer(NamedTuple):
    """The output layer: logits = features @ kernel + bias, in the features' dtype with float32 results."""

    kernel_DxV: jax.Array
    bias_V: jax.Array

    def exclude_tokens(self, mask_id: int, vocab_size: int) -> "OutputLayer":
        """The same layer where the mask token (SUBS; -1: none) and rows from `vocab_size` on have probability 0."""
        ids = jnp.arange(self.bias_V.shape[0])
        return self._replace(bias_V=jnp.where((ids == mask_id) | (ids >= vocab_size), NEG_INF, self.bias_V))


def chunk_positions(positions: int, vocab_size: int, chunk: int) -> int:
    """Positions a chunk: `chunk`, or for 0 what keeps the logits of a chunk small; never more than needed."""
    if chunk == 0:
        budget = CPU_LOGITS if target_platform() == "cpu" else ACCELERATOR_LOGITS
        chunk = max(budget // (4 * vocab_size), 1)
    chunks = -(-positions // chunk)
    return -(-positions // chunks)


def token_losses(output: OutputLayer, features_GxNxD, target_GxN, chunk: int) -> jax.Array:
    """-log p(target) in nats, float32 `[G, N]`, for evaluation (its derivative would store the logits).

    chunk: positions of each group at a time, 0 for automatic. A target that cannot be predicted has a huge loss.
    """
    positions = target_GxN.shape[1]
    chunk = chunk_positions(positions, output.bias_V.shape[0], chunk)
    losses = jax.lax.map(lambda xs: _losses(output, *xs)[0],
                         (_split_chunks(features_GxNxD, chunk), _split_chunks(target_GxN, chunk)))
    return _merge_chunks(losses, positions)


TokenLoss = Callable[..., Any]  # (logits_NxV float32, target_N, *more_N) -> float32 [N], or a tree of arrays [N]


def custom_token_losses(output: OutputLayer, token_loss: TokenLoss, vocab_size: int, features_GxNxD, target_GxN,
                        extra_GxN: tuple,
                        chunk: int) -> Any:
    """Any loss of single positions, float32 `[G, N]`, or a tree of them; the backward pass computes each chunk's logits
    again.

    more_GxN: further arrays that `token_loss` takes, after logits and target.
    """
    positions = target_GxN.shape[1]
    chunk = chunk_positions(positions, output.bias_V.shape[0], chunk)

    @jax.checkpoint
    def losses(xs):
        x, *arrays = xs
        logits = _logits(output, x)[..., :vocab_size]
        flat = token_loss(logits.reshape(-1, vocab_size), *(array.reshape(-1) for array in arrays))
        return jax.tree.map(lambda x: x.reshape(logits.shape[:2]), flat)

    cut = tuple(_split_chunks(x, chunk) for x in (features_GxNxD, target_GxN, *extra_GxN))
    return jax.tree.map(lambda x: _merge_chunks(x, positions), jax.lax.map(losses, cut))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_total(output: OutputLayer, features_GxNxD, target_GxN, weight_GxN, chunk: int) -> jax.Array:
    """Sum of weight * -log p(target) in nats, float32 scalar; differentiable in all floats.

    Positions with weight 0 count nothing. Rows that lie on one device form a group g: the gradient of the output layer
    is summed over a group's chunks first and over groups once, so a sharded batch needs one reduction, not one a chunk.
    """
    return jnp.sum(token_losses(output, features_GxNxD, target_GxN, chunk) * weight_GxN)


def _total_forward(output, features_GxNxD, target_GxN, weight_GxN, chunk):
    groups, positions, depth = features_GxNxD.shape
    vocab = output.bias_V.shape[0]
    chunk = chunk_positions(positions, vocab, chunk)
    slices = GRADIENT_SLICES if depth % GRADIENT_SLICES == 0 else 1

    def step(carry, xs):
        d_kernel, d_bias = carry
        x, target, weight = xs
        losses, logits, lse, is_target = _losses(output, x, target)
        d_logits = (jnp.exp(logits - lse[..., None]) - is_target) * weight[..., None]
        d_logits_low_precision = d_logits.astype(x.dtype)
        d_x = jnp.einsum("gnv,dv->gnd", d_logits_low_precision, output.kernel_DxV.astype(x.dtype),
                         preferred_element_type=jnp.float32)

        def accumulate_slice(s, d_kernel):
            part = jax.lax.dynamic_slice_in_dim(x, s * (depth // slices), depth // slices, axis=2)
            part = jnp.einsum("gnd,gnv->gdv", part, d_logits_low_precision, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_index_in_dim(
                d_kernel, jax.lax.dynamic_index_in_dim(d_kernel, s, 1, keepdims=False) + part, s, 1)

        d_kernel = jax.lax.fori_loop(0, slices, accumulate_slice, d_kernel)
        return (d_kernel, d_bias + d_logits.sum(1)), (d_x.astype(x.dtype), losses)

    init = (jnp.zeros((groups, slices, depth // slices, vocab)), jnp.zeros((groups, vocab)))
    xs = tuple(_split_chunks(x, chunk) for x in (features_GxNxD, target_GxN, weight_GxN))
    (d_kernel, d_bias), (d_features, losses) = jax.lax.scan(step, init, xs)
    d_output = OutputLayer(d_kernel.sum(0).reshape(depth, vocab), d_bias.sum(0))
    losses = _merge_chunks(losses, positions)
    return jnp.sum(losses * weight_GxN), (d_output, _merge_chunks(d_features, positions), losses)


def _total_backward(chunk, residuals, d_total):
    del chunk
    d_output, d_features, losses = jax.tree.map(lambda x: (x * d_total).astype(x.dtype), residuals)
    return d_output, d_features, None, losses


weighted_total.defvjp(_total_forward, _total_backward)


def _losses(output: OutputLayer, x_GxNxD, target_GxN):
    """-log p(target) `[G, N]`, logits `[G, N, V]`, their log-sum-exp `[G, N]`, and where the target is `[G, N, V]`."""
    logits = _logits(output, x_GxNxD)
    lse = jax.nn.logsumexp(logits, axis=-1)
    is_target = jnp.arange(logits.shape[-1]) == target_GxN[..., None]  # a comparison, not a gather: V may be sharded
    return lse - jnp.sum(jnp.where(is_target, logits, 0), axis=-1), logits, lse, is_target


def _logits(output: OutputLayer, x_GxNxD):
    kernel = output.kernel_DxV.astype(x_GxNxD.dtype)
    return jnp.einsum("gnd,dv->gnv", x_GxNxD, kernel, preferred_element_type=jnp.float32) + output.bias_V


def _split_chunks(x_GxN, chunk: int):
    """`[G, N, ...]` -> `[n, G, chunk, ...]`, zeros after the end."""
    chunks = -(-x_GxN.shape[1] // chunk)
    x = jnp.pad(x_GxN, [(0, chunks * chunk - x_GxN.shape[1] if axis == 1 else 0) for axis in range(x_GxN.ndim)])
    return x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]).swapaxes(0, 1)


def _merge_chunks(x, positions: int):
    """Inverse of `_split_chunks`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :positions]
