"""A tiny network of random parameters, streams of its tokens, and its passes jitted: what tests of the trunk share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from trunk_passes import run_pass

from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.trunk import Stream

CONFIG = DiTConfig(vocab_size=31, num_layers=3, hidden_size=16, num_heads=2, mlp_ratio=2, dropout=0.0, adaln=True,
                   cond_dim=8, time_conditioning=True, rope_theta=1e4)
LENGTH, BLOCK = 12, 4


@functools.cache
def network(dropout=0.0, dtype=jnp.float32):
    """A network with random parameters everywhere: a fresh one, zero at its gates and head, ignores its input."""
    model = build(dataclasses.replace(CONFIG, dropout=dropout), dtype)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


def make_stream(ids, block_size, documents=None, sigma=None):
    """A stream over rows of the given documents (lengths; the rest is padding), noised if ids are [B, M, T]."""
    length = ids.shape[-1]
    documents = documents or [length]
    starts = np.cumsum([0, *documents])
    position, segment = np.zeros(length, np.int32), np.zeros(length, np.int32)
    for index, (start, size) in enumerate(zip(starts, documents)):
        kept = max(0, min(size, length - start))
        position[start:start + kept], segment[start:start + kept] = np.arange(kept), index + 1
    rows = [np.broadcast_to(x, (ids.shape[0], length)) for x in (position, position // block_size, segment)]
    return Stream(ids, *rows, sigma)


@functools.partial(jax.jit, static_argnames=("model", "rule", "block_size", "backend", "remat", "layers"))
def run(model, params, noised, clean, *, rule="block_causal", block_size=BLOCK, backend="dense", remat="none",
        layers="scan", dropout_keys=None, cache=None, write_at=None):
    return run_pass(model, params, noised, clean, cache=cache, write_at=write_at, rule=rule, block_size=block_size,
                    execution=trunk.Execution(backend, layers, remat, False), dropout_keys=dropout_keys)


def batch_of_two():
    draw = np.random.default_rng(2)
    sigma = draw.uniform(0.1, 2, size=(2, 2, 3)).astype(np.float32)
    noised = make_stream(draw.integers(0, 31, size=(2, 2, LENGTH)), BLOCK, sigma=sigma)
    return noised, make_stream(draw.integers(0, 31, size=(2, LENGTH - BLOCK)), BLOCK)
