"""A noise schedule: alpha(t) = (1 - t)^2, which masks half of the tokens by t = 0.29.

    python -m launch train --import=examples.plugins.schedule --config.diffusion.schedule=early \
        --config.diffusion.corruption=bernoulli --workdir=runs/early
"""

import dataclasses

import jax.numpy as jnp

from bd3lm_jax.diffusion.schedule import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Early:
    """The methods of a schedule, as bd3lm_jax/diffusion/schedule.py explains them."""

    def mask_prob(self, t):
        return t * (2 - t)  # 1 - alpha(t), exact for small t

    def weight(self, t):
        return 2 * (1 - t) / self.mask_prob(t)  # -alpha'(t) / (1 - alpha(t))

    def inverse(self, mask_prob):
        return mask_prob / (1 + jnp.sqrt(1 - mask_prob))


SCHEDULES["early"] = Early()
