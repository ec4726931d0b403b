"""From logits to a drawn token: penalties, temperature, top-k, nucleus, min-p, Gumbel noise in float32."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.ranking import fast_argmax

EXCLUDED = -jnp.inf
SLACK = 1e-6  # relative: masses that differ by rounding alone count as equal


class Filters(NamedTuple):
    """temperature 0: the most probable token. top_k: only the k likeliest tokens. top_p: only the nucleus, the fewest
    likeliest tokens that together have at least this probability (arXiv 1904.09751). min_p: only tokens at least that
    part as probable as the likeliest (arXiv 2407.01082). repetition_penalty above 1: tokens of the row so far are less
    likely (CTRL, arXiv 1909.05858). None, or 1 for the penalty: off."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0


def check_filters(filters: Filters) -> None:
    """UserError for a setting out of range."""
    temperature, top_k, top_p, min_p, penalty = filters
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}, expected at least 0 (0: always the most probable token)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, expected at least 1, or none to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected in (0, 1]")
    if min_p is not None and not 0 < min_p <= 1:
        raise UserError(f"min_p is {min_p}, expected in (0, 1]")
    if not 0 < penalty < math.inf:
        raise UserError(f"repetition_penalty is {penalty}, expected above 0 (1: none)")


def apply_repetition_penalty(logits_NxV, present_NxV, penalty: float) -> jax.Array:
    """Logits of tokens that were seen, divided by the penalty when positive and multiplied by it when negative."""
    lowered = jnp.where(logits_NxV > 0, logits_NxV / penalty, logits_NxV * penalty)
    return jnp.where(present_NxV, lowered, logits_NxV)


def filter_logits(logits_NxV, filters: Filters) -> jax.Array:
    """Logits of the distribution that is drawn from: float32 `[N, V]`, -inf for excluded tokens.

    Temperature first, then top-k, nucleus and min-p; the token that crosses `top_p` is kept. Of equal logits those with
    the lowest ids come first, so that top-k and nucleus hold as many tokens as they should. At temperature 0 only the
    most probable token remains.
    """
    logits = logits_NxV.astype(jnp.float32)
    if filters.temperature == 0:
        return jnp.where(jnp.arange(logits.shape[-1]) == fast_argmax(logits)[:, None], 0.0, EXCLUDED)
    logits = logits / filters.temperature
    if filters.top_k is not None and filters.top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, filters.top_k)[0][:, -1:]
        logits = _first(logits, threshold, filters.top_k)
    if filters.top_p is not None and filters.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        count = jnp.maximum(jnp.sum(before < filters.top_p * (1 - SLACK), axis=-1, keepdims=True), 1)
        logits = _first(logits, jnp.take_along_axis(ordered, count - 1, axis=-1), count)
    if filters.min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(filters.min_p) - SLACK
        logits = jnp.where(logits < least, EXCLUDED, logits)
    return logits


def _first(logits_NxV, threshold_Nx1, count) -> jax.Array:
    """The `count` largest logits, of which `threshold` is the smallest, others excluded; of equal ones the first."""
    equal_NxV = logits_NxV == threshold_Nx1
    room_Nx1 = count - jnp.sum(logits_NxV > threshold_Nx1, axis=-1, keepdims=True)
    keep_NxV = (logits_NxV > threshold_Nx1) | (equal_NxV & (jnp.cumsum(equal_NxV, axis=-1) <= room_Nx1))
    return jnp.where(keep_NxV, logits_NxV, EXCLUDED)


def sample_categorical(keys_N, logits_NxV) -> jax.Array:
    """One token from each row, int32 `[N]`, by float32 Gumbel noise with one key a row."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_NxV.shape[-1:], jnp.float32))(keys_N)
    return fast_argmax(logits_NxV + noise)
