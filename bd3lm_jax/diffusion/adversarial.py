"""Masked diffusion whose masks are chosen by an adversary: a small scorer that learns to raise the denoiser's loss.

In a block of n tokens, k are masked: the k largest of score_i + Gumbel noise, so that without replacement a token is
drawn with probability proportional to exp(score) (Plackett-Luce; arXiv 1903.06059). The count keeps the rate exactly.
The scorer goes up the gradient of E[f(M)], f the mean cross-entropy of the masked tokens, by REINFORCE with two draws
of the same count that are each other's baseline:

    (1/2) (f(M1) - f(M2)) grad (log p(M1) - log p(M2)),    p of the order in which the tokens were drawn.

With importance weights (1 / C(n, k)) / P(M) the denoiser's loss is again that of uniform masks, and with every count
(rate = 0) a bound. P(M) sums the probabilities of all orders of the set M, by a recursion over its subsets:

    P(A) = sum over j in A of P(A - j) exp(score_j) / (sum of exp(score_i), i not in A - j).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import corrupt
from bd3lm_jax.diffusion.learned_noise import LearnedNoise
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.schedule import systematic_uniform

MAX_SUBSETS = 8  # block size up to which the 2^S subsets of a block are gone through


@dataclasses.dataclass(frozen=True)
class Adversarial(LearnedNoise):
    """Copies come in pairs of two draws; with `complement` every draw is followed by what it left unmasked.

    Each masked token weighs n / k, so that the loss of a token is the mean cross-entropy of masked ones; with rate = 0
    as in `Masked`: 1 / (k pi(k)) with uniform pi, and with `complement` twice 1 / (k (pi(k) + pi(n - k))).

    Raises:
        UserError: a hyperparameter is out of range or does not go with another.
    """

    kind: ClassVar[str] = "adversarial"
    title: ClassVar[str] = "adversarial masks"
    block_size: int = 4  # tokens a block
    rate: float = 0.5  # part of a block's tokens that is masked, at least one; 0: every count 1..n equally often
    complement: bool = False  # every second copy masks what the one before left unmasked
    importance: bool = False  # weights that make up for the scorer's choice
    hidden_size: int = 32  # width of the scorer
    score_limit: float = 3.0  # scores lie between minus and plus this

    def __post_init__(self):
        for name in ("block_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise UserError(f"diffusion.{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.rate <= 1:
            raise UserError(f"diffusion.rate is {self.rate}, expected in (0, 1], or 0 for every count")
        if not 0 < self.score_limit < math.inf:
            raise UserError(f"diffusion.score_limit is {self.score_limit}, expected a positive number, e.g. 3.0")
        if self.importance and self.block_size > MAX_SUBSETS:
            raise UserError(f"diffusion.importance needs the probability of a set, from all 2^S subsets of a block: "
                            f"diffusion.block_size is {self.block_size}, expected at most {MAX_SUBSETS}")

    @property
    def noise_sample_multiple(self) -> int:
        return 4 if self.complement else 2

    @property
    def is_bound(self) -> bool:
        """Whether the weighted loss estimates the NELBO without bias: all counts, and weights for the choice."""
        return self.importance and self.rate == 0

    def init_learned_params(self, key: jax.Array, vocab_size: int, width: int) -> dict:
        """The scorer: one hidden layer over a token's embedding (`width` numbers) and its place in the block. All
        scores begin at 0: uniform masks."""
        del vocab_size
        draw = jax.random.normal(key, (width + self.block_size, self.hidden_size)) / math.sqrt(width)
        return {"token": draw[:width], "place": draw[width:], "out": jnp.zeros(self.hidden_size)}

    def scores(self, learned_params: dict, x0_BxL: jax.Array) -> jax.Array:
        """Float32 `[B, L]` of the scorer `learned_params`, which holds the network's `embedding` `[V', D]` besides."""
        x_BxLxD = jax.lax.stop_gradient(learned_params["embedding"]).astype(jnp.float32)[x0_BxL]
        x_BxLxD = x_BxLxD * jax.lax.rsqrt(jnp.mean(x_BxLxD**2, axis=-1, keepdims=True) + 1e-6)
        place_LxF = jnp.tile(learned_params["place"], (x0_BxL.shape[-1] // self.block_size, 1))
        raw_BxL = jax.nn.gelu(x_BxLxD @ learned_params["token"] + place_LxF) @ learned_params["out"]
        return self.score_limit * jnp.tanh(raw_BxL / self.score_limit)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int, learned_params: dict | None = None) -> Noised:
        """`noise_samples` noised copies; arguments as for `Masked.corrupt`. learnt: as for `scores`; None: all scores
        are 0.

        Raises:
            UserError: the block size does not divide L, or there are no whole pairs of draws.
        """
        batch, length = x0_BxL.shape
        group = self.noise_sample_multiple
        if noise_samples < 1 or noise_samples % group or length % self.block_size:
            raise UserError(f"{noise_samples} copies of {length} tokens, expected a multiple of {group} copies (pairs "
                            "of draws"
                            f"{', each with its complement' if self.complement else ''}) and of diffusion.block_size="
                            f"{self.block_size} tokens")
        draws = noise_samples // 2 if self.complement else noise_samples
        count_key, order_key, level_key = jax.random.split(key, 3)
        maskable_BxPxL = jnp.broadcast_to((segment_BxL != 0)[:, None], (batch, draws, length))
        n_BxPxK = corrupt.maskable_counts(maskable_BxPxL, self.block_size)
        counts_BxPxK, pi_BxPxK = self._counts(count_key, n_BxPxK)
        score_BxL = jnp.zeros((batch, length)) if learned_params is None else self.scores(learned_params, x0_BxL)
        noise = jax.random.gumbel(order_key, maskable_BxPxL.shape)
        rank_BxPxL = self._rank(score_BxL[:, None] + noise, maskable_BxPxL)
        masked_BxPxL = maskable_BxPxL & (rank_BxPxL < self._tokens(counts_BxPxK))
        weight_BxPxK, other_BxPxK = self._weights(counts_BxPxK, n_BxPxK, pi_BxPxK)
        if self.importance:
            ratio = self._importance_ratio(score_BxL, masked_BxPxL, maskable_BxPxL, counts_BxPxK, n_BxPxK)
            weight_BxPxK, other_BxPxK = weight_BxPxK * ratio, other_BxPxK * ratio
        u_BxPxL = jax.random.uniform(level_key, maskable_BxPxL.shape)
        prob_BxPxK = self._level(u_BxPxL, counts_BxPxK, maskable_BxPxL)
        capacity = length if self.rate == 0 else length // self.block_size * int(self._table()[-1])
        if self.complement:
            masked_BxPxL = _interleave(masked_BxPxL, maskable_BxPxL & ~masked_BxPxL)
            weight_BxPxK = _interleave(weight_BxPxK, other_BxPxK)
            prob_BxPxK = _interleave(prob_BxPxK, self._level(1 - u_BxPxL, n_BxPxK - counts_BxPxK, maskable_BxPxL))
            capacity = length
        return Noised(xt_BxMxL=jnp.where(masked_BxPxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
                      weight_BxMxL=jnp.where(masked_BxPxL, self._tokens(weight_BxPxK), 0),
                      sigma_BxMxK=-jnp.log1p(-jnp.minimum(prob_BxPxK, MASK_PROB_MAX)), capacity=capacity,
                      extra=rank_BxPxL)

    def noise_gradient(self, learned_params: dict, noised: Noised, x0_BxL: jax.Array, segment_BxL: jax.Array,
                       losses_BxMxL: jax.Array) -> dict:
        """Gradient of minus the sum over rows and copies of n f(M), by REINFORCE; a tree like `init_learned_params`'s.

        losses_BxMxL: cross-entropy in nats of masked tokens, anything elsewhere; no gradient goes through them.
        """
        step = 2 if self.complement else 1
        masked_BxPxL = (noised.weight_BxMxL > 0)[:, ::step]
        counts_BxPxK = corrupt.maskable_counts(masked_BxPxL, self.block_size)
        nats_BxPxK = self._blocks(jnp.where(masked_BxPxL, losses_BxMxL[:, ::step], 0)).sum(-1)
        f_BxPxK = jax.lax.stop_gradient(nats_BxPxK / jnp.maximum(counts_BxPxK, 1))
        n_BxK = corrupt.maskable_counts(segment_BxL != 0, self.block_size)
        noise_samples = 2 * step  # that a pair of draws stands for

        def loss(scorer_params):
            score_BxL = self.scores({**learned_params, **scorer_params}, x0_BxL)
            log_p_BxPxK = self.log_prob(score_BxL, noised.extra, counts_BxPxK, segment_BxL != 0)
            f_gap, log_p_gap = (x[:, ::2] - x[:, 1::2] for x in (f_BxPxK, log_p_BxPxK))
            return -noise_samples * jnp.sum(n_BxK[:, None] * f_gap * log_p_gap) / 2

        return jax.grad(loss)({name: value for name, value in learned_params.items() if name != "embedding"})

    def log_prob(self, score_BxL, rank_BxPxL, counts_BxPxK, maskable_BxL) -> jax.Array:
        """Log-probability that the tokens of the first `counts` ranks were drawn in that order, float32 [B, P, K]."""
        score = jnp.broadcast_to(jnp.where(maskable_BxL, score_BxL, -jnp.inf)[:, None], rank_BxPxL.shape)
        order_BxPxKxS = jnp.argsort(self._blocks(rank_BxPxL), axis=-1)
        drawn = jnp.take_along_axis(self._blocks(score), order_BxPxKxS, axis=-1)
        real = drawn > -jnp.inf
        rest = jax.lax.cumsum(jnp.where(real, jnp.exp(jnp.where(real, drawn, 0)), 0), axis=3, reverse=True)
        term = jnp.where(real, drawn, 0) - jnp.log(jnp.where(real, rest, 1))
        return jnp.where(jnp.arange(self.block_size) < counts_BxPxK[..., None], term, 0).sum(-1)

    def set_prob(self, score_BxL, masked_BxPxL, maskable_BxPxL) -> jax.Array:
        """P(M) of the set that is masked in each block, in whatever order: float32 [B, P, K]."""
        size = self.block_size
        bits = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
        odds_BxPxKxS = self._blocks(jnp.where(maskable_BxPxL, jnp.exp(score_BxL)[:, None], 0))
        rest = odds_BxPxKxS @ (1 - bits).T.astype(np.float32)  # of the tokens outside each subset
        first = jnp.zeros(rest.shape).at[..., 0].set(1)
        prob = first
        for _ in range(size):  # after j rounds the subsets of up to j tokens are right
            total = first
            for token in range(size):
                before = np.arange(2**size) & ~(1 << token)
                drawn = prob[..., before] * odds_BxPxKxS[..., token, None] / jnp.maximum(rest[..., before], 1e-30)
                total = total + jnp.where(bits[:, token] == 1, drawn, 0)
            prob = total
        number = self._blocks(masked_BxPxL) @ (1 << np.arange(size))
        return jnp.take_along_axis(prob, number[..., None], axis=-1)[..., 0]

    def _importance_ratio(self, score_BxL, masked_BxPxL, maskable_BxPxL, counts_BxPxK, n_BxPxK):
        """Probability of the set under uniform masks of its count, over that under the scorer's."""
        ways = np.array([[math.comb(n, k) for k in range(self.block_size + 1)] for n in range(self.block_size + 1)])
        uniform = 1 / jnp.asarray(np.maximum(ways, 1), jnp.float32)[n_BxPxK, counts_BxPxK]
        return uniform / self.set_prob(score_BxL, masked_BxPxL, maskable_BxPxL)

    def _table(self) -> np.ndarray:
        """Masked tokens of a block with 0..S maskable ones, at a fixed rate."""
        n = np.arange(self.block_size + 1)
        return np.where(n > 0, np.clip(np.floor(self.rate * n + 0.5), 1, np.maximum(n, 1)), 0).astype(np.int32)

    def _counts(self, key, n_BxPxK):
        """Counts, alike in the two draws of a pair, and their probabilities."""
        if self.rate > 0:
            return jnp.asarray(self._table())[n_BxPxK], jnp.ones(n_BxPxK.shape)
        batch, draws, blocks = n_BxPxK.shape
        level = systematic_uniform(key, batch * draws // 2, blocks).reshape(batch, -1, blocks)
        return corrupt.counts_from_probs(jnp.repeat(level, 2, axis=1), jnp.ones(self.block_size), n_BxPxK)

    def _weights(self, counts, n, pi):
        """Of a masked token in a draw, and in its complement."""
        others = n - counts
        if self.rate > 0:
            return tuple(n / jnp.maximum(k, 1) for k in (counts, others))
        if self.complement:
            pi = (pi + jnp.where(others > 0, 1 / jnp.maximum(n, 1), 0)) / 2
        return tuple(1 / (jnp.maximum(k, 1) * pi) for k in (counts, others))

    def _level(self, u_BxPxL, counts_BxPxK, maskable_BxPxL):
        """Level given the count k: Beta(k, n-k+1), the k-th smallest of n uniforms; 0 for k = 0."""
        ordered = jnp.sort(self._blocks(jnp.where(maskable_BxPxL, u_BxPxL, 2.0)), axis=-1)
        level = jnp.take_along_axis(ordered, jnp.maximum(counts_BxPxK - 1, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(counts_BxPxK > 0, level, 0)

    def _rank(self, key_BxPxL, maskable_BxPxL):
        """Place of every token of a block by falling key, tokens that cannot be masked last."""
        order = jnp.argsort(-self._blocks(jnp.where(maskable_BxPxL, key_BxPxL, -jnp.inf)), axis=-1)
        return jnp.argsort(order, axis=-1).reshape(key_BxPxL.shape).astype(jnp.int32)

    def _blocks(self, x):
        return x.reshape(*x.shape[:-1], -1, self.block_size)

    def _tokens(self, x):
        return jnp.repeat(x, self.block_size, axis=-1)


def _interleave(first, second):
    """`[B, P, ...]` twice -> `[B, 2 P, ...]`: first, second, first, ..."""
    return jnp.stack([first, second], axis=2).reshape(first.shape[0], -1, *first.shape[2:])
