"""Asking a network with a cache, against passes over whole rows that keep nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax import passes
from bd3lm_jax.denoise import BlockDenoiser, CausalDenoiser
from bd3lm_jax.diffusion import AR, Masked
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.passes import PLAIN

VOCAB, MASK, END, SIZE, LENGTH = 13, 12, 3, 4, 16
MASKED = Masked.uniform_counts(SIZE)
TOKENS = np.random.default_rng(1).integers(0, MASK, size=(3, LENGTH)).astype(np.int32)
CANVAS = np.where(np.random.default_rng(2).uniform(size=TOKENS.shape) < 0.6, MASK, TOKENS)
TOLERANCE = 1e-5


@functools.cache
def network(time_conditioning=False, adaln=True):
    """Random parameters everywhere: a fresh network ignores its input."""
    model = build(DiTConfig(vocab_size=VOCAB, layers=2, width=32, heads=2, mlp_ratio=2, dropout=0.0, adaln=adaln,
                            cond_dim=8, time_conditioning=time_conditioning, rope_base=1e4), jnp.float32)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


@functools.cache
def block_denoiser(time_conditioning=False):
    """The denoiser and its compiled question."""
    denoiser = BlockDenoiser(network(time_conditioning)[0], MASKED, END)
    return denoiser, jax.jit(lambda *args: denoiser(*args)), jax.jit(denoiser.prefill, static_argnums=2)


def all_positions(size):
    return np.tile(np.arange(size), (len(TOKENS), 1))


@functools.partial(jax.jit, static_argnames="model")
def uncached_blocks(model, params, sigma_BxMxn=None):
    """Logits of CANVAS after clean TOKENS, `[B, L, V]`."""
    position, segment = passes.plain_rows(TOKENS)
    h = passes.two_stream(model, params, CANVAS[:, None], TOKENS, position, segment, block_size=SIZE,
                          sigma_BxMxn=sigma_BxMxn, execution=PLAIN)
    return trunk.logits(model, params, h, sigma_BxMxn)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "rule", "block_size"))
def uncached_row(model, params, ids, rule, block_size):
    h = passes.one_stream(model, params, ids, *passes.plain_rows(ids), rule=rule, block_size=block_size,
                          execution=PLAIN)
    return trunk.logits(model, params, h)


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("first_block", [0, 1, 3])
def test_blocks_with_a_cache_equal_two_streams(time_conditioning, first_block):
    model, params = network(time_conditioning)
    denoiser, ask, prefill = block_denoiser(time_conditioning)
    level = np.random.default_rng(3).uniform(0.2, 0.9, size=(len(TOKENS), LENGTH // SIZE)).astype(np.float32)
    sigma = -np.log(1 - level)[:, None] if time_conditioning else None
    expected = np.asarray(uncached_blocks(model, params, sigma))
    stored = denoiser.stored_before(first_block)
    assert stored == SIZE * max(first_block - 1, 0)
    # Slots beyond the count hold other tokens: nobody may see them.
    cache = prefill(params, TOKENS, 11 if stored else 0, stored)
    for block in range(first_block, LENGTH // SIZE):
        start, before = block * SIZE, max(block - 1, 0) * SIZE
        canvas, previous = CANVAS[:, start:start + SIZE], TOKENS[:, before:before + SIZE]
        args = (all_positions(SIZE), level[:, block])
        logits, cache = ask(params, canvas, start, previous, block > 0, *args, cache)
        np.testing.assert_allclose(logits, expected[:, start:start + SIZE], atol=TOLERANCE)
        # The block before is stored now: the next call of the block does not bring it, and asks about few positions.
        chosen = np.array([[2], [0], [3]])
        logits, after = ask(params, canvas, start, None, None, chosen, level[:, block], cache)
        np.testing.assert_allclose(logits, np.take_along_axis(expected, start + chosen[..., None], 1), atol=TOLERANCE)
        jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("first", [1, 6])
def test_tokens_one_by_one_equal_a_causal_pass(bos, first):
    model, params = network(adaln=False)
    denoiser = CausalDenoiser(model, AR(bos=bos), END)
    assert denoiser.stored_before(first) == (first if bos else first - 1)
    inputs = np.pad(TOKENS, ((0, 0), (1, 0)), constant_values=END) if bos else TOKENS
    predicted_from = 0 if bos else 1  # the first token that the pass says anything about
    expected = np.asarray(uncached_row(model, params, inputs, "causal", 1))[:, :-1]
    first = 0 if bos and first == 1 else first
    stored = denoiser.stored_before(first)
    cache = jax.jit(denoiser.prefill, static_argnums=2)(params, TOKENS, 8 * (stored > 0), stored)
    step = jax.jit(lambda *args: denoiser(*args))
    for at in range(first, LENGTH):
        canvas, previous = np.full((3, 1), MASK), TOKENS[:, max(at - 1, 0)][:, None]
        logits, cache = step(params, canvas, at, previous, at > 0, all_positions(1), np.ones(3), cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, at - predicted_from], atol=TOLERANCE)


def test_stored_before_the_first_block():
    model, _ = network()
    assert BlockDenoiser(model, MASKED, END).stored_before(0) == 0
    assert CausalDenoiser(model, AR(bos=True), END).stored_before(0) == 0
    assert CausalDenoiser(model, AR(bos=False), END).stored_before(0) == 0


def test_a_whole_row_as_one_block_needs_no_cache():
    """MDLM: nothing is ever stored."""
    model, params = network()
    denoiser = BlockDenoiser(model, Masked(**{**vars(MASKED), "block_size": LENGTH}), END)
    ask = jax.jit(lambda params: denoiser(params, CANVAS, 0, CANVAS, False, all_positions(LENGTH), jnp.ones(3),
                                          denoiser.prefill(params, TOKENS, 0, 0))[0])
    expected = uncached_row(model, params, CANVAS, "bidirectional", LENGTH)
    np.testing.assert_allclose(ask(params), expected, atol=TOLERANCE)
