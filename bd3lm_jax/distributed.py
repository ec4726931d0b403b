"""Many processes, one run: they join, agree on what they do, write once, and stop after the same step.

Everything here is also right for a single process, where it costs nothing.
"""

import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bd3lm_jax import log
from bd3lm_jax.errors import Preempted, RunError, Stuck, UserError
from bd3lm_jax.watchdog import Watchdog

LAST_PORT = 65535
LEAVE_S = 3600  # that processes which are done wait for those that are not
LOST = r"gloo|connection (closed|reset|refused)|unavailable|heartbeat|another task died|barrier timed out"
SEEN_S = 30.0  # within which other hosts see what process 0 has written
SHOWN = 5  # differing keys named in an error
SAME = "start all of them with the same command and the same files"

T = TypeVar("T")


def join(coordinator: str, processes: int | None, process_id: int | None, within: float, heartbeat: float) -> None:
    """Find the other processes: by themselves on TPUs, Slurm and OpenMPI, else at `coordinator` ("HOST:PORT").

    Call it before any device is used. All but the first process say nothing but errors from then on. within: seconds
    until all must be there; else the process ends with exit code 75. heartbeat: seconds of silence after which another
    process counts as dead; then this one ends with exit code 134. UserError for an address or number that cannot be,
    and where there is no cluster to be found.
    """
    told = {}
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of the machine of process 0")
        if len(port) > len(str(LAST_PORT)) or not 1 <= int(port) <= LAST_PORT:
            raise UserError(f"--coordinator={coordinator}: port {port} does not exist, expected 1 to {LAST_PORT}")
        if not process_id < processes:
            raise UserError(f"--process_id={process_id}: expected 0 to {processes - 1} of {processes} processes")
        told = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    what = f"not all processes have joined{f' at {coordinator}' if coordinator else ''}"
    try:
        with Watchdog(within, what):  # at its own time limit jax aborts with a C++ stack trace
            jax.distributed.initialize(**told, initialization_timeout=int(2 * within) + 60,
                                       heartbeat_timeout_seconds=int(heartbeat), shutdown_timeout_seconds=LEAVE_S)
    except ValueError as error:
        raise UserError(f"--distributed found no cluster ({error}): give --coordinator=HOST:PORT --processes=N "
                        "--process_id=I") from None
    except RuntimeError as error:
        kind = Stuck if re.search(LOST, str(error), re.I) else RunError
        raise kind(f"cannot join the other processes: {' '.join(str(error).split())[:300]}") from None
    if jax.process_index() > 0:
        log.silence()


def leave() -> None:
    """Wait until all processes are here, so that none takes the others' end for a failure."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def lost_peer(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says no more than that another process is gone: run all of them again.
    """
    return jax.process_count() > 1 and any(
        _of_runtime(one) and re.search(LOST, str(one), re.I) for one in _causes(error))


def raise_if_lost_peer(error: Exception) -> None:
    """Raise `error` itself where it would be taken for one of files: the barriers of a save and a restore are
    collectives."""
    if lost_peer(error):
        raise error


def _of_runtime(error: BaseException) -> bool:
    """Whether XLA raised it: some calls turn its status, which begins with a code, into a ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and bool(re.match(r"[A-Z_]+: ", str(error))))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def texts(text: str) -> list[str]:
    """The `text` of every process, in order. All must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def of_first(value: T) -> T:
    """The value (JSON) of process 0, on all of them. All must call it."""
    return json.loads(texts(json.dumps(value))[0])


def check_shared(path: Path, look: Callable[[], dict[str, Any]]) -> None:
    """UserError on all processes unless they all see what process 0 sees in a directory. look: what there is to be seen
    (JSON); some file systems show it to other hosts after seconds only."""
    if jax.process_count() == 1:
        return
    wanted, deadline = of_first(look()), time.monotonic() + SEEN_S
    while look() != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [json.loads(text) for text in texts(json.dumps([socket.gethostname(), str(path.absolute()), look()]))]
    for i, (host, where, seen) in enumerate(found):
        differing = [f"{key}: {seen[key]!r} != {wanted[key]!r}" for key in wanted if seen[key] != wanted[key]]
        if differing:
            raise UserError(f"process {i} on {host} does not find in {where} what process 0 on {found[0][0]} has in "
                            f"{found[0][1]} ({'; '.join(differing)}): is it a shared file system? Give all processes "
                            "the same --workdir on one", agreed=True)


def check_same(values: dict[str, Any], what: str, advice: str = SAME) -> None:
    """UserError on all processes, naming the keys, unless `values` (flat, of JSON values) are the same on all of them.
    """
    found = [json.loads(text) for text in texts(json.dumps(values))]
    for i, other in enumerate(found):
        differing = [f"{key}: {found[0].get(key)!r} != {other.get(key)!r}" for key in {**found[0], **other}
                     if found[0].get(key) != other.get(key)]
        if differing:
            more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            raise UserError(f"process {i} has another {what} than process 0 ({'; '.join(differing[:SHOWN])}{more}): "
                            f"{advice}", agreed=True)


def first_alone(work: Callable[[], T]) -> T | None:
    """`work()` on process 0 only, while the others wait; a UserError is raised on all. None on the others."""
    result, said = None, ""
    if jax.process_index() == 0:
        try:
            result = work()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            said = json.dumps([isinstance(error, RunError), str(error)])
    told = texts(said)[0]
    if told:
        failed, message = json.loads(told)
        raise (RunError if failed else UserError)(message, agreed=True)
    return result


def first_then_others(work: Callable[[], T]) -> T:
    """`work()` on process 0, then on the others, which find in a shared cache what it has made."""
    result = first_alone(work)
    return work() if jax.process_index() > 0 else result


class _Terminated(BaseException):
    """SIGTERM at a moment at which nothing is left to save; no error handler is to take it for something else."""


class Stop:
    """Whether the run is to stop; of many processes all are told at the same step, whichever got the signal."""

    def __init__(self):
        self.signalled = threading.Event()
        self._at_once, self._skipping = True, False

    def reached(self, step: int) -> bool:
        """Call it once for every step, in order, on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signalled.is_set()

    @contextlib.contextmanager
    def at_steps(self) -> Iterator[None]:
        """While this is open SIGTERM waits for `reached`; before and after it ends the run at once."""
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True
        if self.signalled.is_set():
            raise _Terminated

    def unless_told(self, work: Callable[[], T], otherwise: T) -> T:
        """`work()`, or `otherwise` if SIGTERM comes before it is done; `work` calls `alive` now and then."""
        self._skipping = True
        try:
            return work()
        except _Terminated:
            return otherwise
        finally:
            self._skipping = False

    def alive(self) -> None:
        """Ends the work that `unless_told` is doing if SIGTERM came."""
        if self._skipping and self.signalled.is_set():
            raise _Terminated

    def hear(self, *_: object) -> None:
        """What SIGTERM does in a single process; only the first one counts, so that none disturbs the end."""
        first = not self.signalled.is_set()
        self.signalled.set()
        if first and self._at_once:
            raise _Terminated


@contextlib.contextmanager
def termination() -> Iterator[Stop]:
    """A Stop that SIGTERM sets; outside of `Stop.at_steps` the signal raises Preempted from here. jax listens to the
    signal in one of many processes, a handler in a single one."""
    stop = Stop()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, stop.hear)
    try:
        yield stop
    except _Terminated:
        raise Preempted("stopped by SIGTERM with nothing left to save: run the same command again to go on") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
