"""Information-density masking: dense tokens are masked more often than others at the same overall rate.

"Mask Is What DLLM Needs" (arXiv 2603.15803). Every token has a density C in [0, 1], 1 where it carries information
(control flow, results), 0 elsewhere; d is the mean of C over the maskable tokens of a block.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import corrupt
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective
from bd3lm_jax.diffusion.schedule import stratified_uniform, systematic_uniform

FORMS = ("exact_count", "bernoulli")
TINY = 1e-12  # keeps quotients finite where their result is not used


class PriorityUniforms(NamedTuple):
    """Numbers in [0, 1) that decide P copies (or pairs): each block's rate, the order of its tokens, and for networks
    that see a noise level one that does not tell which tokens are masked."""

    level_BxPxK: jax.Array
    order_BxPxL: jax.Array
    spread_BxPxL: jax.Array


@dataclasses.dataclass(frozen=True)
class Priority(Objective):
    """Masked diffusion whose masks prefer dense tokens by a weight w (see docs/density.md).

    form "bernoulli": at rate r a token is masked with probability p_lo + (p_hi - p_lo) C, see `rates`; the mean over a
    block is r. form "exact_count": k tokens of a block are drawn one after the other without replacement, each with
    probability proportional to 1 + (w - 1) C among those left; the rate is k / n exactly. r is uniform between
    `rate_low` and `rate_high`; k is uniform on 1..n, without the counts whose k / S rounds to none in that range.
    `hard` is the limit w = infinity: dense tokens first. Blocks whose densities are all equal are masked uniformly.

    `complement` makes pairs of copies, the second masks what the first left.

    The weights of the loss are those of uniform masks: 1 / (k pi(k)), in pairs 2 / (k (pi(k) + pi(n - k))); Bernoulli:
    (rate_high - rate_low) / r, the complement's with 1 - r, or rate_low if that is larger. With exact counts and w = 1
    they give the bound, else no bound: dense tokens count more than others.
    `importance` divides by how much likelier the mask is than under uniform masks, which restores the bound whatever
    the (finite) weight. It takes C >= 1/2 as tags.

    Raises:
        UserError: a hyperparameter is out of range, or importance weights that do not exist.
    """

    kind: ClassVar[str] = "priority"
    title: ClassVar[str] = "priority masks"
    extra_batch_keys: ClassVar[tuple[str, ...]] = ("density",)
    block_size: int = 4  # tokens a block
    form: str = "exact_count"  # "exact_count", "bernoulli"
    weight: float = 2.0  # w: a dense token is masked so many times as often; below 1: less often
    hard: bool = False  # w = infinity, whatever `weight` says
    complement: bool = False  # every second copy masks what the one before left unmasked
    importance: bool = False  # exact_count: importance weights, so that the loss is the bound
    rate_low: float = 1e-3  # smallest and largest mask rate
    rate_high: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check(self.form in FORMS, f"diffusion.form is {self.form!r}, expected one of {', '.join(map(repr, FORMS))}")
        _check(0 < self.weight < math.inf,
               f"diffusion.weight is {self.weight}, expected a positive number; diffusion.hard=True is its limit")
        _check(0 < self.rate_low < self.rate_high <= 1,
               f"diffusion.rate_low={self.rate_low} and diffusion.rate_high={self.rate_high}: expected 0 < rate_low < "
               "rate_high <= 1, e.g. 1e-3 and 1")
        if self.importance:
            _check(self.form == "exact_count", "diffusion.importance=True needs diffusion.form='exact_count': masks of "
                   "independent tokens have rates clipped at 1, so that some masks never occur and no weight helps")
            _check(not self.hard, "diffusion.importance=True does not go with diffusion.hard=True: most masks never "
                   "occur, and no weight helps; use a finite diffusion.weight")
            _check(bool(self._count_probs().all()),
                   f"diffusion.importance=True needs every number of masked tokens: diffusion.rate_low={self.rate_low} "
                   f"and diffusion.rate_high={self.rate_high} leave some of 1..{self.block_size} out, use 1e-3 and 1")

    @property
    def noise_sample_multiple(self) -> int:
        return 2 if self.complement else 1

    @property
    def needs_density_tags(self) -> bool:
        return self.importance

    @property
    def is_bound(self) -> bool:
        """Whether the weighted loss estimates the NELBO without bias."""
        return self.importance

    @property
    def odds(self) -> float:
        """w, infinite for hard masks."""
        return math.inf if self.hard else self.weight

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int, density: jax.Array) -> Noised:
        """As `Masked.corrupt`. density: float `[B, L]` in [0, 1], of each token."""
        batch, length = x0_BxL.shape
        _check(noise_samples >= 1, f"noise_samples is {noise_samples}, expected at least 1 noised copy of each row")
        _check(noise_samples % 2 == 0 or not self.complement,
               f"noise_samples is {noise_samples}, diffusion.complement needs an even number")
        _check(length % self.block_size == 0,
               f"length {length} is not a multiple of diffusion.block_size={self.block_size}: pad the rows to "
               f"{-(-length // self.block_size) * self.block_size} tokens")
        _check(density.shape == x0_BxL.shape,
               f"density has shape {density.shape}, expected one number a token, {x0_BxL.shape}")
        parts, blocks = noise_samples // 2 if self.complement else noise_samples, length // self.block_size
        level_key, order_key, spread_key = jax.random.split(key, 3)
        if self.form == "exact_count":
            level = systematic_uniform(level_key, batch * parts, blocks).reshape(batch, parts, blocks)
        else:
            level = stratified_uniform(level_key, (batch, parts, blocks))
        order, spread = (jax.random.uniform(k, (batch, parts, length)) for k in (order_key, spread_key))
        return self.corrupt_with(PriorityUniforms(level, order, spread), x0_BxL, segment_BxL, density, mask_id)

    def corrupt_with(self, uniforms: PriorityUniforms, x0_BxL: jax.Array, segment_BxL: jax.Array,
                     density_BxL: jax.Array, mask_id: int) -> Noised:
        """As `corrupt`, from given uniforms: P copies, or with `complement` P pairs of copies.

        The capacity holds if every row of `exact_count` levels has one in each [j/K, (j+1)/K).
        """
        shape = uniforms.order_BxPxL.shape
        maskable_BxPxL = jnp.broadcast_to((segment_BxL != 0)[:, None], shape)
        density = (density_BxL >= 0.5) if self.importance else jnp.clip(density_BxL, 0, 1)
        density_BxPxL = jnp.broadcast_to(density.astype(jnp.float32)[:, None], shape)
        draw = self._exact_count if self.form == "exact_count" else self._bernoulli
        masks, weights, levels, capacity = draw(uniforms, maskable_BxPxL, density_BxPxL)
        if self.complement:
            masks.append(maskable_BxPxL & ~masks[0])
        masked_BxMxL, weight_BxMxK, level_BxMxK = (_alternate(parts[:len(masks)]) for parts in (masks, weights, levels))
        return Noised(
            xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
            weight_BxMxL=jnp.where(masked_BxMxL, jnp.repeat(weight_BxMxK, self.block_size, axis=-1), 0),
            sigma_BxMxK=-jnp.log1p(-jnp.minimum(level_BxMxK, MASK_PROB_MAX)),
            capacity=capacity,
        )

    def _exact_count(self, uniforms, maskable, density):
        """The first copy's mask; block weights and levels of a copy and of its complement; capacity."""
        probs_S, blocks = self._count_probs(), uniforms.level_BxPxK.shape[-1]
        n = corrupt.maskable_counts(maskable, self.block_size)
        distribution_S = jnp.asarray(probs_S, jnp.float32)
        counts, pi = corrupt.counts_from_probs(uniforms.level_BxPxK, distribution_S, n)
        masked = corrupt.exact_count(priority_order(uniforms.order_BxPxL, density, self.odds), counts, maskable)
        others = n - counts
        pi_others = corrupt.count_probability(others, distribution_S, n) if self.complement else jnp.zeros_like(pi)
        chance = pi + pi_others  # of a mask in either copy, times its chance given the count under uniform masks
        if self.importance:
            chance = self._importance(masked, counts, maskable, density > 0, pi, pi_others)
        weights = [(2 if self.complement else 1) / (jnp.maximum(k, 1) * chance) for k in (counts, others)]
        uniform_mask = corrupt.exact_count(uniforms.spread_BxPxL, counts, maskable)
        levels = [self._max_uniform(uniforms.spread_BxPxL, uniform_mask),
                  self._max_uniform(1 - uniforms.spread_BxPxL, maskable & ~uniform_mask)]
        capacity = corrupt.count_capacity(probs_S, blocks)
        if self.complement:
            capacity = max(capacity, corrupt.complement_capacity(probs_S, blocks))
        return [masked], weights, levels, capacity

    def _importance(self, masked, counts, maskable, tags, pi, pi_others):
        """pi(k) P(M | k) C(n, k), for pairs with the same of the complement added.

        P(M | k) C(n, k) = P_w(a | k) / P_1(a | k), a the dense tokens drawn: both laws spread evenly over the masks of
        equal a, and for the complement P_1 is the same.
        """
        dense, n = (corrupt.maskable_counts(x, self.block_size) for x in (tags & maskable, maskable))
        drawn_dense = corrupt.maskable_counts(tags & masked, self.block_size)

        def distribution(a, k, weight):
            return dense_count_probability(a, k, dense, n - dense, weight, self.block_size)

        chance = pi * distribution(drawn_dense, counts, self.weight)
        if self.complement:
            chance += pi_others * distribution(dense - drawn_dense, n - counts, self.weight)
        return chance / jnp.maximum(distribution(drawn_dense, counts, 1.0), jnp.finfo(jnp.float32).tiny)

    def _max_uniform(self, u_BxPxL, masked_BxPxL):
        """The largest u under a mask; of a uniform mask of k tokens Beta(k, n - k + 1): the level given the count."""
        return jnp.where(masked_BxPxL, u_BxPxL, 0).reshape(*u_BxPxL.shape[:2], -1, self.block_size).max(-1)

    def _bernoulli(self, uniforms, maskable, density):
        blocks = uniforms.level_BxPxK.shape[-1]
        rate_BxPxK = self.rate_low + (self.rate_high - self.rate_low) * uniforms.level_BxPxK
        in_blocks = (*maskable.shape[:2], blocks, self.block_size)
        total = jnp.where(maskable, density, 0).reshape(in_blocks).sum(-1)
        mean = total / jnp.maximum(corrupt.maskable_counts(maskable, self.block_size), 1)
        low, high = rates(rate_BxPxK, mean, self.odds)
        prob = low[..., None] + (high - low)[..., None] * density.reshape(in_blocks)
        masked = (uniforms.order_BxPxL < prob.reshape(maskable.shape)) & maskable
        levels = [rate_BxPxK, 1 - rate_BxPxK]
        weights = [(self.rate_high - self.rate_low) / jnp.maximum(r, self.rate_low) for r in levels]
        return [masked], weights, levels, maskable.shape[-1]

    def _count_probs(self) -> np.ndarray:
        """1 for the counts 1..S whose rate k / S is in range (its ends rounded to whole counts), else 0."""
        low, high = (max(1, round(rate * self.block_size)) for rate in (self.rate_low, self.rate_high))
        counts_S = np.arange(1, self.block_size + 1)
        return ((counts_S >= low) & (counts_S <= high)).astype(np.int64)


