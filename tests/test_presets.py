"""`--config=NAME` from any folder, and messages that name the command which was typed."""

import sys

import pytest

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core.errors import UserError, command_line
from launch import arguments
from launch.__main__ import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec, block_size", [
    ("tiny", 4), ("tiny:block_size=16", 16), ("configs/tiny.py", 4), ("configs/tiny.py:block_size=8", 8),
    ("sweeps/family", 4), (arguments.DEFAULT_CONFIG, 4)])
def test_presets_from_an_empty_folder(folder, spec, block_size):
    assert arguments.load_config(spec, []).diffusion.block_size == block_size


def test_a_file_of_the_folder_comes_before_a_preset_of_the_same_path(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.py").write_text(
        "from configs import austen\n\n\ndef get_config():\n    config = austen.get_config('')\n"
        "    config.diffusion.block_size = 2\n    return config\n")
    assert arguments.load_config("configs/tiny.py", []).diffusion.block_size == 2
    assert arguments.load_config("tiny", []).diffusion.block_size == 4
    (folder / "tiny").write_text("a file of that name")
    assert arguments.load_config("tiny", []).diffusion.block_size == 4


@pytest.mark.parametrize("spec, message", [
    ("tinny", "did you mean 'tiny'"), ("configs/tinny.py", "did you mean 'configs/tiny.py'"), ("common", "known: "),
    ("tiny:block=3", "unknown config argument 'block=3'"), ("zz/yy.py", "known: configs/adapt.py")])
def test_unknown_presets(folder, spec, message):
    with pytest.raises(UserError, match=message):
        arguments.load_config(spec, [])


def test_a_file_of_ones_own_is_suggested(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "quetzal.py").write_text("")
    with pytest.raises(UserError, match="did you mean 'configs/quetzal.py'"):
        arguments.load_config("configs/quetzl.py", [])


@pytest.mark.parametrize("argv, program", [(["/usr/bin/bd3lm", "train"], "bd3lm"),
                                           (["/home/me/launch/__main__.py"], "python -m launch"),
                                           (["-c"], "python -m "
                                            "launch"), ([], "python -m launch")])
def test_the_command_that_was_typed(folder, monkeypatch, capsys, argv, program):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line("train") == f"{program} train"
    with pytest.raises(UserError, match=f"train first .{program} train --workdir=nowhere"):
        rundir.read("nowhere")
    other = "bd3lm " if program != "bd3lm" else "python -m launch "
    for words in ([], ["train", "--help"], ["eval", "--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert f"  {program} " in text and f" {other}" not in text
