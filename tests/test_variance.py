"""The variance study on a toy run: exact means agree, and an independent loop finds the same variance."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_runs import LENGTH, quick_jit, toy_config, write_text

from bd3lm_jax import variance
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.errors import UserError
from bd3lm_jax.lm import load
from bd3lm_jax.passes import PLAIN
from bd3lm_jax.step import row_losses, score
from bd3lm_jax.train import train

BATCH, DRAWS = 8, 6


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("variance")
    write_text(directory / "text.txt", 80)
    train(toy_config(directory, {"train.steps": 20, "eval.every": 20}), str(directory / "run"))
    return directory / "run"


def uniform_count_losses(lm):
    """Losses a block, in nats a token, of uniform counts: each the mean cross-entropy of the masked tokens."""
    rows = prepare(lm.config.data, "train", 4, lm.tokenizer)
    loader, found = Loader(rows, BATCH, 0, None), []

    def losses(params, noised, batch):
        scored = score(lm.model, params, lm.config.diffusion, noised, batch["tokens"], batch["positions"],
                       batch["segments"], PLAIN)
        return row_losses(lm.model, params, scored, lm.special.mask, 0)

    for step in range(DRAWS):
        batch = loader.get(step)[1]
        key = jax.random.fold_in(jax.random.key(0), step)
        noised = Masked.uniform_counts(4).corrupt(key, batch["tokens"], batch["segments"], 1, lm.special.mask, -1)
        values = quick_jit(losses)(lm.params, noised.replace(capacity=LENGTH), batch)
        masked = np.asarray(noised.weight_BxMxL > 0).reshape(-1, 4)
        mean = (np.asarray(values).reshape(-1, 4) * masked).sum(-1) / np.maximum(masked.sum(-1), 1)
        found.append(mean[(batch["segments"] != 0).reshape(-1, 4).all(-1)])
    return np.concatenate(found)


@pytest.mark.ci_slow
def test_study(workdir):
    rows = {row["schedule"]: row for row in variance.study(str(workdir), split="train", batch=BATCH, draws=DRAWS,
                                                            seed=0)}
    assert len(rows) == 9 and rows["linear"]["variance_ratio"] == rows["linear"]["gradient_ratio"] == 1
    losses = uniform_count_losses(load(str(workdir)))
    uniform = rows["exact count"]
    assert uniform["mean"] == pytest.approx(losses.mean(), rel=1e-4)
    assert uniform["variance"] == pytest.approx(losses.var(ddof=1), rel=1e-3)
    for name in ("linear", "square", "cosine", "exact count, pi*"):  # all estimate the same bound
        error = np.sqrt(rows[name]["variance"] / len(losses))
        assert abs(rows[name]["mean"] - uniform["mean"]) < 5 * error
    assert uniform["variance_ratio"] < 0.2 and rows["U[.45, .95]"]["relative_ratio"] < 0.5
    assert rows["U[.45, .95]"]["published_ratio"] == pytest.approx(0.266, abs=1e-3)
    assert all(row["gradient"] > 0 for row in rows.values())


@pytest.mark.ci_slow
def test_wrong_input(workdir):
    for changes in ({"batch": 3}, {"batch": 0}, {"draws": 0}):
        with pytest.raises(UserError, match="expected an even batch"):
            variance.study(str(workdir), **{"split": "train", "batch": 2, "draws": 1, "seed": 0, **changes})


def test_ratios():
    linear = variance.Variation("linear", mean=2.0, variance=8.0, gradient=4.0)
    clipped = variance.Variation("U[.3, .8]", mean=1.0, variance=2.0, gradient=2.0)
    row = variance._row(clipped, linear, variance.PUBLISHED[16])
    assert (row["variance_ratio"], row["relative_ratio"], row["gradient_ratio"]) == (0.25, 1.0, 2.0)
    assert row["published_ratio"] == pytest.approx(3.58 / 7.62)
    assert variance._row(dataclasses.replace(clipped, schedule="other"), linear, {})["published_ratio"] is None
