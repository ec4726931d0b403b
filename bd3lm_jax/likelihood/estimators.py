"""Estimators of the likelihood bound: which masks of a row are scored, and with what weights.

All estimate the same NELBO. In a block of n real tokens it is (BD3-LM, arXiv 2503.09573, noise level integrated out)

    sum over k = 1..n of E[(1/k) sum over i in M of CE_i(M)],    M uniform among the sets of k tokens,

where CE_i(M) = -log p(x_i | tokens outside M, earlier blocks).

exact        every M, each with weight 1 / (k C(n, k)): no error, 2^S - 1 copies.
exact_count  k ~ pi (uniform), and M together with its complement: each non-empty one has weight
             1 / (k (pi(k) + pi(n-k))) in the sum of the two.
importance   exact_count with pi learnt from the first rows: pi(k) ~ sd of the mean CE of a pair (k, n-k), Neyman's
             allocation, with a floor; unbiased whatever pi, which does not depend on the masks that are scored.
bernoulli    the paper's: t uniform in [eps, 1], every token masked with probability t, weight (1 - eps) / t. It omits
             t < eps: eps times the cross-entropy of a token masked almost alone.
nll          where one pass gives the likelihood itself: autoregression, and blocks of one token without a noise level.
             Of a model that is autoregressive as well (`Config.autoregressive`) callers take that mode for it.
native       the objective's own loss, with the corruption and weights that make it a bound (`Objective.bound`): for
             networks that predict no masked tokens, and to compare with the others.

A sampled estimator gives two independent estimates a row (replicates), from which its error is read. A draw of it is
one pass of four copies, whichever it is, so that equal draws cost the same. In each replicate the levels of a row are a
systematic sample: u_b = (permutation(b) + o) / K with one offset o, and draw d of D uses (u_b + d / D) mod 1, so they
are stratified over the blocks of every draw and over the draws of every block.

An estimator has `name`, `block_size`, `needs_pilot` (whether `from_pilot` makes it from a pilot), `token_loss` (None:
the cross-entropy of masked tokens, else as `Objective.token_loss`); `noise_samples` of a pass, `replicates`
that share them in equal parts, one after the other, `num_passes(draws)`; and `noised(key, index, draws, tokens_L,
segments_L, special)`: the copies of pass `index` of one row, a `Noised` without batch dimension. The mean over the
passes and the copies of a replicate is an estimate of the row's nats. The noise is a function of the row's key,
replicate and draw alone. To add one, write its class and a line in ESTIMATORS.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.config import LMConfig
from bd3lm_jax.core.errors import UserError, command_line, lookup
from bd3lm_jax.diffusion.masked import Masked, Uniforms
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.schedule import MAX_STRATA
from bd3lm_jax.models import trunk
from bd3lm_jax.scoring.score import SpecialIds

EPS = 1e-3  # of bernoulli, as published
MAX_EXHAUSTIVE, MAX_VIEWS = 8, 16  # block size of `exact`; copies of one pass
PILOT_PAIRS = 64  # pairs of copies that a standard deviation of the pilot is read from, at least
PI_STEPS, PI_FLOOR = 16, 0.25  # learnt probabilities are sixteenths of their mean, and not below a quarter


@dataclasses.dataclass(frozen=True)
class MonteCarlo:
    """Two replicates of two copies each, from uniforms that are stratified over blocks and draws."""

    needs_pilot: ClassVar[bool] = False
    token_loss: ClassVar[None] = None
    replicates: ClassVar[int] = 2
    noise_samples: ClassVar[int] = 4
    name: str
    measure: Masked

    @property
    def block_size(self) -> int:
        return self.measure.block_size

    def num_passes(self, draws: int) -> int:
        return draws

    def noised(self, key, index, draws: int, tokens_L, segments_L, special: SpecialIds) -> Noised:
        parts = 1 if self.measure.complement else 2  # masks drawn for a replicate
        length = tokens_L.shape[0]

        def uniforms(replicate):
            level_key, order_key = jax.random.split(jax.random.fold_in(key, replicate))
            order_PxL = jax.random.uniform(jax.random.fold_in(order_key, index), (parts, length))
            return lattice(level_key, index * parts + jnp.arange(parts), draws * parts,
                           length // self.block_size), order_PxL

        level, order = (x.reshape(1, self.replicates * parts, -1)
                        for x in jax.vmap(uniforms)(jnp.arange(self.replicates)))
        noised = self.measure.corrupt_with(Uniforms(level, order, None), tokens_L[None], segments_L[None], special.mask)
        return jax.tree.map(lambda x: x[0], noised)


@dataclasses.dataclass(frozen=True)
class Importance(MonteCarlo):
    """The pilot of Sampled with a count law that is learnt; itself uniform."""

    needs_pilot: ClassVar[bool] = True

    def from_pilot(self, counts_NxM: np.ndarray, means_NxM: np.ndarray) -> MonteCarlo:
        """The estimator for a split, from masked tokens and their mean cross-entropy in N blocks of pilot copies.

        Neyman's law for pairs of a mask and its complement: pi(k) ~ sd of the pair's mean. Neighbouring counts share an
        estimate until each has PILOT_PAIRS pairs. Blocks with padding are left out.
        """
        size = self.block_size
        counts, complement_counts = counts_NxM[:, ::2].ravel(), counts_NxM[:, 1::2].ravel()
        nats = (means_NxM[:, ::2] + means_NxM[:, 1::2]).ravel() / np.where(complement_counts > 0, 2, 1)
        is_full_block = counts + complement_counts == size
        larger, nats = np.maximum(counts, complement_counts)[is_full_block], nats[is_full_block]
        k_S = np.arange(1, size + 1)
        class_S, sd_S = np.maximum(k_S, size - k_S), np.full(size, np.nan)
        classes = np.unique(class_S)
        for neighbours in np.array_split(classes, min(max(len(nats) // PILOT_PAIRS, 1), len(classes))):
            inside = nats[np.isin(larger, neighbours)]
            if len(inside) > 1:
                sd_S[np.isin(class_S, neighbours)] = np.std(inside, ddof=1)
        mean = np.nanmean(sd_S) if np.nansum(sd_S) > 0 else 1.0
        relative_S = np.maximum(np.nan_to_num(sd_S / mean, nan=1.0), PI_FLOOR)
        probs = tuple(float(p) for p in np.round(PI_STEPS * relative_S))
        return MonteCarlo(self.name, dataclasses.replace(self.measure, count_probs=probs))


@dataclasses.dataclass(frozen=True)
class Exhaustive:
    """Every mask of every block; block b of copy j has mask number (j + b), so that all copies mask about the same."""

    needs_pilot: ClassVar[bool] = False
    token_loss: ClassVar[None] = None
    name: ClassVar[str] = "exact"
    replicates: ClassVar[int] = 1
    block_size: int

    @property
    def noise_samples(self) -> int:
        return min(MAX_VIEWS, 2**self.block_size - 1)

    def num_passes(self, draws: int) -> int:
        del draws
        return -(-(2**self.block_size - 1) // self.noise_samples)

    def noised(self, key, index, draws: int, tokens_L, segments_L, special: SpecialIds) -> Noised:
        del key
        size, all_views = self.block_size, self.num_passes(draws) * self.noise_samples
        blocks = tokens_L.shape[0] // size
        pattern_JxK = self._patterns(all_views, blocks)
        pattern_MxK = jax.lax.dynamic_slice_in_dim(jnp.asarray(pattern_JxK), index * self.noise_samples,
                                                   self.noise_samples)
        masked_MxKxS = (pattern_MxK[..., None] >> jnp.arange(size)) & 1 == 1
        real_KxS = segments_L.reshape(blocks, size) != 0
        masked_MxKxS &= ~(masked_MxKxS & ~real_KxS).any(-1, keepdims=True)  # n < S: only the sets of real tokens
        n_K, k_MxK = real_KxS.sum(-1), masked_MxKxS.sum(-1)
        ways = jnp.array([[math.comb(n, k) for k in range(size + 1)] for n in range(size + 1)], jnp.float32)
        weight_MxK = all_views / (jnp.maximum(k_MxK, 1) * jnp.maximum(ways[n_K, k_MxK], 1))
        masked_MxL = masked_MxKxS.reshape(self.noise_samples, -1)
        most = ((pattern_JxK[..., None] >> np.arange(size)) & 1).sum((1, 2)).max()
        return Noised(xt_BxMxL=jnp.where(masked_MxL, special.mask, tokens_L).astype(jnp.int32),
                      weight_BxMxL=jnp.where(masked_MxL, jnp.repeat(weight_MxK, size, axis=-1), 0),
                      sigma_BxMxK=jnp.zeros((self.noise_samples, blocks)), capacity=int(most))

    def _patterns(self, all_views: int, blocks: int) -> np.ndarray:
        """Bits that say which tokens are masked, `[copies of all passes, K]`; 0 in copies too many."""
        number = 2**self.block_size - 1
        view = np.arange(all_views)[:, None]
        return np.where(view < number, (view + np.arange(blocks)) % number + 1, 0)


@dataclasses.dataclass(frozen=True)
class SinglePass:
    """One pass, in which nothing is random."""

    needs_pilot: ClassVar[bool] = False
    token_loss: ClassVar[None] = None
    name: ClassVar[str] = "nll"
    replicates: ClassVar[int] = 1
    noise_samples: ClassVar[int] = 1
    objective: Any

    @property
    def block_size(self) -> int:
        return self.objective.block_size

    def num_passes(self, draws: int) -> int:
        del draws
        return 1

    def noised(self, key, index, draws: int, tokens_L, segments_L, special: SpecialIds) -> Noised:
        del index, draws
        noised = self.objective.corrupt(key, tokens_L[None], segments_L[None], 1, special.mask, special.end)
        return jax.tree.map(lambda x: x[0], noised)


@dataclasses.dataclass(frozen=True)
class OwnObjective:
    """Two replicates of two copies each as the objective draws them, under its own loss."""

    needs_pilot: ClassVar[bool] = False
    name: ClassVar[str] = "native"
    replicates: ClassVar[int] = 2
    noise_samples: ClassVar[int] = 4
    objective: Any

    @property
    def block_size(self) -> int:
        return self.objective.block_size

    @property
    def token_loss(self):
        return self.objective.token_loss

    def num_passes(self, draws: int) -> int:
        return draws

    def noised(self, key, index, draws: int, tokens_L, segments_L, special: SpecialIds) -> Noised:
        del draws

        def replicate(number):
            drawn = self.objective.corrupt(jax.random.fold_in(jax.random.fold_in(key, number), index), tokens_L[None],
                                           segments_L[None], self.noise_samples // self.replicates, special.mask,
                                           special.end)
            return jax.tree.map(lambda x: x[0], drawn)

        drawn = jax.vmap(replicate)(jnp.arange(self.replicates))
        return jax.tree.map(lambda x: x.reshape(self.noise_samples, *x.shape[2:]), drawn)


def lattice(key, index, number: int, blocks: int) -> jax.Array:
    """Points `index` (any shape) of `number` systematic samples of [0, 1) over a row's blocks: float32 [..., K].

    Each sample has one number in every [j/K, (j+1)/K), in a random order; a block's numbers are 1 / number apart. Whole
    numbers until the end: no rounding into the next interval.
    """
    order_key, offset_key = jax.random.split(key)
    steps = MAX_STRATA // (number * blocks)
    if steps == 0:
        raise UserError(f"{number} draws of {blocks} blocks a row, expected at most {MAX_STRATA} blocks: use fewer "
                        "draws")
    total = number * blocks * steps
    start_K = (jax.random.permutation(order_key, blocks) * number * steps
               + jax.random.randint(offset_key, (), 0, number * steps))
    return ((start_K + jnp.asarray(index)[..., None] * blocks * steps) % total + 0.5) / total


def is_exact(config: LMConfig) -> bool:
    """Whether one pass gives the likelihood itself: AR, and blocks of one token without a noise level as input."""
    objective = config.diffusion
    return objective.exact_likelihood or (objective.uses_mask_token and config.block_size == 1 and
                                not trunk.is_time_conditioned(config.model))


def default_estimator(config: LMConfig) -> str:
    """"nll" where the likelihood is exact, "exact_count" for networks that predict masked tokens, else "native"."""
    if is_exact(config) and config.autoregressive is None:  # where "nll" is the likelihood under that mode
        return "nll"
    return "exact_count" if config.diffusion.uses_mask_token else "native"


def make(name: str, config: LMConfig):
    """The estimator of that name for a model; where one pass is exact, all but "bernoulli" are that pass.

    Raises UserError for an unknown name, and for a model that the estimator is not meant for.
    """
    build = lookup(ESTIMATORS, name, "estimator")
    objective = config.diffusion
    if not objective.has_bound:
        raise UserError(f"a model of kind '{objective.kind}' has no bound on its likelihood, so there is nothing to "
                        f"measure: look at its samples ({command_line('sample')})")
    if not (objective.predicts_unseen_tokens or name == "native"):
        raise UserError(f"estimator '{name}' masks tokens, which a model of kind '{objective.kind}' does not predict: "
                        "use native")
    return build(config)


def _counts(name: str, kind: type):
    def build(config: LMConfig):
        if is_exact(config):
            return _nll(config)
        return kind(name, dataclasses.replace(Masked.uniform_counts(config.block_size), complement=True))
    return build


def _bernoulli(config: LMConfig) -> MonteCarlo:
    if not config.diffusion.uses_mask_token:
        raise UserError("estimator 'bernoulli' masks tokens, which an autoregressive model does not: use nll")
    return MonteCarlo("bernoulli", dataclasses.replace(Masked.uniform_counts(config.block_size), corruption="bernoulli",
                                                       eps=EPS))


def _exact(config: LMConfig):
    if is_exact(config):
        return _nll(config)
    if trunk.is_time_conditioned(config.model):
        raise UserError("estimator 'exact' enumerates masks, but this model also sees the noise level, which is "
                        "continuous: use exact_count")
    if config.block_size > MAX_EXHAUSTIVE:
        raise UserError(f"estimator 'exact' scores all 2^S - 1 masks of a block, this model has block size "
                        f"{config.block_size}, expected at most {MAX_EXHAUSTIVE}: use exact_count")
    return Exhaustive(config.block_size)


def _nll(config: LMConfig) -> SinglePass:
    if not is_exact(config):
        raise UserError(f"estimator 'nll' is exact only for AR and for block size 1 without time conditioning, this "
                        f"model has block size {config.block_size}: use exact_count")
    return SinglePass(config.diffusion if config.diffusion.exact_likelihood else Masked.uniform_counts(1))


def _native(config: LMConfig):
    objective = config.diffusion
    if objective.exact_likelihood:
        return _nll(config)
    if objective.bound is None:
        raise UserError(f"estimator 'native' is the training loss, which is no bound on the likelihood for this model "
                        f"of kind '{objective.kind}': use exact_count")
    if objective.extra_batch_keys:
        raise UserError(
            f"estimator 'native' needs {', '.join(objective.extra_batch_keys)} of every token, which a text to be "
            "measured does not bring: use exact_count")
    return OwnObjective(objective.bound)


ESTIMATORS = {"exact_count": _counts("exact_count", MonteCarlo), "importance": _counts("importance", Importance),
              "bernoulli": _bernoulli, "exact": _exact, "nll": _nll, "native": _native}
