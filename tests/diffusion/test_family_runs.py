"""Every objective through the training loop: what is logged, how it is validated, and what writes its samples."""

import json
import math

import numpy as np
import pytest
from toy_lm import make_ids
from toy_runs import LENGTH, toy_config, write_text

import bd3lm_jax
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.training.train import train
from configs import tiny

LEVEL = "model.time_conditioning"
RUNS = {  # algo -> further changes, the estimator of its validation, whether its loss is a bound
    "sedd": ({LEVEL: True}, "exact_count", False),
    "sedd_uniform": ({LEVEL: True, "diffusion.eps": 0.0}, "native", True),
    "d3pm": ({"diffusion.hybrid": 0.0}, "exact_count", True),
    "md4": ({}, "exact_count", False),
    "genmd4": ({"train.noise_samples": 2, "diffusion.power": 1.5}, "exact_count", False),
    "uniform": ({}, "native", False),
}


def changes_of(algo):
    return {"diffusion": tiny.get_config(f"algo={algo}").diffusion.to_dict() | {"block_size": LENGTH}, **RUNS[algo][0],
            "train.steps": 2, "eval.num_samples": 1, "eval.sample_length": 4}


@pytest.mark.ci_slow
@pytest.mark.parametrize("algo", RUNS)
def test_a_run(algo, tmp_path):
    write_text(tmp_path / "text.txt", 60)
    run, (_, estimator, is_bound) = tmp_path / "run", RUNS[algo]
    result = train(toy_config(tmp_path, changes_of(algo)), str(run))
    lines = read_metrics(run)
    assert ("train/nll" in lines[0]) == is_bound and math.isfinite(lines[0]["train/loss"])
    assert json.loads((run / "report.json").read_text())["valid"]["estimator"] == estimator
    assert 0 < result["valid_nll"] < 20
    assert (run / "samples").exists()


@pytest.mark.ci_slow
def test_learnt_schedules_go_on_and_stay_behind(tmp_path):
    """They are trained, averaged, saved and continued; another run takes the network alone, and back."""
    write_text(tmp_path / "text.txt", 60)
    changes = changes_of("genmd4") | {"eval.num_samples": 0, "optim.ema_decay": 0.5}
    train(toy_config(tmp_path, changes), str(tmp_path / "run"))
    lm = bd3lm_jax.load(str(tmp_path / "run"))
    log_w = np.asarray(lm.params["objective"]["log_w"])
    assert log_w.shape == (258,) and 1e-3 < np.abs(log_w - math.log(1.5)).max() < 1
    assert np.isfinite(lm.nll(make_ids(1, 8)).mean)
    train(toy_config(tmp_path, {**changes, "train.steps": 3}), str(tmp_path / "run"))
    one = {"train.steps": 1, "eval.num_samples": 0}
    train(toy_config(tmp_path, one | {"train.init_from": str(tmp_path / "run")}), str(tmp_path / "masked"))
    train(toy_config(tmp_path, changes | one | {"train.init_from": str(tmp_path / "masked")}), str(tmp_path / "again"))
    again = bd3lm_jax.load(str(tmp_path / "again"), weights="params").params["objective"]["log_w"]
    assert np.abs(np.asarray(again) - math.log(1.5)).max() < 0.02  # one step from the start
