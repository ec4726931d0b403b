"""The package as people install it: a wheel built, installed and used from an empty folder."""

import json
import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILDER = PROJECT["build-system"]["requires"][0].partition(">=")[2]
SMALL = ("--config.train.steps=2", "--config.train.batch_size=4", "--config.data.tokenizer=bytes",
         "--config.data.seq_len=32",
         "--config.model.num_layers=1", "--config.model.hidden_size=32", "--config.model.num_heads=2",
         "--config.eval.rows=4",
         "--config.eval.batch_size=4", "--config.eval.report_rows=4", "--config.eval.num_samples=1",
         "--config.eval.sample_length=32")

pytestmark = [
    pytest.mark.ci_slow,
    pytest.mark.skipif(int(version("setuptools").partition(".")[0]) < int(BUILDER), reason="an old setuptools"),
]


class Installed:
    """A virtual environment with the wheel, and an empty folder to work in."""

    def __init__(self, home: Path):
        self.python, self.folder, self._cache = home / "env" / "bin" / "python", home / "empty", home / "cache"
        self.folder.mkdir()

    def run(self, *argv: str | Path, code: int = 0, folder: Path | None = None) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"BD3LM_CACHE": str(self._cache)}
        done = subprocess.run(argv, cwd=folder or self.folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    def bd3lm(self, *argv: str, code: int = 0, folder: Path | None = None) -> subprocess.CompletedProcess:
        return self.run(self.python.with_name("bd3lm"), *argv, code=code, folder=folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Dependencies are those of this interpreter; the checkout is not on the path."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "bd3lm_jax", "launch", "configs"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", home, source], check=True)
    venv.create(home / "env")
    result = Installed(home)
    subprocess.run([*pip, "--python", result.python, "install", "--no-deps", *home.glob("*.whl")], check=True)
    site = next((home / "env").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))
    return result


def test_python_imports_what_was_installed(installed):
    code = ("import bd3lm_jax, configs, launch; from importlib.metadata import version\n"
            "print(bd3lm_jax.__version__ == version('bd3lm_jax')); print(bd3lm_jax.__file__)")
    same, file = installed.run(installed.python, "-c", code).stdout.split()
    assert same == "True" and Path(file).is_relative_to(installed.python.parents[1])


def test_help_names_the_command(installed):
    for words in ([], ["train", "--help"], ["bench", "--help"]):
        text = installed.bd3lm(*words).stdout
        assert "  bd3lm " in text and "python -m launch" not in text


@pytest.fixture(scope="module")
def trained(installed):
    return json.loads(installed.bd3lm("train", "--config=tiny", *SMALL).stdout.splitlines()[-1])


def test_train_and_sample(installed, trained):
    assert (trained["step"], trained["workdir"]) == (2, "runs/tiny")
    assert (installed.folder / "runs/tiny/config.json").is_file()
    done = installed.bd3lm("sample", "--workdir=runs/tiny", "--num_samples=1", "--length=8")
    assert len(json.loads(done.stdout.splitlines()[-1])["samples"]) == 1


def test_sweep_starts_what_was_typed(installed):
    commands = installed.bd3lm("sweep", "--dry_run").stderr
    assert commands.count("/bd3lm train --config=configs/tiny.py --config.diffusion.block_size=") == 3


@pytest.mark.parametrize("words", [(), ("--config=tiny",), ("--config=tiny:block_size=16",),
                                   ("--config=configs/tiny.py",), ("--config=sweeps/family",)])
def test_presets_are_found(installed, words):
    done = installed.bd3lm("train", *words, "--config.optim.lrr=1", code=2)
    assert "unknown config key 'optim.lrr'" in done.stderr


def test_messages_name_the_command(installed):
    assert "(bd3lm train --workdir=" in installed.bd3lm("sample", "--workdir=./nowhere", code=2).stderr
    done = installed.run(installed.python, "-m", "launch", "sample", "--workdir=./nowhere", code=2)
    assert "(python -m launch train --workdir=" in done.stderr


def test_a_folder_with_names_of_ours(installed, tmp_path):
    """Files of the working directory stand in the place of nothing, and a plug-in among them is found."""
    for name in ("configs", "launch", "bd3lm_jax"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "mine.py").write_text("print('mine')")
    words = ("train", "--config=tiny", "--import=mine", "--config.optim.lrr=1")
    done = installed.bd3lm(*words, code=2, folder=tmp_path)
    assert "unknown config key 'optim.lrr'" in done.stderr and "mine" in done.stdout
