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
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from bd3lm_jax.core import log
from bd3lm_jax.core.errors import Preempted, RunError, UserError, WatchdogTimeout
from bd3lm_jax.parallel.watchdog import Watchdog

LAST_PORT = 65535
SHUTDOWN_WAIT_S = 3600  # that processes which are done wait for those that are not
LOST_PEER_PATTERN = r"gloo|connection (closed|reset|refused)|unavailable|heartbeat|another task died|barrier timed out"
SHARED_VISIBLE_S = 30.0  # within which other hosts see what process 0 has written
MAX_KEYS_NAMED = 5  # differing keys named in an error
START_ALIKE = "start all of them with the same command and the same files"

T = TypeVar("T")


def join(coordinator: str, processes: int | None, process_id: int | None, within: float, heartbeat: float) -> None:
    """Find the other processes: by themselves on TPUs, Slurm and OpenMPI, else at `coordinator` ("HOST:PORT").

    Call it before any device is used. All but the first process say nothing but errors from then on. within: seconds
    until all must be there; else the process ends with exit code 75. heartbeat: seconds of silence after which another
    process counts as dead; then this one ends with exit code 134. UserError for an address or number that cannot be,
    and where there is no cluster to be found.
    """
    message_or_options = {}
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of the machine of process 0")
        if len(port) > len(str(LAST_PORT)) or not 1 <= int(port) <= LAST_PORT:
            raise UserError(f"--coordinator={coordinator}: port {port} does not exist, expected 1 to {LAST_PORT}")
        if processes is None or process_id is None:
            raise UserError(f"--coordinator={coordinator} needs its companions: --processes=N --process_id=I")
        if not process_id < processes:
            raise UserError(f"--process_id={process_id}: expected 0 to {processes - 1} of {processes} processes")
        message_or_options = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    what = f"not all processes have joined{f' at {coordinator}' if coordinator else ''}"
    try:
        with Watchdog(within, what):  # at its own time limit jax aborts with a C++ stack trace
            jax.distributed.initialize(**message_or_options, initialization_timeout=int(2 * within) + 60,
                                       heartbeat_timeout_seconds=int(heartbeat),
                                       shutdown_timeout_seconds=SHUTDOWN_WAIT_S)
    except ValueError as error:
        raise UserError(f"--distributed found no cluster ({error}): give --coordinator=HOST:PORT --num_processes=N "
                        "--process_id=I") from None
    except RuntimeError as error:
        kind = WatchdogTimeout if re.search(LOST_PEER_PATTERN, str(error), re.I) else RunError
        raise kind(f"cannot join the other processes: {' '.join(str(error).split())[:300]}") from None
    if jax.process_index() > 0:
        log.silence()


def wait_and_shut_down() -> None:
    """Wait until all processes are here, so that none takes the others' end for a failure."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says no more than that another process is gone: run all of them again.
    """
    return jax.process_count() > 1 and any(
        _is_runtime_error(one) and re.search(LOST_PEER_PATTERN, str(one), re.I) for one in _cause_chain(error))


def raise_if_lost_peer(error: Exception) -> None:
    """Raise `error` itself where it would be taken for one of files: the barriers of a save and a restore are
    collectives."""
    if is_lost_peer(error):
        raise error


def _is_runtime_error(error: BaseException) -> bool:
    """Whether XLA raised it: some calls turn its status, which begins with a code, into a ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and bool(re.match(r"[A-Z_]+: ", str(error))))


def _cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def allgather_texts(text: str) -> list[str]:
    """The `text` of every process, in order. All must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def broadcast_from_process0(value: T) -> T:
    """The value (JSON) of process 0, on all of them. All must call it."""
    return json.loads(allgather_texts(json.dumps(value))[0])


