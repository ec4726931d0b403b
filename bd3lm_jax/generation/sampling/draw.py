"""What every transition needs to draw a token: which ids it may be, which the row holds, keys by position."""

import jax
import jax.numpy as jnp

from bd3lm_jax.generation.sampling.generate import Block, Frame


def is_excluded(frame: Frame, positions_BxP, vocab_size: int) -> jax.Array:
    """Ids that are never drawn, or no end yet, bool `[B, P, V]`."""
    place = frame.progress.block * frame.settings.block_size + positions_BxP
    too_early = (place < frame.request.earliest_end[:, None])[..., None]
    return frame.request.forbidden | too_early & (jnp.arange(vocab_size) == frame.settings.end_id)


def tokens_present(frame: Frame, block: Block, vocab_size: int) -> jax.Array:
    """Which tokens the row holds so far, bool `[B, V]`."""
    start = frame.progress.block * frame.settings.block_size
    tokens = jax.lax.dynamic_update_slice_in_dim(frame.progress.tokens, block.canvas, start, axis=1)
    tokens = jnp.where(tokens < 0, frame.settings.mask_id, tokens)  # places that are none
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, tokens].set(True)


def position_keys(keys_B, positions_BxP) -> jax.Array:
    """A key for every position `[B, P]`."""
    return jax.vmap(lambda key, at: jax.vmap(lambda p: jax.random.fold_in(key, p))(at))(keys_B, positions_BxP)
