"""Diffusion on the simplex of the vocabulary, in blocks (SSD-LM, arXiv 2210.17432).

A token x is a vector of logits w_0, +K at x and -K elsewhere. With a cosine schedule alpha_bar and eps ~ N(0, I)

    w_t = sqrt(alpha_bar(t)) w_0 + sqrt(1 - alpha_bar(t)) K eps,    loss = sum over the block of -log p(x | w_t, t),

p from a network that reads softmax(w_t) times its embedding table, and clean tokens before the block. The loss is no
bound on the likelihood, and none is known.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective
from bd3lm_jax.diffusion.schedule import stratified_uniform

OFFSET = 1e-4  # of the cosine: alpha_bar falls from the start
ALPHA_BAR_MIN = 1e-6  # keeps the level -log(alpha_bar) finite


def alpha_bar(t):
    """Signal power that is left at time t: cos^2 of a quarter turn, 1 at t = 0 (arXiv 2102.09672). Any float shape."""
    def cosine(t):
        return jnp.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2
    return cosine(t) / cosine(0.0)


def noisy_logits(ids, eps, alpha_bar, scale: float) -> jax.Array:
    """w of tokens: ids int32 `[...]`, eps `[..., V]`, alpha_bar `[...]` -> float32 `[..., V]`."""
    is_target = jnp.arange(eps.shape[-1]) == ids[..., None]
    signal, noise = jnp.sqrt(alpha_bar)[..., None], jnp.sqrt(1 - alpha_bar)[..., None]
    return scale * (jnp.where(is_target, signal, -signal) + noise * eps)


@dataclasses.dataclass(frozen=True)
class SSDLM(Objective):
    """Every block of a copy has a time of its own, uniform in (0, 1) and stratified over rows, copies and blocks.

    What the network reads takes copies * L * V numbers a row: it is drawn for a microbatch at a time, from a key of its
    row.

    Raises:
        UserError: a hyperparameter is out of range.
    """

    kind: ClassVar[str] = "ssd_lm"
    title: ClassVar[str] = "SSD-LM"
    uses_mask_token: ClassVar[bool] = False
    reads_soft_inputs: ClassVar[bool] = True
    supports_target_shift: ClassVar[bool] = False
    sampler: ClassVar[str] = "simplex"
    block_size: int = 4  # tokens a block; 25 in the paper
    scale: float = 5.0  # K: logits of clean tokens are +-K; 5 in the paper

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.scale < math.inf:
            raise UserError(f"diffusion.scale is {self.scale}, expected a positive number, e.g. 5.0")

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """Levels of `noise_samples` copies, and as `extra` keys `[B, M]` of their noise; every real token has weight 1.

        mask_id, end_id: not used.

        Raises:
            UserError: the block size does not divide L, or `noise_samples` is not positive.
        """
        batch, length = x0_BxL.shape
        if noise_samples < 1 or length % self.block_size:
            raise UserError(f"{noise_samples} copies of {length} tokens, expected at least 1 copy and a multiple of "
                            f"diffusion.block_size={self.block_size} tokens")
        level_key, noise_key = jax.random.split(key)
        t_BxMxK = stratified_uniform(level_key, (batch, noise_samples, length // self.block_size))
        number = jnp.arange(batch)[:, None] * noise_samples + jnp.arange(noise_samples)
        shape = (batch, noise_samples, length)
        return Noised(xt_BxMxL=jnp.broadcast_to(x0_BxL[:, None], shape).astype(jnp.int32),
                      weight_BxMxL=jnp.broadcast_to((segment_BxL != 0)[:, None], shape).astype(jnp.float32),
                      sigma_BxMxK=-jnp.log(jnp.maximum(alpha_bar(t_BxMxK), ALPHA_BAR_MIN)), capacity=length,
                      extra=jax.vmap(jax.vmap(lambda n: jax.random.fold_in(noise_key, n)))(number))

    def inputs(self, noised: Noised, rows: Mapping[str, jax.Array], vocab_size: int) -> NetworkInputs:
        """`soft_inputs` as the noised stream."""
        soft_inputs = self.soft_inputs(noised, rows["tokens"], vocab_size)
        return super().inputs(noised, rows, vocab_size).replace(noised=soft_inputs)

    def soft_inputs(self, noised: Noised, x0_BxL: jax.Array, vocab_size: int) -> jax.Array:
        """softmax(w_t) of every token and copy, float32 `[B, M, L, V]`."""
        length = x0_BxL.shape[-1]
        def eps(key):
            return jax.random.normal(key, (length, vocab_size))
        alpha_bar_BxMxL = jnp.exp(-jnp.repeat(noised.sigma_BxMxK, self.block_size, axis=-1))
        w = noisy_logits(x0_BxL[:, None], jax.vmap(jax.vmap(eps))(noised.extra), alpha_bar_BxMxL, self.scale)
        return jax.nn.softmax(w, axis=-1)
