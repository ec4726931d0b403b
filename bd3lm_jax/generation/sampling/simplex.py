"""Decoding by simplex diffusion (SSD-LM, arXiv 2210.17432): blocks left to right, T network calls each, one program.

A block begins as noise. Each step asks the network with softmax(w), draws a token at every place (filters and
temperature as everywhere), and puts the noise of the next lower level on +-K one-hot logits of what was drawn; what the
last step draws stays. The canvas of the network is a distribution a place, float `[B, S, V]`; for the rest it is asked
as in `generate.py`, whose exact cache, stops and keys these are. Given tokens are noised like drawn ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.ssd_lm import alpha_bar, noisy_logits
from bd3lm_jax.generation.sampling.filters import apply_repetition_penalty, filter_logits, sample_categorical
from bd3lm_jax.generation.sampling.generate import (
    Block,
    DenoiserContext,
    PreviousBlock,
    Progress,
    Request,
    Settings,
    close_block,
    done,
)
from bd3lm_jax.generation.sampling.steps import Sampler, all_masked

NAME = "simplex"
SAMPLER = Sampler(all_masked, can_remask=True, steps=100)  # what options know of it; its plan is never asked


class Simplex(NamedTuple):
    """Static. scale: K. alpha_bar: signal power left at the T + 1 levels between the steps of a block, from clean (1)
    to noise (about 0)."""

    scale: float
    alpha_bar: tuple[float, ...]


def check(objective: Any, options: Any) -> None:
    """UserError where a sampler and an objective do not go together: simplex diffusion has this one, and no other has.
    """
    usual = objective.sampler
    if (usual == NAME) != (options.sampler == NAME):
        raise UserError(f"sampler '{options.sampler}' does not go with a model of kind '{objective.kind}': use {usual}")
    if usual == NAME and (options.constraint is not None or options.guidance):
        raise UserError("constraint and guidance need canvases of tokens and masks, which simplex diffusion does not "
                        "have: leave them out")


def levels(objective: Any, steps: int) -> Simplex:
    """`steps` steps at equal distances in time."""
    grid = np.asarray(alpha_bar(np.linspace(0, 1, steps + 1)), np.float64)
    return Simplex(objective.scale, tuple(np.clip(grid, 0, 1).tolist()))


def run_blocks(simplex: Simplex, context: DenoiserContext, request: Request, progress: Progress, until) -> Progress:
    """As `generate.run_blocks`; a block costs a row `len(simplex.alpha_bar) - 1` calls."""
    steps = len(simplex.alpha_bar) - 1

    def body(progress: Progress) -> Progress:
        at = progress.block
        is_writing = ~done(context, request, progress) & ~_block_slice(context.settings, request.given, at).all(-1)
        canvas = _block_slice(context.settings, progress.tokens, at)
        block = Block(canvas, jnp.zeros(canvas.shape, bool), is_writing, jnp.ones(canvas.shape),
                      jnp.ones(is_writing.shape),
                      jnp.zeros_like(progress.nfe), progress.nfe + steps * is_writing, jnp.zeros((), jnp.int32))
        before = _block_slice(context.settings, progress.tokens, jnp.maximum(at - 1, 0))
        previous = PreviousBlock(before, jnp.broadcast_to(at > 0, before.shape))
        block, cache = _step(simplex, context, request, progress, block, previous, progress.cache)
        block = jax.lax.fori_loop(
            1, steps, lambda _, block: _step(simplex, context, request, progress, block, None, cache)[0], block)
        return close_block(context, request, progress, block, cache)

    def more(progress: Progress):
        return (progress.block < until) & ~done(context, request, progress).all()

    return jax.lax.while_loop(more, body, progress)


def _step(simplex: Simplex, context: DenoiserContext, request: Request, progress: Progress, block: Block, previous,
          cache):
    """One network call -> the block with tokens drawn anew, and the cache."""
    settings, at = context.settings, progress.block
    places = at * settings.block_size + jnp.arange(settings.block_size)
    positions = jnp.broadcast_to(jnp.arange(settings.block_size), block.canvas.shape)
    keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, at), block.calls))(request.keys)
    noise_keys, draw_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    vocab = request.forbidden.shape[0]

    def noise(key, place):
        return jax.random.normal(jax.random.fold_in(key, place), (vocab,))

    eps = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(noise_keys, places)
    alpha_bar = jnp.asarray(simplex.alpha_bar)[len(simplex.alpha_bar) - 1 - block.calls]
    w = noisy_logits(block.canvas, eps, jnp.broadcast_to(alpha_bar, block.canvas.shape), simplex.scale)
    level = jnp.broadcast_to(1 - alpha_bar, block.open.shape)
    logits, cache = context.denoise(jax.nn.softmax(w, axis=-1), at, previous, positions, level, cache)
    drawn = _draw(settings, request, progress, block, draw_keys, places, logits)
    canvas = jnp.where(_block_slice(settings, request.given, at), block.canvas, drawn)
    return block._replace(canvas=canvas, calls=block.calls + 1), cache


def _draw(settings: Settings, request: Request, progress: Progress, block: Block, keys_B, places_S, logits_BxSxV):
    """A token for every place, its noise keyed by the place."""
    vocab = jnp.arange(logits_BxSxV.shape[-1])
    too_early = (places_S < request.earliest_end[:, None])[..., None] & (vocab == settings.end_id)
    logits = jnp.where(request.forbidden | too_early, -jnp.inf, logits_BxSxV)
    if settings.filters.repetition_penalty != 1:
        row = jax.lax.dynamic_update_slice_in_dim(progress.tokens, block.canvas, places_S[0], axis=1)
        present_BxV = jnp.zeros((len(row), len(vocab)), bool).at[jnp.arange(len(row))[:, None], row].set(True)
        logits = apply_repetition_penalty(logits, present_BxV[:, None], settings.filters.repetition_penalty)
    keys = jax.vmap(lambda key: jax.vmap(lambda place: jax.random.fold_in(key, place))(places_S))(keys_B)
    flat = logits.reshape(-1, len(vocab))
    return sample_categorical(keys.reshape(-1), filter_logits(flat, settings.filters)).reshape(block.canvas.shape)


def _block_slice(settings: Settings, x_BxL, block):
    return jax.lax.dynamic_slice_in_dim(x_BxL, block * settings.block_size, settings.block_size, axis=1)
