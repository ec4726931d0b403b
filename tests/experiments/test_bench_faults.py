"""The fault campaign: small ones that find nothing, and faults put there by hand, which it must find."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax.checkpoints import checkpoint
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core import files
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.experiments.bench import BENCHES, damage, faults, faults_files, kills, power
from bd3lm_jax.parallel.fingerprint import fingerprints_by_device
from launch import arguments, train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step):
    values = jnp.asarray(np.random.default_rng(step).standard_normal((64, 64)), jnp.float32)  # incompressible
    return TrainState(jnp.int32(step), {"w": values}, {"w": 2 * values}, {"m": 3 * values})


class Offline(kills.Runs):
    """What an undisturbed run of six steps left, without the run: every second step is saved."""

    def __init__(self, home):
        self.home, self.processes, self.steps, self.whole = home, 1, 6, home / "whole"
        self._truth, self.abstract = {}, jax.eval_shape(lambda: make_state(0))
        self.losses = {step: 1 / step for step in range(1, 7)}
        self.write(self.whole, 9)

    def write(self, workdir, keep, make=make_state):
        with Checkpoints(workdir, keep) as checkpoints:
            for step in (2, 4, 6):
                checkpoints.save(step, make(step), {})
        lines = [json.dumps({"step": step, "train/loss": loss}) + "\n" for step, loss in self.losses.items()]
        (workdir / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def runs(tmp_path):
    return Offline(tmp_path)


def test_a_run_as_it_should_be_has_no_faults(runs, tmp_path):
    runs.write(tmp_path / "run", 3)
    assert runs.faults_of(tmp_path / "run", {2, 4, 6}) == [] == runs.faults_at_end(tmp_path / "run")
    assert kills.steps_of(tmp_path / "run") == [2, 4, 6]


def test_a_lost_checkpoint_is_found(runs, tmp_path):
    runs.write(tmp_path / "run", 3)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert runs.faults_of(tmp_path / "run", {4, 6}) == ["step 6 is lost"]
    assert runs.faults_of(tmp_path / "run", {2, 4}) == [], "what was never complete is not lost"
    assert runs.faults_at_end(tmp_path / "run") == ["the last step is missing"]


def test_a_damaged_checkpoint_is_found(runs, tmp_path):
    runs.write(tmp_path / "run", 3)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "params")
    (said,) = runs.faults_of(tmp_path / "run", {2, 4, 6})
    assert "checkpoints/4 is damaged" in said


def test_other_values_and_losses_are_found(runs, tmp_path):
    """Whole checkpoints of a run that went another way after step 2."""
    runs.write(tmp_path / "run", 3, lambda step: make_state(step).replace(params=make_state(2).params))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.25", "0.25000001"))
    differing = [f"step {step} is not that of the undisturbed run" for step in (4, 6)]
    assert runs.faults_of(tmp_path / "run", set()) == differing
    assert runs.faults_at_end(tmp_path / "run") == [*differing, "other losses at [4]"]


def test_another_exit_code_is_found(runs, tmp_path):
    def ends_with(code):
        return subprocess.Popen([sys.executable, "-c", f"import os; os._exit({code})"])

    runs.write(tmp_path / "run", 3)
    (tmp_path / "run.0.log").write_text("error: words\n")
    assert runs.faults_of_ended(tmp_path / "run", [ends_with(0)]) == []
    assert runs.faults_of_ended(tmp_path / "run", [ends_with(3)]) == ["exit codes [3]: error: words\n"]
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert kills._code(sleeper, 0.1) == 137


def test_one_of_two_processes_leaves_in_the_time_it_is_given(runs, tmp_path, monkeypatch):
    """Both join and miss each other sooner than they are killed for it; what a fault asks for has the last word."""
    started = []
    monkeypatch.setattr(kills.subprocess, "Popen", lambda words, **_: started.append(words))
    runs.processes = 2
    for flags, heartbeat in (((), 10), (("--heartbeat_timeout=100",), 100)):
        runs.start(tmp_path / "run", *flags)
        for words in started[-2:]:
            args = arguments.parse_flags(train.define, [word for word in words[4:] if "--config." not in word])
            assert (args.heartbeat_timeout, args.distributed, args.num_processes) == (heartbeat, True, 2)
            assert args.init_timeout < kills.LEAVE_S
    assert [word for words in started for word in words if word.startswith("--process_id")] == [
        "--process_id=0", "--process_id=1"] * 2


def test_flipped_bits_are_detected_or_harmless(runs):
    """Of ten flips some hit an array; without fingerprints these would be used, and the campaign says so."""
    found = {fault["variant"]: fault for fault in damage.campaign(runs, 5, seed=0)}
    assert tuple(found) == damage.KINDS
    assert [fault["times"] for fault in found.values()] == [10, 5, 5, 4]
    for fault in found.values():
        assert fault["wrong"] == 0 and sum(fault["outcomes"].values()) == fault["times"], fault
        assert set(fault["outcomes"]) <= {"detected", "harmless"} and fault["outcomes"]["detected"] > 0


def test_values_used_silently_are_counted(runs, monkeypatch):
    """Where a restore takes every fingerprint for right, the campaign says that wrong values were used."""
    class Right(int):
        def __ne__(self, other):
            return False

    monkeypatch.setattr(checkpoint, "fingerprints_by_device", lambda tree: {
        path: list(map(Right, values)) for path, values in fingerprints_by_device(tree).items()})
    flips = next(damage.campaign(runs, 5, seed=0))
    assert flips["outcomes"]["used silently"] == flips["wrong"] == len(flips["details"]) > 0


def test_every_fault_has_its_promise():
    assert BENCHES["faults"] is faults
    assert {limit.variant for limit in faults.LIMITS} == {
        *damage.KINDS, *faults_files.KINDS, *kills.KINDS, power.KIND}


class Ended(Offline):
    """Every run has ended, with a certain exit code, when its first step is seen."""

    code = 0

    def start(self, workdir, *flags):
        if not workdir.exists():
            self.write(workdir, 3)
        self._log(workdir, 0).write_text("error: words\n")
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({self.code})"])
        process.wait()
        return [process]


@pytest.mark.parametrize(("code", "outcome", "wrong"), [
    (0, "ended before the disk was full", 0), (1, "exit code 1", 1), (3, "exit code 3", 1)])
def test_a_run_that_ends_before_the_disk_is_full_shows_nothing(tmp_path, code, outcome, wrong):
    """But one that failed is wrong, whenever that was."""
    runs = Ended(tmp_path)
    runs.code = code
    found = kills.full_disk(runs)
    assert found["outcomes"] == {outcome: 1} and min(found["wrong"], 1) == wrong, found


@pytest.mark.ci_slow
def test_two_kills_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(kills.STEPS, 1, 150)  # the disk is full after ten of them, however busy the machine is
    runs = kills.Runs(tmp_path, 1)
    found = kills.kill(runs, 2, seed=0)
    assert (found["variant"], found["times"], found["wrong"]) == ("SIGKILL", 2, 0), found
    assert found["outcomes"]["runs that ended as undisturbed"] >= 1
    full = kills.full_disk(runs)
    assert (full["wrong"], full["outcomes"]) == (0, {"exit code 1": 1}), full


@pytest.mark.slow
def test_kills_and_stops_of_two_processes(tmp_path, monkeypatch):
    monkeypatch.setitem(kills.STEPS, 2, 20)
    runs = kills.Runs(tmp_path, 2)
    for found in (kills.stop_one(runs), kills.mismatched_replicas(runs), kills.kill(runs, 2, seed=0)):
        assert found["wrong"] == 0, found


@pytest.mark.slow
def test_power_cuts(tmp_path):
    """Where no file system can be mounted nothing was tried, and the outcome says so."""
    found = power.power_cuts(kills.Runs(tmp_path, 1), 2, seed=0)
    assert found["wrong"] == 0 and (found["times"] == 2 or "not possible here" in str(found["outcomes"])), found


def test_a_disk_holds_what_was_synced_when_power_is_cut(tmp_path):
    """The fault itself: what was written and not synced is gone."""
    try:
        with power.Disk(tmp_path) as disk:
            files.write(disk.path / "synced", b"a" * 5000)
            (disk.path / "written").write_bytes(b"b" * 5000)
            disk.cut()
            with pytest.raises(OSError):
                files.write(disk.path / "after", b"c")
            disk.power_on()
            assert (disk.path / "synced").read_bytes() == b"a" * 5000
            left = disk.path / "written"
            assert not left.exists() or left.read_bytes() != b"b" * 5000
    except (RunError, FileNotFoundError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
