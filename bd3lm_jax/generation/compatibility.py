"""Which samplers fit which objectives."""

from collections import ChainMap
from typing import Any

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.objective import Objective
from bd3lm_jax.generation.sampling import SAMPLERS, simplex

ALL_SAMPLERS = ChainMap(SAMPLERS, {simplex.NAME: simplex.SAMPLER})  # with what is registered later


def check_sampler_fits(objective: Objective, options: Any) -> None:
    """UserError unless the sampler of the options (`options.Options`) asks what networks of this objective say."""
    name, sampler = options.sampler, ALL_SAMPLERS[options.sampler]
    if simplex.NAME in (name, objective.sampler):
        simplex.check(objective, options)
        return
    if objective.causal and name != "first_hitting":
        raise UserError(f"sampler '{name}' is for masked diffusion: an autoregressive model uses first_hitting")
    if sampler.predicts_scores and not objective.predicts_scores:
        use = objective.sampler if objective.can_resample_tokens else "ancestral"
        raise UserError(f"sampler '{name}' needs the log scores of an SEDD model, this one is of kind "
                        f"'{objective.kind}': use {use}")
    can_resample_tokens = sampler.posterior is not None
    if can_resample_tokens != objective.can_resample_tokens:
        does, use = ("redraws letters", "ancestral") if can_resample_tokens else ("reveals masks", objective.sampler)
        raise UserError(f"sampler '{name}' {does}, which a model of kind '{objective.kind}' never sees: use {use}")
    if can_resample_tokens and sampler.predicts_scores != objective.predicts_scores:
        raise UserError(f"sampler '{name}' reads probabilities, and a model of kind '{objective.kind}' gives log "
                        f"scores: use {objective.sampler}")
    if can_resample_tokens and (options.constraint is not None or options.guidance or options.block_size is not None):
        raise UserError(f"sampler '{name}' redraws the whole block without masks: leave constraint, guidance and "
                        "block_size out")
