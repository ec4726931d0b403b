"""Names that others use lead to ours."""

import copy

import pytest
from absl import flags

from bd3lm_jax.config import Config
from bd3lm_jax.core import synonyms
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import flatten
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.models import BACKBONES, default_section
from configs import common, tiny
from launch import eval as eval_command
from launch import sample, train
from launch.arguments import load_config, parse_flags


@pytest.mark.parametrize("given, ours", [
    ("optim.learning_rate", "optim.lr"), ("train.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"),
    ("batch_size", "train.batch_size"),
    ("model.max_length", "data.seq_len"), ("data.max_seq_len", "data.seq_len"),
    ("model.n_layer", "model.num_layers"), ("model.d_model", "model.hidden_size"),
    ("model.n_heads", "model.num_heads"),
    ("train.ema", "optim.ema_decay"), ("train.max_steps", "train.steps"), ("train.num_steps", "train.steps"),
    ("train.epochs", "train.steps"), ("optim.warmup", "optim.warmup_steps"), ("train.warmup", "optim.warmup_steps"),
    ("train.seed", "seed"), ("data.random_seed", "seed"), ("data.vocab_size", "model.vocab_size"),
    ("train.dropout", "model.dropout"), ("model.dropout_rate", "model.dropout"), ("optim.wd", "optim.weight_decay"),
    ("optim.grad_clip", "optim.clip_norm"), ("train.gradient_accumulation_steps", "compute.microbatch"),
    ("optim.Learning-Rate", "optim.lr"), ("compute.gradient_checkpointing", "compute.remat"),
    ("eval.interval", "eval.every"), ("train.save_steps", "checkpoint.every"), ("data.dataset", "data.source"),
    ("model.intermediate_size", "model.mlp_ratio"), ("diffusion.noise_schedule", "diffusion.schedule"),
    ("diffusion.block_length", "diffusion.block_size"),
])
def test_config_keys(given, ours):
    with pytest.raises(UserError) as error:
        load_config("configs/tiny.py", [f"--config.{given}=1"])
    assert f"did you mean '{ours}'?" in str(error.value)


@pytest.mark.parametrize("section, name, ours", [
    ("optim", "learning_rate", "optim.lr"), ("train", "seq_len", "data.seq_len"),
    ("model", "d_model", "model.hidden_size")])
def test_config_keys_of_a_file(section, name, ours):
    config = copy.deepcopy(tiny.get_config().to_dict())
    config[section][name] = 1
    with pytest.raises(UserError, match=f"unknown config key '{section}.{name}': did you mean '{ours}'"):
        Config.from_dict(config)


@pytest.mark.parametrize("command, given, ours", [
    (train, "learning_rate", "--config.optim.lr"), (train, "lr", "--config.optim.lr"),
    (train, "steps", "--config.train.steps"), (train, "batch_size", "--config.train.batch_size"),
    (train, "seed", "--config.seed"), (train, "output_dir", "workdir"), (sample, "max_new_tokens", "length"),
    (sample, "temp", "temperature"), (sample, "cfg_scale", "guidance_scale"), (sample, "output", "out"),
    (eval_command, "dataset", "data"),
])
def test_flags(command, given, ours):
    with pytest.raises(UserError) as error:
        parse_flags(command.define, [f"--{given}=1"], takes_config=command.TAKES_CONFIG)
    assert str(error.value) == f"Unknown command line flag '{given}'. Did you mean: {ours}"


def test_commands_without_a_config_name_no_key():
    with pytest.raises(UserError) as error:
        parse_flags(sample.define, ["--learning_rate=1"])
    assert "config.optim.lr" not in str(error.value)


@pytest.mark.parametrize("given, ours", [("max_new_tokens", "length"), ("temp", "temperature"), ("nucleus", "top_p"),
                                         ("topk", "top_k"), ("cfg_scale", "guidance_scale")])
def test_options_of_generate(given, ours):
    with pytest.raises(UserError, match=f"unknown option '{given}': did you mean '{ours}'"):
        make_options(**{given: 1})


def test_every_name_of_ours_exists():
    known = {f"model.{key}" for kind in BACKBONES for key in default_section(kind)}
    known |= set(flatten(common.base().to_dict()))
    assert {key for keys in synonyms.CONFIG.values() for key in keys} <= known
    values = flags.FlagValues()
    from launch import bench, convert, infill, prepare, sweep
    names = set()
    for command in (train, sample, eval_command, bench, convert, infill, prepare, sweep):
        values = flags.FlagValues()
        command.define(values)
        names |= set(values)
    assert {name for names in synonyms.FLAGS.values() for name in names} <= names
