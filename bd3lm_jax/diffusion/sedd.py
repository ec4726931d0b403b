"""Score entropy discrete diffusion, absorbing (SEDD, arXiv 2310.16834)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import independent
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective


@dataclasses.dataclass(frozen=True)
class SEDD(Objective):
    """The network gives log scores; sigma(t) = -log(1 - (1-e) t), so that 1 - alpha = (1-e) t, and t ~ U[e, 1].

    At a masked token, for every other token y, log s_y = net_y - log(expm1 sigma) - log(V - 1), and the loss is

        sigma' [ sum_y s_y - r log s_x0 + r (log r - 1) ],    r = 1 / expm1(sigma) = alpha / (1 - alpha).

    With s_y = r z_y, Z = sum_y z_y and sigma' r = -alpha' / (1 - alpha) = 1 / t that is

        (1/t) [ Z - 1 - log z_x0 ] = (1/t) [ (Z - 1 - log Z) + CE ],    CE = -log(z_x0 / Z).

    Z - 1 - log Z >= 0, and 0 where Z = 1. So normalising the scores leaves the cross-entropy of masked diffusion, whose
    bound by the common masks is never above the bound by score entropy, and equal to it where the scores are tied to
    probabilities (Z = 1): the estimators and samplers of masked diffusion apply, the network reading sigma.

    With `corruption` "bernoulli" times below e and mask probabilities above 1 - e are left out, about e times the loss
    of a token masked almost alone and e times that of one masked with all others, in nats a token; "exact_count" (as in
    `Masked`) leaves out nothing. The network never sees a level above that of 1 - e.
    """

    kind: ClassVar[str] = "sedd"
    title: ClassVar[str] = "SEDD"
    needs_time_conditioning: ClassVar[bool] = True
    predicts_scores: ClassVar[bool] = True
    block_size: int = 4  # tokens a block
    corruption: str = "bernoulli"  # "bernoulli" (as published), "exact_count"
    eps: float = 1e-3  # e

    def __post_init__(self):
        Masked(**self._masked())
        if not self.eps < 0.5:
            raise UserError(f"diffusion.eps is {self.eps}, expected below 0.5, e.g. 1e-3")

    @property
    def is_bound(self) -> bool:
        return self.corruption == "exact_count"

    @property
    def bound(self) -> "SEDD":
        return dataclasses.replace(self, corruption="exact_count")

    @property
    def sigma_max(self) -> float:
        return -math.log(self.eps)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """As `Masked.corrupt`."""
        if self.corruption == "exact_count":
            return Masked(**self._masked()).corrupt(key, x0_BxL, segment_BxL, noise_samples, mask_id, end_id)
        noise_draw = independent.sample_noise(key, x0_BxL.shape, noise_samples, self.block_size)
        t_BxMxK = self.eps + (1 - self.eps) * noise_draw.time_BxMxK
        prob_BxMxK = (1 - self.eps) * t_BxMxK
        return independent.apply_masks(noise_draw.order_BxMxL, prob_BxMxK, (1 - self.eps) / t_BxMxK,
                                       independent.sigma_of_mask_prob(prob_BxMxK), x0_BxL, segment_BxL, mask_id)

    @staticmethod
    def token_loss(logits_NxV: jax.Array, target_N: jax.Array, xt_N: jax.Array, sigma_N: jax.Array,
                   mask_id: int) -> jax.Array:
        """Score entropy over sigma' r, `Z - 1 - log z_x0`, float32 `[N]`; see `Objective.token_loss`."""
        log_z_NxV = logits_NxV - math.log(logits_NxV.shape[-1] - 1)
        log_z_NxV = jnp.where(jnp.arange(logits_NxV.shape[-1]) == mask_id, -jnp.inf, log_z_NxV)
        return jnp.exp(log_z_NxV).sum(-1) - 1 - jnp.take_along_axis(log_z_NxV, target_N[:, None], axis=-1)[:, 0]

    def _masked(self) -> dict:
        plain = dataclasses.asdict(Masked.uniform_counts(self.block_size))
        return plain | {"corruption": self.corruption, "eps": self.eps}
