"""Texts of six tokens of three kinds in blocks of three, whose every conditional is known: a network for the loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from bd3lm_jax.generation.sampling import SAMPLERS, DenoiserContext, Filters, Request, Settings, run_blocks, start

LENGTH, SIZE, KINDS = 6, 3, 3
MASK = KINDS
JOINT = np.random.default_rng(0).dirichlet(np.full(KINDS**LENGTH, 5.0)).reshape((KINDS,) * LENGTH)
QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of the time here
PVALUE = 1e-3


def with_unknowns(joint):
    """The joint with a fourth value on every axis, "unknown" (the mask id): summed over."""
    for axis in range(joint.ndim):
        joint = np.concatenate([joint, joint.sum(axis, keepdims=True)], axis)
    return joint


KNOWN = with_unknowns(JOINT)


def conditional(known, i):
    """p(token i | the tokens of `known` that are no masks, but for the i-th), float64 `[KINDS]`, by the table."""
    chances = KNOWN[(*known[:i], slice(0, KINDS), *known[i + 1:])]
    return chances / chances.sum()


def denoise(canvas_BxS, block, previous, positions_BxP, level_B, stored_BxL):
    """Logits of the exact conditionals, as a network gives them; the cache holds the tokens of finished blocks.

    The mask token has the largest logit of all, which the loop must not mind. Rows of another length: all tokens alike.
    """
    size, length = canvas_BxS.shape[1], stored_BxL.shape[1]
    if previous is not None:
        more = jax.lax.dynamic_update_slice_in_dim(stored_BxL, previous.ids, jnp.maximum(block - 1, 0) * size, axis=1)
        stored_BxL = jnp.where(previous.real.all(), more, stored_BxL)
    if length != LENGTH:
        return jnp.zeros((*positions_BxP.shape, KINDS)) @ jnp.eye(KINDS, KINDS + 1), stored_BxL
    known_BxL = jax.lax.dynamic_update_slice_in_dim(stored_BxL, canvas_BxS, block * size, axis=1)
    place_L = 4 ** jnp.arange(LENGTH)[::-1]
    columns = block * size + positions_BxP
    others = (known_BxL @ place_L)[:, None] - jnp.take_along_axis(known_BxL * place_L, columns, axis=1)
    table = jnp.log(jnp.asarray(KNOWN.reshape(-1), jnp.float32))
    logits = table[others[..., None] + jnp.arange(KINDS) * place_L[columns][..., None]]
    return jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=9.0), stored_BxL


def settings(steps=4, temperature=1.0, end_id=-1, size=SIZE, window=None, **more):
    return Settings(size, window or size, steps, Filters(temperature), MASK, end_id, **more)


@functools.cache
def row_keys(batch, seed=0):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(batch))


def make_request(keys_B, row_length, prompt=0, length=None, earliest_end=0, forbidden=(), threshold=0.0):
    """Rows that begin with `prompt` given tokens; each of prompt, length and earliest_end is one number or `[B]`."""
    batch = keys_B.shape[0]
    prompt, length, earliest_end = (np.broadcast_to(np.asarray(x), batch) for x in (
        prompt, row_length if length is None else length, earliest_end))
    never = np.isin(np.arange(KINDS + 1), [MASK, *forbidden])
    return Request(keys_B, np.arange(row_length) < prompt[:, None], length, earliest_end, never, np.float32(threshold))


def ask(sampler, setting, network=denoise):
    return DenoiserContext(network, SAMPLERS[sampler], setting)


def begin(context, request, tokens_BxL, first_block=0):
    nothing_stored = jnp.full(tokens_BxL.shape, MASK)
    return start(context, request, jnp.asarray(tokens_BxL), first_block, nothing_stored)


def write(request, tokens_BxL, sampler, setting):
    context = ask(sampler, setting)
    progress = run_blocks(context, request, begin(context, request, tokens_BxL),
                          tokens_BxL.shape[1] // setting.block_size)
    return progress.tokens, progress.stopped, progress.nfe


write_jit = jax.jit(write, static_argnums=(2, 3), compiler_options=QUICK)


def sample(request, tokens_BxL, *, sampler, setting):
    """tokens `[B, L]`, stopped `[B]`, nfe `[B]` of whole rows."""
    return tuple(map(np.asarray, write_jit(request, tokens_BxL, sampler, setting)))


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options=QUICK)
def _many(request, tokens_5xL, sampler, setting):
    axes = request._replace(keys=0, **dict.fromkeys(("given", "length", "earliest_end", "forbidden", "threshold")))
    return jax.vmap(functools.partial(write, sampler=sampler, setting=setting), (axes, None))(request, tokens_5xL)


def many(sampler, setting, runs, prompt=0, tokens_L=(0,) * LENGTH, threshold=0.0):
    """`runs` batches of 5 rows with keys of their own: tokens `[runs, 5, L]`, nfe `[runs, 5]`."""
    request = make_request(row_keys(5), LENGTH, prompt, threshold=threshold)
    request = request._replace(keys=row_keys(5 * runs).reshape(runs, 5))
    tokens, _, nfe = _many(request, np.broadcast_to(np.asarray(tokens_L), (5, LENGTH)), sampler, setting)
    return np.asarray(tokens), np.asarray(nfe)


def texts_and_blocks():
    """All texts, and of each block the tokens that are known before it is written."""
    for outcome in itertools.product(range(KINDS), repeat=LENGTH):
        yield outcome, [outcome[:first] + (MASK,) * (LENGTH - first) for first in range(0, LENGTH, SIZE)]


def pvalue(tokens_NxL, expected):
    """Chi-square of outcomes against probabilities."""
    seen = np.bincount(np.ravel_multi_index(tokens_NxL.T, expected.shape), minlength=expected.size)
    return stats.chisquare(seen, len(tokens_NxL) * expected.reshape(-1)).pvalue
