"""Whole runs of objectives that leave something out or bring something: no bound; parameters of their own."""

import json

import numpy as np
import pytest
from toy_evaluation import evaluated
from toy_runs import LENGTH, run_python, toy_config, write_text

import bd3lm_jax
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import OBJECTIVE_PARAMS
from bd3lm_jax.training import report
from bd3lm_jax.training.train import train
from configs import common

pytestmark = pytest.mark.ci_slow


def trained(directory, algo, **changes):
    """A run of two steps; its result and metrics."""
    write_text(directory / "text.txt", 200)
    section, others = common.algorithm(algo)
    section = {key: 8 if value == common.BLOCK_SIZE else value for key, value in section.items()}
    changes = {"diffusion": section, "train.steps": 2, **others, **changes}
    result = train(toy_config(directory, changes), str(directory / "run"))
    return result, [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ci_slow
def test_a_run_without_a_bound(tmp_path):
    """It trains to its end, samples, goes on, and nowhere reports a likelihood."""
    result, lines = trained(tmp_path, "ssd_lm", **{"eval.num_samples": 1, "eval.sample_length": 16})
    assert result["valid_nll"] is None and result["valid_ppl"] is None and result["train_nll"] is None
    assert np.isfinite(lines[-1]["train/loss"]) and not any("nll" in key for line in lines for key in line)
    assert set(report.read(tmp_path / "run")) == {"step", "settings"}
    with pytest.raises(UserError, match="'ssd_lm' has no bound on its likelihood"):
        evaluated(tmp_path / "run")
    lm = bd3lm_jax.load(str(tmp_path / "run"))
    samples = lm.generate(num=2, length=LENGTH, steps=3, top_p=0.9)
    assert samples == lm.generate(num=2, length=LENGTH, sampler="simplex", steps=3, top_p=0.9)
    assert all(sample.nfe == 3 * LENGTH // 8 or sample.stop == "end" for sample in samples)
    again, _ = trained(tmp_path, "ssd_lm", **{"eval.num_samples": 1, "eval.sample_length": 16})
    assert again["step"] == 2


@pytest.mark.ci_slow
def test_a_run_with_parameters_of_the_objective(tmp_path):
    """They are saved, restored and go on; the bound is measured under uniform masks."""
    result, lines = trained(tmp_path, "adversarial", **{"train.noise_samples": 2})
    assert result["train_nll"] is None and 0 < result["valid_nll"] < 8
    lm = bd3lm_jax.load(str(tmp_path / "run"))
    assert set(lm.params[OBJECTIVE_PARAMS]) == {"token", "place", "out"} and np.any(lm.params[OBJECTIVE_PARAMS]["out"])
    assert len(lm.generate(num=1, length=16)) == 1
    further, more = trained(tmp_path, "adversarial", **{"train.noise_samples": 2, "train.steps": 3})
    assert further["step"] == 3 and len(more) == len(lines) + 1


@pytest.mark.ci_slow
def test_a_split_network_trains_and_writes(tmp_path):
    write_text(tmp_path / "text.txt", 200)
    result = train(toy_config(tmp_path, {"model.num_layers": 3, "model.decoder_layers": 1, "train.steps": 2}),
                   str(tmp_path / "run"))
    assert 0 < result["valid_nll"] < 8
    lm = bd3lm_jax.load(str(tmp_path / "run"))
    assert len(lm.generate(num=1, length=16)) == 1
    with pytest.raises(UserError, match="split network"):
        lm.logits(np.zeros((1, 8), np.int32))


@pytest.mark.ci_slow
def test_a_run_with_two_likelihoods(tmp_path):
    """Both are validated, reported and measured; one checkpoint writes both ways."""
    result, lines = trained(tmp_path, "joint", **{"eval.num_samples": 1, "eval.sample_length": 8,
                                                  "train.noise_samples": 2})
    assert result["train_nll"] is None and not any("train/nll" in line for line in lines)
    valid = report.read(tmp_path / "run")["valid"]
    assert lines[-1]["valid/ar_nll"] == valid["ar_nll"] and valid["estimator"] == "exact_count"
    found, exact = evaluated(tmp_path / "run"), evaluated(tmp_path / "run", estimator="nll")
    for key in ("nll", "ppl", "bits_per_byte"):
        low, high = found[f"ar_{key}_ci95"]
        assert low < found[f"ar_{key}"] < high and found[f"ar_{key}"] == exact[key] != found[key]
    assert exact["estimator"] == "nll" and exact["tokens"] == found["tokens"] and "ar_nll" not in exact
    lm = bd3lm_jax.load(str(tmp_path / "run"))
    texts = {sampler: lm.generate(num=2, length=16, sampler=sampler) for sampler in ("ar", "first_hitting")}
    assert all(len(found) == 2 for found in texts.values()) and texts["ar"] != texts["first_hitting"]
    assert list(lm.generate(num=1, length=16, sampler="ar"))[0] == texts["ar"][0]


@pytest.mark.ci_slow
def test_two_likelihoods_on_eight_devices(tmp_path):
    """Losses of the steps and both likelihoods are those of one device."""
    here, lines = trained(tmp_path, "joint")
    code = """
        import sys
        from pathlib import Path
        import jax
        from toy_runs import toy_config
        from bd3lm_jax.training.train import train
        from configs import common
        section = common.algorithm("joint")[0] | {"block_size": 8}
        assert len(jax.devices()) == 8
        config = toy_config(Path(sys.argv[1]), {"diffusion": section, "train.steps": 2, "mesh.data": 4, "mesh.fsdp": 2})
        train(config, sys.argv[1] + "/eight")
    """
    done = run_python(code, tmp_path, devices=8)
    assert done.returncode == 0, done.stderr
    there = [json.loads(line) for line in (tmp_path / "eight" / "metrics.jsonl").read_text().splitlines()]
    assert len(there) == len(lines)
    for ours, theirs in zip(lines, there):
        for key in ("train/loss", "valid/nll", "valid/ar_nll"):
            assert (key in ours) == (key in theirs)
            assert key not in ours or ours[key] == pytest.approx(theirs[key], rel=1e-4)
