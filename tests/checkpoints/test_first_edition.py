"""A run directory of the first edition (tests/data/first_edition_run.tar.xz), with what that edition found of it.

Its code trained this run for 8 steps on text.txt: one layer, 16 wide, bytes, keys by their first names. The figures
and tokens below are those that it printed on the CPU, in float32; two further steps were trained in a copy.
"""

import json
import tarfile
from pathlib import Path

import pytest
from places import ROOT

import bd3lm_jax
from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.evaluation.evaluate_run import evaluate_run
from bd3lm_jax.likelihood.options import TextOptions
from bd3lm_jax.train import train
from launch.arguments import load_config

NLL = 3.554702076386279
TOKENS = [
    [9, 115, 105, 108, 119, 111, 39, 49, 116, 110, 97, 110, 94, 22, 101, 110, 3, 46, 109, 160, 114, 101, 109, 222],
    [208, 115, 111, 166, 108, 30, 116, 144, 0, 32, 153, 102, 130, 114, 237, 108, 115, 119, 111, 115, 102, 115, 142,
     105],
]
NEXT_LOSSES = [3.388202667236328, 3.113597869873047]
NEXT_NLL = 3.156074653795519
COMMAND = ["model.layers=1", "model.width=16", "model.heads=2", "model.cond_dim=8", "data.tokenizer=bytes",
           "data.length=32", "train.batch=4", "checkpoint.every=8", "checkpoint.keep=1", "checkpoint.keep_best=0",
           "eval.every=8", "eval.rows=8", "eval.batch=8", "eval.samples=0", "log.every=1", "optim.schedule=constant",
           "optim.warmup_steps=0", "optim.lr=0.01", "data.source=text", "data.path=text.txt", "data.valid_fraction=0.3"]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    with tarfile.open(ROOT / "tests/data/first_edition_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # of text.txt
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))
    return "run"


def config(*changes: str):
    return load_config("tiny", [f"--config.{word}" for word in (*COMMAND, *changes)])


def test_it_opens_with_the_hash_that_it_was_written_with(workdir):
    stored = json.loads(Path(workdir, "config.json").read_text())
    assert stored["train"]["batch"] == 4 and "batch_size" not in stored["train"]
    found, tokenizer = rundir.read(workdir)
    assert found == config("train.steps=8").with_vocab(tokenizer.vocab_size)
    assert found.sha256() == stored["config_sha256"]
    with pytest.raises(UserError, match="another config .optim.ema_decay: 0.5 != 0.98"):
        rundir.create_or_validate(workdir, config("optim.ema=0.5").with_vocab(tokenizer.vocab_size), tokenizer)


@pytest.mark.ci_slow
def test_it_evaluates_and_samples_as_recorded(workdir):
    assert evaluate_run(workdir, text=TextOptions(split="valid"))["nll"] == pytest.approx(NLL, rel=1e-6)
    assert [list(sample.tokens) for sample in bd3lm_jax.load(workdir).generate(num=2, length=24, seed=3)] == TOKENS


@pytest.mark.ci_slow
def test_training_goes_on_as_recorded(workdir):
    result = train(config("train.steps=10"), workdir)
    losses = [line["train/loss"] for line in read_metrics(workdir) if line["step"] > 8]
    assert losses == pytest.approx(NEXT_LOSSES, rel=1e-5) and result["valid_nll"] == pytest.approx(NEXT_NLL, rel=1e-5)
