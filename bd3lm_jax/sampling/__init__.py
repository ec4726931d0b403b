"""Sampling: filters, reveal steps and the block loop; the network is a function (see `generate`)."""

from bd3lm_jax.sampling.generate import Generated, Settings, generate
from bd3lm_jax.sampling.steps import STEPS

__all__ = ["STEPS", "Generated", "Settings", "generate"]
