"""Programs that a model wrote, run one by one in processes with limits (see docs/tasks.md for what this is not).

`sandbox_child.py` is the other half: it runs in the process, sets the limits, and decides whether a program passed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bd3lm_jax.errors import RunError, UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
GRACE_S = 10.0  # for the supervisor to start and to clean up, before it is killed as well


class Limits(NamedTuple):
    """Of one program. cpu_s, memory_mib (address space): of each of its processes; file_mib: of each file; processes:
    how many at once, threads counted."""

    wall_s: float
    cpu_s: int
    memory_mib: int
    file_mib: int
    processes: int


class Outcome(NamedTuple):
    """detail: "" if passed, else the exception or how the program ended. isolation: what applied beyond the limits:
    "processes" (it sees no other ones), "network" (it has none), "files" (it changes none outside its directory)."""

    passed: bool
    detail: str
    isolation: list[str]


def check(limits: Limits) -> list[str]:
    """The isolation that this machine offers. UserError where programs cannot be run with limits at all."""
    if sys.platform != "linux":
        raise UserError(f"generated programs run only on Linux, whose kernel limits them; this is {sys.platform}: run "
                        "this task in a Linux container")
    try:
        return run("", [], limits).isolation
    except RunError as error:
        raise UserError(str(error)) from None


def run(program: str, tests: Sequence[str], limits: Limits) -> Outcome:
    """Run the source text `program`, then `tests` one by one in its namespace; passed if none raises in time.

    The process starts with an empty environment and in a temporary directory of its own, which is removed. Raises
    RunError if the sandbox itself fails.
    """
    job = json.dumps({"parts": [program, *tests], "limits": limits._asdict()}).encode()
    # Not -I, which would ignore the fixed order of sets: nothing else is inherited either.
    command = [sys.executable, "-s", "-P", "-X", "utf8", str(CHILD)]
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as directory:
        environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0",
                       "OPENBLAS_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd=directory, env=environment, start_new_session=True) as process:
            try:
                output, errors = process.communicate(job, timeout=limits.wall_s + GRACE_S)
            except subprocess.TimeoutExpired:
                return Outcome(False, "TimeLimit: it did not end when told to", [])
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return Outcome(**json.loads(output))
    if process.returncode < 0:
        return Outcome(False, "Killed: it ended its supervisor", [])
    raise RunError(f"the sandbox for generated programs failed: {errors.decode(errors='replace').strip()[-300:]}")


def run_all(programs: Sequence[tuple[str, Sequence[str]]], limits: Limits) -> list[Outcome]:
    """`run` of many (program, tests), as many at a time as this process has cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda one: run(*one, limits), programs))
