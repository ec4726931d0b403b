"""Asking a network with a cache, against passes over whole rows and against lists of what a ring keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from trunk_passes import run_pass

from bd3lm_jax.generation.denoise import BlockDenoiser, CausalDenoiser, GuidedDenoiser, UncachedDenoiser
from bd3lm_jax.generation.sampling import SAMPLERS, DenoiserContext, Filters, Request, Settings, run_blocks, start
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.models import build, forward, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.models.trunk import Stream

VOCAB, MASK, END, SIZE, LENGTH = 13, 12, 3, 4, 16
TOKENS = np.random.default_rng(1).integers(0, MASK, size=(3, LENGTH)).astype(np.int32)
CANVAS = np.where(np.random.default_rng(2).uniform(size=TOKENS.shape) < 0.6, MASK, TOKENS)
TOLERANCE = 1e-5
QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of the time here


@functools.cache
def network(time_conditioning=False, adaln=True):
    """Random parameters everywhere: a fresh network ignores its input."""
    model = build(DiTConfig(vocab_size=VOCAB, num_layers=2, hidden_size=32, num_heads=2, mlp_ratio=2, dropout=0.0,
                            adaln=adaln, cond_dim=8, time_conditioning=time_conditioning, rope_theta=1e4), jnp.float32)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


@functools.cache
def compiled(denoiser):
    """The denoiser's question and its prefill, whose origin is an argument."""
    return (jax.jit(lambda *args: denoiser(*args), compiler_options=QUICK),
            jax.jit(denoiser.prefill, compiler_options=QUICK))


@functools.cache
def block_denoiser(time_conditioning=False, slots=LENGTH - SIZE, dtype="float32"):
    return BlockDenoiser(network(time_conditioning)[0], SIZE, slots, dtype)


def stored_tokens(tokens, count, room):
    """Ids and which are real, for a prefill of `room` tokens: those behind the count are junk that nobody may see."""
    ids = np.full((len(tokens), room), 5, np.int32)
    ids[:, :min(count, room)] = tokens[:, :min(count, room)]
    return ids, np.broadcast_to(np.arange(room) < count, ids.shape)


def cut(x, block, size=SIZE):
    return x[:, max(block, 0) * size:(max(block, 0) + 1) * size]


def finished_before(block, tokens=TOKENS, size=SIZE):
    ids = cut(tokens, block - 1, size)
    return PreviousBlock(ids, np.full(ids.shape, block > 0))


def all_positions(size, batch=3):
    return np.tile(np.arange(size), (batch, 1))


@functools.partial(jax.jit, static_argnames="model")
def uncached_blocks(model, params, sigma_BxMxn=None):
    """Logits of CANVAS after clean TOKENS, `[B, L, V]`."""
    position, segment = forward.single_document_rows(TOKENS)
    h = forward.two_stream(model, params, CANVAS[:, None], TOKENS, position, segment, block_size=SIZE,
                           sigma_BxMxn=sigma_BxMxn, execution=DEFAULT_EXECUTION)
    return trunk.logits(model, params, h, sigma_BxMxn)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "rule", "block_size"))
def uncached_row(model, params, ids, rule, block_size):
    h = forward.one_stream(model, params, ids, *forward.single_document_rows(ids), rule=rule, block_size=block_size,
                           execution=DEFAULT_EXECUTION)
    return trunk.logits(model, params, h)


