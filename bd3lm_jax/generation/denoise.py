"""How the sampling loop (`sampling/generate.py`) asks a network: with an exact cache, without one, with guidance.

The cache holds the last `slots` tokens in a ring: positions keep growing and the newest block takes the place of the
oldest. As long as nothing is dropped it is exact. Afterwards a block sees the last `slots` tokens, whose keys still
carry something of what was dropped: an approximation, as with any sliding window.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.attention.spec import Array
from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.generation.sampling.auto_size import AUTO, RowBlocks
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.models.cache import DTYPES, Cache
from bd3lm_jax.models.trunk import Execution, Stream

# A loop around the layers would copy the weights of each one out of their stack in every call.
UNROLLED = Execution(backend="auto", layers="unroll", remat="none", one_document=False)


class BlockDenoiser(NamedTuple):
    """Masked diffusion in blocks: the canvas is the noised stream, the block just finished the clean one. (In simplex
    diffusion the canvas is a distribution at every place, `[B, S, V]`.)

    slots: tokens that the cache holds, a multiple of the block size. dtype: of the cache, see
    `trunk.new_cache`. sigma_max, rule: as `Objective.sigma_max` and `attention_rule`.
    """

    model: Backbone
    block_size: int
    slots: int
    dtype: str
    sigma_max: float = math.inf
    rule: str = "block_causal"

    def num_prefilled(self, first_block: int) -> int:
        """Tokens for `prefill`: all blocks before `first_block` but the last one, which the first call stores."""
        return max(first_block - 1, 0) * self.block_size

    def prefill(self, params, ids_BxN, real_BxN, origin) -> Cache:
        """A cache that holds N <= slots (static) tokens from row position `origin` on, a multiple of the block size;
        those that are not `real` stay unseen."""
        return _store(self, params, ids_BxN, real_BxN, origin, self.block_size, self.rule)

    def __call__(self, params, canvas_BxS, block, previous: PreviousBlock | None, positions_BxP, level_B, cache):
        size, start = self.block_size, block * self.block_size
        position = jnp.broadcast_to(start + jnp.arange(size), canvas_BxS.shape[:2])
        ones = jnp.ones_like(position)
        sigma = sigma_of(self.model, level_B, self.sigma_max)
        noised = Stream(canvas_BxS[:, None], position, ones * block, ones, None if sigma is None else sigma[:, None])
        clean = None
        if previous is not None:
            before = jnp.maximum(position - size, 0)
            clean = Stream(previous.ids, before, before // size, previous.real.astype(jnp.int32))
        slot, cache = _make_room(self, cache, start - size, clean)
        out = trunk.decode(self.model, params, noised, clean, cache, slot, block_size=size, execution=UNROLLED,
                           rule=self.rule, output_positions_BxP=positions_BxP)
        return trunk.logits(self.model, params, out.noised[:, 0], sigma), out.cache


class AutoSizeDenoiser(NamedTuple):
    """As `BlockDenoiser` with a block of its own in every row (`sampling/auto_size.py`). size: of the canvas; of a
    smaller block the rest of the canvas is not seen. slots: room for a row's tokens and a canvas behind them."""

    model: Backbone
    size: int
    slots: int
    dtype: str
    sigma_max: float = math.inf

    def prefill(self, params, ids_BxN, real_BxN, origin) -> Cache:
        """A cache that holds the beginnings of the rows, as blocks of the canvas's size."""
        return _store(self, params, ids_BxN, real_BxN, origin, self.size, "block_causal")

    def __call__(self, params, canvas_BxS, block: RowBlocks, previous: PreviousBlock | None, positions_BxP, level_B,
                 cache):
        place = jnp.arange(self.size)
        position = block.start[:, None] + place
        # Blocks are told apart by where they begin.
        index, inside = jnp.broadcast_to(block.start[:, None], position.shape), place < block.size[:, None]
        sigma = sigma_of(self.model, level_B, self.sigma_max)
        noised = Stream(canvas_BxS[:, None], position, index, inside.astype(jnp.int32),
                        None if sigma is None else sigma[:, None])
        clean, write_at = None, None
        if previous is not None:
            before = block.before[:, None]
            clean = Stream(previous.ids, before + place, jnp.broadcast_to(before, index.shape),
                           previous.real.astype(jnp.int32))
            # Where there is no block before, what is written is seen by nobody, and is overwritten later.
            write_at = jnp.where(previous.real.any(-1), block.before, block.start)
        out = trunk.decode(self.model, params, noised, clean, cache, write_at, block_size=self.size,
                           execution=UNROLLED, output_positions_BxP=positions_BxP)
        return trunk.logits(self.model, params, out.noised[:, 0], sigma), out.cache


