"""Masked (absorbing) diffusion inside blocks: BD3-LM (arXiv 2503.09573); block_size = L is MDLM (arXiv 2406.07524)."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import corrupt
from bd3lm_jax.diffusion.corrupt import ClippedRange, MaskCountDistribution
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective, check_rows
from bd3lm_jax.diffusion.schedule import get_schedule, stratified_uniform, systematic_uniform

MASK_PROB_MAX = 1 - 1e-6  # keeps sigma = -log(1 - mask probability) finite
COUNT_RESOLUTION = 2**20  # count probabilities become whole numbers: their sums, and the capacity, are exact


class Uniforms(NamedTuple):
    """Numbers in [0, 1) that decide a mask: for P copies (or pairs) each block's level, the order of its tokens, and
    for clipped schedules (else None) its count."""

    level_BxPxK: jax.Array
    order_BxPxL: jax.Array
    count_BxPxK: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)  # so that fields of a subclass need no defaults
class Masked(Objective):
    """Masked diffusion with one noise level a block.

    `exact_count` draws the number k of masked tokens from `count_probs`, then a uniform subset: an unbiased estimate of
    the NELBO whatever the schedule (integrating the noise level out leaves 1/k), with far less variance.
    With `complement` copies come in pairs, a mask and what it left: each has weight 1 / (k (pi(k) + pi(n - k))) with
    pi(0) = 0 in the *sum* of the two (by itself neither is unbiased), hence twice that in the mean over copies.
    `bernoulli` draws a time and masks each token independently. It omits the mask probabilities below `eps`, which hold
    `eps` times the cross-entropy of a token masked almost alone, in nats a token.
    `bernoulli` with clip_low, clip_high other than 0, 1 is the paper's clipped schedule: times restricted to these mask
    probabilities, weighted as if they were not, and blocks redrawn until their masked fraction lies inside. Biased by
    design (low gradient variance): its loss is no bound.

    Raises:
        UserError: a hyperparameter is out of range or does not go with another.
    """

    kind: ClassVar[str] = "masked"
    title: ClassVar[str] = "BD3-LM"
    block_size: int = 4  # tokens a block
    schedule: str = "loglinear"  # name for `schedule.get_schedule`; `exact_count` does not depend on it
    corruption: str = "bernoulli"  # "exact_count", "bernoulli"
    # exact_count: relative probability of masking 1..block_size tokens; () = uniform
    count_probs: tuple[float, ...] = ()
    complement: bool = False  # exact_count: every second copy masks what the one before left unmasked
    # bernoulli: smallest mask probability of the clipped schedule; 0 with clip_high = 1 is unclipped
    clip_low: float = 0.0
    clip_high: float = 1.0
    eps: float = 1e-3  # bernoulli: no mask probability below this

    def __post_init__(self):
        super().__post_init__()
        get_schedule(self.schedule)
        _check(self.corruption in ("exact_count", "bernoulli"),
               f"diffusion.corruption is {self.corruption!r}, expected 'exact_count' or 'bernoulli'")
        _check(0 < self.eps < 1, f"diffusion.eps is {self.eps}, expected between 0 and 1, e.g. 1e-3")
        _check(0 <= self.clip_low < self.clip_high <= 1,
               f"diffusion.clip_low={self.clip_low} and diffusion.clip_high={self.clip_high}: expected "
               "0 <= clip_low < clip_high <= 1")
        _check(self.eps < self.clip_high,
               f"diffusion.eps is {self.eps}, expected below diffusion.clip_high={self.clip_high}")
        _check(self.corruption == "bernoulli" or not self._clipped,
               f"diffusion.clip_low={self.clip_low} and diffusion.clip_high={self.clip_high} have no effect with "
               "diffusion.corruption='exact_count': use 0 and 1, or corruption='bernoulli', or shape the counts with "
               "diffusion.count_probs")
        _check(self.corruption == "exact_count" or not self.complement,
               f"diffusion.complement has no effect with diffusion.corruption='{self.corruption}': use False or "
               "corruption='exact_count'")
        self._check_count_probs()

    def _check_count_probs(self):
        probs = self.count_probs
        if not probs:
            return
        _check(self.corruption == "exact_count",
               f"diffusion.count_probs has no effect with diffusion.corruption='{self.corruption}': use () or "
               "corruption='exact_count'")
        _check(len(probs) == self.block_size,
               f"diffusion.count_probs has {len(probs)} numbers, expected diffusion.block_size={self.block_size}: one "
               "for each number of masked tokens")
        _check(all(0 <= p < math.inf for p in probs) and sum(probs) > 0,
               f"diffusion.count_probs is {probs}, expected numbers of at least 0, not all 0")

    @classmethod
    def uniform_counts(cls, block_size: int) -> "Masked":
        """The plain bound: every number of masked tokens equally likely."""
        return cls(block_size=block_size, corruption="exact_count")

    @property
    def _clipped(self) -> bool:
        return self.mask_prob_range != (0, 1)

    @property
    def noise_sample_multiple(self) -> int:
        return 2 if self.complement else 1

    @property
    def mask_prob_range(self) -> tuple[float, float]:
        return self.clip_low, self.clip_high

    @property
    def block_size_is_fixed(self) -> bool:
        return bool(self.count_probs)

    @property
    def is_bound(self) -> bool:
        """Whether the weighted loss estimates the NELBO without bias."""
        return self.corruption == "exact_count" and all(p > 0 for p in self.count_probs)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int, distribution: MaskCountDistribution | ClippedRange | None = None) -> Noised:
        """`noise_samples` noised copies of a batch, independent but for stratification over all its rows, copies and
        blocks, and for pairs of a mask and its complement.

        A function of the key and of the global shape: draw it for the whole batch, before microbatches are cut.

        Args:
            key: typed key of this step.
            x0_BxL: clean ids.
            segment_BxL: document of each token; padding (0) keeps its id and has weight 0.
            end_id: not used here (every objective is called alike).
            distribution: what takes the place of `count_probs` (exact_count) or of the clip (bernoulli);
                None for its own.

        Raises:
            UserError: the block size does not divide L, `noise_samples` is not positive, or odd with `complement`.
        """
        batch, length = x0_BxL.shape
        check_rows(noise_samples, length, self.block_size)
        _check(noise_samples % 2 == 0 or not self.complement,
               f"noise_samples is {noise_samples}, diffusion.complement needs an even number")
        parts = noise_samples // 2 if self.complement else noise_samples
        distribution = distribution or self._default_distribution(length // self.block_size)
        uniforms = self._uniforms(key, batch, parts, length, clipped=isinstance(distribution, ClippedRange))
        return self.corrupt_with(uniforms, x0_BxL, segment_BxL, mask_id, distribution)

    def corrupt_with(self, uniforms: Uniforms, x0_BxL: jax.Array, segment_BxL: jax.Array, mask_id: int,
                     distribution: MaskCountDistribution | ClippedRange | None = None) -> Noised:
        """As `corrupt`, from given uniforms: P copies, or with `complement` P pairs of copies.

        The capacity holds if every row of `exact_count` levels has one in each [j/K, (j+1)/K).
        """
        maskable_BxPxL = jnp.broadcast_to((segment_BxL != 0)[:, None], uniforms.order_BxPxL.shape)
        draw = self._exact_count if self.corruption == "exact_count" else self._bernoulli
        distribution = distribution or self._default_distribution(uniforms.level_BxPxK.shape[-1])
        masked_BxMxL, weight_BxMxK, prob_BxMxK, capacity = draw(uniforms, maskable_BxPxL, distribution)
        return Noised(
            xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
            weight_BxMxL=jnp.where(masked_BxMxL, jnp.repeat(weight_BxMxK, self.block_size, axis=-1), 0),
            sigma_BxMxK=-jnp.log1p(-jnp.minimum(prob_BxMxK, MASK_PROB_MAX)),
            capacity=capacity,
        )

    def _default_distribution(self, blocks: int) -> MaskCountDistribution | ClippedRange | None:
        """The law by the hyperparameters for rows of so many blocks; None for independent tokens."""
        if self.corruption == "exact_count":
            probs_S = self._integer_count_probs()
            return MaskCountDistribution(probs_S, corrupt.count_capacity(probs_S, blocks),
                                         corrupt.complement_capacity(probs_S, blocks) if self.complement else 0)
        if not self._clipped:
            return None
        most = corrupt.truncated_capacity(self.clip_low, self.clip_high, self.block_size)
        return ClippedRange(self.clip_low, self.clip_high, blocks * most)

    def _uniforms(self, key, batch, parts, length, clipped):
        blocks = length // self.block_size
        if self.corruption == "exact_count":
            level_key, subset_key = jax.random.split(key)
            level, count = systematic_uniform(level_key, batch * parts, blocks).reshape(batch, parts, -1), None
        else:
            level_key, count_key, subset_key = jax.random.split(key, 3)
            level = stratified_uniform(level_key, (batch, parts, blocks))
            count = jax.random.uniform(count_key, level.shape) if clipped else None
        return Uniforms(level, jax.random.uniform(subset_key, (batch, parts, length)), count)

    def _exact_count(self, uniforms, maskable_BxMxL, distribution):
        """Counts k from pi of the law, weight 1 / (k pi(k))."""
        if self.complement:
            return self._complementary(uniforms, maskable_BxMxL, distribution)
        masked_BxMxL, counts_BxMxK, _, pi_BxMxK = self._draw_counts(uniforms, maskable_BxMxL, distribution)
        weight_BxMxK = 1 / (jnp.maximum(counts_BxMxK, 1) * pi_BxMxK)
        return masked_BxMxL, weight_BxMxK, self._count_level(uniforms.order_BxPxL, masked_BxMxL), distribution.capacity

    def _complementary(self, uniforms, maskable_BxPxL, distribution):
        """As `_exact_count`, for P pairs: copies 2p and 2p + 1 share out the maskable tokens of their blocks."""
        u = uniforms.order_BxPxL
        masked, counts, n, pi = self._draw_counts(uniforms, maskable_BxPxL, distribution)
        others = n - counts
        pi_pair = pi + corrupt.count_probability(others, jnp.asarray(distribution.probs_S, jnp.float32), n)
        masks = masked, maskable_BxPxL & ~masked
        weights = (2 / (jnp.maximum(k, 1) * pi_pair) for k in (counts, others))
        levels = (self._count_level(order, mask) for order, mask in zip((u, 1 - u), masks))
        capacity = max(distribution.capacity, distribution.complement_capacity)
        return *(corrupt.interleave(*pair) for pair in (masks, weights, levels)), capacity

    def _draw_counts(self, uniforms, maskable_BxMxL, distribution):
        """The mask, and for each block count, maskable tokens and pi(count)."""
        n_BxMxK = corrupt.maskable_counts(maskable_BxMxL, self.block_size)
        probs_S = jnp.asarray(distribution.probs_S, jnp.float32)
        counts_BxMxK, pi_BxMxK = corrupt.counts_from_probs(uniforms.level_BxPxK, probs_S, n_BxMxK)
        masked_BxMxL = corrupt.exact_count(uniforms.order_BxPxL, counts_BxMxK, maskable_BxMxL)
        return masked_BxMxL, counts_BxMxK, n_BxMxK, pi_BxMxK

    def _count_level(self, u_BxMxL, masked_BxMxL):
        """Level given the count: Beta(k, n-k+1), the law of the k-th smallest uniform, whichever token."""
        return jnp.where(masked_BxMxL, u_BxMxL, 0).reshape(*u_BxMxL.shape[:2], -1, self.block_size).max(-1)

    def _bernoulli(self, uniforms, maskable_BxMxL, distribution):
        """Times uniform between the mask probabilities max(eps, low) and high of the law."""
        u_BxMxL = uniforms.order_BxPxL
        schedule = get_schedule(self.schedule)
        low, high = (0.0, 1.0) if distribution is None else (distribution.low, distribution.high)
        t_low, t_high = schedule.inverse(jnp.maximum(self.eps, low)), schedule.inverse(high)
        t_BxMxK = t_low + (t_high - t_low) * uniforms.level_BxPxK
        prob_BxMxK = jnp.minimum(schedule.mask_prob(t_BxMxK), 1)  # rounding near t = 1
        weight_BxMxK = schedule.weight(t_BxMxK)
        if distribution is None:
            masked_BxMxL = corrupt.bernoulli(u_BxMxL, prob_BxMxK, maskable_BxMxL)
            return masked_BxMxL, weight_BxMxK * (t_high - t_low), prob_BxMxK, u_BxMxL.shape[-1]
        counts_BxMxK = corrupt.truncated_binomial_counts(
            uniforms.count_BxPxK, prob_BxMxK, corrupt.maskable_counts(maskable_BxMxL, self.block_size), low, high,
            self.block_size)
        masked_BxMxL = corrupt.exact_count(u_BxMxL, counts_BxMxK, maskable_BxMxL)
        return masked_BxMxL, weight_BxMxK, prob_BxMxK, distribution.capacity

    def _integer_count_probs(self) -> np.ndarray:
        """`count_probs` as whole numbers, positive where they are positive."""
        if not self.count_probs:
            return np.ones(self.block_size, np.int64)
        probs_S = np.array(self.count_probs)
        return np.ceil(probs_S / probs_S.sum() * COUNT_RESOLUTION).astype(np.int64)


def cross_entropy_subs(logits_NxV: jax.Array, target_N: jax.Array, mask_id: int) -> jax.Array:
    """-log p(target) in nats, float32 [N], where the mask token has probability 0 (SUBS, arXiv 2406.07524).

    Args:
        logits_NxV: any float type; computed in float32.
        target_N: ids of clean tokens (a target that is the mask token gets a huge finite value).
        mask_id: the mask token; -1 for a vocabulary without one.
    """
    logits_NxV = jnp.where(jnp.arange(logits_NxV.shape[-1]) == mask_id, -1e30, logits_NxV.astype(jnp.float32))
    target_logit_N = jnp.take_along_axis(logits_NxV, target_N[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_NxV, axis=-1) - target_logit_N


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
