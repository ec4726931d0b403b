"""Discrete-time absorbing diffusion (D3PM, arXiv 2107.03006)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import independent
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective


@dataclasses.dataclass(frozen=True)
class D3PM(Objective):
    """T = `steps` noise levels, alpha_i = 1 - i / T; the network predicts x0 and never the mask token (SUBS).

        T E_i[ (alpha_{i-1} - alpha_i) / (1 - alpha_i) * sum over masked of CE ] + hybrid E_i[ sum over masked of CE ]

    with i uniform in 1..T; the weight is T / i + hybrid. Without the hybrid term (eq. 5, published 0.01) it is the
    bound of the T-step chain, all of it: the last level masks every token, and the first step is the reconstruction.
    It tends to the bound of masked diffusion as T grows.
    """

    kind: ClassVar[str] = "d3pm"
    title: ClassVar[str] = "D3PM"
    block_size: int = 4  # tokens a block
    steps: int = 1000  # T
    hybrid: float = 0.01  # weight of the plain cross-entropy; 0: the bound

    def __post_init__(self):
        for name in ("block_size", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"diffusion.{name} is {getattr(self, name)}, expected at least 1")
        if not self.hybrid >= 0:
            raise UserError(f"diffusion.hybrid is {self.hybrid}, expected at least 0")

    @property
    def is_bound(self) -> bool:
        return self.hybrid == 0

    @property
    def bound(self) -> "D3PM":
        return dataclasses.replace(self, hybrid=0.0)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """`noise_samples` noised copies of a batch, stratified over rows, copies and blocks; arguments as for
        `Masked.corrupt`.
        """
        noise_draw = independent.sample_noise(key, x0_BxL.shape, noise_samples, self.block_size)
        i_BxMxK = jnp.minimum(jnp.floor(noise_draw.time_BxMxK * self.steps) + 1, self.steps)
        prob_BxMxK = i_BxMxK / self.steps
        return independent.apply_masks(noise_draw.order_BxMxL, prob_BxMxK, 1 / prob_BxMxK + self.hybrid,
                                       independent.sigma_of_mask_prob(prob_BxMxK), x0_BxL, segment_BxL, mask_id)
