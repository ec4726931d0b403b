"""Each command once as a person starts it: a process, its exit code, and one JSON object as the last line of stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

SMALL = ("--config.data.source=text", "--config.data.tokenizer=bytes", "--config.data.seq_len=32",
         "--config.data.valid_fraction=0.1", "--config.model.num_layers=1", "--config.model.hidden_size=32",
         "--config.model.num_heads=2", "--config.train.steps=3", "--config.train.batch_size=4", "--config.log.every=1",
         "--config.optim.warmup_steps=1",
         "--config.eval.batch_size=4", "--config.eval.rows=4", "--config.eval.num_samples=1",
         "--config.eval.sample_length=32")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("launch")
    (directory / "text.txt").write_text("".join(f"the cat sat on mat number {i}\n" for i in range(100)))
    return directory


def launch(home: Path, *argv: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "launch", *argv], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"BD3LM_CACHE": str(home / "cache")})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(home):
    return launch(home, "train", f"--config.data.path={home / 'text.txt'}", *SMALL, f"--workdir={home / 'run'}")


def test_train(home, trained):
    assert set(trained) == {"workdir", "step", "train_nll", "valid_nll", "valid_ppl", "tokens_per_s", "step_ms",
                            "params", "wall_s"}
    assert (trained["step"], trained["workdir"]) == (3, str(home / "run"))
    assert {path.name for path in (home / "run").iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints"}


def test_eval(home, trained):
    result = launch(home, "eval", f"--workdir={home / 'run'}", "--split=valid")
    assert set(result) >= {"data", "split", "estimator", "nll", "nll_ci95", "nll_mc_se", "ppl", "ppl_ci95",
                           "bits_per_byte", "tokens", "documents", "draws", "seed", "step", "config_sha256", "wall_s"}
    assert (result["split"], result["step"], result["documents"]) == ("valid", 3, 10)
    assert result["nll_ci95"][0] < result["nll"] < result["nll_ci95"][1]


def test_sample(home, trained):
    result = launch(home, "sample", f"--workdir={home / 'run'}", "--num_samples=2", "--length=16", "--prompt=the")
    assert set(result) == {"samples", "tokens_per_s", "nfe_per_token", "seed", "sampler"}
    assert len(result["samples"]) == 2
    for sample in result["samples"]:
        assert set(sample) == {"prompt_index", "prompt", "text", "num_tokens", "nfe", "stop"}
        assert sample["num_tokens"] == 13 if sample["stop"] == "length" else sample["num_tokens"] < 13


def test_prepare(home):
    result = launch(home, "prepare", f"--config.data.path={home / 'text.txt'}", *SMALL)
    assert set(result) == {"rows", "tokens", "hash", "path"}


def test_doctor(home):
    assert launch(home, "doctor")["ok"]
