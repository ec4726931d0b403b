"""Two toy runs on the same documents: the paired difference against the same numbers from separate evaluations."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
from scipy import stats as scipy_stats
from toy_evaluation import evaluated
from toy_intervals import bell_mccaffrey
from toy_runs import AR, toy_config, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.likelihood.evaluate import open_run
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.training.train import train

pytestmark = pytest.mark.ci_slow  # seven runs are trained
KEYS = {"workdir", "estimator", "step", "config_sha256", "bits_per_byte", "nll", "unit", "difference",
        "difference_ci95", "difference_mc_se", "p_value", "unpaired_se", "same_masks", "draws_saved", "comparable"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories by name: one model after few steps and some more, other block sizes, tokenizers."""
    home = tmp_path_factory.mktemp("compare")
    write_text(home / "text.txt", 120)
    changes = {"first": {"train.steps": 10}, "longer": {"train.steps": 12}, "wide": {"diffusion.block_size": 8},
               "single": {"diffusion.block_size": 1},
               "causal": {"diffusion": AR, "model.adaln": False}, "no_bos": {
                   "diffusion": {"kind": "ar", "bos": False}, "model.adaln": False},
               "bpe": {"data.tokenizer": "bpe:300"}}
    for name, change in changes.items():
        train(toy_config(home, {"train.steps": 3, "eval.rows": 2, **change}), str(home / name))
    return home


def compared(runs, first, second, **changes):
    return evaluated(runs / first, str(runs / second) if second else "", **{"draws": 2} | changes)


def document_nats(runs, name, estimator, draws=2):
    """Nats, UTF-8 bytes and tokens of every document, by an evaluation of its own."""
    run = open_run(str(runs / name))
    rows = prepare(run.config.data, "valid", run.config.block_size, run.tokenizer)
    found = run.evaluator.measure(run.params, rows, EstimatorOptions(estimator, draws))
    return found.documents_UxN.mean(0), found.tokens_N


def test_a_paired_difference_is_that_of_two_evaluations(runs):
    result = compared(runs, "first", "longer", estimator="exact")
    other = result["against"]
    assert set(other) == KEYS and other["unit"] == "nats per token" and other["workdir"] == str(runs / "longer")
    assert other["nll"] == compared(runs, "longer", "", estimator="exact")["nll"]
    (ours, tokens), (theirs, _) = (document_nats(runs, name, "exact") for name in ("first", "longer"))
    difference, se, freedom = bell_mccaffrey(ours - theirs, tokens)
    margin = scipy_stats.t.ppf(0.975, freedom) * se
    assert other["difference"] == pytest.approx(difference, rel=1e-6)
    np.testing.assert_allclose(other["difference_ci95"], [difference - margin, difference + margin], rtol=1e-5)
    assert other["p_value"] == pytest.approx(2 * scipy_stats.t.sf(abs(difference / se), freedom), rel=1e-4)
    assert (other["difference_mc_se"], other["same_masks"], other["draws_saved"]) == (0, False, 0)  # nothing is drawn
    assert other["unpaired_se"] > se


def test_the_same_masks_cancel_most_of_the_noise(runs):
    result = compared(runs, "first", "longer")
    other, separate = result["against"], compared(runs, "longer", "")
    assert other["same_masks"] and other["nll"] == separate["nll"]
    assert other["difference"] == pytest.approx(result["nll"] - separate["nll"], rel=1e-6)
    gain = (result["nll_mc_se"]**2 + separate["nll_mc_se"]**2) / other["difference_mc_se"]**2
    assert gain > 2 and other["draws_saved"] == round((gain - 1) * 2)
    exact = compared(runs, "first", "longer", estimator="exact")["against"]["difference"]
    assert abs(other["difference"] - exact) < 4 * other["difference_mc_se"]


