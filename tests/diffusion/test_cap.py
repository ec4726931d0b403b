"""The confidence-aware loss against NumPy: its value in the training step, and its gradient by finite differences."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_runs import END, LENGTH, MASK, network, quick_jit, toy_config

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion.cap import Cap
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.models import forward, trunk
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.scoring.score import LossInputs, SpecialIds, total_loss
from bd3lm_jax.training.step import make_step

SECTION = {"kind": "cap", "block_size": 8, "coefficient": 0.7}
BATCH, PADDING = 4, 10


def make_config(**changes):
    changes = {"diffusion": SECTION, "train.noise_samples": 2, "train.batch_size": BATCH} | changes
    return toy_config(Path("unused"), changes)


def objective(**changes):
    return Cap(**{key: value for key, value in (SECTION | changes).items() if key != "kind"})


@functools.cache
def batch():
    """Rows of six letters, the last of which ends early."""
    tokens = np.random.default_rng(0).integers(97, 103, size=(BATCH, LENGTH)).astype(np.int32)
    position, segment = (np.array(x) for x in forward.single_document_rows(tokens))
    tokens[-1, -PADDING:], position[-1, -PADDING:], segment[-1, -PADDING:] = END, 0, 0
    return {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(position), "segments": jnp.asarray(segment)}


@functools.cache
def model_of_letters():
    """Its last layer prefers the six letters, so that a part of its predictions is right."""
    model, params = network(make_config())
    bias = params["head"]["linear"]["bias"].at[97:103].add(4.0).at[MASK].add(9.0)
    params["head"]["linear"] = {**params["head"]["linear"], "bias": bias}
    return model, params


def by_hand(logits_BxMxLxV, noised, tokens_BxL, segment_BxL, coefficient):
    """The objective of a batch in nats a token, copy by copy; and how many predictions are right."""
    weight_BxMxL = np.asarray(noised.weight_BxMxL, np.float64)
    total, right = 0.0, 0
    for b, m in np.ndindex(weight_BxMxL.shape[:2]):
        entropies = []
        for i in np.flatnonzero(weight_BxMxL[b, m]):
            logits = np.asarray(logits_BxMxLxV[b, m, i], np.float64)
            p = np.exp(logits - logits.max())
            p[MASK] = 0
            p /= p.sum()
            total -= weight_BxMxL[b, m, i] * np.log(p[tokens_BxL[b, i]])
            if p.argmax() == tokens_BxL[b, i]:
                entropies.append(-sum(x * np.log(x) for x in p if x > 0))
        if entropies:
            total += coefficient * np.mean(entropies) * np.sum(segment_BxL[b] != 0)
            right += len(entropies)
    return total / (weight_BxMxL.shape[1] * np.sum(np.asarray(segment_BxL) != 0)), right


@functools.cache
def drawn_and_logits():
    """The noise of step 0 and all logits."""
    config, (model, params), rows = make_config(), model_of_letters(), batch()
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))[0]

    def run(params):
        noised = config.diffusion.corrupt(key, rows["tokens"], rows["segments"], 2, MASK, END)
        h = forward.two_stream(model, params, noised.xt_BxMxL, rows["tokens"], rows["positions"], rows["segments"],
                               block_size=8, execution=DEFAULT_EXECUTION)
        return noised, trunk.logits(model, params, h), trunk.features(model, params, h)

    return quick_jit(run)(params)


@pytest.mark.ci_slow
@pytest.mark.parametrize("microbatch", [2, pytest.param(0, marks=pytest.mark.ci_slow)])
def test_the_step_computes_the_formula(microbatch):
    config, (model, params), rows = make_config(**{"compute.microbatch": microbatch}), model_of_letters(), batch()
    tx = optax.sgd(0.0)
    step = quick_jit(make_step(config, model, tx, SpecialIds(MASK, END)))
    _, metrics = step(TrainState(jnp.int32(0), params, {}, tx.init(params)), rows)
    noised, logits, _ = drawn_and_logits()
    expected, right = by_hand(logits, noised, np.asarray(rows["tokens"]), np.asarray(rows["segments"]), 0.7)
    plain, _ = by_hand(logits, noised, np.asarray(rows["tokens"]), np.asarray(rows["segments"]), 0.0)
    assert 5 < right < 0.9 * np.sum(np.asarray(noised.weight_BxMxL) > 0) and expected > 1.02 * plain
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_gradient_by_finite_differences():
    """In the bias of the output layer; that of a letter moves the entropies and not what is right."""
    it, rows = objective(), batch()
    (model, params), (noised, logits, features) = model_of_letters(), drawn_and_logits()
    target = jnp.broadcast_to(rows["tokens"][:, None], noised.xt_BxMxL.shape)
    scored = LossInputs(features, target, noised.weight_BxMxL, None, noised.xt_BxMxL, jnp.zeros(target.shape),
                        (rows["segments"] != 0).sum(1))

    def loss(bias):
        changed = {**params, "head": {**params["head"], "linear": {**params["head"]["linear"], "bias": bias}}}
        return total_loss(model, changed, scored, MASK, 0, it.loss())

    gradient = quick_jit(jax.grad(loss))(params["head"]["linear"]["bias"])
    arrays = noised, np.asarray(rows["tokens"]), np.asarray(rows["segments"]), 0.7
    count = 2 * np.sum(arrays[2] != 0)
    for letter in (98, 101, MASK, 5):
        moved = [np.asarray(logits, np.float64) + sign * 1e-5 * (np.arange(logits.shape[-1]) == letter)
                 for sign in (1, -1)]
        (up, right_up), (down, right_down) = (by_hand(x, *arrays) for x in moved)
        assert right_up == right_down
        assert gradient[letter] == pytest.approx(count * (up - down) / 2e-5, rel=1e-3, abs=1e-3)


def test_entropy_of_known_laws():
    """Uniform over n tokens: log n; only right ones count."""
    logits = np.full((3, 8), -1e9, np.float32)
    logits[0, :4], logits[1, 2], logits[2, [1, 7]] = 0, 0, 0  # token 7 is the mask, which cannot be predicted
    term, right = objective(coefficient=2.0).mean_term(jnp.asarray(logits), jnp.asarray([0, 2, 4]), None, None, 7)
    np.testing.assert_allclose(term, [2 * np.log(4), 0, 0], atol=1e-6)
    np.testing.assert_array_equal(right, [True, True, False])


def test_it_is_never_an_nll_and_is_evaluated_by_the_plain_bound():
    assert not objective().is_bound and not objective(coefficient=0.0).is_bound
    config = make_config()
    assert estimators.default_estimator(config) == "exact_count"
    assert estimators.make("exact_count", config).token_loss is None
    with pytest.raises(UserError, match="no bound"):
        estimators.make("native", config)


def test_a_negative_coefficient_is_refused():
    with pytest.raises(UserError, match="coefficient is -0.1"):
        objective(coefficient=-0.1)
