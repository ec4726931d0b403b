"""The samplers: which positions of a block become tokens next, which become masks again, and at which noise level the
network is asked. Each is a plan, or a plan and a choice, pure functions of one row: see `reveal.py`.

Adding a sampler = one function and one line in SAMPLERS, whose `most` says on how many positions the output layer runs.
"""

import functools

import jax
import jax.numpy as jnp

from bd3lm_jax.core import ranking
from bd3lm_jax.generation.sampling.reveal import Plan, Row, Sampler, TokenStats, equal_part, one_position


def first_hitting(key, row: Row, steps: int, threshold) -> Plan:
    """The exact continuous-time sampler: one token a call, S calls a block (arXiv 2409.02908; BD3-LM appendix C).

    With n masked tokens the next one is revealed at mask probability level * u^(1/n), and it is any of them with equal
    probability.
    """
    time_key, place_key = jax.random.split(key)
    count = jnp.maximum(row.masked.sum(), 1)
    level = row.level * jax.random.uniform(time_key, minval=1e-6) ** (1 / count)
    place = jnp.argmax(jnp.where(row.masked, jax.random.uniform(place_key, row.masked.shape), -1.0))
    reveal = (jnp.arange(row.masked.shape[0]) == place) & row.masked
    return Plan(reveal, jnp.zeros_like(reveal), level, level)


