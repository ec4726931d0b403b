"""The training step: noise, two-stream pass, loss, update; one jitted function of (state, batch)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bd3lm_jax import optim, passes
from bd3lm_jax.config import Config
from bd3lm_jax.diffusion.masked import cross_entropy_subs
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.passes import Execution
from bd3lm_jax.sharding import BATCH_AXES, constrain
from bd3lm_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that the objective needs; mask is -1 for a vocabulary without a mask token."""

    mask: int
    end: int


def execution_of(config: Config) -> Execution:
    """How the passes of a run are computed."""
    compute = config.compute
    return Execution(compute.attention, compute.layers, compute.remat, one_document=config.data.layout != "pack")


def row_losses(model: Backbone, params: dict, objective: Any, noised: Noised, tokens_BxL, position_BxL, segment_BxL,
               mask_id: int, execution: Execution, dropout_keys=None) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the tokens that count, in nats, and where they are.

    Returns float32 `[B, M, C]` and row indices int32 `[B, M, C]`, where C = noised.capacity: every token with weight
    > 0 is among them, the others have weight 0. Only these C positions reach the head.
    """
    sigma = noised.sigma_BxMxK if trunk.takes_level(model.config) else None
    if objective.causal:
        if not objective.bos:  # nobody reads the end token
            segment_BxL = jnp.where(noised.weight_BxMxL[:, 0] > 0, segment_BxL, 0)
            execution = dataclasses.replace(execution, one_document=False)
        h = passes.one_stream(model, params, noised.xt_BxMxL[:, 0], position_BxL, segment_BxL, rule="causal",
                              block_size=1, execution=execution, dropout_keys=dropout_keys)[:, None]
    else:
        h = passes.two_stream(model, params, noised.xt_BxMxL, tokens_BxL, position_BxL, segment_BxL,
                              block_size=objective.block_size, sigma_BxMxn=sigma, execution=execution,
                              dropout_keys=dropout_keys)
    length = tokens_BxL.shape[1]
    if noised.capacity >= length:
        index = jnp.broadcast_to(jnp.arange(length), noised.xt_BxMxL.shape)
    else:
        index = counted_positions(noised.weight_BxMxL > 0, noised.capacity)
        h = jnp.take_along_axis(h, index[..., None], axis=2)
        sigma = None if sigma is None else jnp.take_along_axis(sigma, index // objective.block_size, axis=2)
    logits = trunk.logits(model, params, h, sigma)
    target = jnp.take_along_axis(jnp.broadcast_to(tokens_BxL[:, None], noised.xt_BxMxL.shape), index, axis=2)
    loss = cross_entropy_subs(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), mask_id)
    return loss.reshape(index.shape), index


def counted_positions(counted_BxMxL, capacity: int) -> jax.Array:
    """Indices `[B, M, capacity]` with every counted position first, in order (the rest: other positions)."""
    return jnp.argsort(~counted_BxMxL, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)


def make_step(config: Config, model: Backbone, tx: optax.GradientTransformation, special: SpecialIds):
    """`step(state, batch) -> (state, metrics)`, to be jitted; batch holds int32 `[B, L]` tokens, segments, positions.

    The noise is a function of (seed, step, row), drawn for the whole batch before microbatches are cut. A step whose
    loss or gradient is not finite leaves the state as it was, except for the step count.
    """
    execution = execution_of(config)
    objective = config.diffusion

    def loss_of(params, rows):
        keys = rows["dropout_keys"] if config.model.dropout > 0 else None
        losses, index = row_losses(model, params, objective, rows["noised"], rows["tokens"], rows["positions"],
                                   rows["segments"], special.mask, execution, keys)
        weight = jnp.take_along_axis(rows["noised"].weight_BxMxL, index, axis=2)
        return jnp.sum(weight * losses)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        noise_key, dropout_key = jax.random.split(key)
        tokens = batch["tokens"]
        noised = objective.corrupt(noise_key, tokens, batch["segments"], views=1, mask_id=special.mask,
                                   end_id=special.end)
        dropout_keys = jax.vmap(lambda row: jax.random.fold_in(dropout_key, row))(jnp.arange(tokens.shape[0]))
        rows = {**batch, "noised": noised, "dropout_keys": dropout_keys}
        total, grads = _accumulate(loss_of, state.params, rows, config.compute.microbatch or tokens.shape[0])
        scored = noised.weight_BxMxL > 0 if objective.causal else batch["segments"] != 0
        count = jnp.maximum(jnp.sum(scored), 1).astype(jnp.float32)
        loss, grads = total / count, jax.tree.map(lambda g: g / count, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optim.update_ema(state.ema, params, config.optim.ema, state.step + 1)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, ema, opt_state),
                           (state.params, state.ema, state.opt_state))
        metrics = {"loss": loss, "grad_norm": grad_norm, "finite": finite,
                   "masked": jnp.sum(noised.weight_BxMxL > 0) / count}
        return TrainState(state.step + 1, *new), metrics

    return step


def _accumulate(loss_of, params, rows, microbatch: int):
    """Sum of the losses of all rows and its gradient, `microbatch` rows at a time."""
    batch = rows["tokens"].shape[0]
    if microbatch == batch:
        return jax.value_and_grad(loss_of)(params, rows)
    parts = batch // microbatch

    def cut(x):
        """Every part takes rows of every device: row r goes to part r mod parts."""
        x = x.reshape(microbatch, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, BATCH_AXES, *(None,) * (x.ndim - 2))

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_of)(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    return jax.lax.scan(body, zero, jax.tree.map(cut, rows))[0]
