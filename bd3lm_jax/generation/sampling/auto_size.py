"""Writing with blocks of several sizes, for a model that was trained with them: each next block's size is chosen by how
sure the model is of what comes, in one compiled program.

A heuristic. The first call of a block shows the model the largest canvas; the block becomes the largest trained size
whose first tokens are predicted with a mean confidence (probability of the likeliest token) of at least `confidence`,
or the smallest size. What the block reveals first is drawn from that call as well, later calls show its own size only.
Every row has blocks of its own, one after the other from the end of its prompt, and texts do not depend on what is
written beside them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.generation.sampling.generate import (
    DenoiserContext,
    PreviousBlock,
    Progress,
    Request,
    Settings,
    close_block,
    open_block,
    reveal,
    writing,
)
from bd3lm_jax.generation.sampling.steps import Sampler

AUTO = "auto"  # in the place of a block size


class Sizes(NamedTuple):
    """Static. sizes: rising; the last is that of the canvas. confidence: see above."""

    sizes: tuple[int, ...]
    confidence: float


class AutoSizeContext(NamedTuple):
    """denoise(canvas_BxS, start_B, size_B, finished_start_B, finished, positions_BxP, level_B, cache) -> logits_BxPxV,
    cache: as in `generate.py`, with the place of every row's block, and of the block before, in place of an index."""

    denoise: Callable
    sampler: Sampler
    settings: Settings


class State(NamedTuple):
    """tokens `[B, L + S]`; start: where each row's next block begins; before, size: where the last one began, and its
    tokens (0: none); stopped and nfe as in `Progress`."""

    tokens: jax.Array
    start: jax.Array
    before: jax.Array
    size: jax.Array
    stopped: jax.Array
    nfe: jax.Array
    cache: Any


def first(request: Request, tokens_BxL, settings: Settings, cache) -> State:
    """Before anything is written; the given tokens at the beginning of each row are in the cache."""
    zeros = jnp.zeros(len(tokens_BxL), jnp.int32)
    tokens = jnp.where(request.given, tokens_BxL, settings.mask_id)
    tokens = jnp.pad(tokens, ((0, 0), (0, settings.block_size)), constant_values=settings.mask_id)
    start = jnp.argmin(jnp.pad(request.given, ((0, 0), (0, 1))), axis=1).astype(jnp.int32)
    return State(tokens, start, zeros, zeros, zeros, zeros, cache)


def run_blocks(sizes: Sizes, context: AutoSizeContext, request: Request, state: State, blocks) -> State:
    """Write up to `blocks` more blocks in every row, or until all have stopped. Nothing returns to the host."""
    canvas_size = context.settings.block_size
    given = jnp.pad(request.given, ((0, 0), (0, canvas_size)))

    def body(carry):
        count, state = carry
        block_inputs = _BlockInputs(context, request, state, _slice_rows(given, state.start, canvas_size))
        logits_BxSxV, cache = block_inputs.first_call(_slice_rows(state.tokens, state.before, canvas_size))
        size_B = choose_sizes(sizes, logits_BxSxV, block_inputs.masked, request.forbidden)
        local, progress = block_inputs.request(size_B), block_inputs.progress(cache)
        first_call_context = single_block_context(context, lambda canvas, positions, level: jnp.take_along_axis(
            logits_BxSxV, positions[..., None], axis=1))
        block, _ = open_block(first_call_context, local, progress)
        later_context = single_block_context(context, functools.partial(block_inputs.later_call, size_B, cache))
        block = jax.lax.while_loop(lambda block: writing(context.sampler, context.settings, block).any(),
                                   lambda block: reveal(later_context, local, progress, block, None), block)
        closed = close_block(later_context, local, progress, block, None)
        is_writing = ~_is_done(request, state)
        tokens = jax.vmap(_write_at)(state.tokens, jnp.where(block_inputs.inside(size_B), closed.tokens,
                                                             block_inputs.canvas), state.start)
        return count + 1, State(tokens, jnp.where(is_writing, state.start + size_B, state.start),
                                jnp.where(is_writing, state.start, state.before),
                                jnp.where(is_writing, size_B, state.size),
                                jnp.where(is_writing, closed.stopped, state.stopped), closed.nfe, cache)

    def more(carry):
        return (carry[0] < blocks) & ~_is_done(request, carry[1]).all()

    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]


def choose_sizes(sizes: Sizes, logits_BxSxV, masked_BxS, forbidden_V):
    """The size of each row's next block, int32 `[B]`; tokens that are given already count as sure."""
    p = jax.nn.softmax(jnp.where(forbidden_V, -jnp.inf, logits_BxSxV), axis=-1).max(-1)
    sure = jnp.where(masked_BxS, p, 1.0)
    mean = jnp.cumsum(sure, axis=1) / jnp.arange(1, sure.shape[1] + 1)
    size = jnp.full(len(sure), sizes.sizes[0])
    for larger in sizes.sizes[1:]:
        size = jnp.where(mean[:, larger - 1] >= sizes.confidence, larger, size)
    return size.astype(jnp.int32)


class _BlockInputs(NamedTuple):
    """All rows at their next blocks, each row as if its canvas were all of it."""

    context: AutoSizeContext
    whole: Request
    state: State
    given: jax.Array

    @property
    def canvas(self):
        return _slice_rows(self.state.tokens, self.state.start, self.context.settings.block_size)

    @property
    def masked(self):
        return ~self.given & ~_is_done(self.whole, self.state)[:, None]

    def inside(self, size_B):
        return jnp.arange(self.context.settings.block_size) < size_B[:, None]

    def first_call(self, before_BxS):
        """Logits at every place of the largest canvas, and the cache with the block before."""
        settings, state = self.context.settings, self.state
        everywhere = jnp.broadcast_to(jnp.arange(settings.block_size), self.given.shape)
        previous = PreviousBlock(before_BxS, self.inside(state.size))
        level = jnp.mean(self.masked, axis=1, dtype=jnp.float32)
        whole = jnp.full_like(state.size, settings.block_size)
        return self.context.denoise(self.canvas, state.start, whole, state.before, previous, everywhere, level,
                                    state.cache)

    def later_call(self, size_B, cache, canvas, positions, level):
        """Logits at some places of a block of its own size."""
        return self.context.denoise(canvas, self.state.start, size_B, None, None, positions, level, cache)[0]

    def request(self, size_B) -> Request:
        """What is asked of the rows' blocks; noise is keyed by where they begin."""
        whole, start = self.whole, self.state.start
        keys = jax.vmap(jax.random.fold_in)(whole.keys, start)
        return whole._replace(keys=keys, given=self.given | ~self.inside(size_B), length=whole.length - start,
                              earliest_end=whole.earliest_end - start)

    def progress(self, cache) -> Progress:
        return Progress(jnp.zeros((), jnp.int32), self.canvas, self.state.stopped, self.state.nfe, cache)


def single_block_context(context: AutoSizeContext, logits_of: Callable) -> DenoiserContext:
    """How `generate` asks about one block: logits_of(canvas_BxS, positions_BxP, level_B)."""
    def denoise(canvas, block, previous, positions, level, cache):
        return logits_of(canvas, positions, level), cache
    return DenoiserContext(denoise, context.sampler, context.settings)


def _is_done(request: Request, state: State):
    return (state.stopped > 0) | (state.start >= request.length)


def _slice_rows(x_BxN, start_B, size: int):
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x_BxN, start_B)


def _write_at(row, new, start):
    return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0)
