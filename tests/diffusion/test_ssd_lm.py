"""Simplex diffusion: its schedule and noise against closed forms, its loss against NumPy, and that it has no bound."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_runs import END, LENGTH, MASK, network, quick_jit, toy_config

from bd3lm_jax import models
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.ssd_lm import ALPHA_BAR_MIN, OFFSET, SSDLM, alpha_bar, noisy_logits
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.models import forward, trunk
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.planning import flops
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.step import make_step

BLOCK, BATCH, VIEWS, VOCAB, SCALE = 8, 4, 2, 12, 5.0
IT = SSDLM(block_size=BLOCK, scale=SCALE)
X0 = np.random.default_rng(0).integers(0, VOCAB, size=(24, LENGTH)).astype(np.int32)


def make_config(**changes):
    section = {"kind": "ssd_lm", "block_size": BLOCK, "scale": SCALE}
    return toy_config(Path("unused"),
                      {"diffusion": section, "model.time_conditioning": True, "train.noise_samples": VIEWS,
                                       "train.batch_size": BATCH} | changes)


@functools.cache
def drawn():
    """Noised copies of X0, and what the network reads."""
    segment = np.ones_like(X0)
    segment[-1, -5:] = 0

    def run(key):
        noised = IT.corrupt(key, X0, segment, VIEWS, VOCAB, END)
        return noised, IT.soft_inputs(noised, X0, VOCAB)

    return segment, *quick_jit(run)(jax.random.key(0))


def standard_normal(sample, false_alarm=1e-4):
    """Kolmogorov's test: whether the largest distance of the distribution functions is below its critical value."""
    sample = np.sort(np.ravel(sample))
    law = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in sample])
    below = np.arange(len(sample)) / len(sample)
    distance = max(np.abs(law - below).max(), np.abs(law - below - 1 / len(sample)).max())
    return distance < math.sqrt(-0.5 * math.log(false_alarm / 2) / len(sample))


def test_schedule():
    t = np.linspace(0, 1, 7)
    np.testing.assert_allclose(alpha_bar(t), np.cos(t * math.pi / 2) ** 2, atol=2e-4)
    assert alpha_bar(0.0) == 1 and 0 <= alpha_bar(1.0) < 1e-6
    assert alpha_bar(0.5) == pytest.approx(0.5, abs=1e-4) and alpha_bar(0.25) == pytest.approx(0.8535, abs=1e-4)


def test_clean_and_noised_logits_of_a_token():
    eps = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    found = noisy_logits(jnp.asarray([3, 0]), eps, jnp.asarray([1.0, 0.36]), 5.0)
    np.testing.assert_allclose(found[0], [-5, -5, -5, 5])
    np.testing.assert_allclose(found[1], 5 * (0.6 * np.array([1, -1, -1, -1]) + 0.8 * eps[1]), rtol=1e-6)


def test_levels_are_stratified_over_all_blocks():
    _, noised, _ = drawn()
    kept = np.exp(-np.asarray(noised.sigma_BxMxK, np.float64))
    t = np.sort(np.arccos(np.sqrt(kept) * np.cos(OFFSET / (1 + OFFSET) * np.pi / 2)).ravel())
    t = t * 2 / np.pi * (1 + OFFSET) - OFFSET
    assert len(t) == len(X0) * VIEWS * LENGTH // BLOCK
    assert np.abs(t * len(t) - np.arange(len(t)) - 0.5).max() < 0.5 + 0.02 * len(t) / 100
    assert noised.sigma_BxMxK.max() <= -np.log(ALPHA_BAR_MIN) + 1e-3 and noised.capacity == LENGTH


def test_the_law_of_what_the_network_reads():
    """The logit of the token less the mean of the others is normal: mean 2 K sqrt(a), variance K^2 (1 - a) V / (V - 1).
    """
    _, noised, p = drawn()
    np.testing.assert_allclose(np.asarray(p).sum(-1), 1, rtol=1e-5)
    a = np.exp(-np.repeat(np.asarray(noised.sigma_BxMxK, np.float64), BLOCK, axis=-1))
    w = np.log(np.maximum(np.asarray(p, np.float64), 1e-300))
    hit = np.arange(VOCAB) == X0[:, None, :, None]
    own, others = np.where(hit, w, 0).sum(-1), np.where(hit, 0, w).sum(-1) / (VOCAB - 1)
    kept = np.asarray(p).min(-1) > 1e-37  # float32 probabilities of less are cut off
    scale = SCALE * np.sqrt((1 - a) * VOCAB / (VOCAB - 1))
    z = (own - others - 2 * SCALE * np.sqrt(a)) / scale
    assert kept.mean() > 0.99 and standard_normal(z[kept])
    assert not standard_normal(z[kept] * 1.5) and not standard_normal(z[kept] + 0.3)
    first, second = z[:, 0].ravel(), z[:, 1].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(first))  # copies are independent


