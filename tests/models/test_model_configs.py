"""Backbones that a config selects: every section is complete, and a run with one trains, is loaded and writes."""

import json

import numpy as np
import pytest
from toy_runs import LENGTH, toy_config, write_text

import bd3lm_jax
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import BACKBONES, default_section
from bd3lm_jax.training.train import train
from configs import common, tiny

SMALL = {"num_layers": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "dropout": 0.0}


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert"])
@pytest.mark.parametrize("algo", ["ar", "bd3lm", "mdlm"])
def test_sections(name, algo):
    config = tiny.get_config()
    common.set_model(config, name)
    common.set_algo(config, algo, 4 if algo == "bd3lm" else 0)
    found = Config.from_dict(config)
    assert isinstance(found.model, BACKBONES[name].Config) and found.model.num_layers == 12
    assert (found.model.positions or LENGTH) >= LENGTH
    assert Config.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_objectives_that_tell_the_level_are_refused():
    config = tiny.get_config()
    common.set_model(config, "bert")
    common.set_algo(config, "sedd", 0)
    with pytest.raises(UserError, match="needs the noise level"):
        Config.from_dict(config)


def test_rows_longer_than_the_learned_positions_are_refused():
    config = tiny.get_config()
    common.set_model(config, "gpt2")
    config.data.seq_len, config.model.positions = 256, 128
    with pytest.raises(UserError, match="data.seq_len=256 is more than model.positions=128"):
        Config.from_dict(config)


@pytest.mark.ci_slow
@pytest.mark.parametrize("name, changes", [
    ("gpt2", {"diffusion": {"kind": "ar", "bos": True}}), ("bert", {}), ("modernbert", {}),
])
def test_a_run(tmp_path, name, changes):
    """In blocks of 4 it writes with the cache; the loss falls; what is saved is what is loaded."""
    write_text(tmp_path / "text.txt", 300)
    section = default_section(name) | SMALL | ({"local_layers": (1,), "window": 4} if name == "modernbert" else
                                             {"positions": LENGTH})
    result = train(toy_config(tmp_path, {"model": section, "train.steps": 30, **changes}), str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nats = [line["train/nll"] for line in lines if "train/nll" in line]
    assert np.mean(nats[-5:]) < np.mean(nats[:5]) - 0.5 and 0 < result["valid_nll"] < np.log(258)
    lm = bd3lm_jax.load(str(tmp_path / "run"))
    assert lm.model.config.kind == name and len(lm.generate(num=2, length=16)) == 2
