import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grids import some
from toy_runs import AR, END, LENGTH, MASK, network, quick_jit, run_python, toy_config

from bd3lm_jax import models
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import forward
from bd3lm_jax.models.forward import DEFAULT_EXECUTION, Execution
from bd3lm_jax.scoring.score import SpecialIds, loss_positions, row_losses, score, total_loss
from bd3lm_jax.training.step import make_step

SPECIAL = SpecialIds(MASK, END)
BATCH = 4
TX = optax.adam(1e-2)
OBJECTIVES = {
    "exact_count": {},
    "bernoulli": {"diffusion.corruption": "bernoulli"},
    "clipped": {"diffusion.corruption": "bernoulli", "diffusion.clip_low": 0.45, "diffusion.clip_high": 0.95},
    "mdlm": {"diffusion.block_size": LENGTH},
    "time_conditioned": {"model.time_conditioning": True},
    "copies": {"train.noise_samples": 3},
    "complement": {"train.noise_samples": 2, "diffusion.complement": True, "compute.loss_chunk": 7},
    "ar": {"diffusion": AR, "model.adaln": False},
}


def make_batch(seed=0, padding=0):
    """Rows of text-like ids; the last `padding` tokens of the last row are not there."""
    tokens = np.random.default_rng(seed).integers(97, 105, size=(BATCH, LENGTH)).astype(np.int32)
    position, segment = (np.array(x) for x in forward.single_document_rows(tokens))
    if padding:
        tokens[-1, -padding:], position[-1, -padding:], segment[-1, -padding:] = END, 0, 0
    return {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(position), "segments": jnp.asarray(segment)}


class Setting:
    """A step in use: its config, network, first state (weights and average differ), and how often it was traced."""

    def __init__(self, changes, tx):
        self.config = toy_config(Path("unused"), {"optim.ema_decay": 0.99, **changes})
        self.model, params = network(self.config)
        average = jax.tree.map(lambda p: p + 1.0, params) if self.config.optim.ema_decay else {}
        self.state = TrainState(jnp.int32(0), params, average, tx.init(params))
        self.traces = 0
        step = make_step(self.config, self.model, tx, SPECIAL)

        def counted(state, batch):
            self.traces += 1
            return step(state, batch)

        self.step = quick_jit(counted)


@functools.cache
def setting(name):
    return Setting(OBJECTIVES[name], TX)


