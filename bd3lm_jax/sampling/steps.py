"""Reveal steps: which masked positions of a block become tokens next, and at which noise level the network is asked.

A step is chosen before the network runs, which is exact for these samplers: which positions are revealed does not
depend on what the network says. Adding a sampler = one function and one line in STEPS.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """reveal `[S]` bool: positions that become tokens now. level: mask probability that the network is told.
    next_level: mask probability after the step."""

    reveal: jax.Array
    level: jax.Array
    next_level: jax.Array


class Step(Protocol):
    """One row, one step: `step(key, masked [S] bool, level, index, steps) -> Choice`; index counts a block's steps."""

    def __call__(self, key, masked_S, level, index, steps: int) -> Choice: ...


def first_hitting(key, masked_S, level, index, steps: int) -> Choice:
    """The exact continuous-time sampler: one token a call, S calls a block (arXiv 2409.02908; BD3-LM appendix C).

    With n masked tokens the next one is revealed at mask probability level * u^(1/n), and it is any of them with equal
    probability.
    """
    time_key, place_key = jax.random.split(key)
    count = jnp.maximum(masked_S.sum(), 1)
    level = level * jax.random.uniform(time_key, minval=1e-6) ** (1 / count)
    place = jnp.argmax(jnp.where(masked_S, jax.random.uniform(place_key, masked_S.shape), -1.0))
    reveal = (jnp.arange(masked_S.shape[0]) == place) & masked_S
    return Choice(reveal, level, level)


def ancestral(key, masked_S, level, index, steps: int) -> Choice:
    """Reverse steps on a uniform grid of `steps` mask probabilities from 1 to 0 (MDLM eq. 7, log-linear).

    A masked position stays masked with probability s / t; the last step reveals all that is left. A step that reveals
    nothing needs no network.
    """
    t, s = 1 - index / steps, 1 - (index + 1) / steps
    stays = jax.random.uniform(key, masked_S.shape) < s / t
    return Choice(masked_S & (~stays | (index == steps - 1)), t, s)


class Sampler(NamedTuple):
    """single: every step reveals one token, so the network's head runs on one position a row."""

    step: Step
    single: bool


STEPS = {"first_hitting": Sampler(first_hitting, True), "ancestral": Sampler(ancestral, False)}
