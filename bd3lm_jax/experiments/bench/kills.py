"""Training runs in processes of their own that are killed, stopped and starved of disk space."""

import collections
import dataclasses
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.log import note, read_metrics
from bd3lm_jax.models import forward
from bd3lm_jax.parallel import sharding
from bd3lm_jax.parallel.fingerprint import fingerprints
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.program import Program

KINDS = ("disk full during a save", "SIGKILL", "SIGSTOP of one of two processes", "SIGKILL of one of two processes",
         "replicas that differ")
LAUNCH = ("-m", "launch")
OLDER = "--xla_cpu_max_isa=SSE4_2"  # code as for an older processor, which rounds differently
UNCOMPARED = ("-c", "import sys; from bd3lm_jax.parallel import replicas; from launch.__main__ import launch; "
              "replicas.numeric_environment = dict; launch(sys.argv[1:])")  # only the values show that processes differ
STEPS = {1: 60, 2: 30}  # of a run, by processes
SAVED_EVERY, KEPT = 2, 3
SMALL = {"model.num_layers": 1, "model.hidden_size": 32, "model.num_heads": 2, "model.cond_dim": 16,
         "data.source": "text",
         "data.tokenizer": "bytes", "data.seq_len": 32, "data.valid_fraction": 0.1, "optim.warmup_steps": 0,
         "train.batch_size": 8, "log.every": 1, "eval.rows": 16, "eval.batch_size": 16, "eval.every": 20,
         "eval.num_samples": 0}
DOCUMENTS = 200  # of the text: a line of random letters each
HEARTBEAT_S, JOIN_S, STUCK_S = 10, 30, 20
LEAVE_S = 60  # within which the other of two processes must be gone: more than HEARTBEAT_S, JOIN_S with their start
SPAN_S = 5.0  # of training in which a kill falls
EARLY = 0.2  # part of the kills that fall into the start
FILE_BYTES = 20_000  # of a "full" disk: more than the log, less than the arrays
POLL_S = 0.05
TEXT = "text.txt"
NOTED_EVERY = 5  # kills
TOO_LONG_S = 600


