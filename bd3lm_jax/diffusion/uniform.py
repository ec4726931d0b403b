"""Uniform-state diffusion: tokens jump to any token, and none is a mask (DUO, arXiv 2506.10892; SEDD, 2310.16834)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import independent
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective

ALPHA_MIN = 1e-6  # keeps the level and the rate finite


@dataclasses.dataclass(frozen=True)
class Uniform(Objective):
    """Every token is x0 with probability alpha = 1 - t, else uniform over the N letters (all ids but the mask).

    It jumps to every other letter at rate b / N, b = -alpha' / alpha. The reverse process jumps from z = x_t to j at
    rate a_j = (b / N) q_j / q_z, with q = N alpha x0 + 1 - alpha; the network's p(x0), in the place of x0, gives
    q' and rates a'_j. The bound is the expected rate at which the two processes differ, and no more (at t = 1 both
    are uniform):

        E_t sum over tokens of sum over j != z of [ a_j log(a_j / a'_j) - a_j + a'_j ]
        = E_t b sum over tokens of [ 1 / q'_z - 1 / q_z + (1 / N) sum over j of (q_j / q_z) log(q_j q'_z / (q_z q'_j)) ]

    The best p is not that of x0 given all of x_t but given the other tokens: what z says of its own x0 is in q'. Every
    real token counts, changed or not. t ~ U[eps, 1 - eps]: eps = 0 is the bound, larger ones leave out its ends.
    """

    kind: ClassVar[str] = "uniform"
    title: ClassVar[str] = "uniform-state (DUO)"
    uses_mask_token: ClassVar[bool] = False
    can_resample_tokens: ClassVar[bool] = True
    sampler: ClassVar[str] = "uniform"
    block_size: int = 4  # tokens a block
    vocab_size: int = -1  # ids, the mask token's among them; -1: the model's
    eps: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size != -1 and self.vocab_size < 3:
            raise UserError(f"diffusion.vocab_size is {self.vocab_size}, expected at least 2 tokens and a mask, or -1")
        if not 0 <= self.eps < 0.5:
            raise UserError(f"diffusion.eps is {self.eps}, expected from 0 to below 0.5, e.g. 1e-3")

    def with_vocab_size(self, size: int) -> "Uniform":
        return dataclasses.replace(self, vocab_size=size)

    def check_vocab_size(self, size: int) -> None:
        if self.vocab_size not in (-1, size):
            raise UserError(f"diffusion.vocab_size={self.vocab_size} is not model.vocab_size={size}: use -1 for the "
                            "model's")

    @property
    def is_bound(self) -> bool:
        return self.eps == 0

    @property
    def bound(self) -> "Uniform":
        return dataclasses.replace(self, eps=0.0)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """`noise_samples` noised copies of a batch, stratified over rows, copies and blocks; arguments as for
        `Masked.corrupt`.

        Raises UserError if `vocab_size` is still -1.
        """
        if self.vocab_size == -1:
            raise UserError("diffusion.vocab_size is -1, which a run takes from its tokenizer: give the number of ids")
        draw_key, random_token_key = jax.random.split(key)
        noise_draw = independent.sample_noise(draw_key, x0_BxL.shape, noise_samples, self.block_size)
        stretch = 1 - 2 * self.eps
        alpha_BxMxK = jnp.maximum(1 - self.eps - stretch * noise_draw.time_BxMxK, ALPHA_MIN)
        real_BxMxL = jnp.broadcast_to((segment_BxL != 0)[:, None], noise_draw.order_BxMxL.shape)
        changed_BxMxL = (noise_draw.order_BxMxL >= independent.per_token(alpha_BxMxK, x0_BxL.shape[1])) & real_BxMxL
        random_token_BxMxL = jax.random.randint(random_token_key, changed_BxMxL.shape, 0,
                                                self.vocab_size - (mask_id >= 0))
        random_token_BxMxL += (random_token_BxMxL >= mask_id) & (mask_id >= 0)
        weight_BxMxL = independent.per_token(stretch / alpha_BxMxK, x0_BxL.shape[1])
        return Noised(xt_BxMxL=jnp.where(changed_BxMxL, random_token_BxMxL, x0_BxL[:, None]).astype(jnp.int32),
                      weight_BxMxL=jnp.where(real_BxMxL, weight_BxMxL, 0), sigma_BxMxK=-jnp.log(alpha_BxMxK),
                      capacity=x0_BxL.shape[1])

    @staticmethod
    def token_loss(logits_NxV: jax.Array, target_N: jax.Array, xt_N: jax.Array, sigma_N: jax.Array,
                   mask_id: int) -> jax.Array:
        """What b multiplies, float32 `[N]`; see `Objective.token_loss`."""
        valid_tokens, count = _valid_tokens(logits_NxV, mask_id)
        p_NxV = jax.nn.softmax(jnp.where(valid_tokens, logits_NxV, -jnp.inf), axis=-1)
        alpha_N, rest_N = jnp.exp(-sigma_N), -jnp.expm1(-sigma_N)
        predicted_q_NxV = count * alpha_N[:, None] * p_NxV + rest_N[:, None]
        predicted_q_xt_N = _at(predicted_q_NxV, xt_N)
        truth, truth_other = count * alpha_N + rest_N, rest_N
        true_q_xt_N = jnp.where(xt_N == target_N, truth, truth_other)
        log_NxV = jnp.log(true_q_xt_N / predicted_q_xt_N)[:, None] + jnp.log(predicted_q_NxV)
        is_target = jnp.arange(logits_NxV.shape[-1]) == target_N[:, None]
        q_NxV = jnp.where(is_target, truth[:, None], truth_other[:, None])
        terms_NxV = jnp.where(valid_tokens, q_NxV * (jnp.log(q_NxV) - log_NxV), 0)
        return 1 / predicted_q_xt_N - 1 / true_q_xt_N + terms_NxV.sum(-1) / (count * true_q_xt_N)


@dataclasses.dataclass(frozen=True)
class SEDDUniform(Uniform):
    """As `Uniform` with free scores: the network gives log s_y, the score of letter y over that of z, own letter 0.

    Score entropy of the uniform graph, sigma' / N sum over y != z of [ s_y - r_y log s_y + r_y (log r_y - 1) ] with
    r_y = q_y / q_z, is the same difference of rates: a'_y = (b / N) s_y. The network must be told sigma.
    """

    kind: ClassVar[str] = "sedd_uniform"
    title: ClassVar[str] = "SEDD, uniform"
    needs_time_conditioning: ClassVar[bool] = True
    predicts_scores: ClassVar[bool] = True
    sampler: ClassVar[str] = "uniform_scores"

    @staticmethod
    def token_loss(logits_NxV: jax.Array, target_N: jax.Array, xt_N: jax.Array, sigma_N: jax.Array,
                   mask_id: int) -> jax.Array:
        """What sigma' multiplies, float32 `[N]`; see `Objective.token_loss`."""
        valid_tokens, count = _valid_tokens(logits_NxV, mask_id)
        ids = jnp.arange(logits_NxV.shape[-1])
        rest_N = -jnp.expm1(-sigma_N)
        truth_N = count * jnp.exp(-sigma_N) + rest_N
        true_q_xt_N = jnp.where(xt_N == target_N, truth_N, rest_N)
        r_NxV = jnp.where(ids == target_N[:, None], truth_N[:, None], rest_N[:, None]) / true_q_xt_N[:, None]
        terms_NxV = jnp.exp(logits_NxV) - r_NxV * logits_NxV + r_NxV * (jnp.log(r_NxV) - 1)
        return jnp.where(valid_tokens & (ids != xt_N[:, None]), terms_NxV, 0).sum(-1) / count


def _valid_tokens(logits_NxV, mask_id: int):
    """Which ids are letters, bool `[V]`, and how many."""
    vocab = logits_NxV.shape[-1]
    return jnp.arange(vocab) != mask_id, vocab - (0 <= mask_id < vocab)


def _at(x_NxV, index_N):
    return jnp.take_along_axis(x_NxV, index_N[:, None], axis=-1)[:, 0]
