"""Settings of JAX that would change results: keys by name, and the others as this library is tested.

`JAX_DEFAULT_MATMUL_PRECISION` is left to the user: on accelerators it is a choice between speed and precision.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError

PRNG = "threefry2x32"
SEED_BITS = 64
LARGEST_SEED = 2 ** (SEED_BITS - 1) - 1


def check_seed(seed: int) -> int:
    """The seed. UserError if it has more than 64 bits: none is ever cut."""
    if not -LARGEST_SEED - 1 <= seed <= LARGEST_SEED:
        raise UserError(f"seed is {seed}, expected {-LARGEST_SEED - 1} to {LARGEST_SEED} (64 bits)")
    return seed


def key(seed: int) -> jax.Array:
    """The typed key of a seed of up to 64 bits, whatever JAX_DEFAULT_PRNG_IMPL says.

    For 32 bits it is the key that JAX makes of a seed where nothing is set.
    """
    seed = check_seed(seed)
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=PRNG)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within the block, in this thread, JAX computes as the library is tested. Also a decorator of functions."""
    with (jax.enable_x64(False), jax.threefry_partitionable(True), jax.numpy_dtype_promotion("standard"),
          jax.numpy_rank_promotion("allow")):
        yield


def iterate(items: Iterator) -> Iterator:
    """The items of a generator, each computed within `pinned`; between them the caller has its own settings."""
    while True:
        with pinned():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
