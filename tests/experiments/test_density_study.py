"""The bound by kind of token adds up to the bound, on two toy runs; lengths of masked runs by hand."""

import json

import numpy as np
import pytest
from toy_runs import toy_config, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.data.tokenizers import ByteTokenizer
from bd3lm_jax.experiments import density_study
from bd3lm_jax.experiments.bench import bench
from bd3lm_jax.experiments.density_study import TaggedRows, masked_runs, study
from bd3lm_jax.likelihood.evaluate import open_run
from bd3lm_jax.training.train import train

PRIORITY = {"kind": "priority", "block_size": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps with uniform masks and with pairs of hard ones, on the same text; the rarer half is tagged."""
    directory = tmp_path_factory.mktemp("density")
    write_text(directory / "train.txt", 60)
    write_text(directory / "test.txt", 20, seed=1)
    common_ = {"data.path": str(directory), "train.steps": 2, "train.noise_samples": 2}
    train(toy_config(directory, common_ | {"diffusion.complement": True}), str(directory / "uniform"))
    hard = {"diffusion": PRIORITY | {"hard": True, "complement": True}, "data.density": "unigram:0.5"}
    train(toy_config(directory, common_ | hard), str(directory / "hard"))
    return [str(directory / name) for name in ("uniform", "hard")]


@pytest.mark.ci_slow
def test_bounds_of_both_kinds_add_up(runs, tmp_path):
    rows = bench("density", 2, "", tmp_path, ",".join(runs))["rows"]
    assert [row["masks"] for row in rows] == ["masked, pairs", "priority, hard, 100% of documents tagged, pairs"]
    for row in rows:
        run = open_run(row["run"])
        plain = RowsWithBytes(prepare(run.config.data, "test", 4, run.tokenizer), run.tokenizer)
        whole = run.evaluator.run(run.params, plain, estimator="exact_count", draws=1, seed=0)
        (parts,) = row["bounds"].values()
        assert sum(part["tokens"] for part in parts.values()) == whole["tokens"]
        assert sum(part["nll"] * part["tokens"] for part in parts.values()) == pytest.approx(
            whole["nll"] * whole["tokens"], rel=1e-5)
        for part in parts.values():
            assert part["nll_ci95"][0] < part["nll"] < part["nll_ci95"][1]
        assert row["gradient"] > 0 and row["masked_run"] > 1 and 0 <= row["spikes"] <= 1 <= row["grad_norm_max"]
    tokens = [{name: part["tokens"] for name, part in row["bounds"]["text"].items()} for row in rows]
    assert tokens[0] == tokens[1]
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "density.json").read_text())["rows"] == rows


@pytest.mark.ci_slow
def test_parts_by_a_slow_loop(runs):
    run = open_run(runs[1])
    rows = prepare(run.config.data, "test", 4, ByteTokenizer())
    tagged, ids = TaggedRows(rows), np.arange(len(rows))
    values, documents, density = rows.tokens(ids) + 0.5, rows.documents(ids), rows.density(ids)
    parts = tagged.documents(ids)
    nats = np.array([scale * np.bincount(parts[parts >= 0], values[parts >= 0]) for scale in (1.0, 1.1)])
    found = tagged.intervals(nats, np.bincount(parts[parts >= 0]))
    for name, inside in (("dense", density == 1), ("other", density == 0)):
        inside = inside & (documents >= 0)
        assert found[name]["tokens"] == inside.sum() > 0
        assert found[name]["nll"] == pytest.approx(1.05 * values[inside].mean())


def test_masked_runs_by_hand():
    masked = np.array([[[1, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 1, 1, 0]]], bool)
    assert masked_runs(masked).tolist() == [2, 1, 4, 2]
    uniform = (np.arange(16)[:, None] >> np.arange(4)) & 1  # all masks: mean run 32 / 20
    assert masked_runs(uniform).mean() == pytest.approx(32 / 20)


@pytest.mark.parametrize("chosen, changes, message", [
    ([0, 0], {}, "none of these runs was trained with tags"),
    ([0, 1], {"draws": 1}, "batch is 4 and draws 1, expected an even batch"),
    ([0, 1], {"batch": 3}, "batch is 3 and draws 2, expected an even batch"),
])
@pytest.mark.ci_slow
def test_wrong_input(runs, chosen, changes, message):
    with pytest.raises(UserError, match=message):
        study([runs[i] for i in chosen], **{"split": "test", "batch": 4, "draws": 2, "seed": 0} | changes)


@pytest.mark.ci_slow
def test_runs_of_other_blocks_are_refused(runs, monkeypatch):
    real, sizes = density_study.load, iter((4, 8))

    def load(workdir):
        lm = real(workdir)
        object.__setattr__(lm.config.diffusion, "block_size", next(sizes))
        return lm

    monkeypatch.setattr(density_study, "load", load)
    with pytest.raises(UserError, match="has another block size, network or tokenizer than"):
        study(runs, split="test", batch=4, draws=2, seed=0)
