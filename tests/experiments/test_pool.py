"""Processes of a pool: locks that outlive it, signals, last words."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from toy_runs import environment

from bd3lm_jax.core.signals import Signals
from bd3lm_jax.experiments.sweeps import pool
from bd3lm_jax.experiments.sweeps.pool import Job, is_running, run_all


def python(directory, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", textwrap.dedent(code)], directory / f"{name}.log")


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(jobs, parallel: int = 1):
    told, coming = [], iter(jobs)
    with Signals() as signals:
        run_all(lambda: next(coming, None), parallel, signals, lambda job: told.append((job.name, job.state)), id)
    return told, signals.received


@pytest.mark.parametrize(("code", "words", "exit_code"), [
    ("print('a'); print('the  last'); print()", "the last", 0),
    ("print('error: disk full'); print('bye'); raise SystemExit(3)", "disk full", 3),
    ("1 / 0", "ZeroDivisionError: division by zero", 1),
    ("import os; os.kill(os.getpid(), 9)", "", -9),
])
def test_exit_code_and_last_words(tmp_path, code, words, exit_code):
    job = python(tmp_path, "job", code)
    assert run([job])[0] == [("job", "running"), ("job", "ended")]
    assert (job.code, job.last_error()) == (exit_code, words)


def test_the_log_keeps_earlier_output_but_last_words_are_the_latest(tmp_path):
    run([python(tmp_path, "job", "print('error: first')")])
    second = python(tmp_path, "job", "print('second')")
    run([second])
    assert second.last_error() == "second" and second.log.read_text() == "error: first\nsecond\n"


def test_a_job_that_ended_may_come_again_and_is_watched_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POLL_S", 0.05)
    job = python(tmp_path, "job", "import time; print('once'); time.sleep(0.5)")
    coming, told, seen = [job, job], [], []
    with Signals() as signals:
        run_all(lambda: coming.pop() if coming else None, 1, signals, lambda job: told.append(job.state),
                lambda active: seen.append([job.state for job in active]))
    assert told == ["running", "ended"] * 2 and job.log.read_text() == "once\nonce\n"
    assert len(seen) > 4 and all(states == ["running"] for states in seen)


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_at_a_time(tmp_path, parallel):
    jobs = [python(tmp_path, name, "import time; time.sleep(0.3)") for name in "abcd"]
    told, _ = run(jobs, parallel)
    running, most = 0, 0
    for _, state in told:
        running += 1 if state == "running" else -1
        most = max(most, running)
    assert most == parallel and sorted(told) == sorted((name, state) for name in "abcd"
                                                       for state in ("running", "ended"))


def test_a_log_is_locked_while_its_process_lives(tmp_path):
    job = python(tmp_path, "job", "input_ = __import__('time').sleep(60)")
    assert not is_running(job.log) and job.start() and is_running(job.log)
    same = python(tmp_path, "job", "print('never')")
    assert run([same])[0] == [("job", "busy")] and same.code is None
    job.signal(signal.SIGKILL)
    wait_for(lambda: job.code is not None)
    assert not is_running(job.log) and "never" not in job.log.read_text()


def test_the_lock_outlives_a_killed_pool(tmp_path):
    """Its processes go on, and nobody starts them a second time."""
    code = """
        import sys, pathlib
        from bd3lm_jax.core.signals import Signals
        from bd3lm_jax.experiments.sweeps.pool import Job, run_all
        child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        with Signals() as signals:
            jobs = [Job("job", [sys.executable, "-c", child], pathlib.Path(sys.argv[1]))]
            run_all(jobs.pop, 1, signals, id, id)
    """
    log = tmp_path / "job.log"
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(log)], env=environment())
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    owner.kill()
    owner.wait()
    assert is_running(log)
    os.kill(int(log.read_text()), signal.SIGKILL)
    wait_for(lambda: not is_running(log))


def test_a_signal_stops_what_runs_and_starts_no_more(tmp_path):
    polite = python(tmp_path, "polite", """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(42)))
        print("ready", flush=True)
        time.sleep(60)""")
    never = python(tmp_path, "never", "")
    before = signal.getsignal(signal.SIGTERM)

    def interrupt():
        wait_for(lambda: polite.log.exists() and "ready" in polite.log.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    told, received = run([polite, never])
    thread.join()
    assert told == [("polite", "running"), ("polite", "stopped")] and received == [signal.SIGTERM]
    assert (polite.code, polite.last_error()) == (42, "saved")
    assert signal.getsignal(signal.SIGTERM) is before


DEAF = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_kills(tmp_path):
    deaf = python(tmp_path, "deaf", DEAF)

    def interrupt():
        wait_for(lambda: deaf.log.exists() and "ready" in deaf.log.read_text())
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        assert deaf.code is None
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    _, received = run([deaf])
    thread.join()
    assert received == [signal.SIGINT] * 2 and deaf.code == -signal.SIGKILL


def test_what_does_not_leave_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.3)
    deaf = python(tmp_path, "deaf", DEAF)

    def fail(job):
        wait_for(lambda: "ready" in deaf.log.read_text())
        raise OSError("disk full")

    with Signals() as signals, pytest.raises(OSError, match="disk full"):
        run_all([deaf].pop, 1, signals, lambda job: fail(job) if job.state == "running" else None, id)
    assert deaf.code == -signal.SIGKILL


def test_runs_where_files_cannot_be_locked(tmp_path, monkeypatch, capsys):
    """As training does, with a note."""
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    job = Job("a", [sys.executable, "-c", "print('words')"], tmp_path / "a.log")
    with pool.exclusive(tmp_path / ".lock"):
        assert job.start()
    assert job.process.wait(60) == 0 and job.last_error() == "words" and not pool.is_running(tmp_path / "a.log")
    assert "a.log cannot be locked here (No locks available): see that no other process" in capsys.readouterr().err
