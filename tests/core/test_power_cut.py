"""What is on the disk when power goes: everything is synced before it gets its name, and its name before it counts."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from toy_runs import toy_config

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core import files, log
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.data.tokenizers import ByteTokenizer


def make_state(step):
    return TrainState(jnp.int32(step), {"w": step + jnp.arange(5000.0)}, {}, {"m": jnp.ones(30)})


@pytest.fixture
def calls(monkeypatch):
    """(kind, path, other path) of every sync and rename, in order."""
    found, synced, replaced = [], os.fsync, os.replace

    def fsync(descriptor):
        found.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}"), ""))
        synced(descriptor)

    def replace(source, target):
        found.append(("name", os.fspath(source), os.fspath(target)))
        replaced(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return found


def test_a_step_is_on_the_disk_before_it_has_its_name_and_before_older_ones_go(tmp_path, calls, monkeypatch):
    removed, directory = [], tmp_path / "checkpoints"
    synced = files.sync

    def sync(path):
        there = {name for name in os.listdir(directory) if name.isdecimal()} if directory.exists() else set()
        synced(path)
        removed.append((os.fspath(path), there))

    monkeypatch.setattr(files, "sync", sync)
    with Checkpoints(tmp_path, 1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {}, wait=True)
            target = str(directory / str(step))
            (named,) = [i for i, (kind, _, other) in enumerate(calls) if (kind, other) == ("name", target)]
            written = calls[named][1]
            before = {path for kind, path, _ in calls[:named] if kind == "sync" and path.startswith(written)}
            content = {os.path.join(written, path.relative_to(target)) for path in Path(target).rglob("*")}
            assert len(content) > 8 and content | {written} <= before
            assert ("sync", str(directory), "") in calls[named:]
        at_the_name = [there for path, there in removed if path == str(directory)]
        assert {"1", "2"} in at_the_name, "step 1 goes only after the name of step 2 is on the disk"
        assert checkpoints.steps() == [2]


def test_files_of_a_run_that_goes_on_are_not_written_again(tmp_path, calls):
    config = rundir.resolve(toy_config(tmp_path), ByteTokenizer())
    rundir.create_or_validate(tmp_path / "run", config, ByteTokenizer())
    assert [Path(target).name for kind, _, target in calls if kind == "name"] == ["tokenizer.json", "config.json"]
    calls.clear()
    rundir.create_or_validate(tmp_path / "run", config, ByteTokenizer())
    assert not [call for call in calls if call[0] == "name"]


def test_metrics_are_on_the_disk_before_the_step_they_tell_of(tmp_path, calls):
    with log.RunLog(tmp_path, 2, quiet=True) as run:
        run.metrics(1, {"train/loss": 1.0})
        calls.clear()
        run.sync()
    assert calls == [("sync", str(tmp_path / "metrics.jsonl"), "")]
