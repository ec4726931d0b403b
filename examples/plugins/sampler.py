"""A sampler: the tokens of a block are revealed from right to left, one in each call of the network.

    python -m launch sample --import=examples.plugins.sampler --sampler=right_to_left --workdir=runs/tiny
"""

import jax.numpy as jnp

from bd3lm_jax.generation.sampling.steps import SAMPLERS, Plan, Sampler


def right_to_left(key, row, steps, threshold):
    """The plan of one step for one row: which masked positions `[S]` are revealed, and the noise level before and
    after. The same arguments for every sampler (`reveal.Planner`)."""
    del key, steps, threshold
    place = jnp.arange(row.masked.shape[0])
    reveal = place == jnp.max(jnp.where(row.masked, place, -1))
    return Plan(reveal, jnp.zeros_like(reveal), row.level, row.level)


SAMPLERS["right_to_left"] = Sampler(right_to_left)