class ShiftedDenoiser(NamedTuple):
    """A network whose outputs are one token ahead (shifted.py), asked as one whose outputs are not.

    The cache is that of `denoise` beside the token before the canvas, `[B]`.
    """

    denoise: BlockDenoiser
    form: str
    end_id: int

    def num_prefilled(self, first_block: int) -> int:
        return self.denoise.num_prefilled(first_block)

    def prefill(self, params, ids_BxN, real_BxN, origin):
        """As `BlockDenoiser.prefill`; what stands before `origin` is not known and counts as the end token."""
        end_Bx1 = jnp.full((len(ids_BxN), 1), self.end_id, ids_BxN.dtype)
        ahead_BxN1 = jnp.concatenate([end_Bx1, ids_BxN], axis=1)
        last_B = jnp.take_along_axis(ahead_BxN1, real_BxN.sum(1, keepdims=True), axis=1)[:, 0]
        read = ids_BxN if self.form == "row" else ahead_BxN1[:, :-1]
        return last_B, self.denoise.prefill(params, read, real_BxN, origin)

    def __call__(self, params, canvas_BxS, block, previous: PreviousBlock | None, positions_BxP, level_B, cache):
        last_B, stored = cache
        if self.form == "row":
            positions_BxP = jnp.maximum(positions_BxP - 1, 0)
        else:
            if previous is not None:
                after_B = jnp.where(previous.real[:, -1], previous.ids[:, -1], self.end_id)
                previous, last_B = previous._replace(ids=_shift_right(last_B, previous.ids)), after_B
            canvas_BxS = _shift_right(last_B, canvas_BxS)
        logits, stored = self.denoise(params, canvas_BxS, block, previous, positions_BxP, level_B, stored)
        return logits, (last_B, stored)


def _shift_right(first_B, ids_BxS):
    """The ids moved back by one place, behind `first_B`; the last one is left out."""
    return jnp.concatenate([first_B[:, None].astype(ids_BxS.dtype), ids_BxS[:, :-1]], axis=1)


class CausalDenoiser(NamedTuple):
    """Autoregression as blocks of one token: the clean stream is the token before, whose output predicts the canvas.

    bos_in_context: the row begins with the end token `end_id`, which takes cache slot and position 0. Otherwise that
    token is read for the first canvas alone, and the next token takes its place.
    """

    model: Backbone
    slots: int
    dtype: str
    bos_in_context: bool
    end_id: int

    def num_prefilled(self, first_block: int) -> int:
        """Tokens for `prefill`; with `bos_in_context` the beginning counts as one of them."""
        return first_block if self.bos_in_context else max(first_block - 1, 0)

    def prefill(self, params, ids_BxN, real_BxN, origin) -> Cache:
        """As `BlockDenoiser.prefill`; with `bos_in_context`, ids are those of the row with its beginning."""
        return _store(self, params, ids_BxN, real_BxN, origin, 1, "causal")

    def __call__(self, params, canvas_Bx1, block, previous: PreviousBlock, positions_BxP, level_B, cache):
        at = block if self.bos_in_context else jnp.maximum(block - 1, 0)
        ids, real = jnp.where(block > 0, previous.ids, self.end_id), previous.real | (block == 0)
        position = jnp.full_like(ids, 0) + at
        clean = Stream(ids, position, position, real.astype(jnp.int32))
        slot, cache = _make_room(self, cache, at, clean)
        out = trunk.prefill(self.model, params, clean, cache, slot, rule="causal", block_size=1, execution=UNROLLED)
        return trunk.logits(self.model, params, out.clean), out.cache


