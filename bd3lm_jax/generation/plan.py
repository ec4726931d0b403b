"""What a batch of texts is written with: the static plan of its compiled program, its denoiser and its request."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core import jax_settings
from bd3lm_jax.generation.approximate_cache import ApproximateDenoiser
from bd3lm_jax.generation.constraints import automaton
from bd3lm_jax.generation.denoise import (
    AutoSizeDenoiser,
    BlockDenoiser,
    CausalDenoiser,
    GuidedDenoiser,
    ShiftedDenoiser,
)
from bd3lm_jax.generation.options import Options
from bd3lm_jax.generation.prompts import Rows
from bd3lm_jax.generation.sampling import ALL_SAMPLERS, DenoiserContext, Request, Settings
from bd3lm_jax.generation.sampling.auto_size import AutoSizes
from bd3lm_jax.generation.sampling.constraint import Constraint
from bd3lm_jax.generation.sampling.generate import Extent, FixedSize, Transition
from bd3lm_jax.models.trunk import unstack_layers


class Plan(NamedTuple):
    """What a compiled program depends on besides shapes."""

    transition: Transition
    extent: Extent
    settings: Settings
    slots: int
    cache_dtype: str
    approximate_cache: str
    guided: bool


def make_plan(lm, options: Options, row_length: int) -> Plan:
    """Static choices; a sliding window keeps as much context as the model was trained with."""
    objective, sampler = lm.config.diffusion, ALL_SAMPLERS[options.sampler]
    size, extent, spare = lm.config.block_size, FixedSize(), 0
    if isinstance(options.block_size, str):  # AUTO
        extent = AutoSizes(lm.config.trained_block_sizes, options.block_confidence)
        size = window = spare = extent.sizes[-1]
    else:
        window = min(options.block_size or size, size)
    draw_all = None
    if options.constraint is not None:
        draw_all = Constraint.sample if options.temperature else Constraint.best
    settings = Settings(block_size=window if options.approximate_cache else size, window=window,
                        steps=options.steps or sampler.steps or window, filters=options.filters,
                        mask_id=lm.special.mask, end_id=lm.special.end,
                        min_entropy=options.min_entropy, draw_all=draw_all)
    ring = max((lm.context // size - 1) * size, size) + objective.bos_in_context  # which takes a slot of its own
    slots = min(row_length, ring) if options.window else row_length + spare
    return Plan(sampler.transition(objective, settings.steps), extent, settings, slots, options.cache_dtype,
                options.approximate_cache, bool(options.guidance))


def make_denoiser(lm, plan: Plan):
    """How the network is called; with its parameters it is the loop's `denoise`."""
    objective, size = lm.config.diffusion, plan.settings.block_size
    storage = plan.slots, plan.cache_dtype
    if objective.causal:
        return CausalDenoiser(lm.model, *storage, objective.bos_in_context, lm.special.end)
    if isinstance(plan.extent, AutoSizes):
        return AutoSizeDenoiser(lm.model, size, *storage, objective.sigma_max)
    if plan.approximate_cache:
        return ApproximateDenoiser(lm.model, size, plan.slots, plan.approximate_cache, plan.settings.mask_id,
                                   plan.cache_dtype, objective.sigma_max)
    denoiser = BlockDenoiser(lm.model, size, *storage, objective.sigma_max, objective.attention_rule)
    form = lm.config.model.target_shift
    return ShiftedDenoiser(denoiser, form, lm.special.end) if form else denoiser


def make_context(lm, plan: Plan, params, request: Request, guidance) -> DenoiserContext:
    """The network as the loop asks it."""
    denoise = functools.partial(make_denoiser(lm, plan), unstack_layers(lm.model, params))
    if plan.guided:
        denoise = GuidedDenoiser(denoise, guidance, request.given, plan.settings.mask_id)
    return DenoiserContext(denoise, plan.transition, plan.settings, plan.extent)


def make_request(lm, options: Options, rows: Rows, window_index: int) -> Request:
    """What the rows ask for. window_index: of a sliding canvas, keys its noise."""
    forbidden = np.zeros(lm.config.model.vocab_size, bool)
    forbidden[[i for i in (lm.special.mask, *options.forbidden) if i >= 0]] = True  # -1: no such token
    threshold = threshold_of(options)
    key = jax_settings.key(options.seed)
    key = jax.random.fold_in(key, window_index) if window_index else key
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(rows.number))
    constraint = None
    if options.constraint is not None:
        available = [length - given[:length].sum() for length, given in zip(rows.length, rows.given) if length]
        constraint = Constraint(automaton.build(options.constraint, lm.tokenizer, len(forbidden), available,
                                                options.forbidden))
    return Request(keys, rows.given, rows.length, rows.earliest_end, forbidden, np.float32(threshold), constraint)


def threshold_of(options: Options) -> float:
    """The threshold of the options, the sampler's usual one where they name none."""
    return ALL_SAMPLERS[options.sampler].threshold if options.threshold is None else options.threshold
