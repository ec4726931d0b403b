"""A run on a mixture of two texts, from training to evaluation: what it reads, and what is scored."""

import json

import pytest
from toy_runs import toy_config, write_text

from bd3lm_jax.checkpoints.rundir import read
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.data import domains
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.windows import ScoringConvention
from bd3lm_jax.training.train import train
from launch.__main__ import main

INDEPENDENT = ScoringConvention("independent", 0, "predict", "count")


@pytest.fixture
def mixed(tmp_path):
    write_text(tmp_path / "one.txt", 60, seed=1)
    write_text(tmp_path / "two.txt", 40, seed=2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            (tmp_path / name / f"{split}.txt").write_text((tmp_path / f"{name}.txt").read_text())
    mixture = ((f"text:{tmp_path / 'one'}", 0.75), (f"text:{tmp_path / 'two'}", 0.25))
    return {"data.source": "mixture", "data.mixture": mixture, "data.path": "", "train.steps": 3}


def test_prepare_says_what_will_be_read(tmp_path, mixed, capsys):
    words = [f"--config.{key}={value}" for key, value in mixed.items()]
    words += [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.tokenizer=bytes", "--verify",
              "--config.train.batch_size=8"]
    assert main(["prepare", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [x["rows_seen"] for x in result["sources"]] == [18, 6]
    assert [x["source"] for x in result["sources"]] == [spec for spec, _ in mixed["data.mixture"]]
    assert sum(x["rows"] for x in result["sources"]) == result["rows"]["train"]
    assert all(x["epochs"] == x["rows_seen"] / x["rows"] for x in result["sources"])


@pytest.mark.ci_slow
def test_a_run(tmp_path, mixed):
    config = toy_config(tmp_path, mixed)
    found = train(config, str(tmp_path / "run"))
    assert found["step"] == 3 and found["valid_nll"] > 0
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/nll" in line] == [1, 2, 3]
    again, tokenizer = read(tmp_path / "run")
    assert again.data.mixture == config.data.mixture
    rows = prepare(again.data, "train", again.block_size, prepare_tokenizer(again.data))
    ids = [Loader(rows, 8, again.seed, None).get(step)[0] for step in range(3)]
    assert sum((x < len(rows.parts[0])).sum() for x in ids) == 18
    names = ["", *(spec for spec, _ in again.data.mixture)]
    texts = [domains.open_text(again.data, again.block_size, tokenizer, data=name, split="valid", data_dir="",
                               convention=INDEPENDENT)
             for name in names]
    assert [text.rows.meta["documents"] for text in texts] == [100, 60, 40]