def test_the_count_law_of_the_first_model_serves_both(runs):
    other = compared(runs, "first", "longer", estimator="importance")["against"]
    assert other["same_masks"] and other["estimator"] == "importance"


def test_a_model_and_itself(runs):
    other = compared(runs, "first", "first")["against"]
    assert (other["difference"], other["difference_mc_se"], other["draws_saved"]) == (0, 0, None)
    assert other["p_value"] == 1


def test_other_block_sizes_draw_their_own_masks(runs, capsys):
    result = compared(runs, "first", "wide")
    other, separate = result["against"], compared(runs, "wide", "")
    assert not other["same_masks"] and other["draws_saved"] is not None
    assert other["nll"] == pytest.approx(separate["nll"], rel=1e-9)
    assert "same documents, masks of their own" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("first", "second"), [("causal", "first"), ("first", "causal")])
def test_autoregression_against_diffusion(runs, first, second):
    result = compared(runs, first, second)
    other = result["against"]
    drawn = result if first == "first" else compared(runs, "first", "")
    assert {result["estimator"], other["estimator"]} == {"nll", "exact_count"}
    assert other["difference_mc_se"] == pytest.approx(drawn["nll_mc_se"], rel=1e-6)
    assert other["difference"] == pytest.approx(result["nll"] - other["nll"], rel=1e-6)
    assert not other["same_masks"]


@pytest.mark.parametrize(("first", "second"), [("causal", "single"), ("single", "causal")])
def test_autoregression_against_blocks_of_one_token(runs, first, second):
    """Both are exact by one pass, but not by the same: each model is asked in its own way."""
    result, alone = compared(runs, first, second), compared(runs, second, "")
    assert (result["estimator"], result["against"]["estimator"]) == ("nll", "nll")
    assert result["against"]["nll"] == pytest.approx(alone["nll"], rel=1e-6)
    assert result["against"]["difference"] == pytest.approx(result["nll"] - alone["nll"], rel=1e-4)
    assert result["against"]["difference_mc_se"] == 0 and not result["against"]["same_masks"]


def test_other_tokenizers_compare_in_bits_per_byte(runs, capsys):
    result = compared(runs, "first", "bpe", estimator="exact")
    other = result["against"]
    assert other["unit"] == "bits per byte" and "nll" not in other
    assert other["difference"] == pytest.approx(result["bits_per_byte"] - other["bits_per_byte"], rel=1e-6)
    (ours, _), (theirs, _) = (document_nats(runs, name, "exact") for name in ("first", "bpe"))
    size = np.array([len(line.encode()) + 1 for line in (runs / "text.txt").read_text("utf-8").splitlines()[-12:]])
    difference, se, freedom = bell_mccaffrey((ours - theirs) / math.log(2), size)
    low, high = other["difference_ci95"]
    assert (high - low) / 2 == pytest.approx(scipy_stats.t.ppf(0.975, freedom) * se, rel=1e-5)
    assert "the tokenizers differ: only bits per byte compare" in capsys.readouterr().err


def test_models_that_predict_other_tokens_are_compared_on_those_of_both(runs):
    """Without a beginning token the first one of a row is not predicted: nobody is asked for it, unless told to be."""
    result = compared(runs, "causal", "no_bos")
    assert result["first_token"] == "skip" and result["tokens"] < compared(runs, "causal", "")["tokens"]
    with pytest.raises(UserError, match="no beginning token .* use --first_token=skip"):
        compared(runs, "causal", "no_bos", first_token="predict")


def test_against_what_is_no_run(runs, tmp_path):
    with pytest.raises(UserError, match="no run directory .*absent"):
        compared(runs, "first", "absent")
    shutil.copytree(runs / "longer", tmp_path / "broken")
    config = toy_config(runs)
    prepare_tokenizer(dataclasses.replace(config.data, tokenizer="gpt2")).save(tmp_path / "broken" / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json is not the file that the run was started with"):
        compared(runs, "first", str(tmp_path / "broken"))