def random_order(key, row: Row, steps: int, threshold) -> Plan:
    """An equal number each of `steps` steps, every choice of positions alike, whatever the network says.

    Tokens of one step are drawn independently given the canvas. With a step a position this is any-order
    autoregression (arXiv 2110.02037): exact, and first hitting in law for a network that takes no noise level. It is
    told the part of the block that is masked.
    """
    count = -(-row.masked.sum() // jnp.maximum(steps - row.index, 1))
    reveal = row.masked & (ranking.rank(jax.random.uniform(key, row.masked.shape), row.masked) < count)
    return all_masked(key, row, steps, threshold)._replace(reveal=reveal)


def uniform_grid(fraction):
    """Mask probability after the part `fraction` of the steps."""
    return 1 - fraction


def cosine_grid(fraction):
    """Few tokens at first, many at the end (MD4, arXiv 2406.04329)."""
    return jnp.cos(jnp.pi / 2 * fraction)


def ancestral(grid, key, row: Row, steps: int, threshold) -> Plan:
    """Reverse steps on a grid of mask probabilities from 1 to 0 (MDLM eq. 7, log-linear).

    A masked position stays masked with probability s / t; the last step reveals all that is left. A step that reveals
    nothing needs no network.
    """
    return remdm(grid, lambda row, t, s, most, threshold: 0.0, key, row, steps, threshold)


def remdm(grid, sigma, key, row: Row, steps: int, threshold) -> Plan:
    """Ancestral steps that mask written tokens again with probability sigma (ReMDM, arXiv 2503.00307, eq. 5-7).

    From mask probability t to s, masked positions become tokens with probability (t - s + (1 - t) sigma) / t, where
    `sigma(row, t, s, sigma_max, threshold)` is at most sigma_max = min(1, s / (1 - t)): the mask probabilities stay
    those of the grid.
    """
    t, s = grid(row.index / steps), grid((row.index + 1) / steps)
    last = row.index >= steps - 1
    s = jnp.where(last, 0.0, s)
    most = jnp.minimum(1.0, s / jnp.maximum(1 - t, 1e-9))
    remask_prob = sigma(row, t, s, most, threshold)
    reveal_key, mask_key = jax.random.split(key)
    chance = (t - s + (1 - t) * remask_prob) / t
    reveal = row.masked & (last | (jax.random.uniform(reveal_key, row.masked.shape) < chance))
    remask = row.written & ~last & (jax.random.uniform(mask_key, row.masked.shape) < remask_prob)
    return Plan(reveal, remask, t, s)


def cap_sigma(row, t, s, most, eta):
    """ReMDM-cap: at most eta."""
    return jnp.minimum(eta, most)


def rescale_sigma(row, t, s, most, eta):
    """ReMDM-rescale: the part eta of the largest."""
    return eta * most


def confidence_sigma(row, t, s, most, eta):
    """ReMDM-conf: the rescaled sigma shared out by softmax(-probability when drawn) over the written tokens; a masked
    position has none."""
    share = jnp.where(row.written, jnp.exp(-row.confidence), 0.0)
    return share / jnp.maximum(share.sum(), 1e-9) * eta * most


LOOP_ON, LOOP_OFF, LOOP_LEVEL = 0.45, 0.95, 0.1  # parts of the steps, and mask probability between them


def loop_grid(fraction):
    """ReMDM-loop: down to a low mask probability, hold it while tokens are masked again, then finish."""
    down = 1 - (1 - LOOP_LEVEL) * fraction / LOOP_ON
    finish = LOOP_LEVEL * (1 - fraction) / (1 - LOOP_OFF)
    return jnp.where(fraction < LOOP_ON, down, jnp.minimum(LOOP_LEVEL, finish))


def loop_sigma(row, t, s, most, eta):
    """At most eta while the level is held, 0 before and after."""
    return jnp.where(jnp.isclose(t, s), jnp.minimum(eta, most), 0.0)


def iterative(key, row: Row, steps: int, threshold) -> Plan:
    """Every generated position is redrawn, then a random part of them is masked again that shrinks to none (RoBERTa
    diffusion, Barry 2025). For networks that predict unmasked positions too, as masked language models do."""
    generated = row.masked | row.written
    masked_fraction = 1 - (row.index + 1) / steps
    chance = jnp.where(generated, jax.random.uniform(key, generated.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(chance))
    remask = generated & (rank < jnp.floor(masked_fraction * generated.sum() + 1e-4))
    return Plan(generated, remask, masked_fraction + 1 / steps, masked_fraction)


def all_masked(key, row: Row, steps: int, threshold) -> Plan:
    """All masked positions are candidates; the network is told the part of the block that is masked."""
    level = row.masked.sum() / jnp.maximum((row.masked | row.written).sum(), 1)
    return Plan(row.masked, jnp.zeros_like(row.masked), level, level)


def topk_per_step(ranks, row: Row, planned, stats: TokenStats, steps: int, threshold):
    """The best by `ranks`, an equal number each of `steps` steps (LLaDA, arXiv 2502.09992; Dream, 2508.15487)."""
    count = jnp.ceil(planned.sum() / jnp.maximum(steps - row.index, 1) - 1e-4)
    return planned & (ranks(stats, planned) < count)


def above_threshold(row: Row, planned, stats: TokenStats, steps: int, threshold):
    """All whose probability reaches the threshold, and always the likeliest (Fast-dLLM, arXiv 2505.22618)."""
    return planned & ((stats.confidence >= threshold) | (by_confidence(stats, planned) == 0))


def factor(row: Row, planned, stats: TokenStats, steps: int, threshold):
    """Ranks r = 1, 2, ... while the r-th probability is at least 1 - f / (r + 1), f = threshold; always the first
    (Fast-dLLM, arXiv 2505.22618)."""
    rank = by_confidence(stats, planned)
    bad = planned & (rank > 0) & (stats.confidence < 1 - threshold / (rank + 2))
    return planned & (rank < jnp.min(jnp.where(bad, rank, planned.shape[0])))


def entropy_bound(row: Row, planned, stats: TokenStats, steps: int, threshold):
    """The most certain ones as long as the sum of their entropies less the largest is at most the threshold, in nats:
    a bound on what is lost by drawing them independently (EB-Sampler, arXiv 2505.24857)."""
    rank = by_entropy(stats, planned)
    entropy = jnp.where(planned, stats.entropy, 0.0)
    before = jnp.sum(jnp.where(rank[None] < rank[:, None], entropy[None], 0.0), axis=1)
    return planned & ((before <= threshold) | (rank == 0))


def all_masked_on_grid(key, row: Row, steps: int, threshold) -> Plan:
    """All masked positions are candidates, on a grid of mask probabilities from 1 to 0."""
    t, s = uniform_grid(row.index / steps), uniform_grid((row.index + 1) / steps)
    return Plan(row.masked, jnp.zeros_like(row.masked), t, s)


def analytic(row: Row, planned, stats: TokenStats, steps: int, threshold):
    """SEDD's analytic step (Tweedie, arXiv 2310.16834, section 4.2): the staggered score times the transition reveals a
    mask with probability min(1, (e^dsigma - 1) sum_y s_y), as token y in proportion to s_y; the last step denoises.

    From mask probability t to s that is (t - s) / t times the total of the scores over the exact ones' alpha_t / t.
    """
    t, s = uniform_grid(row.index / steps), uniform_grid((row.index + 1) / steps)
    return planned & ((row.index >= steps - 1) | (stats.uniform < (t - s) / t * jnp.exp(stats.log_total)))


def all_positions(most, key, row: Row, steps: int, threshold) -> Plan:
    """All positions are redrawn in every step, on a grid from noise level `most` to none."""
    t, s = most * uniform_grid(row.index / steps), most * uniform_grid((row.index + 1) / steps)
    last = row.index >= steps - 1
    return Plan(row.masked, row.masked & ~last, t, jnp.where(last, 0.0, s))


def uniform_posterior(logits_V, token, allowed_V, t, s):
    """Log-law of a token at noise level s given its letter at t, in uniform-state diffusion with x0 ~ p, the network's
    (D3PM, arXiv 2107.03006; DUO, 2506.10892): q(x_s = j | x_t, p) ~ q(x_t | x_s = j) (alpha_s p_j + (1 - alpha_s) / N).

    letters_V bool: the N ids that may be drawn.
    """
    count, keep = allowed_V.sum(), (1 - t) / (1 - s)
    reached_V = keep * (jnp.arange(logits_V.shape[0]) == token) + (1 - keep) / count
    return jnp.where(allowed_V, jnp.log(reached_V * ((1 - s) * jax.nn.softmax(logits_V) + s / count)), -jnp.inf)


def log_probs_from_scores(scores_V, token, allowed_V, t):
    """Log-laws of a letter given the others at noise level t, and of the letter without its noise, from the log scores
    of each letter over the one that is there (Tweedie, SEDD, arXiv 2310.16834, theorem 4.2); exact for exact scores.

    The score of a letter over itself is 1, whatever the network says there. The scores are in proportion to the law of
    x_t given the others; taking the noise out of it gives that of x0. At t = 1 nothing would be left: the grid begins
    at 1 - 1e-3, as published.
    """
    own_V = jnp.arange(scores_V.shape[0]) == token
    noised_probs_V = jax.nn.softmax(jnp.where(allowed_V, jnp.where(own_V, 0.0, scores_V), -jnp.inf))
    return jnp.log(noised_probs_V), jnp.log(jnp.maximum(noised_probs_V - allowed_V * t / allowed_V.sum(), 0.0))


def by_confidence(stats: TokenStats, planned_S):
    """Ranks of the positions by the probability of what was drawn."""
    return ranking.probability_rank(stats.confidence, planned_S)


def by_margin(stats: TokenStats, planned_S):
    """Ranks by the difference of the two largest probabilities."""
    return ranking.near_rank(stats.margin, planned_S, ranking.largest(stats.confidence, planned_S))


def by_entropy(stats: TokenStats, planned_S):
    """Ranks by entropy, the smallest first."""
    return ranking.near_rank(-stats.entropy, planned_S, jnp.maximum(ranking.largest(stats.entropy, planned_S), 1.0))


def _by(ranks) -> Sampler:
    return Sampler(all_masked, functools.partial(topk_per_step, ranks))


def _ancestral(grid) -> Sampler:
    return Sampler(functools.partial(ancestral, grid), may_skip_forward=True, steps=1000)


def _remdm(sigma, threshold: float, grid=uniform_grid) -> Sampler:
    return Sampler(functools.partial(remdm, grid, sigma), may_skip_forward=True, can_remask=True, threshold=threshold)


SAMPLERS = {
    "first_hitting": Sampler(first_hitting, most=one_position),
    "random_order": Sampler(random_order, most=equal_part),
    "ancestral": _ancestral(uniform_grid),
    "ancestral_cosine": _ancestral(cosine_grid),
    "analytic": Sampler(all_masked_on_grid, analytic, steps=1000, predicts_scores=True),
    "confidence": _by(by_confidence),
    "margin": _by(by_margin),
    "entropy": _by(by_entropy),
    "threshold": Sampler(all_masked, above_threshold, threshold=0.9),
    "factor": Sampler(all_masked, factor, threshold=1.0),
    "entropy_bound": Sampler(all_masked, entropy_bound, threshold=0.1),
    "remdm_cap": _remdm(cap_sigma, 0.02),
    "remdm_rescale": _remdm(rescale_sigma, 0.05),
    "remdm_confidence": _remdm(confidence_sigma, 1.0),
    "remdm_loop": _remdm(loop_sigma, 0.02, loop_grid),
    "uniform": Sampler(functools.partial(all_positions, 1.0), steps=1000, posterior=uniform_posterior),
    "uniform_scores": Sampler(functools.partial(all_positions, 1 - 1e-3), steps=1000, predicts_scores=True,
                              posterior=uniform_posterior, log_distributions=log_probs_from_scores),
    "iterative": Sampler(iterative, can_remask=True, steps=10),
}