def noise_of_step(config, step, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return quick_jit(functools.partial(config.diffusion.corrupt, noise_samples=config.train.noise_samples, mask_id=MASK,
                                       end_id=END))(
        jax.random.split(key)[0], batch["tokens"], batch["segments"])


def losses_of(config, model, params, noised, batch, execution):
    """`row_losses` and where they stand, in one program."""
    def run(params, noised, batch):
        scored = score(model, params, config.diffusion, noised, batch, execution)
        return row_losses(model, params, scored, MASK, chunk=5), scored.index_BxMxC
    return quick_jit(run)(params, noised, batch)


def direct_loss(config, model, params, noised, batch):
    """The objective written out: all logits, probabilities without the mask token, weights token by token."""
    dense = Execution("dense", "unroll", "none", False)
    if config.diffusion.causal:
        h = forward.one_stream(model, params, noised.xt_BxMxL[:, 0], batch["positions"], batch["segments"],
                               rule="causal", block_size=1, execution=dense)
        logits = model.head.apply({"params": params["head"]}, h, None)[:, None]
    else:
        sigma = noised.sigma_BxMxK if config.model.time_conditioning else jnp.zeros((1, 1, 1))
        h = forward.two_stream(model, params, noised.xt_BxMxL, batch["tokens"], batch["positions"], batch["segments"],
                               block_size=config.block_size, execution=dense,
                               sigma_BxMxn=sigma if config.model.time_conditioning else None)
        cond = model.condition.apply({"params": params["condition"]}, sigma)
        logits = model.head.apply({"params": params["head"]}, h, cond)
    odds = jnp.exp(logits - logits.max(-1, keepdims=True)).at[..., MASK].set(0)
    chosen = jnp.take_along_axis(odds, batch["tokens"][:, None, :, None], axis=-1)[..., 0]
    losses = jnp.sum(noised.weight_BxMxL * -jnp.log(chosen / odds.sum(-1))) / config.train.noise_samples
    return losses / jnp.sum(batch["segments"] != 0)


SLOW_NAMES = [pytest.param(name, marks=pytest.mark.ci_slow)
              for name in ("bernoulli", "mdlm", "time_conditioned", "copies")]


@pytest.mark.parametrize("name", ["exact_count", "clipped", "complement", "ar", *SLOW_NAMES])
def test_loss_is_the_formula_and_goes_down(name):
    """Alternating letters: a network that looks at its neighbours pays almost nothing."""
    it, batch = setting(name), make_batch(padding=6)
    noised = noise_of_step(it.config, 5, batch)
    loss = quick_jit(lambda p: direct_loss(it.config, it.model, p, noised, batch))(it.state.params)
    new, metrics = it.step(it.state.replace(step=jnp.int32(5)), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    masked = np.asarray(noised.weight_BxMxL > 0).sum() / np.asarray(batch["segments"] != 0).sum()
    np.testing.assert_allclose(metrics["masked"], masked / it.config.train.noise_samples, rtol=1e-6)
    assert not metrics["overflow"]
    assert int(new.step) == 6 and bool(metrics["finite"])

    easy = {**make_batch(), "tokens": jnp.tile(jnp.asarray([97, 98], jnp.int32), (BATCH, LENGTH // 2))}
    losses, state = [], it.state
    for _ in range(60):
        state, metrics = it.step(state, easy)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:2])


@pytest.mark.parametrize("name", ["exact_count", "complement", pytest.param("ar", marks=pytest.mark.ci_slow)])
def test_update_follows_the_gradient_of_the_formula(name):
    it, batch = setting(name), make_batch(padding=6)
    noised, params = noise_of_step(it.config, 0, batch), it.state.params
    grads = quick_jit(jax.grad(lambda p: direct_loss(it.config, it.model, p, noised, batch)))(params)
    new, metrics = it.step(it.state, batch)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    momentum = new.opt_state[0].mu  # a tenth of the gradient
    for found, gradient in zip(*map(jax.tree.leaves, (momentum, grads))):
        np.testing.assert_allclose(10 * found, gradient, atol=2e-6 * norm)
    updates, _ = TX.update(jax.tree.map(lambda m: 10 * m, momentum), TX.init(params), params)
    for after, before, update in zip(*map(jax.tree.leaves, (new.params, params, updates))):
        np.testing.assert_allclose(after, before + update, atol=1e-5)


@pytest.mark.parametrize("name", ["exact_count", pytest.param("time_conditioned", marks=pytest.mark.ci_slow)])
def test_only_masked_positions_reach_the_head_and_nothing_is_lost(name):
    it, batch = setting(name), make_batch(padding=6)
    noised = noise_of_step(it.config, 0, batch)
    assert noised.capacity < LENGTH

    def by_token(noised):
        losses, index = losses_of(it.config, it.model, it.state.params, noised, batch, DEFAULT_EXECUTION)
        assert losses.shape == (BATCH, 1, noised.capacity)
        full = np.zeros((BATCH, 1, LENGTH), np.float32)
        np.put_along_axis(full, np.asarray(index), np.asarray(losses), axis=2)
        return np.where(noised.weight_BxMxL > 0, full, 0)

    np.testing.assert_allclose(by_token(noised), by_token(noised.replace(capacity=LENGTH)), atol=1e-5)


def test_more_masked_tokens_than_the_capacity_are_never_counted_wrongly():
    it, batch = setting("exact_count"), make_batch()
    noised = noise_of_step(it.config, 0, batch)
    fullest = int(np.argmax((np.asarray(noised.weight_BxMxL) > 0).sum((1, 2))))
    tight = int((np.asarray(noised.weight_BxMxL)[fullest] > 0).sum()) - 1

    def total(capacity):
        def run(params):
            scored = score(it.model, params, it.config.diffusion, noised.replace(capacity=capacity), batch,
                           DEFAULT_EXECUTION)
            return total_loss(it.model, params, scored, MASK, 0)
        return float(quick_jit(run)(it.state.params))

    assert np.isfinite(total(tight + 1)) and np.isnan(total(tight))


@pytest.mark.ci_slow
def test_the_gather_of_masked_positions_stays_on_its_device():
    """Eight devices, rows split over them, weights on each: up to the loss nothing is exchanged."""
    done = run_python("""
        import re
        import jax, jax.numpy as jnp
        from pathlib import Path
        from toy_runs import END, LENGTH, MASK, network, toy_config
        from bd3lm_jax.models.forward import DEFAULT_EXECUTION
        from bd3lm_jax.parallel import sharding
        from bd3lm_jax.scoring.score import row_losses, score

        config = toy_config(Path("unused"))
        model, params = network(config)
        mesh = sharding.make_mesh(config.mesh)
        rows = jax.device_put(jnp.zeros((16, LENGTH), jnp.int32), sharding.batch_sharding(mesh))

        def losses(params, noised, tokens):
            inputs = {"tokens": tokens, "positions": tokens, "segments": tokens + 1}
            scored = score(model, params, config.diffusion, noised, inputs, DEFAULT_EXECUTION)
            return row_losses(model, params, scored, MASK, 4) * scored.weight_BxMxC

        with jax.set_mesh(mesh):
            noised = config.diffusion.corrupt(jax.random.key(0), rows, rows + 1, 1, MASK, END)
            noised = jax.device_put(noised, sharding.batch_sharding(mesh))
            assert noised.capacity < LENGTH
            text = jax.jit(losses).lower(params, noised, rows).compile().as_text()
        print(len(re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)", text)))
    """, devices=8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0"


def test_counted_positions_come_first_and_in_order():
    counted = jnp.asarray([[[False, True, False, True, True]], [[False] * 5]])
    np.testing.assert_array_equal(loss_positions(counted, 4), [[[1, 3, 4, 0]], [[0, 1, 2, 3]]])


@pytest.mark.ci_slow
def test_microbatches_change_nothing():
    """Not even dropout; and an average that is off stays off."""
    batch, results = make_batch(padding=6), {}
    changes = {"model.dropout": 0.2, "train.batch_size": BATCH, "optim.ema_decay": 0.0}
    for rows in (0, 1, 2):
        it = Setting({**changes, "compute.microbatch": rows}, optax.sgd(0.1))
        results[rows] = it.step(it.state, batch)
    whole, metrics = results[0]
    assert whole.ema == {}
    for new, other in (results[1], results[2]):
        for name in metrics:
            np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5, err_msg=name)
        for left, right in zip(*map(jax.tree.leaves, (new, whole))):
            np.testing.assert_allclose(left, right, atol=2e-6)
    noised = noise_of_step(it.config, 0, batch)
    without = quick_jit(lambda p: direct_loss(it.config, it.model, p, noised, batch))(it.state.params)
    assert abs(float(metrics["loss"] - without)) > 1e-3  # dropout was on


@pytest.mark.ci_slow
def test_bfloat16_follows_float32():
    """Products in bfloat16; loss, gradient and state stay float32."""
    batch, results = make_batch(), {}
    for dtype in ("float32", "bfloat16"):
        it = setting("exact_count")
        model = models.build(it.model.config, jnp.dtype(dtype))
        state = TrainState(jnp.int32(0), it.state.params, {}, optax.sgd(1.0).init(it.state.params))
        config = dataclasses.replace(it.config, optim=dataclasses.replace(it.config.optim, ema_decay=0.0))
        new, metrics = quick_jit(make_step(config, model, optax.sgd(1.0), SPECIAL))(state, batch)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((new.params, metrics["loss"])))
        change = jax.tree.map(lambda new, old: np.ravel(new - old), new.params, state.params)
        results[dtype] = float(metrics["loss"]), np.concatenate(jax.tree.leaves(change))
    (loss, gradient), (rough_loss, rough) = results.values()
    assert loss != rough_loss == pytest.approx(loss, rel=0.02)
    assert np.dot(gradient, rough) > 0.99 * np.linalg.norm(gradient) * np.linalg.norm(rough)


def test_noise_changes_with_the_step_and_nothing_is_traced_again():
    it, losses = setting("exact_count"), []
    for step in range(3):
        _, metrics = it.step(it.state.replace(step=jnp.int32(step)), make_batch())
        losses.append(float(metrics["loss"]))
    it.step(it.state, make_batch(seed=1))
    assert it.traces == 1 and len(set(losses)) == 3


def test_a_step_that_is_not_finite_changes_only_the_count():
    it = setting("exact_count")
    state, metrics = it.step(it.state, make_batch())
    assert bool(metrics["finite"])
    head = state.params["head"]
    for bad in (jnp.nan, jnp.inf):
        linear = {**head["linear"], "bias": head["linear"]["bias"].at[3].set(bad)}
        broken = state.replace(params={**state.params, "head": {**head, "linear": linear}})
        new, metrics = it.step(broken, make_batch(seed=1))
        assert not bool(metrics["finite"]) and int(new.step) == 2
        for left, right in zip(jax.tree.leaves(new.replace(step=0)), jax.tree.leaves(broken.replace(step=0))):
            np.testing.assert_array_equal(left, right)


def test_average_is_warmed_up():
    it = setting("exact_count")
    for step, decay in ((0, 2 / 11), (2, 4 / 13), (8, 10 / 19), (10_000, 0.99)):
        new, _ = it.step(it.state.replace(step=jnp.int32(step)), make_batch())
        for average, old, params in zip(*map(jax.tree.leaves, (new.ema, it.state.ema, new.params))):
            np.testing.assert_allclose(average, decay * old + (1 - decay) * params, atol=1e-5)


@pytest.mark.ci_slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", some(["dense", "blocked"], 1))
def test_plain_padded_and_packed_rows_have_the_same_losses(causal, backend):
    """Two documents of 8 and 12 tokens with the same masks: alone, with padding behind, in one row of 24."""
    config = toy_config(Path("unused"), OBJECTIVES["ar"] if causal else {})
    model, params = network(config)
    draw = np.random.default_rng(3)
    documents = [draw.integers(97, 105, size=n).astype(np.int32) for n in (8, 12)]
    masks = [draw.uniform(size=n) < 0.5 for n in (8, 12)]

    def losses(pieces, length):
        tokens, mask = np.full(length, END, np.int32), np.zeros(length, bool)
        segment, position, first = np.zeros(length, np.int32), np.zeros(length, np.int32), 0
        for name, piece in enumerate(pieces, start=1):
            own = slice(first, first + len(documents[piece]))
            tokens[own], mask[own], segment[own] = documents[piece], masks[piece], name
            position[own] = np.arange(len(documents[piece]))
            first = own.stop
        if causal:
            noised = config.diffusion.corrupt(jax.random.key(0), tokens[None], jnp.asarray(segment[None]), 1, -1, END)
        else:
            noised = Noised(xt_BxMxL=jnp.where(mask, MASK, tokens)[None, None], sigma_BxMxK=jnp.zeros((1, 1, 1)),
                            weight_BxMxL=jnp.asarray(mask, jnp.float32)[None, None], capacity=int(mask.sum()))
        batch = {"tokens": tokens[None], "positions": position[None], "segments": segment[None]}
        found, index = losses_of(config, model, params, noised, batch, Execution(backend, "scan", "none", False))
        full = np.zeros(length)
        full[np.asarray(index)[0, 0]] = np.asarray(found * jnp.take_along_axis(noised.weight_BxMxL, index, 2))[0, 0]
        assert np.all(full[first:] == 0) and np.count_nonzero(full) == (first if causal else mask.sum())
        return full[:first]

    plain = [losses([0], 8), losses([1], 12)]
    np.testing.assert_allclose(losses([0], 16), plain[0], atol=1e-5)
    np.testing.assert_allclose(losses([0, 1], 24), np.concatenate(plain), atol=1e-5)
    np.testing.assert_allclose(losses([1, 0], 20), np.concatenate(plain[::-1]), atol=1e-5)
