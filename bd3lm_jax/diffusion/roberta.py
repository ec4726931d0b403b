"""RoBERTa diffusion (Barry, 2025): a masked language model that learns at several mask rates."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective, check_rows


@dataclasses.dataclass(frozen=True)
class RobertaDiffusion(Objective):
    """Each batch draws one rate r from `rates`, masks every token with probability r, and learns the plain mean of the
    cross-entropies of its masked tokens. Never masked: the first `protected` tokens of a row, end tokens, mask tokens
    and those with an id in `special_ids`.

    Without weights the loss is no bound. Its sampler is `iterative`.

    Raises:
        UserError: a hyperparameter is out of range.
    """

    kind: ClassVar[str] = "roberta_diffusion"
    title: ClassVar[str] = "RoBERTa diffusion"
    block_size: int = 4
    rates: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    protected: int = 16
    special_ids: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        wrong = [rate for rate in self.rates if not 0 < rate <= 1]
        if wrong or not self.rates:
            raise UserError(f"diffusion.rates is {self.rates}, expected mask rates above 0 and up to 1, e.g. "
                            f"(1.0, 0.5, 0.1){f': {wrong[0]} is none' if wrong else ''}")
        if self.protected < 0:
            raise UserError(f"diffusion.protected is {self.protected}, expected at least 0 tokens")
        if any(token < 0 for token in self.special_ids):
            raise UserError(f"diffusion.special_ids is {self.special_ids}, expected token ids of at least 0")

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """`noise_samples` noised copies of a batch, all at one rate; arguments as for `Masked.corrupt`.

        Raises:
            UserError: the block size does not divide L, `noise_samples` is not positive, or all tokens are protected.
        """
        batch, length = x0_BxL.shape
        check_rows(noise_samples, length, self.block_size)
        if self.protected >= length:
            raise UserError(f"diffusion.protected={self.protected} leaves none of the {length} tokens of a row to mask")
        rate_key, token_key = jax.random.split(key)
        rate = jax.random.choice(rate_key, jnp.asarray(self.rates, jnp.float32))
        protected_ids = jnp.asarray([mask_id, end_id, *self.special_ids])
        maskable_BxL = (segment_BxL != 0) & (jnp.arange(length) >= self.protected) & ~jnp.isin(x0_BxL, protected_ids)
        masked_BxMxL = (jax.random.uniform(token_key, (batch, noise_samples, length)) < rate) & maskable_BxL[:, None]
        # The step divides by the tokens of all copies: this makes it a mean over the masked ones.
        tokens = noise_samples * (segment_BxL != 0).sum()
        return Noised(
            xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
            weight_BxMxL=jnp.where(masked_BxMxL, tokens / jnp.maximum(masked_BxMxL.sum(), 1), 0).astype(jnp.float32),
            sigma_BxMxK=jnp.full((batch, noise_samples, 1), -jnp.log1p(-jnp.minimum(rate, MASK_PROB_MAX))),
            capacity=length - self.protected,
        )
