"""AdamW, learning-rate schedules and the exponential moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bd3lm_jax.core.errors import lookup
from bd3lm_jax.core.schema import OptimConfig
from bd3lm_jax.core.state import LORA


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm (`clip_norm` 0: none); what decays is said by `weight_decay_mask`."""
    adamw = optax.adamw(make_schedule(optim, steps), optim.beta1, optim.beta2, optim.eps,
                        weight_decay=optim.weight_decay, mask=weight_decay_mask)
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []
    return optax.chain(*clip, adamw)


def weight_decay_mask(params: Any) -> Any:
    """Tree of booleans: weight decay applies to the network's matrices, or where these are frozen to the factors of
    their low-rank updates, never to norms, biases and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel" or path[0].key == LORA, params)


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, ..., steps - 1: linear warm-up from 0, then "constant", "cosine" or "wsd".

    That of the last update is `final_lr_fraction` times `lr` for "cosine" and "wsd". The warm-up is that of
    `warmup_steps`.
    """
    after = lookup({"constant": _constant, "cosine": _cosine, "wsd": _wsd}, optim.schedule, "optim.schedule")
    warmup = warmup_steps(optim, steps)
    schedule = after(optim, max(steps - 1 - warmup, 0), steps)
    if warmup == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, optim.lr, warmup), schedule], [warmup])


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """Updates of the warm-up of a run of `steps`: `optim.warmup_steps`, or where these leave no room for what follows
    a tenth of the steps, or what the decay leaves if that is less."""
    after = {"constant": 1, "cosine": 2, "wsd": max(2, _decay_steps(optim, steps))}[optim.schedule]
    remaining_steps = max(steps - after, 0)  # so that an update has the full rate
    return optim.warmup_steps if optim.warmup_steps <= remaining_steps else min(steps // 10, remaining_steps)


def _constant(optim: OptimConfig, remaining_steps: int, steps: int) -> optax.Schedule:
    return optax.constant_schedule(optim.lr)


def _cosine(optim: OptimConfig, remaining_steps: int, steps: int) -> optax.Schedule:
    if remaining_steps == 0:  # the only update after the warm-up is the last one
        return optax.constant_schedule(optim.lr * optim.final_lr_fraction)
    return optax.cosine_decay_schedule(optim.lr, remaining_steps, alpha=optim.final_lr_fraction)


def _wsd(optim: OptimConfig, remaining_steps: int, steps: int) -> optax.Schedule:
    """Stable, then linear decay over the last `decay_fraction` of the steps, at least one."""
    if remaining_steps == 0:
        return optax.constant_schedule(optim.lr * optim.final_lr_fraction)
    decay = min(_decay_steps(optim, steps), remaining_steps)
    return optax.linear_schedule(optim.lr, optim.final_lr_fraction * optim.lr, decay,
                                 transition_begin=remaining_steps - decay)


def _decay_steps(optim: OptimConfig, steps: int) -> int:
    return max(1, round(optim.decay_fraction * steps))


def ema_decay(ema: float, step: jax.Array) -> jax.Array:
    """min(ema, (1 + n) / (10 + n)) after n updates: the average forgets its random start quickly (BD3-LM's code)."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(ema, (1 + step) / (10 + step))


def update_ema(average: Any, params: Any, ema: float, step: jax.Array) -> Any:
    """`d * average + (1 - d) * params` in float32, d = ema_decay(ema, step), after `step` updates (this one counted).

    An average that is off ({}) stays {}.
    """
    if not average:
        return average
    decay = ema_decay(ema, step)
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p.astype(jnp.float32) - a), average, params)
