"""Exact attention that computes only the tiles that are seen: portable XLA, memory linear in the length.

Two parts (see `parts.py`): all queries against the clean keys, and noised blocks against themselves.
"""

import functools

from bd3lm_jax.attention.merged import merged_attention
from bd3lm_jax.attention.parts import CleanPrefix, OwnBlock, blockwise
from bd3lm_jax.attention.spec import MaskSpec, allowed
from bd3lm_jax.attention.tiles import all_tiles, flash, prefix_tiles, restrict_to_window

TILE = 128
OWN_TILE = 32  # blocks smaller than this share a tile: on CPU many tiny products cost more than masked arithmetic


def blocked_attention(spec: MaskSpec, noised, clean, cache):
    """Same contract as `reference.dense_attention`, without a cache (decoding has few queries: use the dense path).

    Raises ValueError with a cache or when the streams are not aligned.
    """
    check_training(spec, noised, clean, cache)
    return merged_attention(_parts, spec, noised, clean)


def check_training(spec: MaskSpec, noised, clean, cache) -> None:
    """ValueError for what only the dense path computes."""
    if cache is not None:
        raise ValueError("this attention has no cache; decode with the dense backend")
    if noised is not None and clean is not None and not spec.aligned:
        raise ValueError("this attention needs aligned streams; decode with the dense backend")


def _parts(spec: MaskSpec, noised, clean):
    mask_fn = functools.partial(allowed, spec.rule, window=spec.window)
    parts = []
    if noised is not None:
        parts.append(OwnBlock(spec, noised, own_flash(mask_fn, spec.block_size, OWN_TILE, spec.window)))
    if clean is not None:
        rule = spec.rule if noised is None or spec.rule == "bidirectional" else "block_causal"
        tiles_of = functools.partial(prefix_tiles, rule, spec.block_size, spec.one_document, TILE)
        shift = 0 if noised is None else spec.block_size
        parts.append(CleanPrefix(spec, noised, clean, flash(mask_fn, restrict_to_window(spec.window, shift, tiles_of))))
    return parts


def own_flash(mask_fn, block_size: int, tile: int, window: int | None):
    """Every block with itself; small blocks share problems of up to `tile` tokens. window: that of `mask_fn`."""
    size = max(1, tile // block_size) * block_size
    return blockwise(flash(mask_fn, restrict_to_window(window, 0, functools.partial(all_tiles, min(size, TILE)))), size)