def rates(rate: jax.Array, dense: jax.Array, weight: float) -> tuple[jax.Array, jax.Array]:
    """Mask probabilities p_lo (C = 0) and p_hi = w p_lo (C = 1), as far as both are at most 1, of mean `rate`.

    p_lo = r / (1 + (w - 1) d); where p_hi > 1: p_hi = 1, p_lo = (r - d) / (1 - d); where (w < 1) p_lo > 1: p_lo = 1,
    p_hi = (r - (1 - d)) / d. So (1 - d) p_lo + d p_hi = r always. weight = infinity is the limit.

    Args:
        rate: r in (0, 1]; dense: d in [0, 1], of the same shape.
    """
    rest = 1 - dense
    if math.isinf(weight):
        high = jnp.minimum(rate / jnp.maximum(dense, TINY), 1)
        return jnp.maximum(rate - dense, 0) / jnp.maximum(rest, TINY), high
    low = rate / (1 + (weight - 1) * dense)
    high = weight * low
    if weight >= 1:
        full = high > 1
        return jnp.where(full, (rate - dense) / jnp.maximum(rest, TINY), low), jnp.where(full, 1, high)
    full = low > 1
    return jnp.where(full, 1, low), jnp.where(full, (rate - rest) / jnp.maximum(dense, TINY), high)


