"""Noise chosen from data while training: the clip search of BD3-LM, and a law of the count from running averages.

Both are small objects with a state (adaptive_noise.py) and `distribution(state, blocks)`, what `Masked.corrupt` draws
from. Distributions change without a new program: they are traced, only capacities are static, and these hold for every
state.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.diffusion.adaptive_noise import FixedNoise
from bd3lm_jax.diffusion.corrupt import ClippedRange, MaskCountDistribution, truncated_capacity

RESOLUTION = 2**20  # count probabilities are whole parts of this
# mean count of a count schedule, over that of uniform counts: what the output layer has room for
MAX_MEAN_COUNT_RATIO = 1.25


@dataclasses.dataclass(frozen=True)
class ChosenDistribution(FixedNoise):
    """Base of the two."""

    changes_distribution: ClassVar[bool] = True
    block_size: int

    def distribution(self, state: dict, blocks: int) -> Any:
        """What `corrupt` draws from in rows of so many blocks."""
        raise NotImplementedError

    def corrupt_arguments(self, state: dict, tokens_BxL: jax.Array) -> dict[str, Any]:
        return {"distribution": self.distribution(state, tokens_BxL.shape[1] // self.block_size)}


@dataclasses.dataclass(frozen=True)
class ClipSearch(ChosenDistribution):
    """The clip search of BD3-LM (arXiv 2503.09573): mask probabilities from the interval with the least variance.

    The candidates are the intervals [beta, beta + width] inside [low, high] for all widths, beta in strides. With
    X = (1/t) (summed cross-entropy of the masked tokens) of a block, t from the interval, each is judged by
    Var[X] / E[X]^2: the means of the intervals differ, so their variances are on different scales. Training starts with
    [low, high], and goes on with the best candidate after every search. Biased by design, as every clip is.
    """

    block_size: int
    low: float  # the range of the search
    high: float
    widths: tuple[float, ...]
    stride: float

    @property
    def whole_range(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def candidates(self) -> np.ndarray:
        """Intervals `[I, 2]`, float64; the whole range if no width fits into it."""
        intervals_found = []
        for width in self.widths:
            starts = math.floor((self.high - self.low - width) / self.stride + 1e-6) + 1
            intervals_found += [(self.low + i * self.stride, self.low + i * self.stride + width)
                                for i in range(max(starts, 0))]
        return np.round(intervals_found or [(self.low, self.high)], 6)

    def init_state(self) -> dict[str, Any]:
        return self.state_for_interval(np.array(self.whole_range))

    def state_for_interval(self, interval: np.ndarray) -> dict[str, Any]:
        """The state in which the noise is clipped to an interval `[2]`."""
        return {"low": np.float32(interval[0]), "high": np.float32(interval[1])}

    def distribution(self, state: dict, blocks: int) -> ClippedRange:
        intervals = [self.whole_range, *self.candidates.tolist()]
        most = max(truncated_capacity(low, high, self.block_size) for low, high in intervals)
        return ClippedRange(state["low"], state["high"], blocks * most)

    def as_metrics(self, state: dict) -> dict[str, list[float]]:
        return {"clip": [round(float(state[end]), 6) for end in ("low", "high")]}


@dataclasses.dataclass(frozen=True)
class CountSchedule(ChosenDistribution):
    """A law of the number k of masked tokens that follows the loss: pi(k) = a pi*(k) + (1 - a) / S, with

        pi*(k) proportional to sqrt(E[(mean cross-entropy of the k masked tokens)^2]),

    which minimises the variance of the exact-count estimate over laws of independent counts: a block's estimate is
    mean / pi(k), with second moment sum_k E[mean^2 | k] / pi(k). The expectations are running averages over the losses
    of the training steps themselves. Since the law of a step depends on earlier steps only, the loss stays unbiased.

    a = 1 - floor, or less: pi may mask MOST_MASKED times as many tokens as uniform counts on average, then it is mixed
    with them. Systematic counts of K blocks mask less than S - 1 tokens more than their mean, so
    K MOST_MASKED (S + 1) / 2 + S - 1 is a capacity for every state; the complement of a mask leaves out one token a
    block at least.
    """

    learns: ClassVar[bool] = True
    block_size: int
    floor: float  # every count keeps at least this part of its probability under uniform counts
    decay: float  # of the running averages, a step

    def init_state(self) -> dict[str, jax.Array]:
        return {"squares_S": jnp.zeros(self.block_size), "blocks_S": jnp.zeros(self.block_size)}

    def distribution(self, state: dict, blocks: int) -> MaskCountDistribution:
        size = self.block_size
        capacity = min(math.ceil(blocks * self._max_mean_count()) + size - 1, blocks * size)
        # Every count gets one part, and what rounding leaves goes to the first: the mean never grows.
        integer_S = 1 + jnp.floor(self._probs(state) * (RESOLUTION - size))
        integer_S = integer_S.at[0].add(RESOLUTION - integer_S.sum())
        return MaskCountDistribution(integer_S, capacity, blocks * (size - 1))

    def _max_mean_count(self) -> float:
        return min(MAX_MEAN_COUNT_RATIO * (self.block_size + 1) / 2, self.block_size)

    def _probs(self, state):
        squares_S, blocks_S = state["squares_S"], state["blocks_S"]
        average = jnp.where(blocks_S.sum() > 0, squares_S.sum() / jnp.maximum(blocks_S.sum(), 1e-30), 1)
        best_S = jnp.sqrt((squares_S + average) / (blocks_S + 1))  # a count that is not known is like the average
        best_S /= best_S.sum()
        middle = (self.block_size + 1) / 2
        above = jnp.sum(best_S * jnp.arange(1, self.block_size + 1)) - middle
        part = jnp.minimum(1 - self.floor, (self._max_mean_count() - middle) / jnp.maximum(above, 1e-6))
        return part * best_S + (1 - part) / self.block_size

    def batch_statistics(self, losses_BxMxL: jax.Array, masked_BxMxL: jax.Array,
                         tokens_BxL=None) -> dict[str, jax.Array]:
        """What some rows tell: by count, the sum over blocks of squared mean losses, and the number of blocks."""
        del tokens_BxL  # whichever they are
        shape = (*losses_BxMxL.shape[:2], -1, self.block_size)
        masked, losses = masked_BxMxL.reshape(shape), losses_BxMxL.reshape(shape)
        counts_BxMxK = masked.sum(-1)
        square_BxMxK = (jnp.where(masked, losses, 0).sum(-1) / jnp.maximum(counts_BxMxK, 1)) ** 2
        is_count = counts_BxMxK[..., None] == jnp.arange(1, self.block_size + 1)
        return {"squares_S": jnp.sum(square_BxMxK[..., None] * is_count, axis=(0, 1, 2)),
                "blocks_S": jnp.sum(is_count, axis=(0, 1, 2), dtype=jnp.float32)}

    def update_state(self, state: dict, batch_statistics: dict) -> dict[str, jax.Array]:
        """The state after a step."""
        return jax.tree.map(lambda old, new: self.decay * old + new, state, batch_statistics)

    def as_metrics(self, state: dict) -> dict[str, list[float]]:
        return {"count_probs": (np.asarray(self.distribution(state, 1).probs_S) / RESOLUTION).tolist()}


def relative_variance(blocks: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Var[X] / E[X]^2 from the number of blocks, the sum of their losses and of its square; infinite where E[X] = 0."""
    mean = np.asarray(total, np.float64) / blocks
    variance = np.maximum(np.asarray(squares, np.float64) / blocks - mean**2, 0)
    return np.divide(variance, mean**2, out=np.full(np.shape(mean), np.inf), where=mean > 0)