class UncachedDenoiser(NamedTuple):
    """A pass over the whole row in every call, for comparison and tests: the "cache" holds tokens."""

    model: Backbone
    block_size: int
    length: int
    rule: str = "block_causal"

    def prefill(self, params, ids_BxN, real_BxN, origin):
        """Ids and which of them are real, `[B, L]`; origin is 0."""
        empty = jnp.zeros((ids_BxN.shape[0], self.length), jnp.int32)
        at = (0, 0)
        return (jax.lax.dynamic_update_slice(empty, ids_BxN, at),
                jax.lax.dynamic_update_slice(empty, real_BxN.astype(jnp.int32), at))

    def __call__(self, params, canvas_BxS, block, previous: PreviousBlock | None, positions_BxP, level_B, cache):
        size, start = self.block_size, block * self.block_size
        if previous is not None:
            at = (0, jnp.maximum(start - size, 0))
            stored = previous.ids, previous.real.astype(jnp.int32)
            cache = tuple(jax.lax.dynamic_update_slice(row, new, at) for row, new in zip(cache, stored))
        ids, real = cache
        row = jnp.broadcast_to(jnp.arange(self.length), ids.shape)
        clean = Stream(ids, row, row // size, real)
        position = jnp.broadcast_to(start + jnp.arange(size), canvas_BxS.shape[:2])
        ones = jnp.ones_like(position)
        noised = Stream(canvas_BxS[:, None], position, ones * block, ones)
        batch, slots = ids.shape
        empty = trunk.new_cache(self.model, params, batch, slots, "compute")
        both_streams = trunk.decode(self.model, params, noised, clean, empty, 0, block_size=size, rule=self.rule,
                                    execution=UNROLLED)
        h = jnp.take_along_axis(both_streams.noised[:, 0], positions_BxP[..., None], axis=1)
        return trunk.logits(self.model, params, h), cache


class GuidedDenoiser(NamedTuple):
    """Classifier-free guidance (arXiv 2207.12598, as in LLaDA): l_un + (1 + weight) (l_cond - l_un), where the
    unconditional half of the batch sees masks in place of the prompt."""

    denoise: Any
    weight: float
    prompt_BxL: Array
    mask_id: int

    def __call__(self, canvas_BxS, block, previous: PreviousBlock | None, positions_BxP, level_B, cache):
        size = canvas_BxS.shape[1]
        def cut(at):
            return jax.lax.dynamic_slice_in_dim(self.prompt_BxL, jnp.maximum(at, 0) * size, size, axis=1)
        forward = cut(block) & (canvas_BxS >= 0)  # below 0: places that are none (approximate_cache.py)
        canvas = jnp.concatenate([canvas_BxS, jnp.where(forward, self.mask_id, canvas_BxS)])
        if previous is not None:
            real = jnp.concatenate([previous.real, previous.real & ~cut(block - 1)])
            previous = PreviousBlock(jnp.concatenate([previous.ids] * 2), real)
        logits, cache = self.denoise(canvas, block, previous, jnp.concatenate([positions_BxP] * 2),
                                     jnp.concatenate([level_B] * 2), cache)
        conditional, unconditional = jnp.split(logits, 2)
        return unconditional + (1 + self.weight) * (conditional - unconditional), cache


def check_cache_dtype(lm: Any, options: Any) -> None:
    """UserError for a type that caches do not have."""
    lookup(dict.fromkeys(DTYPES), options.cache_dtype, "cache_dtype")


def check_target_shift(lm: Any, options: Any) -> None:
    """UserError for options that `ShiftedDenoiser` does not know."""
    form = lm.config.model.target_shift
    if form and lm.config.diffusion.supports_target_shift and (options.approximate_cache or options.block_size == AUTO):
        what = "approximate_cache" if options.approximate_cache else f"block_size='{AUTO}'"
        raise UserError(f"{what} is not there for networks with model.target_shift='{form}': leave it out")


def sigma_of(model: Backbone, level_B, sigma_max: float):
    """What a network is told of a mask probability, -log(alpha) `[B, 1]`; None for one that takes no level."""
    if not trunk.is_time_conditioned(model.config):
        return None
    return jnp.minimum(-jnp.log1p(-jnp.minimum(level_B, 1 - 1e-6)), sigma_max)[:, None]


def _store(denoiser, params, ids_BxN, real_BxN, origin, block_size: int, rule: str) -> Cache:
    """A new cache with the keys and values of `ids`, as if they had been stored block by block."""
    batch, count = ids_BxN.shape
    cache = trunk.new_cache(denoiser.model, params, batch, denoiser.slots, denoiser.dtype)
    if count == 0:
        return cache.replace(empty=False)
    position = jnp.broadcast_to(origin + jnp.arange(count), ids_BxN.shape)
    clean = Stream(ids_BxN, position, position // block_size, real_BxN.astype(jnp.int32))
    stored = trunk.prefill(denoiser.model, params, clean, cache, 0, rule=rule, block_size=block_size,
                           execution=UNROLLED).cache
    return stored.shift_slots(origin % denoiser.slots)


def _make_room(denoiser, cache: Cache, position, clean: Stream | None) -> tuple[jax.Array, Cache]:
    """The slot of a place in the ring, and the cache without what the clean stream will replace there."""
    slot = jnp.maximum(position, 0) % denoiser.slots
    return slot, cache if clean is None else cache.invalidate(slot, clean.ids.shape[1])
