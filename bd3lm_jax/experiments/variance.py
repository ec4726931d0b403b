"""How much the training loss of a trained network varies, by noise schedule: the variance study of BD3-LM.

    from bd3lm_jax.experiments.variance import study
    study("runs/tiny", split="test", batch=16, draws=28, seed=0)

The network stays the same, so nothing is said about what training with another schedule would give.

Of a block with k masked tokens let U be their summed cross-entropy over S, and W the weight that a schedule gives it.
The loss W U has mean sum_k a_k E[U | k] and second moment sum_k b_k E[U^2 | k], with a_k = E[W; k] and b_k = E[W^2; k]
integrals over the schedule's times. So the moments of U under uniform counts tell the variance of every schedule, and
the rare huge weights 1/t, which make a sampled variance useless, are integrated exactly.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from bd3lm_jax.config import Config
from bd3lm_jax.core import jax_settings, log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.diffusion import corrupt
from bd3lm_jax.diffusion.clip import CountSchedule
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.schedule import get_schedule
from bd3lm_jax.lm import LM, load
from bd3lm_jax.models import trunk
from bd3lm_jax.scoring.score import score, total_loss

LINEAR, UNIFORM, OPTIMAL = "linear", "exact count", "exact count, pi*"
FIRST_TIME = 1e-3  # times start there, as published: other schedules mask other probabilities at least
BERNOULLI = {  # name -> what differs from the linear schedule
    "U[.45, .95]": {"clip_low": 0.45, "clip_high": 0.95},
    "U[.3, .8]": {"clip_low": 0.3, "clip_high": 0.8},
    LINEAR: {},
    "logarithmic": {"schedule": "logarithmic"},
    "square root": {"schedule": "square_root"},
    "square": {"schedule": "square"},
    "cosine": {"schedule": "cosine"},
}
PUBLISHED = {  # variance of the NELBO on LM1B (BD3-LM, arXiv 2503.09573), by block size
    4: {"U[.45, .95]": 6.24, "U[.3, .8]": 10.33, LINEAR: 23.45, "logarithmic": 23.53, "square root": 26.43},
    16: {"U[.3, .8]": 3.58, "U[.45, .95]": 3.60, LINEAR: 7.62, "square": 13.03, "cosine": 13.00},
}
FLOOR = 0.02  # part of its uniform probability that a count keeps under pi*
TIMES, UNIFORMS = 4096, 1024  # points of the integrals over times (clipped schedules: a sixteenth) and over uniforms
RATIOS = ("variance_ratio", "relative_ratio", "gradient_ratio")


def study(workdir: str, *, split: str, batch: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """One row a schedule, also shown as a table on stderr; every schedule sees the same `draws` batches of rows.

    Keys: `schedule`, `block_size`; `mean` and `variance` of a block's loss in nats a token, over texts and noise;
    `gradient`: E|g - E g|^2 of the mean loss of half a batch; ratios to the linear schedule: `variance_ratio`,
    `published_ratio` (of variances; None where there is none), `relative_ratio` (of variances over squared means, as
    clipped schedules have other means) and `gradient_ratio` (likewise); `*_ci95` of the three that are measured:
    jackknife over batches, on the logarithm. Raises UserError for an AR model or one that sees the noise level, an odd
    batch, fewer than 2 draws, and too few blocks for each count.
    """
    from bd3lm_jax.data.prepare import prepare

    lm = load(workdir)
    _check(lm, workdir, batch, draws)
    size, config = lm.config.block_size, lm.run_config(workdir)
    assert lm.tokenizer is not None  # of a run
    loader = Loader(prepare(config.data, split, size, lm.tokenizer), batch, seed, None)
    batches = [loader.get(step)[1] for step in range(draws)]
    measure = jax.jit(make_measure(lm, config))
    uniform = Masked.uniform_counts(size)
    objectives = {**{name: bernoulli_objective(name, size) for name in BERNOULLI}, UNIFORM: uniform}
    best = _best_counts(uniform, lm, measure, batches, seed + 1)
    objectives[OPTIMAL] = dataclasses.replace(uniform, count_probs=best)
    gradients = {}
    for name, objective in objectives.items():
        measured = list(_draws(objective, lm, measure, batches, seed))
        gradients[name] = [float(gradient) for *_, gradient in measured]
        if name == UNIFORM:
            sums_RxSx3 = np.array([_sums(noised, rows, losses, size) for noised, rows, losses, _ in measured])
    moments = {name: weight_moments(objective) for name, objective in objectives.items()}
    result = _compare(sums_RxSx3, moments, gradients, PUBLISHED.get(size, {}))
    _show(result, f"{workdir}, {split}, block size {size}: loss of a block in nats a token, {draws} x {batch} rows")
    return [{**row, "block_size": size} for row in result]


def _check(lm: LM, workdir: str, batch: int, draws: int) -> None:
    if not lm.config.diffusion.uses_mask_token:
        kind = "an autoregressive" if lm.config.diffusion.causal else f"a '{lm.config.diffusion.kind}'"
        raise UserError(f"{workdir} is {kind} model, which has no schedule of masks: give a masked one")
    if trunk.is_time_conditioned(lm.config.model):
        raise UserError(f"{workdir} sees the noise level, so that its loss does not depend on the mask alone: give a "
                        "model with model.time_conditioning=False")
    if batch < 2 or batch % 2 or draws < 2:
        raise UserError(f"batch is {batch} and draws {draws}, expected an even batch of at least 2 and 2 draws")


def bernoulli_objective(name: str, block_size: int) -> Masked:
    """The objective of a name in BERNOULLI."""
    objective = dataclasses.replace(Masked.uniform_counts(block_size), corruption="bernoulli", **BERNOULLI[name])
    eps = get_schedule(objective.schedule).mask_prob(jnp.float32(FIRST_TIME))
    return dataclasses.replace(objective, eps=float(eps))


def weight_moments(objective: Masked) -> np.ndarray:
    """a_k and b_k, float64 `[2, S]`: expectations of W and of W^2 where k tokens of a block are masked, else 0."""
    size = objective.block_size
    k_S = np.arange(1, size + 1)
    if objective.corruption == "exact_count":
        probs_S = np.array(objective.count_probs or np.ones(size), np.float64)
        return np.array([1 / k_S, probs_S.sum() / (probs_S * k_S**2)])
    schedule, clipped = get_schedule(objective.schedule), (objective.clip_low, objective.clip_high) != (0, 1)
    low, high = (float(schedule.inverse(p)) for p in (max(objective.eps, objective.clip_low), objective.clip_high))
    points = TIMES // 16 if clipped else TIMES
    t_T = low * (high / low) ** ((np.arange(points) + 0.5) / points)  # evenly on a logarithmic scale
    part_T = t_T * math.log(high / low) / points / (high - low)  # of the times' probability
    prob_T, weight_T = (np.asarray(f(t_T.astype(np.float32)), np.float64) for f in
                        (schedule.mask_prob, schedule.weight))
    distribution = _truncated if clipped else _binomial
    probs_TxS = distribution(np.minimum(prob_T, 1), size, objective.clip_low, objective.clip_high)
    weight_T = weight_T if clipped else weight_T * (high - low)
    return np.array([(part_T * weight_T**power) @ probs_TxS for power in (1, 2)])


def _binomial(prob_T, size, low, high):
    from scipy.stats import binom  # comes with jax

    del low, high
    return binom.pmf(np.arange(1, size + 1), size, prob_T[:, None])


def _truncated(prob_T, size, low, high):
    """Part of the uniforms that `corrupt` turns into each count."""
    u_1xU = (jnp.arange(UNIFORMS)[None] + 0.5) / UNIFORMS
    counts_TxU = np.asarray(corrupt.truncated_binomial_counts(u_1xU, jnp.asarray(prob_T)[:, None], jnp.array([[size]]),
                                                              low, high, size))
    return np.stack([(counts_TxU == k).mean(1) for k in range(1, size + 1)], axis=1)


def make_measure(lm: LM, config: Config):
    """`f(params, noised, rows)` -> cross-entropies `[B, 1, L]` (0 where nothing is masked), and |g1 - g2|^2 / 2.

    g1 and g2 are the gradients of the mean loss of each half of the rows.
    """

    def half(params, noised, rows):
        def loss(params, weight_BxMxL):
            scored = score(lm.model, params, config.diffusion, noised.replace(weight_BxMxL=weight_BxMxL),
                           rows, config.execution, lm.special.end)
            return total_loss(lm.model, params, scored, lm.special.mask, config.compute.loss_chunk)
        grads, losses = jax.grad(loss, argnums=(0, 1))(params, noised.weight_BxMxL)
        tokens = jnp.sum(rows["segments"] != 0)
        return jax.tree.map(lambda g: g / tokens, grads), jnp.where(noised.weight_BxMxL > 0, losses, 0)

    def measure(params, noised, rows):
        halves = jax.tree.map(lambda x: jnp.asarray(x).reshape(2, -1, *x.shape[1:]), (noised, rows))
        grads, losses = jax.lax.map(lambda xs: half(params, *xs), halves)
        variance = sum(jnp.sum((g[0] - g[1])**2) for g in jax.tree.leaves(grads)) / 2
        return losses.reshape(noised.weight_BxMxL.shape), variance

    return measure


def _draws(objective: Masked, lm: LM, measure, batches: list[dict], seed: int):
    """Noised copies and what `measure` says of them, a batch at a time."""
    draw = jax.jit(objective.corrupt, static_argnums=(3, 4, 5))
    for step, rows in enumerate(batches):
        key = jax.random.fold_in(jax_settings.key(seed), step)
        noised = draw(key, rows["tokens"], rows["segments"], 1, lm.special.mask, lm.special.end)
        noised = noised.replace(capacity=lm.context)  # one program for all schedules
        losses, gradient = measure(lm.params, noised, rows)
        yield noised, rows, losses, gradient


def _sums(noised, rows: dict, losses_Bx1xL, size: int) -> np.ndarray:
    """Of a batch, by masked tokens k = 1..S of a block: blocks, and the sums of U and U^2. Short blocks are left out.
    """
    shape = (*rows["segments"].shape[:1], -1, size)
    full_BxK = (rows["segments"] != 0).reshape(shape).all(-1)
    counts_N = np.asarray(noised.weight_BxMxL > 0).reshape(shape).sum(-1)[full_BxK]
    u_N = np.asarray(losses_Bx1xL, np.float64).reshape(shape).sum(-1)[full_BxK] / size
    return np.stack([np.bincount(counts_N, u_N**power, size + 1)[1:] for power in range(3)], axis=1)


def _best_counts(uniform: Masked, lm: LM, measure, batches: list[dict], seed: int) -> tuple[float, ...]:
    """pi* (diffusion/clip.py) by other noise than that it is judged by."""
    schedule = CountSchedule(uniform.block_size, FLOOR, decay=1.0)
    state = schedule.init_state()
    for noised, _, losses_BxMxL, _ in _draws(uniform, lm, measure, batches, seed):
        state = schedule.update_state(state, schedule.batch_statistics(losses_BxMxL, noised.weight_BxMxL > 0))
    return tuple(schedule.as_metrics(state)["count_probs"])


def _compare(sums_RxSx3: np.ndarray, moments: dict[str, np.ndarray], gradients: dict[str, list[float]],
             published: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of `study` from R batches."""
    gradients_RxN = np.array([gradients[name] for name in moments], np.float64).T
    linear = list(moments).index(LINEAR)

    def numbers(sums_Sx3, gradient_N):
        """mean, variance, gradient and RATIOS of every schedule, `[6, N]`."""
        blocks_S, first_S, second_S = sums_Sx3.T
        if not blocks_S.all():
            raise UserError(f"the rows hold {blocks_S.sum():.0f} blocks, too few for each of the {len(blocks_S)} "
                            "counts of masked tokens: take larger batches or more draws")
        mean_N = np.array([a @ (first_S / blocks_S) for a, _ in moments.values()])
        variance_N = np.array([b @ (second_S / blocks_S) for _, b in moments.values()]) - mean_N**2
        relative_N, relative_gradient_N = variance_N / mean_N**2, gradient_N / mean_N**2
        ratios = [x / x[linear] for x in (variance_N, relative_N, relative_gradient_N)]
        return np.array([mean_N, variance_N, gradient_N, *ratios])

    found_6xN = numbers(sums_RxSx3.sum(0), gradients_RxN.mean(0))
    jackknife_groups = [np.delete(np.arange(len(sums_RxSx3)), batch) for batch in range(len(sums_RxSx3))]
    without_Rx6xN = np.array(
        [numbers(sums_RxSx3[group].sum(0), gradients_RxN[group].mean(0)) for group in jackknife_groups])
    low_3xN, high_3xN = jackknife(found_6xN[3:], without_Rx6xN[:, 3:])
    rows = []
    for i, name in enumerate(moments):
        row = {"schedule": name, **dict(zip(("mean", "variance", "gradient", *RATIOS), found_6xN[:, i].tolist()))}
        row |= {f"{ratio}_ci95": [float(low_3xN[j, i]), float(high_3xN[j, i])] for j, ratio in enumerate(RATIOS)}
        rows.append({**row, "published_ratio": published[name] / published[LINEAR] if name in published else None})
    return rows


