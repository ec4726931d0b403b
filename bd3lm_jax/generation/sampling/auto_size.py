"""Writing with blocks of several sizes, for a model that was trained with them: each next block's size is chosen by how
sure the model is of what comes, inside the compiled loop.

A heuristic. The first call of a block shows the model the largest canvas; the block becomes the largest trained size
whose first tokens are predicted with a mean confidence (probability of the likeliest token) of at least `confidence`,
or the smallest size. What the block reveals first is drawn from that call as well, later calls show its own size only.
Every row has blocks of its own, one after the other from the end of its prompt, and texts do not depend on what is
written beside them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.compatibility import changed
from bd3lm_jax.generation.sampling.generate import FixedSize, Frame, PreviousBlock, Progress, Request, Settings

AUTO = "auto"  # in the place of a block size
EXCLUDES = ("sliding_window", "constraint", "guidance_scale", "min_entropy",
            "repetition_penalty")


class RowBlocks(NamedTuple):
    """Where the blocks of the rows are, int32 `[B]`. start: first place of the present (or next) block; size: its
    tokens; before: where the block before began. In `Progress.rows`, size is that of the block before (0: none)."""

    start: jax.Array
    size: jax.Array
    before: jax.Array


class AutoSizes(NamedTuple):
    """An extent (see `generate.py`): blocks of chosen sizes. sizes: rising; the last is that of the canvas. confidence:
    see above.

    The denoiser is given `RowBlocks` in the place of a block's index.
    """

    sizes: tuple[int, ...]
    confidence: float

    def num_blocks(self, settings: Settings, length: int) -> int:
        return length // self.sizes[0]

    def stretch(self, settings: Settings, tokens: int) -> None:
        return None

    def num_prefilled(self, denoiser, given_BxL, first_block: int) -> int:
        return int(np.cumprod(given_BxL, axis=1).sum(1).max())

    def is_prefilled(self, given_BxN, place_N, stored):
        return jnp.cumprod(given_BxN, axis=1) > 0

    def start(self, settings: Settings, request: Request, progress: Progress) -> Progress:
        """Rows with a canvas behind them; `block` counts blocks."""
        zeros = jnp.zeros_like(progress.nfe)
        tokens = jnp.pad(progress.tokens, ((0, 0), (0, settings.block_size)), constant_values=settings.mask_id)
        start = jnp.argmin(jnp.pad(request.given, ((0, 0), (0, 1))), axis=1).astype(jnp.int32)
        return progress._replace(block=jnp.zeros((), jnp.int32), tokens=tokens, rows=RowBlocks(start, zeros, zeros))

    def done(self, settings: Settings, request: Request, progress: Progress):
        return (progress.stopped > 0) | (progress.rows.start >= request.length)

    def enter(self, frame: Frame) -> Frame:
        """Each row as if its canvas were all of it, and the first call made; noise is keyed by where blocks begin."""
        context, request, progress, _ = frame
        size, start = context.settings.block_size, progress.rows.start
        canvas = _slice_rows(progress.tokens, start, size)
        given = _slice_rows(jnp.pad(request.given, ((0, 0), (0, size))), start, size)
        masked = ~given & ~frame.done[:, None]
        logits_BxSxV, cache = _first_call(frame, canvas, masked)
        rows = RowBlocks(start, choose_sizes(self, logits_BxSxV, masked, request.forbidden), progress.rows.before)

        def denoise(canvas, block, previous, positions, level, cache):
            if previous is not None:
                return jnp.take_along_axis(logits_BxSxV, positions[..., None], axis=1), cache
            return context.denoise(canvas, rows, None, positions, level, cache)

        own = request._replace(keys=jax.vmap(jax.random.fold_in)(request.keys, start),
                               given=given | ~_inside(rows, size), length=request.length - start,
                               earliest_end=request.earliest_end - start)
        here = Progress(jnp.zeros((), jnp.int32), canvas, progress.stopped, progress.nfe, cache, rows=rows)
        return Frame(context._replace(denoise=denoise, extent=FixedSize()), own, here)

    def leave(self, frame: Frame, local: Frame, closed: Progress) -> Progress:
        progress, rows, is_writing = frame.progress, closed.rows, ~frame.done
        canvas = jnp.where(_inside(rows, closed.tokens.shape[1]), closed.tokens, local.progress.tokens)
        tokens = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))(
            progress.tokens, canvas, rows.start)
        after = RowBlocks(rows.start + rows.size, rows.size, rows.start)
        after = jax.tree.map(lambda new, old: jnp.where(is_writing, new, old), after, progress.rows)
        return Progress(progress.block + 1, tokens, jnp.where(is_writing, closed.stopped, progress.stopped), closed.nfe,
                        closed.cache, rows=after)


def _first_call(frame: Frame, canvas_BxS, masked_BxS):
    """Logits at every place of the largest canvas, and the cache with the block before."""
    size, progress = frame.settings.block_size, frame.progress
    start, _, before = progress.rows
    previous = PreviousBlock(_slice_rows(progress.tokens, before, size), _inside(progress.rows, size))
    everywhere = jnp.broadcast_to(jnp.arange(size), canvas_BxS.shape)
    level = jnp.mean(masked_BxS, axis=1, dtype=jnp.float32)
    return frame.context.denoise(canvas_BxS, RowBlocks(start, jnp.full_like(start, size), before), previous, everywhere,
                                 level, progress.cache)


def choose_sizes(sizes: AutoSizes, logits_BxSxV, masked_BxS, forbidden_V):
    """The size of each row's next block, int32 `[B]`; tokens that are given already count as sure."""
    p = jax.nn.softmax(jnp.where(forbidden_V, -jnp.inf, logits_BxSxV), axis=-1).max(-1)
    sure = jnp.where(masked_BxS, p, 1.0)
    mean = jnp.cumsum(sure, axis=1) / jnp.arange(1, sure.shape[1] + 1)
    size = jnp.full(len(sure), sizes.sizes[0])
    for larger in sizes.sizes[1:]:
        size = jnp.where(mean[:, larger - 1] >= sizes.confidence, larger, size)
    return size.astype(jnp.int32)


def check(lm: Any, options: Any) -> None:
    """UserError for options that do not go with blocks of chosen sizes."""
    if options.block_size != AUTO:
        return
    if not 0 <= options.block_confidence <= 1:
        raise UserError(f"block_confidence is {options.block_confidence}, expected 0 to 1, a probability")
    conflicting = changed(options, EXCLUDES)
    if conflicting:
        raise UserError(f"block_size='{AUTO}' gives every row blocks of its own, which does not go with "
                        f"{', '.join(conflicting)}: leave that out, or name a block size")


def check_watched(lm: Any, options: Any) -> None:
    """UserError: rows with blocks of their own have no common steps."""
    if options.block_size == AUTO:
        raise UserError(f"block_size='{AUTO}' is not watched, every row has blocks of its own: name a block size, or "
                        "use generate, or sample without --animate and --trace")


def _inside(rows: RowBlocks, size: int):
    return jnp.arange(size) < rows.size[:, None]


def _slice_rows(x_BxN, start_B, size: int):
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x_BxN, start_B)