class Runs:
    """The same small run again and again in `home`, in `processes` processes, and what it gives undisturbed."""

    def __init__(self, home: Path, processes: int):
        self.home, self.processes, self.steps = home, processes, STEPS[processes]
        self._truth = {}
        letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (DOCUMENTS, 50), np.uint8)
        (home / TEXT).write_text("".join(bytes(line).decode() + "\n" for line in letters))
        self.whole = home / f"undisturbed-{processes}"
        began = time.monotonic()
        started = self.start(self.whole, "--config.checkpoint.keep=10000")
        self.wait_for_step(self.whole, 1, started)
        self.start_s = time.monotonic() - began
        codes = [_code(process, TOO_LONG_S) for process in started]
        if any(codes):
            raise RunError(f"the undisturbed run failed with {codes}: {self.last_output(self.whole)}")
        self.losses = logged_losses(self.whole)
        config, tokenizer = rundir.read(self.whole)
        special = SpecialIds(tokenizer.mask_id, tokenizer.end_id)
        mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=-1))  # the devices that are here
        self.abstract = Program.of(config, special, mesh, forward.compute_dtype("float32")).arguments()[0]

    def start(self, workdir: Path, *flags: str, last: Mapping[str, str] = MappingProxyType({}),
              program: Sequence[str] = LAUNCH) -> list[subprocess.Popen]:
        """Train in `workdir`; goes on where it was. flags: they have the last word. last: environment variables of the
        last process alone. program: what Python runs."""
        changes = SMALL | {"train.steps": self.steps, "checkpoint.every": SAVED_EVERY, "checkpoint.keep": KEPT,
                           "data.path": self.home / TEXT, "data.cache_dir": self.home / "cache"}
        words = [sys.executable, *program, "train", f"--workdir={workdir}",
                 *(f"--config.{key}={value}" for key, value in changes.items())]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
                                    "JAX_COMPILATION_CACHE_DIR": str(self.home / "programs"),
                                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        joined, port = (), _free_port()
        found = []
        for i in range(self.processes):
            environment |= last if i == self.processes - 1 else {}
            if self.processes > 1:
                joined = ("--distributed", f"--coordinator=127.0.0.1:{port}", f"--num_processes={self.processes}",
                          f"--process_id={i}", "--mesh=data=2", f"--heartbeat_timeout={HEARTBEAT_S}",
                          f"--init_timeout={JOIN_S}")
            with open(self._log(workdir, i), "wb") as file:
                found.append(subprocess.Popen([*words, *joined, *flags], stdin=subprocess.DEVNULL, stdout=file,
                                              stderr=file, env=environment))
        return found

    def wait_for_step(self, workdir: Path, step: int, started: list[subprocess.Popen]) -> bool:
        """Until a step later than `step` is logged; False if a process ended before."""
        deadline = time.monotonic() + TOO_LONG_S
        while max(logged_losses(workdir), default=0) <= step:
            if any(process.poll() is not None for process in started):
                return False
            if time.monotonic() > deadline:
                raise RunError(f"no step within {TOO_LONG_S} s: {self.last_output(workdir)}")
            time.sleep(POLL_S)
        return True

    def last_output(self, workdir: Path) -> str:
        """The last words of all processes."""
        texts = [self._log(workdir, i).read_text(errors="replace") for i in range(self.processes)]
        return " | ".join(text[-500:] for text in texts)

    def _log(self, workdir: Path, i: int) -> Path:
        return self.home / f"{workdir.name}.{i}.log"

    def truth(self, step: int) -> dict[str, int]:
        """Fingerprints of the undisturbed run at a step."""
        if step not in self._truth:
            with Checkpoints(self.whole, KEPT, read_only=True) as checkpoints:
                self._truth[step] = fingerprints(checkpoints.restore(self.abstract, step)[0])
        return self._truth[step]

    def last_two(self) -> Path:
        """A copy of the undisturbed run that holds its last two checkpoints only."""
        copy = self.home / "last-two"
        if not copy.exists():
            copy.mkdir()
            for step in steps_of(self.whole)[-2:]:
                shutil.copytree(self.whole / "checkpoints" / str(step), copy / "checkpoints" / str(step))
        return copy

    def restored(self, workdir: Path) -> tuple[int, bool, bool]:
        """What training would go on from: the step, whether its values are right, whether there was a warning."""
        warnings = []
        with Checkpoints(workdir, KEPT, warn=warnings.append) as checkpoints:
            state, _ = checkpoints.restore(self.abstract)
        return int(state.step), fingerprints(state) == self.truth(int(state.step)), bool(warnings)

    def faults_of(self, workdir: Path, acknowledged: set[int]) -> list[str]:
        """What is wrong with the checkpoints there. acknowledged: steps that were complete at some time; the latest of
        them must be there, and all that are there must be whole and as in the undisturbed run."""
        faults = []
        with Checkpoints(workdir, KEPT, read_only=True) as checkpoints:
            there = checkpoints.steps()
            faults += [f"step {step} is lost" for step in sorted(acknowledged | set(there))[-KEPT:]
                       if step not in there]
            for step in there:
                try:
                    state, _ = checkpoints.restore(self.abstract, step)
                except RunError as error:
                    faults.append(str(error))
                    continue
                if fingerprints(state) != self.truth(step):
                    faults.append(f"step {step} is not that of the undisturbed run")
        return faults

    def faults_at_end(self, workdir: Path) -> list[str]:
        """What is wrong with a run that ended by itself."""
        found = logged_losses(workdir)
        differing = [step for step in self.losses if found.get(step) != self.losses[step]]
        missing = [] if self.steps in steps_of(workdir) else ["the last step is missing"]
        return self.faults_of(workdir, set()) + missing + ([f"other losses at {differing[:5]}"] if differing else [])

    def faults_of_ended(self, workdir: Path, started: list[subprocess.Popen]) -> list[str]:
        """Wait for the end of a run; what is wrong then."""
        codes = [_code(process, TOO_LONG_S) for process in started]
        return self.faults_at_end(workdir) if not any(codes) else [f"exit codes {codes}: {self.last_output(workdir)}"]


def kill(runs: Runs, times: int, seed: int) -> dict:
    """SIGKILL to one process of a run at random moments; it is started again until it ends, then another one begins."""
    began, draw = time.monotonic(), np.random.default_rng((seed, 2, runs.processes))
    outcomes, faults, ends = collections.Counter(), [], []
    workdir, killed, ended = runs.home / f"killed-{runs.processes}", 0, False
    while killed < times or not ended:
        started, before = runs.start(workdir), max(logged_losses(workdir), default=0)
        ended = not _reached_random_moment(runs, workdir, started, before, draw, for_ever=killed == times)
        if ended:
            found = runs.faults_of_ended(workdir, started)
            faults += found
            outcomes["runs that ended as undisturbed" if not found else "runs that ended otherwise"] += 1
            shutil.rmtree(workdir, ignore_errors=True)
            continue
        acknowledged = set(steps_of(workdir))
        victim = int(draw.integers(len(started)))
        started[victim].send_signal(signal.SIGKILL)
        killed += 1
        faults += _left(runs, workdir, started, victim, ends, outcomes) + runs.faults_of(workdir, acknowledged)
        outcomes["checkpoints checked"] += len(steps_of(workdir))
        if killed % NOTED_EVERY == 0:
            note(f"{killed} of {times} killed, {len(faults)} faults")
    return result_of(KINDS[1 if runs.processes == 1 else 3], times, faults, outcomes, began, ends)


def _reached_random_moment(runs: Runs, workdir: Path, started: list[subprocess.Popen], before: int,
                           draw: np.random.Generator, for_ever: bool) -> bool:
    """Wait for a random moment of the start or of training; whether all processes are still there."""
    if for_ever:
        return False
    if draw.random() < EARLY:
        return pause(draw.uniform(0, runs.start_s), started)
    return runs.wait_for_step(workdir, before, started) and pause(draw.uniform(0, SPAN_S), started)


