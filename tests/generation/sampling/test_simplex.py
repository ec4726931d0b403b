"""Decoding by simplex diffusion: what the network is asked with and what is drawn, by their laws; cache; batches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_lm import END, MASK, VOCAB, make_ids, make_lm
from toy_runs import quick_jit

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.ssd_lm import SSDLM, alpha_bar
from bd3lm_jax.generation.denoise import BlockDenoiser, UncachedDenoiser
from bd3lm_jax.generation.sampling import DenoiserContext, Filters, Request, Settings, run_blocks, simplex, start

SIZE, STEPS, SCALE = 4, 5, 5.0
IT = SSDLM(block_size=SIZE, scale=SCALE)
TRANSITIONS = {steps: simplex.SAMPLER.transition(IT, steps) for steps in (3, STEPS)}


def request_of(batch, length, given=0, lengths=None, seed=0):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    return Request(keys, np.arange(length) < np.broadcast_to(given, (batch,))[:, None], lengths, np.zeros(batch, int),
                   np.arange(VOCAB) == MASK, np.float32(0))


def written(denoise, request, tokens, cache, filters=Filters(), steps=STEPS):
    settings = Settings(SIZE, SIZE, steps, filters, MASK, END)
    context = DenoiserContext(denoise, TRANSITIONS[steps], settings)
    progress = start(context, request, tokens, 0, cache)
    return run_blocks(context, request, progress, tokens.shape[1] // SIZE)


def test_levels():
    levels = simplex.SAMPLER.transition(IT, 4)
    np.testing.assert_allclose(levels.alpha_bar, np.cos(np.arange(5) * np.pi / 8) ** 2, atol=2e-4)
    assert levels.scale == SCALE and levels.alpha_bar[0] == 1


def test_what_is_drawn_follows_the_nucleus():
    """A network of one law whatever it is asked: chi-square on the tokens of its nucleus, nothing outside."""
    p = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.005, 0.005])
    logits = jnp.log(jnp.asarray(np.concatenate([p, np.full(VOCAB - len(p), 1e-12)])))
    batch, length = 256, 8

    def denoise(canvas, block, previous, positions, level, cache):
        return jnp.broadcast_to(logits, canvas.shape), cache

    tokens = np.zeros((batch, length), np.int32)
    request = request_of(batch, length)._replace(forbidden=np.arange(VOCAB) == 1)
    found = quick_jit(lambda: written(denoise, request, tokens, jnp.zeros(()), Filters(top_p=0.8)))()
    new = np.asarray(found.tokens)
    alive = np.cumsum(np.pad((new.reshape(batch, -1, SIZE) == END).any(-1), ((0, 0), (1, 0)))[:, :-1], axis=1) == 0
    drawn = new.reshape(batch, -1, SIZE)[alive].ravel()  # a row that has met the end token writes no more
    kept = np.array([0, 2, 3])  # without token 1: .533 .2 .133, the third crosses .8
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[kept].sum() == len(drawn) > 1000
    expected = len(drawn) * p[kept] / p[kept].sum()
    assert np.sum((counts[kept] - expected) ** 2 / expected) < 18.4  # 1e-4 of chi-square with 2 degrees
    np.testing.assert_array_equal(found.nfe, STEPS * alive.sum(1))


def test_what_the_network_is_asked_with():
    """A network that is sure of token 5: from the second call on its canvas is that token's logits under the noise of
    the level that it is told. The logit less the mean of the others, standardised, is normal."""
    seen, batch = [], 64

    def denoise(canvas, block, previous, positions, level, cache):
        jax.debug.callback(lambda *x: seen.append([np.asarray(y) for y in x]), canvas, level, previous is not None,
                           ordered=True)
        return jnp.broadcast_to(jnp.where(jnp.arange(VOCAB) == 5, 0.0, -1e4), canvas.shape), cache

    found = quick_jit(lambda: written(denoise, request_of(batch, SIZE), np.zeros((batch, SIZE), np.int32),
                                      jnp.zeros(())))()
    jax.effects_barrier()
    assert np.all(found.tokens == 5) and np.all(found.nfe == STEPS) and len(seen) == STEPS
    levels = np.asarray(alpha_bar(np.linspace(1, 0, STEPS + 1)), np.float64)
    assert [bool(first) for _, _, first in seen] == [True] + [False] * (STEPS - 1)
    z = []
    for (canvas, level, _), a in zip(seen, levels):
        np.testing.assert_allclose(level, 1 - a, atol=1e-6)
        w = np.log(np.maximum(canvas.astype(np.float64), 1e-40))
        own, others = w[..., 5], np.delete(w, 5, axis=-1).mean(-1)
        z.append((own - others - 2 * SCALE * np.sqrt(a)) / (SCALE * np.sqrt((1 - a) * VOCAB / (VOCAB - 1))))
    z = np.array(z)
    margin = 4 / math.sqrt(z[0].size)
    assert np.all(np.abs(z.reshape(STEPS, -1).mean(1)) < margin)
    assert np.all(np.abs((z**2).reshape(STEPS, -1).mean(1) - 1) < margin * math.sqrt(2))
    correlation = np.corrcoef(z.reshape(STEPS, -1))
    assert np.abs(correlation - np.eye(STEPS)).max() < margin  # every step has noise of its own


@pytest.mark.ci_slow
def test_a_cache_changes_no_token_and_given_ones_stay():
    lm, length = make_lm(IT), 16
    tokens = make_ids(3, length)
    request = request_of(3, length, given=[0, 3, 9], lengths=[16, 14, 16])
    outcomes = []
    for denoiser in (BlockDenoiser(lm.model, SIZE, length, "float32"), UncachedDenoiser(lm.model, SIZE, length)):
        def run(params, denoiser=denoiser):
            cache = denoiser.prefill(params, jnp.asarray(tokens[:, :0]), jnp.ones((3, 0), bool), 0)
            return written(functools.partial(denoiser, params), request, tokens, cache, steps=3)._replace(cache=None)
        outcomes.append(quick_jit(run)(lm.params))
    jax.tree.map(np.testing.assert_array_equal, *outcomes)
    new, given = np.asarray(outcomes[0].tokens), np.asarray(request.given)
    np.testing.assert_array_equal(new[given], tokens[given])
    assert len(set(new[~given])) > 5


@pytest.mark.ci_slow
def test_texts_do_not_depend_on_their_batch():
    """Prompts of several lengths together, and the first ones alone; calls are counted by block."""
    lm = make_lm(IT, time_conditioning=True)
    prompts = [make_ids(n, seed=n).tolist() for n in (2, 5, 9)]
    options = dict(length=16, steps=3, seed=4, top_p=0.9)
    together = lm.generate(prompts, **options)
    assert together[0] == lm.generate(prompts[:1], **options)[0]
    for sample, prompt in zip(together, prompts):
        full = 4 - len(prompt) // SIZE
        assert sample.nfe == 3 * full or sample.stop == "end" and sample.nfe % 3 == 0
        assert all(0 <= token < MASK for token in sample.tokens)
    assert together == lm.generate(prompts, sampler="simplex", **options)


def test_what_does_not_go_together():
    lm = make_lm(IT)
    for sampler in ("first_hitting", "confidence"):
        with pytest.raises(UserError, match=f"sampler '{sampler}' .*kind 'ssd_lm': use simplex"):
            lm.generate(length=8, sampler=sampler)
    with pytest.raises(UserError, match="sampler 'simplex' .*kind 'masked': use first_hitting"):
        make_lm().generate(length=8, sampler="simplex")
    with pytest.raises(UserError, match="constraint and guidance"):
        lm.generate(length=8, guidance=1.0)
    with pytest.raises(UserError, match="approximate_cache keeps the tokens .*leave it out"):
        lm.generate(length=8, approximate_cache="dual", block_size=lm.config.block_size)
    with pytest.raises(UserError, match="no bound"):
        lm.nll(make_ids(1, 8))
