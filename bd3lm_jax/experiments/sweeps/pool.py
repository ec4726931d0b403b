"""A local pool of processes: each writes to a log file, which it locks while it runs; signals stop all of them."""

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bd3lm_jax.core import lock
from bd3lm_jax.core.log import note
from bd3lm_jax.core.signals import Signals

POLL_S = 0.2  # between looks at the processes
LOCK_S = 1.0  # that a start waits for a lock, which someone may hold only to look at it
GRACE_S = 60.0  # for a process to leave after SIGTERM, before it is killed


class Job:
    """A command and its log file; `state`: "waiting", "running", "busy" (another process runs it), "ended", "stopped".

    The lock on the log file is held by the process itself, so that it outlives a killed pool with the process.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path):
        self.name, self.command, self.log = name, command, log
        self.state, self._start = "waiting", 0
        self.process: subprocess.Popen | None = None

    @property
    def code(self) -> int | None:
        """Exit code of its process; -N if signal N killed it."""
        return None if self.process is None else self.process.poll()

    def start(self) -> bool:
        """False if another process runs it. OSError if the log cannot be written or the command does not exist."""
        with open(self.log, "ab") as log:
            if not _lock(log, fcntl.LOCK_EX, LOCK_S):
                self.state = "busy"
                return False
            self._start = log.tell()
            # A group of its own: Ctrl-C in the terminal reaches only the pool.
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True)
        self.state = "running"
        return True

    def signal(self, number: int) -> None:
        """To the process and all that it has started."""
        if self.process is not None and self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_error(self) -> str:
        """The last `error: ` line of its latest process, else the last line; "" if it wrote none."""
        with open(self.log, "rb") as log:
            log.seek(self._start)
            text = log.read().decode(errors="replace")
        lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1]


def is_running(log: Path) -> bool:
    """Whether a process holds this log file."""
    if not log.exists():
        return False
    with open(log, "rb") as file:
        return not _lock(file, fcntl.LOCK_SH, 0)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, for which others wait."""
    with open(path, "wb") as file:
        _lock(file, fcntl.LOCK_EX, math.inf)
        yield


def run_all(next_job: Callable[[], Job | None], parallel: int, signals: Signals, changed: Callable[[Job], None],
            watch: Callable[[Sequence[Job]], None]) -> None:
    """Run jobs, `parallel` at a time, until all have ended or a signal came, which stops those that run.

    next_job: asked when there is room, None for nothing to do now; one that has ended may come again. changed: told
    when a job starts, is busy, ends or was stopped. watch: shown those that run, at every look at them.
    """
    active: list[Job] = []
    try:
        while not signals.received:
            while len(active) < parallel and (job := next_job()):
                if job.start():
                    active.append(job)
                changed(job)
            if not active:
                return
            signals.wait(POLL_S)
            watch(active)
            for job in [job for job in active if job.code is not None]:
                active.remove(job)
                job.state = "ended"
                changed(job)
    finally:
        _stop(active, signals)
        for job in active:
            changed(job)


def _stop(jobs: Sequence[Job], signals: Signals) -> None:
    """SIGTERM, then SIGKILL after GRACE_S or a second signal to the pool."""
    for job in jobs:
        note(f"{job.name}: asked to stop; a second signal kills it")
        job.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(job.code is None for job in jobs):
        if time.monotonic() > deadline or len(signals.received) > 1:
            for job in jobs:
                job.signal(signal.SIGKILL)
        time.sleep(POLL_S)
    for job in jobs:
        job.state = "stopped"


def _lock(file: BinaryIO, kind: int, seconds: float) -> bool:
    return lock.acquire(file.fileno(), file.name, seconds, "see that no other process trains the same sweep", kind)
