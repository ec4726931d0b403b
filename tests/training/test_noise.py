"""Noise chosen from the data in training: what steps learn, what searches choose, and that runs go on exactly."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grids import some
from toy_runs import AR, END, LENGTH, MASK, network, quick_jit, run_python, toy_config, toy_dict, write_text

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.models import forward
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring.score import SpecialIds, row_losses, score
from bd3lm_jax.training import program
from bd3lm_jax.training.noise import NoiseSelector, block_losses
from bd3lm_jax.training.step import draw_noise, make_step
from bd3lm_jax.training.train import train

SPECIAL = SpecialIds(MASK, END)
BATCH, BLOCKS = 4, LENGTH // 4
COUNTS = {"noise.adaptive_noise": "counts", "noise.count_decay": 0.5}
CLIP = {"noise.adaptive_noise": "clip", "diffusion.corruption": "bernoulli", "noise.clip_widths": (0.5, 0.8),
        "noise.clip_stride": 0.25}


def make_batch(seed=0):
    """Rows of text-like ids; the last row ends in padding."""
    tokens = np.random.default_rng(seed).integers(97, 105, size=(BATCH, LENGTH)).astype(np.int32)
    position, segment = (np.array(x) for x in forward.single_document_rows(tokens))
    tokens[-1, -6:], position[-1, -6:], segment[-1, -6:] = END, 0, 0
    return {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(position), "segments": jnp.asarray(segment)}


def token_losses(model, params, objective, noised, batch):
    """Cross-entropy of every position `[B, M, L]`, none of them gathered; 0 where nothing is masked."""
    whole = noised.replace(capacity=LENGTH)
    scored = score(model, params, objective, whole, batch, DEFAULT_EXECUTION)
    return jnp.where(noised.weight_BxMxL > 0, row_losses(model, params, scored, MASK, 0), 0)


@pytest.mark.ci_slow
@pytest.mark.parametrize("microbatch", some([0, 2], 0))
def test_steps_learn_the_squared_mean_losses_of_their_own_noise(microbatch):
    config = toy_config(Path("unused"),
                        {**COUNTS, "train.batch_size": BATCH, "train.noise_samples": 2, "optim.ema_decay": 0.0,
                                         "compute.microbatch": microbatch})
    model, params = network(config)
    tx, traces = optax.sgd(0.1), []
    step = make_step(config, model, tx, SPECIAL)
    run = quick_jit(lambda state, batch: traces.append(1) or step(state, batch))
    state = TrainState(jnp.int32(0), params, {}, tx.init(params), config.adaptive_noise.init_state())

    def expected(state, batch):
        key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))[0]
        noised = draw_noise(config, SPECIAL, key, batch, 2, state.noise, {})
        return token_losses(model, state.params, config.diffusion, noised, batch), noised.weight_BxMxL

    squares, blocks = np.zeros(4), np.zeros(4)
    look = quick_jit(expected)
    for seed in range(3):
        losses, weight = (np.asarray(x, np.float64) for x in look(state, make_batch(seed)))
        masked = (weight > 0).reshape(-1, 4).sum(-1)
        mean = losses.reshape(-1, 4).sum(-1) / np.maximum(masked, 1)
        squares = 0.5 * squares + [np.sum(mean[masked == k]**2) for k in (1, 2, 3, 4)]
        blocks = 0.5 * blocks + [np.sum(masked == k) for k in (1, 2, 3, 4)]
        state, metrics = run(state, make_batch(seed))
        tokens = np.sum(np.asarray(make_batch(seed)["segments"]) != 0)
        assert float(metrics["loss"]) == pytest.approx(np.sum(losses * weight) / (2 * tokens), rel=1e-5)
        np.testing.assert_allclose(state.noise["squares_S"], squares, rtol=1e-5)
        np.testing.assert_array_equal(state.noise["blocks_S"], blocks)
        assert not metrics["overflow"]
    assert len(traces) == 1

    broken = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    after, metrics = run(broken, make_batch())
    assert not metrics["finite"]
    np.testing.assert_array_equal(after.noise["squares_S"], state.noise["squares_S"])


def test_block_losses():
    config = toy_config(Path("unused"), {"diffusion.block_size": 4})
    model, params = network(config)
    batch, objective = make_batch(), config.diffusion

    def both(params, batch):
        noised = objective.corrupt(jax.random.key(1), batch["tokens"], batch["segments"], 2, MASK, END)
        losses, real = block_losses(model, params, objective, SPECIAL, noised, batch, DEFAULT_EXECUTION)
        return noised.weight_BxMxL * token_losses(model, params, objective, noised, batch), losses, real

    tokens, losses, real = quick_jit(both)(params, batch)
    n = np.asarray(batch["segments"] != 0).reshape(BATCH, 1, BLOCKS, 4).sum(-1)
    sums = np.asarray(tokens).reshape(BATCH, 2, BLOCKS, 4).sum(-1)
    np.testing.assert_allclose(losses, sums / np.maximum(n, 1), rtol=1e-5)
    np.testing.assert_array_equal(real, np.broadcast_to(n > 0, sums.shape))
    assert not np.all(real) and not np.any(np.asarray(losses)[~np.asarray(real)])


def chooser_and_state():
    config = toy_config(Path("unused"), {**CLIP, "noise.clip_batches": 2, "eval.every": 5, "train.batch_size": BATCH})
    model, params = network(config)
    state = TrainState(jnp.int32(0), params, {}, (), config.adaptive_noise.init_state())
    return NoiseSelector(config, model, SPECIAL, sharding.make_mesh(config.mesh)), state


def test_a_search_sums_over_batches_and_chooses_the_least_relative_variance():
    chooser, state = chooser_and_state()
    candidates = chooser.adaptive_noise.candidates.tolist()
    seen, keys = [], []

    def moments(params, key, noise, batch):
        """Losses 1 and 3 times a scale of the interval, but for the second batch of one of them: 2 and 2."""
        interval = [float(noise["low"]), float(noise["high"])]
        seen.append((interval, batch))
        keys.append(int(jax.random.bits(key)))
        scale = 1 + interval[0]
        calm = batch == 6 and np.allclose(interval, candidates[3])
        return np.array([2, 4 * scale, (8 if calm else 10) * scale**2])

    chooser._moments = moments
    found, shown = chooser(state, lambda step: step, 5)
    assert shown == {"clip": candidates[3]}
    assert [float(found.noise[end]) for end in ("low", "high")] == pytest.approx(candidates[3])
    assert {batch for _, batch in seen} == {5, 6} and len(seen) == 2 * (1 + len(candidates))
    assert len(set(keys)) == 2  # every interval sees the same draws
    same, shown = chooser(found, lambda step: step, 7)  # the last step of a run, but no time of validation
    assert same is found and shown == {"clip": candidates[3]} and len(seen) == 2 * (1 + len(candidates))


@pytest.mark.ci_slow
def test_moments_are_those_of_the_block_losses_of_training():
    chooser, state = chooser_and_state()
    noise = chooser.adaptive_noise.state_for_interval(np.array([0.25, 0.75]))
    batch, key = make_batch(), jax.random.key(4)
    config, model = chooser.config, network(chooser.config)[0]

    def losses(params, batch):
        noised = draw_noise(config, SPECIAL, key, batch, 1, noise, {})
        return block_losses(model, params, config.diffusion, SPECIAL, noised, batch, DEFAULT_EXECUTION)

    values, real = (np.asarray(x) for x in quick_jit(losses)(state.params, batch))
    found = chooser._moments(state.params, key, noise, batch)
    np.testing.assert_allclose(found, [real.sum(), values.sum(), (values**2).sum()], rtol=1e-5)


# ---- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("noise")
    write_text(directory / "text.txt", 80)
    return directory


def noise_lines(workdir):
    return [{key: value for key, value in line.items() if key.startswith(("noise/", "train/loss", "step"))}
            for line in read_metrics(workdir)]


@pytest.mark.parametrize("name", ["counts", pytest.param("clip", marks=pytest.mark.ci_slow)])
def test_runs_go_on_bit_for_bit_with_the_noise_they_had(name, home, tmp_path, monkeypatch):
    """One program a run; its noise is in metrics, checkpoints and a plot; a run stopped at step 3 goes on alike."""
    traces, original = [], program.make_step

    def counting(*arguments):
        step = original(*arguments)
        return lambda state, batch: traces.append(1) or step(state, batch)

    monkeypatch.setattr(program, "make_step", counting)
    changes = {**(COUNTS if name == "counts" else CLIP), "eval.every": 2, "checkpoint.every": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(toy_config(home, changes), str(whole))
    assert len(traces) == 1
    key = "noise/count_probs" if name == "counts" else "noise/clip"
    chosen = {line["step"]: line[key] for line in noise_lines(whole) if key in line}
    assert list(chosen) == [2, 4, 6] and (whole / "plots" / "noise.png").exists()
    assert all(np.isclose(sum(law), 1) for law in chosen.values()) or name == "clip"
    with Checkpoints(whole, 1, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6]
        assert checkpoints._record(6)["meta"]["noise"] == {key.removeprefix("noise/"): chosen[6]}

    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "6")
    train(toy_config(home, changes), str(parts))
    assert noise_lines(parts) == noise_lines(whole)
    with Checkpoints(whole, 1, read_only=True) as there, Checkpoints(parts, 1, read_only=True) as here:
        left, right = (checkpoints._record(6)["leaves"] for checkpoints in (there, here))
    assert left == right and left["noise"]


@pytest.mark.parametrize("changes, words", [
    ({"noise.adaptive_noise": "clips"}, "noise.adaptive_noise is 'clips'"),
    ({"noise.adaptive_noise": "clip"},
     "noise.adaptive_noise='clip' needs diffusion.corruption='bernoulli', not 'exact_count'"),
    ({**COUNTS, "diffusion.corruption": "bernoulli"}, "needs diffusion.corruption='exact_count', not 'bernoulli'"),
    ({**COUNTS, "diffusion.count_probs": (1.0, 1.0, 1.0, 2.0)}, "diffusion.count_probs has no effect"),
    ({**COUNTS, "diffusion": AR, "model.adaln": False}, "which diffusion.kind='ar' does not have"),
    ({"noise.clip_widths": ()}, "noise.clip_widths is ()"),
    ({"noise.clip_widths": (0.5, 1.5)}, "noise.clip_widths is (0.5, 1.5)"),
    ({"noise.clip_stride": 0.0}, "noise.clip_stride is 0.0"),
    ({"noise.clip_batches": 0}, "noise.clip_batches is 0"),
    ({"noise.count_floor": 0.0}, "noise.count_floor is 0.0"),
    ({"noise.count_decay": 1.0}, "noise.count_decay is 1.0"),
])
def test_bad_settings(changes, words):
    with pytest.raises(UserError) as error:
        toy_config(Path("unused"), changes)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.ci_slow
@pytest.mark.parametrize("changes", [{**COUNTS, "compute.microbatch": 8}, CLIP], ids=["counts", "clip"])
def test_devices_choose_the_same_noise(changes, home, tmp_path):
    """One device, and eight in a mesh that shards weights too."""
    code = """
        import json, sys
        from bd3lm_jax.config import Config
        from bd3lm_jax.training.train import train
        train(Config.from_dict(json.loads(sys.argv[1])), sys.argv[2])
    """
    found = {}
    for devices, mesh in ((1, {}), (8, {"mesh.data": 4, "mesh.fsdp": 2})):
        config = toy_dict(home, {**changes, "eval.every": 2, "train.steps": 4, "train.batch_size": 16, **mesh})
        done = run_python(code, json.dumps(config), tmp_path / str(devices), devices=devices)
        assert done.returncode == 0, done.stderr
        found[devices] = noise_lines(tmp_path / str(devices))
    for one, eight in zip(found[1], found[8], strict=True):
        assert one.keys() == eight.keys()
        for key in one:
            np.testing.assert_allclose(eight[key], one[key], rtol=1e-5, atol=2e-6)
    assert len(found[1]) == 4 and any(key.startswith("noise") for key in found[1][3])
