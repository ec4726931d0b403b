"""How the sampling loop (`sampling/generate.py`) asks a network, with an exact cache."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.models.trunk import Cache, Stream
from bd3lm_jax.passes import PLAIN


class BlockDenoiser(NamedTuple):
    """Masked diffusion in blocks: the canvas is the noised stream, the block just finished the clean one."""

    model: Backbone
    objective: Any
    end_id: int

    def stored_before(self, first_block: int) -> int:
        """Tokens for `prefill`: all blocks before `first_block` but the last one, which the first call stores."""
        return max(first_block - 1, 0) * self.objective.block_size

    def prefill(self, params, tokens_BxL, slots: int, count) -> Cache:
        """A cache for rows of L tokens that holds the first `count` <= `slots` (static) of them."""
        cache = trunk.new_cache(self.model, params, *tokens_BxL.shape)
        if slots == 0:
            return cache.replace(empty=False)
        ids = tokens_BxL[:, :slots]
        return _store(self.model, params, ids, count, self.objective.block_size, "block_causal", cache)

    def __call__(self, params, canvas_BxS, start, previous_BxS, previous_real, positions_BxP, level_B, cache):
        batch, size = canvas_BxS.shape
        position = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
        ones = jnp.ones_like(position)
        sigma = None
        if trunk.takes_level(self.model.config):
            sigma = -jnp.log1p(-jnp.minimum(level_B, 1 - 1e-6))[:, None, None]
        noised = Stream(canvas_BxS[:, None], position, ones * (start // size), ones, sigma)
        clean = None
        if previous_BxS is not None:
            before = jnp.maximum(position - size, 0)
            clean = Stream(previous_BxS, before, before // size, ones * previous_real)
        out = _hidden(self.model, params, noised, clean, cache, jnp.maximum(start - size, 0), "block_causal", size)
        h = jnp.take_along_axis(out.noised[:, 0], positions_BxP[..., None], axis=1)
        return trunk.logits(self.model, params, h, None if sigma is None else sigma[:, 0]), out.cache


class CausalDenoiser(NamedTuple):
    """Autoregression as blocks of one token: the clean stream is the token before, whose output predicts the canvas."""

    model: Backbone
    objective: Any
    end_id: int

    def stored_before(self, first_block: int) -> int:
        return first_block if self.objective.bos else max(first_block - 1, 0)

    def prefill(self, params, tokens_BxL, slots: int, count) -> Cache:
        cache = trunk.new_cache(self.model, params, *tokens_BxL.shape)
        if slots == 0:
            return cache.replace(empty=False)
        ids = tokens_BxL
        if self.objective.bos:
            ids = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=self.end_id)
        return _store(self.model, params, ids[:, :slots], count, 1, "causal", cache)

    def __call__(self, params, canvas_Bx1, start, previous_Bx1, previous_real, positions_BxP, level_B, cache):
        ids = jnp.where(previous_real, previous_Bx1, self.end_id)
        at = start if self.objective.bos else start - 1
        position = jnp.full_like(ids, 0) + at
        clean = Stream(ids, position, position, jnp.ones_like(ids))
        out = _hidden(self.model, params, None, clean, cache, at, "causal", 1)
        return trunk.logits(self.model, params, out.clean), out.cache


def _store(model, params, ids_BxP, count, block_size: int, rule: str, cache: Cache) -> Cache:
    """`cache` with the keys and values of the first `count` tokens; slots after them stay invisible."""
    position = jnp.broadcast_to(jnp.arange(ids_BxP.shape[1]), ids_BxP.shape)
    clean = Stream(ids_BxP, position, position // block_size, (position < count).astype(jnp.int32))
    return _hidden(model, params, None, clean, cache, 0, rule, block_size).cache


def _hidden(model, params, noised, clean, cache, write_at, rule: str, block_size: int):
    return trunk.hidden(model, params, noised=noised, clean=clean, cache=cache, write_at=write_at, rule=rule,
                        block_size=block_size, execution=PLAIN, dropout_keys=None)