def stop_one(runs: Runs) -> dict:
    """SIGSTOP to one of two processes: the watchdog of the other ends it, and the same command goes on."""
    began, outcomes, faults, ends = time.monotonic(), collections.Counter(), [], []
    workdir = runs.home / "stopped"
    started = runs.start(workdir, f"--watchdog_timeout={STUCK_S}", "--heartbeat_timeout=100")
    runs.wait_for_step(workdir, 5, started)
    started[1].send_signal(signal.SIGSTOP)
    faults += _left(runs, workdir, started, 1, ends, outcomes, expected=(75,))
    faults += runs.faults_of_ended(workdir, runs.start(workdir))
    return result_of(KINDS[2], 1, faults, outcomes, began, ends)


def mismatched_replicas(runs: Runs) -> dict:
    """One of two processes rounds differently: refused with 2 when they start, and where their environments do not
    show it, with 1 before anything is saved; then the same command goes on."""
    began, outcomes, faults = time.monotonic(), collections.Counter(), []
    workdir = runs.home / "unlike"
    for program, expected, words in ((LAUNCH, 2, "has another environment"), (UNCOMPARED, 1, "replicas differ from")):
        started = runs.start(workdir, last={"XLA_FLAGS": OLDER}, program=program)
        codes = [_code(process, TOO_LONG_S) for process in started]
        outcomes[f"exit codes {codes[0]} and {codes[1]}"] += 1
        if codes != [expected] * 2 or words not in runs.last_output(workdir) or steps_of(workdir):
            faults.append(f"exit codes {codes}, steps {steps_of(workdir)}: {runs.last_output(workdir)}")
    faults += runs.faults_of_ended(workdir, runs.start(workdir))
    return result_of(KINDS[4], 2, faults, outcomes, began, [])


def full_disk(runs: Runs) -> dict:
    """Files may not grow beyond FILE_BYTES from some step on (EFBIG, what a disk quota gives): the save fails, the run
    ends with 1 and says so, its last checkpoint is whole, and with room the same command goes on. A run that had ended
    by then, or all but, shows nothing: its outcome says so."""
    began, outcomes, faults = time.monotonic(), collections.Counter(), []
    workdir = runs.home / "full"
    started, = runs.start(workdir)
    in_time = runs.wait_for_step(workdir, 10, [started])
    if in_time:
        resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        in_time = max(logged_losses(workdir)) < runs.steps - 2 * SAVED_EVERY  # there are saves to come
    code, last_output = _code(started, TOO_LONG_S), runs.last_output(workdir)
    if not in_time and code == 0:
        outcomes["ended before the disk was full"] += 1
        return result_of(KINDS[0], 1, faults, outcomes, began, [])
    outcomes[f"exit code {code}"] += 1
    if code != 1 or "error: could not save a checkpoint to" not in last_output:
        faults.append(f"exit code {code}: {last_output}")
    faults += runs.faults_of(workdir, set(steps_of(workdir)))
    faults += runs.faults_of_ended(workdir, runs.start(workdir))
    return result_of(KINDS[0], 1, faults, outcomes, began, [])


def _left(runs: Runs, workdir: Path, started: list[subprocess.Popen], victim: int, ends: list[float],
          outcomes: collections.Counter, expected: tuple[int, ...] = (75, 134)) -> list[str]:
    """Wait until the other processes have left; faults if they do not (137), or with another exit code: 0 is one of a
    run that was not done."""
    began, faults = time.monotonic(), []
    for i, process in enumerate(started):
        if i == victim:
            continue
        code = _code(process, LEAVE_S)
        ends.append(time.monotonic() - began)
        outcomes[f"exit code {code} of the other"] += 1
        if code not in expected and not (code == 0 and runs.steps in steps_of(workdir)):
            faults.append(f"the other process left with {code} after {ends[-1]:.0f} s: {runs.last_output(workdir)}")
    started[victim].kill()
    for process in started:
        process.wait()
    return faults


def _code(process: subprocess.Popen, within: float) -> int:
    """The exit code as a shell says it; a process that takes longer is killed: 137."""
    try:
        code = process.wait(within)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return 128 - code if code < 0 else code


def result_of(name: str, times: int, faults: list[str], outcomes: collections.Counter, began: float,
              ends: list[float]) -> dict:
    return {"variant": name, "times": times, "wrong": len(faults), "outcomes": dict(outcomes),
            "details": [fault[-1000:] for fault in faults], "seconds": time.monotonic() - began,
            "left_after_s": max(ends, default=None)}


def pause(seconds: float, started: list[subprocess.Popen]) -> bool:
    """Whether all processes are there after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(POLL_S, seconds))
        if any(process.poll() is not None for process in started):
            return False
    return True


def steps_of(workdir: Path) -> list[int]:
    """Steps that are complete there."""
    with Checkpoints(workdir, KEPT, read_only=True) as checkpoints:
        return checkpoints.steps()


def logged_losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
