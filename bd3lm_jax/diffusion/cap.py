"""Masked diffusion with a confidence-aware loss (LLaDA2's CAP, arXiv 2512.15745), for decoding many tokens at a time.

    loss = NELBO a token + coefficient * mean over copies of H,    H = mean over i right of entropy(p_i),

p_i the prediction (SUBS) at a masked position i, right where argmax p_i = x_i. Nothing is learnt through "right": the
gradient is that of the entropies, so the network grows surer of what it has right, and no surer of what it has wrong.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import Masked, cross_entropy_subs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap(Masked):
    """As `Masked`, with the entropies of right predictions.

    The mean H of a copy (0 where nothing is right) counts every right position alike, as published: the weights of the
    NELBO (1 / k, 1 / t) are not applied to it. Means over copies count a row by its tokens, like the NELBO.

    Raises:
        UserError: as `Masked`, or the coefficient is negative.
    """

    kind: ClassVar[str] = "cap"
    title: ClassVar[str] = "CAP"
    corruption: str = "exact_count"
    coefficient: float = 1.0  # nats of loss a nat of entropy

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.coefficient < math.inf:
            raise UserError(f"diffusion.coefficient is {self.coefficient}, expected at least 0, e.g. 1.0")

    @property
    def is_bound(self) -> bool:
        return False

    def token_loss(self, logits_NxV: jax.Array, target_N: jax.Array, xt_N: jax.Array, sigma_N: jax.Array,
                   mask_id: int) -> jax.Array:
        """Cross-entropy in nats, float32 [N]."""
        del xt_N, sigma_N
        return cross_entropy_subs(logits_NxV, target_N, mask_id)

    def mean_term(self, logits_NxV: jax.Array, target_N: jax.Array, xt_N: jax.Array, sigma_N: jax.Array,
                  mask_id: int) -> tuple[jax.Array, jax.Array]:
        """coefficient * entropy in nats, float32 [N], and where the prediction is right, bool [N]."""
        del xt_N, sigma_N
        logits_NxV = jnp.where(jnp.arange(logits_NxV.shape[-1]) == mask_id, -1e30, logits_NxV)
        log_p_NxV = jax.nn.log_softmax(logits_NxV, axis=-1)
        p_NxV = jnp.exp(log_p_NxV)
        entropy_N = -jnp.sum(jnp.where(p_NxV > 0, p_NxV * log_p_NxV, 0), axis=-1)
        return self.coefficient * entropy_N, jnp.argmax(logits_NxV, axis=-1) == target_N
