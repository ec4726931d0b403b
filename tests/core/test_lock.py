"""One writer at a time: who is refused, and what never is in the way."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
from places import ROOT
from toy_runs import toy_config, write_text

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core import lock
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.training.train import train

HOLD = """
import sys, time
from pathlib import Path
from bd3lm_jax.core import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(lock, "WAIT_S", 0.2)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "train.lock")], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named(tmp_path, holder):
    with pytest.raises(UserError) as error:
        with lock.hold(tmp_path / "train.lock"):
            raise AssertionError("two hold it")
    host, pid = os.uname().nodename, holder.pid
    assert f"{tmp_path} is written by another run (pid {pid} on {host} since 20" in str(error.value)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    with lock.hold(tmp_path / "train.lock"):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()
    with lock.hold(tmp_path / "train.lock"):
        pass


@pytest.mark.parametrize("text", [
    '{"pid": 1, "host": "elsewhere", "since": "2999-01-01T00:00:00+00:00"}', "", "{", "[1]", "\x00" * 9])
def test_what_a_stale_file_says_blocks_nobody(tmp_path, text):
    """Process 1 is alive, and a clock that was wrong wrote a time in the future."""
    (tmp_path / "train.lock").write_text(text)
    with lock.hold(tmp_path / "train.lock"):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()


def test_a_holder_that_left_no_text_is_refused_as_well(tmp_path):
    with open(tmp_path / "train.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another run \(train.lock does not say which\)"):
            with lock.hold(tmp_path / "train.lock"):
                raise AssertionError("two hold it")


def test_where_files_cannot_be_locked_a_note_says_so(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path / "train.lock"):
        assert "cannot be locked here (No locks available)" in capsys.readouterr().err


def test_training_is_refused_where_another_run_writes(tmp_path, holder):
    """Before anything is written; and a directory that is of no use is left as it was."""
    write_text(tmp_path / "text.txt", 30)
    (tmp_path / "text.txt").rename(tmp_path.parent / f"{tmp_path.name}.txt")
    config = toy_config(tmp_path, {"data.path": str(tmp_path.parent / f"{tmp_path.name}.txt"),
                                   "data.cache_dir": str(tmp_path.parent / f"{tmp_path.name}.cache")})
    before = (tmp_path / "train.lock").read_text()
    with pytest.raises(UserError, match="is written by another run"):
        train(config, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]
    assert (tmp_path / "train.lock").read_text() == before
    assert rundir.LOCK == "train.lock"
