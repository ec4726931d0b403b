"""Dense attention: the oracle of every backend, and the path for tiny inputs and for decoding with a cache."""

import jax
import jax.numpy as jnp

from bd3lm_jax.attention.spec import MaskSpec, Tokens, allowed

NEG_INF = -1e30  # finite, so that a query which sees nobody gives 0 and not NaN


def dense_attention(spec: MaskSpec, noised, clean, cache):
    """Attention of every query to every key that `allowed` admits, with the whole mask in memory.

    noised: (q, k, v), `[B, M, T, H, Dh]`. clean: (q, k, v), `[B, C, H, Dh]`, q None when its output is not wanted.
    cache: (k, v) `[B, Hkv, Dh, P]`. Each None when absent. k and v may have fewer heads (grouped queries).
    Returns (noised output or None, clean output or None), shaped like their queries.
    """
    queries, q_tokens, keys, values, kv_tokens = [], [], [], [], []
    if cache is not None:
        keys.append(cache[0])
        values.append(cache[1])
        kv_tokens.append(spec.cache)
    if clean is not None:
        keys.append(jnp.moveaxis(clean[1], 1, -1))
        values.append(jnp.moveaxis(clean[2], 1, -1))
        kv_tokens.append(spec.clean)
        if clean[0] is not None:
            queries.append(clean[0])
            q_tokens.append(spec.clean)
    if noised is not None:
        noise_samples = noised[0].shape[1]
        queries.append(_flatten_noise_samples(noised[0]))
        keys.append(jnp.moveaxis(_flatten_noise_samples(noised[1]), 1, -1))
        values.append(jnp.moveaxis(_flatten_noise_samples(noised[2]), 1, -1))
        tokens = _noise_sample_tokens(spec.tokens("noised"), noise_samples)
        q_tokens.append(tokens)
        kv_tokens.append(tokens)
    mask = allowed(spec.rule, _concat(q_tokens).expand(2), _concat(kv_tokens).expand(1), spec.window)
    out = _attend(jnp.concatenate(queries, axis=1), keys, values, mask)
    clean_out = None
    if clean is not None and clean[0] is not None:
        split = clean[0].shape[1]
        clean_out, out = out[:, :split], out[:, split:]
    return (None if noised is None else out.reshape(noised[0].shape)), clean_out


def _attend(q_BxQxHxD, keys, values, mask_BxQxP):
    """keys, values: parts `[B, G, D, P_i]` of the P keys; put together are only their scores, so no cache is copied."""
    batch, length, heads, size = q_BxQxHxD.shape
    groups = keys[0].shape[1]
    q = q_BxQxHxD.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.concatenate([jnp.einsum("bgdp,bqgrd->bgrqp", k, q, preferred_element_type=jnp.float32)
                              for k in keys], axis=-1) * size**-0.5  # keys first: the other way XLA transposes a cache
    mask = mask_BxQxP[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, NEG_INF), axis=-1)
    weights = jnp.where(mask.any(-1, keepdims=True), weights, 0.0).astype(values[0].dtype)
    ends = [sum(k.shape[-1] for k in keys[:i + 1]) for i in range(len(keys) - 1)]
    out = sum((jnp.einsum("bgrqp,bgdp->bqgrd", part, v, preferred_element_type=jnp.float32)
               for part, v in zip(jnp.split(weights, ends, axis=-1), values)), jnp.zeros((), jnp.float32))
    return out.reshape(q_BxQxHxD.shape).astype(q_BxQxHxD.dtype)


def _flatten_noise_samples(x_BxMxTxHxD):
    batch, noise_samples, length, *rest = x_BxMxTxHxD.shape
    return x_BxMxTxHxD.reshape(batch, noise_samples * length, *rest)


def _noise_sample_tokens(tokens: Tokens, noise_samples: int) -> Tokens:
    """Tokens `[B, T]` of one copy -> `[B, M T]` of all copies, numbered from 1."""
    batch, length = tokens.segment.shape
    tiled = jax.tree.map(lambda x: jnp.tile(x, (1, noise_samples)), tokens.replace(noise_sample=tokens.segment))
    return tiled.replace(noise_sample=jnp.broadcast_to(jnp.repeat(jnp.arange(1, noise_samples + 1), length),
                                                       (batch, noise_samples * length)))


def _concat(parts: list[Tokens]) -> Tokens:
    full = [part.replace(noise_sample=jnp.broadcast_to(part.noise_sample, part.segment.shape)) for part in parts]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *full)
