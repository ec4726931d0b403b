"""Outputs one token ahead: blocks of one token are the autoregressive model, larger ones do not see what they must not,
and writing asks the network as training does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_lm import CONTEXT, END, LETTERS, MASK, VOCAB, make_ids, make_lm, masked
from toy_runs import AR, toy_config

import bd3lm_jax
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR as Autoregression
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.generation.denoise import BlockDenoiser, ShiftedDenoiser
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.models import build, forward, trunk
from bd3lm_jax.scoring.score import score


@functools.cache
def shifted_lm(size, form="block"):
    """The network of the autoregressive toy model, its mask token a token like others, with blocks."""
    ar = make_lm(Autoregression(bos=True))
    config = dataclasses.replace(ar.config.model, target_shift=form)
    whole = dataclasses.replace(ar.config, model=config, diffusion=masked(size))
    return bd3lm_jax.LM(whole, ar.params, LETTERS, build(config, jnp.float32), CONTEXT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(size, form, xt, x0):
    """Logits `[B, L, V]` for xt after clean x0 as training asks for them."""
    lm = shifted_lm(size, form)
    position, segment = forward.single_document_rows(x0)
    noised = Noised(xt[:, None], jnp.ones(xt[:, None].shape), jnp.ones((len(xt), 1, 1)), xt.shape[1])
    rows = {"tokens": x0, "positions": position, "segments": segment}
    scored = score(lm.model, lm.params, lm.config.diffusion, noised, rows, forward.DEFAULT_EXECUTION, END)
    kernel, bias = trunk.output_layer(lm.model, lm.params)
    return (scored.features_BxMxCxD[:, 0] @ kernel + bias)[..., :VOCAB]


def logits(size, xt, x0, form="block"):
    shifted_lm(size, form)  # outside of the program
    return np.asarray(_logits(size, form, jnp.asarray(xt), jnp.asarray(x0)))


def test_blocks_of_one_token_are_the_autoregressive_model():
    ids = make_ids(3, 16)
    ar = make_lm(Autoregression(bos=True))
    inputs = np.concatenate([np.full((3, 1), END), ids[:, :-1]], axis=1)
    expected = np.asarray(ar.logits(inputs))
    found = logits(1, np.full_like(ids, MASK), ids)
    np.testing.assert_allclose(found[..., :MASK], expected[..., :MASK], atol=1e-5)


@pytest.mark.parametrize("form", ["block", "row"])
def test_who_is_seen(form):
    """By changing one token at a time: the output of token i reads its block but for its last token (and, of whole rows
    in Dream's form, all of it), the clean text before, and nothing else."""
    size, length = (4, 12) if form == "block" else (12, 12)
    x0, xt = make_ids(1, length), make_ids(1, length, seed=2)
    base = logits(size, xt, x0, form)
    for changed in range(length):
        for noised in (True, False):
            other, clean = xt.copy(), x0.copy()
            row = other if noised else clean
            row[0, changed] = (row[0, changed] + 1) % MASK
            moved = np.abs(logits(size, other, clean, form) - base).max(-1)[0] > 1e-6
            block = np.arange(length) // size
            if form == "row":
                expected = np.full(length, noised)
            elif noised:
                expected = (block == changed // size) & (changed % size < size - 1)
            else:
                expected = block > changed // size
            assert np.array_equal(moved, expected), (changed, noised)


def test_a_whole_row_is_read_as_it_is():
    """Dream's form from the raw pass: token i by output i - 1, the first by its own."""
    lm, xt = shifted_lm(12, "row"), make_ids(2, 12, seed=3)
    raw = np.asarray(lm.logits(xt, xt))
    np.testing.assert_allclose(logits(12, xt, xt, "row"), raw[:, [0, *range(11)]], atol=1e-5)


@pytest.mark.parametrize("first_block", some([0, 2], 1))
def test_blocks_with_a_cache_are_asked_as_in_training(first_block):
    size, x0, xt = 4, make_ids(3, 16), make_ids(3, 16, seed=5)
    lm, expected = shifted_lm(size), logits(size, xt, x0)
    denoiser = ShiftedDenoiser(BlockDenoiser(lm.model, size, 12, "float32"), "block", END)
    stored = denoiser.num_prefilled(first_block)
    ids = np.full((3, 7 if stored else 0), 5, np.int32)
    ids[:, :stored] = x0[:, :stored]
    cache = denoiser.prefill(lm.params, ids, np.broadcast_to(np.arange(ids.shape[1]) < stored, ids.shape), 0)
    positions, level = np.tile(np.arange(size), (3, 1)), np.full(3, 0.5, np.float32)
    ask = jax.jit(lambda *args: denoiser(*args))
    for block in range(first_block, 4):
        at = slice(block * size, (block + 1) * size)
        before = x0[:, max(block - 1, 0) * size:][:, :size]
        previous = PreviousBlock(before, np.full(before.shape, block > 0))
        found, cache = ask(lm.params, xt[:, at], block, previous, positions, level, cache)
        np.testing.assert_allclose(found, expected[:, at], atol=1e-5)
        again, _ = ask(lm.params, xt[:, at], block, None, positions[:, 2:], level, cache)
        np.testing.assert_allclose(again, expected[:, at][:, 2:], atol=1e-5)


@pytest.mark.ci_slow
def test_writing_token_by_token_is_the_autoregressive_model():
    prompts = [make_ids(5), make_ids(2, seed=7)]
    models = make_lm(Autoregression(bos=True), tokenizer=LETTERS), shifted_lm(1)
    texts = [lm.generate(prompts, length=12, temperature=0.0) for lm in models]
    assert [x.tokens for x in texts[0]] == [x.tokens for x in texts[1]] and any(x.tokens for x in texts[0])


@pytest.mark.ci_slow
def test_likelihoods_and_holes_are_those_of_the_autoregressive_model():
    models, tokens = (make_lm(Autoregression(bos=True), tokenizer=LETTERS), shifted_lm(1)), make_ids(2, 10, seed=9)
    expected, found = models[0].nll(tokens, estimator="nll"), models[1].nll(tokens, estimator="exact")
    np.testing.assert_allclose(found.per_token, expected.per_token, atol=1e-4)
    filled = [lm.infill(["bcf[MASK:4]"], temperature=0.0, draws=1)[0].tokens for lm in models]
    assert filled[0] == filled[1] and len(filled[0]) == 7


def test_forms_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="model.target_shift is 'blocks', expected one of '', 'row', 'block'"):
        toy_config(tmp_path, {"model.target_shift": "blocks"})
    with pytest.raises(UserError, match="model.target_shift='row' is for one block a row, and diffusion.block_size=4"):
        toy_config(tmp_path, {"model.target_shift": "row"})
    with pytest.raises(UserError, match="model.target_shift='block' has no effect with diffusion.kind='ar': use ''"):
        toy_config(tmp_path, {"model.target_shift": "block", "diffusion": AR, "model.adaln": False})
    assert toy_config(tmp_path, {"model.target_shift": "block"}).model.target_shift == "block"
