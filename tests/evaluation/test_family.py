"""Objectives side by side: rows of toy runs against `eval` by its own command and against what their files say."""

import json

import numpy as np
import pytest
from toy_evaluation import evaluated
from toy_runs import AR, toy_config, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.evaluation import family
from bd3lm_jax.experiments.bench.family import runs_of
from bd3lm_jax.training.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    write_text(directory / "text.txt", 60)
    changes = {"ar": {"diffusion": AR, "model.adaln": False}, "blocks": {"diffusion.block_size": 4},
               **{algo: {"diffusion": {"kind": algo, "block_size": 4}} for algo in ("d3pm", "uniform")}}
    return {name: train(toy_config(directory, change), str(directory / name))["workdir"]
            for name, change in changes.items()}


def test_rows_say_what_eval_and_the_metrics_say(runs):
    rows = family.compare(list(runs.values()), split="valid", scorer=runs["ar"], texts=2, draws=1, seed=0)
    for row, (name, workdir) in zip(rows, runs.items()):
        told = evaluated(workdir)
        assert row["name"] == name and row["estimator"] == told["estimator"] and row["step"] == told["step"]
        np.testing.assert_allclose(row["bound"], told["bits_per_byte"], rtol=1e-6)
        np.testing.assert_allclose(row["bound_ci95"], told["bits_per_byte_ci95"], rtol=1e-6)
        lines = [json.loads(line) for line in open(f"{workdir}/metrics.jsonl")]
        assert row["train_loss"] == [line["train/loss"] for line in lines if "train/loss" in line][-1]
        assert row["gen_ppl"] > 1 and row["entropy"] > 0 and row["no_texts"] is None
    ar, blocks, d3pm, uniform = rows
    assert (ar["kind"], blocks["kind"], blocks["block_size"]) == ("ar", "masked", 4)
    np.testing.assert_allclose(blocks["difference"], blocks["bound"] - ar["bound"], rtol=1e-6)
    assert ar["tokens_per_call"] == pytest.approx(1, abs=0.05) and ar["native"] is None
    assert blocks["native"] is None  # the common bound is its own
    told = evaluated(runs["d3pm"], estimator="native")
    assert d3pm["estimator"] == "exact_count" and d3pm["native"] == pytest.approx(told["bits_per_byte"], rel=1e-6)
    assert uniform["estimator"] == "native" and uniform["native"] is None
    family.show(rows, runs["ar"])


def test_finished_runs_of_a_sweep(tmp_path):
    def sweep_with(*statuses):
        entries = [{"name": f"run{i}", "status": status} for i, status in enumerate(statuses)]
        (tmp_path / "status.json").write_text(json.dumps({"runs": entries}))
        return runs_of(str(tmp_path))

    assert sweep_with("finished", "failed", "finished") == [str(tmp_path / "run0"), str(tmp_path / "run2")]
    assert runs_of("a,b") == ["a", "b"]
    with pytest.raises(UserError, match="without a finished run"):
        sweep_with("waiting")
