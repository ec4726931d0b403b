"""A curriculum of block sizes (LLaDA2: 1, 4, 32, one block a row, and back): `train.block_sizes`.

((0, 1), (1000, 4)): updates 0 .. 999 with blocks of one token, then four. The run's `diffusion.block_size` is the last
one: evaluation, validation while training and sampling use it.
"""

import dataclasses
from typing import Any

from bd3lm_jax.core.errors import UserError


def size_at(pairs: tuple[tuple[int, int], ...], step: int) -> int | None:
    """Block size of the update that follows `step` updates; None without a curriculum."""
    passed = [size for start, size in pairs if start <= step]
    return passed[-1] if passed else None


def check(config: Any) -> None:
    """UserError for block sizes, of a curriculum or side by side, that do not fit the rest of a Config."""
    largest, length = config.diffusion.block_sizes[-1], config.data.seq_len
    if length % largest:
        raise UserError(f"diffusion.sizes has blocks of {largest} tokens, which do not divide data.seq_len={length}: "
                        f"choose a length that is a multiple, e.g. {-(-length // largest) * largest}")
    if config.data.packing == "pack" and config.block_size != largest:
        raise UserError(f"diffusion.block_size={config.block_size} with data.packing='pack': documents must begin at "
                        f"multiples of the largest of diffusion.sizes, {largest}: use {largest}, or layout 'wrap'")
    sizes, final = [size for _, size in config.train.block_sizes], config.block_size
    if not sizes:
        return
    objective, data = config.diffusion, config.data
    if "block_size" not in {field.name for field in dataclasses.fields(objective)} or len(objective.block_sizes) > 1:
        raise UserError(f"train.block_sizes has no effect with diffusion.kind='{objective.kind}': use ()")
    if sizes[-1] != final:
        raise UserError(f"train.block_sizes ends with blocks of {sizes[-1]} tokens, but evaluation and sampling would "
                        f"use diffusion.block_size={final}: make them equal")
    for size in sizes:
        if data.seq_len % size:
            raise UserError(f"train.block_sizes has blocks of {size} tokens, which do not divide "
                            f"data.seq_len={data.seq_len}: choose divisors of {data.seq_len}")
        if data.packing == "pack" and final % size:
            raise UserError(f"train.block_sizes has blocks of {size} tokens, but with data.packing='pack' documents "
                            f"begin at multiples of diffusion.block_size={final}: choose its divisors, or layout "
                            "'wrap'")
    if config.noise.adaptive_noise != "none":
        raise UserError(f"noise.adaptive_noise='{config.noise.adaptive_noise}' learns about blocks of one size, and "
                        "train.block_sizes has several: use noise.adaptive_noise='none'")
    if objective.block_size_is_fixed:
        raise UserError("diffusion.count_probs is for blocks of one size, and train.block_sizes has several: use ()")