@pytest.mark.parametrize("time_conditioning", some([False, True], 0))
@pytest.mark.parametrize("first_block", [0, 1, 3])
def test_blocks_with_a_cache_equal_two_streams(time_conditioning, first_block):
    model, params = network(time_conditioning)
    denoiser = block_denoiser(time_conditioning)
    ask, prefill = compiled(denoiser)
    level = np.random.default_rng(3).uniform(0.2, 0.9, size=(len(TOKENS), LENGTH // SIZE)).astype(np.float32)
    sigma = -np.log(1 - level)[:, None] if time_conditioning else None
    expected = np.asarray(uncached_blocks(model, params, sigma))
    stored = denoiser.num_prefilled(first_block)
    assert stored == SIZE * max(first_block - 1, 0)
    cache = prefill(params, *stored_tokens(TOKENS, stored, 11 if stored else 0), 0)
    for block in range(first_block, LENGTH // SIZE):
        canvas, start = cut(CANVAS, block), block * SIZE
        logits, cache = ask(params, canvas, block, finished_before(block), all_positions(SIZE), level[:, block], cache)
        np.testing.assert_allclose(logits, expected[:, start:start + SIZE], atol=TOLERANCE)
        # The block before is stored now: the next call of the block does not bring it, and asks about few positions.
        chosen = np.array([[2], [0], [3]])
        logits, after = ask(params, canvas, block, None, chosen, level[:, block], cache)
        np.testing.assert_allclose(logits, np.take_along_axis(expected, start + chosen[..., None], 1), atol=TOLERANCE)
        jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.parametrize("bos", some([False, True], 1))
@pytest.mark.parametrize("first", [1, 6])
def test_tokens_one_by_one_equal_a_causal_pass(bos, first):
    model, params = network(adaln=False)
    denoiser = CausalDenoiser(model, LENGTH, "compute", bos, END)
    assert denoiser.num_prefilled(first) == (first if bos else first - 1)
    inputs = np.pad(TOKENS, ((0, 0), (1, 0)), constant_values=END) if bos else TOKENS
    predicted_from = 0 if bos else 1  # the first token that the pass says anything about
    expected = np.asarray(uncached_row(model, params, inputs, "causal", 1))[:, :-1]
    first = 0 if bos and first == 1 else first
    stored = denoiser.num_prefilled(first)
    ask, prefill = compiled(denoiser)
    cache = prefill(params, *stored_tokens(inputs, stored, 8 * (stored > 0)), 0)
    for at in range(first, LENGTH):
        logits, cache = ask(params, np.full((3, 1), MASK), at, finished_before(at, size=1), all_positions(1),
                            np.ones(3), cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, at - predicted_from], atol=TOLERANCE)


def test_stored_before_the_first_block():
    model, _ = network()
    assert block_denoiser().num_prefilled(0) == 0
    assert CausalDenoiser(model, LENGTH, "compute", True, END).num_prefilled(0) == 0
    assert CausalDenoiser(model, LENGTH, "compute", False, END).num_prefilled(0) == 0


def test_a_whole_row_as_one_block_needs_no_cache():
    """MDLM: nothing is ever stored."""
    model, params = network()
    ask, prefill = compiled(BlockDenoiser(model, LENGTH, LENGTH, "compute"))
    cache = prefill(params, *stored_tokens(TOKENS, 0, 0), 0)
    nothing = PreviousBlock(CANVAS, np.zeros(CANVAS.shape, bool))
    logits, cache = ask(params, CANVAS, 0, nothing, all_positions(LENGTH), np.ones(3), cache)
    expected = uncached_row(model, params, CANVAS, "bidirectional", LENGTH)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    logits, _ = ask(params, CANVAS, 0, None, all_positions(LENGTH), np.ones(3), cache)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


LONG = np.random.default_rng(4).integers(0, MASK, size=(3, 44)).astype(np.int32)


def empty_blocks(model, params, count, size):
    """A list of stored blocks that nobody sees."""
    return [trunk.new_cache(model, params, len(LONG), size, "float32").replace(empty=False) for _ in range(count)]


@functools.partial(jax.jit, static_argnames=("model", "size", "rule"))
def ask_plainly(model, params, noised, clean, cache, size, rule):
    """Hidden states and what is stored of `clean`, after a list of stored blocks."""
    room = jax.tree.map(jnp.zeros_like, cache[0])
    cache = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *cache, room)
    at = cache.segment.shape[1] - size
    out = run_pass(model, params, noised, clean, cache=cache, write_at=at, rule=rule, block_size=size,
                   execution=trunk.Execution("dense", "unroll", "none", False))
    h = out.clean if noised is None else out.noised[:, 0]
    return trunk.logits(model, params, h), jax.tree.map(lambda x: x[..., at:], out.cache)


def positions_of(block, size):
    place = np.broadcast_to(block * size + np.arange(size), (len(LONG), size)).astype(np.int32)
    return place, place // size, np.ones_like(place)


@pytest.mark.parametrize("prefilled", some([0, 8], 0))
def test_a_ring_keeps_the_last_blocks(prefilled):
    """Blocks of 4, ring of 12, text of 44: against a Python list of which every question gets the last three blocks.

    prefilled: so many blocks are given, of which the last three are stored in one go, as if nothing had been before."""
    model, params = network()
    kept, denoiser = 3, block_denoiser(slots=12)
    ask, prefill = compiled(denoiser)
    origin = prefilled - kept if prefilled else 0
    ids = LONG[:, origin * SIZE:prefilled * SIZE]
    cache = prefill(params, ids, np.ones(ids.shape, bool), origin * SIZE)
    listed = empty_blocks(model, params, kept, SIZE)

    def store(block):
        stream = Stream(cut(LONG, block), *positions_of(block, SIZE))
        listed.append(ask_plainly(model, params, None, stream, listed[1 - kept:], SIZE, "block_causal")[1])

    for block in range(origin, prefilled):
        store(block)
    for block in range(prefilled + 1 if prefilled else 0, LONG.shape[1] // SIZE):
        if block > 0:
            store(block - 1)
        canvas = np.where(cut(LONG, block) % 2, MASK, cut(LONG, block))
        noised = Stream(canvas[:, None], *positions_of(block, SIZE))
        expected, _ = ask_plainly(model, params, noised, None, listed[-kept:], SIZE, "block_causal")
        logits, cache = ask(params, canvas, block, finished_before(block, LONG), all_positions(SIZE), np.ones(3), cache)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
        logits, _ = ask(params, canvas, block, None, all_positions(SIZE), np.ones(3), cache)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def test_a_ring_of_tokens_keeps_the_last_ones():
    """Autoregression with 5 slots, the beginning among what is dropped."""
    model, params = network(adaln=False)
    ask, prefill = compiled(CausalDenoiser(model, 5, "compute", True, END))
    cache, listed = prefill(params, LONG[:, :0], np.ones((3, 0), bool), 0), empty_blocks(model, params, 4, 1)
    inputs = np.pad(LONG, ((0, 0), (1, 0)), constant_values=END)
    for at in range(14):
        stream = Stream(inputs[:, at:at + 1], *positions_of(at, 1))
        expected, stored = ask_plainly(model, params, None, stream, listed[-4:], 1, "causal")
        listed.append(stored)
        logits, cache = ask(params, np.full((3, 1), MASK), at, finished_before(at, LONG, 1), all_positions(1),
                            np.ones(3), cache)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def generation(denoise, cache, prompt, sampler, temperature, window=SIZE, seed=0):
    """The loop over CANVAS-sized rows, `prompt` tokens of each given."""
    settings = Settings(SIZE, window, 6, Filters(temperature), MASK, END)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(3))
    request = Request(keys, np.arange(LENGTH) < np.asarray(prompt)[:, None], np.full(3, LENGTH), np.zeros(3, int),
                      np.arange(VOCAB) == MASK, np.float32(0.5))
    denoiser_context = DenoiserContext(denoise, SAMPLERS[sampler], settings)
    progress = run_blocks(denoiser_context, request, start(denoiser_context, request, TOKENS, 0, cache), LENGTH // SIZE)
    return progress.tokens, progress.stopped, progress.nfe


@pytest.mark.ci_slow
@pytest.mark.parametrize("sampler, temperature", [("first_hitting", 1.0), ("confidence", 0.0), ("remdm_cap", 1.0)])
def test_a_cache_changes_no_token(sampler, temperature):
    model, params = network()
    outcomes = []
    for denoiser in (block_denoiser(), UncachedDenoiser(model, SIZE, LENGTH)):
        def run(params, denoiser=denoiser):
            cache = denoiser.prefill(params, *stored_tokens(TOKENS, 0, 0), 0)
            return generation(functools.partial(denoiser, params), cache, [1, 3, 6], sampler, temperature)
        outcomes.append(jax.jit(run, compiler_options=QUICK)(params))
    jax.tree.map(np.testing.assert_array_equal, *outcomes)
    assert (np.asarray(outcomes[0][0]) != MASK).sum() > 30


@pytest.mark.ci_slow
def test_guidance_against_two_passes():
    """The prompt of 6 tokens ends inside a block: masks take its place there, and nobody sees what is stored of it."""
    model, params = network()
    denoiser = block_denoiser()
    given = np.broadcast_to(np.arange(LENGTH) < 6, TOKENS.shape)
    canvas = np.where(given, TOKENS, CANVAS)
    position, segment = forward.single_document_rows(TOKENS)

    @jax.jit
    def whole_rows(canvas, seen):
        h = forward.two_stream(model, params, canvas[:, None], TOKENS, position, jnp.where(seen, segment, 0),
                               block_size=SIZE, execution=DEFAULT_EXECUTION)
        return trunk.logits(model, params, h)[:, 0]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def guided(weight, block, previous, cache):
        ask = GuidedDenoiser(functools.partial(denoiser, params), weight, jnp.asarray(given), MASK)
        here = jax.lax.dynamic_slice_in_dim(canvas, block * SIZE, SIZE, axis=1)
        return ask(here, block, previous, all_positions(SIZE), jnp.ones(3), cache)

    conditional = whole_rows(canvas, np.ones_like(given))
    cache = compiled(denoiser)[1](params, *stored_tokens(np.concatenate([TOKENS] * 2), 0, 0), 0)
    for block in range(LENGTH // SIZE):
        here = np.arange(LENGTH) // SIZE == block  # a pass for each block, where its own part of the prompt is masks
        without = whole_rows(np.where(given & here, MASK, canvas), ~given | here)
        for weight in (0.0, 0.7):
            logits, after = guided(weight, block, finished_before(block), cache)
            expected = (1 + weight) * cut(conditional, block) - weight * cut(without, block)
            np.testing.assert_allclose(logits, expected, atol=3 * TOLERANCE)
        cache = after
        assert block == 3 or np.abs(cut(conditional - without, block)).max() > 0.1
