"""Spellings of flags: `-` for `_`, names of earlier versions, and two of them at once."""

import importlib

import pytest

from bd3lm_jax.core.errors import UserError
from launch import arguments


def parse(command, *words):
    return arguments.parse_flags(importlib.import_module(f"launch.{command}").define, words)


@pytest.mark.parametrize("command, words, name, value", [
    ("eval", ["--draws=3"], "mc_samples", 3), ("eval", ["--mc-samples", "3"], "mc_samples", 3),
    ("eval", ["-against", "b"], "baseline", "b"), ("eval", ["--chunks=sliding"], "context_mode", "sliding"),
    ("eval", ["--within=0.1"], "nll_tolerance", 0.1), ("eval", ["--draws-per-problem=2"], "samples_per_problem", 2),
    ("eval", ["--join-within=9"], "init_timeout", 9.0), ("infill", ["--draws=2"], "mc_samples", 2),
    ("sample", ["--num=2"], "num_samples", 2), ("sample", ["--window"], "sliding_window", True),
    ("sample", ["--window", "--nowindow"], "sliding_window", False),
    ("sample", ["--no-sliding-window"], "sliding_window", False),
    ("sample", ["--forced=1:a", "--forced", "2:b"], "fixed_tokens", ["1:a", "2:b"]),
    ("sample", ["--prompt", "--num=9"], "prompt", ["--num=9"]), ("sample", ["--min-p=.5"], "min_p", 0.5),
    ("train", ["--for=v5e"], "accelerator", "v5e"), ("train", ["--stuck_after=0"], "watchdog_timeout", 0.0),
    ("bench", ["--against=torch"], "baseline", "torch"), ("bench", ["--texts=3"], "num_samples", 3),
    ("sweep", ["--give_up=0.1"], "early_stopping", 0.1), ("sweep", ["--baseline=best"], "baseline", "best"),
    ("tpu", ["--shared=d"], "shared_dir", "d"), ("prepare", ["--workers=2"], "num_workers", 2),
    ("convert", ["--max-shard=1GB"], "max_shard_size", "1GB")])
def test_spellings(command, words, name, value):
    args = parse(command, *words)
    assert args[name].value == value and args[name].present


@pytest.mark.parametrize("words, names", [
    (["--draws=1", "--mc_samples=2"], "--draws and --mc_samples"),
    (["--mc-samples=1", "--mc_samples=1"], "--mc-samples and --mc_samples"),
    (["--against", "a", "--baseline", "b"], "--against and --baseline")])
def test_two_spellings_of_one_flag(words, names):
    with pytest.raises(UserError, match=f"{names} are two spellings of one flag: give one of them"):
        parse("eval", "--workdir=w", *words)


def test_messages_name_the_flag_of_today_and_the_unknown_one_as_typed():
    with pytest.raises(UserError, match="--num_samples=0"):
        parse("sample", "--num=0")
    with pytest.raises(UserError, match="'num-sampels'. Did you mean: num_samples"):
        parse("sample", "--num-sampels=1")
    with pytest.raises(UserError, match="'shots'"):
        parse("sample", "--shots=1")
