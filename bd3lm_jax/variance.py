"""How much the training loss of a trained network varies, by noise schedule: the variance study of BD3-LM.

    from bd3lm_jax.variance import study
    study("runs/tiny", split="valid", batch=16, draws=16, seed=0)

The network stays the same, so nothing is said about what training with another schedule would give.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import log
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.diffusion.clip import CountSchedule
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.errors import UserError
from bd3lm_jax.lm import LM, load
from bd3lm_jax.step import execution_of, score, total_loss

LINEAR, UNIFORM, OPTIMAL = "linear", "exact count", "exact count, pi*"
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


@dataclasses.dataclass(frozen=True)
class Variation:
    """Of a block's loss (nats a token) over texts and noise; gradient: E|g - E g|^2 of the mean loss of half a batch.

    Schedules whose losses have different means are compared by their variances over mean**2.
    """

    schedule: str
    mean: float
    variance: float
    gradient: float


def study(workdir: str, *, split: str, batch: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """One row a schedule, also shown as a table on stderr; every schedule sees the same `draws` batches of rows.

    Keys: `Variation`'s, and ratios to the linear schedule: `variance_ratio`, `published_ratio` (of variances; None
    where there is none), and with variances over squared means `relative_ratio` and `gradient_ratio`. Raises UserError
    for an AR model, an odd batch, and draws below 1.
    """
    from bd3lm_jax.data.prepare import prepare

    lm = load(workdir)
    if lm.config.diffusion.causal:
        raise UserError(f"{workdir} is an autoregressive model, which has no noise schedule: give a masked one")
    if batch < 2 or batch % 2 or draws < 1:
        raise UserError(f"batch is {batch} and draws {draws}, expected an even batch of at least 2 and a draw")
    size = lm.config.block_size
    rows = prepare(lm.config.data, split, size, lm.tokenizer)
    loader = Loader(rows, batch, seed, None)
    batches = [loader.get(step)[1] for step in range(draws)]
    measure = jax.jit(_make_measure(lm))
    uniform = Masked.uniform_counts(size)
    objectives = {name: dataclasses.replace(uniform, corruption="bernoulli", **changes)
                  for name, changes in BERNOULLI.items()}
    objectives[UNIFORM] = uniform
    found = {name: _variation(name, objective, lm, measure, batches, seed) for name, objective in objectives.items()}
    optimal = dataclasses.replace(uniform, count_probs=_best_counts(uniform, lm, measure, batches, seed + 1))
    found[OPTIMAL] = _variation(OPTIMAL, optimal, lm, measure, batches, seed)
    result = [_row(one, found[LINEAR], PUBLISHED.get(size, {})) for one in found.values()]
    log.table(f"{workdir}, {split}, block size {size}: loss of a block in nats a token, {draws} x {batch} rows",
              ("schedule", "mean", "var", "to linear", "published", "var/mean^2", "gradient"),
              [(row["schedule"], f"{row['mean']:.3f}", f"{row['variance']:.3f}", f"{row['variance_ratio']:.3f}",
                "-" if row["published_ratio"] is None else f"{row['published_ratio']:.3f}",
                f"{row['relative_ratio']:.3f}", f"{row['gradient_ratio']:.3f}") for row in result])
    log.note("All ratios are to the linear schedule; the last two are of variances over the squared mean loss.")
    return result


def _make_measure(lm: LM):
    """`f(params, noised, rows)` -> cross-entropies `[B, 1, L]` (0 where nothing is masked), and |g1 - g2|^2 / 2.

    g1 and g2 are the gradients of the mean loss of each half of the rows.
    """
    execution = execution_of(lm.config)

    def half(params, noised, rows):
        def loss(params, weight_BxMxL):
            scored = score(lm.model, params, lm.config.diffusion, noised.replace(weight_BxMxL=weight_BxMxL),
                           rows["tokens"], rows["positions"], rows["segments"], execution)
            return total_loss(lm.model, params, scored, lm.special.mask, lm.config.compute.loss_chunk)
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
    """Noised views and what `measure` says of them, a batch at a time."""
    corrupt = jax.jit(objective.corrupt, static_argnums=(3, 4, 5))
    for step, rows in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), step)
        noised = corrupt(key, rows["tokens"], rows["segments"], 1, lm.special.mask, lm.special.end)
        noised = noised.replace(capacity=lm.config.data.length)  # one program for all schedules
        yield noised, rows, *measure(lm.params, noised, rows)


def _variation(name: str, objective: Masked, lm: LM, measure, batches: list[dict], seed: int) -> Variation:
    losses, gradients = [], []
    for noised, rows, losses_BxMxL, gradient in _draws(objective, lm, measure, batches, seed):
        nats = np.asarray(losses_BxMxL * noised.weight_BxMxL, np.float64)[:, 0]
        full_BxK = (rows["segments"] != 0).reshape(len(nats), -1, objective.block_size).all(-1)
        losses.append(nats.reshape(*full_BxK.shape, -1).mean(-1)[full_BxK])
        gradients.append(float(gradient))
    losses = np.concatenate(losses)
    return Variation(name, float(losses.mean()), float(losses.var(ddof=1)), float(np.mean(gradients)))


def _best_counts(uniform: Masked, lm: LM, measure, batches: list[dict], seed: int) -> tuple[float, ...]:
    """pi* (diffusion/clip.py) by other noise than that it is judged by."""
    schedule = CountSchedule(uniform.block_size, FLOOR, decay=1.0)
    state = schedule.first()
    for noised, _, losses_BxMxL, _ in _draws(uniform, lm, measure, batches, seed):
        state = schedule.learn(state, schedule.seen(losses_BxMxL, noised.weight_BxMxL > 0))
    return tuple(schedule.shown(state)["count_probs"])


def _row(one: Variation, linear: Variation, published: dict[str, float]) -> dict[str, Any]:
    known, scale = one.schedule in published, (linear.mean / one.mean)**2
    return {**dataclasses.asdict(one), "variance_ratio": one.variance / linear.variance,
            "published_ratio": published[one.schedule] / published[LINEAR] if known else None,
            "relative_ratio": scale * one.variance / linear.variance,
            "gradient_ratio": scale * one.gradient / linear.gradient}
