"""Plug-ins: a module outside the package adds one of each kind, by --import, an entry point or a plain import."""

import importlib
import importlib.metadata
import json
import sys

import pytest
from ml_collections import ConfigDict
from toy_runs import ROOT, toy_dict, write_text

import bd3lm_jax
from bd3lm_jax.config import Config
from bd3lm_jax.core import plugins
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.corpora import SOURCES
from bd3lm_jax.diffusion import OBJECTIVES
from bd3lm_jax.diffusion.schedule import SCHEDULES
from bd3lm_jax.generation.sampling import SAMPLERS
from bd3lm_jax.models import BACKBONES
from bd3lm_jax.training.train import train
from configs import common
from launch.__main__ import main

OUTSIDE = '''
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from bd3lm_jax.data.corpora import SOURCES, Corpus
from bd3lm_jax.diffusion import OBJECTIVES, Masked
from bd3lm_jax.diffusion.schedule import SCHEDULES, Power
from bd3lm_jax.models import BACKBONES, Entry, dit
from bd3lm_jax.generation.sampling.steps import SAMPLERS, Plan, Sampler
from configs import common


@dataclasses.dataclass(frozen=True)
class Halves(Masked):
    kind: ClassVar[str] = "halves"


@dataclasses.dataclass(frozen=True)
class Small(dit.DiTConfig):
    kind: ClassVar[str] = "small"


class Cubic(Power):
    pass


def rightmost(key, row, steps, threshold):
    place = jnp.max(jnp.where(row.masked, jnp.arange(row.masked.shape[0]), -1))
    reveal = jnp.arange(row.masked.shape[0]) == place
    return Plan(reveal, jnp.zeros_like(reveal), row.level, row.level)


def numbers(data, split):
    return Corpus(lambda: (f"number {i} of {split}" for i in range(60)), lambda: "numbers")


OBJECTIVES["halves"] = Halves
BACKBONES["small"] = Entry(Small, dit.build, dit.SHARDING)
SCHEDULES["cubic"] = Cubic(3.0)
SAMPLERS["rightmost"] = Sampler(rightmost)
SOURCES["numbers"] = numbers
common.OBJECTIVES["halves"] = ({"corruption": "exact_count"}, {})
'''
REGISTRIES = (OBJECTIVES, BACKBONES, SCHEDULES, SAMPLERS, SOURCES, common.OBJECTIVES)
SMALL = ("--config.model.num_layers=1", "--config.model.hidden_size=32", "--config.model.num_heads=2",
         "--config.train.batch_size=8",
         "--config.data.tokenizer=bytes", "--config.data.seq_len=32", "--config.train.steps=2",
         "--config.eval.num_samples=0", "--config.optim.warmup_steps=0", "--config.optim.schedule=constant")


def forget(name: str = "outside") -> None:
    """As in a process that has not imported the plug-in."""
    sys.modules.pop(name, None)
    plugins._requested.clear()
    for registry in REGISTRIES:
        for key in ("halves", "small", "cubic", "rightmost", "numbers"):
            registry.pop(key, None)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "outside.py").write_text(OUTSIDE)
    importlib.invalidate_caches()
    yield tmp_path
    forget()


def run(capsys, *words: str) -> tuple[int, str]:
    """Exit code, and the last line that was said."""
    code = main(list(words))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, (captured.out if code == 0 else captured.err).strip().splitlines()[-1]


@pytest.mark.ci_slow
def test_one_of_each_kind_trains_evaluates_and_samples(outside, capsys):
    workdir = f"--workdir={outside / 'run'}"
    code, said = run(capsys, "train", "--import=outside", workdir, "--config=configs/tiny.py:algo=halves,block_size=4",
                     *SMALL, "--config.data.source=numbers", "--config.diffusion.schedule=cubic",
                     "--config.diffusion.corruption=bernoulli")
    assert code == 0, said
    stored = json.loads((outside / "run" / "config.json").read_text())
    assert (stored["imports"], stored["diffusion"]["kind"]) == (["outside"], "halves")
    for words in (("eval", workdir, "--split=valid"),
                  ("sample", workdir, "--num_samples=1", "--length=16", "--sampler=rightmost")):
        code, said = run(capsys, *words, "--import=outside")
        assert code == 0, said

    forget()
    code, said = run(capsys, "eval", workdir)
    assert code == 2 and "outside (unknown" not in said
    assert "trained with plug-ins that are not imported here, outside (" in said and "add --import=outside" in said
    assert "outside" not in sys.modules, "a run directory is no reason to run code"
    with pytest.raises(UserError, match="add --import=outside, in Python import them"):
        bd3lm_jax.load(outside / "run")
    importlib.import_module("outside")
    assert bd3lm_jax.load(outside / "run").config.diffusion.kind == "halves"


