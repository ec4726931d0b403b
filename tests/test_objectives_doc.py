"""docs/objectives.md: its example of an objective trains as it stands, and its table names every objective."""

import re

import numpy as np
import pytest
from places import ROOT
from toy_runs import toy_config, write_text

from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.diffusion import OBJECTIVES
from bd3lm_jax.training.train import train
from configs import common

PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.fixture
def example():
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert len(code.splitlines()) <= 40
    names = {"__name__": "example"}
    exec(code, names)
    yield names["Spans"]
    del OBJECTIVES["spans"]


@pytest.mark.ci_slow
def test_the_example_trains_and_is_measured_by_the_common_bound(example, tmp_path):
    write_text(tmp_path / "text.txt", 40)
    section = {"kind": "spans", "block_size": 8, "span": 3}
    result = train(toy_config(tmp_path, {"diffusion": section, "train.steps": 12}), str(tmp_path / "run"))
    lines = read_metrics(result["workdir"])
    logged = [line for line in lines if "train/loss" in line]
    assert logged[-1]["train/loss"] < logged[0]["train/loss"] and not any("train/nll" in line for line in lines)
    np.testing.assert_allclose([line["train/masked_fraction"] for line in logged], 3 / 8, atol=0.06)
    assert result["valid_nll"] > 0


def test_the_table_names_every_objective():
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in PAGE.splitlines() if "| `" in line)))
    assert set(common.algorithms()) <= named
