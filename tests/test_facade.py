"""What a person meets first: `import bd3lm_jax`, its help, what an editor knows of it, and training from Python."""

import pydoc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from ml_collections import ConfigDict
from toy_lm import LETTERS, make_lm
from toy_runs import ROOT, toy_config, toy_dict, write_text

import bd3lm_jax
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation.generation import Sample
from bd3lm_jax.training.train import train

TYPED = """
import bd3lm_jax
from ml_collections import ConfigDict
reveal_type(bd3lm_jax.load("x").generate(length=8))
reveal_type(bd3lm_jax.load("x").params)
reveal_type(bd3lm_jax.train.train(ConfigDict(), "x"))
"""
IMPORT = """
import sys
import bd3lm_jax
assert not {"jax", "numpy"} & set(sys.modules), "import bd3lm_jax is to stay light"
assert bd3lm_jax.train.train.__module__ == "bd3lm_jax.training.train"
assert bd3lm_jax.load.__module__ == bd3lm_jax.LM.__module__ == "bd3lm_jax.lm"
"""


def test_import_is_light_and_modules_come_when_used():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'bd3lm_jax' has no attribute 'laod'"):
        bd3lm_jax.laod


def test_help_shows_the_doors():
    text = pydoc.plain(pydoc.render_doc(bd3lm_jax))
    assert "load(path" in text and "class LM" in text and "generate(self" in text


def test_types_are_shipped_and_say_what_generate_returns():
    assert get_type_hints(bd3lm_jax.load)["return"] is bd3lm_jax.LM
    assert get_type_hints(bd3lm_jax.LM.generate)["return"] == list[Sample]
    assert Path(bd3lm_jax.__file__).with_name("py.typed").is_file()
    assert '"bd3lm_jax" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.ci_slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_types_as_an_editor_sees_them(tmp_path):
    (tmp_path / "user.py").write_text(TYPED)
    done = subprocess.run(["pyright", "--pythonpath", sys.executable, tmp_path / "user.py"], cwd=ROOT,
                          capture_output=True, text=True)
    for found in ("list[Sample]", "dict[str, Any]", "dict[str, Any]", "0 errors"):
        assert found in done.stdout, done.stdout


def test_a_model_says_what_it_is():
    assert repr(make_lm()) == "LM('', dit, masked, parameters=31,216, block_size=4, length=24, vocab_size=13)"
    assert "block_size" not in repr(make_lm(AR(bos=True), tokenizer=LETTERS))


@pytest.mark.ci_slow
def test_training_from_python_takes_what_config_files_return(tmp_path):
    write_text(tmp_path / "text.txt", 200)
    nested = toy_dict(tmp_path, {"train.steps": 2})
    assert Config.from_dict(ConfigDict(nested)) == Config.from_dict(nested) == toy_config(tmp_path, {"train.steps": 2})
    assert Config.from_dict(toy_config(tmp_path)) == toy_config(tmp_path)
    first = train(ConfigDict(nested), tmp_path / "run")
    assert (first["step"], first["workdir"]) == (2, str(tmp_path / "run"))
    lm = bd3lm_jax.load(tmp_path / "run")
    assert repr(lm).startswith(f"LM('{tmp_path / 'run'}', dit, masked, parameters=") and "step=2" in repr(lm)
    assert repr(lm.tokenizer) == "ByteTokenizer('bytes', size=257, end_id=256, mask_id=257)"


@pytest.mark.parametrize("config", ["configs/tiny.py", None, 3])
def test_what_is_no_config_is_named(config, tmp_path):
    with pytest.raises(UserError, match="the config is .*, expected what get_config"):
        train(config, tmp_path)
