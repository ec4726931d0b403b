"""Sampling: filters, transitions and the one loop; the network is a function (see `generate`)."""

from collections import ChainMap
from typing import Any

from bd3lm_jax.generation.sampling import simplex
from bd3lm_jax.generation.sampling.filters import Filters
from bd3lm_jax.generation.sampling.generate import (
    STOPS,
    DenoiserContext,
    Frame,
    Progress,
    Request,
    Settings,
    run_blocks,
    start,
)
from bd3lm_jax.generation.sampling.steps import SAMPLERS

ALL_SAMPLERS: ChainMap[str, Any] = ChainMap(SAMPLERS, {simplex.NAME: simplex.SAMPLER})  # with what is registered later

__all__ = ["ALL_SAMPLERS", "SAMPLERS", "STOPS", "DenoiserContext", "Filters", "Frame", "Progress", "Request",
           "Settings", "run_blocks", "start"]
