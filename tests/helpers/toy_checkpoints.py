"""Small states, saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.state import TrainState

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step, ema=True, width=16):
    rng = np.random.default_rng(step)
    # Incompressible values: a flipped byte of a data file then lands in the array and not in the compression.
    params = {"blocks": {"qkv": {"kernel": jnp.asarray(rng.standard_normal((2, 64, width)), jnp.float32)}},
              "head": {"bias": jnp.asarray(rng.standard_normal(width), jnp.bfloat16)}}
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(rng.integers(9), x.dtype), TX.init(params))
    average = jax.tree.map(lambda x: 2 * x.astype(jnp.float32), params) if ema else {}
    return TrainState(step=jnp.int32(step), params=params, ema=average, opt_state=opt_state)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def saved(workdir, steps, keep=3, **options):
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step, **options), {"config": {"seed": step}})
    return workdir / "checkpoints"


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def restore(workdir, **options):
    """(state, meta, warnings) of a fresh Checkpoints."""
    warnings = []
    with Checkpoints(workdir, keep=3, warn=warnings.append, **options) as checkpoints:
        state, meta = checkpoints.restore(abstract(make_state(0)))
    return state, meta, warnings
