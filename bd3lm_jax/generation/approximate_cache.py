"""Approximate caches of bidirectional models (MDLM): keys and values that are kept although the text has changed.

Every token of a bidirectional model sees every other, so that one new token changes all keys and values: there is no
exact cache. Fast-dLLM (arXiv 2505.22618) writes a window at a time and keeps, while it is written, the keys and values
that a pass over the whole canvas gave when the window was begun:

- "prefix": those of what stands before the window. A call computes the window and all that follows it;
- "dual": those of what follows as well. A call computes the window alone.

Every new window begins with a pass over the whole canvas, which also is its first call. With one window nothing is out
of date and both are exact.

Windows are counted from the end of each row's prompt. So that all rows of a batch open theirs together,
`prompts.aligned` puts places before and behind a canvas that are none: their id is NOWHERE, and nobody sees them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.generation.denoise import UNROLLED, sigma_of
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.models.cache import Cache
from bd3lm_jax.models.trunk import Stream

KINDS = ("prefix", "dual")
NO_TOKEN = -1


class CanvasCache(NamedTuple):
    """row: the canvas `[B, L]` without what is written in the present window. cache: of all L tokens, as they were when
    the window was begun."""

    row: jax.Array
    cache: Cache


class ApproximateDenoiser(NamedTuple):
    """A bidirectional model to a loop whose blocks are windows of a canvas: opening a block refreshes what is stored.

    window: tokens of a block, a divisor of `length`, the places of the canvas. kind: one of KINDS. dtype: of what is
    stored, see `trunk.new_cache`. sigma_max: as `Objective.sigma_max`. The network is told the part of the canvas that
    is masked.
    """

    model: Backbone
    window: int
    length: int
    kind: str
    mask_id: int
    dtype: str
    sigma_max: float = math.inf

    def num_prefilled(self, first_block: int) -> int:
        """Tokens for `prefill`: the whole canvas, masks where nothing is given."""
        return self.length

    def prefill(self, params, ids_BxL, real_BxL, origin) -> CanvasCache:
        """Nothing is computed yet. What is not `real` is a mask; origin is 0."""
        cache = trunk.new_cache(self.model, params, ids_BxL.shape[0], self.length, self.dtype)
        return CanvasCache(jnp.where(real_BxL | (ids_BxL < 0), ids_BxL, self.mask_id), cache.replace(empty=False))

    def __call__(self, params, canvas_BxW, block, previous: PreviousBlock | None, positions_BxP, level_B,
                 stored: CanvasCache):
        start = block * self.window
        if previous is not None:
            before = jnp.where(previous.real | (previous.ids < 0), previous.ids, self.mask_id)
            row = jax.lax.dynamic_update_slice_in_dim(stored.row, before, jnp.maximum(start - self.window, 0), axis=1)
            stored = stored._replace(row=row)
        row = jax.lax.dynamic_update_slice_in_dim(stored.row, canvas_BxW, start, axis=1)
        if self.window < self.length:
            level_B = (row == self.mask_id).sum(1) / (row >= 0).sum(1)
        sigma = sigma_of(self.model, level_B, self.sigma_max)
        places = start + positions_BxP
        if previous is not None:
            h, cache = self._compute(params, row, 0, self.length, 0, sigma, places, stored.cache.replace(empty=True))
            stored = stored._replace(cache=cache)
        else:
            h = self._step(params, row, start, sigma, places, stored.cache)
        return trunk.logits(self.model, params, h, sigma), stored

    def _step(self, params, row, start, sigma, places, cache: Cache):
        """Hidden states at `places`, computed with what is kept from the window's beginning."""
        slot = jnp.arange(self.length)
        if self.kind == "dual":
            visible = (slot < start) | (slot >= start + self.window)
            return self._compute(params, row, start, self.window, start, sigma, places,
                                 _with_visible(cache, visible))[0]
        cache, num_remaining = _with_visible(cache, slot < start), self.length - start
        sizes = self.suffixes()
        branch = (jnp.array(sizes) >= num_remaining).sum() - 1
        return jax.lax.switch(branch, [functools.partial(self._suffix, params, size) for size in sizes],
                              row, start, sigma, places, cache)

    def suffixes(self) -> list[int]:
        """Numbers of tokens at the end of the canvas for which a call is compiled: whole windows, about halved each
        time; a call computes the smallest that holds its window."""
        windows = [self.length // self.window]
        while windows[-1] > 1:
            windows.append(-(-windows[-1] // 2))
        return [count * self.window for count in windows]

    def _suffix(self, params, size: int, row, start, sigma, places, cache):
        return self._compute(params, row, self.length - size, size, start, sigma, places, cache)[0]

    def _compute(self, params, row, first, count: int, real_from, sigma, places, cache: Cache):
        """A pass over `count` tokens of the canvas from `first` on, those before `real_from` seen by nobody -> hidden
        states at `places`, and the cache with all of them stored."""
        ids = jax.lax.dynamic_slice_in_dim(row, first, count, axis=1)
        slot, lead_Bx1 = first + jnp.arange(count), jnp.argmax(row >= 0, axis=1)[:, None]
        is_visible = (slot >= real_from) & (ids >= 0)
        tokens = Stream(jnp.maximum(ids, 0), jnp.maximum(slot - lead_Bx1, 0), jnp.zeros_like(ids),
                        is_visible.astype(jnp.int32), sigma)
        out = trunk.prefill(self.model, params, tokens, cache, first, rule="bidirectional", block_size=self.length,
                            execution=UNROLLED)
        return jnp.take_along_axis(out.clean, (places - first)[..., None], axis=1), out.cache


def _with_visible(cache: Cache, visible_L) -> Cache:
    """Of the stored tokens only the kept ones are seen."""
    return cache.replace(segment=jnp.where(visible_L, cache.segment, 0))


def check(lm: Any, options: Any) -> None:
    """UserError for a model or options without the stretches that such a cache needs."""
    if not options.approximate_cache:
        return
    lookup(dict.fromkeys(KINDS), options.approximate_cache, "approximate_cache")
    if not lm.is_bidirectional:
        kind = "an autoregressive" if lm.config.diffusion.causal else "a block"
        raise UserError(f"approximate_cache is for bidirectional models (block size = length): the cache of {kind} "
                        "model is exact, leave it out")
    if options.block_size is None:
        raise UserError("approximate_cache keeps keys and values while a window is written: give its tokens as "
                        f"block_size, 1 to {lm.context}")