def jackknife(values: np.ndarray, without_Rx: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals of positive estimates (any shape), from those without each of R independent groups.

    On the logarithm: se^2 = (R - 1) / R sum of squared deviations (Efron, 1982), Student's t with R - 1 degrees.
    """
    groups = len(without_Rx)
    logs_Rx = np.log(without_Rx)
    se = np.sqrt((groups - 1) / groups * ((logs_Rx - logs_Rx.mean(0)) ** 2).sum(0))
    margin = stdtrit(groups - 1, (1 + level) / 2) * se
    return values * np.exp(-margin), values * np.exp(margin)


def _show(rows: list[dict], title: str) -> None:
    def cells(row, ratio):
        return f"{row[ratio]:.3f}", "{:.3f} .. {:.3f}".format(*row[f"{ratio}_ci95"])

    log.table(title, ("schedule", "mean", "var", "to linear", "95 %", "published", "var/mean^2", "95 %", "gradient",
                      "95 %"),
              [(row["schedule"], f"{row['mean']:.3f}", f"{row['variance']:.3f}", *cells(row, "variance_ratio"),
                "-" if row["published_ratio"] is None else f"{row['published_ratio']:.3f}",
                *cells(row, "relative_ratio"), *cells(row, "gradient_ratio")) for row in rows])