def priority_order(u: jax.Array, density: jax.Array, weight: float) -> jax.Array:
    """Keys whose ascending order draws tokens one by one with probability proportional to 1 + (w - 1) C.

    Exponential times with these rates: Gumbel-top-k in another form. weight = infinity: proportional to C, and those
    with C = 0 after all others. Any one shape; u uniform in [0, 1).
    """
    time = -jnp.log1p(-u)
    if math.isinf(weight):
        return jnp.where(density > 0, -density / time, time)
    return time / (1 + (weight - 1) * density)


def dense_count_probability(dense_drawn: jax.Array, drawn: jax.Array, dense: jax.Array, others: jax.Array,
                            weight: float, most: int) -> jax.Array:
    """P(`dense_drawn` of the first `drawn` tokens are dense), drawn one by one without replacement, float32.

    `dense` tokens of weight w and `others` of weight 1, at most `most` in all (static): Wallenius' noncentral
    hypergeometric law, by the recursion over draws. Integer arrays of one shape. w = 1: the hypergeometric law.
    """
    a = jnp.arange(most + 1)
    dense_left = jnp.maximum(dense[..., None] - a, 0) * weight

    def draw(carry, done):
        distribution, result = carry
        other_left = jnp.maximum(others[..., None] - (done - a), 0)
        total = jnp.maximum(dense_left + other_left, TINY)
        is_dense = distribution * dense_left / total
        distribution = distribution * other_left / total + jnp.pad(is_dense, [(0, 0)] * (distribution.ndim - 1)
                                                                   + [(1, 0)])[..., :-1]
        return (distribution, jnp.where(drawn == done + 1, at(distribution), result)), None

    def at(distribution):
        return jnp.take_along_axis(distribution, jnp.clip(dense_drawn, 0, most)[..., None], axis=-1)[..., 0]

    distribution = jnp.broadcast_to((a == 0).astype(jnp.float32), (*dense.shape, most + 1))
    (_, result), _ = jax.lax.scan(draw, (distribution, at(distribution)), jnp.arange(most))
    return result


def _alternate(parts):
    """One array `[B, P, ...]` as it is; two -> `[B, 2 P, ...]`: first, second, first, ..."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=2).reshape(parts[0].shape[0], -1, *parts[0].shape[2:])


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
