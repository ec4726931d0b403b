"""Runs that are told to stop, killed, or left without disk space, and what the same command does next."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from grids import some
from toy_runs import ROOT, environment, losses, steps_saved, toy_config, toy_dict, write_text

import bd3lm_jax.training.train as training
from bd3lm_jax.core.errors import Preempted
from bd3lm_jax.training import program
from bd3lm_jax.training.train import train

# A run in a process of its own: sys.argv[1] is a config in JSON, sys.argv[2] the work directory.
RUN = """
import json, sys
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.training.train import train
try:
    print(json.dumps(train(Config.from_dict(json.loads(sys.argv[1])), sys.argv[2])))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted")
    write_text(directory / "text.txt", 80)
    return directory


@pytest.fixture(scope="module")
def whole(home):
    """A run of six steps that nothing disturbed."""
    train(toy_config(home, {"checkpoint.every": 3, "eval.every": 3}), str(home / "whole"))
    return home / "whole"


# ---- SIGTERM, sent by this process to itself


def tells(monkeypatch, owner, name, when=lambda *_, **__: True):
    """From now on a call of `owner.name` sends SIGTERM first."""
    original = getattr(owner, name)

    def telling(*arguments, **options):
        if when(*arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, telling)


@pytest.mark.ci_slow
@pytest.mark.parametrize(("moment", "saved"), [
    ((training, "prepare"), []), ((program.Program, "initial_state"), []), ((training.report, "write_report"), [3, 6])])
def test_sigterm_with_nothing_to_save_ends_the_run_at_once(home, whole, tmp_path, monkeypatch, moment, saved):
    workdir = tmp_path / "run"
    if saved:
        shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("report.json"))
    with monkeypatch.context() as patched, pytest.raises(Preempted, match="run the same command again"):
        tells(patched, *moment)
        train(toy_config(home), str(workdir))
    assert (steps_saved(workdir) if workdir.exists() else []) == saved
    assert train(toy_config(home), str(workdir))["step"] == 6
    assert losses(workdir) == losses(whole)


@pytest.mark.parametrize("during", [True, False])
def test_sigterm_is_not_kept_waiting_by_a_validation(home, whole, tmp_path, monkeypatch, during):
    """Told during the validation of step 3, or before it: step 3 is saved without, and the run goes on bit for bit."""
    config, measured = toy_config(home, {"eval.every": 3, "eval.batch_size": 1}), []
    with monkeypatch.context() as patched, pytest.raises(Preempted, match="after step 3, which is saved"):
        if during:
            tells(patched, training.Evaluator, "_documents")  # after the first batch
            patched.setattr(training.Validator, "__call__", lambda *a, original=training.Validator.__call__, **b: (
                measured.append(0), original(*a, **b), measured.append(1))[1])
        else:
            tells(patched, training, "_read", lambda run, pending, clock: pending[0] == 1)
            patched.setattr(training.Validator, "__call__", lambda *_, **__: measured.append(0))
        train(config, str(tmp_path))
    assert measured == [0] * during, "begun, and not done"
    assert steps_saved(tmp_path) == [3] == [max(losses(tmp_path))]
    train(config, str(tmp_path))
    assert losses(tmp_path) == losses(whole)


# ---- processes


def started(config, workdir, code=RUN):
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(config), str(workdir)], env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, workdir, step):
    wait_until(process, lambda: max(losses(workdir), default=0) >= step)


def wait_until(process, there):
    deadline = time.monotonic() + 240
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.ci_slow
def test_killed_runs_go_on_bit_for_bit(home, tmp_path):
    """SIGKILL in the middle, of a run with slow steps that cannot end before, then the same command again."""
    config = toy_dict(home, {"train.steps": 200, "checkpoint.every": 7})
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    first = started(config, killed, "from toy_runs import slow_down\nslow_down(0.1)\n" + RUN)
    wait_for_step(first, killed, 20)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    done = max(losses(killed))
    assert done < 200
    for workdir in (killed, undisturbed):
        process = started(config, workdir)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert ("continuing from step" in errors) == (workdir == killed)
    assert losses(killed) == losses(undisturbed) and len(losses(killed)) == 200


@pytest.mark.ci_slow
def test_sigterm_saves_and_exits_42(home, tmp_path):
    config = toy_dict(home, {"train.steps": 2000, "checkpoint.every": 1000})
    first = started(config, tmp_path)
    wait_for_step(first, tmp_path, 5)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 42, errors
    saved, = steps_saved(tmp_path)
    assert f"stopped by SIGTERM after step {saved}, which is saved" in errors and saved == max(losses(tmp_path))
    config["train"]["steps"] = saved + 3
    second = started(config, tmp_path)
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"continuing from step {saved} " in errors
    assert json.loads(output.splitlines()[-1])["step"] == saved + 3
    assert sorted(losses(tmp_path)) == list(range(1, saved + 4))


@pytest.mark.ci_slow
def test_sigterm_in_the_start_of_a_command_exits_42(home, tmp_path):
    """While the libraries load, then while the first state is made; the third start is left alone."""
    config, workdir = toy_dict(home, {}), tmp_path / "run"
    (tmp_path / "toy.py").write_text(f"from ml_collections import ConfigDict\n"
                                     f"def get_config():\n    return ConfigDict({config!r})\n")
    words = [sys.executable, "-m", "launch", "train", f"--config={tmp_path / 'toy.py'}", f"--workdir={workdir}"]
    signs = {"loading": lambda: listens(process.pid), "first state": (workdir / "config.json").exists, "none": None}
    for sign in signs.values():
        process = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        if sign:
            wait_until(process, sign)
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (42 if sign else 0), errors
        assert ("run the same command again" in errors.splitlines()[-1]) == bool(sign)
    assert sorted(losses(workdir)) == list(range(1, 7))


def listens(pid):
    """Whether a process has a handler of SIGTERM."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line.split()[1] for line in file if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.ci_slow
def test_a_full_disk_while_saving(home, tmp_path):
    """Files may not grow beyond 20 kB; the parameters take more."""
    code = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
           "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + RUN
    train(toy_config(home, {"train.steps": 1}), str(tmp_path / "prepared"))  # the limit is not for the prepared rows
    environment_without_cache = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(toy_dict(home, {})), str(tmp_path / "run")],
                          env=environment_without_cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "could not save a checkpoint to" in done.stderr  # among what threads of Orbax and TensorStore may write
    assert "Free some disk space and run the same command again" in done.stderr
    assert steps_saved(tmp_path / "run") == [] and os.path.exists(tmp_path / "run" / "config.json")


@pytest.mark.parametrize("command", some(["eval", "train", "nonsense"], 1))
def test_sigterm_before_anything_is_imported_exits_42(tmp_path, command):
    """The first import of a command waits; no library is there yet."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(f"""
        import os, sys
        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name.startswith("bd3lm_jax"):
                    os.mkfifo({str(tmp_path / "waits")!r})
                    open({str(tmp_path / "waits")!r}).read()
        sys.meta_path.insert(0, Slow())
    """))
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    process = subprocess.Popen([sys.executable, "-m", "launch", command], env=environment() | {"PYTHONPATH": path},
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(process, (tmp_path / "waits").exists)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (42, "error: stopped by SIGTERM: run the same command again\n")
