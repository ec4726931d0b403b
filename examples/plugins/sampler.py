"""A sampler: the tokens of a block are revealed from right to left, one in each call of the network.

    python -m launch sample --import=examples.plugins.sampler --sampler=right_to_left --workdir=runs/tiny
"""

import jax.numpy as jnp

from bd3lm_jax.generation.sampling.steps import SAMPLERS, Sampler, all_masked, one_position


def right_to_left(key, row, steps, threshold):
    """The plan of one step for one row, whose masked positions are `row.masked` `[S]`: which of them are revealed. The
    arguments are those of every sampler (`reveal.Planner`)."""
    place = jnp.arange(row.masked.shape[0])
    last = jnp.max(jnp.where(row.masked, place, -1))
    return all_masked(key, row, steps, threshold)._replace(reveal=place == last)


# most: the output layer runs on one position, all that a step reveals
SAMPLERS["right_to_left"] = Sampler(right_to_left, most=one_position)
