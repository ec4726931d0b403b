"""Masked diffusion where every token of the vocabulary learns its own schedule (GenMD4, arXiv 2406.04329)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import independent
from bd3lm_jax.diffusion.learned_noise import LearnedNoise
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised


@dataclasses.dataclass(frozen=True)
class GenMD4(LearnedNoise):
    """alpha_v(t) = 1 - (1-e) t^w_v for token v, w learned; t ~ U(0, 1).

    A masked token that is v comes back at rate -alpha_v' / (1 - alpha_v) = w_v / t, in the model at w_v mu_v / t with
    the network's probability mu_v. The bound is how far these rates differ (vector weight, in place of w CE / t):

        E_t (1/t) sum over masked of [ w_x0 (CE - 1) + sum over v of w_v mu_v ]

    With all w equal that is MD4 with the schedule "polynomial:w". Which tokens are masked depends on w, too: that part
    of the gradient is estimated from two masks at the same t, (f_1 - f_2) (grad log q(M_1) - grad log q(M_2)) / 2 a
    block, f its loss (REINFORCE, leave one out). So copies come in pairs.

    e leaves out mask probabilities above 1 - e, about e times the loss of a token masked with all others; with e = 0
    the loss is a bound under these schedules. That w does not enter evaluation: masked tokens tell of the values of
    others here, and the common estimators mask all tokens alike.
    """

    kind: ClassVar[str] = "genmd4"
    title: ClassVar[str] = "GenMD4"
    noise_sample_multiple: ClassVar[int] = 2
    bound: ClassVar[None] = None  # for a network alone, without w
    block_size: int = 4  # tokens a block
    power: float = 1.0  # every w at the start
    eps: float = 1e-4  # e

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.power < math.inf:
            raise UserError(f"diffusion.power is {self.power}, expected a positive number, e.g. 1.0")
        if not 0 <= self.eps < 0.5:
            raise UserError(f"diffusion.eps is {self.eps}, expected from 0 to below 0.5, e.g. 1e-4")

    @property
    def is_bound(self) -> bool:
        return self.eps == 0

    def init_learned_params(self, key: jax.Array, vocab_size: int, width: int) -> dict[str, jax.Array]:
        """log w of every token, float32 `[V]`."""
        del key, width
        return {"log_w": jnp.full(vocab_size, math.log(self.power), jnp.float32)}

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int, learned_params: dict[str, jax.Array]) -> Noised:
        """`noise_samples` noised copies of a batch, each two at the same times; further arguments as for
        `Masked.corrupt`.

        Raises UserError for an odd number of copies.
        """
        if noise_samples % 2:
            raise UserError(f"noise_samples is {noise_samples}, diffusion.kind='genmd4' needs an even number")
        time_key, order_key = jax.random.split(key)
        times = independent.sample_noise(time_key, x0_BxL.shape, noise_samples // 2, self.block_size).time_BxMxK
        t_BxMxK = jnp.repeat(times, 2, axis=1)
        order_BxMxL = jax.random.uniform(order_key, (x0_BxL.shape[0], noise_samples, x0_BxL.shape[1]))
        prob_BxMxL = jnp.exp(self._log_mask_prob(learned_params, x0_BxL, t_BxMxK))
        return independent.apply_masks(order_BxMxL, prob_BxMxL, 1 / t_BxMxK,
                                       independent.sigma_of_mask_prob((1 - self.eps) * t_BxMxK), x0_BxL, segment_BxL,
                                       mask_id)

    @staticmethod
    def token_loss(logits_NxV: jax.Array, target_N: jax.Array, xt_N: jax.Array, sigma_N: jax.Array, mask_id: int,
                   learned_params: dict[str, jax.Array]) -> jax.Array:
        """What 1/t multiplies, float32 `[N]`; see `Objective.token_loss`."""
        log_mu_NxV = jnp.where(jnp.arange(logits_NxV.shape[-1]) == mask_id, -1e30, logits_NxV)
        log_mu_NxV = jax.nn.log_softmax(log_mu_NxV, axis=-1)
        w_V = jnp.exp(learned_params["log_w"])
        ce_N = -jnp.take_along_axis(log_mu_NxV, target_N[:, None], axis=-1)[:, 0]
        return w_V[target_N] * (ce_N - 1) + jnp.exp(log_mu_NxV) @ w_V

    def noise_gradient(self, learned_params: dict[str, jax.Array], noised: Noised, x0_BxL: jax.Array,
                       segment_BxL: jax.Array, losses_BxMxL: jax.Array) -> dict[str, jax.Array]:
        """The part of the gradient of the summed loss that comes from which tokens are masked."""
        batch, noise_samples, length = losses_BxMxL.shape
        nats_BxMxK = (noised.weight_BxMxL * losses_BxMxL).reshape(batch, noise_samples, -1, self.block_size).sum(-1)
        pairs_BxPx2xK = nats_BxMxK.reshape(batch, noise_samples // 2, 2, -1)
        ahead_BxMxK = (pairs_BxPx2xK - pairs_BxPx2xK[:, :, ::-1]).reshape(nats_BxMxK.shape)
        t_BxMxK = -jnp.expm1(-noised.sigma_BxMxK) / (1 - self.eps)
        masked_BxMxL = noised.weight_BxMxL > 0
        real_BxMxL = jnp.broadcast_to((segment_BxL != 0)[:, None], masked_BxMxL.shape)

        def weighted(learned_params):
            log_prob_BxMxL = self._log_mask_prob(learned_params, x0_BxL, t_BxMxK)
            log_kept_BxMxL = jnp.log1p(-jnp.minimum(jnp.exp(log_prob_BxMxL), MASK_PROB_MAX))
            log_q_BxMxL = jnp.where(real_BxMxL, jnp.where(masked_BxMxL, log_prob_BxMxL, log_kept_BxMxL), 0)
            return jnp.sum(log_q_BxMxL * independent.per_token(ahead_BxMxK, length))

        return jax.grad(weighted)({"log_w": learned_params["log_w"]})

    def _log_mask_prob(self, learned_params, x0_BxL, t_BxMxK):
        """Of every token `[B, M, L]`."""
        w_Bx1xL = jnp.exp(learned_params["log_w"])[x0_BxL][:, None]
        return math.log1p(-self.eps) + w_Bx1xL * jnp.log(independent.per_token(t_BxMxK, x0_BxL.shape[1]))
