"""Caches that are out of date, against their definition layer by layer, and where they are exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation import approximate_cache, infill, stream
from bd3lm_jax.generation.approximate_cache import KINDS, ApproximateDenoiser
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.models import trunk

WINDOW = 4
NO_END = {"forbidden": [END]}


def bidirectional(time_conditioning=False):
    return make_lm(masked(CONTEXT), time_conditioning, LETTERS)


def by_hand(lm, ids_BxN, first, outside, level_B):
    """Logits `[B, N, V]` of tokens at places `first`, ..., and their keys and values, layer by layer.

    outside: the keys and values of other tokens, for each layer two arrays `[B, P, H, Dh]`, that they attend to beside
    themselves.
    """
    model, params = lm.model, lm.params
    rotary = model.rotary(first + jnp.arange(ids_BxN.shape[1])[None])
    sigma = -np.log1p(-np.asarray(level_B))[:, None] if lm.config.model.time_conditioning else np.zeros((1, 1))
    cond = model.condition.apply({"params": params["condition"]}, jnp.asarray(sigma, jnp.float32))
    h = model.embed.apply({"params": params["embed"]}, ids_BxN)
    (name, block, count), = model.groups
    own = []
    for i in range(count):
        variables = {"params": jax.tree.map(lambda x, i=i: x[i], params[name])}
        q, k, v = (np.asarray(x, np.float64)
                   for x in block.apply(variables, h, cond, rotary, True, method=block.project_qkv))
        own.append((k, v))
        if outside is not None:
            k, v = (np.concatenate([x, y], axis=1) for x, y in zip((k, v), outside[i]))
        scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
        attended = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        h, _ = block.apply(variables, h, jnp.asarray(attended, jnp.float32), cond, None,
                           method=block.attention_output_and_mlp)
    return np.asarray(model.head.apply({"params": params["head"]}, h, cond)), own


@pytest.mark.ci_slow
@pytest.mark.parametrize("kind, time_conditioning", [("prefix", False), ("dual", True)])
def test_the_definition(kind, time_conditioning):
    """Three windows of a canvas with tokens given on both sides: the first call is a whole pass, later ones see what it
    computed outside of what they compute."""
    lm = bidirectional(time_conditioning)
    denoiser = ApproximateDenoiser(lm.model, WINDOW, CONTEXT, kind, MASK, "compute")
    ask = jax.jit(functools.partial(denoiser, lm.params), compiler_options={"xla_backend_optimization_level": 0})
    known = np.random.default_rng(0).uniform(size=(3, CONTEXT)) < 0.3
    row, final = np.where(known, make_ids(3, CONTEXT), MASK), make_ids(3, CONTEXT, seed=2)
    stored = denoiser.prefill(lm.params, jnp.asarray(row), jnp.ones(row.shape, bool), 0)
    everywhere = np.tile(np.arange(WINDOW), (3, 1))
    for block in (0, 1, 4):
        start = block * WINDOW
        inside = np.s_[:, start:start + WINDOW]
        before = np.s_[:, max(start - WINDOW, 0):max(start, WINDOW)]
        if block == 4:  # as if the windows between had been given
            row[:, 2 * WINDOW:start] = final[:, 2 * WINDOW:start]
            stored = stored._replace(row=jnp.asarray(row))
        previous = PreviousBlock(jnp.asarray(row[before]), jnp.full((3, WINDOW), block > 0))
        expected, whole = by_hand(lm, row, 0, None, (row == MASK).mean(1))
        logits, stored = ask(row[inside], block, previous, everywhere, np.ones(3), stored)
        np.testing.assert_allclose(logits, expected[inside], atol=1e-5)
        for _ in range(2):
            at = start + np.flatnonzero((row[inside] == MASK).any(0))[0]
            row[:, at] = final[:, at]
            first, end = (start, start + WINDOW) if kind == "dual" else (start, CONTEXT)
            outside = [[np.delete(x, np.s_[first:end], axis=1) for x in layer] for layer in whole]
            expected, _ = by_hand(lm, row[:, first:end], first, outside, (row == MASK).mean(1))
            few = np.array([[2], [0], [3]])
            logits, after = ask(row[inside], block, None, few, np.ones(3), stored)
            np.testing.assert_allclose(logits, np.take_along_axis(expected, few[..., None], 1), atol=1e-5)
            exact, _ = by_hand(lm, row, 0, None, (row == MASK).mean(1))
            assert block == 0 and kind == "prefix" or np.abs(exact[inside] - expected[:, :WINDOW]).max() > 1e-3
            jax.tree.map(np.testing.assert_array_equal, after, stored)
        row[inside] = final[inside]


@pytest.mark.ci_slow
@pytest.mark.parametrize("kind, options", [
    ("dual", {"sampler": "remdm_cap", "steps": 12}), ("prefix", {"sampler": "threshold", "threshold": 0.2,
                                                                 "guidance": 1.5})])
def test_one_window_is_exact(kind, options):
    """Nothing is out of date: token for token the texts that are written without a cache."""
    lm, prompts = bidirectional(True), ["abc", "", "ghijkabc"]
    options = {**options, "length": CONTEXT, "seed": 2, "block_size": CONTEXT, **NO_END}
    assert lm.generate(prompts, **options, approximate_cache=kind) == lm.generate(prompts, **options)


@pytest.mark.ci_slow
@pytest.mark.parametrize("kind", KINDS)
def test_texts_do_not_depend_on_their_companions(kind):
    lm, prompts = bidirectional(), ["abcd", "a", "", "abcdabcdabcdabcdef"]
    options = {"length": 22, "block_size": WINDOW, "approximate_cache": kind, "sampler": "confidence", "seed": 4,
               **NO_END}
    together = lm.generate(prompts, **options)
    assert [len(sample.tokens) for sample in together] == [18, 21, 22, 4]
    assert all(MASK not in sample.tokens and sample.stop == "length" for sample in together)
    assert lm.generate(prompts[:1], **options) == together[:1]
    longer = lm.generate(["abcd"], **{**options, "length": 40}, window=True)[0]
    assert len(longer.tokens) == 36 and longer.tokens[:18] == together[0].tokens


def test_one_call_a_window_is_exact():
    """The first call of a window sees everything as it is: all of it at once, without noise, as without a cache."""
    lm, options = bidirectional(), {"num": 2, "length": CONTEXT, "block_size": CONTEXT // 2, "temperature": 0.0,
                                    "sampler": "threshold", "threshold": 0.0, **NO_END}
    samples = lm.generate(["ab", "cdefg"], **options)
    assert lm.generate(["ab", "cdefg"], **options, approximate_cache="dual") == samples
    assert {sample.nfe for sample in samples} == {2}


@pytest.mark.ci_slow
def test_an_end_token_saves_the_later_windows():
    lm = bidirectional()
    samples = lm.generate(num=24, length=CONTEXT, block_size=WINDOW, approximate_cache="dual")
    for sample in samples:
        written = len(sample.tokens) // WINDOW * WINDOW + WINDOW if sample.stop == "end" else CONTEXT
        assert sample.nfe == written
    assert {sample.stop for sample in samples} == {"end", "length"}


@pytest.mark.ci_slow
def test_fewer_positions_are_computed(monkeypatch):
    """Token positions through the network, counted as they run: the whole canvas once a window, then what is out of
    date: the window, or the windows from it on in a size that is compiled."""
    counted, whole = [], trunk.prefill

    def counting(model, params, clean, *args, **options):
        jax.debug.callback(lambda: counted.append(clean.ids.shape[1]))
        return whole(model, params, clean, *args, **options)
    monkeypatch.setattr(approximate_cache.trunk, "prefill", counting)
    lm = bidirectional()
    lm = type(lm)(lm.config, lm.params, lm.tokenizer, lm.model, lm.context)  # compiled with the counter
    totals = {}
    for kind in KINDS:
        counted.clear()
        sample, = lm.generate(length=CONTEXT, block_size=WINDOW, approximate_cache=kind, **NO_END)
        jax.effects_barrier()
        assert sample.nfe == len(counted) == CONTEXT
        totals[kind] = sum(counted)
    windows = CONTEXT // WINDOW
    assert totals["dual"] == windows * CONTEXT + (CONTEXT - windows) * WINDOW
    suffixes = [24, 24, 24, 12, 8, 4]  # of 24, 20, 16, 12, 8, 4 tokens that are left
    assert totals["prefix"] == windows * CONTEXT + (WINDOW - 1) * sum(suffixes)
    assert totals["dual"] < totals["prefix"] < CONTEXT * CONTEXT


def test_sizes_of_a_suffix():
    assert ApproximateDenoiser(None, 4, 24, "prefix", MASK, "compute").suffixes() == [24, 12, 8, 4]
    assert ApproximateDenoiser(None, 8, 8, "prefix", MASK, "compute").suffixes() == [8]


@pytest.mark.ci_slow
def test_watched_texts_are_those_of_generate():
    lm, options = bidirectional(), {"block_size": WINDOW, "approximate_cache": "dual", "sampler": "confidence",
                                    "seed": 4, **NO_END}
    events = list(stream.stream(lm, ["abcde", "b"], 1, 14, make_options(**options)))
    watched = sorted((event for event in events if event.sample), key=lambda event: event.number)
    assert [event.sample for event in watched] == lm.generate(["abcde", "b"], length=14, **options)


@pytest.mark.ci_slow
def test_text_behind_a_hole_is_seen_and_stays():
    lm, options = bidirectional(), {"block_size": WINDOW, "approximate_cache": "dual", "sampler": "confidence",
                                    "seed": 4, **NO_END}
    ids = [1, 2, *[MASK] * 6, 4, 5, *[MASK] * 2, *[6] * 8]
    other = ids[:12] + [7] * 8
    first, second = ([one.tokens for one in infill.infill(lm, [text] * 20, make_options(**options), draws=1)]
                     for text in (ids, other))
    for tokens in first:
        assert [t for t, given in zip(tokens, ids) if given != MASK] == [t for t in ids if t != MASK]
        assert MASK not in tokens and len(tokens) == len(ids)
    assert [row[:12] for row in first] != [row[:12] for row in second]


@pytest.mark.ci_slow
def test_a_smaller_dtype_rounds_what_is_stored():
    lm = bidirectional()
    options = {"num": 8, "length": CONTEXT, "block_size": 12, "approximate_cache": "dual", "sampler": "threshold",
               "threshold": 0.2, **NO_END}
    plain, rounded = lm.generate(**options), lm.generate(**options, cache_dtype="int8")
    assert np.mean([np.equal(a.tokens, b.tokens).mean() for a, b in zip(plain, rounded)]) > 0.7


@pytest.mark.parametrize("objective, options, message", [
    (masked(4), {}, "approximate_cache is for bidirectional models .*the cache of a block model is exact"),
    (AR(bos=True), {}, "the cache of an autoregressive model is exact"),
    (masked(CONTEXT), {}, "give its tokens as block_size, 1 to 24"),
    (masked(CONTEXT), {"approximate_cache": "suffix", "block_size": 4}, "unknown approximate_cache 'suffix'"),
    (masked(CONTEXT), {"block_size": 25}, "block_size is 25, expected 1 to 24"),
    (masked(CONTEXT), {"block_size": 4, "sampler": "remdm_cap"}, "rewrites the whole block")])
def test_what_has_no_approximate_cache(objective, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_lm(objective).generate(**{"length": 10, "approximate_cache": "dual", **options})
    assert "\n" not in str(error.value)
