"""What is measured on little: few rows whose draws have to reach a target, and a text of one document."""

import math
import types

import numpy as np
import pytest
from toy_evaluation import evaluated
from toy_runs import toy_config, write_text

from bd3lm_jax.core.errors import RunError
from bd3lm_jax.evaluation.convert import convert
from bd3lm_jax.likelihood import evaluate
from bd3lm_jax.likelihood.evaluate import Target
from bd3lm_jax.training import report
from bd3lm_jax.training.train import train


@pytest.mark.parametrize(("rows", "spread", "draws"), [(1, 0.5, 8), (1, 0.5, 24), (1, 1.0, 24), (2, 1.0, 16),
                                                       (2, 1.0, 32), (8, 1.0, 8)])
def test_a_target_is_judged_when_enough_is_known(rows, spread, draws, monkeypatch):
    """Rows whose estimates are heavy-tailed, and targets that so many draws would meet on average: few are refused, and
    stopping does not favour the draws that happen to be low and alike."""
    monkeypatch.setattr(evaluate.log, "note", lambda text: None)
    rng, means, refused, trials = np.random.default_rng(0), [], 0, 400
    truth = rows * math.exp(spread**2 / 2)
    deviation = math.exp(spread**2 / 2) * math.sqrt(math.expm1(spread**2) * rows)
    target = Target(1.96 * deviation / math.sqrt(2 * draws) / truth, 64)
    for _ in range(trials):
        estimates = np.exp(spread * rng.standard_normal((128, rows)))
        for done in range(1, 65):
            total = types.SimpleNamespace(rows_UxR=estimates[:2 * done], draws=done, round_draws=1, tokens_N=np.ones(3))
            try:
                if evaluate._target_reached(total, target):
                    means.append(total.rows_UxR.mean(0).sum() / truth)
                    break
            except RunError:
                refused += 1
                break
    assert refused <= 0.03 * trials
    bias, error = np.mean(means) - 1, np.std(means) / math.sqrt(len(means))
    assert abs(bias) < 0.08 * target.ci + 2.5 * error


@pytest.mark.ci_slow
def test_a_run_whose_validation_split_is_one_document(tmp_path, capsys):
    """No interval, and a sentence, in training, evaluation, the model card and the table of a sweep."""
    write_text(tmp_path / "text.txt", 12)
    workdir = tmp_path / "run"
    train(toy_config(tmp_path, {"train.steps": 2}), str(workdir))
    valid = report.read(workdir)["valid"]
    assert valid["documents"] == 1 and valid["nll_ci95"] == valid["bits_per_byte_ci95"] == [None, None]
    result = evaluated(workdir)
    assert math.isnan(result["nll_ci95"][0]) and result["ci95_missing"].startswith("no interval over 1 document")
    compared = evaluated(workdir, baseline=str(workdir))["against"]
    assert compared["difference"] == 0 and math.isnan(compared["p_value"]) and compared["ci95_missing"]
    options = {"form": "hf", "dtype": "float32", "check": 0, "max_shard": "5GB", "weights": "ema", "tokenizer": "",
               "length": 0, "allow_pickle": False}
    convert(workdir, tmp_path / "out", **options)
    assert f"| {valid['nll']:.4f} | none | {valid['ppl']:.2f} | none |" in (tmp_path / "out" / "README.md").read_text()
    told = capsys.readouterr().err
    assert told.count("no interval over 1 document: it takes at least 3") >= 3 and "nan" not in told