def assert_shared_directory(path: Path, read_state: Callable[[], dict[str, Any]]) -> None:
    """UserError on all processes unless they all see what process 0 sees in a directory. look: what there is to be seen
    (JSON); some file systems show it to other hosts after seconds only."""
    if jax.process_count() == 1:
        return
    expected, deadline = broadcast_from_process0(read_state()), time.monotonic() + SHARED_VISIBLE_S
    while read_state() != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    gathered = [
        json.loads(text)
        for text in allgather_texts(json.dumps(
            [socket.gethostname(), str(path.absolute()), read_state()]))
    ]
    for i, (host, where, state) in enumerate(gathered):
        differences = [f"{key}: {state[key]!r} != {expected[key]!r}" for key in expected if state[key] != expected[key]]
        if differences:
            raise UserError(
                f"process {i} on {host} does not find in {where} what process 0 on {gathered[0][0]} has in "
                f"{gathered[0][1]} ({'; '.join(differences)}): is it a shared file system? Give all processes "
                "the same --workdir on one", on_all_processes=True)


def assert_equal_across_processes(values: dict[str, Any], what: str, advice: str = START_ALIKE) -> None:
    """UserError on all processes, naming the keys, unless `values` (flat, of JSON values) are the same on all of them.
    """
    gathered = [json.loads(text) for text in allgather_texts(json.dumps(values))]
    for i, other in enumerate(gathered):
        differences = [f"{key}: {gathered[0].get(key)!r} != {other.get(key)!r}" for key in {**gathered[0], **other}
                       if gathered[0].get(key) != other.get(key)]
        if differences:
            more = f"; and {len(differences) - MAX_KEYS_NAMED} more" if len(differences) > MAX_KEYS_NAMED else ""
            raise UserError(
                f"process {i} has another {what} than process 0 ({'; '.join(differences[:MAX_KEYS_NAMED])}{more}): "
                f"{advice}", on_all_processes=True)


def run_on_process0(work: Callable[[], T]) -> T | None:
    """`work()` on process 0 only, while the others wait; a UserError is raised on all. None on the others."""
    result, error_text = None, ""
    if jax.process_index() == 0:
        try:
            result = work()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            error_text = json.dumps([isinstance(error, RunError), str(error)])
    message_or_options = allgather_texts(error_text)[0]
    if message_or_options:
        failed, message = json.loads(message_or_options)
        raise (RunError if failed else UserError)(message, on_all_processes=True)
    return result


def process0_first(work: Callable[[], T]) -> T:
    """`work()` on process 0, then on the others, which find in a shared cache what it has made."""
    result = run_on_process0(work)
    return work() if jax.process_index() > 0 else cast(T, result)


class _Terminated(BaseException):
    """SIGTERM at a moment at which nothing is left to save; no error handler is to take it for something else."""


class Stop:
    """Whether the run is to stop; of many processes all are told at the same step, whichever got the signal."""

    def __init__(self):
        self.signalled = threading.Event()
        self._at_once, self._interruptible = True, False

    def should_stop(self, step: int) -> bool:
        """Call it once for every step, in order, on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signalled.is_set()

    @contextlib.contextmanager
    def defer_to_steps(self) -> Iterator[None]:
        """While this is open SIGTERM waits for `should_stop`; before and after it ends the run at once."""
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True
        if self.signalled.is_set():
            raise _Terminated

    def run_unless_stopped(self, work: Callable[[], T], default: T) -> T:
        """`work()`, or `default` if SIGTERM comes before it is done; `work` calls `alive` now and then."""
        self._interruptible = True
        try:
            return work()
        except _Terminated:
            return default
        finally:
            self._interruptible = False

    def alive(self) -> None:
        """Ends the work that `run_unless_stopped` is doing if SIGTERM came."""
        if self._interruptible and self.signalled.is_set():
            raise _Terminated

    def on_signal(self, *_: object) -> None:
        """What SIGTERM does in a single process; only the first one counts, so that none disturbs the end."""
        first = not self.signalled.is_set()
        self.signalled.set()
        if first and self._at_once:
            raise _Terminated


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """A Stop that SIGTERM sets; outside of `Stop.defer_to_steps` the signal raises Preempted from here. jax listens to
    the signal in one of many processes, a handler in a single one."""
    stop = Stop()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, stop.on_signal)
    try:
        yield stop
    except _Terminated:
        raise Preempted("stopped by SIGTERM with nothing left to save: run the same command again to go on") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
