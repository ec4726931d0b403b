"""The best of many scores, and the ranks of positions by them, where scores that are equal but for rounding tie."""

import jax
import jax.numpy as jnp

ROUNDING = 2.0**-16  # relative to the largest: what orders positions differs by more, or counts as equal


def fast_argmax(x) -> jax.Array:
    """As argmax over the last axis `[..., V]`, int32. On a CPU argmax takes numbers one at a time, and what is fused
    with it is then computed so as well, such as the noise of a draw; a maximum and a minimum are not."""
    last = x.shape[-1] - 1
    best = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def rank(score_S, planned_S):
    """Place of each planned position by falling score, from 0; ties go to the left; the others come last."""
    order = jnp.argsort(jnp.where(planned_S, -score_S, jnp.inf), stable=True)
    return jnp.argsort(order)


def near_rank(score_S, planned_S, scale):
    """As `rank`, where scores tie whose distances from the best round to the same multiple of ROUNDING * scale.

    What a network says differs in its last bits with the shape of its batch. Scores that are equal but for these bits,
    as those of an untrained network at all masks, then still go from left to right.
    """
    best = jnp.max(jnp.where(planned_S, score_S, -jnp.inf))
    return rank(-jnp.round((best - score_S) / (ROUNDING * scale)), planned_S)


def probability_rank(probability_S, planned_S):
    """As `near_rank`, by probabilities."""
    return near_rank(probability_S, planned_S, largest(probability_S, planned_S))


def largest(x_S, planned_S):
    """Of the planned positions; never quite 0, as what is relative to it."""
    return jnp.maximum(jnp.max(jnp.where(planned_S, x_S, 0.0)), 1e-30)
