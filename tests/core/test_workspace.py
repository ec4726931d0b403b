"""Directories that are built in turn, and what killed processes leave: removed when nobody can be writing it."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from places import ROOT
from toy_build import BUILD

from bd3lm_jax.core import files, lock, workspace

COUNT = """
import sys, time
from pathlib import Path
from bd3lm_jax.core import lock
path = Path(sys.argv[1])
for _ in range(50):
    with lock.hold_waiting(path.with_name(".count.lock"), "counts"):
        number = int(path.read_text())
        time.sleep(0.0005)
        path.write_text(str(number + 1))
"""


@pytest.fixture
def builder(tmp_path):
    """Another process that builds tmp_path/rows, and the name of its directory."""
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path / "rows")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


@pytest.fixture
def open_mode_locks(monkeypatch):
    """As network file systems that turn flock into a lock of the byte range: an exclusive one needs a file for
    writing."""
    original = fcntl.flock

    def flock(file, kind):
        descriptor = file if isinstance(file, int) else file.fileno()
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if kind & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return original(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_one_at_a_time_though_the_lock_file_goes_each_time(tmp_path):
    """A process that has opened the file before it went must not take the lock on what is gone."""
    (tmp_path / "count").write_text("0")
    words = [sys.executable, "-c", COUNT, str(tmp_path / "count")]
    processes = [subprocess.Popen(words, cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "200" and os.listdir(tmp_path) == ["count"]


def test_who_waits_says_for_whom(tmp_path, builder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    process, name = builder
    threading.Timer(1.0, lambda: (process.kill(), process.wait())).start()
    with workspace.directory(tmp_path / "rows", "builds the same rows"):
        assert name not in os.listdir(tmp_path)  # its process was killed
    host = socket.gethostname()
    assert f"waits for pid {process.pid} on {host} since 20" in (said := capsys.readouterr().err)
    assert said.endswith(", which builds the same rows\n") and os.listdir(tmp_path) == []


def test_what_a_living_process_builds_stays(tmp_path, builder):
    process, name = builder
    assert workspace.abandoned_builds(tmp_path / "rows") == []
    workspace.remove_leftovers(tmp_path / "rows")
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("locks", ["whole", "open_mode_locks", "no_locks"])
def test_what_a_killed_process_left_goes_once_all_is_done(tmp_path, builder, locks, request):
    if locks != "whole":
        request.getfixturevalue(locks)
    process, name = builder
    process.kill()
    process.wait()
    workspace.parts(tmp_path / "rows").mkdir()
    assert (tmp_path / name).is_dir()
    workspace.remove_leftovers(tmp_path / "rows")
    assert os.listdir(tmp_path) == []


def test_parts_stay_while_somebody_builds(tmp_path, builder):
    workspace.parts(tmp_path / "rows").mkdir()
    workspace.remove_leftovers(tmp_path / "rows")
    assert workspace.parts(tmp_path / "rows").is_dir()


@pytest.mark.parametrize("name", ["rows.part-elsewhere-1-0123abcd", "rows.part-abcd_123"])
def test_directories_of_other_hosts_and_earlier_versions_go_after_a_day(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokens.flat").write_text("a")
    assert workspace.abandoned_builds(tmp_path / "rows") == []
    for path in (tmp_path / name, tmp_path / name / "tokens.flat"):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    assert workspace.abandoned_builds(tmp_path / "rows") == [tmp_path / name]
    os.utime(tmp_path / name / "tokens.flat")  # somebody writes there
    assert workspace.abandoned_builds(tmp_path / "rows") == []


def test_names_that_only_begin_alike_are_left_alone(tmp_path):
    (tmp_path / f"rows-2.part-{socket.gethostname()}-{2**22 + 1}-0123abcd").mkdir()
    assert workspace.abandoned_builds(tmp_path / "rows") == []


def test_a_process_does_not_wait_for_itself(tmp_path):
    with workspace.directory(tmp_path / "rows", "builds") as first:
        with workspace.directory(tmp_path / "rows", "builds") as second:
            assert first.is_dir() and second.is_dir() and first != second


def test_published_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files, "sync_tree", lambda path: order.append(("tree", path.exists())))
    monkeypatch.setattr(files, "sync", lambda path: order.append(("names", (tmp_path / "rows").exists())))
    with workspace.directory(tmp_path / "rows", "builds") as made:
        workspace.rename_into_place(made, tmp_path / "rows")
    assert order == [("tree", True), ("names", True)] and os.listdir(tmp_path) == ["rows"]


def test_a_lock_file_of_another_user_is_waited_for_all_the_same(tmp_path, monkeypatch):
    """It cannot be opened for writing."""
    (tmp_path / ".rows.lock").write_text("")
    original = os.open

    def refuse(path, flags, *mode):
        if str(path).endswith(".lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with lock.hold_waiting(tmp_path / ".rows.lock", "builds") as is_held:
        assert is_held
