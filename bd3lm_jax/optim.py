"""AdamW, learning-rate schedules and the exponential moving average of the weights."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from bd3lm_jax.errors import UserError, lookup

if TYPE_CHECKING:
    from bd3lm_jax.config import OptimConfig


def make_optimizer(optim: "OptimConfig", steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm (`clip_norm` 0: none); only leaves named "kernel" decay."""
    adamw = optax.adamw(make_schedule(optim, steps), optim.beta1, optim.beta2, optim.eps,
                        weight_decay=optim.weight_decay, mask=decays)
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []
    return optax.chain(*clip, adamw)


def decays(params: Any) -> Any:
    """Tree of booleans: weight decay applies to matrices, never to norms, biases and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_schedule(optim: "OptimConfig", steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: linear warm-up from 0, then "constant", "cosine" or "wsd".

    Raises UserError if the warm-up leaves no room for the decay within `steps` updates.
    """
    after = lookup({"constant": _constant, "cosine": _cosine, "wsd": _wsd}, optim.schedule, "optim.schedule")
    schedule = after(optim, steps)
    if optim.warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, optim.lr, optim.warmup_steps)
    return optax.join_schedules([warmup, schedule], [optim.warmup_steps])


def _constant(optim: "OptimConfig", steps: int) -> optax.Schedule:
    return optax.constant_schedule(optim.lr)


def _cosine(optim: "OptimConfig", steps: int) -> optax.Schedule:
    _check_room(optim, steps, decay=1)
    return optax.cosine_decay_schedule(optim.lr, steps - optim.warmup_steps, alpha=optim.final_lr_fraction)


def _wsd(optim: "OptimConfig", steps: int) -> optax.Schedule:
    """Warm-up, stable, linear decay over the last `decay_fraction` of the steps."""
    decay = max(1, round(optim.decay_fraction * steps))
    _check_room(optim, steps, decay)
    stable = steps - optim.warmup_steps - decay
    return optax.linear_schedule(optim.lr, optim.final_lr_fraction * optim.lr, decay, transition_begin=stable)


def _check_room(optim: "OptimConfig", steps: int, decay: int) -> None:
    if optim.warmup_steps + decay > steps:
        raise UserError(f"optim.warmup_steps={optim.warmup_steps} and {decay} decay steps do not fit into "
                        f"train.steps={steps}: shorten the warm-up or use optim.schedule='constant'")


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