@pytest.mark.ci_slow
def test_a_module_that_a_config_file_imports_is_recorded(outside):
    """What a config file imports is not named on the command line, and the run needs it all the same."""
    importlib.import_module("outside")
    write_text(outside / "text.txt", 60)
    nested = toy_dict(outside, {"train.steps": 1})
    nested["model"]["kind"] = "small"
    train(ConfigDict(nested), outside / "run")
    forget()
    with pytest.raises(UserError, match="not imported here, outside .unknown backbone model.kind 'small'"):
        bd3lm_jax.load(outside / "run")


@pytest.mark.ci_slow
def test_runs_without_plugins_name_none(outside):
    write_text(outside / "text.txt", 60)
    train(toy_dict(outside, {"train.steps": 1}), outside / "run")
    assert "imports" not in json.loads((outside / "run" / "config.json").read_text())


@pytest.mark.parametrize("name, source, message", [
    ("nowhere", None, "--import=nowhere: no module nowhere in this folder or on PYTHONPATH"),
    ("folder.nowhere", None, "--import=folder.nowhere: no module folder in this folder"),
    ("outside.py", None, "--import=outside.py: no module outside.py in this folder"),
    ("my/file.py", None, "--import=my/file.py: expected the name of a module"),
    ("", None, "--import=: expected the name of a module"),
    ("broken", "def f(:", "--import=broken cannot be imported: SyntaxError"),
    ("raises", "1 / 0", "--import=raises cannot be imported: ZeroDivisionError: division by zero"),
    ("leaves", "raise SystemExit(0)", "--import=leaves cannot be imported: SystemExit"),
    ("needs", "import no_such_package", "--import=needs: it needs the package 'no_such_package', which is not inst"),
])
def test_modules_that_cannot_be_imported_are_one_line(outside, capsys, name, source, message):
    if source is not None:
        (outside / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
    code, said = run(capsys, "bench", f"--import={name}")
    assert code == 2 and message in said


def test_what_a_foreign_directory_names_is_data(outside):
    """Whatever stands under "imports" of a config.json, nothing is imported."""
    for names in (["outside"], "outside", [3, None, "outside"], {"a": 1}, None):
        assert plugins.missing(names) in (["outside"], [])
    assert "outside" not in sys.modules


def test_entry_points_and_the_variable_are_read_once(outside, monkeypatch, capsys):
    entries = [importlib.metadata.EntryPoint("mine", "outside", "bd3lm_jax.plugins"),
               importlib.metadata.EntryPoint("broken", "no_such_module", "bd3lm_jax.plugins")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(plugins, "_installed_loaded", False)
    with pytest.raises(UserError, match="unknown objective"):
        Config.from_dict({**toy_dict(outside, {}), "diffusion": {"kind": "halvse"}})
    assert "halves" in OBJECTIVES
    assert "warning: plug-in 'broken' (no_such_module) is passed over: ModuleNotFoundError" in capsys.readouterr().err

    forget()
    monkeypatch.setattr(plugins, "_installed_loaded", False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setenv(plugins.VARIABLE, "outside")
    plugins.load_installed()
    assert "halves" in OBJECTIVES
    monkeypatch.setattr(plugins, "_installed_loaded", False)
    monkeypatch.setenv(plugins.VARIABLE, "nowhere")
    with pytest.raises(UserError, match="BD3LM_IMPORT=nowhere: no module nowhere"):
        plugins.load_installed()


def test_a_sweep_hands_its_imports_to_its_runs(outside):
    from launch.arguments import common as common_flags
    from launch.sweep import load_points

    assert common_flags(["--import=outside", "--index=2", "--", "--import=x"]) == ["--index=2", "--", "--import=x"]
    assert all(point.command[-1] == "--import=outside" for point in load_points("configs/tiny.py", []))
