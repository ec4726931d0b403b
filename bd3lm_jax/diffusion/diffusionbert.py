"""DiffusionBERT (arXiv 2211.15029): the spindle schedule, which masks rare tokens first, without a level as input."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective, check_rows
from bd3lm_jax.diffusion.schedule import stratified_uniform

ALPHA_MAX = 0.999  # every token is masked at least so rarely: 1 - alpha, and with it the weight, stays finite


@dataclasses.dataclass(frozen=True)
class DiffusionBERT(Objective):
    """Token i of a block is masked at time t ~ U(0, 1) with probability 1 - alpha_i(t),

        alpha_i(t) = clip(1 - t + lambda sin(pi t) (f_i - mean f), 0, .999),

    and counts -alpha_i'(t) / (1 - alpha_i(t)) times its cross-entropy, alpha_i' before the clip. f = log(1 + count) /
    max is the batch's `density`, large for common tokens; its mean is over the tokens of the block that are no padding.

    The rates depend on the tokens that they hide, so the loss is a heuristic and no bound: a masked position tells
    something of its token. The likelihood is that of `estimators.py`, under the uniform schedule. For the same reason
    the level that is handed on is that of a token of mean frequency, the same for a whole block.

    Raises:
        UserError: a hyperparameter is out of range.
    """

    kind: ClassVar[str] = "diffusionbert"
    title: ClassVar[str] = "DiffusionBERT"
    extra_batch_keys: ClassVar[tuple[str, ...]] = ("density",)
    block_size: int = 4
    strength: float = 0.3  # lambda; 0 is the uniform schedule

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.strength < 1 / math.pi:
            raise UserError(f"diffusion.strength is {self.strength}, expected 0 to {1 / math.pi:.4f} (1 / pi): beyond "
                            "it tokens would be uncovered again as the noise grows")

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int, density: jax.Array) -> Noised:
        """`noise_samples` noised copies of a batch; times are stratified over all its rows, copies and blocks.

        density: f of every token, float32 `[B, L]`. The rest as for `Masked.corrupt`.
        """
        batch, length = x0_BxL.shape
        check_rows(noise_samples, length, self.block_size)
        level_key, token_key = jax.random.split(key)
        t_BxMxK = stratified_uniform(level_key, (batch, noise_samples, length // self.block_size))
        t_BxMxL = jnp.repeat(t_BxMxK, self.block_size, axis=-1)
        maskable_BxL = segment_BxL != 0
        deviation_BxL = _from_block_mean(density, maskable_BxL, self.block_size)
        alpha_BxMxL, slope_BxMxL = spindle(t_BxMxL, deviation_BxL[:, None], self.strength)
        masked_BxMxL = (jax.random.uniform(token_key, t_BxMxL.shape) < 1 - alpha_BxMxL) & maskable_BxL[:, None]
        return Noised(
            xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
            weight_BxMxL=jnp.where(masked_BxMxL, -slope_BxMxL / (1 - alpha_BxMxL), 0),
            sigma_BxMxK=-jnp.log1p(-jnp.minimum(t_BxMxK, MASK_PROB_MAX)),
            capacity=length,
        )


def spindle(t, deviation, strength: float) -> tuple[jax.Array, jax.Array]:
    """alpha(t) and its derivative in t (before the clip), for times and f - mean f of shapes that broadcast."""
    alpha = 1 - t + strength * jnp.sin(jnp.pi * t) * deviation
    slope = -1 + strength * jnp.pi * jnp.cos(jnp.pi * t) * deviation
    return jnp.clip(alpha, 0, ALPHA_MAX), slope


def _from_block_mean(density_BxL, maskable_BxL, block_size: int):
    """f - mean f over the maskable tokens of the block."""
    f, maskable = (x.reshape(x.shape[0], -1, block_size) for x in (density_BxL, maskable_BxL))
    mean = jnp.where(maskable, f, 0).sum(-1) / jnp.maximum(maskable.sum(-1), 1)
    return (f - mean[..., None]).reshape(density_BxL.shape)
