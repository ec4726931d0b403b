"""Tokens noised independently of each other at a random time of their block: the draws that many objectives share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import check_rows
from bd3lm_jax.diffusion.schedule import stratified_uniform


class NoiseDraw(NamedTuple):
    """time_BxMxK in (0, 1), stratified over all rows, copies and blocks; order_BxMxL in [0, 1) decides on each
    token."""

    time_BxMxK: jax.Array
    order_BxMxL: jax.Array


def sample_noise(key: jax.Array, shape: tuple[int, ...], noise_samples: int, block_size: int) -> NoiseDraw:
    """The random numbers of `noise_samples` noised copies of a batch of `shape` [B, L].

    Raises UserError if the block size does not divide L, or `noise_samples` is not positive.
    """
    batch, length = shape
    check_rows(noise_samples, length, block_size)
    time_key, order_key = jax.random.split(key)
    return NoiseDraw(stratified_uniform(time_key, (batch, noise_samples, length // block_size)),
                     jax.random.uniform(order_key, (batch, noise_samples, length)))


def apply_masks(order_BxMxL: jax.Array, prob_BxMxn: jax.Array, weight_BxMxn: jax.Array, sigma_BxMxK: jax.Array,
                x0_BxL: jax.Array, segment_BxL: jax.Array, mask_id: int) -> Noised:
    """Every token of a document masked with its probability. prob and weight: of each n-th part of the row."""
    prob_BxMxL, weight_BxMxL = (per_token(x, x0_BxL.shape[1]) for x in (prob_BxMxn, weight_BxMxn))
    masked_BxMxL = (order_BxMxL < prob_BxMxL) & (segment_BxL != 0)[:, None]
    return Noised(xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
                  weight_BxMxL=jnp.where(masked_BxMxL, weight_BxMxL, 0), sigma_BxMxK=sigma_BxMxK,
                  capacity=x0_BxL.shape[1])


def per_token(x_BxMxn: jax.Array, length: int) -> jax.Array:
    """A number of each n-th part of a row, at every token `[B, M, L]`."""
    return jnp.repeat(x_BxMxn, length // x_BxMxn.shape[-1], axis=-1)


def sigma_of_mask_prob(mask_prob: jax.Array) -> jax.Array:
    """Noise level sigma = -log(alpha) of a mask probability, finite."""
    return -jnp.log1p(-jnp.minimum(mask_prob, MASK_PROB_MAX))
