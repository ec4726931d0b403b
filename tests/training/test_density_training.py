"""Priority masks in configs and in the training loop: what goes together, what is logged."""

import contextlib
import json

import numpy as np
import pytest
from toy_runs import toy_config, toy_dict, write_text

from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.planning import flops
from bd3lm_jax.training import train as train_module
from configs import common, tiny

PRIORITY = {"kind": "priority", "block_size": 4}


@pytest.mark.parametrize("arg", ["algo=priority", "algo=priority,block_size=16"])
def test_the_config_of_the_objective_builds(arg):
    config = Config.from_dict(tiny.get_config(arg))
    assert config.diffusion.kind == "priority" and config.data.density == "unigram:0.5"
    assert config.block_size == (16 if "16" in arg else 128)
    assert not config.diffusion.is_bound and config.diffusion.uses_mask_token
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("changes, words", [
    ({"diffusion": PRIORITY}, "diffusion.kind='priority' needs the density of every token: set data.density, one of "),
    ({"data.density": "python"},
     "data.density='python' has no effect with diffusion.kind='masked' and noise.adaptive_noise='n"),
    ({"data.density": "python", "diffusion": PRIORITY, "noise.adaptive_noise": "running_loss"},
     "data.density='python' has no"),
    ({"noise.adaptive_noise": "running_loss"},
     "'running_loss' chooses the density of tokens, which diffusion.kind='masked'"),
    ({"data.density": "frequency", "diffusion": PRIORITY | {"importance": True}}, "importance=True needs tags, and"),
    ({"data.density": "python", "diffusion": PRIORITY | {"complement": True}},
     "train.noise_samples=1 is no multiple of 2"),
    ({"data.density": "pyton", "diffusion": PRIORITY}, "unknown data.density 'pyton': did you mean 'python'?"),
    ({"data.density": "python", "noise.adaptive_noise": "counts", "diffusion": PRIORITY},
     "noise.adaptive_noise='counts' needs"),
])
def test_what_does_not_go_together(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        Config.from_dict(toy_dict(tmp_path, changes))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source, words", [
    ("arithmetic", "density: 0.0% on average, everywhere: all masks are uniform"),
    ("unigram:0.9", "% on average; a block whose tokens are all alike is masked uniformly"),
])
def test_a_density_that_tells_nothing_is_said_once(tmp_path, capsys, source, words):
    write_text(tmp_path / "text.txt", 20)
    config = toy_config(tmp_path, {"diffusion": PRIORITY, "data.density": source})
    with contextlib.ExitStack() as held:
        train_module.set_up(config, str(tmp_path / "run"), held)
    assert capsys.readouterr().err.count(words) == 1


@pytest.mark.ci_slow
def test_a_heuristic_loss_is_never_called_nll(tmp_path):
    """Three steps on words of which the rarer half is dense; validated with the bound under uniform masks."""
    write_text(tmp_path / "text.txt", 80)
    config = toy_config(tmp_path, {"diffusion": PRIORITY, "data.density": "unigram:0.5", "train.steps": 3})
    result = train_module.train(config, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("train/nll" in line for line in lines) and result["train_nll"] is None
    assert all(np.isfinite(line["train/loss"]) for line in lines) and np.isfinite(result["valid_nll"])


@pytest.mark.parametrize("name", common.algorithms()[2:])
def test_an_objective_that_needs_a_density_has_one_in_the_configs(name):
    config = Config.from_dict(tiny.get_config(f"algo={name}"))
    assert bool(config.data.density) == ("density" in config.diffusion.extra_batch_keys)


@pytest.mark.ci_slow
def test_the_running_loss_of_the_network_is_a_density(tmp_path):
    """No data.density; importance weights make the loss the bound, so that it is logged as such."""
    write_text(tmp_path / "text.txt", 80)
    config = toy_config(tmp_path, {"diffusion": PRIORITY | {"importance": True}, "noise.adaptive_noise": "running_loss",
                                   "train.steps": 3, "eval.every": 1})
    train_module.train(config, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train/nll"] == line["train/loss"] for line in lines if "train/loss" in line)
    dense = [line["noise/dense_ids"][0] for line in lines if "noise/dense_ids" in line]
    assert len(dense) == 3 and all(0 < part < 0.2 for part in dense)  # of 258 ids some 20 occur


def test_the_output_layer_reads_no_more_positions_than_for_uniform_masks(tmp_path):
    """The capacity of priority masks is static: half of the positions and a little, as for exact counts."""
    config = toy_config(tmp_path, {"diffusion": PRIORITY, "data.density": "python"})
    uniform = Masked.uniform_counts(4)
    assert flops.scored_positions(config.diffusion, 2, 32, 1) == flops.scored_positions(uniform, 2, 32, 1) == 20
