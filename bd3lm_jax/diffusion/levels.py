"""Levels by position: AR-Diffusion (arXiv 2305.09515) in masked form, left tokens ahead of right ones."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective, check_rows
from bd3lm_jax.diffusion.schedule import stratified_uniform


@dataclasses.dataclass(frozen=True)
class Levels(Objective):
    """Token n = 1 .. N of a block of N is masked at time t ~ U(0, 1) with probability f(n, t) of `mask_prob_and_slope`,
    and counts f'(n, t) / f(n, t) times its cross-entropy, f' = df / dt.

    The tokens are absorbed independently, each by a schedule alpha_n = 1 - f(n, t) of its own that runs from 1 to 0.
    Schedules that do not depend on the tokens keep the bound (MD4's vector schedule, arXiv 2406.04329, section 6): the
    loss is a bound on the NLL, with exact conditionals equal to it.

    Raises:
        UserError: a hyperparameter is out of range.
    """

    kind: ClassVar[str] = "levels"
    title: ClassVar[str] = "levels by position"
    is_bound: ClassVar[bool] = True
    block_size: int = 4
    ramp: float = 0.5  # part of the time in which noise comes in from the right; N / (N + T) in the paper's notation

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ramp < 1:
            raise UserError(f"diffusion.ramp is {self.ramp}, expected between 0 and 1: without a ramp the text is "
                            "noisy at time 0")

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """`noise_samples` noised copies of a batch, times stratified over all its rows, copies and blocks; a level a
        token.

        Arguments and errors as for `Masked.corrupt`.
        """
        batch, length = x0_BxL.shape
        check_rows(noise_samples, length, self.block_size)
        time_key, token_key = jax.random.split(key)
        t_BxMxK = stratified_uniform(time_key, (batch, noise_samples, length // self.block_size))
        place_S = jnp.arange(1, self.block_size + 1)
        prob_BxMxKxS, slope_BxMxKxS = mask_prob_and_slope(place_S, t_BxMxK[..., None], self.block_size, self.ramp)
        prob_BxMxL, slope_BxMxL = (x.reshape(batch, noise_samples, length) for x in (prob_BxMxKxS, slope_BxMxKxS))
        masked_BxMxL = jax.random.uniform(token_key, prob_BxMxL.shape) < prob_BxMxL
        masked_BxMxL &= (segment_BxL != 0)[:, None]
        return Noised(
            xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
            weight_BxMxL=jnp.where(masked_BxMxL, slope_BxMxL / jnp.where(masked_BxMxL, prob_BxMxL, 1), 0),
            sigma_BxMxK=-jnp.log1p(-jnp.minimum(prob_BxMxL, MASK_PROB_MAX)),
            capacity=length,
        )


def mask_prob_and_slope(n, t, length: int, ramp: float) -> tuple[jax.Array, jax.Array]:
    """f(n, t) = clip((T - t_s) / (2 N - n_s) (n - n_s) + t_s, 0, T) with T = 1, and its derivative in t.

    The line through (n_s, t_s) and (2 N, T): first (t < ramp) n_s falls from N to 0 with t_s = 0, noise comes in from
    the right; then n_s = 0 and t_s rises to T.

    Args:
        n: places 1 .. N, any shape that broadcasts with t.
        t: times in [0, 1].
        length: N.
        ramp: as in `Levels`.

    Returns:
        float arrays; both are 0 where the noise has not arrived.
    """
    n_s = length * jnp.maximum(1 - t / ramp, 0)
    t_s = jnp.maximum((t - ramp) / (1 - ramp), 0)
    f = (1 - t_s) / (2 * length - n_s) * (n - n_s) + t_s
    coming = (2 * length - n) * (length / ramp) / (2 * length - n_s) ** 2
    rising = (1 - n / (2 * length)) / (1 - ramp)
    return jnp.clip(f, 0, 1), jnp.where(f > 0, jnp.where(t < ramp, coming, rising), 0)
