"""Noise schedules, and stratified draws of noise levels.

A schedule says how likely a token is masked at time t (t = 0 clean, t = 1 all noise): alpha(t) is the probability of
being kept, `mask_prob` is 1 - alpha(t), and `inverse` the time of a mask probability. The NELBO of masked diffusion is
E_{t ~ U(0, 1]} weight(t) * (sum of cross-entropies of the masked tokens), with weight = -alpha'(t) / (1 - alpha(t))
(MD4, arXiv 2406.04329; BD3-LM, arXiv 2503.09573).

All methods take and return float arrays of any one shape; t in (0, 1], since every weight is infinite at t = 0.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError, nearest

MAX_STRATA = 2**22  # a stratum's index and the jitter inside it share the 24 bits of a float32


class Schedule(Protocol):
    """What the docstring of this file says, as methods of t or of a mask probability, arrays of any shape."""

    def mask_prob(self, t) -> Any:
        ...

    def weight(self, t) -> Any:
        ...

    def inverse(self, mask_prob) -> Any:
        ...


@dataclasses.dataclass(frozen=True)
class Power:
    """1 - alpha(t) = t ** exponent: log-linear (1), square (2), square root (1/2), polynomial (MD4)."""

    exponent: float

    def mask_prob(self, t):
        return t**self.exponent

    def weight(self, t):
        return self.exponent / t

    def inverse(self, mask_prob):
        return mask_prob ** (1 / self.exponent)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """alpha(t) = cos(pi t / 2); the half-angle forms keep their precision near t = 0."""

    def mask_prob(self, t):
        return 2 * jnp.sin(jnp.pi / 4 * t) ** 2

    def weight(self, t):
        return jnp.pi / 2 / jnp.tan(jnp.pi / 4 * t)

    def inverse(self, mask_prob):
        return 4 / jnp.pi * jnp.arcsin(jnp.sqrt(mask_prob / 2))


@dataclasses.dataclass(frozen=True)
class Sine:
    """alpha(t) = 1 - sin(pi t / 2) = 1 - cos(pi (1 - t) / 2): MD4's cosine schedule (arXiv 2406.04329)."""

    def mask_prob(self, t):
        return jnp.sin(jnp.pi / 2 * t)

    def weight(self, t):
        return jnp.pi / 2 * jnp.sin(jnp.pi / 2 * (1 - t)) / jnp.sin(jnp.pi / 2 * t)

    def inverse(self, mask_prob):
        return 2 / jnp.pi * jnp.arcsin(mask_prob)


@dataclasses.dataclass(frozen=True)
class Logarithmic:
    """1 - alpha(t) = log(1 + t) / log 2."""

    def mask_prob(self, t):
        return jnp.log1p(t) / math.log(2)

    def weight(self, t):
        return 1 / ((1 + t) * jnp.log1p(t))

    def inverse(self, mask_prob):
        return jnp.expm1(mask_prob * math.log(2))


SCHEDULES: dict[str, Schedule] = {
    "loglinear": Power(1.0),
    "cosine": Cosine(),
    "square": Power(2.0),
    "square_root": Power(0.5),
    "logarithmic": Logarithmic(),
    "sine": Sine(),
}


def get_schedule(name: str) -> Schedule:
    """The schedule of that name: a key of SCHEDULES, or `polynomial:3` for 1 - alpha = t**3.

    Raises:
        UserError: the name is unknown, or the exponent of a polynomial is not a positive number.
    """
    family, _, exponent = name.partition(":")
    if family != "polynomial":
        if name not in SCHEDULES:
            raise UserError(f"unknown diffusion.schedule '{name}': {nearest(name, [*SCHEDULES, 'polynomial:3'])}")
        return SCHEDULES[name]
    try:
        power = float(exponent)
    except ValueError:
        power = math.nan
    if not 0 < power < math.inf:
        raise UserError(f"diffusion.schedule is '{name}', expected a positive exponent, e.g. 'polynomial:3'")
    return Power(power)


def stratified_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniforms with exactly one in every stratum [j/N, (j+1)/N), N = prod(shape), in a random order over all entries.

    Permuting over all entries keeps each one uniform by itself; strata laid out in row order would give every block of
    a row nearly the same level.

    Returns:
        float32 of `shape`, strictly between 0 and 1.

    Raises:
        UserError: N exceeds MAX_STRATA.
    """
    count = math.prod(shape)
    permutation_key, jitter_key = jax.random.split(key)
    stratum_N = jax.random.permutation(permutation_key, count)
    return _inside(jitter_key, stratum_N, count).reshape(shape)


def systematic_uniform(key: jax.Array, rows: int, blocks: int) -> jax.Array:
    """Uniforms stratified over all rows and blocks, with every row a systematic sample of its own.

    Row r holds one number in each [j/K, (j+1)/K), in a random order, so that sums over a row hardly vary; the offsets
    inside those intervals are stratified over the rows.

    Returns:
        float32 [rows, blocks], strictly between 0 and 1.

    Raises:
        UserError: rows * blocks exceeds MAX_STRATA.
    """
    order_key, offset_key, jitter_key = jax.random.split(key, 3)
    order_RxK = jax.random.permutation(order_key, jnp.tile(jnp.arange(blocks), (rows, 1)), axis=1, independent=True)
    offset_Rx1 = jax.random.permutation(offset_key, rows)[:, None]
    return _inside(jitter_key, order_RxK * rows + offset_Rx1, rows * blocks)


def _inside(key, stratum, count):
    """A uniform point inside each stratum, on a grid so coarse that it never rounds into the next stratum."""
    if count > MAX_STRATA:
        raise UserError(f"{count} blocks (rows * copies * blocks a row) in one batch, expected at most {MAX_STRATA}: "
                        "use a smaller batch, fewer copies or larger blocks")
    points = 2 ** (22 - (count - 1).bit_length())
    jitter = (jax.random.randint(key, stratum.shape, 0, points) + 0.5) / points
    return (stratum + jitter) / count
