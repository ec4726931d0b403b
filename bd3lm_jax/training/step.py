"""The training step: noise, two-stream pass, loss, update; one jitted function of (state, batch)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bd3lm_jax.config import Config
from bd3lm_jax.core import jax_settings
from bd3lm_jax.core.state import OBJECTIVE_PARAMS, TrainState, trainable_params
from bd3lm_jax.diffusion.learned_noise import corrupt_arguments
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import Backbone
from bd3lm_jax.parallel.sharding import BATCH_AXES, constrain
from bd3lm_jax.scoring.score import SpecialIds, exceeds_capacity, score, total_loss
from bd3lm_jax.scoring.transform import apply
from bd3lm_jax.scoring.transforms import transforms_of
from bd3lm_jax.training import optim

PREPARE_FOLD = 0x70726570  # tells what an objective does to a batch from its noise


def make_step(config: Config, model: Backbone, tx: optax.GradientTransformation, special: SpecialIds):
    """`step(state, batch) -> (state, metrics)`, to be jitted; batch holds int32 `[B, L]` tokens, segments, positions.

    The noise is a function of (seed, step, row), and of `state.noise` if it is chosen from the data, drawn for the
    whole batch before microbatches are cut. A step whose loss or gradient is not finite leaves the state as it was,
    except for the step count.
    """
    objective, transforms = config.diffusion, transforms_of(config)
    gradients, update = make_gradients(config, model, special), make_update(config, tx)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax_settings.key(config.seed), state.step)
        noise_key, _ = jax.random.split(key)
        batch = objective.prepare_batch(jax.random.fold_in(noise_key, PREPARE_FOLD), batch, special.end)
        noised = draw_noise(config, special, noise_key, batch, config.train.noise_samples, state.noise, state.params)
        rows = apply(transforms, "prepare_rows", {**batch, "noised": noised}, key, state.step)
        total, grads, batch_statistics = sum_over_rows(functools.partial(gradients, state.params), rows,
                                                       config.compute.microbatch or batch["tokens"].shape[0])
        maskable_BxL = apply(transforms, "maskable_segments", batch["segments"], batch)
        tokens = jnp.maximum(jnp.sum(objective.counted_tokens(noised, maskable_BxL)), 1)
        count = config.train.noise_samples * tokens.astype(jnp.float32)
        loss, grads = total / count, jax.tree.map(lambda g: g / count, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        # A branch, not a selection: the new state is written over the old one, with no second copy.
        new = jax.lax.cond(finite, functools.partial(update, state.step, grads, batch_statistics), lambda *old: old,
                           state.params, state.ema, state.opt_state, state.noise)
        metrics = {"loss": loss, "grad_norm": grad_norm, "finite": finite,
                   "masked": jnp.sum(noised.weight_BxMxL > 0) / count, "overflow": jnp.any(exceeds_capacity(noised))}
        return TrainState(state.step + 1, *new), metrics

    return step


def make_gradients(config: Config, model: Backbone, special: SpecialIds):
    """`f(params, rows)` -> summed loss, its gradient in what is trained, statistics of the noise; sums over rows."""
    objective, noise, transforms = config.diffusion, config.adaptive_noise, transforms_of(config)
    differentiated = (0, 1) if noise.learns or objective.learns else (0,)

    def loss_of(trainable, weight_BxMxL, params, rows):
        params = apply(transforms, "params", params | trainable)
        noised = rows["noised"].replace(weight_BxMxL=weight_BxMxL)
        scored = score(model, params, objective, noised, rows, config.execution, special.end, transforms)
        return scored.aux + total_loss(model, params, scored, special.mask, config.compute.loss_chunk,
                                       objective.loss(params.get(OBJECTIVE_PARAMS)))

    def gradients(params, rows):
        weight_BxMxL = rows["noised"].weight_BxMxL
        gradient = jax.value_and_grad(loss_of, differentiated)
        total, (grads, *losses) = gradient(trainable_params(params), weight_BxMxL, params, rows)
        losses_BxMxL = losses[0] if losses else None  # the derivatives of the sum in its weights
        grads = objective.add_noise_gradient(grads, params, rows["noised"], rows, losses_BxMxL)
        return total, grads, noise.batch_statistics(losses_BxMxL, weight_BxMxL > 0, rows["tokens"])

    return gradients


def make_update(config: Config, tx: optax.GradientTransformation):
    """`f(step, grads, batch_statistics, params, ema, opt_state, noise)` -> the last four after the update."""
    def update(step, grads, batch_statistics, params, ema, opt_state, noise):
        updates, opt_state = tx.update(grads, opt_state, trainable_params(params))
        params = params | optax.apply_updates(trainable_params(params), updates)
        ema = optim.update_ema(ema, params, config.optim.ema_decay, step + 1)
        return params, ema, opt_state, config.adaptive_noise.update_state(noise, batch_statistics)

    return update


def draw_noise(config: Config, special: SpecialIds, key: jax.Array, batch: dict, noise_samples: int, noise: dict,
               params: dict) -> Noised:
    """Noised copies of a batch as training draws them when the choice of the noise is in the state `noise`.

    params: of the run; objectives that learn their noise draw it with theirs.
    """
    objective, transforms = config.diffusion, transforms_of(config)
    arguments = {name: batch[name] for name in config.batch_arrays if name in objective.extra_batch_keys}
    arguments |= corrupt_arguments(params) | config.adaptive_noise.corrupt_arguments(noise, batch["tokens"])
    maskable_BxL = apply(transforms, "maskable_segments", batch["segments"], batch)
    noised = objective.corrupt(key, batch["tokens"], maskable_BxL, noise_samples, special.mask, special.end,
                               **arguments)
    return apply(transforms, "noised", noised, batch)


def sum_over_rows(function: Callable[[dict], Any], rows: dict, microbatch: int) -> Any:
    """Sum of `function(part)`, a tree of float arrays, over parts of `microbatch` rows of a batch."""
    batch = rows["tokens"].shape[0]
    if microbatch == batch:
        return function(rows)
    parts = batch // microbatch

    def split_microbatches(x):
        """Every part takes rows of every device: row r goes to part r mod parts."""
        x = x.reshape(microbatch, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, BATCH_AXES, *(None,) * (x.ndim - 2))

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, function(part)), None

    microbatches = jax.tree.map(split_microbatches, rows)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(body, zero, microbatches)[0]
