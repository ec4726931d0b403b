"""Sampling: filters, reveal steps and the block loop; the network is a function (see `generate`)."""

from bd3lm_jax.generation.sampling.filters import Filters
from bd3lm_jax.generation.sampling.generate import (
    STOPS,
    DenoiserContext,
    Progress,
    Request,
    Settings,
    run_blocks,
    start,
)
from bd3lm_jax.generation.sampling.steps import SAMPLERS

__all__ = ["SAMPLERS", "STOPS", "DenoiserContext", "Filters", "Progress", "Request", "Settings", "run_blocks", "start"]