def test_every_real_token_counts_once():
    segment, noised, _ = drawn()
    np.testing.assert_array_equal(noised.weight_BxMxL, np.repeat(segment[:, None] != 0, VIEWS, axis=1))


@functools.cache
def letters():
    tokens = np.random.default_rng(0).integers(97, 103, size=(BATCH, LENGTH)).astype(np.int32)
    position, segment = (np.array(x) for x in forward.single_document_rows(tokens))
    tokens[-1, -10:], position[-1, -10:], segment[-1, -10:] = END, 0, 0
    return {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(position), "segments": jnp.asarray(segment)}


@functools.cache
def loss_by_hand():
    """Of step 0, in nats a token: cross-entropies in NumPy of logits for a mixture of embeddings that NumPy made."""
    config, rows = make_config(), letters()
    model, params = network(config)
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))[0]
    noised = quick_jit(lambda: config.diffusion.corrupt(key, rows["tokens"], rows["segments"], VIEWS, MASK, END))()
    p = np.asarray(quick_jit(lambda: config.diffusion.soft_inputs(noised, rows["tokens"], MASK + 1))())
    table = np.asarray(params["embed"]["embedding"])
    # The rows of a new table are the mixtures themselves, so that the network is asked with ids.
    soft_inputs = (p.reshape(-1, MASK + 1) @ table[:MASK + 1]).astype(np.float32)
    wide = models.build(dataclasses.replace(model.config, vocab_size=len(table) + len(soft_inputs)), jnp.float32)
    model = model._replace(embed=wide.embed)
    changed = {**params, "embed": {"embedding": jnp.concatenate([table, soft_inputs])}}
    ids = len(table) + np.arange(len(soft_inputs)).reshape(BATCH, VIEWS, LENGTH).astype(np.int32)

    def logits(params):
        h = forward.two_stream(model, params, ids, rows["tokens"], rows["positions"], rows["segments"],
                               block_size=BLOCK, sigma_BxMxn=noised.sigma_BxMxK, execution=DEFAULT_EXECUTION)
        return trunk.logits(model, params, h, noised.sigma_BxMxK)

    found = np.asarray(quick_jit(logits)(changed), np.float64)
    found[..., MASK] = -np.inf
    top = found.max(-1, keepdims=True)
    log_p = found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))
    target = np.asarray(rows["tokens"])[:, None, :, None]
    nats = -np.take_along_axis(log_p, np.repeat(target, VIEWS, axis=1), axis=-1)[..., 0]
    real = np.asarray(rows["segments"]) != 0
    return np.where(real[:, None], nats, 0).sum() / VIEWS / real.sum()


@pytest.mark.ci_slow
@pytest.mark.parametrize("microbatch", [2, pytest.param(0, marks=pytest.mark.ci_slow)])
def test_the_step_computes_the_formula(microbatch):
    config = make_config(**{"compute.microbatch": microbatch})
    model, params = network(config)
    tx = optax.sgd(0.0)
    step = quick_jit(make_step(config, model, tx, SpecialIds(MASK, END)))
    _, metrics = step(TrainState(jnp.int32(0), params, {}, tx.init(params)), letters())
    np.testing.assert_allclose(metrics["loss"], loss_by_hand(), rtol=1e-5)


def test_it_has_no_bound():
    config = make_config()
    assert not IT.is_bound and not IT.uses_mask_token and not IT.has_bound
    for name in ("native", "exact_count", "exact"):
        with pytest.raises(UserError, match="kind 'ssd_lm' has no bound on its likelihood"):
            estimators.make(name, config)


def test_operations_of_the_mixtures():
    """2 V D a noised token more than masked diffusion that scores every token."""
    model = make_config().model
    model = dataclasses.replace(model, vocab_size=MASK + 1)
    all_scored = dataclasses.replace(Masked.uniform_counts(BLOCK), corruption="bernoulli")
    ours, others = (flops.parts(model, it, batch=2, length=LENGTH, noise_samples=3) for it in (IT, all_scored))
    assert ours.layers - others.layers == 2 * (MASK + 1) * model.hidden_size * 2 * 3 * LENGTH
    assert ours[1:] == others[1:]


@pytest.mark.parametrize("changes, message", [({"scale": 0.0}, "scale is 0.0"), ({"block_size": 0}, "block_size is 0")])
def test_values_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        SSDLM(**{"block_size": 4, "scale": 5.0} | changes)
