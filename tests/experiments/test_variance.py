"""The variance study: weights by count against draws of the objectives, a toy run against an independent loop."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from grids import some
from toy_lm import make_lm
from toy_runs import LENGTH, quick_jit, toy_config, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.diffusion import AR
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.schedule import get_schedule
from bd3lm_jax.experiments import variance
from bd3lm_jax.experiments.bench import bench
from bd3lm_jax.experiments.bench import variance as bench_variance
from bd3lm_jax.lm import load
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.scoring.score import row_losses, score
from bd3lm_jax.training.train import train

BATCH, DRAWS = 8, 6
UNIFORM = Masked.uniform_counts(4)
OBJECTIVES = {name: variance.bernoulli_objective(name, 4) for name in variance.BERNOULLI}
COUNTS = {"uniform": UNIFORM, "shaped": dataclasses.replace(UNIFORM, count_probs=(1.0, 5.0, 2.0, 8.0))}


@pytest.mark.ci_slow
@pytest.mark.parametrize("name, size", some([*((name, 4) for name in [*OBJECTIVES, *COUNTS]), ("linear", 16),
                                        ("U[.3, .8]", 16)], 0, 3))
def test_weight_moments_are_those_of_draws(name, size):
    """Levels from 0.05 on, where drawn weights have a variance that a sample can show."""
    objective = dataclasses.replace((OBJECTIVES | COUNTS)[name], block_size=size, eps=0.05)
    rows = np.zeros((512, 128), np.int32)
    noised = jax.jit(objective.corrupt, static_argnums=(3, 4, 5))(jax.random.key(0), rows, rows + 1, 1, 9, 0)
    weight = np.asarray(noised.weight_BxMxL, np.float64).reshape(-1, size)
    k, weight = (weight > 0).sum(-1), weight.max(-1)
    for power, found_S in enumerate(variance.weight_moments(objective), start=1):
        for count in range(1, size + 1):
            drawn = np.where(k == count, weight**power, 0)
            error = drawn.std() / len(drawn)**0.5
            assert abs(found_S[count - 1] - drawn.mean()) <= 4.5 * error + 2e-3 * drawn.mean()


@pytest.mark.parametrize("name", ["linear", "logarithmic", "square root", "square", "cosine"])
def test_every_unclipped_schedule_is_the_same_bound(name):
    """a_k is 1 / k but for levels below eps, and the second moment of the linear schedule is known in closed form."""
    first_S, second_S = variance.weight_moments(dataclasses.replace(OBJECTIVES[name], eps=1e-6))
    np.testing.assert_allclose(first_S, 1 / np.arange(1, 5), rtol=1e-3)
    if name == "linear":
        # b_1 = 4 integral (1 - t)^3 / t from eps, b_2 = 6 integral (1 - t)^2, b_3 = 4 integral t (1 - t), b_4 = 1/3
        np.testing.assert_allclose(second_S, [4 * (np.log(1e6) - 11 / 6), 2, 2 / 3, 1 / 3], rtol=1e-3)


@pytest.mark.parametrize("name", ["linear", "logarithmic", "square root", "square", "cosine"])
def test_times_start_where_published(name):
    """Times are drawn from 1e-3 on, whatever probability of a mask that is."""
    objective = OBJECTIVES[name]
    rows = np.zeros((2048, 128), np.int32)
    noised = jax.jit(objective.corrupt, static_argnums=(3, 4, 5))(jax.random.key(0), rows, rows + 1, 1, 9, 0)
    times = get_schedule(objective.schedule).inverse(-np.expm1(-np.asarray(noised.sigma_BxMxK, np.float64)))
    assert 1e-3 < np.min(times) < 1.1e-3


def test_jackknife_of_a_mean_is_the_interval_of_a_mean():
    draws = 100 + np.random.default_rng(0).normal(size=30)
    without = (draws.sum() - draws) / 29
    low, high = variance.jackknife(draws.mean(), without)
    half = 2.045 * draws.std(ddof=1) / np.sqrt(30)  # t(0.975, 29)
    np.testing.assert_allclose([low, high], [draws.mean() - half, draws.mean() + half], atol=2e-3 * half)


# A run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("variance")
    write_text(directory / "text.txt", 80)
    train(toy_config(directory, {"train.steps": 20, "eval.every": 20}), str(directory / "run"))
    return directory / "run"


@pytest.fixture(scope="module")
def rows(workdir):
    found = variance.study(str(workdir), split="train", batch=BATCH, draws=DRAWS, seed=0)
    return {row["schedule"]: row for row in found}


def block_losses(lm, objective):
    """Losses a block in nats a token, drawn as in training."""
    loader, found = Loader(prepare(lm.config.data, "train", 4, lm.tokenizer), BATCH, 0, None), []

    @quick_jit
    def losses(params, noised, batch):
        scored = score(lm.model, params, lm.config.diffusion, noised, batch, DEFAULT_EXECUTION)
        return row_losses(lm.model, params, scored, lm.special.mask, 0)

    for step in range(DRAWS):
        batch = loader.get(step)[1]
        key = jax.random.fold_in(jax.random.key(0), step)
        noised = objective.corrupt(key, batch["tokens"], batch["segments"], 1, lm.special.mask, -1)
        values = losses(lm.params, noised.replace(capacity=LENGTH), batch)
        weighted = np.asarray(values) * np.asarray(noised.weight_BxMxL)
        found.append(weighted.reshape(-1, 4).mean(-1)[(batch["segments"] != 0).reshape(-1, 4).all(-1)])
    return np.concatenate(found)


@pytest.mark.ci_slow
def test_means_and_variances_are_those_of_drawn_losses(workdir, rows):
    lm = load(str(workdir))
    for name in ("U[.45, .95]", "U[.3, .8]", "exact count"):
        losses = block_losses(lm, OBJECTIVES.get(name, UNIFORM))
        error = losses.std() / len(losses)**0.5
        assert abs(rows[name]["mean"] - losses.mean()) < 4 * error
        assert rows[name]["variance"] == pytest.approx(losses.var(), rel=0.15), name
    assert rows["exact count"]["mean"] == pytest.approx(losses.mean(), rel=0.01)


@pytest.mark.ci_slow
def test_study(rows):
    assert len(rows) == 9 and all(rows["linear"][ratio] == 1 for ratio in variance.RATIOS)
    assert rows["linear"]["variance_ratio_ci95"] == [1, 1]
    for name in ("linear", "square", "cosine", "exact count, pi*"):  # all estimate the same bound
        assert rows[name]["mean"] == pytest.approx(rows["exact count"]["mean"], rel=2e-3)
    assert rows["exact count"]["variance_ratio"] < 0.2 and rows["U[.45, .95]"]["relative_ratio"] < 0.5
    assert rows["exact count, pi*"]["variance"] <= rows["exact count"]["variance"] * 1.05
    assert rows["U[.45, .95]"]["published_ratio"] == pytest.approx(0.266, abs=1e-3)
    for row in rows.values():
        assert row["gradient"] > 0
        for ratio in variance.RATIOS:
            low, high = row[f"{ratio}_ci95"]
            assert low <= row[ratio] <= high


@pytest.mark.ci_slow
def test_bench(rows, tmp_path, monkeypatch):
    def recorded(directory, split, batch, draws, seed):
        assert (split, batch, draws) == ("test", 16, 3)
        return [dict(row) for row in rows.values()]

    monkeypatch.setattr(bench_variance, "study", recorded)
    found = bench("variance", 3, "", tmp_path, "runs/a,runs/b")["rows"]
    assert [(row["case"], row["variant"]) for row in found] == [(f"{run}, S=4", name) for run in "ab" for name in rows]
    assert all((row["baseline"], row["time_ratio"]) == ("linear", None) for row in found)
    assert found[0]["variance_ratio_ci95"] == rows[found[0]["variant"]]["variance_ratio_ci95"]
    assert json.loads((tmp_path / "variance.json").read_text())["rows"] == found
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, workdir, message", [
    ("variance", "", "benchmark 'variance' measures a trained run: give --workdir=DIR"),
    ("loss", "runs/tiny", "benchmark 'loss' needs no trained run: leave --workdir=runs/tiny out"),
])
def test_bench_asks_for_a_run_where_it_needs_one(tmp_path, name, workdir, message):
    with pytest.raises(UserError, match=message):
        bench(name, 1, "", tmp_path, workdir)


@pytest.mark.parametrize("model, batch, draws, message", [
    ({}, 3, 2, "batch is 3 and draws 2, expected an even batch of at least 2 and 2 draws"),
    ({}, 0, 2, "expected an even batch"),
    ({}, 2, 1, "expected an even batch"),
    ({"objective": AR(bos=True)}, 2, 2, "runs/x is an autoregressive model, which has no schedule of masks"),
    ({"time_conditioning": True}, 2, 2, "runs/x sees the noise level"),
])
def test_wrong_input(monkeypatch, model, batch, draws, message):
    monkeypatch.setattr(variance, "load", lambda workdir: make_lm(**model))
    with pytest.raises(UserError, match=message):
        variance.study("runs/x", split="train", batch=batch, draws=draws, seed=0)


def test_ratios_and_their_intervals():
    """Two batches of blocks of one token, whose losses and gradients are known."""
    sums = np.array([[[2, 4.0, 10.0]], [[2, 8.0, 34.0]]])  # losses 1, 3 and 3, 5
    moments = {"linear": np.array([[1.0], [2.0]]), "other": np.array([[0.5], [0.5]])}
    linear, other = variance._compare(sums, moments, {"linear": [1.0, 3.0], "other": [1.0, 1.0]}, {"linear": 4.0})
    assert (linear["mean"], linear["variance"], linear["gradient"]) == (3.0, 22.0 - 9.0, 2.0)
    assert (other["mean"], other["variance"]) == (1.5, 5.5 - 2.25)
    assert other["variance_ratio"] == pytest.approx(0.25) and other["relative_ratio"] == pytest.approx(1.0)
    assert other["gradient_ratio"] == pytest.approx((1 / 2.25) / (2 / 9))
    assert linear["published_ratio"] == 1 and other["published_ratio"] is None
    with pytest.raises(UserError, match="4 blocks, too few for each of the 2 counts"):
        variance._compare(np.pad(sums, ((0, 0), (0, 1), (0, 0))), moments, {"linear": [1.0] * 2, "other": [1.0] * 2},
                          {})
