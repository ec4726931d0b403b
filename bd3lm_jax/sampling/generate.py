"""The one sampling loop: blocks left to right, reveal steps inside, an exact cache across; compiled as a whole.

It knows the network only as
    denoise(canvas_BxS, start, previous_BxS, previous_real, positions_BxP, level_B, cache) -> logits_BxPxV, cache
(previous: the block just finished, whose keys and values this call stores; None when they are stored already;
previous_real: False before the first block), so that a test can pass a table of probabilities. Rows do not influence
each other: randomness is keyed by (seed, request, block, step, position), and every row has its own clock and stop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.sampling.filters import draw, filter_logits
from bd3lm_jax.sampling.steps import Sampler


class Settings(NamedTuple):
    """Static settings of a compiled sampler. steps: grid of samplers that have one (ancestral), a block."""

    block_size: int
    steps: int
    temperature: float
    top_k: int | None
    top_p: float | None
    mask_id: int
    end_id: int


class Generated(NamedTuple):
    """tokens int32 `[B, L]` (prompt included); nfe int32 `[B]`: network calls that revealed something in the row;
    ended `[B]` bool: an end token came after the prompt."""

    tokens: jax.Array
    nfe: jax.Array
    ended: jax.Array


class _Block(NamedTuple):
    canvas: jax.Array  # [B, S]
    masked: jax.Array  # [B, S]
    level: jax.Array  # [B]
    nfe: jax.Array  # [B]
    index: jax.Array
    cache: Any


def generate(denoise: Callable, sampler: Sampler, settings: Settings, keys_B, tokens_BxL, prompt_length_B, first_block,
             cache) -> Generated:
    """Fill `tokens_BxL` (L a multiple of the block size) after each row's prompt.

    keys_B: one typed key a row. first_block: the first block that is not wholly prompt in every row; the blocks before
    its predecessor must be in the cache already.
    """
    batch, length = tokens_BxL.shape
    size, blocks = settings.block_size, length // settings.block_size
    given_BxL = jnp.arange(length) < prompt_length_B[:, None]
    tokens_BxL = jnp.where(given_BxL, tokens_BxL, settings.mask_id)

    def cut(x, block):
        return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=1)

    def body(carry):
        block, tokens, ended, nfe, cache = carry
        given = cut(given_BxL, block)
        previous = cut(tokens, jnp.maximum(block - 1, 0))
        block_keys = jax.vmap(lambda key: jax.random.fold_in(key, block))(keys_B)
        masked = ~given & ~ended[:, None]
        state = _Block(cut(tokens, block), masked, jnp.ones(batch), nfe, jnp.zeros((), jnp.int32), cache)
        state = _reveal(denoise, sampler, settings, block_keys, block, (previous, block > 0), state)
        if size > 1 or not sampler.single:  # else that call revealed the whole block
            state = jax.lax.while_loop(
                lambda state: state.masked.any(),
                lambda state: _reveal(denoise, sampler, settings, block_keys, block, None, state), state)
        ended = ended | ((state.canvas == settings.end_id) & ~given).any(-1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, state.canvas, block * size, axis=1)
        return block + 1, tokens, ended, state.nfe, state.cache

    start = (first_block, tokens_BxL, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32), cache)
    _, tokens, ended, nfe, _ = jax.lax.while_loop(lambda c: (c[0] < blocks) & ~c[2].all(), body, start)
    return Generated(tokens, nfe, ended)


def _reveal(denoise, sampler: Sampler, settings: Settings, keys_B, block, finished, state: _Block) -> _Block:
    """One reveal step of every row. `finished`: the previous block and whether there is one, when it must be stored."""
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, state.index))(keys_B)
    choice_keys, draw_keys = jax.vmap(jax.random.split, out_axes=1)(step_keys)
    choice = jax.vmap(lambda key, masked, level: sampler.step(key, masked, level, state.index, settings.steps))(
        choice_keys, state.masked, state.level)
    positions = jnp.argmax(choice.reveal, axis=1)[:, None] if sampler.single else \
        jnp.broadcast_to(jnp.arange(settings.block_size), state.canvas.shape)

    def ask(cache):
        previous = (None, None) if finished is None else finished
        logits, cache = denoise(state.canvas, block * settings.block_size, *previous, positions, choice.level, cache)
        return _draw_tokens(settings, draw_keys, positions, logits), cache

    if finished is None and not sampler.single:
        def skip(cache):
            return jnp.zeros_like(positions), cache
        drawn, cache = jax.lax.cond(choice.reveal.any(), ask, skip, state.cache)
    else:
        drawn, cache = ask(state.cache)
    rows = jnp.arange(state.canvas.shape[0])[:, None]
    proposal = state.canvas.at[rows, positions].set(drawn)
    return _Block(jnp.where(choice.reveal, proposal, state.canvas), state.masked & ~choice.reveal, choice.next_level,
                  state.nfe + choice.reveal.any(-1), state.index + 1, cache)


def _draw_tokens(settings: Settings, keys_B, positions_BxP, logits_BxPxV):
    """A token for every asked position, its noise keyed by the position."""
    batch, places, vocab = logits_BxPxV.shape
    logits = jnp.where(jnp.arange(vocab) == settings.mask_id, -jnp.inf, logits_BxPxV.astype(jnp.float32))
    logits = filter_logits(logits.reshape(-1, vocab), settings.temperature, settings.top_k, settings.top_p)
    keys = jax.vmap(lambda key, at: jax.vmap(lambda p: jax.random.fold_in(key, p))(at))(keys_B, positions_BxP)
    return draw(keys.reshape(-1), logits).reshape(batch, places)
