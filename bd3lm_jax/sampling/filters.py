"""From logits to a drawn token: temperature, top-k, nucleus, Gumbel noise in float32."""

import jax
import jax.numpy as jnp

from bd3lm_jax.errors import UserError

EXCLUDED = -jnp.inf


def check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """UserError for a setting out of range."""
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}, expected at least 0 (0: always the most probable token)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, expected at least 1, or none to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected in (0, 1]")


def filter_logits(logits_NxV, temperature: float, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits of the distribution that is drawn from: float32 `[N, V]`, -inf for excluded tokens.

    Temperature first, then top-k, then nucleus; the token that crosses `top_p` is kept (arXiv 1904.09751). At
    temperature 0 only the most probable token remains.
    """
    logits = logits_NxV.astype(jnp.float32)
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, EXCLUDED)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, EXCLUDED, logits)
    if top_p is not None and top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(logits < jnp.take_along_axis(ordered, last, axis=-1), EXCLUDED, logits)
    return logits


def draw(keys_N, logits_NxV) -> jax.Array:
    """One token from each row, int32 `[N]`, by float32 Gumbel noise with one key a row."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_NxV.shape[-1:], jnp.float32))(keys_N)
    return jnp.argmax(logits_NxV + noise, axis=-1).astype(jnp.int32)
