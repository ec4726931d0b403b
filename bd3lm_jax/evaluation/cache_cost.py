"""What a cache in less memory costs: bytes a token, and likelihood, against a float32 cache on the same masks.

The bound is that of `evaluate.py`, but computed as the sampler computes: block by block, each one asked with the stored
keys and values of the blocks before it. (The sampler's first call of a block still sees the block just before in full
precision; here every call sees what is stored, as the sampler's later calls do.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core import jax_settings, stats
from bd3lm_jax.diffusion.masked import cross_entropy_subs
from bd3lm_jax.generation.denoise import UNROLLED
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.models import trunk
from bd3lm_jax.models.cache import Cache
from bd3lm_jax.models.trunk import Stream

DTYPES = ("float32", "bfloat16", "int8")  # the first is what the others are compared with
BATCH = 16  # rows a pass


class _Rows(NamedTuple):
    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array


def bytes_per_token(lm, cache_dtype: str) -> int:
    """Bytes of the keys and values of one token in all layers, with the scales of int8."""
    cache = jax.eval_shape(lambda params: trunk.new_cache(lm.model, params, 1, 1, cache_dtype), lm.params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.keys, cache.values)))


def nll_cost(lm, rows, num_rows: int, seed: int) -> list[dict[str, Any]]:
    """A row for each of DTYPES: cache_dtype, bytes_per_token, nll (nats a token) of the first `num_rows` rows of a
    prepared text, and nll_change from float32 with nll_change_ci95 (paired by row and mask, over rows and masks).

    Empty for a model of one block (MDLM), which never reads a cache.
    """
    if lm.config.block_size >= rows.length:
        return []
    ids = np.arange(min(num_rows, len(rows)))
    tokens_R = np.asarray(lm.config.diffusion.predicted_tokens(rows.segments(ids)), np.float64).sum(1)
    nats = {dtype: _row_nats(lm, rows, ids, dtype, seed) for dtype in DTYPES}
    found = []
    for dtype, nats_R in nats.items():
        change, *interval = stats.ratio_interval(nats_R - nats[DTYPES[0]], tokens_R)
        found.append({"cache_dtype": dtype, "bytes_per_token": bytes_per_token(lm, dtype),
                      "nll": float(nats_R.sum() / tokens_R.sum()), "nll_change": change, "nll_change_ci95": interval})
    return found


def cached_nats(lm, cache_dtype: str):
    """`f(params, key, row_ids, tokens, positions, segments)` -> nats of every token through a cache, float32 `[B, L]`:
    one draw of the model's best estimator (`estimators.default_estimator`), on the masks of `evaluate.make_scores`.

    All arrays `[B, L]` as in a batch, L a multiple of the block size.
    """
    estimator = estimators.make(estimators.default_estimator(lm.config), lm.config)
    score_block = _score_token if lm.config.diffusion.causal else _score_block

    def nats(params, key, row_ids, tokens, positions, segments):
        def noise(row, tokens, segments):
            return estimator.noised(jax.random.fold_in(key, row), 0, 1, tokens, segments, lm.special)

        noised, rows = jax.vmap(noise)(row_ids, tokens, segments), _Rows(tokens, positions, segments)
        batch, noise_samples, length = noised.weight_BxMxL.shape
        cache = trunk.new_cache(lm.model, params, batch, length, cache_dtype).replace(empty=False)

        def body(cache, block):
            logits_BxMxSxV, cache = score_block(lm, params, noised, rows, cache, block)
            targets = jnp.broadcast_to(_block_slice(lm, tokens, block)[:, None], logits_BxMxSxV.shape[:-1])
            losses = cross_entropy_subs(logits_BxMxSxV.reshape(targets.size, -1), targets.reshape(-1), lm.special.mask)
            return cache, losses.reshape(targets.shape)

        losses_KxBxMxS = jax.lax.scan(body, cache, jnp.arange(length // lm.config.block_size))[1]
        losses_BxMxL = jnp.moveaxis(losses_KxBxMxS, 0, 2).reshape(batch, noise_samples, length)
        return (jnp.where(noised.weight_BxMxL > 0, losses_BxMxL, 0) * noised.weight_BxMxL).mean(1)

    return nats


def _row_nats(lm, rows, ids: np.ndarray, cache_dtype: str, seed: int) -> np.ndarray:
    """Nats of each row, float64 `[R]`. A short batch is filled up with its last row."""
    program, key, found = jax.jit(cached_nats(lm, cache_dtype)), jax.random.fold_in(jax_settings.key(seed), 0), []
    for start in range(0, len(ids), BATCH):
        batch = ids[start:start + BATCH]
        padded = np.concatenate([batch, np.full(BATCH - len(batch), batch[-1])])
        nats_BxL = program(lm.params, key, padded, rows.tokens(padded), rows.positions(padded), rows.segments(padded))
        found.append(np.asarray(nats_BxL, np.float64).sum(1)[:len(batch)])
    return np.concatenate(found)


def _score_block(lm, params, noised, rows: _Rows, cache: Cache, block):
    """Logits of the copies of a block, `[B, M, S, V]`, and the cache with the clean block stored."""
    tokens, position, segment = (_block_slice(lm, x, block) for x in rows)
    where = position, position // lm.config.block_size, segment
    sigma = None
    if trunk.is_time_conditioned(lm.config.model):
        sigma = jax.lax.dynamic_slice_in_dim(noised.sigma_BxMxK, block, 1, axis=2)
    stream, size = Stream(_block_slice(lm, noised.xt_BxMxL, block), *where, sigma), lm.config.block_size
    h = trunk.decode(lm.model, params, stream, None, cache, None, block_size=size, execution=UNROLLED).noised
    updated = _prefill(lm, params, Stream(tokens, *where), cache, block, lm.config.diffusion.attention_rule).cache
    return trunk.logits(lm.model, params, h, sigma), updated


def _score_token(lm, params, noised, rows: _Rows, cache: Cache, block):
    """As `_score_block` for an autoregressive model, whose clean stream is the token before."""
    _, positions, segments = rows
    if not lm.config.diffusion.bos:  # nobody reads the end token, and the token before has the place before
        segments = jnp.where(noised.weight_BxMxL[:, 0] > 0, segments, 0)
        positions = jnp.maximum(positions - 1, 0)
    position = _block_slice(lm, positions, block)
    clean = Stream(_block_slice(lm, noised.xt_BxMxL[:, 0], block), position, position,
                   _block_slice(lm, segments, block))
    out = _prefill(lm, params, clean, cache, block, "causal")
    return trunk.logits(lm.model, params, out.clean)[:, None], out.cache


def _prefill(lm, params, clean: Stream, cache: Cache, block, rule: str):
    size = lm.config.block_size
    return trunk.prefill(lm.model, params, clean, cache, block * size, rule=rule, block_size=size, execution=UNROLLED)


def _block_slice(lm, x, block):
    """The tokens of a block."""
    size = lm.config.block_size
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=-1)
