"""Blocks of chosen sizes, against a plain loop that passes over whole rows, one block and one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import MASK, make_lm

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.mixed import Mixed
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.generation.sampling import auto_size
from bd3lm_jax.models import trunk
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.models.trunk import Stream

SIZES, CANVAS = (1, 2, 4), 4
MIXED = Mixed(block_size=4, sizes=SIZES, schedule="loglinear", corruption="exact_count", complement=False, eps=1e-3)
GREEDY = dict(sampler="confidence", temperature=0.0, block_size="auto", min_length=40)  # no end token
LENGTH = 21


@functools.cache
def lm():
    return make_lm(MIXED)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, canvas, prefix, position, block):
    """The canvas [1, S] behind the prefix [1, 24], whose blocks are numbered from 1 (0: not there)."""
    place = jnp.arange(24)[None]
    clean = Stream(prefix, place, block, (block > 0).astype(jnp.int32))
    ones = jnp.ones_like(canvas)
    noised = Stream(canvas[:, None], position + jnp.arange(canvas.shape[1])[None], 99 * ones, ones)
    cache = trunk.new_cache(model, params, 1, 24, "compute")
    h = trunk.decode(model, params, noised, clean, cache, 0, block_size=CANVAS, execution=DEFAULT_EXECUTION).noised
    return trunk.logits(model, params, h)[0, 0]


def ask(canvas, tokens, blocks):
    """Probabilities [S, V] of a canvas behind the tokens written so far, the mask and the end token left out."""
    prefix, block = np.zeros((2, 1, 24), np.int32)
    prefix[0, :len(tokens)], block[0, :len(tokens)] = tokens, blocks
    logits = np.array(forward(lm().model, lm().params, jnp.asarray([canvas]), prefix, len(tokens), block), np.float64)
    logits[:, MASK] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def without_end(p):
    p = p.copy()
    p[:, 3] = 0
    return p / p.sum(-1, keepdims=True)


def written(prompt, confidence):
    """Tokens, block sizes and calls of the greedy text, the surest token of a block first."""
    tokens, blocks, sizes, calls = list(prompt), [1 + i // CANVAS for i in range(len(prompt))], [], 0
    while len(tokens) < LENGTH:
        p = ask([MASK] * CANVAS, tokens, blocks)
        sure = p.max(-1)
        size = max([SIZES[0], *(n for n in SIZES if sure[:n].mean() >= confidence)])
        block = [MASK] * size
        for call in range(size):
            p = p[:size] if call == 0 else ask(block, tokens, blocks)
            best, chance = without_end(p).argmax(-1), without_end(p).max(-1)
            place = max((i for i in range(size) if block[i] == MASK), key=lambda i: chance[i])
            block[place] = int(best[place])
            calls += 1
        tokens, blocks = tokens + block, blocks + [10 + len(sizes)] * size
        sizes.append(size)
    return tokens[len(prompt):LENGTH], sizes, calls


@pytest.mark.ci_slow
@pytest.mark.parametrize("confidence", [0.0, 0.25, 1.0])
def test_greedy_texts(confidence):
    prompts = [[1], [5, 2, 8, 0, 9, 4], [7, 7]]  # without any, all masks are alike to the network
    texts = lm().generate(prompts, length=LENGTH, block_confidence=confidence, **GREEDY)
    seen = set()
    for prompt, text in zip(prompts, texts):
        tokens, sizes, calls = written(prompt, confidence)
        assert (text.tokens, text.nfe) == (tokens, calls)
        seen |= set(sizes)
    assert seen == {0.0: {4}, 0.25: {1, 2, 4}, 1.0: {1}}[confidence]


@pytest.mark.ci_slow
def test_texts_do_not_depend_on_those_beside_them():
    options = dict(length=LENGTH, block_size="auto", block_confidence=0.25, seed=3, forced=[{9: 7}, {}, {}])
    together = lm().generate([[1], [5, 2, 8, 0, 9, 4], []], **options)
    assert lm().generate([[1]], **{**options, "forced": {9: 7}})[0] == together[0]
    assert len(together[0].tokens) >= 9 and together[0].tokens[8] == 7
    assert all(0 <= token < MASK for text in together for token in text.tokens)


def test_chosen_sizes():
    """Means of the largest probability over the first 1, 2 and 4 places."""
    p = np.array([[.9, .5, .5, .1], [.2, .9, .9, .8], [.2, .2, .2, .2], [.2, .2, .2, .2]])
    masked = np.array([[True] * 4, [True] * 4, [True] * 4, [True, False, False, False]])
    logits = np.log(np.stack([p, *[(1 - p) / 9] * 9, np.full(p.shape, 5.0)], axis=-1))
    sizes = auto_size.AutoSizes((1, 2, 4), 0.55)
    forbidden = np.arange(11) == 10
    assert auto_size.choose_sizes(sizes, logits, masked, forbidden).tolist() == [2, 4, 1, 4]


@pytest.mark.parametrize("options, words", [
    (dict(block_confidence=1.5), "block_confidence is 1.5, expected 0 to 1"),
    (dict(min_entropy=2.0), "does not go with min_entropy: leave"),
    (dict(guidance=1.0), "does not go with guidance"),
    (dict(repetition_penalty=1.2), "does not go with repetition_penalty: leave"),
    (dict(sampler="iterative"), "rewrites the whole block"),
])
def test_what_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        lm().generate([[1]], length=8, block_size="auto", **options)


def test_other_models_have_one_size():
    with pytest.raises(UserError, match="block_size is auto, expected 4, the one it was trained with"):
        make_lm().generate([[1]], length=8, block_size="auto")
    with pytest.raises(UserError, match="is not watched"):
        stream.stream(lm(), [[1]], 1, 8, make_options(block_size="auto"))
