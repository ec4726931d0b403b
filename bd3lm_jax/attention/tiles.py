"""Flash attention as a scan over tiles: portable XLA, memory linear in the length.

Online softmax and its backward: FlashAttention-2 (arXiv 2307.08691), as a `lax.scan` over static lists of (query tile,
key tile) pairs. In the backward pass scores are held with keys first, so that no product contracts the leading axis
of its left operand (2 to 3 times slower on CPU).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.attention.spec import Tokens, visible_tiles

NEG_INF = -1e30  # stands for log 0; finite, so that differences are never NaN


class BackwardInputs(NamedTuple):
    """What a flash backward needs of one stream, all of the whole attention (not of one part): output and its
    cotangent `[..., H, Dh]`, log-sum-exp `[..., H]` (NEVER: sees nobody), delta = sum(d output * output) `[..., H]`."""

    out: jax.Array
    lse: jax.Array
    d_out: jax.Array
    delta: jax.Array


class Flash(NamedTuple):
    """One attention call and its backward; query groups `G` share the keys.

    forward(q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens_BxGxN, kv_tokens_BxP) -> output `[B, G, N, H, D]`, log-sum-exp
    float32 `[B, G, N, H]`; a query that sees nobody gives 0 and NEVER.
    backward(the same arguments, Grad of all parts together) -> float32 gradients of q, k, v.
    """

    forward: Callable
    backward: Callable


class Tiles(NamedTuple):
    """Static int32 `[n, 2]` lists of (query tile, key tile). whole: every query that is not padding sees all keys of
    the tile. masked: all others of which anything may be seen."""

    size: int
    unmasked: np.ndarray
    masked: np.ndarray


def prefix_tiles(rule: str, block_size: int, one_document: bool, size: int, queries: int, keys: int) -> Tiles:
    """Tiles of clean queries (or what sees as they do) against the clean keys of their row."""
    pairs = visible_tiles(rule, block_size, queries, keys, size)
    q_start, k_end = pairs[:, 0] * size, (pairs[:, 1] + 1) * size
    # Keys before the query's block are seen, and real wherever the query is; later ones may be padding.
    block_start = q_start // block_size * block_size
    unmasked = (k_end <= np.minimum(block_start, keys)) & (one_document and rule != "bidirectional")
    return Tiles(size, pairs[unmasked], pairs[~unmasked])


def all_tiles(size: int, queries: int, keys: int) -> Tiles:
    pairs = visible_tiles("bidirectional", 1, queries, keys, size)
    return Tiles(size, pairs[:0], pairs)


def restrict_to_window(window: int | None, shift: int,
                       tiles_of: Callable[[int, int], Tiles]) -> Callable[[int, int], Tiles]:
    """`tiles_of` without the tiles that lie wholly outside the window of `spec.allowed`.

    shift: queries may stand up to so many rows later than their index says (`parts.CleanPrefix`).
    """
    if window is None:
        return tiles_of

    def tiles_in_window(queries: int, keys: int) -> Tiles:
        size, unmasked, masked = tiles_of(queries, keys)
        pairs = np.concatenate([unmasked, masked])
        behind = (pairs[:, 0] - pairs[:, 1] - 1) * size + 1 > window
        ahead = (pairs[:, 1] - pairs[:, 0] - 1) * size + 1 > window + shift
        return Tiles(size, unmasked[:0], pairs[~(behind | ahead)])

    return tiles_in_window


def flash(mask_fn: Callable[[Tokens, Tokens], jax.Array], tiles_of: Callable[[int, int], Tiles]) -> Flash:
    """Attention where `mask_fn` allows it, over the tiles that `tiles_of(queries, keys)` lists."""
    return Flash(functools.partial(_forward, mask_fn, tiles_of), functools.partial(_backward, mask_fn, tiles_of))


def _forward(mask_fn, tiles_of, q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens: Tokens, kv_tokens: Tokens):
    _, groups, length, heads, depth = q_BxGxNxHxD.shape
    scale, tiles = depth**-0.5, tiles_of(length, k_BxPxKxD.shape[1])
    q = _query_tiles(q_BxGxNxHxD, k_BxPxKxD.shape[2], tiles.size)
    k, v = _key_tiles(k_BxPxKxD, tiles.size), _key_tiles(v_BxPxKxD, tiles.size)
    q_token_tiles, kv_token_tiles = _token_tiles(q_tokens, tiles.size), _token_tiles(kv_tokens, tiles.size)

    def step(masked, carry, tile):
        i, j = tile
        out, running_max, total = (x[i] for x in carry)
        scores = _product("bhqd,bhkd->bhqk", q[i], k[j])  # scaled inside exp: a pass less
        if masked:
            scores = jnp.where(_mask(mask_fn, _at(q_token_tiles, i), _at(kv_token_tiles, j), scores), scores, NEG_INF)
        new_max = jnp.maximum(running_max, scores.max(-1))
        weights = jnp.exp(scale * (scores - new_max[..., None]))  # 1 before anything is seen: `rescale` removes it
        rescale = jnp.exp(scale * (running_max - new_max))
        product = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[j])
        new = (out * rescale[..., None] + product, new_max, total * rescale + weights.sum(-1))
        return tuple(x.at[i].set(y) for x, y in zip(carry, new)), None

    zeros = jnp.zeros(q.shape, jnp.float32)
    carry = (zeros, jnp.full(q.shape[:-1], NEG_INF), zeros[..., 0])
    out, running_max, total = _scan_tiles(step, tiles, carry)
    any_visible = running_max > NEG_INF / 2
    total = jnp.where(any_visible, total, 1.0)
    out = jnp.where(any_visible[..., None], out / total[..., None], 0.0)
    lse = jnp.where(any_visible, scale * running_max + jnp.log(total), NEG_INF)
    out, lse = (_from_query_tiles(x, groups, length, heads, tiles.size) for x in (out, lse))
    return zero_padding(q_tokens, out, lse)


def _backward(mask_fn, tiles_of, q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens: Tokens, kv_tokens: Tokens,
              grad: BackwardInputs):
    _, groups, length, heads, depth = q_BxGxNxHxD.shape
    keys, kv_heads = k_BxPxKxD.shape[1:3]
    scale, tiles = depth**-0.5, tiles_of(length, keys)
    stats = (q_BxGxNxHxD, lse_for_backward(grad.lse), grad.d_out.astype(q_BxGxNxHxD.dtype), grad.delta)
    q, lse, d_out, delta = (_query_tiles(x, kv_heads, tiles.size) for x in stats)
    k, v = _key_tiles(k_BxPxKxD, tiles.size), _key_tiles(v_BxPxKxD, tiles.size)
    k_transposed = k.swapaxes(-1, -2)
    q_token_tiles, kv_token_tiles = _token_tiles(q_tokens, tiles.size), _token_tiles(kv_tokens, tiles.size)

    def step(masked, carry, tile):
        i, j = tile
        dq, dk, dv = carry
        scores = scale * _product("bhkd,bhqd->bhkq", k[j], q[i])
        if masked:
            mask = _mask(mask_fn, _at(q_token_tiles, i), _at(kv_token_tiles, j), scores.swapaxes(-1, -2))
            scores = jnp.where(mask.swapaxes(-1, -2), scores, NEG_INF)
        weights = jnp.exp(scores - lse[i][..., None, :])
        d_weights = _product("bhkd,bhqd->bhkq", v[j], d_out[i])
        d_scores = (weights * (d_weights - delta[i][..., None, :])).astype(q.dtype)
        dq = dq.at[i].add(_product("bhdk,bhkq->bhdq", k_transposed[j], d_scores))
        dk = dk.at[j].add(_product("bhkq,bhqd->bhkd", d_scores, q[i]))
        dv = dv.at[j].add(_product("bhkq,bhqd->bhkd", weights.astype(q.dtype), d_out[i]))
        return (dq, dk, dv), None

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q.swapaxes(-1, -2), k, v))
    dq, dk, dv = _scan_tiles(step, tiles, carry)
    dq = _from_query_tiles(scale * dq.swapaxes(-1, -2), groups, length, heads, tiles.size)
    return dq, _from_key_tiles(scale * dk, keys), _from_key_tiles(dv, keys)


def zero_padding(q_tokens: Tokens, out_BxGxNxHxD, lse_BxGxNxH):
    """Exactly nothing where the query is padding."""
    real = q_tokens.segment[..., None] > 0
    return jnp.where(real[..., None], out_BxGxNxHxD, 0), jnp.where(real, lse_BxGxNxH, NEG_INF)


def lse_for_backward(lse):
    """Log-sum-exp for a backward pass: whoever sees nobody gets weights exp(score - 1e30) = 0 without a mask."""
    return jnp.where(lse > NEG_INF / 2, lse, -NEG_INF)


def _scan_tiles(step, tiles: Tiles, carry):
    for masked, pairs in ((False, tiles.unmasked), (True, tiles.masked)):
        if len(pairs):
            carry, _ = jax.lax.scan(functools.partial(step, masked), carry, (pairs[:, 0], pairs[:, 1]))
    return carry


def _mask(mask_fn, q_tokens: Tokens, kv_tokens: Tokens, scores):
    """Who sees whom in one tile: bool `[B, 1, G R T, T]` for scores `[B, Hkv, G R T, T]`."""
    mask = mask_fn(q_tokens.expand(3), kv_tokens.expand(1, 2))  # [B, G, T, T]
    batch, groups, length, keys = mask.shape
    rep = scores.shape[2] // (groups * length)
    return jnp.broadcast_to(mask[:, :, None], (batch, groups, rep, length, keys)).reshape(batch, 1, -1, keys)


def _query_tiles(x, kv_heads, size):
    """`[B, G, N, H, ...]` -> `[n, B, Hkv, G R T, ...]`: tiles first, the queries that share a key head together."""
    batch, groups, length, heads, *rest = x.shape
    x = pad_to(x, 2, -(-length // size) * size)
    x = x.reshape(batch, groups, -1, size, kv_heads, heads // kv_heads, *rest)
    x = x.transpose(2, 0, 4, 1, 5, 3, *range(6, x.ndim))
    return x.reshape(x.shape[0], batch, kv_heads, -1, *rest)


def _from_query_tiles(x, groups, length, heads, size):
    """Inverse of `_query_tiles`."""
    tiles, batch, kv_heads, _, *rest = x.shape
    x = x.reshape(tiles, batch, kv_heads, groups, heads // kv_heads, size, *rest)
    x = x.transpose(1, 3, 0, 5, 2, 4, *range(6, x.ndim))
    return x.reshape(batch, groups, tiles * size, heads, *rest)[:, :, :length]


def _key_tiles(x_BxPxKxD, size):
    """`[n, B, Hkv, T, D]`."""
    batch, length, heads, depth = x_BxPxKxD.shape
    x = pad_to(x_BxPxKxD, 1, -(-length // size) * size)
    return x.reshape(batch, -1, size, heads, depth).transpose(1, 0, 3, 2, 4)


def _from_key_tiles(x, length):
    tiles, batch, heads, size, depth = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, tiles * size, heads, depth)[:, :length]


def _token_tiles(tokens: Tokens, size) -> Tokens:
    """`[B, ..., N]` -> `[n, B, ..., T]`, padded with segment 0."""
    def split(x):
        x = pad_to(x, x.ndim - 1, -(-x.shape[-1] // size) * size)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0)
    return jax.tree.map(split, tokens)


def _at(tokens: Tokens, index) -> Tokens:
    return jax.tree.map(lambda x: x[index], tokens)


def _product(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def pad_to(x, axis, length):
    """Zeros after the end of `axis` up to `length`."""
    return jnp.pad(x, [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)])
