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
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.running import RunningLoss
from bd3lm_jax.models import Backbone, lora
from bd3lm_jax.parallel.sharding import BATCH_AXES, constrain
from bd3lm_jax.scoring import annealing, response_mask
from bd3lm_jax.scoring.score import SpecialIds, exceeds_capacity, score, total_loss
from bd3lm_jax.training import optim

PREPARE_FOLD = 0x70726570  # tells what an objective does to a batch from its noise


def make_step(config: Config, model: Backbone, tx: optax.GradientTransformation, special: SpecialIds):
    """`step(state, batch) -> (state, metrics)`, to be jitted; batch holds int32 `[B, L]` tokens, segments, positions.

    The noise is a function of (seed, step, row), and of `state.noise` if it is chosen from the data, drawn for the
    whole batch before microbatches are cut. A step whose loss or gradient is not finite leaves the state as it was,
    except for the step count.
    """
    execution = config.execution
    objective, schedule = config.diffusion, config.schedule
    learns = schedule is not None and schedule.learns

    def loss_of(trainable, params, weight_BxMxL, rows):
        params = lora.merge_lora(params | trainable, lora.scale_of(config.train))
        keys = rows["dropout_keys"] if config.model.dropout > 0 else None
        noised = rows["noised"].replace(weight_BxMxL=weight_BxMxL)
        scored = score(model, params, objective, noised, rows["tokens"], rows["positions"], rows["segments"],
                       execution, keys, rows.get("sees"), special.end)
        token_loss = objective.token_loss
        if token_loss is not None and objective.learns:
            token_loss = functools.partial(token_loss, learned_params=params[OBJECTIVE_PARAMS])
        return scored.aux + total_loss(model, params, scored, special.mask, config.compute.loss_chunk, token_loss,
                                       objective.mean_term)

    def gradients(params, rows):
        """Loss, its gradient in what is trained, and what the schedule sees of the losses: the derivatives in their
        weights."""
        weight_BxMxL = rows["noised"].weight_BxMxL
        if not learns and not objective.learns:
            return *jax.value_and_grad(loss_of)(trainable_params(params), params, weight_BxMxL, rows), {}
        total, (grads, losses_BxMxL) = jax.value_and_grad(loss_of, argnums=(0, 2))(trainable_params(params), params,
                                                                                   weight_BxMxL, rows)
        if objective.learns:
            noise_grads = objective.noise_gradient(objective_params(params), rows["noised"], rows["tokens"], rows["segments"], losses_BxMxL)
            grads = {**grads, OBJECTIVE_PARAMS: jax.tree.map(jnp.add, grads[OBJECTIVE_PARAMS], noise_grads)}
        return total, grads, schedule.batch_statistics(losses_BxMxL, weight_BxMxL > 0, rows["tokens"]) if learns else {}

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax_settings.key(config.seed), state.step)
        noise_key, dropout_key = jax.random.split(key)
        batch = objective.prepare_batch(jax.random.fold_in(noise_key, PREPARE_FOLD), batch, special.end)
        tokens = batch["tokens"]
        noised = draw_noise(config, special, noise_key, batch, config.train.noise_samples, state.noise,
                            objective_params(state.params))
        dropout_keys = jax.vmap(lambda row: jax.random.fold_in(dropout_key, row))(jnp.arange(tokens.shape[0]))
        rows = {**batch, "noised": noised, "dropout_keys": dropout_keys}
        if config.train.anneal_steps:
            rows["sees"] = annealing.sample_max_visible_position(key, state.step, config.train.anneal_steps, batch["positions"],
                                                                 objective.block_size)
        total, grads, batch_statistics = sum_over_rows(lambda part: gradients(state.params, part), rows,
                                                       config.compute.microbatch or tokens.shape[0])
        scored = noised.weight_BxMxL > 0 if objective.causal else response_mask.maskable_segments(objective, batch) != 0
        count = config.train.noise_samples * jnp.maximum(jnp.sum(scored), 1).astype(jnp.float32)
        loss, grads = total / count, jax.tree.map(lambda g: g / count, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(params, ema, opt_state, noise):
            updates, opt_state = tx.update(grads, opt_state, trainable_params(params))
            params = params | optax.apply_updates(trainable_params(params), updates)
            ema = optim.update_ema(ema, params, config.optim.ema_decay, state.step + 1)
            return params, ema, opt_state, schedule.update_state(noise, batch_statistics) if learns else noise

        # A branch, not a selection: the new state is written over the old one, with no second copy.
        new = jax.lax.cond(finite, update, lambda *old: old, state.params, state.ema, state.opt_state, state.noise)
        metrics = {"loss": loss, "grad_norm": grad_norm, "finite": finite,
                   "masked": jnp.sum(noised.weight_BxMxL > 0) / count, "overflow": jnp.any(exceeds_capacity(noised))}
        return TrainState(state.step + 1, *new), metrics

    return step


def objective_params(params: dict) -> dict | None:
    """What `corrupt` is told of the objective's own parameters; None if there are none."""
    return {**params[OBJECTIVE_PARAMS], "embedding": params["embed"]["embedding"]} if OBJECTIVE_PARAMS in params else None


def draw_noise(config: Config, special: SpecialIds, key, batch: dict, noise_samples: int, noise: dict,
               learned_params: dict | None = None) -> Noised:
    """Noised copies of a batch as training draws them when the schedule of the noise is in the state `noise`.

    learnt: as `objective_params` gives it.
    """
    objective, schedule = config.diffusion, config.schedule
    arguments = key, batch["tokens"], response_mask.maskable_segments(objective, batch), noise_samples, special.mask, special.end
    corrupt_kwargs = {name: batch[name] for name in config.batch_arrays if name in objective.extra_batch_keys}
    corrupt_kwargs |= {} if learned_params is None else {"learned_params": learned_params}
    if isinstance(schedule, RunningLoss):
        corrupt_kwargs["density"] = schedule.density(noise, batch["tokens"])
    if schedule is not None and not isinstance(schedule, RunningLoss):
        arguments += schedule.distribution(noise, batch["tokens"].shape[1] // objective.block_size),
    return response_mask.zero_prompt_weights(objective, batch, objective.corrupt(*arguments, **corrupt_kwargs))


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
