"""Power cuts: a run on a file system of its own, of which at random moments only what is on the disk is left.

The file system is shut down without writing anything out (the ioctl that file-system tests use), the processes are
killed, and what is left is mounted again. That needs the right to mount files.
"""

import collections
import contextlib
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.experiments.bench.kills import SAVED_EVERY, SPAN_S, Runs, logged_losses, pause, result_of, steps_of

KIND = "power cut"
SIZE = 512 * 2**20  # bytes of the file system: sparse
SHUTDOWN, WITHOUT_FLUSHING = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
COMMIT_S = 300  # after which the file system would write by itself, longer than a round takes


class Disk:
    """A file system in a file, mounted at `home / "disk"` while the context is open."""

    def __init__(self, home: Path):
        self._image, self.path = home / "disk.img", home / "disk"

    def __enter__(self) -> "Disk":
        self.path.mkdir(exist_ok=True)
        with open(self._image, "wb") as file:
            file.truncate(SIZE)
        _command("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RunError):
            _command("umount", str(self.path))
        self._image.unlink()

    def cut(self) -> None:
        """From now on nothing reaches the disk."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING))
        finally:
            os.close(descriptor)

    def power_on(self) -> None:
        _command("umount", str(self.path))
        self._mount()

    def _mount(self) -> None:
        _command("mount", "-t", "ext4", "-o", f"loop,commit={COMMIT_S}", str(self._image), str(self.path))


def power_cuts(runs: Runs, times: int, seed: int) -> dict:
    """Cut the power of a run at random moments of training; it is started again until it ends, then another begins.

    Once a step is saved the one before it was acknowledged: it must be there. So must whole files of the run.
    """
    began, draw = time.monotonic(), np.random.default_rng((seed, 3))
    outcomes, faults, cuts = collections.Counter(), [], 0
    try:
        with Disk(runs.home) as disk:
            workdir = disk.path / "run"
            while cuts < times:
                started, before = runs.start(workdir), max(logged_losses(workdir), default=0)
                still_running = runs.wait_for_step(workdir, before + SAVED_EVERY, started) and pause(
                    draw.uniform(0, SPAN_S), started)
                if not still_running:
                    found = runs.faults_of_ended(workdir, started)
                    outcomes["runs that ended as undisturbed" if not found else "runs that ended otherwise"] += 1
                    faults += found
                    shutil.rmtree(workdir)
                    continue
                newest = max(logged_losses(workdir))
                acknowledged = {step for step in steps_of(workdir) if step + SAVED_EVERY < newest}
                disk.cut()
                _end(started)
                disk.power_on()
                cuts += 1
                faults += _left(runs, workdir, acknowledged)
                outcomes["checkpoints checked"] += len(steps_of(workdir))
    except (FileNotFoundError, RunError) as error:
        if cuts:
            raise
        outcomes[f"not possible here ({error})"] += 1
    return result_of(KIND, cuts, faults, outcomes, began, [])


def _left(runs: Runs, workdir: Path, acknowledged: set[int]) -> list[str]:
    """What is wrong with what the disk holds."""
    try:
        rundir.read(workdir)
    except UserError as error:
        return [str(error)]
    return runs.faults_of(workdir, acknowledged)


def _end(started: list[subprocess.Popen]) -> None:
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _command(*words: str) -> None:
    """RunError if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{words[0]}: {' '.join(done.stderr.split())[:200]}")
