"""Exact attention that computes only the tiles that are seen: portable XLA, memory linear in the length.

Training attention has two parts with separate keys:

- *prefix*: queries against clean keys. Noised block b + 1 sees exactly the clean keys that clean block b sees, so the
  noised views, shifted by one block, and the clean stream are query groups of ONE block-causal call;
- *own block*: every noised block against itself, a batch of small problems.

Their merge through log-sum-exp must be differentiated as a whole (each part's flash backward needs the *global*
log-sum-exp), so the merged attention is one `custom_vjp`. Online softmax and its backward: FlashAttention-2
(arXiv 2307.08691), as a `lax.scan` over a static list of tiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.attention.spec import MaskSpec, Tokens, allowed, seen_tiles

TILE = 128
NEVER = -1e30  # finite, so that differences of maxima are never NaN


def blocked_attention(spec: MaskSpec, noised, clean, cache):
    """Same contract as `reference.dense_attention`, without a cache (decoding has few queries: use the dense path)."""
    if cache is not None:
        raise ValueError("blocked attention has no cache; decode with the dense backend")
    if noised is not None and clean is not None and not spec.aligned:
        raise ValueError("blocked attention needs aligned streams; decode with the dense backend")
    return _merged(spec, noised, clean)


@jax.custom_vjp
def _merged(spec: MaskSpec, noised, clean):
    return _merged_forward(spec, noised, clean)[0]


def _merged_forward(spec: MaskSpec, noised, clean):
    (noised_out, clean_out), (noised_lse, clean_lse) = _forward_parts(spec, noised, clean)
    return (noised_out, clean_out), (spec, noised, clean, noised_out, clean_out, noised_lse, clean_lse)


def _forward_parts(spec, noised, clean):
    own_out = own_lse = None
    if noised is not None:
        own_out, own_lse = _own_forward(spec, noised)
    if clean is None:
        return (own_out.astype(noised[0].dtype), None), (own_lse, None)
    part = _Prefix(spec, noised, clean)
    out, lse = part.forward()
    noised_out, noised_lse, clean_out, clean_lse = part.split(out, lse)
    if noised is None:
        return (None, clean_out.astype(clean[1].dtype)), (None, clean_lse)
    merged_lse = jnp.logaddexp(own_lse, noised_lse)
    own_share, prefix_share = (jnp.exp(lse - merged_lse)[..., None] for lse in (own_lse, noised_lse))
    merged = own_out * own_share + noised_out * prefix_share
    clean_out = None if clean_out is None else clean_out.astype(clean[1].dtype)
    return (merged.astype(noised[0].dtype), clean_out), (merged_lse, clean_lse)


def _merged_backward(saved, cotangents):
    spec, noised, clean, noised_out, clean_out, noised_lse, clean_lse = saved
    d_noised_out, d_clean_out = cotangents
    d_noised = d_clean = noised_delta = clean_delta = None
    if noised is not None:
        d_noised_out = d_noised_out.astype(jnp.float32)
        noised_delta = jnp.sum(d_noised_out * noised_out, axis=-1)
        d_noised = _own_backward(spec, noised, noised_lse, d_noised_out, noised_delta)
    if clean is not None:
        if clean_out is not None:
            d_clean_out = d_clean_out.astype(jnp.float32)
            clean_delta = jnp.sum(d_clean_out * clean_out, axis=-1)
        part = _Prefix(spec, noised, clean)
        dq_noised, d_clean = part.backward((noised_lse, d_noised_out, noised_delta),
                                           (clean_lse, d_clean_out, clean_delta))
        if noised is not None:
            d_noised = (d_noised[0] + dq_noised, *d_noised[1:])
    return _no_gradient(spec), _cast_like(d_noised, noised), _cast_like(d_clean, clean)


_merged.defvjp(_merged_forward, _merged_backward)


class _Prefix:
    """Queries of noised views (shifted by one block) and of the clean stream against the clean keys."""

    def __init__(self, spec: MaskSpec, noised, clean):
        self.clean_q, self.k, self.v = clean
        self.keys = self.k.shape[1]
        self.shift = spec.block_size if noised is not None else 0
        self.views = 0 if noised is None else noised[0].shape[1]
        self.noised_length = 0 if noised is None else noised[0].shape[2]
        queries, tokens = [], []
        self.length = self.keys if self.clean_q is not None else 0
        if noised is not None:
            self.length = max(self.length, self.noised_length - self.shift)
            queries.append(self._fit(noised[0][:, :, self.shift:], axis=2))
            tokens += [self._fit_tokens(spec.noised, self.shift, view=1)] * self.views
        if self.clean_q is not None:
            queries.append(self._fit(self.clean_q[:, None], axis=2))
            tokens.append(self._fit_tokens(spec.clean, 0, view=0))
        self.q = jnp.concatenate(queries, axis=1)
        self.q_tokens = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *tokens)
        self.kv_tokens = spec.clean.replace(view=jnp.zeros_like(spec.clean.segment))
        rule = spec.rule if noised is None or spec.rule == "bidirectional" else "block_causal"
        self.rule = spec.rule
        self.tiles = seen_tiles(rule, spec.block_size, self.length, self.keys, TILE)

    def _fit(self, x, axis):
        """Cut or zero-pad `axis` to the common query length (padding has segment 0 and sees nobody)."""
        x = jax.lax.slice_in_dim(x, 0, min(x.shape[axis], self.length), axis=axis)
        return _pad(x, axis, self.length)

    def _fit_tokens(self, tokens: Tokens, first: int, view: int) -> Tokens:
        arrays = (self._fit(x[:, first:], axis=1) for x in (tokens.position, tokens.block, tokens.segment))
        return Tokens(*arrays, jnp.full((tokens.segment.shape[0], self.length), view))

    def forward(self):
        return _tiled_forward(self.rule, self.tiles, self.q, self.k, self.v, self.q_tokens, self.kv_tokens)

    def split(self, out_BxGxNxHxD, lse_BxGxNxH):
        """Grouped results -> noised output and log-sum-exp (unshifted), clean output and log-sum-exp."""
        noised_out = noised_lse = clean_out = clean_lse = None
        if self.views:
            kept = self.noised_length - self.shift
            front = ((0, 0), (0, 0), (self.shift, 0), (0, 0))
            noised_out = jnp.pad(out_BxGxNxHxD[:, :self.views, :kept], (*front, (0, 0)))
            noised_lse = jnp.pad(lse_BxGxNxH[:, :self.views, :kept], front, constant_values=NEVER)
        if self.clean_q is not None:
            clean_out, clean_lse = out_BxGxNxHxD[:, -1, :self.keys], lse_BxGxNxH[:, -1, :self.keys]
        return noised_out, noised_lse, clean_out, clean_lse

    def _join(self, noised, clean):
        """Inverse of `split` for one quantity: `[B, M, T, ...]` and `[B, C, ...]` -> `[B, G, N, ...]`."""
        parts = [self._fit(noised[:, :, self.shift:], axis=2)] if self.views else []
        if self.clean_q is not None:
            parts.append(self._fit(clean[:, None], axis=2))
        return jnp.concatenate(parts, axis=1)

    def backward(self, noised, clean):
        """(lse, d output, delta) of both streams -> (d noised query or None, (d clean q or None, dk, dv))."""
        lse, d_out, delta = (self._join(n, c) for n, c in zip(noised, clean))
        dq, dk, dv = _tiled_backward(self.rule, self.tiles, self.q, self.k, self.v, self.q_tokens, self.kv_tokens,
                                     lse, d_out, delta)
        dq_noised, dq_clean = None, None
        if self.views:
            kept = self.noised_length - self.shift
            dq_noised = jnp.pad(dq[:, :self.views, :kept], ((0, 0), (0, 0), (self.shift, 0), (0, 0), (0, 0)))
        if self.clean_q is not None:
            dq_clean = dq[:, -1, :self.keys]
        return dq_noised, (dq_clean, dk, dv)


def _own_problem(spec: MaskSpec, noised):
    """Each noised block as a problem of its own: q, k, v `[B', 1, S, H, Dh]` with B' = B M K, tokens `[B', S]`."""
    batch, views, length = noised[0].shape[:3]
    size = min(spec.block_size, length)
    def fold(x):
        return x.reshape(batch * views * (length // size), size, *x.shape[3:])
    def fold_tokens(x):
        return fold(jnp.broadcast_to(x[:, None], (batch, views, length)))
    tokens = jax.tree.map(fold_tokens, spec.noised.replace(view=spec.noised.segment))
    return fold, tokens.replace(view=jnp.ones_like(tokens.segment)), size


def _own_forward(spec, noised):
    fold, tokens, size = _own_problem(spec, noised)
    q, k, v = map(fold, noised)
    if size <= TILE:
        out, lse = _small_forward(spec.rule, q, k, v, tokens)
    else:
        out, lse = _tiled_forward(spec.rule, _all_tiles(size), q[:, None], k, v, tokens.expand(1), tokens)
    return out.reshape(noised[0].shape), lse.reshape(noised[0].shape[:-1])


def _own_backward(spec, noised, lse, d_out, delta):
    fold, tokens, size = _own_problem(spec, noised)
    q, k, v, lse, d_out, delta = map(fold, (*noised, lse, d_out, delta))
    if size <= TILE:
        grads = _small_backward(spec.rule, q, k, v, tokens, lse, d_out, delta)
    else:
        grads = _tiled_backward(spec.rule, _all_tiles(size), q[:, None], k, v, tokens.expand(1), tokens,
                                lse[:, None], d_out[:, None], delta[:, None])
    return tuple(grad.reshape(x.shape) for grad, x in zip(grads, noised))


def _all_tiles(size: int) -> np.ndarray:
    return seen_tiles("bidirectional", size, size, size, TILE)


def _small_scores(rule, q, k, tokens):
    """q `[P, S, H, D]`, k `[P, S, G, D]` -> scores and mask `[P, G, R, S, S]` with H = G R."""
    problems, size, heads, depth = q.shape
    groups = k.shape[2]
    q = q.reshape(problems, size, groups, heads // groups, depth)
    scores = jnp.einsum("pqgrd,pkgd->pgrqk", q, k, preferred_element_type=jnp.float32) * depth**-0.5
    mask = allowed(rule, tokens.expand(2), tokens.expand(1))[:, None, None]
    return q, jnp.where(mask, scores, NEVER), mask


def _small_forward(rule, q_PxSxHxD, k_PxSxGxD, v_PxSxGxD, tokens: Tokens):
    _, scores, mask = _small_scores(rule, q_PxSxHxD, k_PxSxGxD, tokens)
    top = scores.max(-1)
    weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(-1)
    weights = weights / jnp.maximum(total, 1e-30)[..., None]
    out = jnp.einsum("pgrqk,pkgd->pqgrd", weights.astype(v_PxSxGxD.dtype), v_PxSxGxD,
                     preferred_element_type=jnp.float32)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), NEVER)
    return out.reshape(q_PxSxHxD.shape), lse.transpose(0, 3, 1, 2).reshape(q_PxSxHxD.shape[:-1])


def _small_backward(rule, q_PxSxHxD, k, v, tokens: Tokens, lse_PxSxH, d_out_PxSxHxD, delta_PxSxH):
    q, scores, mask = _small_scores(rule, q_PxSxHxD, k, tokens)
    problems, size, groups, rep, depth = q.shape
    def rows(x):
        return x.reshape(problems, size, groups, rep).transpose(0, 2, 3, 1)[..., None]
    d_out = d_out_PxSxHxD.reshape(q.shape)
    weights = jnp.where(mask, jnp.exp(scores - rows(lse_PxSxH)), 0.0)
    dv = jnp.einsum("pgrqk,pqgrd->pkgd", weights, d_out)
    d_weights = jnp.einsum("pqgrd,pkgd->pgrqk", d_out, v.astype(jnp.float32))
    d_scores = weights * (d_weights - rows(delta_PxSxH)) * depth**-0.5
    dq = jnp.einsum("pgrqk,pkgd->pqgrd", d_scores, k.astype(jnp.float32))
    dk = jnp.einsum("pgrqk,pqgrd->pkgd", d_scores, q.astype(jnp.float32))
    return dq.reshape(q_PxSxHxD.shape), dk, dv


def _query_tiles(x, kv_heads):
    """`[B, G, N, H, ...]` -> `[n, B, Hkv, G R T, ...]`: tiles first, the queries that share a key head together."""
    batch, groups, length, heads, *rest = x.shape
    x = _pad(x, 2, -(-length // TILE) * TILE)
    x = x.reshape(batch, groups, -1, TILE, kv_heads, heads // kv_heads, *rest)
    x = x.transpose(2, 0, 4, 1, 5, 3, *range(6, x.ndim))
    return x.reshape(x.shape[0], batch, kv_heads, -1, *rest)


def _from_query_tiles(x, groups, length, heads):
    """Inverse of `_query_tiles`."""
    tiles, batch, kv_heads, _, *rest = x.shape
    x = x.reshape(tiles, batch, kv_heads, groups, heads // kv_heads, TILE, *rest)
    x = x.transpose(1, 3, 0, 5, 2, 4, *range(6, x.ndim))
    return x.reshape(batch, groups, tiles * TILE, heads, *rest)[:, :, :length]


def _key_tiles(x_BxNxGxD):
    batch, length, heads, depth = x_BxNxGxD.shape
    x = _pad(x_BxNxGxD, 1, -(-length // TILE) * TILE)
    return x.reshape(batch, -1, TILE, heads, depth).transpose(1, 0, 3, 2, 4)


def _from_key_tiles(x, length):
    tiles, batch, heads, _, depth = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, tiles * TILE, heads, depth)[:, :length]


def _token_tiles(tokens: Tokens) -> Tokens:
    """`[B, ..., N]` -> `[n, B, ..., T]`, padded with segment 0."""
    def split(x):
        x = _pad(x, x.ndim - 1, -(-x.shape[-1] // TILE) * TILE)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, TILE), -2, 0)
    return jax.tree.map(split, tokens)


def _tile_scores(rule, q, k, q_tokens: Tokens, kv_tokens: Tokens):
    """One tile: q `[B, Hkv, G R T, D]`, k `[B, Hkv, T, D]` -> masked scores and mask `[B, Hkv, G R T, T]`."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1]**-0.5
    mask = allowed(rule, q_tokens.expand(3), kv_tokens.expand(1, 2))  # [B, G, T, T]
    batch, groups, length, keys = mask.shape
    rep = q.shape[2] // (groups * length)
    mask = jnp.broadcast_to(mask[:, :, None], (batch, groups, rep, length, keys)).reshape(batch, 1, -1, keys)
    return jnp.where(mask, scores, NEVER), mask


def _tiled_forward(rule, tiles, q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens: Tokens, kv_tokens: Tokens):
    """Online softmax over the listed tiles -> output float32 `[B, G, N, H, D]`, log-sum-exp `[B, G, N, H]`."""
    _, groups, length, heads, _ = q_BxGxNxHxD.shape
    q = _query_tiles(q_BxGxNxHxD, k_BxPxKxD.shape[2])
    k, v = _key_tiles(k_BxPxKxD), _key_tiles(v_BxPxKxD)
    q_tokens, kv_tokens = _token_tiles(q_tokens), _token_tiles(kv_tokens)

    def step(carry, tile):
        i, j = tile
        out, top, total = (x[i] for x in carry)
        scores, mask = _tile_scores(rule, q[i], k[j], _at(q_tokens, i), _at(kv_tokens, j))
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        product = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
        new = (out * shrink[..., None] + product, new_top, total * shrink + weights.sum(-1))
        return tuple(x.at[i].set(y) for x, y in zip(carry, new)), None

    zeros = jnp.zeros(q.shape, jnp.float32)
    init = (zeros, jnp.full(q.shape[:-1], NEVER), zeros[..., 0])
    (out, top, total), _ = jax.lax.scan(step, init, (tiles[:, 0], tiles[:, 1]))
    out = out / jnp.maximum(total, 1e-30)[..., None]
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), NEVER)
    return _from_query_tiles(out, groups, length, heads), _from_query_tiles(lse, groups, length, heads)


def _tiled_backward(rule, tiles, q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens, kv_tokens, lse, d_out, delta):
    """Gradients float32 of q, k, v, given the global log-sum-exp, d output and delta = sum(d output * output)."""
    _, groups, length, heads, depth = q_BxGxNxHxD.shape
    kv_heads, keys = k_BxPxKxD.shape[2], k_BxPxKxD.shape[1]
    q, lse, d_out, delta = (_query_tiles(x, kv_heads) for x in (q_BxGxNxHxD, lse, d_out, delta))
    d_out = d_out.astype(q.dtype)
    k, v = _key_tiles(k_BxPxKxD), _key_tiles(v_BxPxKxD)
    q_tokens, kv_tokens = _token_tiles(q_tokens), _token_tiles(kv_tokens)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def step(carry, tile):
        i, j = tile
        dq, dk, dv = carry
        scores, mask = _tile_scores(rule, q[i], k[j], _at(q_tokens, i), _at(kv_tokens, j))
        weights = jnp.where(mask, jnp.exp(scores - lse[i][..., None]), 0.0)
        d_weights = product("bhqd,bhkd->bhqk", d_out[i], v[j])
        d_scores = (weights * (d_weights - delta[i][..., None]) * depth**-0.5).astype(q.dtype)
        dq = dq.at[i].add(product("bhqk,bhkd->bhqd", d_scores, k[j]))
        dk = dk.at[j].add(product("bhqk,bhqd->bhkd", d_scores, q[i]))
        dv = dv.at[j].add(product("bhqk,bhqd->bhkd", weights.astype(q.dtype), d_out[i]))
        return (dq, dk, dv), None

    init = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(step, init, (tiles[:, 0], tiles[:, 1]))
    return _from_query_tiles(dq, groups, length, heads), _from_key_tiles(dk, keys), _from_key_tiles(dv, keys)


def _at(tokens: Tokens, index) -> Tokens:
    return jax.tree.map(lambda x: x[index], tokens)


def _pad(x, axis, length):
    """Zeros after the end of `axis` up to `length`."""
    return jnp.pad(x, [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)])


def _cast_like(grads, values):
    return jax.tree.map(lambda grad, value: grad.astype(value.dtype), grads, values)


def _no_gradient(spec: MaskSpec):
    """The cotangent that integers take."""
    return jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), spec)
