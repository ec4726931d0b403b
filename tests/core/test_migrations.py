"""Config keys by the names of earlier versions, wherever a config is read."""

import json

import pytest

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.config import Config, decisive_hash
from bd3lm_jax.core import migrations
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import flatten
from bd3lm_jax.data.tokenizers import ByteTokenizer
from launch.arguments import load_config
from launch.sweep import load_points

# of configs/tiny.py before any renaming
FIRST_HASH = "7e1e094d23ac0fa4e2894f41de28228e301037aa2f33fc4da0a6ed778da7bbba"
CONFIG_FILE = """
from configs import common

def get_config():
    config = common.base()
    config.model.update(layers=2, width=64, heads=2)
    config.data.update(length=64, layout="pad")
    config.train.batch = 4
    config.train.views = config.train.batch // 2
    config.optim.ema = 0.5
    config.train.steps = config.data.get_ref("length") * 2
    common.set_algo(config, "mdlm", 0)
    return config

def sweep():
    yield {"train.batch": 8}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "early.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def with_first_names(nested: dict) -> dict:
    return {section: {migrations.first_name(f"{section}.{key}").partition(".")[2]: value
                      for key, value in values.items()} if isinstance(values, dict) else values
            for section, values in nested.items()}


def test_hashes_stay_what_they_were():
    config = load_config("tiny", [])
    assert config.sha256() == decisive_hash(with_first_names(config.to_dict())) == FIRST_HASH


def test_names():
    assert migrations.current_name("train.batch") == "train.batch_size" != "train.batch"
    assert migrations.first_name("train.batch_size") == "train.batch"
    assert migrations.first_name("train.steps") == migrations.current_name("train.steps") == "train.steps"
    for section, names in migrations.RENAMED.items():
        assert not names.keys() & set(names.values())
        for first, current in names.items():
            assert migrations.current_name(f"{section}.{first}") == f"{section}.{current}"
            assert migrations.first_name(f"{section}.{current}") == f"{section}.{first}"


@pytest.mark.parametrize("spec", ["tiny", "tiny:algo=adversarial"])
def test_nested_mappings_and_command_lines_take_both_names(spec):
    config = load_config(spec, [])
    first = with_first_names(config.to_dict())
    renamed = flatten(first).keys() - flatten(config.to_dict()).keys()
    assert {"model.layers", "data.length", "train.batch", "optim.ema", "noise.adapt", "eval.draws"} <= renamed
    assert Config.from_dict(first) == config
    values = flatten(first)
    assert load_config(spec, [f"--config.{key}={values[key]}" for key in sorted(renamed)]) == config


def test_config_files_may_set_and_read_the_first_names(config_file):
    config = load_config(config_file, ["--config.data.length=32"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (2, 64, 2)
    assert (config.data.seq_len, config.data.packing, config.train.steps, config.block_size) == (32, "pad", 64, 32)
    assert (config.train.batch_size, config.train.noise_samples, config.optim.ema_decay) == (4, 2, 0.5)
    (point,) = load_points(config_file, [])
    assert point.config.train.batch_size == 8 and point.overrides == {"train.batch": 8}
    with pytest.raises(UserError, match="'train.batch' is given on the command line and by sweep"):
        load_points(config_file, ["--config.train.batch_size=2"])


def test_two_names_of_one_key_are_refused(tmp_path):
    message = "two names of one config key: leave 'train.batch' out"
    with pytest.raises(UserError, match=message):
        load_config("tiny", ["--config.train.batch=4", "--config.train.batch_size=4"])
    nested = load_config("tiny", []).to_dict()
    nested["train"]["batch"] = 8
    with pytest.raises(UserError, match=f"'train.batch_size' and 'train.batch' are {message}"):
        Config.from_dict(nested)
    (tmp_path / "both.py").write_text(f"def get_config():\n    return {nested!r}\n")
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "both.py"), [])


def test_a_run_directory_with_the_first_names_goes_on(tmp_path):
    config = load_config("tiny", []).with_vocab(258)
    rundir.create_or_validate(tmp_path, config, ByteTokenizer())
    stored = with_first_names(config.to_dict())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"config_sha256": config.sha256()}))
    assert rundir.read(tmp_path)[0] == config
    rundir.create_or_validate(tmp_path, config, ByteTokenizer())
    assert json.loads((tmp_path / "config.json").read_text())["train"]["batch_size"] == config.train.batch_size
